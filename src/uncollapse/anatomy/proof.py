"""Prove an anatomy on the live model before anything is measured with it.

Checked on a few real tokens, block by block; a deviation of 0 means bit for bit:

1. tracing changed no bit of the model's output, and the model gives the same output twice;
2. the stream that enters a block, plus the updates found, through the post-norms found, *is* the block's output;
3. with every part removed the block is the identity, or its post-norms alone; or the stream is carried element by element, by
   factors and shifts that do not depend on it (then within rounding, told by three streams);
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
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.autocast import AutocastState
from uncollapse.anatomy.carrying import Observer, Way
from uncollapse.anatomy.influence import EVERY, Products, moved, poked, reaches, stream_axes, without_zeros
from uncollapse.anatomy.interception import (
    Handler,
    Point,
    in_turn,
    same_term,
    summand,
    with_operands,
)
from uncollapse.anatomy.mixing_proof import Poked, located, placed
from uncollapse.anatomy.module_states import left_as_found
from uncollapse.anatomy.operands import (
    Mixed,
    SeveralChoicesError,
    UnreadableError,
    chosen_pair,
    product_operands,
    replaced,
)
from uncollapse.anatomy.output_maps import (
    ProductMap,
    axes_order,
    giving,
    opening,
    output_map,
    product_map,
    sounding,
)
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.reading import has_own_hooks, read
from uncollapse.anatomy.replaying import NotReplayable, replayed
from uncollapse.anatomy.situations import Remembered, Situation, latest, recalled, remember
from uncollapse.anatomy.snapshots import copied
from uncollapse.anatomy.stacks import find_stacks, given_mask
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.tracing import Trace, operands_of, operation_name, tensors_in, trace
from uncollapse.anatomy.vocabulary import (
    STREAM,
    AdditionNode,
    Anatomy,
    AttentionCall,
    Block,
    Gate,
    Identity,
    Layout,
    MaskingStep,
    ModuleCall,
    NormPiece,
    Part,
    Place,
    Stack,
    StreamAxes,
    removal,
)
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.restoring import restoring

EXAMPLE_TOKENS = 8
# Not a seed that models are made with: noise that equals an embedding, drawn from the same seed, leaves its direction as it is.
POKE_SEED = 2_604_236_810
SEQUENCES, TOKENS, DECODER_TOKENS = 3, 7, 5  # of the proof: pairwise different, so that no axis passes for another


def proved_anatomy(
    model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None, *, anew: bool = False
) -> Anatomy:
    """The anatomy of `model`, read off a trace of a small piece of `batch` and proved. It is remembered for this model object in
    this situation (`situations`). anew: prove it again, on the whole batch: on a piece the model went another way.

    Raises `UnsupportedModel` where the model cannot be read or the proof fails."""
    situation = Situation.of(model, batch, layout)
    known = None if anew else recalled(model, situation)
    if known is not None:
        return known.anatomy
    small, steers = (dict(batch), _steers(model, batch)) if anew else _piece(model, batch)
    anatomy = prove(model, small, layout)
    few = _one_sequence(model, batch)
    ids = next((stack.ids for stack in anatomy.stacks if stack.ids is not None and stack.ids_transposed), None)
    if ids is not None:  # its first row is a token of every sequence
        shape = batch[ids].shape
        piece = example_batch(_turned(batch, shape))
        few = _turned(piece, piece[ids].shape)
        few = few if _runs_on(model, few) else small
    elif any(_may_be_token_first(anatomy, stack) for stack in anatomy.stacks):
        few = small  # one row of its vectors may be one token, which no mask and no order is seen on
    remember(model, situation, Remembered(anatomy, few, steers))
    return anatomy


def _may_be_token_first(anatomy: Anatomy, stack: Stack) -> bool:
    """Whether a stack whose embedding is made of no token numbers has its tokens along an axis before that of the sequences."""
    axes = anatomy.blocks[stack.blocks[0]].axes
    return stack.ids is None and axes is not None and axes.sequence is not None and min(axes.token) < axes.sequence


def piece_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The small piece of a batch that the anatomy is proved on."""
    return _piece(model, batch)[0]


