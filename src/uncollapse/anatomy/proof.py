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
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import (
    BlockRun,
    MetAddition,
    blocks_alone,
    observe_blocks,
    recorders,
)
from uncollapse.anatomy.deviations import carry_gap, difference, is_rounding, largest_difference
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
from uncollapse.anatomy.influence import EVERY, moved, poked, reaches, stream_axes, without_zeros
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.mixing_proof import HeadsMixing
from uncollapse.anatomy.offloaded_weights import held_weights, is_kept_elsewhere
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.probing import output_of, probing, tensors_of
from uncollapse.anatomy.reached_rows import reached_by_later
from uncollapse.anatomy.reading import read
from uncollapse.anatomy.reading_refusals import SIDE_BY_SIDE, has_own_hooks
from uncollapse.anatomy.replaying import NotReplayable, replayed
from uncollapse.anatomy.routers import routers_of
from uncollapse.anatomy.sequence_loops import with_loops_apart
from uncollapse.anatomy.shared_readings import made_together
from uncollapse.anatomy.side_by_side import laid_out, mixing_gap
from uncollapse.anatomy.situations import Remembered, Situation, latest, recalled, remember, sizes_of
from uncollapse.anatomy.stacks import find_stacks, given_mask, masks_not_told, per_token, real_tokens
from uncollapse.anatomy.stages import can_be_shared, stages
from uncollapse.anatomy.summands import same_term
from uncollapse.anatomy.torch_calls import operands_of, operation_name, writes_in_place
from uncollapse.anatomy.tracing import Trace
from uncollapse.anatomy.vocabulary import (
    STREAM,
    AdditionNode,
    Anatomy,
    Block,
    Fold,
    Identity,
    Layout,
    ModuleCall,
    NormPiece,
    Part,
    Stack,
    StreamAxes,
)
from uncollapse.anatomy.writing_proof import HeadsWriting
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.restoring import restoring


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
    """The blocks proved so far, in their order. `runs`: what each was given in a pass. `reached`: see `_BlockProof`."""

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
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
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
            prover = _BlockProof(self.model, block, run, self.recorded)
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


