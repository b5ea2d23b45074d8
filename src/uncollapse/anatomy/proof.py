"""Prove an anatomy on the live model before anything is measured with it.

Checked on a few real tokens, block by block; a deviation of 0 means bit for bit:

1. tracing changed no bit of the model's output, and the model gives the same output twice;
2. the stream that enters a block, plus the updates found, through the post-norms found, *is* the block's output;
3. with every part removed the block is the identity, or its post-norms alone; or the stream is carried element by element, by
   factors and shifts that do not depend on it (then within rounding, told by three streams); or several streams side by side are
   mixed with each other, token by token, by the same weights for every feature;
4. removing any single part changes the block's output (unless its update is exactly zero, or NaN hides the change);
5. with everything but one part removed, a changed token reaches no other token beyond rounding (else that part is a
   `mixer`), unless the part is attention;
6. with an attention removed, what it mixes reaches nothing: it works through its own addition alone. The values that it
   mixes are made from this stream; those of a cross-attention are not;
7. everything that an attention's mixed values do to what it adds goes through its output projection, whose features are each one
   head's; otherwise W_O is the whole map between the two;
8. after all this the model's output is what it was, bit for bit.

Any failure raises `UnsupportedModel` with the module, the identity, and by how much it failed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from uncollapse.anatomy.block_alone import (
    BlockRun,
    blocks_alone,
    observe_blocks,
)
from uncollapse.anatomy.block_proof import BlockProof
from uncollapse.anatomy.deviations import largest_difference
from uncollapse.anatomy.examples import (
    Piece,
    as_long_a_piece,
    example_batch,
    fitting_piece,
    one_sequence,
    runs_on,
    sends_elsewhere,
    turned,
)
from uncollapse.anatomy.first_passes import FirstPasses, first_passes, traced
from uncollapse.anatomy.offloaded_weights import held_weights, is_kept_elsewhere
from uncollapse.anatomy.probing import output_of, own_random_numbers, probing, tensors_of
from uncollapse.anatomy.reading import read
from uncollapse.anatomy.reading_refusals import SIDE_BY_SIDE
from uncollapse.anatomy.sequence_loops import with_loops_apart
from uncollapse.anatomy.shared_readings import made_together
from uncollapse.anatomy.situations import Remembered, Situation, latest, recalled, remember, sizes_of
from uncollapse.anatomy.stacks import find_stacks, given_mask, masks_not_told, per_token, real_tokens
from uncollapse.anatomy.stages import can_be_shared, stages
from uncollapse.anatomy.tracing import Trace
from uncollapse.anatomy.vocabulary import (
    Anatomy,
    Block,
    Identity,
    Layout,
    Stack,
    StreamAxes,
)
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel


def proved_anatomy(
    model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None, *, anew: bool = False
) -> Anatomy:
    """The anatomy of `model`, read off a trace of a small piece of `batch` and proved. It is remembered for this model object in
    this situation (`situations`), for batches of this size alone where an attention takes its queries in turn. anew: prove it
    again, on the whole batch: on a piece the model went another way.

    Raises `UnsupportedModel` where the model cannot be read or the proof fails."""
    situation = Situation.of(model, batch, layout)
    known = None if anew else recalled(model, situation)
    if known is not None:
        return known.anatomy
    found = remembered_proof(model, batch, layout, situation, anew=anew)
    remember(model, situation, found)
    return found.anatomy


def remembered_proof(
    model: nn.Module,
    batch: Mapping[str, Any],
    layout: Layout | None,
    situation: Situation,
    *,
    anew: bool = False,
    kept: list[BlocksProof] | None = None,
) -> Remembered[Anatomy]:
    """What there is to remember of the model in this situation; see `proved_anatomy`. kept: takes the proofs of the blocks, the
    last one that of the anatomy."""
    first: FirstPasses | None = None
    if anew:
        small, steers, real = dict(batch), sends_elsewhere(model, batch), None
        anatomy = prove(model, small, layout)
    else:
        anatomy, first, real = _proved_on_real_tokens(model, batch, layout, kept)
        small, steers, _ = first.piece
    real = real_tokens(anatomy, batch) if real is None else real
    ids = next((stack.ids for stack in anatomy.stacks if stack.ids is not None and stack.ids_transposed), None)
    if ids is not None:  # its first row is a token of every sequence
        straight = {mask.tensor for stack in anatomy.stacks for mask in stack.masks if not mask.is_transposed}
        as_ids = {name for name, v in batch.items() if isinstance(v, Tensor) and v.shape[:2] == batch[ids].shape}
        few = turned(example_batch(turned(batch, as_ids - straight), real=real), as_ids - straight)
        few = few if runs_on(model, few) else small
    elif any(_may_be_token_first(anatomy, stack) for stack in anatomy.stacks):
        few = small  # one row of its vectors may be one token, which no mask and no order is seen on
    else:
        few = one_sequence(model, batch, real, per_token(anatomy), ran=None if first is None else first.ran_on)
    sizes = None
    if any(part.shares_queries for block in anatomy.blocks for part in block.parts):
        # How many calls share its queries may depend on how many there are.
        sizes, longer = situation.sizes, None if anew else as_long_a_piece(model, batch, real)
        if longer is not None and sizes_of(longer) != sizes_of(small):
            anatomy, few = prove(model, longer, layout, kept=kept), longer
        else:
            few = small
    return Remembered(anatomy, few, steers, sizes)


def _proved_on_real_tokens(
    model: nn.Module, batch: Mapping[str, Any], layout: Layout | None, kept: list[BlocksProof] | None
) -> tuple[Anatomy, FirstPasses, Tensor | None]:
    """The anatomy, the passes over the piece it was proved on, and which tokens are real, where that is not what the name
    `attention_mask` says: the piece is chosen anew where a mask was not seen to hide what it should."""
    first = first_passes(model, batch)
    small, output = first.piece.batch, first.piece.output
    anatomy: Anatomy | None = None
    refusal: UncollapseError | None = None
    try:
        anatomy = prove(model, small, layout, before=output, recorded=first.recorded, kept=kept)
    except UncollapseError as error:  # a piece of nothing but padding may keep a sound model from being read
        refusal = error
    for name, value in masks_not_told(batch, anatomy):
        real = batch[name].bool() == value
        piece, elsewhere, output = fitting_piece(model, batch, real)
        with contextlib.suppress(UncollapseError):
            other = prove(model, piece, layout, before=output, kept=kept)
            found = [mask for stack in other.stacks for mask in stack.masks if mask.tensor == name]
            if any(mask.real == value and mask.unit == "token" for mask in found):
                return other, FirstPasses(Piece(piece, elsewhere, output)), real
    if refusal is not None:
        raise refusal
    assert anatomy is not None
    return anatomy, first, None


def _may_be_token_first(anatomy: Anatomy, stack: Stack) -> bool:
    """Whether a stack whose embedding is made of no token numbers has its tokens along an axis before that of the sequences."""
    axes = anatomy.blocks[stack.blocks[0]].axes
    return stack.ids is None and axes is not None and axes.sequence is not None and min(axes.token) < axes.sequence


def known_anatomy(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Anatomy | None:
    """The anatomy that was proved last for this model object as it stands now; with a `batch`, on inputs of its kind."""
    known = latest(model, batch)
    return None if known is None else known.anatomy


def known_example(model: nn.Module) -> dict[str, Any] | None:
    """The few tokens on which this model object's anatomy was proved."""
    known = latest(model)
    return None if known is None else known.example


