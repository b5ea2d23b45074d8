"""Whether the logits of an attention are bounded whatever the text, and by how much: a soft cap, or a norm on queries and keys.

Each is shown on the live model, and where it is not shown there is no bound:

* *Soft cap.* The product of queries with keys is multiplied by 10^9 and by 10^18. Capped logits are then all c or -c, the same
  c both times. The range of a row is at most 2c.
* *Norm on queries and keys.* The norm's own gain and shift are found by running it (`norm_law`): its output is at most
  R = sqrt(width) max|gain| + |shift| long. On these tokens queries and keys are as long as outputs of the norm, so that nothing
  lengthened them on the way (a rotation does not), and the logits are s (q.k). The range is at most 2 s R_q R_k.

In both cases the product is multiplied by 0 as well: what is left was added to it. It must be exactly 0 or forbid the pair, for a
bias that grows with the distance is next to nothing on the few tokens of these passes. What these cannot show is a factor that
depends on the position or the length and is 1 on short texts.

The range that a text happens to show is no bound, and is not used. When not to use it: for what the attention does on a text; that
is its entropy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.examples import example
from uncollapse.anatomy.interception import Handler, Point, intercepted
from uncollapse.anatomy.operands import fused_arguments
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import known_example
from uncollapse.anatomy.shared_readings import all_made
from uncollapse.anatomy.torch_calls import operation_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, Block
from uncollapse.probe.norm_law import NormLaw, proved_law
from uncollapse.records.common import BoundPart
from uncollapse.restoring import in_this_thread, restoring

UNPROVED = "not bounded as far as was shown: no soft cap, and no norm on queries and keys alone"
NOTHING = 104.0  # e^-104 is 0 in single precision, denormal numbers included
_CLOSE = 1e-3  # for half precision as well: bounds are rounded up by it
_FACTORS = (1.0, 0.0, 1e9, 1e18)  # of the product: as it is, what is added to it, what caps it


@dataclass(frozen=True)
class LogitBound:
    """The most that the logits of a row can differ, None where that was not shown; `because` says on what condition, or why not.
    `part` is what bounds them."""

    range: float | None
    because: str
    part: BoundPart | None = None


@dataclass
class _Seen:
    """One attention call in the plain pass and in those with its product of queries and keys multiplied."""

    queries: Tensor | None = None
    keys: Tensor | None = None
    product: Tensor | None = None
    scale: float = 1.0
    added: Tensor | None = None  # of a fused call: its floating mask
    logits: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


class LogitBounds:
    """A bound, or why there is none, of every attention call. It takes a few tiny passes, which are made beside others where those
    share a reading of the weights."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batch: Mapping[str, Any],
        proved_on: Mapping[str, Any] | None = None,
    ) -> None:
        """proved_on: the piece that the anatomy was proved on, where the model is not known by it yet."""
        self._model, self._anatomy = model, anatomy
        self._batch = proved_on or known_example(model) or example(batch)
        self._calls = [(n, b, c) for n, b in enumerate(anatomy.blocks) for p in b.parts for c in p.attention]
        self._seen: list[_Seen] = []
        self._outputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._laws: dict[tuple[str, int], NormLaw | None] = {}  # by norm and place among its outputs
        self._left: int | None = None  # passes that are still to be made; None before any was asked for
        self._error: Exception | None = None

    def passes(self) -> list[Callable[[], None]]:
        """The passes, within `probing`, in their order; none of them raises what the model raises."""
        calls = [call for _, _, call in self._calls]
        inner = {n.module.name for b in self._anatomy.blocks for n in b.norms if n.role == "inner" and n.piece is None}
        self._seen, self._error = [_Seen() for _ in calls], None
        self._outputs.clear()
        self._laws.clear()
        several = [(factor, self._handlers(factor)) for factor in _FACTORS]
        # A fused call has no soft cap, and without a norm of its own nothing bounds it.
        is_of_use = bool(inner) or not all(call.is_fused for call in calls)
        wanted = list(itertools.takewhile(lambda each: bool(each[1]), several if is_of_use else ()))
        self._left = len(wanted)
        return [functools.partial(self._run, factor, handlers, inner) for factor, handlers in wanted]

    def note(self, stage: nn.Module) -> None:
        """Find the gains and shifts of the norms inside this module, through which the passes have run, while its weights are
        held."""
        inside = {id(module) for module in stage.modules()}
        kinds = {n.module.name: n.kind for b in self._anatomy.blocks for n in b.norms}
        for name, met in self._outputs.items():
            if id(self._model.get_submodule(name)) in inside:
                for place in range(len(met)):
                    self._law(name, kinds[name], place)

    def _law(self, name: str, kind: Literal["layer", "rms"], place: int) -> NormLaw | None:
        if (name, place) not in self._laws:
            given, output = self._outputs[name][place]
            self._laws[name, place] = proved_law(self._model.get_submodule(name), kind, given, output)
        return self._laws[name, place]

    def make(self) -> None:
        """Make the passes, by themselves."""
        try:
            with probing(self._model):
                all_made(self._model, self._anatomy.own_modules, self.passes)
        except Exception as error:  # a model of the user's may raise anything at such logits
            self._error = error

    def found(self) -> dict[tuple[int, Point], LogitBound]:
        """By block and the call's product."""
        if self._error is None and self._left != 0:
            self.make()
        if self._error is not None:
            reason = f"not shown: {type(self._error).__name__}"
            return {(n, c.product): LogitBound(None, reason) for n, _, c in self._calls}
        return {
            (n, call.product): (None if call.is_piece else _capped(one) or self._normed(block, call, one))
            or LogitBound(None, UNPROVED)
            for (n, block, call), one in zip(self._calls, self._seen, strict=True)
        }

    def _normed(self, block: Block, call: AttentionCall, one: _Seen) -> LogitBound | None:
        if one.queries is None or one.keys is None:
            return None
        names = {n.module.name: n for n in block.norms if n.role == "inner" and n.piece is None}
        lengths = [self._length(names, operand) for operand in (one.queries, one.keys)]
        if lengths[0] is None or lengths[1] is None:
            return None
        product = lengths[0] * lengths[1]
        if one.product is not None:
            if len(one.logits) != len(_FACTORS) or {x.shape for x in one.logits} != {one.product.shape}:
                return None
            large = (one.weights[0] > 0) & (one.product.abs() > 0.1 * one.product.abs().max())
            if not bool(large.any()):
                return None
            one.scale = float((one.logits[0][large] / one.product[large]).median())
            one.added = one.logits[1]
        bound = abs(one.scale) * product * (1 + _CLOSE)
        if one.added is not None and not _adds_nothing(one.added, bound):
            return None
        if one.product is not None:
            beside = (one.logits[0] - one.scale * one.product)[one.logits[1] == 0]
            if not bool((beside.abs() <= _CLOSE * bound).all()):
                return None  # a scale that is not one number
        return LogitBound(
            2 * bound,
            f"if queries and keys keep their norm, with these gains, and no position scales them: at most {lengths[0]:.3g} and "
            f"{lengths[1]:.3g} long on any text",
            "query-key norm",
        )

    def _length(self, norms: Mapping[str, Any], operand: Tensor) -> float | None:
        """The most that a norm's output can be long, where all rows of the operand are as long as outputs of one norm."""
        width = operand.shape[-1]
        found = torch.linalg.vector_norm(operand, dim=-1).flatten().sort().values
        for name, norm in norms.items():
            for place, (_, output) in enumerate(self._outputs.get(name, [])):
                if output.shape[-1] != width:
                    continue  # a norm over all heads together bounds no single head well
                made = torch.linalg.vector_norm(output.double(), dim=-1).flatten().sort().values
                if len(found) % len(made):  # keys may be repeated for the queries that share them
                    continue
                again = made.repeat_interleave(len(found) // len(made))
                if not bool(((found - again).abs() <= _CLOSE * (1 + found)).all()):
                    continue
                law = self._law(name, norm.kind, place)
                if law is None:
                    continue
                return float(width**0.5 * law.gamma.abs().max() + torch.linalg.vector_norm(law.beta))
        return None

    def _handlers(self, factor: float) -> dict[Point, Handler]:
        handlers: dict[Point, Handler] = {}
        for (_, _, call), one in zip(self._calls, self._seen, strict=True):
            if call.is_fused:
                if factor == 1:
                    handlers[call.product] = _fused(one)
            elif call.similarity is not None and call.score is not None and call.similarity != call.score:
                handlers[call.similarity] = _product(call, one, factor)
                handlers[call.score] = _logits(one)
        return handlers

    def _run(self, factor: float, handlers: Mapping[Point, Handler], inner: set[str]) -> None:
        def met(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    self._outputs.setdefault(name, []).append((args[0].detach(), output.detach()))

            return in_this_thread(hook)

        try:
            with restoring() as changes, torch.no_grad():
                for name in inner if factor == 1 else ():
                    changes.hook(self._model.get_submodule(name), "forward", met(name))
                changes.enter(intercepted(self._model, handlers))
                self._model(**self._batch)
        except Exception as error:  # a model of the user's may raise anything at such logits
            self._error = self._error or error
        self._left = (self._left or 0) - 1


def _fused(one: _Seen) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = fused_arguments(args, kwargs)
        one.queries, one.keys = given["query"].double(), given["key"].double()
        scale, mask = given.get("scale"), given.get("attn_mask")
        one.scale = float(one.queries.shape[-1] ** -0.5 if scale is None else scale)
        one.added = mask.double() if mask is not None and mask.is_floating_point() else None
        return function(*args, **kwargs)

    return handler


def _product(call: AttentionCall, one: _Seen, factor: float) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        if factor != 1:
            return output * factor
        operands = list(tensors_in([args, kwargs]))
        one.product = output.double()
        if operation_name(function) in ("matmul", "__matmul__", "__rmatmul__", "bmm") and len(operands) == 2:
            one.queries = operands[call.query_operand].double()
            one.keys = operands[call.key_operand].mT.double()
        return output

    return handler


def _logits(one: _Seen) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        one.logits.append(next(tensors_in([args, kwargs])).double())
        one.weights.append(output.double())
        return output

    return handler


def _capped(one: _Seen) -> LogitBound | None:
    if (
        len(one.logits) != len(_FACTORS)
        or one.product is None
        or len({x.shape for x in [one.product, *one.logits]}) != 1
    ):
        return None
    weights = one.weights[0]
    if weights.shape != one.product.shape:
        return None
    met = (weights > 1e-30 * weights.amax(-1, keepdim=True)) & (one.product.abs() > 1e-6)
    first, second = (x[met].abs() for x in one.logits[2:])
    if not len(first) or not bool(torch.cat([first, second]).isfinite().all()):
        return None
    cap = float(torch.maximum(first.max(), second.max()))
    if not cap or not bool((torch.cat([first, second]) >= (1 - _CLOSE) * cap).all()):
        return None
    if not _adds_nothing(one.logits[1], cap):
        return None
    return LogitBound(
        2 * cap * (1 + _CLOSE),
        f"if the model keeps its soft cap of {cap:.3g} on the logits and no length scales them, on any text",
        "soft cap",
    )


def _adds_nothing(added: Tensor, bound: float) -> bool:
    """Whether what comes to logits between -bound and bound is exactly 0 or forbids the pair. However small it is on these few
    tokens, it may grow with their distance."""
    return bool(((added == 0) | (added <= -(2 * bound + NOTHING))).all())
