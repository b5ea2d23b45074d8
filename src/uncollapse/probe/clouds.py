"""Which rows of what a block computes are its tokens, in the batch that is running."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import blocks_alone, runs_of_sequences
from uncollapse.anatomy.pieces import Pieces, pieces_of_batch
from uncollapse.anatomy.sequence_loops import Runs, Sequences
from uncollapse.anatomy.stacks import Padding, paddings
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Anatomy, Place
from uncollapse.errors import InputError


class Told(NamedTuple):
    """What is true of a batch whatever is taken away from the model: its real tokens and sequences, by stack, and by block and part
    the pieces and the turns of a loop in which they are mixed; see `pieces_of_batch` and `runs_of_sequences`."""

    paddings: list[Padding]
    pieces: dict[tuple[int, int], Pieces | str]
    runs: dict[tuple[int, int], tuple[Sequences, Runs] | str]


def told_of(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy) -> Told:
    """What shows of a batch on this model as it stands now. Within `probing` only."""
    found = paddings(model, batch, anatomy, blocks_alone)
    pieces = pieces_of_batch(model, batch, anatomy)
    return Told(found, pieces, runs_of_sequences(model, batch, anatomy, [padding.segments for padding in found]))


class Clouds:
    """Lays tensors out as token clouds [sequence, token, width] and says which rows are real. It notes at `streams` what enters
    each block; `begin` comes before each batch. `batch_size`: sequences in the stream of the block that is running. With `keeps` it
    also holds a copy of what entered the block. It raises what it cannot lay out, or, `forbearing`, notes it as `problem`: then no
    figure of that pass holds."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        is_own: Callable[[], bool],
        *,
        keeps: bool = True,
        forbearing: bool = False,
    ) -> None:
        self.model, self.anatomy, self._is_own, self._keeps = model, anatomy, is_own, keeps
        self._forbearing = forbearing
        self.problem: InputError | None = None
        self.batch_size = 0
        self.paddings, self.pieces, self.runs = Told([], {}, {})
        self.entered: dict[int, tuple[int, int]] = {}  # by block: sequences and tokens of what entered it
        self.shapes: dict[int, tuple[int, int]] = {}  # by stack: the same of its embedding
        # Sites that were looked at, and at which all real tokens of this batch are finite.
        self.finite: set[str] = set()
        self._entering: dict[int, list[tuple[int, Tensor]]] = {}  # by stack: the last two blocks, and what entered them
        self._real: dict[int, int] = {}  # by stack: real tokens in this batch
        self._sizes: dict[int, int] = {}  # by block: the size of the axis that its streams share with another
        self._given = (0, 0)  # sequences and tokens of the batch as it was given
        self._begins = {stack.blocks[0]: number for number, stack in enumerate(anatomy.stacks)}
        self.streams: list[tuple[Place, Action]] = [
            (block.entry, functools.partial(self._note, number)) for number, block in enumerate(anatomy.blocks)
        ]

    def begin(self, batch: Mapping[str, Any], told: Told | None = None) -> Told:
        """Note the batch's masks before the model runs on it, and return what was noted. told: what somebody knows of it."""
        for noted in (self.entered, self.shapes, self.finite, self._real, self._sizes, self._entering):
            noted.clear()
        self.batch_size = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
        ids = next((v for v in batch.values() if isinstance(v, Tensor) and v.ndim == 2), None)
        self._given = (self.batch_size, 0) if ids is None else (ids.shape[0], ids.shape[1])
        told = told or told_of(self.model, batch, self.anatomy)
        self.paddings, self.pieces, self.runs = told
        return told

    def let_go(self) -> None:
        """Drop what is bound to this object and would keep it, and the model with it, alive in a cycle."""
        self.streams.clear()
        self._entering.clear()

    def entering(self, number: int) -> Tensor | None:
        """What entered a block, until the one after the next runs. A copy: a block may add to its stream in place."""
        kept = self._entering.get(self.anatomy.stack_of(number), [])
        return next((stream for block, stream in kept if block == number), None)

    def counted(self) -> tuple[int, int, int]:
        """Sequences, real tokens and the tokens of a sequence, in the batch as run, or as given where they are `uncounted`."""
        sequences, tokens = self.shapes.get(0, self._given)
        return sequences, self._real.get(0, sequences * tokens), tokens

    def uncounted(self) -> str:
        """Why the sequences and tokens of the batch that was run cannot be counted; empty where they were. What a batch is given
        as says neither which axis holds the sequences, nor which tokens are padding, nor how many the stream has."""
        if 0 in self.shapes:
            return ""
        first = self.anatomy.stacks[0].blocks[0]
        return self.why_not(first) or "its stream came with another number of axes than where it was proved"

    def _note(self, number: int, stream: Tensor) -> None:
        if not self._is_own():
            return
        if self._keeps:
            kept = self._entering.setdefault(self.anatomy.stack_of(number), [])
            # The next block's stream may be met before this one's end.
            kept[:] = [*kept[-1:], (number, stream.detach().clone())]
        cloud = self.cloud(number, stream)
        if cloud is None:
            return
        self.batch_size = len(cloud)
        self.entered[number] = (cloud.shape[0], cloud.shape[1])
        fold = self.anatomy.blocks[number].entry.fold
        if fold is not None:
            self._sizes[number] = stream.shape[fold.axis] * stream.shape[fold.axis + 1]
        stack = self._begins.get(number)
        if stack is not None:
            mask = self.cloud_mask(stack, cloud, "the embedding")
            self.shapes[stack] = self.entered[number]
            self._real[stack] = cloud.shape[0] * cloud.shape[1] if mask is None else int(mask.sum())

    def why_not(self, number: int) -> str:
        """Why the tokens of a block's stream cannot be told."""
        return self.paddings[self.anatomy.stack_of(number)].reason or self.anatomy.blocks[number].axes_reason

    def cloud(self, number: int, stream: Tensor) -> Tensor | None:
        """The stream of a block as [sequence, token, width], whatever axes the model uses; rows that belong to no sequence are
        zero. None where its tokens cannot be told."""
        axes, padding = self.anatomy.blocks[number].axes, self.paddings[self.anatomy.stack_of(number)]
        if axes is None or padding.reason or stream.ndim != axes.ndim:
            return None
        cloud = axes.cloud(stream)
        if axes.sequence is not None or padding.segments is None:
            return cloud
        rows = [cloud[0][own.to(cloud.device)] for own in padding.segments]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def mask(self, stack: int, tokens: int, what: str) -> Tensor | None:
        """The token mask of a stack, by its number, for a cloud of `tokens` rows; `None` when every row is real.

        Raises `InputError` where the mask has another number of tokens."""
        mask = self.paddings[stack].mask
        if mask is None or mask.shape[-1] == tokens:
            return mask
        problem = InputError(
            f"capture: expected {mask.shape[-1]} tokens at {what}, as in the mask of its stack, got {tokens}. "
            "This model changes the number of tokens, so padding cannot be told apart inside it. "
            "Pass batches without padding (batch_size=1 for texts)."
        )
        if not self._forbearing:
            raise problem
        self.problem = problem
        return None

    def cloud_mask(self, stack: int, cloud: Tensor, what: str) -> Tensor | None:
        """Which rows of a cloud are real tokens; `None` when all are."""
        parts = self.paddings[stack].segments
        if parts is None:
            return self.mask(stack, cloud.shape[1], what)
        lengths = torch.tensor([len(rows) for rows in parts], device=cloud.device)
        mask = torch.arange(cloud.shape[1], device=cloud.device) < lengths[:, None]
        return None if bool(mask.all()) else mask

    def tokens_of(self, number: int, x: Tensor, what: str) -> tuple[Tensor, Tensor | None] | None:
        """What a block with this number computes for its tokens, as [sequence, token, width], and which are real; None where the
        tokens cannot be told, or are not those of its stream."""
        block, shape = self.anatomy.blocks[number], self.entered.get(number)
        axes, cloud = block.axes, None
        if axes is None:
            return None
        fold, sizes = block.entry.fold, self._sizes.get(number)
        if fold is not None and sizes is not None and x.ndim == axes.ndim - 1 and x.shape[fold.axis] == sizes:
            x = fold.opened(x)  # what is written to all of the streams; a sublayer's own values are those of one
        if axes.streams is not None and x.ndim == axes.ndim - 1:
            cloud = axes.within.cloud(x)
        elif x.ndim == axes.ndim:
            cloud = self.cloud(number, x)
            # The stream itself may come before it was noted.
            shape = shape or (None if cloud is None else (cloud.shape[0], cloud.shape[1]))
        elif x.ndim == 2 and shape is not None and axes.sequence == 0 and len(x) == math.prod(shape):
            cloud = x.reshape(*shape, -1)  # rows of all sequences, one after another
        if cloud is not None and shape is not None and block.chooses_tokens and cloud.shape[1] < shape[1]:
            shape = shape[0], cloud.shape[1]  # the chosen ones; a mask does not say which of them are padding
        if cloud is None or tuple(cloud.shape[:2]) != shape:
            return None
        try:
            return cloud, self.cloud_mask(self.anatomy.stack_of(number), cloud, what)
        except InputError:  # another number of tokens than the mask has
            return None
