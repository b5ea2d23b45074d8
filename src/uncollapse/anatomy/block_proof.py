"""The identities of one block, checked on its own arguments: 2 to 7 of those of `proof`, which says what they are.

When not to use it: for a model. `prove` runs the passes that a block's arguments come from, and gathers its blocks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import BlockRun, MetAddition, recorders
from uncollapse.anatomy.deviations import carry_gap, difference, is_rounding
from uncollapse.anatomy.influence import EVERY, moved, poked, reaches, stream_axes, without_zeros
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.mixing_proof import HeadsMixing
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.reached_rows import reached_by_later
from uncollapse.anatomy.reading_refusals import has_own_hooks
from uncollapse.anatomy.replaying import NotReplayable, replayed
from uncollapse.anatomy.routers import routers_of
from uncollapse.anatomy.side_by_side import laid_out, mixing_gap
from uncollapse.anatomy.summands import same_term
from uncollapse.anatomy.torch_calls import operands_of, operation_name, writes_in_place
from uncollapse.anatomy.tracing import Trace
from uncollapse.anatomy.vocabulary import (
    STREAM,
    AdditionNode,
    Block,
    Fold,
    Identity,
    ModuleCall,
    NormPiece,
    Part,
    StreamAxes,
)
from uncollapse.anatomy.writing_proof import HeadsWriting
from uncollapse.restoring import restoring


def _blanking(values: list[Tensor], number: int, value_operand: int) -> Handler:
    """Keep the values an attention mixes, and let zeros come out of it."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values[number] = operands_of(operation_name(function), args, kwargs)[value_operand].detach().clone()
        return torch.zeros_like(function(*args, **kwargs))

    return handler


class BlockProof(HeadsMixing, HeadsWriting):
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