def prove(
    model: nn.Module,
    batch: Mapping[str, Any],
    layout: Layout | None = None,
    *,
    before: list[Tensor] | None = None,
    recorded: Trace | None = None,
    kept: list[BlocksProof] | None = None,
) -> Anatomy:
    """Read and prove the anatomy on `batch`, which should be small. Nothing is remembered. A model that is none with one stream is
    looked at as one with several side by side; so is one whose stream seems to be a grid of tokens or shows no features. before,
    recorded: what the model gives on `batch`, and its trace, if somebody has seen them. kept: takes the proof of the blocks."""
    try:
        single = _prove(model, batch, layout, before=before, recorded=recorded, kept=kept)
    except UnsupportedModel as refusal:
        try:
            return _prove(model, batch, layout, before=before, several=True, kept=kept)
        except UnsupportedModel as other:
            if SIDE_BY_SIDE in refusal.identity and SIDE_BY_SIDE not in other.identity:
                raise UnsupportedModel(
                    f"{refusal} Looked at as such: {other.identity}.",
                    found=refusal.found,
                    identity=f"{refusal.identity}, and not so that it can be measured: {other.identity}",
                    layout=refusal.layout,
                ) from None
            raise refusal from None
    if all(block.axes is not None and len(block.axes.token) < 2 for block in single.blocks):
        return single
    try:
        return _prove(model, batch, layout, before=before, several=True, kept=kept)
    except UnsupportedModel:
        return single


