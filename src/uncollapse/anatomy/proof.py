"""Prove an anatomy on the live model before anything is measured with it.

Checked on a few real tokens, block by block; a deviation of 0 means bit for bit:

1. tracing changed no bit of the model's output, and the model gives the same output twice;
2. the stream that enters a block, plus the updates found, through the post-norms found, *is* the block's output;
3. with every part removed the block is the identity, or its post-norms alone;
4. removing any single part changes the block's output (unless its update is exactly zero, or NaN hides the change);
5. with everything but one part removed, a changed token reaches no other token beyond rounding (else that part is a
   `mixer`), unless the part is attention;
6. with an attention removed, what it mixes reaches nothing: it works through its own addition alone. The values that it
   mixes are made from this stream; those of a cross-attention are not;
7. after all this the model's output is what it was, bit for bit.

Any failure raises `UnsupportedModel` with the module, the identity, and by how much it failed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.influence import EVERY, reaches, stream_axes, without_zeros
from uncollapse.anatomy.interception import Handler, Point, addition_operands, intercepted
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.reading import read
from uncollapse.anatomy.stacks import find_stacks
from uncollapse.anatomy.tracing import tensors_in, trace
from uncollapse.anatomy.vocabulary import STREAM, Anatomy, Block, Identity, Layout, Part, StreamAxes, removal
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel

EXAMPLE_TOKENS = 8
SEQUENCES, TOKENS, DECODER_TOKENS = 3, 7, 5  # of the proof: pairwise different, so that no axis passes for another
_proved: weakref.WeakKeyDictionary[nn.Module, tuple[object, Layout | None, Anatomy, dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def proved_anatomy(model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None) -> Anatomy:
    """The anatomy of `model`, read off a trace of a small piece of `batch` and proved; remembered for this model object
    as long as its modules stay the same. Raises `UnsupportedModel` where the model cannot be read or the proof fails."""
    known = _proved.get(model)
    if known is not None and known[0] == _fingerprint(model) and layout in (None, known[1]):
        if _given(known[3]) == _given(batch):
            return known[2]
        anatomy = _with_stacks_of(model, known[2], batch)  # other tensors are given: other masks may govern
        _proved[model] = (*known[:2], anatomy, _one_sequence(model, batch))
        return anatomy
    anatomy = prove(model, _piece(model, batch), layout)
    _proved[model] = (_fingerprint(model), layout, anatomy, _one_sequence(model, batch))
    return anatomy


def _given(batch: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name, value in batch.items() if isinstance(value, Tensor))


def _piece(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first of several pieces that the model runs on: `example_batch`, one cut along its first axis alone, the whole batch
    (patches laid end to end, fixed lengths)."""
    for piece in (example_batch(batch), _first_sequences(batch)):
        if _runs_on(model, piece):
            return piece
    return dict(batch)


