"""What attention does where all tokens of a sequence are equal: the pattern that is left when only positions tell keys apart.

Without positions in the logits and with a full mask every key gets the same weight there, and the tokens' distances are cubed
from layer to layer (docs/theory.md, section 4). A relative bias, rotary positions and a causal mask leave a pattern of their own,
and then distances fall geometrically. Which of them a model has is not asked: its live stream is put at consensus, and its
attention is looked at there.

When not to use it: for a rate. With several heads the ratio depends on the values too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from uncollapse.anatomy.stacks import per_token
from uncollapse.anatomy.streams import met
from uncollapse.anatomy.vocabulary import Anatomy, StreamAxes
from uncollapse.probe.attention import ATTENTION_MEASURES
from uncollapse.probe.passes import capture

SEQUENCES = 2


def contraction_at_consensus(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, seed: int = 0
) -> list[float] | None:
    """||CA||_2 of each self-attention of the followed stack (the largest of its heads) with every stream that enters a block
    replaced by its mean token. `None` where an attention is not decomposed.

    0 up to rounding where positions and mask leave the rows of A equal. The pass is one more of the model, on `batch` as it is.

    Raises what `capture` raises.
    """
    actions = [(block.entry, _equal(block.axes)) for block in anatomy.blocks]
    with met(model, actions):
        observed = capture(model, [batch], anatomy, watch={"attention", "spectra"}, seed=seed)
    followed = set(anatomy.stacks[-1].blocks)
    row = ATTENTION_MEASURES.index("contraction")
    found = []
    for statistics in observed.attention:
        if statistics.kind != "self" or statistics.block not in followed:
            continue
        heads = [statistics.values.summary(row, head)[0] for head in range(statistics.values.total.shape[1])]
        if not heads or not all(math.isfinite(value) for value in heads):
            return None
        found.append(max(heads))
    return found or None


def few_sequences(batch: Mapping[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """The first sequences of a batch all of whose tensors are known to have one for each place along their first axis; otherwise
    the batch as it is. A square tensor may be a mask over pairs of tokens, unless it is known what it holds."""
    told = (
        per_token(anatomy) if not any(stack.ids is None or stack.ids_transposed for stack in anatomy.stacks) else set()
    )
    tensors = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}
    counts = {v.shape[0] for v in tensors.values()}
    square = {name for name, v in tensors.items() if v.ndim > 1 and v.shape[0] == v.shape[1]}
    if len(counts) != 1 or not told or not square <= told:
        return dict(batch)
    return {k: v[:SEQUENCES] if k in tensors else v for k, v in batch.items()}


def _equal(axes: StreamAxes | None) -> Any:
    tokens = (1,) if axes is None else axes.token
    return lambda stream: stream.mean(tokens, keepdim=True).expand_as(stream).contiguous()
