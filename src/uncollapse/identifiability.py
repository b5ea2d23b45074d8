"""May a result be attributed to a head of this model? Block by block, from its weights and one probe pass.

The heads' figures of a diagnosis by themselves, with the rules about them: for who asks this one question. What an observer of
the layer's output cannot know is not a matter of the probe; the probe only says how much each head writes.

What this can not say: whether a head *matters*. A head that can be told from the others may do nothing, and heads that cannot be
told apart may carry the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from uncollapse.anatomy import Layout
from uncollapse.capture import Progress
from uncollapse.diagnosis import observe, prepare
from uncollapse.interception import float64_kept
from uncollapse.recorded import Recorded
from uncollapse.records import HEADS_SCHEMA, Finding, HeadsRecord, IdentifiabilityRecord

ABOUT_HEADS = ("head-channel-non-identifiability", "numerics")


@dataclass(frozen=True)
class Identifiability(Recorded[IdentifiabilityRecord]):
    """What `identify` found. `record` is the whole of it, as data."""

    @property
    def heads(self) -> list[HeadsRecord]:
        """One record an attention call, in order of depth."""
        return self.record.heads

    @property
    def findings(self) -> list[Finding]:
        """What fired, the most severe first."""
        return self.record.findings


def identify(
    model: nn.Module | str | Path = "demo",
    texts: Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    layout: Layout | None = None,
    sequences: int | None = None,
    max_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Identifiability:
    """What each observer of a block's output can know of its heads, and a verdict a block and a head.

    The arguments are those of `diagnose`. The text decides `energy_share` and the number of tokens n alone; everything else
    comes from the output projections. For the vectors that the heads write see `uncollapse.head_contributions`.

    Raises `InputError` for input that cannot be used and `UnsupportedModel` where the anatomy cannot be proved.
    """
    prepared = prepare(
        model,
        texts,
        tokenizer=tokenizer,
        batches=batches,
        layout=layout,
        sequences=sequences,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        name=name,
        progress=progress,
    )
    with float64_kept(prepared.loaded.model):
        diagnosed = observe(prepared, command=command, progress=progress)
    return Identifiability(
        IdentifiabilityRecord(
            schema=HEADS_SCHEMA,
            versions=diagnosed.versions,
            model=diagnosed.model,
            probe=diagnosed.probe,
            heads=diagnosed.heads,
            findings=[finding for finding in diagnosed.findings if finding.phenomenon in ABOUT_HEADS],
        )
    )
