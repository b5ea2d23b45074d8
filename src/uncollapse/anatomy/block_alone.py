"""One block of a model, run by itself on what it was given in a pass of the model.

`blocks_alone` gives blocks by their numbers. `BlockAlone` runs one: with parts removed, with another stream, with patterns in the
place of its heads' mixed values. `observe_blocks` is the pass in which it is seen what each block is given.

When not to use it: to change what a model computes. Nothing here outlasts the call.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uncollapse.anatomy.autocast import AutocastState
from uncollapse.anatomy.carrying import Observer
from uncollapse.anatomy.influence import segments as segments_of
from uncollapse.anatomy.influence import without_zeros
from uncollapse.anatomy.interception import (
    ChangedPath,
    Handler,
    Point,
    depths_as_found,
    function_modes,
    in_turn,
    is_putting_another,
    putting_another,
)
from uncollapse.anatomy.module_states import ModuleStates
from uncollapse.anatomy.operands import Mixed, UnreadableError, product_operands
from uncollapse.anatomy.output_maps import giving, giving_in_turn, opening, output_map
from uncollapse.anatomy.probing import output_of, seed_all
from uncollapse.anatomy.reading_refusals import has_own_hooks
from uncollapse.anatomy.sequence_loops import Runs, Sequences, sequences_of_runs
from uncollapse.anatomy.snapshots import copied
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.summands import summand, with_operands
from uncollapse.anatomy.torch_calls import operation_name, tensors_in
from uncollapse.anatomy.vocabulary import (
    AdditionNode,
    Anatomy,
    AttentionCall,
    Block,
    ModuleCall,
    Part,
    Place,
    StreamAxes,
    removal,
)
from uncollapse.restoring import restoring

# Not a seed that models are made with: noise that equals an embedding, drawn from the same seed, leaves its direction as it is.
POKE_SEED = 2_604_236_810
AT_A_TIME = 8  # blocks whose streams are kept together


@dataclass
class BlockRun:
    """What one block saw: the arguments of the module in whose code it stands, the stream at its entry and exit, its additions,
    and the gates on the stream's way. `precision` and `modes` are what the model's own forward had put in force around it, such as
    one that keeps it in float64. `earlier` counts the runs of every module before it in the pass."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    stream: Tensor | None = None
    precision: AutocastState | None = None
    modes: tuple[TorchFunctionMode, ...] = ()
    output: Tensor | None = None
    sums: dict[Point, MetAddition] = field(default_factory=dict)
    gates: dict[tuple[Point, int], Tensor] = field(default_factory=dict)
    earlier: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The autocast state and the function modes in which the block ran."""
        with contextlib.ExitStack() as stack:
            if self.precision is not None:
                stack.enter_context(self.precision.entered())
            for mode in self.modes:
                stack.enter_context(mode)
            yield


@dataclass(frozen=True)
class MetAddition:
    """One addition as it was met: what each summand brought, by the number of the operand, and the sum."""

    summands: dict[int, Tensor]
    result: Tensor


def blocks_alone(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, numbers: Collection[int]
) -> dict[int, BlockAlone]:
    """The blocks with the given numbers as they run by themselves on the arguments they have in one pass over `batch`. Within
    `probing` only."""
    wanted = sorted(set(numbers))
    chosen = replace(anatomy, blocks=tuple(anatomy.blocks[i] for i in wanted))
    runs = observe_blocks(model, batch, chosen, to_the_end=False)
    return {i: BlockAlone(model, anatomy.blocks[i], run) for i, run in zip(wanted, runs, strict=True)}


def runs_of_sequences(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, segments: Sequence[Sequence[Tensor] | None]
) -> dict[tuple[int, int], tuple[Sequences, Runs] | str]:
    """Of each attention that goes through the sequences in a loop, by block and part: where these are in this batch, and which turn
    mixes which; or why that is not known. `segments`: of each stack, the places of sequences that lie end to end. Within `probing`
    only. Costs nothing where there is no such loop.

    Raises `ChangedPath` where the loop had one turn on the example, and has more."""
    asked = {
        number: [place for place, part in enumerate(block.parts) if part.by_sequence and _is_readable(part)]
        for number, block in enumerate(anatomy.blocks)
    }
    numbers = [number for number, places in asked.items() if places]
    found: dict[tuple[int, int], tuple[Sequences, Runs] | str] = {}
    for first in range(0, len(numbers), AT_A_TIME):
        with without_zeros(model):
            for number, alone in blocks_alone(model, batch, anatomy, numbers[first : first + AT_A_TIME]).items():
                known = segments[anatomy.stack_of(number)]
                for place in asked[number]:
                    part = alone.block.parts[place]
                    try:
                        sequences = alone.sequences(segments=known)
                        if len(sequences.places) > 1 and not all(call.product.recurs for call in part.attention):
                            raise ChangedPath(
                                f"capture: expected one turn of the loop over sequences in {part.module}, as on the example, got "
                                f"{len(sequences.places)} sequences. Diagnose it on inputs of one kind."
                            )
                        runs = alone.runs_of(place, part)
                        if any(sorted(turns) != list(range(len(sequences.places))) for turns in runs):
                            raise UnreadableError(
                                "some of its sequences are mixed by several turns of a loop, or by none"
                            )
                        found[number, place] = sequences, runs
                    except UnreadableError as error:
                        found[number, place] = str(error)
    return found


def _is_readable(part: Part) -> bool:
    return all(call.unreadable is None for call in part.attention)


class _AllSeenError(BaseException):
    """Ends a pass, or a block's run, behind the last thing that was asked for. No `Exception`: the model's code may catch those."""


@contextlib.contextmanager
def _until_all_seen() -> Iterator[None]:
    with contextlib.suppress(_AllSeenError), depths_as_found():
        yield


def observe_blocks(
    model: nn.Module,
    batch: Mapping[str, Any],
    anatomy: Anatomy,
    *,
    to_the_end: bool = True,
    runs: list[BlockRun] | None = None,
) -> list[BlockRun]:
    """One pass that records each block's arguments, stream and additions; everything is cloned where it is met. runs: where to
    record it, for somebody who looks at them meanwhile."""
    runs, found = [BlockRun() for _ in anatomy.blocks] if runs is None else runs, ModuleStates(model)
    handlers: dict[Point, list[Handler]] = {}
    actions: list[tuple[Place, Action]] = []
    for block, run in zip(anatomy.blocks, runs, strict=True):
        actions += [(block.entry, _keeping(run, "stream")), (block.exit, _keeping(run, "output"))]
        if not to_the_end:
            actions.append((block.exit, lambda _: _end_where_all(runs, found)))
        for point, handler in recorders(block, run).items():
            handlers.setdefault(point, []).append(handler)
    devices = {p.device.type for p in model.parameters()} - {"meta"}
    thread, outside = threading.get_ident(), function_modes()
    with restoring() as changes:
        counts: dict[str, int] = {}
        by_module: dict[str, list[tuple[int, BlockRun]]] = {}
        for block, run in zip(anatomy.blocks, runs, strict=True):
            by_module.setdefault(block.module.name, []).append((block.module.call, run))
        for name, module in model.named_modules():

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if threading.get_ident() != thread:
                    return
                for call, run in by_module.get(name, ()):
                    if call == counts.get(name, 0):
                        run.args, run.kwargs, run.earlier = copied(args, model), copied(kwargs, model), dict(counts)
                        run.precision = AutocastState.here(*devices)
                        run.modes = tuple(mode for mode in function_modes() if mode not in outside)
                counts[name] = counts.get(name, 0) + 1

            changes.hook(module, "forward_pre", enter, with_kwargs=True)
        together = {point: in_turn(*several) for point, several in handlers.items()}
        changes.enter(met(model, actions, handlers=together))
        with _until_all_seen():
            output_of(model, batch)
    return runs


def _end_where_all(runs: list[BlockRun], found: ModuleStates) -> None:
    """End a pass where all is seen and its code holds nothing that it would let go of: a counter, a flag, a cache."""
    if all(run.output is not None for run in runs) and found.is_untouched():
        raise _AllSeenError


def _keeping(run: BlockRun, name: Literal["stream", "output"]) -> Action:
    def keep(stream: Tensor) -> None:
        setattr(run, name, stream.detach().clone())

    return keep


def recorders(block: Block, run: BlockRun) -> dict[Point, Handler]:
    """Handlers that take note of a block's additions, and of the gates on the stream's way, into `run`."""
    handlers: dict[Point, list[Handler]] = {}

    def adding(node: AdditionNode) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            numbers = [i for i, leaves in enumerate(node.leaves) if leaves]
            met = {i: summand(function, args, kwargs, i).detach().clone() for i in numbers}
            result = function(*args, **kwargs)
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            total = result.sum(axis) if operation_name(function) == "stack" else result
            run.sums[node.point] = MetAddition(met, total.detach().clone())
            return result

        return handler

    def passing(point: Point, number: int) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run.gates[point, number] = list(tensors_in([args, kwargs]))[number].detach().clone()
            return function(*args, **kwargs)

        return handler

    for residual in block.residuals:
        for node in residual.additions:
            handlers.setdefault(node.point, []).append(adding(node))
        for point, number in residual.gates:
            handlers.setdefault(point, []).append(passing(point, number))
    return {point: in_turn(*several) for point, several in handlers.items()}


def holding(value: Tensor, number: int) -> Handler:
    """Let an operation run with one of its operands held at a value."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = with_operands(args, kwargs, {number: lambda _: value.clone()})
        return function(*given, **named)

    return handler


