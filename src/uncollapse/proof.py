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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy import (
    STREAM,
    AdditionNode,
    Anatomy,
    Block,
    Identity,
    Layout,
    ModuleCall,
    Part,
    Place,
    removal,
)
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.interception import Handler, Point, in_turn, probing, same_term, summand, with_operands
from uncollapse.reading import has_own_hooks, read
from uncollapse.streams import Action, cloned, met
from uncollapse.tracing import operation_name, tensors_in, trace

EXAMPLE_TOKENS = 8
_proved: weakref.WeakKeyDictionary[nn.Module, tuple[object, Layout | None, Anatomy, dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def proved_anatomy(model: nn.Module, batch: Mapping[str, Any], layout: Layout | None = None) -> Anatomy:
    """The anatomy of `model`, read off a trace of a small piece of `batch` and proved; remembered for this model object
    as long as its modules stay the same. Raises `UnsupportedModel` where the model cannot be read or the proof fails."""
    known = _proved.get(model)
    if known is not None and known[0] == _fingerprint(model) and layout in (None, known[1]):
        return known[2]
    small = _piece(model, batch)
    anatomy = prove(model, small, layout)
    _proved[model] = (_fingerprint(model), layout, anatomy, small)
    return anatomy


def _piece(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The example, or the whole batch for a model that does not run on it: patches laid end to end, fixed lengths."""
    piece = example(batch)
    try:
        with probing(model):
            model(**piece)
    except Exception:  # whatever it is, the piece does not fit; the batch is the user's own
        return dict(batch)
    return piece


def known_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy that was proved for this model object before, if its modules are still the same."""
    known = _proved.get(model)
    return known[2] if known is not None and known[0] == _fingerprint(model) else None


def known_example(model: nn.Module) -> dict[str, Any] | None:
    """The few tokens on which this model object's anatomy was proved."""
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


@dataclass
class _Run:
    """What one block saw: the arguments of the module in whose code it stands, the stream at its entry and exit, its additions,
    and the gates on the stream's way. `earlier` counts the runs of every module before it in the pass."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    stream: Tensor | None = None
    output: Tensor | None = None
    sums: dict[Point, _Addition] = field(default_factory=dict)
    gates: dict[tuple[Point, int], Tensor] = field(default_factory=dict)
    earlier: dict[str, int] = field(default_factory=dict)


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
        except Exception as error:
            raise InputError(
                f"anatomy: expected a batch that {type(model).__name__} runs on, got {type(error).__name__}: {error}. "
                f"It was given {', '.join(batch)}. Try model(**batch) first."
            ) from error
        torch.manual_seed(0)
        recorded = trace(model, batch)
        proof = [
            Identity("tracing changes no bit of the output", "model", _deviation(before, _tensors(recorded.output)))
        ]
        anatomy = read(model, recorded, layout)
        runs = _observe(model, batch, anatomy)
        proved: list[Block] = []
        for block, run in zip(anatomy.blocks, runs, strict=True):
            try:
                prover = _BlockProof(model, block, run)
            except UncollapseError:
                raise
            except Exception as error:  # the model's own code, run in a way it may not expect
                raise _failure(model, anatomy, _not_alone(block, error), layout) from error
            proved.append(prover.block)
            proof += prover.identities
        proof.append(
            Identity("the output afterwards is the output before", "model", _deviation(before, _output(model, batch)))
        )
    anatomy = replace(anatomy, blocks=tuple(proved), proof=tuple(proof))
    for identity in proof:
        if not identity.deviation <= 0.0:
            raise _failure(model, anatomy, identity, layout)
    return anatomy


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


def _observe(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy) -> list[_Run]:
    """One pass that records each block's arguments, stream and additions; everything is cloned where it is met."""
    runs = [_Run() for _ in anatomy.blocks]
    handlers: dict[Point, list[Handler]] = {}
    actions: list[tuple[Place, Action]] = []
    for block, run in zip(anatomy.blocks, runs, strict=True):
        actions += [(block.entry, _keeping(run, "stream")), (block.exit, _keeping(run, "output"))]
        for point, handler in _recording(block, run).items():
            handlers.setdefault(point, []).append(handler)
    with contextlib.ExitStack() as stack:
        counts: dict[str, int] = {}
        by_module: dict[str, list[tuple[int, _Run]]] = {}
        for block, run in zip(anatomy.blocks, runs, strict=True):
            by_module.setdefault(block.module.name, []).append((block.module.call, run))
        for name, module in model.named_modules():

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                for call, run in by_module.get(name, ()):
                    if call == counts.get(name, 0):
                        run.args, run.kwargs, run.earlier = cloned(args), cloned(kwargs), dict(counts)
                counts[name] = counts.get(name, 0) + 1

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        together = {point: in_turn(*several) for point, several in handlers.items()}
        stack.enter_context(met(model, actions, handlers=together))
        _output(model, batch)
    return runs


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


def _blanking(values: list[Tensor], number: int, value_operand: int) -> Handler:
    """Keep the values an attention mixes, and let zeros come out of it."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values[number] = list(tensors_in([args, kwargs]))[value_operand].detach().clone()
        return torch.zeros_like(function(*args, **kwargs))

    return handler


class _BlockProof:
    """The identities of one block, checked on its own arguments."""

    def __init__(self, model: nn.Module, block: Block, run: _Run) -> None:
        self.model, self.block, self.run = model, block, run
        self.module = model.get_submodule(block.module.name)
        self.where = block.name + (f"[{block.module.call}]" if block.module.call else "")
        self.identities: list[Identity] = []
        assert run.output is not None
        assert run.stream is not None
        stream = run.stream
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
            elif part.kind == "mlp" and self._reaches_others(number, stream):
                parts[number] = replace(part, kind="mixer")
            if part.attention:
                parts[number] = replace(part, is_causal=not self._reaches_others(number, stream, token=-1))
        self.block = replace(block, parts=tuple(parts))

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

    def _normed(self, stream: Tensor, norms: tuple[Any, ...]) -> Tensor:
        for norm in norms:
            stream = self.model.get_submodule(norm.name)(stream)
        return stream

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

    def _replay(
        self,
        parts: tuple[int, ...],
        stream: Tensor | None = None,
        handlers: Mapping[Point, Handler] | None = None,
        watching: Mapping[Point, Handler] | None = None,
    ) -> Tensor:
        """The block's output on its own arguments with some parts removed, optionally with another stream and further handlers
        (the gates on the stream's way and the choice of tokens stay what they were in the model), and handlers that see what
        all of these make of an operation."""
        args, kwargs = list(cloned(self.run.args)), cloned(self.run.kwargs)
        given = self.run.stream if stream is None else stream
        assert given is not None
        seen: list[Tensor] = []
        actions: list[tuple[Place, Action]] = [
            (self._alone(self.block.entry), lambda _: given.clone()),
            (self._alone(self.block.exit), lambda found: seen.append(found.detach().clone())),
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
        with met(self.model, actions, handlers=alone, within=self.module):
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

    def _reaches_others(self, part: int, stream: Tensor, token: int | None = None) -> bool:
        """Whether, with only this part left, a changed token (the middle one, or `token`) changes another one's output."""
        others = tuple(i for i in range(len(self.block.parts)) if i != part)
        plain = self._replay(others)
        if plain.shape != stream.shape or stream.ndim < 2:
            return False
        rows = stream.reshape(-1, stream.shape[-1]).clone()
        token = rows.shape[0] // 2 if token is None else token
        rows[token] = rows[token].flip(0) + 1
        poked = self._replay(others, rows.reshape(stream.shape))
        # Experts run on groups of tokens, and the size of a group decides how its sums are rounded: that is no mixing.
        rounding = 256 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
        same = ((poked - plain).abs() <= rounding).reshape(rows.shape).all(-1)
        same[token] = True
        return not bool(same.all())


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