def _blanking(values: list[Tensor], number: int, value_operand: int) -> Handler:
    """Keep the values an attention mixes, and let zeros come out of it."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values[number] = operands_of(operation_name(function), args, kwargs)[value_operand].detach().clone()
        return torch.zeros_like(function(*args, **kwargs))

    return handler


class _BlockProof(HeadsMixing, HeadsWriting):
    """The identities of one block, checked on its own arguments."""

    def __init__(self, model: nn.Module, block: Block, run: BlockRun, recorded: Trace) -> None:
        super().__init__(model, block, run)
        self.recorded = recorded
        self.where = block.name + (f"[{block.module.call}]" if block.module.call else "")
        self.identities: list[Identity] = []
        self.reached: dict[int, Tensor] = {}  # by part: the tokens [sequence, token] that later ones reach

    def check(self, known: dict[tuple[int, tuple[int, ...]], StreamAxes], stack: int) -> None:
        """Check every identity. `known` are the axes of streams met so far, by `stack` and shape."""
        axes, reason = self._lay_side_by_side(known, stack) if self._reads_several else (None, "")
        block, run, stream = self.block, self.run, self.stream
        assert run.output is not None
        self._check(
            "run alone, the block gives the output it gave in the model", difference(run.output, self._replay(()))
        )
        self._adds_up()
        if axes is not None:
            self._mixes_streams(axes)
        else:
            self._carries(tuple(range(len(block.parts))))
        parts = list(block.parts)
        for number, part in enumerate(block.parts):
            without = self._replay((number,))
            changed = difference(run.output, without)
            silent = self._update_is_zero(number) or not bool(run.output.isfinite().all())
            self._check(
                f"removing the {part.kind} ({part.module}) changes the output", 0.0 if changed or silent else 1.0
            )
            if part.kind in {"attention", "cross"}:
                self._attends(number, part, stream, without, silent)
        key = (stack, tuple(stream.shape))
        with without_zeros(self.module):
            if axes is None:
                axes, reason = (known[key], "") if key in known else self._axes(stream)
            if axes is not None:
                known[key] = axes
                parts = [self._moves(number, part, stream, axes) for number, part in enumerate(parts)]
            for number, part in enumerate(parts):
                if part.attention:
                    parts[number] = replace(part, attention=self.mixes(number, part, stream, axes, reason))
            self.block = replace(block, axes=axes, axes_reason=reason)
            parts = [self.writes(i, part) if part.attention else part for i, part in enumerate(parts)]
        self.block = replace(self.block, parts=tuple(parts))

    def route(self) -> None:
        """Find the routers of the block, once it is proved."""
        parts = list(self.block.parts)
        for number, router in routers_of(self, self.recorded).items():
            parts[number] = replace(parts[number], router=router)
        self.block = replace(self.block, parts=tuple(parts))

    def _check(self, statement: str, deviation: float) -> None:
        self.identities.append(Identity(statement, self.where, deviation))

    @property
    def _reads_several(self) -> bool:
        return any(part.read is not None for part in self.block.parts)

    def _lay_side_by_side(
        self, known: Mapping[tuple[int, tuple[int, ...]], StreamAxes], stack: int
    ) -> tuple[StreamAxes | None, str]:
        """Tell along which axis several streams lie, by what a sublayer reads of them, and its axes by what it makes of that, or,
        without attention, by another block of the stack. From here on the streams have an axis of their own in this block."""
        number = self.mixing or 0
        place = self.block.parts[number].read
        statement = "along which axis its streams lie side by side is told by what its sublayers read of them"
        if place is None or any(part.read is None for part in self.block.parts):
            self._check(statement, float("inf"))
            return None, ""
        others = tuple(i for i in range(len(self.block.parts)) if i != number)
        seen: list[Tensor] = []

        def keep(found: Tensor) -> None:
            seen.append(found.detach().clone())

        def read(streams: Tensor) -> Tensor:
            self._replay(others, streams, actions=[(place, keep)])
            return seen[-1]

        with without_zeros(self.module):
            try:
                axis, fold = laid_out(read, self.stream)
            except UnreadableError as error:
                self._check(f"{statement} ({error})", float("inf"))
                return None, ""
            if fold is not None:
                self._open(fold)
            alike = known.get((stack, tuple(self.stream.shape)))
            if (
                self.block.parts[number].kind not in {"attention", "cross"}
                and alike is not None
                and alike.streams == axis
            ):
                return alike, ""
            given = read(self.stream)

            def made(given: Tensor) -> Tensor:
                return self.update(number, None, actions=[(place, lambda _: given.clone())]).sum(axis)

            found, reason = stream_axes(made, given, self.where)
        if found is None or found.sequence is None:
            self._check(f"{statement} ({reason or 'its sequences are laid end to end'})", float("inf"))
            return None, ""

        def behind(own: int) -> int:
            return own + (own >= axis)

        return StreamAxes(behind(found.sequence), tuple(map(behind, found.token)), behind(found.width), axis), ""

    def _open(self, fold: Fold) -> None:
        """Meet the streams of this block with an axis of their own."""
        run, block = self.run, self.block
        assert run.output is not None
        run.stream, run.output, self.stream = (fold.opened(t) for t in (self.stream, run.output, self.stream))
        self.block = replace(block, entry=replace(block.entry, fold=fold), exit=replace(block.exit, fold=fold))

    def _mixes_streams(self, axes: StreamAxes) -> None:
        """With every part removed, and noise where the streams begin and behind each addition, they pass from addition to addition,
        and to the exit, mixed with each other only."""
        stream, generator = self.stream, torch.Generator().manual_seed(0)
        spread = float(stream.double().std().nan_to_num()) or 1.0
        everything = tuple(range(len(self.block.parts)))

        def noise(shape: torch.Size) -> Tensor:
            return torch.randn(shape, generator=generator).to(stream) * spread

        def shaking(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = function(*args, **kwargs)
            return result.add_(noise(result.shape)) if writes_in_place(function) else result + noise(result.shape)

        shaken: dict[Point, Handler] = {r.additions[-1].point: shaking for r in self.block.residuals}
        runs = [self._rerun(everything, stream)]
        runs += [self._rerun(everything, stream + noise(stream.shape), shaken) for _ in range(2)]
        ways = [self._ways(run) for run in [*runs, self.run]]
        gap = max(mixing_gap(axes, way) for way in zip(*ways, strict=True))
        self._check(
            "with every part removed, the streams side by side are mixed with each other, token by token, by the same weights for "
            "every feature",
            gap if not any(r.norms_post for r in self.block.residuals) else float("inf"),
        )
        (first, *_), cloud = axes.token, axes.cloud(stream)
        plain = axes.cloud(self._replay(everything, stream, hold=False)).flatten(0, 1)
        poke = poked(stream, first, torch.arange(0, stream.shape[first], EVERY))
        changed = (axes.cloud(poke) != cloud).any(-1).flatten()
        other = axes.cloud(self._replay(everything, poke, hold=False)).flatten(0, 1)
        self._check(
            "with every part removed, no token's streams reach those of another",
            float(bool((moved(plain, other, 0) & ~changed).any())),
        )

    def _ways(self, run: BlockRun) -> list[tuple[Tensor, Tensor]]:
        """Several streams where they begin (at the entry, or behind an addition), and where they arrive."""
        begins, found = run.stream, []
        assert begins is not None
        for residual in self.block.residuals:
            alone = [
                run.sums[node.point].summands[i]
                for node in residual.additions
                for i, leaves in enumerate(node.leaves)
                if leaves == {STREAM}
            ]
            found += [(begins, self._as_streams(operand)) for operand in alone[:1]]
            begins = self._as_streams(run.sums[residual.additions[-1].point].result)
        assert run.output is not None
        return [*found, (begins, run.output)]

    def _adds_up(self) -> None:
        """Every addition is the sum of what its operands bring."""
        deviation = 0.0
        for residual in self.block.residuals:
            for node in residual.additions:
                met = self.run.sums[node.point]
                total = functools.reduce(torch.add, _one_per_term(node, met))
                gap = difference(met.result, total)  # no rounding, but where an operation multiplies and adds in one
                deviation = max(deviation, 0.0 if is_rounding(gap, met.result, total) else gap)
        self._check("what the stream and the updates found bring is what each addition gives", deviation)

    def _carries(self, everything: tuple[int, ...]) -> None:
        """With every part removed, the stream passes from addition to addition, and to the exit, as it is: bit for bit, or
        multiplied and shifted element by element by what does not depend on it."""
        pure = self._rerun(everything, None)
        ways = [*self._operands(pure), *self._operands(self.run), *self._sums(pure)]
        if all(difference(before, after) == 0.0 for before, after in ways):
            self._check("stream in, plus the updates found, through the post-norms found, is the block's output", 0.0)
            self._check("with every part removed, the block is the identity", 0.0)
            return
        stream = self.run.stream
        assert stream is not None
        generator = torch.Generator().manual_seed(0)
        spread = float(stream.double().std().nan_to_num()) or 1.0
        runs = [self._rerun(everything, stream)]
        for _ in range(2):
            shift = torch.randn(stream.shape, generator=generator).to(stream) * spread
            runs.append(self._rerun(everything, stream + shift))
        met = [*zip(*map(self._operands, [*runs, self.run]), strict=True), *zip(*map(self._sums, runs), strict=True)]
        gap = max(carry_gap(list(seen)) for seen in met)
        self._check(
            "with every part removed, the stream is carried through the block element by element: multiplied by fixed factors "
            "or gates, and added to what does not depend on it" + self._other_causes(gap),
            gap,
        )

    def _other_causes(self, gap: float) -> str:
        hooked = [
            f"{self.block.module.name}.{name}".rstrip(".")
            for name, module in self.module.named_modules()
            if not self.block.label and has_own_hooks(module)
        ]
        if gap <= 0 or not hooked:
            return ""
        return f". A forward hook of yours changes what passes {', '.join(hooked)}"

    def _rerun(
        self, parts: tuple[int, ...], stream: Tensor | None, handlers: Mapping[Point, Handler] | None = None
    ) -> BlockRun:
        """The block alone with some parts removed, its additions recorded."""
        run = BlockRun(stream=self.run.stream if stream is None else stream)
        recording = recorders(self.block, run)
        run.output = self._replay(parts, stream, handlers, watching=recording)
        return run

    def _operands(self, run: BlockRun) -> list[tuple[Tensor, Tensor]]:
        """The stream where it begins (at the entry, or behind an addition and its post-norms), and where it arrives: as the
        operand of the next addition, and at the exit."""
        found = []
        for residual, begins in zip(self.block.residuals, self._begins(run), strict=False):
            alone = [
                run.sums[node.point].summands[i]
                for node in residual.additions
                for i, leaves in enumerate(node.leaves)
                if leaves == {STREAM}
            ]
            found += [(begins, alone[0])] if len(alone) == 1 else []
        assert run.output is not None
        return [*found, (self._begins(run)[-1], run.output)]

    def _sums(self, run: BlockRun) -> list[tuple[Tensor, Tensor]]:
        """The stream before and after each addition, in a run without any part."""
        results = [run.sums[residual.additions[-1].point].result for residual in self.block.residuals]
        return list(zip(self._begins(run), results, strict=False))

    def _begins(self, run: BlockRun) -> list[Tensor]:
        assert run.stream is not None
        found = [run.stream]
        for residual in self.block.residuals:
            found.append(self._normed(run.sums[residual.additions[-1].point].result, residual.norms_post))
        return found

    def _normed(self, stream: Tensor, norms: tuple[ModuleCall | NormPiece, ...]) -> Tensor:
        """The stream through post-norms: each repeated as it ran in the traced pass, with whatever else it was given."""
        for norm in norms:
            piece = self.recorded.pieces.get(norm)
            try:
                stream = self._module(norm)(stream) if piece is None else replayed(self.recorded, *piece, stream)
            except NotReplayable:
                if isinstance(norm, NormPiece):
                    raise
                stream = self._module(norm)(stream)
        return stream

    def _module(self, norm: ModuleCall | NormPiece) -> nn.Module:
        return self.model.get_submodule(norm.name if isinstance(norm, ModuleCall) else norm.gives.owner)

    def _update_is_zero(self, part: int) -> bool:
        for residual in self.block.residuals:
            for node in residual.additions:
                for number, operand in self.run.sums[node.point].summands.items():
                    if node.leaves[number] == {part}:
                        return not bool(operand.any())
        return False

    def _attends(self, number: int, part: Part, stream: Tensor, without: Tensor, silent: bool) -> None:
        """The attention calls belong to this part, and mix what its kind says."""
        self._check(
            f"the {part.kind} ({part.module}) holds an attention call", float(not part.attention and not silent)
        )
        values, other = ([torch.empty(0)] * len(part.attention) for _ in range(2))
        blanked = {c.product: _blanking(values, i, c.value_operand) for i, c in enumerate(part.attention)}
        gap = difference(without, self._replay((number,), handlers=blanked))
        self._check(f"with the {part.kind} ({part.module}) removed, what it mixes reaches nothing", gap)
        inside = all(v.numel() for v in values)
        self._check(f"the attention of {part.module} happens inside this block", float(not inside))
        if not inside:
            return
        seen = {c.product: _blanking(other, i, c.value_operand) for i, c in enumerate(part.attention)}
        self._replay((number,), stream.flip(-1) + 1, seen, is_all=lambda: all(v.numel() for v in other))
        for before, after in zip(values, other, strict=True):
            if part.kind == "cross":
                statement, gap = "is not mixed from this stream", difference(before, after)
            else:  # values that are alike for every token say nothing: a value map of zeros makes such
                alike = silent or torch.equal(before, before[..., :1, :].expand_as(before))
                statement, gap = "is mixed from this stream", float(not alike and torch.equal(before, after))
            self._check(f"what the {part.kind} ({part.module}) mixes {statement}", gap)

    def _axes(self, stream: Tensor) -> tuple[StreamAxes | None, str]:
        """The axes, as the attention shows them; without one, the first part that moves information between tokens."""
        reason = f"{self.where} has no attention by which its tokens could be told"
        for part in range(len(self.block.parts)) if self.mixing is None else [self.mixing]:
            update = functools.partial(self.update, part)
            with restoring() as changes:
                if not bool(update(stream).isfinite().all()):
                    changes.enter(without_zeros(self.module, without_nan=True))
                axes, found = stream_axes(update, stream, self.where)
            if axes is not None:
                return axes, ""
            reason = reason if self.mixing is None else found
        return None, reason

    def _moves(self, number: int, part: Part, stream: Tensor, axes: StreamAxes) -> Part:
        """The part, with what was seen of how it moves information between tokens."""
        if part.attention:
            if axes.sequence is None or len(axes.token) > 1:
                return replace(part, is_causal=not self._reaches_others(number, stream, axes, last=True))
            update = functools.partial(self.update, number)
            self.reached[number] = reached_by_later(self.module, update, stream, axes)
            return replace(part, is_causal=not bool(self.reached[number].any()))
        if part.kind == "mlp" and self._reaches_others(number, stream, axes):
            return replace(part, kind="mixer")
        return part

    def _reaches_others(self, part: int, stream: Tensor, axes: StreamAxes, last: bool = False) -> bool:
        """Whether, with only this part left, changed tokens (one in three, or the last) change what it adds to others."""
        update = functools.partial(self.update, part)
        plain = update(stream)
        for axis in axes.token:
            size = stream.shape[axis]
            places = self._last(axes, size) if last else torch.arange(0, size, EVERY)
            if size > 1 and reaches(update, stream, axis, places, plain):
                return True
        return False

    def _last(self, axes: StreamAxes, size: int) -> Tensor:
        """The last place along an axis of tokens; of sequences laid end to end, the last of each."""
        if axes.sequence is None:
            with contextlib.suppress(UnreadableError):
                return torch.stack([places[-1] for places in self.sequences(axes).places])
        return torch.tensor([size - 1])


def _one_per_term(node: AdditionNode, met: MetAddition) -> list[Tensor]:
    """What the summands brought: once for two operands that are factors of one."""
    operation = node.point.operation.split(" ")[0]
    numbers = sorted(met.summands)
    return [met.summands[i] for i in numbers if not any(same_term(operation, j, i) for j in numbers if j < i)]


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