def _one_sequence(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    piece = example(batch)
    return piece if _runs_on(model, piece) else dict(batch)


def _runs_on(model: nn.Module, piece: Mapping[str, Any]) -> bool:
    try:
        with probing(model):
            model(**piece)
    except Exception:  # whatever it is, the piece does not fit; the batch is the user's own
        return False
    return True


def _with_stacks_of(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> Anatomy:
    """The proved anatomy with the masks and ids that govern its stacks in another kind of batch."""
    piece = _piece(model, batch)
    with probing(model):
        try:
            return replace(anatomy, stacks=find_stacks(model, piece, anatomy, blocks_alone))
        except UncollapseError:
            raise
        except Exception as error:
            raise _not_run(model, batch, error) from error


def known_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy that was proved for this model object before, if its modules are still the same."""
    known = _proved.get(model)
    return known[2] if known is not None and known[0] == _fingerprint(model) else None


def known_example(model: nn.Module) -> dict[str, Any] | None:
    """A sequence of few tokens out of the batch on which this model object's anatomy was proved."""
    known = _proved.get(model)
    return known[3] if known is not None else None


def _fingerprint(model: nn.Module) -> object:
    return tuple((name, id(module)) for name, module in model.named_modules())


def example(batch: Mapping[str, Any], tokens: int = EXAMPLE_TOKENS) -> dict[str, Any]:
    """One sequence of a batch, cut to at most `tokens` real tokens where it is made of token numbers."""
    size = next((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.ndim), 1)
    keep: dict[str, Tensor] = {}
    row = 0
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            row = int(mask.sum(-1).argmax()) if name == "attention_mask" else row
            keep[name.removesuffix("attention_mask")] = mask[row].nonzero().flatten()[:tokens]
    cut: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            cut[name] = value
            continue
        one = value[row : row + 1]
        stack = "decoder_" if name.startswith("decoder_") else ""
        if value.ndim == 2 and not value.is_floating_point():
            columns = keep.get(stack, torch.arange(min(tokens, value.shape[1]), device=value.device))
            if int(columns.max()) < value.shape[1]:
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
        is_decoder = name.startswith("decoder_") or (name == "labels" and "decoder_input_ids" in batch)
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
                columns = columns.repeat(-(-length // len(columns)))[
                    :length
                ]  # too few real tokens are gone through again
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
        return mask.bool().cpu()
    return torch.ones(shape, dtype=torch.bool)


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
    """What one block call saw: its arguments, its output, and the operands and results at its additions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None = None
    sums: dict[Point, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def stream(self, block: Block) -> Tensor:
        """The stream that entered."""
        found = (
            self.args[block.stream_input] if isinstance(block.stream_input, int) else self.kwargs[block.stream_input]
        )
        assert isinstance(found, Tensor)
        return found


def prove(model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None) -> Anatomy:
    """Read and prove the anatomy on `batch`, which should be small. Nothing is remembered."""
    with probing(model):
        try:
            before = _output(model, batch)
        except Exception as error:
            raise _not_run(model, batch, error) from error
        torch.manual_seed(0)
        recorded = trace(model, batch)
        proof = [
            Identity("tracing changes no bit of the output", "model", _deviation(before, _tensors(recorded.output)))
        ]
        anatomy = read(model, recorded, layout)
        runs = _observe(model, batch, anatomy)
        proved: list[Block] = []
        known: dict[tuple[int, tuple[int, ...]], StreamAxes] = {}  # by stack and shape of its stream
        for number, (block, run) in enumerate(zip(anatomy.blocks, runs, strict=True)):
            try:
                prover = _BlockProof(model, block, run)
                prover.check(known, anatomy.stack_of(number))
            except UncollapseError:
                raise
            except Exception as error:  # the model's own code, run in a way it may not expect
                raise _failure(model, anatomy, _not_alone(block, error)) from error
            proved.append(prover.block)
            proof += prover.identities
        proved = _shared_axes(proved, runs, anatomy)
        stacks = find_stacks(model, batch, replace(anatomy, blocks=tuple(proved)), blocks_alone)
        proof.append(
            Identity("the output afterwards is the output before", "model", _deviation(before, _output(model, batch)))
        )
    anatomy = replace(anatomy, blocks=tuple(proved), proof=tuple(proof), stacks=stacks)
    for identity in proof:
        if not identity.deviation <= 0.0:
            raise _failure(model, anatomy, identity)
    return anatomy


def _shared_axes(blocks: list[Block], runs: list[_Run], anatomy: Anatomy) -> list[Block]:
    """Give blocks whose own axes could not be told those of another block of their stack with a stream of the same shape."""
    shapes = [tuple(run.stream(block).shape) for block, run in zip(blocks, runs, strict=True)]
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
    """One pass that records each block call's arguments, output and additions; everything is cloned where it is met."""
    runs: dict[tuple[str, int], _Run] = {}
    handlers: dict[Point, Handler] = {}
    by_module: dict[str, list[Block]] = {}
    for block in anatomy.blocks:
        by_module.setdefault(block.module.name, []).append(block)
        for residual in block.residuals:
            for node in residual.additions:
                handlers[node.point] = _recording(runs, block, node.point)
    counts = dict.fromkeys(by_module, 0)
    wanted = {(b.module.name, b.module.call) for b in anatomy.blocks}
    with contextlib.ExitStack() as stack:
        for name, blocks in by_module.items():
            module = model.get_submodule(name)
            outputs = {b.module.call: b.stream_output for b in blocks}

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                runs[name, counts[name]] = _Run(_cloned(args), _cloned(kwargs))

            def leave(_: nn.Module, _a: Any, _k: Any, output: Any, name: str = name, outputs: Any = outputs) -> None:
                call = counts[name]
                if call in outputs:
                    runs[name, call].output = block_output(output, outputs[call]).detach().clone()
                counts[name] = call + 1
                if not to_the_end and wanted <= {key for key, run in runs.items() if run.output is not None}:
                    raise _AllSeenError

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        stack.enter_context(intercepted(model, handlers))
        with contextlib.suppress(_AllSeenError):
            _output(model, batch)
    return [runs[b.module.name, b.module.call] for b in anatomy.blocks]


def _recording(runs: dict[tuple[str, int], _Run], block: Block, point: Point) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, second = (t.detach().clone() for t in addition_operands(args, kwargs))
        result = function(*args, **kwargs)
        runs[block.module.name, block.module.call].sums[point] = (first, second, result.detach().clone())
        return result

    return handler


def _adding(added: list[Tensor], operand: int, otherwise: Handler | None) -> Handler:
    """Take note of an operand of an addition, and do what is to be done there."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        added.append(addition_operands(args, kwargs)[operand].clone())
        return function(*args, **kwargs) if otherwise is None else otherwise(function, args, kwargs)

    return handler


def _blanking(values: list[Tensor], number: int, value_operand: int) -> Handler:
    """Keep the values an attention mixes, and let zeros come out of it."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values[number] = list(tensors_in([args, kwargs]))[value_operand].detach().clone()
        return torch.zeros_like(function(*args, **kwargs))

    return handler


def block_output(output: Any, key: int | None) -> Tensor:
    """The stream in a block's output: the output itself, or its `key`-th member."""
    found = output if key is None else list(output.values())[key] if isinstance(output, Mapping) else output[key]
    assert isinstance(found, Tensor)
    return found


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_cloned(v) for v in value)
    if type(value) is dict:
        return {k: _cloned(v) for k, v in value.items()}
    return value


class BlockAlone:
    """One block, run by itself on the arguments it had in a pass of the model."""

    def __init__(self, model: nn.Module, block: Block, run: _Run) -> None:
        self.model, self.block, self.run = model, block, run
        self.module = model.get_submodule(block.module.name)
        self.stream = run.stream(block)

    def update(self, part: int, stream: Tensor) -> Tensor:
        """What a part adds to the stream, given another stream, with the other parts removed."""
        others = tuple(i for i in range(len(self.block.parts)) if i != part)
        removing = removal(self.block, others)
        added: list[Tensor] = []
        handlers: dict[Point, Handler] = {}
        for node in (node for residual in self.block.residuals for node in residual.additions):
            for operand, leaves in enumerate((node.first, node.second)):
                if leaves == {part}:
                    handlers[node.point] = _adding(added, operand, removing.get(node.point))
        output = self._replay(others, stream, handlers)
        if not added or any(t.shape != added[0].shape for t in added):
            return output
        return added[0] if len(added) == 1 else torch.stack(added).sum(0)

    @property
    def mixing(self) -> int | None:
        """The part by which tokens are told apart: the self-attention, else a mixer, else the only part."""
        kinds = [part.kind for part in self.block.parts]
        for kind in ("attention", "mixer"):
            if kind in kinds:
                return kinds.index(kind)
        return 0 if len(kinds) == 1 else None

    def _replay(
        self, parts: tuple[int, ...], stream: Tensor | None = None, handlers: Mapping[Point, Handler] | None = None
    ) -> Tensor:
        """The block's output on its own arguments with some parts removed, optionally with another stream or further
        handlers."""
        args, kwargs = list(_cloned(self.run.args)), _cloned(self.run.kwargs)
        if stream is not None:
            if isinstance(self.block.stream_input, int):
                args[self.block.stream_input] = stream.clone()
            else:
                kwargs[self.block.stream_input] = stream.clone()
        acting = {**removal(self.block, parts), **(handlers or {})}
        known = [node.point for residual in self.block.residuals for node in residual.additions]
        known += [call.product for part in self.block.parts for call in part.attention]
        base: dict[str, int] = {}
        for point in known:
            base[point.owner] = min(base.get(point.owner, point.call or 0), point.call or 0)
        alone = {replace(p, call=(p.call or 0) - base[p.owner]): h for p, h in acting.items()}
        torch.manual_seed(0)
        with intercepted(self.model, alone, within=self.module):
            output = block_output(self.module(*args, **kwargs), self.block.stream_output)
        return output if torch.is_grad_enabled() else output.detach().clone()


class _BlockProof(BlockAlone):
    """The identities of one block, checked on its own arguments."""

    def __init__(self, model: nn.Module, block: Block, run: _Run) -> None:
        super().__init__(model, block, run)
        self.where = block.module.name + (f"[{block.module.call}]" if block.module.call else "")
        self.identities: list[Identity] = []

    def check(self, known: dict[tuple[int, tuple[int, ...]], StreamAxes], stack: int) -> None:
        """Check every identity. `known` are the axes of streams met so far, by `stack` and shape."""
        block, run, stream = self.block, self.run, self.stream
        assert run.output is not None
        self._check(
            "run alone, the block gives the output it gave in the model", _difference(run.output, self._replay(()))
        )
        self._adds_up(stream, run.output)
        everything = tuple(range(len(block.parts)))
        self._check("with every part removed, the block is the identity", self._identity_gap(stream, everything))
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
        self.block = replace(block, parts=tuple(parts), axes=axes, axes_reason=reason)

    def _check(self, statement: str, deviation: float) -> None:
        self.identities.append(Identity(statement, self.where, deviation))

    def _adds_up(self, stream: Tensor, output: Tensor) -> None:
        """Walk the stream through the recorded additions and the post-norms."""
        deviation = 0.0
        for residual in self.block.residuals:
            for node in residual.additions:
                first, second, result = self.run.sums[node.point]
                deviation = max(deviation, _difference(result, first + second))
                for leaves, operand in ((node.first, first), (node.second, second)):
                    if leaves == {STREAM}:
                        deviation = max(deviation, _difference(operand, self._scaled(stream, residual.stream_scales)))
            stream = self._normed(self.run.sums[residual.additions[-1].point][2], residual.norms_post)
        deviation = max(deviation, _difference(output, stream))
        self._check("stream in, plus the updates found, through the post-norms found, is the block's output", deviation)

    def _identity_gap(self, stream: Tensor, parts: tuple[int, ...]) -> float:
        output = self._replay(parts)
        for residual in self.block.residuals:
            stream = self._normed(self._scaled(stream, residual.stream_scales), residual.norms_post)
        return _difference(output, stream)

    @staticmethod
    def _scaled(stream: Tensor, scales: tuple[float, ...]) -> Tensor:
        for scale in scales:
            stream = stream * scale
        return stream

    def _normed(self, stream: Tensor, norms: tuple[Any, ...]) -> Tensor:
        for norm in norms:
            stream = self.model.get_submodule(norm.name)(stream)
        return stream

    def _update_is_zero(self, part: int) -> bool:
        for residual in self.block.residuals:
            for node in residual.additions:
                first, second, _ = self.run.sums[node.point]
                for leaves, operand in ((node.first, first), (node.second, second)):
                    if leaves == {part}:
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

    def _axes(self, stream: Tensor) -> tuple[StreamAxes | None, str]:
        """The axes, as the attention shows them; without one, the first part that moves information between tokens."""
        reason = f"{self.where} has no attention by which its tokens could be told"
        for part in range(len(self.block.parts)) if self.mixing is None else [self.mixing]:
            update = functools.partial(self.update, part)
            with contextlib.ExitStack() as stack:
                if not bool(update(stream).isfinite().all()):
                    stack.enter_context(without_zeros(self.module, without_nan=True))
                axes, found = stream_axes(update, stream, self.where)
            if axes is not None:
                return axes, ""
            reason = reason if self.mixing is None else found
        return None, reason

    def _moves(self, number: int, part: Part, stream: Tensor, axes: StreamAxes) -> Part:
        """The part, with what was seen of how it moves information between tokens."""
        if part.attention:
            return replace(part, is_causal=not self._reaches_others(number, stream, axes, last=True))
        if part.kind == "mlp" and self._reaches_others(number, stream, axes):
            return replace(part, kind="mixer")
        return part

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


def _not_alone(block: Block, error: Exception) -> Identity:
    return Identity(
        f"the block runs by itself on the arguments it had in the model ({type(error).__name__}: {error})",
        block.module.name,
        float("inf"),
    )


def _failure(model: nn.Module, anatomy: Anatomy, identity: Identity) -> UnsupportedModel:
    layout = f"uc.Layout(blocks={tuple(dict.fromkeys(b.module.name for b in anatomy.blocks))!r})"
    return UnsupportedModel(
        f"anatomy: expected an identity of {type(model).__name__} to hold, got a deviation of {identity.deviation:.3g} at "
        f"{identity.where}: {identity.statement}. The block does more than was found. Pass layout={layout}, corrected.",
        found=anatomy.describe(),
        identity=f"{identity.statement} (at {identity.where}, off by {identity.deviation:.3g})",
        layout=layout,
    )