def adding(added: list[Tensor], operand: int) -> Handler:
    """Take note of what an operand brings to an addition."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        added.append(summand(function, args, kwargs, operand).clone())
        return function(*args, **kwargs)

    return handler


def results_of(runs: list[list[Mixed]]) -> list[list[Tensor]]:
    """What each run of each call mixed."""
    return [[each.mixed for each in several] for several in runs]


def observing(observe: Observer) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        observe(function, args, kwargs, output)
        return output

    return handler


def _ending(handler: Handler, is_all: Callable[[], bool]) -> Handler:
    """A handler that ends the run where behind it nothing is wanted any more."""

    def ending(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = handler(function, args, kwargs)
        if is_all():
            raise _AllSeenError
        return output

    return putting_another(ending) if is_putting_another(handler) else ending


def _shaken(value: Any) -> Any:
    """Nested arguments with noise on every floating-point tensor."""
    if isinstance(value, Tensor):
        generator = torch.Generator().manual_seed(POKE_SEED + 1)
        noise = torch.randn(value.shape, generator=generator)
        return value + noise.to(value) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_shaken(v) for v in value)
    if type(value) is dict:
        return {k: _shaken(v) for k, v in value.items()}
    return value


class BlockAlone:
    """One block, run by itself on the arguments it had in a pass of the model."""

    def __init__(self, model: nn.Module, block: Block, run: BlockRun) -> None:
        self.model, self.block, self.run = model, block, run
        self.module = model.get_submodule(block.module.name)
        assert run.stream is not None
        self.stream = run.stream
        self.runs: dict[int, Runs] = {}  # by part, see `runs_of`
        self._sequences: Sequences | None = None

    def update(
        self,
        part: int,
        stream: Tensor | None,
        further: Mapping[Point, Handler] | None = None,
        actions: Sequence[tuple[Place, Action]] = (),
    ) -> Tensor:
        """What a part adds to the stream, given another stream, with the other parts removed; with further handlers at
        operations and actions at places."""
        others = tuple(i for i in range(len(self.block.parts)) if i != part)
        added: list[Tensor] = []
        handlers: dict[Point, Handler] = {}
        for node in (node for residual in self.block.residuals for node in residual.additions):
            for operand, leaves in enumerate(node.leaves):
                if leaves == {part}:
                    handlers[node.point] = adding(added, operand)
        wanted = len(handlers)
        for point, handler in (further or {}).items():
            handlers[point] = in_turn(handlers[point], handler) if point in handlers else handler

        def is_all() -> bool:
            return 0 < wanted == len(added) and all(t.shape == self.stream.shape for t in added)

        output = self._replay(others, stream, handlers, actions=actions, is_all=is_all)
        added = [self._as_streams(each) for each in added]
        if not added or any(t.shape != added[0].shape for t in added):
            return output
        if added[0].shape != self.stream.shape == output.shape:  # some of the tokens, or axes in another order
            return output - self._replay(tuple(range(len(self.block.parts))), stream)
        return added[0] if len(added) == 1 else torch.stack(added).sum(0)

    def replay(self, parts: tuple[int, ...], handlers: Mapping[Point, Handler]) -> Tensor:
        """The block's output on its own arguments without some parts, with handlers at operations."""
        return self._replay(parts, None, handlers)

    def rerun(
        self, parts: tuple[int, ...], handlers: Mapping[Point, Handler], actions: Sequence[tuple[Place, Action]]
    ) -> Tensor:
        """The same with actions at places."""
        return self._replay(parts, None, handlers, actions=actions)

    def _as_streams(self, value: Tensor) -> Tensor:
        """A summand of an addition, laid out as several streams are: with an axis of their own, and for each of them."""
        if not any(part.read for part in self.block.parts):
            return value
        fold = self.block.entry.fold
        if fold is not None and value.ndim == self.stream.ndim - 1 and not value.shape[fold.axis] % fold.streams:
            value = fold.opened(value)
        fits = value.ndim == self.stream.ndim and all(
            a in {1, b} for a, b in zip(value.shape, self.stream.shape, strict=True)
        )
        return value.expand(self.stream.shape) if fits else value

    def written(self, number: int, pattern: Tensor, part: Part | None = None) -> Tensor:
        """What the heads of an attention write together, [sequence, token, width], where `pattern` [sequence, head, token, width]
        stands in place of their mixed values.

        Raises `UnreadableError` where the axes of a product or of what is written do not hold that."""
        part, axes = part or self.block.parts[number], self.block.axes
        others = tuple(i for i in range(len(self.block.parts)) if i != number)
        seen: list[Tensor] = []
        handlers = self._giving(number, part, pattern) | {gate.point: opening(gate) for gate in part.gates}
        assert part.written is not None
        keep = observing(lambda *call: seen.append(next(tensors_in(call[3])).detach().clone()))
        own = handlers.get(part.written)
        handlers[part.written] = keep if own is None else in_turn(keep, own)
        self._replay(others, None, handlers, is_all=lambda: bool(seen))
        if axes is None or not seen or not self._is_laid(seen[-1], axes):
            raise UnreadableError("what its heads write together is not laid out as the stream is")
        return axes.within.cloud(seen[-1])

    def _is_laid(self, made: Tensor, axes: StreamAxes) -> bool:
        """Whether what a sublayer makes is laid out as its stream is; of several side by side, as one of them."""
        shape = [size for axis, size in enumerate(self.stream.shape) if axis != axes.streams]
        return list(made.shape) == shape

    def _giving(self, number: int, part: Part, pattern: Tensor) -> dict[Point, Handler]:
        """Let the products of an attention give `pattern` [sequence, head, token, width] instead of their mixed values."""
        handlers, first, answered = {}, 0, [0]
        runs = self.runs_of(number, part) if part.by_sequence else ()
        for place, call in enumerate(part.attention):
            if part.shares_queries:
                handlers[call.product] = giving(pattern, call, len(pattern), answered)
                continue
            own = pattern[:, first : first + call.heads]
            if part.by_sequence:
                turns = [self.sequences().of(own, sequence, 2) for sequence in runs[place]]
                handlers[call.product] = giving_in_turn(turns, call)
            else:
                handlers[call.product] = giving(own, call, len(pattern))
            first += call.heads
        return handlers

    def heads_write(self, number: int, stream: Tensor) -> Tensor:
        """What the heads of an attention write together, given another stream, whether or not it is then added: a removal acts at
        the addition. As the stream is laid out.

        Raises `UnreadableError` where it is not laid out so, or was not found."""
        written, seen = self.block.parts[number].written, list[Tensor]()
        if written is not None:
            others = tuple(i for i in range(len(self.block.parts)) if i != number)
            keep = observing(lambda *call: seen.append(next(tensors_in(call[3])).clone()))
            self._replay(others, stream, {written: keep}, is_all=lambda: bool(seen))
        if not seen or seen[-1].shape != self.stream.shape:
            raise UnreadableError("what its heads write together is not laid out as the stream is")
        return seen[-1]

    def output_map(self, number: int, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """W_O [heads * head width, width] and its bias [width] as they are at this moment: the whole map from the mixed values of
        an attention to what its heads write together. Raises `UnreadableError` where there is no such map."""
        part, axes = part or self.block.parts[number], self.block.axes
        widths = {call.head_width for call in part.attention}
        if axes is None or len(widths) != 1 or part.written is None:
            raise UnreadableError("what its heads write together was not found")
        sequences, tokens = axes.cloud(self.stream).shape[:2]
        shape = (sequences, part.heads, tokens, widths.pop())
        return output_map(lambda pattern: self.written(number, pattern, part), shape, self.stream)

    def sequences(self, axes: StreamAxes | None = None, segments: Sequence[Tensor] | None = None) -> Sequences:
        """Where the sequences of its stream are. segments: the places of those that lie end to end, if they are known.

        Raises `UnreadableError` where they cannot be told apart."""
        axes = axes or self.block.axes
        if self._sequences is None and axes is not None:
            if axes.sequence is not None:
                numbers = torch.arange(self.stream.shape[axes.sequence])
                self._sequences = Sequences(axes.sequence, numbers.split(1), is_packed=False)
            elif segments is None and self.mixing is not None and len(axes.token) == 1:
                segments = segments_of(functools.partial(self.update, self.mixing), self.stream, axes.token[0])
            if axes.sequence is None and segments is not None:
                self._sequences = Sequences(axes.token[0], tuple(segments), is_packed=True)
        if self._sequences is None:
            raise UnreadableError("its sequences are laid end to end, and could not be told apart")
        return self._sequences

    def runs_mixed(
        self, number: int, part: Part, stream: Tensor, wanted: Sequence[int] | None = None
    ) -> list[list[Mixed]]:
        """Values and result of each run of a part's calls, given another stream, with the other parts removed. `wanted`: how many
        runs of each; None: all there are.

        Raises `UnreadableError` where one cannot be laid out."""
        found: list[list[Mixed]] = [[] for _ in part.attention]
        problems: list[UnreadableError] = []

        def noting(index: int, call: AttentionCall) -> Handler:
            def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = function(*args, **kwargs)
                try:
                    seen = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
                    found[index].append(Mixed(None, seen.values.detach().clone(), seen.mixed.detach().clone()))
                except UnreadableError as error:
                    problems.append(error)
                return output

            return handler

        others = tuple(i for i in range(len(self.block.parts)) if i != number)
        handlers = {call.product: noting(i, call) for i, call in enumerate(part.attention)}

        def is_all() -> bool:
            return wanted is not None and [len(runs) for runs in found] == list(wanted)

        self._replay(others, stream, handlers, is_all=is_all)
        if problems:
            raise problems[0]
        return found

    def runs_of(self, number: int, part: Part) -> Runs:
        """Of each call of a part that goes through the sequences in a loop, the sequence that each turn mixes.

        Raises `UnreadableError` where a turn hears several, or none."""
        if number not in self.runs:
            wanted = None

            def mixing(stream: Tensor) -> list[list[Tensor]]:
                nonlocal wanted
                found = self.runs_mixed(number, part, stream, wanted)
                wanted = wanted or [len(runs) for runs in found]
                return results_of(found)

            self.runs[number] = sequences_of_runs(mixing, self.stream, self.sequences())
        return self.runs[number]

    @property
    def mixing(self) -> int | None:
        """The part by which tokens are told apart: the self-attention, else a mixer, else the only part."""
        kinds = [part.kind for part in self.block.parts]
        for kind in ("attention", "mixer"):
            if kind in kinds:
                return kinds.index(kind)
        return 0 if len(kinds) == 1 else None

    def _replay(
        self,
        parts: tuple[int, ...],
        stream: Tensor | None = None,
        handlers: Mapping[Point, Handler] | None = None,
        watching: Mapping[Point, Handler] | None = None,
        poke_memory: bool = False,
        actions: Sequence[tuple[Place, Action]] = (),
        hold: bool = True,
        is_all: Callable[[], bool] | None = None,
    ) -> Tensor:
        """The block's output on its own arguments with some parts removed, optionally with another stream and further handlers
        (the gates on the stream's way and the choice of tokens stay what they were in the model), and handlers that see what
        all of these make of an operation. `poke_memory` changes whatever else the block is given; with `hold` off the gates are
        made from the stream that is given. The run may end where after one of the further handlers `is_all` that was wanted of
        it: then the stream that entered is returned."""
        args, kwargs = list(copied(self.run.args, self.model)), copied(self.run.kwargs, self.model)
        if poke_memory:
            args, kwargs = _shaken(args), _shaken(kwargs)
        given = self.run.stream if stream is None else stream
        assert given is not None
        seen: list[Tensor] = []
        acted: list[tuple[Place, Action]] = [
            *((self._alone(place), action) for place, action in actions),
            (self._alone(self.block.entry), lambda _: given.clone()),
            (
                self._alone(self.block.exit),
                lambda found: seen.append(found if torch.is_grad_enabled() else found.detach().clone()),
            ),
        ]
        held = {
            point: holding(self.run.gates[point, number], number)
            for residual in self.block.residuals
            for point, number in (residual.gates if hold and (parts or stream is not None) else ())
        }
        if is_all is not None and self._may_end_early:
            found = self._found

            def may_end() -> bool:
                return is_all() and found.is_untouched()

            handlers = {point: _ending(handler, may_end) for point, handler in (handlers or {}).items()}
        layers = (watching or {}, handlers or {}, held, removal(self.block, parts))
        acting = {p: in_turn(*(layer[p] for layer in layers if p in layer)) for layer in layers for p in layer}
        alone = {replace(p, call=self._run_alone(p.owner, p.call or 0)): h for p, h in acting.items()}
        seed_all(0)
        with (
            _until_all_seen(),
            self.run.entered(),
            met(self.model, acted, handlers=alone, within=self.module),
        ):
            self.module(*args, **kwargs)
            return seen[-1]
        return given

    @functools.cached_property
    def _may_end_early(self) -> bool:
        """Whether nobody's code waits for the block's modules to return: sharding and offloading put their weights away then."""
        return not any(has_own_hooks(module) or "forward" in vars(module) for module in self.module.modules())

    @functools.cached_property
    def _found(self) -> ModuleStates:
        """The block's modules before the first run that may be ended: `_end_where_all` says what for."""
        return ModuleStates(self.module)

    def _run_alone(self, owner: str, call: int) -> int:
        """The number of a module's run when the block's module is run by itself."""
        return call - self.run.earlier.get(owner, 0)

    def _alone(self, place: Place) -> Place:
        at = place.at
        if isinstance(at, ModuleCall):
            return replace(place, at=replace(at, call=self._run_alone(at.name, at.call)))
        return replace(place, at=replace(at, call=self._run_alone(at.owner, at.call or 0)))
