"""How much of the head-channel symmetry the gates of a live model have broken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from uncollapse.errors import InputError, UncollapseError
from uncollapse.gates.projection import PositionGatedProjection, dense_projection
from uncollapse.measures import heads as head_measures
from uncollapse.measures.heads import gauge_of_gates


@dataclass(frozen=True)
class BlockGates:
    """What the gates of one attention have broken. `rank` and `condition` are those of G [position, head]; of the
    `plain_dimension` D² directions of mixing that a projection without gates hides, `surviving_dimension` are left: exactly
    where W_O has `full_row_rank`, else at least (`None`: W_O is no dense matrix). `smallest` and `largest` are gates. `block`
    counts calls from 0; `None` in a model whose own code holds the gates."""

    block: int | None
    kind: str | None
    module: str
    heads: int
    head_width: int
    rank: int
    condition: float
    surviving_dimension: int
    plain_dimension: int
    full_row_rank: bool | None
    smallest: float
    largest: float


def gate_report(model: nn.Module, positions: int | Int[Tensor, " position"] = 512) -> tuple[BlockGates, ...]:
    """What the gates of a live model have broken so far: one entry an attention, in the order of the blocks.

    positions: how many, counted from 0, or which. Rank and condition are those of the gates at these positions: no more heads than
    positions can be told apart, and gates learned on short texts say nothing of later positions.

    Raises `InputError` for a model without gates.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, PositionGatedProjection)}
    if not found:
        raise InputError(
            f"gate_report: expected a model with position gates, got {type(model).__name__} without. They may have been removed. "
            "Call install_gates(model) first."
        )
    entries = []
    for name, module in found.items():
        rows = module.max_positions
        at = torch.arange(positions) if isinstance(positions, int) else positions
        at = at if rows is None else at[at < rows]
        with torch.no_grad():
            gates = module.gates(at)
        places = module.installed.places if module.installed else ((None, None),)
        entries += [_block_gates(block, kind, name, module, gates) for block, kind in places]
    return tuple(sorted(entries, key=lambda entry: (entry.block is not None, entry.block or 0)))


def _block_gates(
    block: int | None, kind: str | None, name: str, module: PositionGatedProjection, gates: Tensor
) -> BlockGates:
    try:
        matrix = dense_projection(module.projection)
        full = head_measures.kernel_dimension(matrix) == 0
    except UncollapseError:
        full = None
    return BlockGates(
        block=block,
        kind=kind,
        module=name,
        heads=module.heads,
        head_width=module.head_width,
        rank=head_measures.gate_rank(gates),
        condition=head_measures.gate_conditioning(gates),
        surviving_dimension=gauge_of_gates(gates, module.head_width),
        plain_dimension=(module.heads * module.head_width) ** 2,
        full_row_rank=full,
        smallest=float(gates.min()),
        largest=float(gates.max()),
    )
