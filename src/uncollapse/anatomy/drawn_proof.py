"""An anatomy proved on drawn weights, until the first pass with the model's own weights has borne it out.

Of a model whose weights are kept elsewhere each reading takes as long as a pass or longer, and a proof takes three. On drawn
weights (`drawn_weights`) it takes none. What comes of it is a forecast: numbers that were drawn may be of a size at which a
deviation drowns in rounding, or run over. So each block is proved once more, with its own weights, on the piece that it was proved
on: in the pass over the batches, which holds them anyway. All identities have to hold, and to tell the same of each block.

Which tensors hide padding is asked once more, too: a penalty on padding may be a weight itself, which hides nothing when it is
drawn. Passes over the piece with another value at a token of such a tensor go beside the one over the piece, as far as the blocks
that show it. If blocks or masks are others, or cannot be proved, the model is proved as any other (`proved_anatomy`).

What is left to the drawn weights follows from the model's code in all but odd models: which operations there are, which streams
they carry, which pieces are norms, where token numbers enter. A norm whose epsilon is a learned number is such a one.

When not to use it: where nobody makes such a pass afterwards. Nothing is remembered before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import BlockAlone, BlockRun, observe_blocks
from uncollapse.anatomy.drawn_weights import can_be_drawn, drawn_weights
from uncollapse.anatomy.influence import without_zeros
from uncollapse.anatomy.offloaded_weights import held_weights
from uncollapse.anatomy.probing import own_random_numbers
from uncollapse.anatomy.proof import BlocksProof, remembered_proof
from uncollapse.anatomy.situations import Remembered, Situation, recalled, remember
from uncollapse.anatomy.stacks import Variation, first_attending, masks_of, variations
from uncollapse.anatomy.stages import can_be_shared, stages
from uncollapse.anatomy.vocabulary import Anatomy, Block, Layout


class DrawnProof:
    """`anatomy`, and what is to be done for it in the first pass over the batches: `passes` beside them, `prove_within` each module
    whose weights are held, and `is_borne_out` at the end."""

    def __init__(self, model: nn.Module, situation: Situation, found: Remembered[Anatomy], drawn: BlocksProof) -> None:
        self.anatomy = found.anatomy
        self._model, self._situation, self._found, self._drawn = model, situation, found, drawn
        self._own = drawn.again()
        self._masks = _MasksAgain(model, found.anatomy, drawn.batch)
        drawn.blocks.runs.clear()  # they hold what entered and left each block
        recorded, parts = drawn.blocks.recorded, [part for block in drawn.blocks.proved for part in block.parts]
        if not recorded.pieces and all(part.router is None for part in parts):
            recorded.tape.clear()  # every tensor of the piece's pass, which nobody replays
        self._error: Exception | None = None

    @property
    def example(self) -> dict[str, Any]:
        """The few tokens of the batch that it was proved on."""
        return self._found.example

    @property
    def passes(self) -> list[Callable[[], None]]:
        """Passes over the piece and its variations, that note what enters and leaves each block. What the first raises is kept for
        later."""
        return [self._run, *self._masks.passes]

    def _run(self) -> None:
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
                    self._masks.look_at(number, self._own.runs[number])
                    self._own.runs[number] = BlockRun()
            except Exception as error:  # the same
                self._error = error

    def is_borne_out(self) -> bool:
        """Whether all blocks were proved to be what they are with drawn weights. Then the anatomy is remembered."""
        own, drawn = self._own, self._drawn.blocks
        if self._error is None:
            try:
                own.prove_rest()  # those whose weights are here
                for number, run in enumerate(own.runs):
                    self._masks.look_at(number, run)
            except Exception as error:  # the same
                self._error = error
        holds = (
            self._error is None
            and all(identity.deviation <= 0.0 for identity in own.identities)
            and _in_full(own.proved) == _in_full(drawn.proved)
            and all(map(_are_equal, own.reached, drawn.reached))
            and self._masks.are_the_same()
        )
        own.recorded.tape.clear()  # it holds every tensor of the piece
        if holds:
            remember(self._model, self._situation, self._found)
        return holds


class _MasksAgain:
    """Finds the masks of each stack once more, with the model's own weights: `passes` over the variations of the piece that the
    stacks may differ by, which end behind the first attending block of each. Then `look_at` these blocks while their weights are
    held."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> None:
        self._model, self._anatomy, self._batch = model, anatomy, batch
        firsts = [first_attending(anatomy, stack) for stack in anatomy.stacks]
        self._stacks = {block: stack for block, stack in zip(firsts, anatomy.stacks, strict=True) if block is not None}
        self._blocks = sorted(self._stacks)
        varied = variations(batch) if self._blocks else []
        self._runs = {variation: [BlockRun() for _ in self._blocks] for variation in varied}
        self._left = set(self._blocks) if varied else set()
        self._over: set[Variation] = set()  # whose passes have ended
        self._is_same = True

    @property
    def passes(self) -> list[Callable[[], None]]:
        """One for each variation. What it raises says that the model does not run on that."""
        return [functools.partial(self._run, variation) for variation in self._runs]

    def _run(self, variation: Variation) -> None:
        wanted = replace(self._anatomy, blocks=tuple(self._anatomy.blocks[number] for number in self._blocks))
        with contextlib.suppress(Exception):  # the model's own code, on a value it may not take: then it is no mask
            observe_blocks(self._model, variation.of(self._batch), wanted, to_the_end=False, runs=self._runs[variation])
        self._over.add(variation)

    def look_at(self, number: int, run: BlockRun) -> None:
        """Compare the masks of the stack, if this is its block. run: what the block was given in the pass over the piece."""
        if number not in self._left:
            return
        self._left.discard(number)
        block, place = self._anatomy.blocks[number], self._blocks.index(number)

        def varied(variation: Variation) -> BlockAlone | None:
            other = self._runs[variation][place]
            if other.output is None and variation not in self._over:  # it comes to this block another way, or later
                self._is_same = False
            return None if other.output is None else BlockAlone(self._model, block, other)

        plain = BlockAlone(self._model, block, run)
        with contextlib.ExitStack() as stack:
            if block.module.name in self._anatomy.own_modules:
                stack.enter_context(held_weights(plain.module))
            stack.enter_context(own_random_numbers())
            stack.enter_context(without_zeros(plain.module))
            found = masks_of(plain, self._batch, varied)
        self._is_same = self._is_same and found == self._stacks[number].masks
        for runs in self._runs.values():
            runs[place] = BlockRun()  # it holds what entered and left the block

    def are_the_same(self) -> bool:
        """Whether they were found to be, in each stack."""
        return self._is_same and not self._left


def drawn_proof(model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None) -> DrawnProof | None:
    """The anatomy of `model`, proved on drawn weights. None where it is known already, where weights are here or cannot be drawn,
    where a pass could not share their reading, and where no proof comes of drawn ones."""
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
    if not kept or kept[-1].anatomy is not found.anatomy:
        return None
    held = stages(model, found.anatomy.own_modules)
    return DrawnProof(model, situation, found, kept[-1]) if can_be_shared(model, held) else None


def _in_full(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """All that was found of the blocks, with what two of a kind may differ in: whether rows sum to one is told by the weights."""
    return [asdict(block) for block in blocks]


def _are_equal(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(rows, other[part]) for part, rows in one.items())
