"""A model and text, turned into batches of token sequences.

`load_model` opens the packaged demo model, a saved folder or a hub id. `series` puts several checkpoints in order. `read_texts`
and `default_texts` give sequences of text. `tokenize` makes padded batches of them, and `check_batches` checks batches that
somebody else made. Input that cannot be used is refused here in one line, before anything slow runs. Import from here, not from
the modules below.
"""

from uncollapse.sources.batches import (
    bound,
    check_batches,
    fingerprint,
    position_limit,
    sequence_count,
    token_count,
    token_mask,
    tokenize,
)
from uncollapse.sources.checkpoint_series import Checkpoint, series, weights_fingerprint
from uncollapse.sources.loading import DTYPES, LoadedModel, checkpoint_folder, load_model
from uncollapse.sources.texts import default_texts, read_texts

__all__ = [
    "DTYPES",
    "Checkpoint",
    "LoadedModel",
    "bound",
    "check_batches",
    "checkpoint_folder",
    "default_texts",
    "fingerprint",
    "load_model",
    "position_limit",
    "read_texts",
    "sequence_count",
    "series",
    "token_count",
    "token_mask",
    "tokenize",
    "weights_fingerprint",
]