def _prove(
    model: nn.Module,
    batch: Mapping[str, Any],
    layout: Layout | None,
    *,
    before: list[Tensor] | None = None,
    recorded: Trace | None = None,
    several: bool = False,
    kept: list[BlocksProof] | None = None,
) -> Anatomy:
    with probing(model):
        try:
            before = output_of(model, batch) if before is None else before
        except Exception as error:  # whatever it is, the model does not run on this batch: the refusal says so
            raise _not_run(model, batch, error) from error
        recorded = traced(model, batch) if recorded is None else recorded
        proof = [
            Identity(
                "tracing changes no bit of the output", "model", largest_difference(before, tensors_of(recorded.output))
            )
        ]
        anatomy = read(model, recorded, layout, several=several)
        blocks = _proved_blocks(model, batch, anatomy, recorded, layout)
        proof += blocks.identities
        if kept is None:
            recorded.tape.clear()  # it holds every tensor of the pass
        paths = recorded.paths()
        proved = _shared_axes(blocks.proved, blocks.runs, anatomy)
        stacks = find_stacks(model, batch, replace(anatomy, blocks=tuple(proved)), blocks_alone)
        proved = [
            _with_causality(block, reached, given_mask(stacks[anatomy.stack_of(number)], batch))
            for number, (block, reached) in enumerate(zip(proved, blocks.reached, strict=True))
        ]
        proof.append(
            Identity(
                "the output afterwards is the output before",
                "model",
                largest_difference(before, output_of(model, batch)),
            )
        )
    names = {b.module.name for b in anatomy.blocks}
    runs_of = Counter(call.name for call in recorded.calls if call.name in names)
    anatomy = replace(
        anatomy,
        blocks=tuple(proved),
        proof=tuple(proof),
        stacks=stacks,
        runs=tuple(sorted(runs_of.items())),
        paths=paths,
        inputs=frozenset(name for name, value in batch.items() if isinstance(value, Tensor)),
    )
    anatomy = with_loops_apart(anatomy, recorded)
    for identity in proof:
        if not identity.deviation <= 0.0:
            raise _failure(model, anatomy, identity, layout)
    if kept is not None:
        kept.append(BlocksProof(anatomy, batch, blocks))
    return anatomy


def _proved_blocks(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, recorded: Trace, layout: Layout | None
) -> ProvedBlocks:
    """All blocks, proved on the arguments that they have in one pass. Weights that are kept elsewhere are read once for that pass
    and for the runs of each block by itself: it is proved while the pass stands behind it."""
    held = stages(model, anatomy.own_modules)
    if can_be_shared(model, held):
        blocks = ProvedBlocks(model, anatomy, recorded, layout)
        # Whatever it is: it is met again below, or one of the two has to follow the other.
        with contextlib.suppress(Exception):
            made_together(
                model,
                held,
                [lambda: observe_blocks(model, batch, anatomy, runs=blocks.runs)],
                lambda *_: None,
                blocks.prove_within,
            )
            blocks.prove_rest()
            return blocks
    blocks = ProvedBlocks(model, anatomy, recorded, layout)
    observe_blocks(model, batch, anatomy, runs=blocks.runs)
    blocks.prove_rest()
    return blocks


