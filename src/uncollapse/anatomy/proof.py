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
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.autocast import AutocastState
from uncollapse.anatomy.interception import Handler, Point, addition_operands, intercepted
from uncollapse.anatomy.module_states import left_as_found
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.reading import read
from uncollapse.anatomy.situations import Remembered, Situation, latest, recalled, remember
from uncollapse.anatomy.snapshots import copied
from uncollapse.anatomy.tracing import tensors_in, trace
from uncollapse.anatomy.vocabulary import STREAM, Anatomy, Block, Identity, Layout, Part, removal
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel

EXAMPLE_TOKENS = 8


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
    remember(model, situation, Remembered(anatomy, small, steers))
    return anatomy


def _piece(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The example; or the whole batch for a model that does not run on it (patches laid end to end, fixed lengths) or that
    would not be the same model afterwards (BigBird gives up its sparse attention on a short text). Then also whether the whole
    batch makes another model of it, too."""
    piece = example(batch)
    try:
        with probing(model), left_as_found(model) as states:
            model(**piece)
            if not states.steered():
                return piece, False
    except Exception:  # whatever it is, the piece does not fit; the batch is the user's own
        return dict(batch), False
    return dict(batch), _steers(model, batch)


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
    """What one block call saw: its arguments, its output, and the operands and results at its additions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: AutocastState
    output: Tensor | None = None
    sums: dict[Point, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


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
                with run.precision.entered():  # every replay of the block happens in here
                    prover = _BlockProof(model, block, run)
            except UncollapseError:
                raise
            except Exception as error:  # the model's own code, run in a way it may not expect
                raise _failure(model, anatomy, _not_alone(block, error)) from error
            proved.append(prover.block)
            proof += prover.identities
        proof.append(
            Identity("the output afterwards is the output before", "model", _deviation(before, _output(model, batch)))
        )
    names = {b.module.name for b in anatomy.blocks}
    runs_of = Counter(call.name for call in recorded.calls if call.name in names)
    anatomy = replace(anatomy, blocks=tuple(proved), proof=tuple(proof), runs=tuple(sorted(runs_of.items())))
    for identity in proof:
        if not identity.deviation <= 0.0:
            raise _failure(model, anatomy, identity)
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
    devices = {p.device.type for p in model.parameters()} - {"meta"}
    with contextlib.ExitStack() as stack:
        for name, blocks in by_module.items():
            module = model.get_submodule(name)
            outputs = {b.module.call: b.stream_output for b in blocks}

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                runs[name, counts[name]] = _Run(
                    copied(args, model), copied(kwargs, model), AutocastState.here(*devices)
                )

            def leave(_: nn.Module, _a: Any, _k: Any, output: Any, name: str = name, outputs: Any = outputs) -> None:
                call = counts[name]
                if call in outputs:
                    runs[name, call].output = block_output(output, outputs[call]).detach().clone()
                counts[name] = call + 1

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        stack.enter_context(intercepted(model, handlers))
        _output(model, batch)
    return [runs[b.module.name, b.module.call] for b in anatomy.blocks]


def _recording(runs: dict[tuple[str, int], _Run], block: Block, point: Point) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, second = (t.detach().clone() for t in addition_operands(args, kwargs))
        result = function(*args, **kwargs)
        runs[block.module.name, block.module.call].sums[point] = (first, second, result.detach().clone())
        return result

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


class _BlockProof:
    """The identities of one block, checked on its own arguments."""

    def __init__(self, model: nn.Module, block: Block, run: _Run) -> None:
        self.model, self.block, self.run = model, block, run
        self.module = model.get_submodule(block.module.name)
        self.where = block.module.name + (f"[{block.module.call}]" if block.module.call else "")
        self.identities: list[Identity] = []
        assert run.output is not None
        stream = run.args[block.stream_input] if isinstance(block.stream_input, int) else run.kwargs[block.stream_input]
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
            elif part.kind == "mlp" and self._reaches_others(number, stream):
                parts[number] = replace(part, kind="mixer")
            if part.attention:
                parts[number] = replace(part, is_causal=not self._reaches_others(number, stream, token=-1))
        self.block = replace(block, parts=tuple(parts))

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

    def _replay(
        self, parts: tuple[int, ...], stream: Tensor | None = None, handlers: Mapping[Point, Handler] | None = None
    ) -> Tensor:
        """The block's output on its own arguments with some parts removed, optionally with another stream or further
        handlers."""
        args, kwargs = list(copied(self.run.args, self.model)), copied(self.run.kwargs, self.model)
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
        return output.detach().clone()

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
