"""What was taken for what: the reading of the model that all figures of a record rest on, and what was not measured.

Modules and operations are named as they were met: `blocks.0.attn.out`, or `matmul #1 of blocks.0.attn` for the second matmul in
that module's own code. Axes are named `sequence head window query key token width`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from uncollapse.records.common import Stack


@dataclass(frozen=True)
class NotMeasured:
    """A figure or group of figures that is missing in one block (null: where a stack begins), and why."""

    block: int | None
    what: str
    reason: str


@dataclass(frozen=True)
class StreamAxesRecord:
    """Which axis of the block's stream holds what. `sequence` is null where sequences are laid end to end. A grid of tokens has
    two token axes. `streams` is the axis of several streams side by side, null for one stream. Where the model has them on one axis
    with another, such as that of the sequences, `folded` says so, and the axes are those behind its opening."""

    sequence: int | None
    token: list[int]
    width: int
    streams: int | None = None
    folded: bool = False


@dataclass(frozen=True)
class ForbiddenPairs:
    """What forbade pairs of queries and keys on the user's batches: an operation between logits and weights, or an argument of a
    fused call (`attn_mask`, `is_causal`). `axes` names the axes of the operation's result, null where one was not told."""

    operation: str
    argument: str | None
    axes: list[str | None]


@dataclass(frozen=True)
class AttentionCallRecord:
    """One product that mixes values. `axes` are those of the weights in the product itself. An axis that holds two things is
    named `sequence·head`, with the slower one first. `weights` is the number of the weights among the product's tensors, null for
    a fused call. `softmax` is the operation that makes the weights, null if none does. `before` and `after` count key columns that
    belong to no token (sinks). `by_sequence`: it runs in a loop, once for each sequence."""

    product: str
    weights: int | None
    softmax: str | None
    axes: list[str]
    heads: int
    key_value_heads: int
    head_width: int
    before: int
    after: int
    output_projection: str | None
    forbids: list[ForbiddenPairs] = field(default_factory=list)
    by_sequence: bool = False


@dataclass(frozen=True)
class PartRecord:
    """One sublayer. `reads` and `writes` are the modules of an MLP's first and last learned product. `causal`: a token reaches only
    later ones. `deviation` is how far weights times values were from the product's result on the user's batches, relative to its
    size; `row_sums` are the smallest and largest sum of a row of weights. Both are null where attention was not measured."""

    kind: Literal["attention", "cross", "mlp", "mixer"]
    module: str
    causal: bool | None = None
    reads: str | None = None
    writes: str | None = None
    attention: list[AttentionCallRecord] = field(default_factory=list)
    deviation: float | None = None
    row_sums: list[float] | None = None


@dataclass(frozen=True)
class NormPlace:
    """One norm of a block: a module, or the operation whose result it is. `role`: `before` or `after` the part with number `part`
    (null: shared by several), `inner` (query-key norms), or `post`, on the stream after residual addition number `part`.
    `obstacle` says why it can be measured but not removed; empty if it can be."""

    norm: str
    kind: Literal["layer", "rms"]
    role: Literal["before", "after", "inner", "post"]
    part: int | None
    obstacle: str = ""


@dataclass(frozen=True)
class BlockAnatomy:
    """One block. `axes` is null where the axes of its stream were not told; then `axes_reason` says why."""

    block: int
    stack: Stack | None
    module: str
    placement: Literal["pre", "post", "sandwich", "output", "none"]
    axes: StreamAxesRecord | None
    axes_reason: str
    parts: list[PartRecord]
    norms: list[NormPlace]


@dataclass(frozen=True)
class MaskRecord:
    """A tensor of the batch that hides tokens from a stack. `real` is its value at a real token. `unit`: `token` if it has one
    entry per token of the stream, `other` if it counts something else (audio samples). `transposed`: its axes are token and
    sequence, in this order."""

    tensor: str
    real: int
    unit: Literal["token", "other"]
    transposed: bool


@dataclass(frozen=True)
class StackAnatomy:
    """Blocks that hand one stream on, the masks that govern it, and the tensor of token ids that its embedding is made of."""

    stack: Stack | None
    blocks: list[int]
    masks: list[MaskRecord]
    ids: str | None


@dataclass(frozen=True)
class AnatomyRecord:
    """What was taken for what, block by block and stack by stack, and what was not measured."""

    blocks: list[BlockAnatomy]
    stacks: list[StackAnatomy]
    not_measured: list[NotMeasured] = field(default_factory=list)

    @property
    def is_causal(self) -> bool | None:
        """Whether tokens see only earlier ones; None where no attention says, and where one stack does and the other does not."""
        found = [part.causal for block in self.blocks for part in block.parts if part.kind == "attention"]
        known = {causal for causal in found if causal is not None}
        return known.pop() if len(known) == 1 else None