class ProvedBlocks:
    """The blocks proved so far, in their order. `runs`: what each was given in a pass. `reached`: see `BlockProof`."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, recorded: Trace, layout: Layout | None) -> None:
        self.model, self.anatomy, self.recorded, self.layout = model, anatomy, recorded, layout
        self.runs = [BlockRun() for _ in anatomy.blocks]
        self.proved: list[Block] = []
        self.identities: list[Identity] = []
        self.reached: list[dict[int, Tensor]] = []
        self._known: dict[tuple[int, tuple[int, ...]], StreamAxes] = {}  # by stack and shape of its stream

    def prove_within(self, stage: nn.Module) -> None:
        """Prove the next blocks, as far as they have run, in this module or where no weight is kept elsewhere. No random number of
        the pass is drawn meanwhile."""
        inside = {id(module) for module in stage.modules()}
        with own_random_numbers():
            while len(self.proved) < len(self.runs):
                block, run = self.anatomy.blocks[len(self.proved)], self.runs[len(self.proved)]
                module = self.model.get_submodule(block.module.name)
                if run.output is None or (id(module) not in inside and any(map(is_kept_elsewhere, module.modules()))):
                    break
                self._prove_next()

    def prove_rest(self) -> None:
        """Prove all that are left."""
        while len(self.proved) < len(self.runs):
            self._prove_next()

    def _prove_next(self) -> None:
        number = len(self.proved)
        block, run = self.anatomy.blocks[number], self.runs[number]
        try:
            prover = BlockProof(self.model, block, run, self.recorded)
            with contextlib.ExitStack() as stack:
                stack.enter_context(run.entered())  # the norms that the proof repeats by themselves, too
                if block.module.name in self.anatomy.own_modules:
                    stack.enter_context(held_weights(prover.module))
                prover.check(self._known, self.anatomy.stack_of(number))
                prover.route()
        except UncollapseError:
            raise
        except Exception as error:  # the model's own code, run in a way it may not expect
            raise _failure(self.model, self.anatomy, _not_alone(block, error), self.layout) from error
        self.proved.append(prover.block)
        self.reached.append(prover.reached)
        self.identities += prover.identities


@dataclass(frozen=True)
class BlocksProof:
    """The blocks of an anatomy as they were proved, and the batch on which."""

    anatomy: Anatomy
    batch: Mapping[str, Any]
    blocks: ProvedBlocks

    def again(self) -> ProvedBlocks:
        """The same blocks, yet to be proved."""
        of = self.blocks
        return ProvedBlocks(of.model, of.anatomy, of.recorded, of.layout)


def _with_causality(block: Block, reached: Mapping[int, Tensor], real: Tensor | None) -> Block:
    """The block, its attentions causal where no later token reaches a real one: what padded ones see is nobody's business."""
    parts = list(block.parts)
    for number, rows in reached.items():
        if real is not None and real.shape == rows.shape:
            parts[number] = replace(parts[number], is_causal=not bool((rows & real.to(rows.device)).any()))
    return replace(block, parts=tuple(parts))


def _shared_axes(blocks: list[Block], runs: list[BlockRun], anatomy: Anatomy) -> list[Block]:
    """Give blocks whose own axes could not be told those of another block of their stack with a stream of the same shape."""
    shapes = [() if run.stream is None else tuple(run.stream.shape) for run in runs]
    found = list(blocks)
    for number, block in enumerate(blocks):
        stack = anatomy.stacks[anatomy.stack_of(number)]
        axes = next((blocks[i].axes for i in stack.blocks if blocks[i].axes and shapes[i] == shapes[number]), None)
        if block.axes is None and axes is not None:
            found[number] = replace(block, axes=axes, axes_reason="")
    return found


def _not_run(model: nn.Module, batch: Mapping[str, Any], error: Exception) -> InputError:
    return InputError(
        f"anatomy: expected a batch that {type(model).__name__} runs on, got {type(error).__name__}: {error}. "
        f"It was given {', '.join(batch)}. Try model(**batch) first."
    )


def _not_alone(block: Block, error: Exception) -> Identity:
    return Identity(
        f"the block runs by itself on the arguments it had in the model ({type(error).__name__}: {error})",
        block.name,
        float("inf"),
    )


def _failure(model: nn.Module, anatomy: Anatomy, identity: Identity, refused: Layout | None) -> UnsupportedModel:
    blocks = tuple(dict.fromkeys(b.name for b in anatomy.blocks))
    layout = "" if refused is not None and refused.blocks == blocks else f"uc.Layout(blocks={blocks!r})"
    advice = f"If these are not your blocks, pass layout={layout}, corrected." if layout else "No layout helps here."
    return UnsupportedModel(
        f"anatomy: expected an identity of {type(model).__name__} to hold, got a deviation of {identity.deviation:.3g} at "
        f"{identity.where}: {identity.statement}. The block does more than was found. {advice}",
        found=anatomy.describe(),
        identity=f"{identity.statement} (at {identity.where}, off by {identity.deviation:.3g})",
        layout=layout,
    )
