"""An anatomy proved on drawn weights, until the first pass with the model's own weights has borne it out.

Of a model whose weights are kept elsewhere each reading takes as long as a pass or longer, and a proof takes three. On drawn
weights (`drawn_weights`) it takes none. What comes of it is a forecast: numbers that were drawn may be of a size at which a
deviation drowns in rounding, or run over. So each block is proved once more, with its own weights, on the piece that it was proved
on: in the pass over the batches, which holds them anyway. All identities have to hold, and to tell the same of each block.

What is left to the drawn weights is what follows from the model's code: which operations there are, which streams they carry, what
hides padding from attention. That something hides none does not follow: a penalty on padding that is a weight itself hides nothing
when it is drawn. So there is no forecast for a batch with a tensor that might be a mask, and was not seen to be one. Then, and if
the blocks are others, or cannot be proved, the model is proved as any other (`proved_anatomy`).

When not to use it: where nobody makes such a pass afterwards. Nothing is remembered before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import BlockRun, observe_blocks
from uncollapse.anatomy.drawn_weights import can_be_drawn, drawn_weights
from uncollapse.anatomy.proof import BlocksProof, remembered_proof
from uncollapse.anatomy.situations import Remembered, Situation, recalled, remember
from uncollapse.anatomy.stacks import governs_nothing
from uncollapse.anatomy.stages import can_be_shared, stages
from uncollapse.anatomy.vocabulary import Anatomy, Block, Layout


class DrawnProof:
    """`anatomy`, and what is to be done for it in the first pass over the batches: `run` beside them, `prove_within` each module
    whose weights are held, and `is_borne_out` at the end."""

    def __init__(self, model: nn.Module, situation: Situation, found: Remembered[Anatomy], drawn: BlocksProof) -> None:
        self.anatomy = found.anatomy
        self._model, self._situation, self._found, self._drawn = model, situation, found, drawn
        self._own = drawn.again()
        drawn.blocks.runs.clear()  # they hold what entered and left each block
        recorded, parts = drawn.blocks.recorded, [part for block in drawn.blocks.proved for part in block.parts]
        if not recorded.pieces and all(part.router is None for part in parts):
            recorded.tape.clear()  # every tensor of the piece's pass, which nobody replays
        self._error: Exception | None = None

    def run(self) -> None:
        """Pass the piece through the model, and note what enters and leaves each block. What it raises is kept for later."""
        try:
            observe_blocks(self._model, self._drawn.batch, self._own.anatomy, runs=self._own.runs)
        except Exception as error:  # whatever it is: the proof with the model's own weights meets it again
            self._error = error

    def prove_within(self, stage: nn.Module) -> None:
        """Prove the blocks that have run in this module, its weights being held."""
        if self._error is None:
            try:
                self._own.prove_within(stage)
                for number in range(len(self._own.proved)):
                    self._own.runs[number] = BlockRun()
            except Exception as error:  # the same
                self._error = error

    def is_borne_out(self) -> bool:
        """Whether all blocks were proved to be what they are with drawn weights. Then the anatomy is remembered."""
        own, drawn = self._own, self._drawn.blocks
        if self._error is None:
            try:
                own.prove_rest()  # those whose weights are here
            except Exception as error:  # the same
                self._error = error
        holds = (
            self._error is None
            and all(identity.deviation <= 0.0 for identity in own.identities)
            and _in_full(own.proved) == _in_full(drawn.proved)
            and all(map(_are_equal, own.reached, drawn.reached))
        )
        own.recorded.tape.clear()  # it holds every tensor of the piece
        if holds:
            remember(self._model, self._situation, self._found)
        return holds


def drawn_proof(model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None) -> DrawnProof | None:
    """The anatomy of `model`, proved on drawn weights. None where it is known already, where weights are here or cannot be drawn,
    where a pass could not share their reading, where no proof comes of drawn ones, and where a tensor of the batch that might hide
    tokens was not seen to."""
    if not can_be_drawn(model) or not can_be_shared(model, stages(model, ())):
        return None
    situation = Situation.of(model, batch, layout)
    if recalled(model, situation) is not None:
        return None
    kept: list[BlocksProof] = []
    try:
        with drawn_weights(model):
            found = remembered_proof(model, batch, layout, situation, kept=kept)
    except Exception:  # with the weights themselves it is met again, or it was the drawn ones
        return None
    if not kept or kept[-1].anatomy is not found.anatomy or governs_nothing(batch, found.anatomy):
        return None
    held = stages(model, found.anatomy.own_modules)
    return DrawnProof(model, situation, found, kept[-1]) if can_be_shared(model, held) else None


def _in_full(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """All that was found of the blocks, with what two of a kind may differ in: whether rows sum to one is told by the weights."""
    return [asdict(block) for block in blocks]


def _are_equal(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(rows, other[part]) for part, rows in one.items())