def _piece(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The first of several pieces that the model runs on: `example_batch`, one cut along its first axis alone, the whole batch
    (patches laid end to end, fixed lengths); also the whole batch for a model that would not be the same model afterwards
    (BigBird gives up its sparse attention on a short text). Then also whether the whole batch makes another model of it, too."""
    for piece in (example_batch(batch), _first_sequences(batch)):
        if _runs_on(model, piece):
            return piece, False
    return dict(batch), _steers(model, batch)


def _one_sequence(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    piece = example(batch)
    return piece if _runs_on(model, piece) else dict(batch)


def _turned(batch: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """A batch whose tensors with axes of these sizes have them in the other order."""
    return {
        name: value.transpose(0, 1) if isinstance(value, Tensor) and value.shape[:2] == tuple(shape) else value
        for name, value in batch.items()
    }


def _runs_on(model: nn.Module, piece: Mapping[str, Any]) -> bool:
    """Whether the model runs on a piece, and is the same model afterwards."""
    try:
        with probing(model), left_as_found(model) as states:
            model(**piece)
            return not states.steered()
    except Exception:  # whatever it is, the piece does not fit; the next one is closer to the user's own batch
        return False


def _steers(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether running `batch` sends later runs of the model another way."""
    try:
        with probing(model), left_as_found(model) as states:
            model(**batch)
            return states.steered()
    except Exception:  # `prove` says what is wrong with the batch
        return False


def known_anatomy(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Anatomy | None:
    """The anatomy that was proved last for this model object as it stands now; with a `batch`, on inputs of its kind."""
    known = latest(model, batch)
    return None if known is None else known.anatomy


def known_example(model: nn.Module) -> dict[str, Any] | None:
    """The few tokens on which this model object's anatomy was proved."""
    known = latest(model)
    return None if known is None else known.example


def example(batch: Mapping[str, Any], tokens: int = EXAMPLE_TOKENS) -> dict[str, Any]:
    """One sequence of a batch, cut to at most `tokens` real tokens where it is made of token numbers."""
    size = next((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.ndim), 1)
    keep: dict[str, Tensor] = {}
    row = 0
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = _marked_real(mask)
            row = int(real.sum(-1).argmax()) if name == "attention_mask" else row
            keep[name.removesuffix("attention_mask")] = real[row].nonzero().flatten()[:tokens]
    cut: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            cut[name] = value
            continue
        one = value[row : row + 1]
        stack = "decoder_" if name.startswith("decoder_") else ""
        if value.ndim == 2 and not value.is_floating_point():
            columns = keep.get(stack, torch.arange(min(tokens, value.shape[1]), device=value.device))
            if len(columns) and int(columns.max()) < value.shape[1]:
                one = one[:, columns]
        cut[name] = one.clone()
    return cut


def example_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Up to 3 sequences of a batch with 7 tokens each, so that no two axes have one length and none passes for another.

    What is made of token numbers is cut to real tokens; a single sequence is repeated with its tokens in another order. Other
    tensors are cut along the axes that have the lengths of the token numbers. The decoder's are cut to 5 tokens.
    """
    numbers = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point()}
    if not numbers:
        return _first_sequences(batch)
    shape = tuple(next(iter(numbers.values())).shape)
    tokens = TOKENS if shape[1] > SEQUENCES else shape[1]
    cut = {shape[1]: min(shape[1], tokens)}
    rows = [int(row) for row in _real(numbers, "", shape).sum(-1).argsort(descending=True, stable=True)]
    wanted = min(shape[0], SEQUENCES if shape[1] > SEQUENCES else TOKENS)
    if wanted == tokens and wanted > 2:
        wanted -= 1
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or not value.ndim:
            found[name] = value
            continue
        is_decoder = name.startswith("decoder_") or (name == "labels" and any(n.startswith("decoder_") for n in batch))
        stack = "decoder_" if is_decoder else ""
        piece = value
        if value.ndim >= 2 and value.shape[0] == shape[0] and (name in numbers or value.shape[1] == shape[1]):
            length = min(value.shape[1], DECODER_TOKENS if is_decoder else tokens)
            real = _real(numbers, stack, tuple(value.shape[:2]))
            taken = []
            for row in rows[:wanted]:
                columns = real[row].nonzero().flatten()
                if not len(columns):
                    columns = torch.arange(length)
                # Too few real tokens are gone through again.
                columns = columns.repeat(-(-length // len(columns)))[:length]
                taken.append(value[row, columns.to(value.device)])
            if len(taken) == 1:
                taken.append(taken[0].roll(1, 0))
            piece = torch.stack(taken)
        else:
            if value.shape[0] == shape[0]:
                piece = value[torch.tensor(rows[:wanted], device=value.device)]
                piece = torch.cat([piece, piece]) if wanted == 1 else piece
            elif value.shape[0] in cut:
                piece = piece[: cut[value.shape[0]]]
            if value.ndim == 2 and value.shape == shape[::-1]:
                piece = piece[:, : max(wanted, 2)]
        if value.ndim > 2 and value.shape[0] == shape[0]:
            for axis in range(2, value.ndim):
                if value.shape[axis] == shape[1] and value.shape[1] in {1, shape[1]}:  # over pairs of tokens
                    piece = piece.narrow(axis, 0, tokens)
        found[name] = piece.clone()
    return found


def _real(numbers: Mapping[str, Tensor], stack: str, shape: tuple[int, ...]) -> Tensor:
    """Which tokens of tensors of this shape are real, as far as the batch's masks of this stack say so."""
    mask = numbers.get(f"{stack}attention_mask")
    if mask is not None and tuple(mask.shape) == shape:
        return _marked_real(mask).cpu()
    return torch.ones(shape, dtype=torch.bool)


def _marked_real(mask: Tensor) -> Tensor:
    """Which tokens a mask over tokens says are real: those with a 1. Without any 1 all are: there a 1 stands for padding."""
    marked = mask.bool()
    return marked if bool(marked.any()) else ~marked


def _first_sequences(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first 3 sequences of a batch: what has the length of the first tensor is cut along its first axis."""
    size = next((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.ndim), 1)

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            return value
        return torch.cat([value, value]) if size == 1 else value[:SEQUENCES].clone()

    return {name: first(value) for name, value in batch.items()}


@dataclass
class _Run:
    """What one block saw: the arguments of the module in whose code it stands, the stream at its entry and exit, its additions,
    and the gates on the stream's way. `earlier` counts the runs of every module before it in the pass."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    stream: Tensor | None = None
    precision: AutocastState | None = None
    output: Tensor | None = None
    sums: dict[Point, _Addition] = field(default_factory=dict)
    gates: dict[tuple[Point, int], Tensor] = field(default_factory=dict)
    earlier: dict[str, int] = field(default_factory=dict)

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast state in which the block ran."""
        return contextlib.nullcontext() if self.precision is None else self.precision.entered()


@dataclass(frozen=True)
class _Addition:
    """One addition as it was met: what each summand brought, by the number of the operand, and the sum."""

    summands: dict[int, Tensor]
    result: Tensor


def prove(model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None) -> Anatomy:
    """Read and prove the anatomy on `batch`, which should be small. Nothing is remembered."""
    with probing(model):
        try:
            before = _output(model, batch)
        except Exception as error:  # whatever it is, the model does not run on this batch: the refusal says so
            raise _not_run(model, batch, error) from error
        torch.manual_seed(0)
        recorded = trace(model, batch)
        proof = [
            Identity("tracing changes no bit of the output", "model", _deviation(before, _tensors(recorded.output)))
        ]
        anatomy = read(model, recorded, layout)
        runs = _observe(model, batch, anatomy)
        proved: list[Block] = []
        reached_of: list[dict[int, Tensor]] = []
        known: dict[tuple[int, tuple[int, ...]], StreamAxes] = {}  # by stack and shape of its stream
        for number, (block, run) in enumerate(zip(anatomy.blocks, runs, strict=True)):
            try:
                with run.entered():  # the norms that the proof repeats by themselves, too
                    prover = _BlockProof(model, block, run, recorded)
                    prover.check(known, anatomy.stack_of(number))
            except UncollapseError:
                raise
            except Exception as error:  # the model's own code, run in a way it may not expect
                raise _failure(model, anatomy, _not_alone(block, error), layout) from error
            proved.append(prover.block)
            reached_of.append(prover.reached)
            proof += prover.identities
        recorded.tape.clear()  # it holds every tensor of the pass
        proved = _shared_axes(proved, runs, anatomy)
        stacks = find_stacks(model, batch, replace(anatomy, blocks=tuple(proved)), blocks_alone)
        proved = [
            _with_causality(block, reached, given_mask(stacks[anatomy.stack_of(number)], batch))
            for number, (block, reached) in enumerate(zip(proved, reached_of, strict=True))
        ]
        proof.append(
            Identity("the output afterwards is the output before", "model", _deviation(before, _output(model, batch)))
        )
    names = {b.module.name for b in anatomy.blocks}
    runs_of = Counter(call.name for call in recorded.calls if call.name in names)
    anatomy = replace(
        anatomy, blocks=tuple(proved), proof=tuple(proof), stacks=stacks, runs=tuple(sorted(runs_of.items()))
    )
    for identity in proof:
        if not identity.deviation <= 0.0:
            raise _failure(model, anatomy, identity, layout)
    return anatomy


def _with_causality(block: Block, reached: Mapping[int, Tensor], real: Tensor | None) -> Block:
    """The block, its attentions causal where no later token reaches a real one: what padded ones see is nobody's business."""
    parts = list(block.parts)
    for number, rows in reached.items():
        if real is not None and real.shape == rows.shape:
            parts[number] = replace(parts[number], is_causal=not bool((rows & real.to(rows.device)).any()))
    return replace(block, parts=tuple(parts))


def _shared_axes(blocks: list[Block], runs: list[_Run], anatomy: Anatomy) -> list[Block]:
    """Give blocks whose own axes could not be told those of another block of their stack with a stream of the same shape."""
    shapes = [() if run.stream is None else tuple(run.stream.shape) for run in runs]
    found = list(blocks)
    for number, block in enumerate(blocks):
        stack = anatomy.stacks[anatomy.stack_of(number)]
        axes = next((blocks[i].axes for i in stack.blocks if blocks[i].axes and shapes[i] == shapes[number]), None)
        if block.axes is None and axes is not None:
            found[number] = replace(block, axes=axes, axes_reason="")
    return found


def blocks_alone(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, numbers: Collection[int]
) -> dict[int, BlockAlone]:
    """The blocks with the given numbers as they run by themselves on the arguments they have in one pass over `batch`. Within
    `probing` only."""
    wanted = sorted(set(numbers))
    chosen = replace(anatomy, blocks=tuple(anatomy.blocks[i] for i in wanted))
    runs = _observe(model, batch, chosen, to_the_end=False)
    return {i: BlockAlone(model, anatomy.blocks[i], run) for i, run in zip(wanted, runs, strict=True)}


def _not_run(model: nn.Module, batch: Mapping[str, Any], error: Exception) -> InputError:
    return InputError(
        f"anatomy: expected a batch that {type(model).__name__} runs on, got {type(error).__name__}: {error}. "
        f"It was given {', '.join(batch)}. Try model(**batch) first."
    )


def _output(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return _tensors(model(**batch))


def _tensors(output: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors_in(output) if t.is_floating_point()]


def _deviation(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest absolute difference; 0 means equal in every bit, NaNs in the same places included."""
    if len(expected) != len(got):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)


def _difference(expected: Tensor, got: Tensor) -> float:
    if expected.numel() != got.numel():
        return float("inf")
    if got.shape != expected.shape:  # the same values with their axes in another order are the same stream
        orders = [o for o in itertools.permutations(range(got.ndim)) if got.permute(o).shape == expected.shape]
        equal = [o for o in orders if torch.equal(got.permute(o), expected)]
        got = got.permute(equal[0]) if equal else got.reshape(expected.shape)
    if torch.equal(expected.isnan(), got.isnan()) and torch.equal(
        expected.nan_to_num(), got.to(expected.dtype).nan_to_num()
    ):
        return 0.0
    return float((expected.double() - got.double()).nan_to_num(nan=float("inf")).abs().max())


class _AllSeenError(Exception):
    """Ends a pass behind the last block that was asked for."""


def _observe(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, *, to_the_end: bool = True) -> list[_Run]:
    """One pass that records each block's arguments, stream and additions; everything is cloned where it is met."""
    runs = [_Run() for _ in anatomy.blocks]
    handlers: dict[Point, list[Handler]] = {}
    actions: list[tuple[Place, Action]] = []
    for block, run in zip(anatomy.blocks, runs, strict=True):
        actions += [(block.entry, _keeping(run, "stream")), (block.exit, _keeping(run, "output"))]
        if not to_the_end:
            actions.append((block.exit, lambda _: _end_where_all(runs)))
        for point, handler in _recording(block, run).items():
            handlers.setdefault(point, []).append(handler)
    devices = {p.device.type for p in model.parameters()} - {"meta"}
    thread = threading.get_ident()
    with restoring() as changes:
        counts: dict[str, int] = {}
        by_module: dict[str, list[tuple[int, _Run]]] = {}
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
                counts[name] = counts.get(name, 0) + 1

            changes.hook(module, "forward_pre", enter, with_kwargs=True)
        together = {point: in_turn(*several) for point, several in handlers.items()}
        changes.enter(met(model, actions, handlers=together))
        with contextlib.suppress(_AllSeenError):
            _output(model, batch)
    return runs


def _end_where_all(runs: list[_Run]) -> None:
    if all(run.output is not None for run in runs):
        raise _AllSeenError


def _keeping(run: _Run, name: Literal["stream", "output"]) -> Action:
    def keep(stream: Tensor) -> None:
        setattr(run, name, stream.detach().clone())

    return keep


def _recording(block: Block, run: _Run) -> dict[Point, Handler]:
    """Handlers that take note of a block's additions, and of the gates on the stream's way, into `run`."""
    handlers: dict[Point, list[Handler]] = {}

    def adding(node: AdditionNode) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            numbers = [i for i, leaves in enumerate(node.leaves) if leaves]
            met = {i: summand(function, args, kwargs, i).detach().clone() for i in numbers}
            result = function(*args, **kwargs)
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            total = result.sum(axis) if operation_name(function) == "stack" else result
            run.sums[node.point] = _Addition(met, total.detach().clone())
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


def _holding(value: Tensor, number: int) -> Handler:
    """Let an operation run with one of its operands held at a value."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = with_operands(args, kwargs, {number: lambda _: value.clone()})
        return function(*given, **named)

    return handler


def _adding(added: list[Tensor], operand: int) -> Handler:
    """Take note of what an operand brings to an addition."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        added.append(summand(function, args, kwargs, operand).clone())
        return function(*args, **kwargs)

    return handler


def _blanking(values: list[Tensor], number: int, value_operand: int) -> Handler:
    """Keep the values an attention mixes, and let zeros come out of it."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values[number] = operands_of(operation_name(function), args, kwargs)[value_operand].detach().clone()
        return torch.zeros_like(function(*args, **kwargs))

    return handler


def _observing(observe: Observer) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        observe(function, args, kwargs, output)
        return output

    return handler


def _zeroed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Zeros in place of what an operation gives."""
    return torch.zeros_like(function(*args, **kwargs))


def _product_input(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a product with one matrix reads."""
    found = product_map(function, args, kwargs)
    assert found is not None
    return found.given.clone()


def _scattering(seed: int) -> Handler:
    """Random signs in place of an operation's result."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(2, output.shape, generator=generator) * 2 - 1).to(output)

    return handler


def _moved_features(before: Tensor, after: Tensor) -> Tensor:
    """Which features, along the last axis, differ beyond rounding in any row."""
    change = (after.double() - before.double()).abs().nan_to_num().flatten(0, -2).amax(0)
    size = torch.maximum(before.double().abs(), after.double().abs()).nan_to_num().flatten(0, -2).amax(0)
    return (change > 16 * torch.finfo(before.dtype).eps * size).cpu()


def _noting_product(found: list[Mixed | str], number: int, call: AttentionCall) -> Handler:
    """Keep the operands and the result of a product that mixes values, or why they cannot be read."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        try:
            seen = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
            found[number] = Mixed(None, seen.values.detach().clone(), seen.mixed.detach().clone())
        except UnreadableError as error:
            found[number] = str(error)
        return output

    return handler


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

    def __init__(self, model: nn.Module, block: Block, run: _Run) -> None:
        self.model, self.block, self.run = model, block, run
        self.module = model.get_submodule(block.module.name)
        assert run.stream is not None
        self.stream = run.stream

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
                    handlers[node.point] = _adding(added, operand)
        for point, handler in (further or {}).items():
            handlers[point] = in_turn(handlers[point], handler) if point in handlers else handler
        output = self._replay(others, stream, handlers, actions=actions)
        if not added or any(t.shape != added[0].shape for t in added):
            return output
        if added[0].shape != self.stream.shape == output.shape:  # some of the tokens, or axes in another order
            return output - self._replay(tuple(range(len(self.block.parts))), stream)
        return added[0] if len(added) == 1 else torch.stack(added).sum(0)

    def written(self, number: int, pattern: Tensor, part: Part | None = None) -> Tensor:
        """What the heads of an attention write together, [sequence, token, width], where `pattern` [sequence, head, token, width]
        stands in place of their mixed values.

        Raises `UnreadableError` where the axes of a product or of what is written do not hold that."""
        part, axes = part or self.block.parts[number], self.block.axes
        others = tuple(i for i in range(len(self.block.parts)) if i != number)
        seen: list[Tensor] = []
        handlers = self._giving(part, pattern) | {gate.point: opening(gate) for gate in part.gates}
        assert part.written is not None
        keep = _observing(lambda *call: seen.append(next(tensors_in(call[3])).detach().clone()))
        own = handlers.get(part.written)
        handlers[part.written] = keep if own is None else in_turn(keep, own)
        self._replay(others, None, handlers)
        if axes is None or not seen or seen[-1].shape != self.stream.shape:
            raise UnreadableError("what its heads write together is not laid out as the stream is")
        return axes.cloud(seen[-1])

    @staticmethod
    def _giving(part: Part, pattern: Tensor) -> dict[Point, Handler]:
        """Let the products of an attention give `pattern` [sequence, head, token, width] instead of their mixed values."""
        handlers, first, answered = {}, 0, [0]
        for call in part.attention:
            if part.shares_queries:
                handlers[call.product] = giving(pattern, call, len(pattern), answered)
                continue
            handlers[call.product] = giving(pattern[:, first : first + call.heads], call, len(pattern))
            first += call.heads
        return handlers

    def heads_write(self, number: int, stream: Tensor) -> Tensor:
        """What the heads of an attention write together, given another stream, whether or not it is then added: a removal acts at
        the addition. As the stream is laid out.

        Raises `UnreadableError` where it is not laid out so, or was not found."""
        written, seen = self.block.parts[number].written, list[Tensor]()
        if written is not None:
            others = tuple(i for i in range(len(self.block.parts)) if i != number)
            keep = _observing(lambda *call: seen.append(next(tensors_in(call[3])).clone()))
            self._replay(others, stream, {written: keep})
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
    ) -> Tensor:
        """The block's output on its own arguments with some parts removed, optionally with another stream and further handlers
        (the gates on the stream's way and the choice of tokens stay what they were in the model), and handlers that see what
        all of these make of an operation. `poke_memory` changes whatever else the block is given."""
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
            point: _holding(self.run.gates[point, number], number)
            for residual in self.block.residuals
            for point, number in (residual.gates if parts or stream is not None else ())
        }
        layers = (watching or {}, handlers or {}, held, removal(self.block, parts))
        acting = {p: in_turn(*(layer[p] for layer in layers if p in layer)) for layer in layers for p in layer}
        alone = {replace(p, call=self._run_alone(p.owner, p.call or 0)): h for p, h in acting.items()}
        torch.manual_seed(0)
        with self.run.entered(), met(self.model, acted, handlers=alone, within=self.module):
            self.module(*args, **kwargs)
        return seen[-1]

    def _run_alone(self, owner: str, call: int) -> int:
        """The number of a module's run when the block's module is run by itself."""
        return call - self.run.earlier.get(owner, 0)

    def _alone(self, place: Place) -> Place:
        at = place.at
        if isinstance(at, ModuleCall):
            return replace(place, at=replace(at, call=self._run_alone(at.name, at.call)))
        return replace(place, at=replace(at, call=self._run_alone(at.owner, at.call or 0)))


class _BlockProof(BlockAlone):
    """The identities of one block, checked on its own arguments."""

    def __init__(self, model: nn.Module, block: Block, run: _Run, recorded: Trace) -> None:
        super().__init__(model, block, run)
        self.recorded = recorded
        self.where = block.name + (f"[{block.module.call}]" if block.module.call else "")
        self.identities: list[Identity] = []
        self.reached: dict[int, Tensor] = {}  # by part: the tokens [sequence, token] that later ones reach

    def check(self, known: dict[tuple[int, tuple[int, ...]], StreamAxes], stack: int) -> None:
        """Check every identity. `known` are the axes of streams met so far, by `stack` and shape."""
        block, run, stream = self.block, self.run, self.stream
        assert run.output is not None
        self._check(
            "run alone, the block gives the output it gave in the model", _difference(run.output, self._replay(()))
        )
        self._adds_up()
        self._carries(tuple(range(len(block.parts))))
        parts = list(block.parts)
        for number, part in enumerate(block.parts):
            without = self._replay((number,))
            changed = _difference(run.output, without)
            silent = self._update_is_zero(number) or not bool(run.output.isfinite().all())
            self._check(
                f"removing the {part.kind} ({part.module}) changes the output", 0.0 if changed or silent else 1.0
            )
            if part.kind in {"attention", "cross"}:
                self._attends(number, part, stream, without, silent)
        key = (stack, tuple(stream.shape))
        with without_zeros(self.module):
            axes, reason = (known[key], "") if key in known else self._axes(stream)
            if axes is not None:
                known[key] = axes
                parts = [self._moves(number, part, stream, axes) for number, part in enumerate(parts)]
            for number, part in enumerate(parts):
                if part.attention:
                    parts[number] = replace(part, attention=self._mixes(number, part, stream, axes, reason))
            self.block = replace(block, axes=axes, axes_reason=reason)
            parts = [self._writes(i, part) if part.attention else part for i, part in enumerate(parts)]
        self.block = replace(self.block, parts=tuple(parts))

    def _check(self, statement: str, deviation: float) -> None:
        self.identities.append(Identity(statement, self.where, deviation))

    def _adds_up(self) -> None:
        """Every addition is the sum of what its operands bring."""
        deviation = 0.0
        for residual in self.block.residuals:
            for node in residual.additions:
                met = self.run.sums[node.point]
                total = functools.reduce(torch.add, _one_per_term(node, met))
                gap = _difference(met.result, total)  # no rounding, but where an operation multiplies and adds in one
                deviation = max(deviation, 0.0 if _is_rounding(gap, met.result, total) else gap)
        self._check("what the stream and the updates found bring is what each addition gives", deviation)

    def _carries(self, everything: tuple[int, ...]) -> None:
        """With every part removed, the stream passes from addition to addition, and to the exit, as it is: bit for bit, or
        multiplied and shifted element by element by what does not depend on it."""
        pure = self._rerun(everything, None)
        ways = [*self._operands(pure), *self._operands(self.run), *self._sums(pure)]
        if all(_difference(before, after) == 0.0 for before, after in ways):
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
        gap = max(_carry_gap(list(seen)) for seen in met)
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

    def _rerun(self, parts: tuple[int, ...], stream: Tensor | None) -> _Run:
        """The block alone with some parts removed, its additions recorded."""
        run = _Run(stream=self.run.stream if stream is None else stream)
        recording = _recording(self.block, run)
        run.output = self._replay(parts, stream, watching=recording)
        return run

    def _operands(self, run: _Run) -> list[tuple[Tensor, Tensor]]:
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

    def _sums(self, run: _Run) -> list[tuple[Tensor, Tensor]]:
        """The stream before and after each addition, in a run without any part."""
        results = [run.sums[residual.additions[-1].point].result for residual in self.block.residuals]
        return list(zip(self._begins(run), results, strict=False))

    def _begins(self, run: _Run) -> list[Tensor]:
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
        gap = _difference(without, self._replay((number,), handlers=blanked))
        self._check(f"with the {part.kind} ({part.module}) removed, what it mixes reaches nothing", gap)
        inside = all(v.numel() for v in values)
        self._check(f"the attention of {part.module} happens inside this block", float(not inside))
        if not inside:
            return
        seen = {c.product: _blanking(other, i, c.value_operand) for i, c in enumerate(part.attention)}
        self._replay((number,), stream.flip(-1) + 1, seen)
        for before, after in zip(values, other, strict=True):
            if part.kind == "cross":
                statement, gap = "is not mixed from this stream", _difference(before, after)
            else:  # values that are alike for every token say nothing: a value map of zeros makes such
                alike = silent or torch.equal(before, before[..., :1, :].expand_as(before))
                statement, gap = "is mixed from this stream", float(not alike and torch.equal(before, after))
            self._check(f"what the {part.kind} ({part.module}) mixes {statement}", gap)

    def _mixes(
        self, number: int, part: Part, stream: Tensor, axes: StreamAxes | None, reason: str
    ) -> tuple[AttentionCall, ...]:
        """What the axes of this part's products hold, found by poking each sequence, one token, and the memory of a
        cross-attention. With the other parts removed, a token reaches the product by itself alone."""
        if axes is None or axes.sequence is None:
            reason = reason or "its sequences are laid end to end"
            return tuple(replace(call, unreadable=reason) for call in part.attention)
        others = tuple(i for i in range(len(self.block.parts)) if i != number)
        generator = torch.Generator().manual_seed(POKE_SEED)
        noise = torch.randn(stream.shape, generator=generator).to(stream) * (stream.double().std().to(stream) + 1)
        sequences, tokens = axes.cloud(stream).shape[:2]
        pairs = {
            i: self._pair(call, others, stream, noise, axes) for i, call in enumerate(part.attention) if call.is_einsum
        }
        part = replace(part, attention=tuple(replace(c, pair=pairs.get(i)) for i, c in enumerate(part.attention)))

        def observed(stream: Tensor, memory: bool = False) -> list[Mixed | str]:
            found: list[Mixed | str] = ["it did not run"] * len(part.attention)
            handlers = {c.product: _noting_product(found, i, c) for i, c in enumerate(part.attention)}
            self._replay(others, stream, handlers, poke_memory=memory)
            return found

        plain = observed(stream)
        in_turn_poked = []
        for sequence in range(sequences):
            changed = stream.clone()
            changed.select(axes.sequence, sequence).add_(noise.select(axes.sequence, sequence))
            in_turn_poked.append(observed(changed))
        token = plain
        most = stream.shape[axes.token[-1]] if self.block.chooses_tokens else 1  # the first may be none of the chosen
        for at in range(most):
            one = stream.clone()
            places = {axes.sequence: 0} | dict.fromkeys(axes.token, 0) | {axes.token[-1]: at}
            index = tuple(places.get(axis, slice(None)) for axis in range(stream.ndim))
            one[index] += noise[index]
            token = observed(one)
            if any(_differ(before, after) for before, after in zip(plain, token, strict=True)):
                break
        memory = observed(stream, memory=True) if part.kind == "cross" else None
        found = []
        for i, call in enumerate(part.attention):
            met = [plain[i], token[i], *([memory[i]] if memory is not None else []), *(p[i] for p in in_turn_poked)]
            views = [view for view in met if not isinstance(view, str)]
            if len(views) < len(met):
                found.append(replace(call, unreadable=next(view for view in met if isinstance(view, str))))
                continue
            first = 2 if memory is None else 3
            pokes = Poked(views[0], views[first:], views[1], None if memory is None else views[2])
            try:
                known = located(call, pokes, tokens, alone=len(part.attention) == 1)
                found.append(replace(known, masking=self._masking_axes(known, others, sequences)))
            except UnreadableError as error:
                found.append(replace(call, unreadable=str(error)))
        if any(call.shares_queries for call in found):
            alike = len({(c.heads, c.head_width, c.lead, c.before, c.after) for c in found}) == 1
            if not alike or not all(c.shares_queries for c in found) or not self._in_turn(found, others, axes):
                reason = (
                    "several attention calls of one sublayer share out its queries in a way that was not understood"
                )
                found = [replace(call, unreadable=call.unreadable or reason) for call in found]
        return tuple(found)

    def _pair(
        self, call: AttentionCall, others: tuple[int, ...], stream: Tensor, noise: Tensor, axes: StreamAxes
    ) -> tuple[int, int] | None:
        """Which axes of the weights hold queries and keys, where the product itself leaves that open: one token moves a single
        place of the keys, and its query alone a single place of the queries. None where the product says it, or nothing told it."""
        if call.similarity is None or call.weight_operand is None:
            return None
        product: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

        def met(stream: Tensor, queries: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
            """The queries, and the operands of the product, with other queries in the place of its own."""
            seen: list[Tensor] = []

            def comparing(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                operands = operands_of(operation_name(function), args, kwargs)
                seen.append(operands[call.query_operand].detach().clone())
                if queries is not None:
                    args, kwargs = with_operands(args, kwargs, {call.query_operand: lambda _: queries})
                return function(*args, **kwargs)

            def mixing(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                operands = operands_of(operation_name(function), args, kwargs)
                seen.extend(t.detach().clone() for t in operands)
                output = function(*args, **kwargs)
                product.append((args, kwargs, output))
                return output

            assert call.similarity is not None
            self._replay(others, stream, {call.similarity: comparing, call.product: mixing})
            return seen[0], seen[1:]

        _, plain = met(stream)
        try:
            product_operands(torch.einsum, *product[0], call.weight_operand)
        except SeveralChoicesError:
            pass
        except UnreadableError:
            return None
        else:
            return None
        for token in (-1, 0):  # of causal attention the first token sees itself alone, whatever its query
            one = stream.clone()
            places = {axes.sequence: 0} | dict.fromkeys(axes.token, token)
            index = tuple(places.get(axis, slice(None)) for axis in range(stream.ndim))
            one[index] += noise[index]
            other_queries, changed = met(one)
            _, asked = met(stream, other_queries)
            of_weights = _single_places(plain[call.weight_operand], asked[call.weight_operand])
            of_values = _single_places(plain[call.value_operand], changed[call.value_operand])
            found = chosen_pair(*product[0], call.weight_operand, (of_weights, of_values))
            if found is not None:
                return found
        return None

    def _in_turn(self, calls: list[AttentionCall], others: tuple[int, ...], axes: StreamAxes) -> bool:
        """Whether calls that answer for some of the queries each answer for all of them together, one after the other: each is
        blanked in turn, and the tokens whose rows then change are its own."""
        plain = axes.cloud(self._replay(others))
        taken: list[int] = []
        for call in calls:
            without = axes.cloud(self._replay(others, None, {call.product: _zeroed}))
            taken += (without != plain).any(-1).any(0).nonzero().flatten().tolist()
        return taken == list(range(plain.shape[1]))

    def _writes(self, number: int, part: Part) -> Part:
        """The part with how its heads write: through an output projection that takes all of them on, with whose features it
        reads; else by the whole map from the mixed values, or why that is none."""
        projections = {call.projection for call in part.attention}
        projection = projections.pop() if len(projections) == 1 else None
        if projection is not None and self._takes_all(number, part, projection):
            try:
                return replace(part, features=self._features(number, part, projection))
            except UnreadableError as error:
                # It reads a sum of several products' heads, perhaps: then these are told before it.
                alone = self._writes_at_once(number, part)
                return replace(part, no_output_map=str(error)) if alone.no_output_map else alone
            except UncollapseError:  # its input is met in another way: by keyword, say
                return part
        return self._writes_at_once(number, part)

    def _writes_at_once(self, number: int, part: Part) -> Part:
        """The part with the whole map from its mixed values to what they write as its W_O, or why there is none."""
        part, gates = replace(part, gates=()), part.gates
        part = replace(part, attention=tuple(replace(call, projection=None) for call in part.attention))
        problem = next((call.unreadable for call in part.attention if call.unreadable), None)
        if problem is not None:
            return replace(part, no_output_map=problem)
        try:
            self.output_map(number, part)
        except UnreadableError as error:
            try:
                laid = tuple(self._laid_gate(number, replace(part, gates=gates), gate) for gate in gates)
                opened = replace(part, gates=laid)
                if gates:
                    self.output_map(number, opened)
                    return opened
            except UnreadableError:
                pass  # what acts there is no gate, or not only gates: the first reason holds
            return replace(part, no_output_map=str(error))
        return part

    def _laid_gate(self, number: int, part: Part, gate: Gate) -> Gate:
        """A gate with how it lies on the mixed values: of all heads together, or of those of one call after the other.

        Raises `UnreadableError` where that cannot be told."""
        axes, widths = self.block.axes, {call.head_width for call in part.attention}
        if axes is None or len(widths) != 1:
            raise UnreadableError("what its heads mix was not found")
        shape = (*axes.cloud(self.stream).shape[:2], widths.pop())
        others = tuple(i for i in range(len(self.block.parts)) if i != number)

        def order(own: slice) -> tuple[int, ...] | None:
            pattern = torch.zeros(shape[0], part.heads, *shape[1:], dtype=self.stream.dtype, device=self.stream.device)
            numbers = torch.arange(1, pattern[:, own].numel() + 1, dtype=torch.float64).reshape(pattern[:, own].shape)
            pattern[:, own] = numbers.to(pattern)
            seen: list[Tensor] = []
            look = _observing(lambda *met: seen.append(met[3].detach().clone()))
            handlers = self._giving(part, pattern) | {each.point: opening(each) for each in part.gates}
            handlers[gate.point] = in_turn(look, handlers[gate.point])
            self._replay(others, None, handlers)
            return axes_order(seen[-1], pattern[:, own]) if seen else None

        whole = order(slice(0, part.heads))
        orders, first = [whole], 0
        if whole is None:
            orders = []
            for call in part.attention:
                orders.append(order(slice(first, first + call.heads)))
                first += call.heads
        known = tuple(each for each in orders if each is not None)
        if len(known) < len(orders):
            raise UnreadableError("how a gate lies on the mixed values of its heads could not be told")
        return replace(gate, orders=known)

    def _takes_all(self, number: int, part: Part, projection: ModuleCall | Point) -> bool:
        """Whether everything that the mixed values do to what the part adds goes through this product with one matrix, whose result
        is as wide as the stream: with zeros in place of its result, other mixed values change nothing."""
        width = self.stream.shape[-1 if self.block.axes is None else self.block.axes.width]
        widths: list[int] = []
        maps: list[ProductMap | None] = []

        def updated(seed: int) -> Tensor:
            further: dict[Point, Handler] = {call.product: _scattering(seed) for call in part.attention}
            actions: list[tuple[Place, Action]] = []

            def silence(result: Tensor) -> Tensor:
                widths.append(result.shape[-1])
                return torch.zeros_like(result)

            def silence_product(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                maps.append(product_map(function, args, kwargs))
                return silence(function(*args, **kwargs))

            if isinstance(projection, Point):
                further[projection] = silence_product
            else:
                actions.append((Place(projection), silence))
            return self.update(number, None, further, actions)

        first, second = updated(0), updated(1)
        return set(widths) == {width} and None not in maps and _difference(first, second) == 0.0

    def _features(self, number: int, part: Part, projection: ModuleCall | Point) -> tuple[int, ...]:
        """The head of each feature that an output projection reads; empty where the heads lie side by side, or stay within windows.

        Heads speak in turn, numbered in binary: for each digit those that have a 1 there, then those that have a 0. A feature is
        a head's if it moves with its digits and with nothing else. Raises `UnreadableError` where features are of several heads.
        """
        axes, heads = self.block.axes, part.heads
        widths = {call.head_width for call in part.attention}
        if axes is None or len(widths) != 1 or any(c.unreadable for c in part.attention) or heads == 1:
            return ()
        sequences, tokens = axes.cloud(self.stream).shape[:2]
        width = widths.pop()

        def read(further: dict[Point, Handler]) -> Tensor:
            """What the projection reads when the calls give something else."""
            seen: list[Tensor] = []
            actions: list[tuple[Place, Action]] = []
            if isinstance(projection, Point):
                keep = _observing(lambda *met: seen.append(_product_input(*met[:3])))
                further[projection] = keep
            else:
                actions.append((Place(projection, "in", (0,)), lambda given: seen.append(given.detach().clone())))
            self.update(number, None, further, actions)
            return seen[-1]

        def heard(speaking: Tensor) -> Tensor:
            further: dict[Point, Handler] = {}
            first = 0
            for call in part.attention:
                further[call.product] = sounding(speaking[first : first + call.heads], call, sequences)
                first += 0 if part.shares_queries else call.heads
            return read(further)

        silent = heard(torch.zeros(heads, dtype=torch.bool))
        if silent.shape[-1] != heads * width:
            raise UnreadableError("its output projection does not read the heads side by side")
        alike = read_alike = torch.empty(0)
        if not any("window" in {axis.role, axis.inner} for call in part.attention for axis in call.lead):
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(sequences, heads, tokens, width, generator=generator).to(self.stream)
            alike = noise.transpose(1, 2).flatten(2)
            read_alike = read(self._giving(part, noise))
            if read_alike.numel() == alike.numel() and any(
                torch.equal(read_alike.flatten(), known.flatten()) for known in (alike, alike.transpose(0, 1))
            ):
                return ()
        owner = torch.zeros(silent.shape[-1], dtype=torch.long)
        numbers = torch.arange(heads)
        for digit in range((heads - 1).bit_length()):
            ones = (numbers >> digit & 1).bool()
            by_one, by_zero = (_moved_features(silent, heard(some)) for some in (ones, ~ones))
            if bool((by_one == by_zero).any()):
                return self._alike_features(read_alike, alike, heads)
            owner += by_one.long() << digit
        if not bool((owner.bincount(minlength=heads) == width).all()):
            raise UnreadableError(
                "its heads do not have the same number of features in what the output projection reads"
            )
        return () if torch.equal(owner, owner.sort().values) else tuple(owner.tolist())

    def _alike_features(self, read: Tensor, spoken: Tensor, heads: int) -> tuple[int, ...]:
        """The same where a norm over all heads lets every head move every feature: the head of the feature it most resembles."""
        best = torch.empty(0)
        ways = [spoken, spoken.transpose(0, 1)] if read.numel() and read.numel() == spoken.numel() else []
        for rows in ways:
            given = read.double().reshape(-1, read.shape[-1])
            sources = rows.double().flatten(0, 1)
            sources, given = sources - sources.mean(0), given - given.mean(0)
            agreement = (given / given.norm(dim=0)).T @ (sources / sources.norm(dim=0))
            found, place = agreement.abs().nan_to_num().max(-1)
            if bool((found > 0.8).all()) and len(place.unique()) == len(place):
                best = place
        if not len(best):
            raise UnreadableError(
                "which features of what its output projection reads are of which head could not be told"
            )
        owner = best // (len(best) // heads)
        return () if torch.equal(owner, owner.sort().values) else tuple(owner.tolist())

    def _masking_axes(self, call: AttentionCall, others: tuple[int, ...], sequences: int) -> tuple[MaskingStep, ...]:
        """The masking steps with what the axes of their results hold, told by where their entries arrive among the weights."""
        steps = []
        for step in call.masking:
            arrived, shape = self._arriving(call, step, others)
            if arrived is not None:
                step = replace(step, axes=placed(arrived, shape, call, sequences))
            steps.append(step)
        return tuple(steps)

    def _arriving(
        self, call: AttentionCall, step: MaskingStep, others: tuple[int, ...]
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """Which entry of a masking step's result every weight was, [*lead, query, key], and the shape of that result."""
        way, shapes, arrived = Way(call, step), list[tuple[int, ...]](), list[Tensor]()
        handlers = {point: _observing(observe) for point, observe in way.observers().items()}

        within = handlers[step.point]

        def noting_shape(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = within(function, args, kwargs)
            shapes.append(tuple((output if isinstance(output, Tensor) else args[0]).shape))
            return output

        def at_product(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            operand = operands_of(operation_name(function), args, kwargs)[call.weight_operand or 0]
            _, numbers = way.end(operand)
            if numbers is not None:
                swapped = replaced([args, kwargs], operand, numbers.expand(operand.shape))
                seen = product_operands(function, swapped[0], swapped[1], output, call.weight_operand or 0, call.pair)
                if seen.weights is not None:
                    arrived.append(seen.weights)
            return output

        self._replay(others, None, {**handlers, step.point: noting_shape, call.product: at_product})
        return (arrived[0], shapes[0]) if arrived else (None, ())

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
            self.reached[number] = self._reached_by_later(number, stream, axes)
            return replace(part, is_causal=not bool(self.reached[number].any()))
        if part.kind == "mlp" and self._reaches_others(number, stream, axes):
            return replace(part, kind="mixer")
        return part

    def _reached_by_later(self, part: int, stream: Tensor, axes: StreamAxes) -> Tensor:
        """Which tokens [sequence, token] later ones reach, with only this part left: the last alone, then the second half, since
        the last tokens may be padding."""
        (axis,), size = axes.token, stream.shape[axes.token[0]]
        cloud, products = axes.cloud(stream), Products()
        with products:
            plain = self.update(part, stream)
        found = torch.zeros(cloud.shape[:2], dtype=torch.bool, device=cloud.device)
        if plain.shape != stream.shape or size < 2:
            return found
        for first in {size - 1, size // 2}:
            other = self.update(part, poked(stream, axis, torch.arange(first, size)))
            before, after = (axes.cloud(update).flatten(0, 1) for update in (plain, other))
            rows = moved(before, after, 0, products.coarsest()).view(found.shape)
            rows[:, first:] = False
            found |= rows
        return found

    def _reaches_others(self, part: int, stream: Tensor, axes: StreamAxes, last: bool = False) -> bool:
        """Whether, with only this part left, changed tokens (one in three, or the last) change what it adds to others."""
        update = functools.partial(self.update, part)
        plain = update(stream)
        for axis in axes.token:
            size = stream.shape[axis]
            places = torch.tensor([size - 1]) if last else torch.arange(0, size, EVERY)
            if size > 1 and reaches(update, stream, axis, places, plain):
                return True
        return False


def _differ(before: Mixed | str, after: Mixed | str) -> bool:
    """Whether a product mixes other values than before, as far as both could be read."""
    if isinstance(before, str) or isinstance(after, str):
        return False
    return not torch.equal(before.values, after.values)


def _single_places(before: Tensor, after: Tensor) -> set[int]:
    """The axes along which a single place of several differs."""
    different = before != after
    return {
        axis
        for axis in range(before.ndim)
        if before.shape[axis] > 1 and int(different.movedim(axis, 0).flatten(1).any(-1).sum()) == 1
    }


def _one_per_term(node: AdditionNode, met: _Addition) -> list[Tensor]:
    """What the summands brought: once for two operands that are factors of one."""
    operation = node.point.operation.split(" ")[0]
    numbers = sorted(met.summands)
    return [met.summands[i] for i in numbers if not any(same_term(operation, j, i) for j in numbers if j < i)]


def _is_rounding(gap: float, *values: Tensor) -> bool:
    largest = max(float(v.double().abs().nan_to_num().max()) for v in values)
    return gap <= 4 * torch.finfo(values[0].dtype).eps * largest


def _carry_gap(runs: list[tuple[Tensor, Tensor]]) -> float:
    """How far a way of the stream is from a law after = a * before + b with a and b fixed in every element, seen in several
    runs: 0 within rounding, else the part of the change that does not obey it."""
    if all(_difference(before, after) == 0.0 for before, after in runs):
        return 0.0
    before, after = [b.double() for b, _ in runs], [a.double() for _, a in runs]
    if any(b.numel() != a.numel() for b, a in runs):
        return max(0.0 if _is_choice(b, a) else float("inf") for b, a in runs)
    if any(not bool(b.isfinite().all() & a.isfinite().all()) for b, a in runs):
        return float("inf")
    precision = max(torch.finfo(t.dtype).eps for run in runs for t in run)
    return min(_law_gap([b.permute(order) for b in before], after, precision) for order in _orders(before[0], after[0]))


def _is_choice(before: Tensor, after: Tensor) -> bool:
    """Whether some of the tokens went on as they were: the smaller tensor's rows are, bit for bit, rows of the larger one."""
    if before.ndim < 2 or after.ndim < 2 or before.shape[-1] != after.shape[-1]:
        return False
    few, many = sorted((before, after), key=Tensor.numel)
    known = set(map(tuple, many.reshape(-1, many.shape[-1]).tolist()))
    return all(tuple(row) in known for row in few.reshape(-1, few.shape[-1]).tolist())


def _orders(before: Tensor, after: Tensor) -> list[tuple[int, ...]]:
    """The orders of its axes in which one tensor may be compared with another; as it lies, where none gives its shape."""
    same = [o for o in itertools.permutations(range(before.ndim)) if before.permute(o).shape == after.shape]
    return same or [tuple(range(before.ndim))]


def _law_gap(before: list[Tensor], after: list[Tensor], precision: float) -> float:
    shifts = [b.reshape(after[0].shape) - before[0].reshape(after[0].shape) for b in before[1:]]
    answers = [a - after[0] for a in after[1:]]
    size = max(float(b.abs().max()) for b in before) or 1.0
    reply = max(float(a.abs().max()) for a in after) or 1.0
    worst = 0.0
    for shift, answer in zip(shifts[1:], answers[1:], strict=True):
        cross = float((answer * shifts[0] - answers[0] * shift).abs().max()) / (size * reply)
        worst = max(worst, cross if cross > 16 * precision else 0.0)
    return worst


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
