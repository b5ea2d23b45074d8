"""What each part of a model does to a number made of its output: directly, and to first order.

The residual stream is a sum. Every sublayer's update, every head's part of it, the embedding and each norm's shift reach the output
on the stream's own way: through the additions, through norms behind them, through whatever makes the output. The *direct effect*
of one of them is what it does on this way while all other updates stay what they are. It is

    <a, u>,   a = the gradient of the metric at the place where u is added, all updates cut off from the stream,

with every norm on the way as an affine map at the sizes of this pass (*frozen scale*, `frozen_norms`). Where the metric is affine
in the stream that way, as a difference of logits behind a final norm is, the direct effects add up to the metric. Whether it is so
is not assumed: one more pass with every one of them zero must give the rest. Otherwise the effects are those of the metric's
linearisation at this point, and the rest is the remainder.

The *exact* direct effect is the metric minus the metric of a pass without the one component on that way, all other updates held and
all norms scaling anew. Exact effects do not add up.

The *first-order effect* is <g, u> with the full gradient g, through everything that comes later: to first order what the metric
loses when the component is zero.

When not to use this: to say what a component is needed for. What later layers make of its absence is no part of a direct effect.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, device_of, in_turn
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.summands import same_term, with_operands
from uncollapse.anatomy.torch_calls import tensors_in, writes_in_place
from uncollapse.anatomy.vocabulary import Anatomy, Block, Layout, Part, Place, StreamAxes
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.probe.contributions import HeadContributions, head_contributions
from uncollapse.probe.frozen_norms import FrozenNorms, NormHandlers, Where, frozen_norms, norms_on_the_way
from uncollapse.records.attribution import EffectKind

Metric = Callable[[Any], Tensor]  # a model's output to one number for each sequence, or to one number
ROUNDINGS = 32  # units in the last place, of the sizes of all effects together
Key = tuple[int, int]  # block and part


@dataclass
class Effect:
    """What one component does to the metric, one number for each sequence. `attention`: of a head or a bias, whose. `part`: the
    sublayer's number in its block. `reach` is of an attention: sum over tokens of |a| |Y|, by how much the metric moves at most for
    an error in what the layer writes as large as that itself. `reasons`: why a figure is missing."""

    kind: EffectKind
    block: int | None = None
    head: int | None = None
    stack: Literal["encoder", "decoder"] | None = None
    attention: Literal["self", "cross"] | None = None
    part: int | None = None
    direct: Tensor | None = None
    exact: Tensor | None = None
    first_order: Tensor | None = None
    total: Tensor | None = None
    reach: Tensor | None = None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class Effects:
    """All effects on one batch. metric [sequence]. `remainder` [sequence] is the metric less all direct effects. `is_affine`:
    whether the metric is affine in them, so that the remainder is rounding; None in half precision, where rounding hides it.
    `left`: the norms on the way that no affine map stands for: effects pass these by their derivative."""

    metric: Tensor
    effects: list[Effect]
    remainder: Tensor
    is_affine: bool | None
    left: list[str]


def effects_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    metric: Metric,
    anatomy: Anatomy,
    *,
    layout: Layout | None = None,
    exact: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Effects:
    """Direct and first-order effects of all components on one batch; exact direct effects on request, one pass for each.

    Raises `InputError` for a metric that gives no number for each sequence, `UnsupportedModel` where the model cannot be
    differentiated or the sequences of a sublayer's update cannot be told."""
    device = device_of(model)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    passes = _Passes(model, given, metric, anatomy)
    with probing(model):
        norms = frozen_norms(model, given, anatomy)
        direct = passes.cut(norms)
        full = passes.whole()
        rest = passes.of_nothing(norms)
    sequences = len(full.metric)
    found: list[Effect] = []
    for number, block in enumerate(anatomy.blocks):
        if any(number == stack.blocks[0] for stack in anatomy.stacks):
            found.append(_embedding(number, block, direct, full, sequences))
    heads = _Heads(model, given, anatomy, layout)
    for number, block in enumerate(anatomy.blocks):
        for index, part in enumerate(block.parts):
            for effect in _of_part(number, block, index, part, direct, full, heads, sequences):
                effect.part = index
                found.append(effect)
    found += _of_norms(anatomy, direct, sequences)
    constant = rest - sum(e.direct for e in found if e.kind == "norm_bias" and e.direct is not None)
    given_sum = sum(e.direct for e in found if e.direct is not None)
    remainder = full.metric - given_sum - constant
    size = full.metric.abs() + constant.abs() + sum(e.direct.abs() for e in found if e.direct is not None)
    rounding = ROUNDINGS * passes.eps * size
    affine = None
    if passes.eps <= torch.finfo(torch.float32).eps:
        affine = bool((remainder.abs() <= rounding).all())
    if affine and bool((constant.abs() > rounding).any()):
        found.append(Effect("output_bias", direct=constant, reasons={"first_order": "it passes nothing that is later"}))
    else:
        remainder = remainder + constant
    if exact:
        with probing(model):
            _exact(passes, found, full, heads, progress)
    return Effects(full.metric, found, remainder, affine, norms.left)


# Passes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A vector that is added, and the gradient of the metric there: of the sum over sequences, or, `by_sequence`, [sequence, ...]
    of each. None: the metric does not depend on it."""

    value: Tensor
    gradient: Tensor | None
    by_sequence: Tensor | None = None


@dataclass
class _Met:
    """What one pass met. By part: what its operands of additions bring, and the gradients there; what its heads, or the last map
    of an MLP, write, and the gradients there. `entries` by block: the stream that enters."""

    metric: Tensor
    updates: dict[Key, list[_Pair]] = field(default_factory=dict)
    written: dict[Key, _Pair] = field(default_factory=dict)
    entries: dict[int, _Pair] = field(default_factory=dict)
    shifts: dict[Where, _Pair] = field(default_factory=dict)
    zeros: dict[Key, Tensor] = field(default_factory=dict)  # what the last map of an MLP gives for zeros


class _Passes:
    """The passes over one batch."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], metric: Metric, anatomy: Anatomy) -> None:
        self.model, self.batch, self.metric, self.anatomy = model, batch, metric, anatomy
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
        self.eps = max(torch.finfo(kind).eps for kind in kinds)
        self.firsts = [stack.blocks[0] for stack in anatomy.stacks]
        # What must not be written to: the stream may be a view of it.
        self._kept = {
            t.untyped_storage().data_ptr()
            for t in (*model.parameters(), *model.buffers(), *tensors_in(dict(batch)))
            if not t.is_meta
        }

    def cut(self, norms: FrozenNorms) -> _Met:
        """The metric's gradients with every update cut off from the stream, and norms frozen."""
        return self._differentiated(norms)

    def whole(self) -> _Met:
        """The metric's full gradients."""
        return self._differentiated(None)

    def of_nothing(self, norms: FrozenNorms) -> Tensor:
        """The metric where nothing is in the stream: no embedding, no update, but what norms shift."""

        def nothing(stream: Tensor) -> Tensor | None:
            if stream.untyped_storage().data_ptr() in self._kept or not stream.is_contiguous():
                return torch.zeros_like(stream)
            stream.zero_()  # skips from here see it, too
            return None

        def frozen(where: Where, given: Tensor, result: Tensor) -> Tensor | None:
            known = norms.maps.get(where)
            return None if known is None else known(given).to(result.dtype)

        zero = dict.fromkeys(self._keys(), torch.zeros_like)
        return self._run(self._updating(zero), dict.fromkeys(self.firsts, nothing), frozen).detach()

    def held(
        self,
        full: _Met,
        gone: Key | None = None,
        written: Callable[[Tensor], Tensor] | None = None,
        entry: int | None = None,
    ) -> Tensor:
        """The metric with all updates held at what they were, but for one component: a part's update away, what its heads write
        changed, or a stream that does not enter."""
        changed: dict[Key, Callable[[Tensor], Tensor]] = {}
        for key, met_there in full.updates.items():
            if key == gone and written is None:
                changed[key] = torch.zeros_like
            elif key != gone:
                changed[key] = _Once([pair.value for pair in met_there])
        handlers, actions = self._updating(changed), list[tuple[Place, Action]]()
        if written is not None and gone is not None:
            value, part = full.written[gone].value, self.anatomy.blocks[gone[0]].parts[gone[1]]
            _stand(handlers, self._written_at(gone, lambda _: written(value)))
            if not part.attention and part.writes is not None:
                actions.append((Place(part.writes), lambda _: written(value)))
        nothing = {} if entry is None else {entry: torch.zeros_like}
        return self._run(handlers, nothing, None, actions).detach()

    def _keys(self) -> Iterator[Key]:
        for number, block in enumerate(self.anatomy.blocks):
            for index in range(len(block.parts)):
                yield number, index

    def _differentiated(self, norms: FrozenNorms | None) -> _Met:
        for in_place in (False, True):
            try:
                found = self._graph(norms, copies_entry=in_place)
            except RuntimeError as error:
                if in_place or isinstance(error, torch.OutOfMemoryError):
                    raise UnsupportedModel(
                        f"attribute: expected a model that can be differentiated, got {type(self.model).__name__}: "
                        f"{str(error).splitlines()[0]}. A kernel of its own may have no derivative. Load it with another attention "
                        "implementation, or undo what writes in place."
                    ) from error
                continue
            if found is not None:
                return found
        raise UnsupportedModel(
            f"attribute: expected a model whose stream can be followed, got {type(self.model).__name__}, which writes over what it "
            "still needs. Undo what writes in place."
        )

    def _graph(self, norms: FrozenNorms | None, *, copies_entry: bool) -> _Met | None:
        """One differentiated pass; None where the stream that enters was written over: then it has to be a copy."""
        updates: dict[Key, list[tuple[Tensor, Tensor]]] = {}
        written: dict[Key, Tensor] = {}
        entries: dict[int, tuple[Tensor, int]] = {}
        shifts: dict[Where, Tensor] = {}
        zeros: dict[Key, Tensor] = {}

        def adding(key: Key, value: Tensor) -> Tensor:
            if norms is None:
                kept = value.clone()
                updates.setdefault(key, []).append((kept, kept))
                return kept.clone()
            leaf = value.detach().clone().requires_grad_()
            updates.setdefault(key, []).append((value, leaf))
            return leaf.clone()

        def writing(key: Key, value: Tensor) -> Tensor:
            kept = value.clone() if norms is None else value.detach().clone().requires_grad_()
            written[key] = kept
            return kept.clone()

        def entering(number: int, stream: Tensor) -> Tensor | None:
            if copies_entry:
                leaf = stream.detach().clone().requires_grad_()
                entries[number] = leaf, 0
                return leaf.clone()
            if not stream.requires_grad:
                stream.requires_grad_()  # the very tensor, so that skips from here count, too
            entries[number] = stream, stream._version
            return None

        def frozen(where: Where, given: Tensor, result: Tensor) -> Tensor | None:
            known = None if norms is None else norms.maps.get(where)
            if known is None:
                return None
            shifts[where] = known.shift.detach().clone().requires_grad_()
            return replace(known, shift=shifts[where])(given).to(result.dtype)

        handlers = self._updating({key: functools.partial(adding, key) for key in self._keys()}, holds_gates=True)
        for key in self._keys():
            _stand(handlers, self._written_at(key, functools.partial(writing, key)))
        actions = self._maps_of_mlps(writing, zeros)
        entering_at = {number: functools.partial(entering, number) for number in self.firsts}
        with torch.enable_grad():
            metric = self._run(handlers, entering_at, frozen if norms is not None else None, actions)
            if not metric.requires_grad:
                raise InputError(
                    "attribute: expected a metric that can be differentiated, got one without a gradient. It may be "
                    "detached, or torch.inference_mode() is on. Return a tensor such as output.logits[:, -1, 5]."
                )
            if any(stream._version != version for stream, version in entries.values()) and not copies_entry:
                return None
            leaves = [leaf for several in updates.values() for _, leaf in several]
            wanted = [*leaves, *(stream for stream, _ in entries.values()), *shifts.values()]
            full = norms is None
            if full:
                wanted += written.values()
            gradients = _gradients(metric.sum(), wanted)
            by_id = {id(t): g for t, g in zip(wanted, gradients, strict=True)}
            found = _Met(metric.detach(), zeros=zeros)
            odd = {
                id(leaf)
                for key, several in updates.items()
                for value, leaf in several
                if not _is_laid(value, self.anatomy.blocks[key[0]].axes, len(metric))
            }
            apart = _by_sequence(metric, [leaf for leaf in leaves if id(leaf) in odd])
            for key, several in updates.items():
                found.updates[key] = [_Pair(v.detach(), by_id[id(leaf)], apart.get(id(leaf))) for v, leaf in several]
            for key, leaf in written.items():
                gradient = by_id.get(id(leaf)) if full else self._behind(leaf, updates.get(key, []), by_id)
                found.written[key] = _Pair(leaf.detach(), gradient)
            found.entries = {n: _Pair(stream.detach(), by_id[id(stream)]) for n, (stream, _) in entries.items()}
            found.shifts = {where: _Pair(shift.detach(), by_id[id(shift)]) for where, shift in shifts.items()}
        return found

    def _behind(
        self, written: Tensor, updates: Sequence[tuple[Tensor, Tensor]], by_id: Mapping[int, Tensor | None]
    ) -> Tensor | None:
        """The gradient at what is written, from those at what is added."""
        pairs = [(value, by_id[id(leaf)]) for value, leaf in updates if value.requires_grad]
        pairs = [(value, gradient) for value, gradient in pairs if gradient is not None]
        if not pairs:
            return None
        total = sum((value * gradient).sum() for value, gradient in pairs if gradient is not None)
        return _gradients(total, [written])[0]

    def _run(
        self,
        handlers: dict[Point, Handler],
        entering: Mapping[int, Action],
        frozen: Callable[[Where, Tensor, Tensor], Tensor | None] | None,
        actions: Sequence[tuple[Place, Action]] = (),
    ) -> Tensor:
        """The metric of one pass, [sequence]."""
        norms = NormHandlers(norms_on_the_way(self.anatomy) if frozen is not None else (), frozen or _nothing)
        handlers = dict(handlers)
        _stand(handlers, norms.handlers)
        acting = [*actions, *((self.anatomy.blocks[number].entry, action) for number, action in entering.items())]
        with contextlib.ExitStack() as stack:
            stack.enter_context(met(self.model, acting, handlers=handlers))
            stack.enter_context(norms.at_modules(self.model))
            torch.manual_seed(0)
            return metric_of(self.metric, self.model(**self.batch), self.batch)

    def _updating(
        self, changed: Mapping[Key, Callable[[Tensor], Tensor]], *, holds_gates: bool = False
    ) -> dict[Point, Handler]:
        """Handlers that put what `changed` makes of it in the place of what a part brings to an addition."""
        handlers: dict[Point, Handler] = {}
        for number, block in enumerate(self.anatomy.blocks):
            for residual in block.residuals:
                for node in residual.additions:
                    operands = {i: next(iter(leaves)) for i, leaves in enumerate(node.leaves) if len(leaves) == 1}
                    own = {i: changed[number, part] for i, part in operands.items() if (number, part) in changed}
                    name = node.point.operation.split(" ")[0]
                    # Of two factors of one summand the first stands for it.
                    own = {
                        i: torch.detach if any(same_term(name, j, i) for j in own if j < i) else act
                        for i, act in own.items()
                    }
                    if own:
                        _stand(handlers, {node.point: _with(own)})
                for point, operand in residual.gates if holds_gates else ():
                    _stand(handlers, {point: _with({operand: torch.detach})})
        return handlers

    def _written_at(self, key: Key, act: Callable[[Tensor], Tensor]) -> dict[Point, Handler]:
        """A handler where the heads of an attention write together."""
        part = self.anatomy.blocks[key[0]].parts[key[1]]
        if part.written is None or not part.attention:
            return {}

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            return act(output) if isinstance(output, Tensor) and not writes_in_place(function) else output

        return {part.written: handler}

    def _maps_of_mlps(
        self, writing: Callable[[Key, Tensor], Tensor], zeros: dict[Key, Tensor]
    ) -> list[tuple[Place, Action]]:
        """Actions at the last learned map of each MLP that has a module of its own."""
        actions: list[tuple[Place, Action]] = []
        for key in self._keys():
            part = self.anatomy.blocks[key[0]].parts[key[1]]
            if part.attention or part.writes is None:
                continue
            module = self.model.get_submodule(part.writes.name)

            def reading(given: Tensor, key: Key = key, module: nn.Module = module) -> None:
                zero = given.new_zeros((*(1,) * (given.ndim - 1), given.shape[-1]))
                with torch.no_grad():
                    zeros[key] = module.forward(zero).detach().flatten()

            actions.append((Place(part.writes, "in", (0,)), reading))
            actions.append((Place(part.writes), functools.partial(writing, key)))
        return actions


def metric_of(metric: Metric, output: Any, batch: Mapping[str, Any]) -> Tensor:
    """The metric of an output, [sequence]; [1] where it is one number. Raises `InputError` for anything else."""
    try:
        found = metric(output)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"attribute: expected a metric that can be called with the model's output, got {str(error).splitlines()[0]}. It may "
            "expect another shape of logits. Return a tensor such as output.logits[:, -1, 5]."
        ) from error
    sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim}
    fits = isinstance(found, Tensor) and found.is_floating_point() and (found.ndim == 0 or found.shape[0] in sizes)
    if not fits or found.ndim > 1:
        came = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"attribute: expected a metric that gives one number for each of {' or '.join(map(str, sorted(sizes)))} sequences, or "
            f"one number, got {came}. It is called with the model's output. Return a tensor such as output.logits[:, -1, 5]."
        )
    if not bool(found.isfinite().all()):
        raise InputError(
            "attribute: expected a metric that is finite, got NaN or infinity. The model's output may not be finite. "
            "Diagnose the model first."
        )
    return found.reshape(-1)


class _Once:
    """Gives recorded values in turn."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.values = iter(values)

    def __call__(self, _: Tensor) -> Tensor:
        return next(self.values).clone()


def _nothing(*_: Any) -> None:
    return None


def _with(own: Mapping[int, Callable[[Tensor], Tensor]]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = with_operands(args, kwargs, own)
        if 0 in own and writes_in_place(function):  # it writes the sum where the update stood
            result = function(*given, **named)
            target = next(tensors_in([args, kwargs]))
            if not torch.is_grad_enabled():
                target.copy_(result)
                return target
            return result
        return function(*given, **named)

    return handler


def _stand(handlers: dict[Point, Handler], further: Mapping[Point, Handler]) -> None:
    for point, handler in further.items():
        handlers[point] = in_turn(handlers[point], handler) if point in handlers else handler


def _gradients(total: Any, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    if not isinstance(total, Tensor) or not total.requires_grad or not wanted:
        return [None] * len(wanted)
    return list(torch.autograd.grad(total, list(wanted), retain_graph=True, allow_unused=True))


def _by_sequence(metric: Tensor, leaves: Sequence[Tensor]) -> dict[int, Tensor]:
    """The gradient of each sequence's metric by itself, [sequence, ...], by the leaf's identity: where nothing else says which rows
    are whose."""
    if not leaves:
        return {}
    each = [_gradients(one, leaves) for one in metric]
    found = {}
    for number, leaf in enumerate(leaves):
        rows = [torch.zeros_like(leaf) if gradients[number] is None else gradients[number] for gradients in each]
        found[id(leaf)] = torch.stack([row for row in rows if row is not None])
    return found


# Effects --------------------------------------------------------------------------------------------------------------


def _is_laid(value: Tensor, axes: StreamAxes | None, sequences: int) -> bool:
    """Whether the sequences of a vector that is added can be told by the axes of the stream."""
    if sequences == 1:
        return True
    known = axes is not None and axes.sequence is not None and value.ndim == axes.ndim
    return known and axes is not None and value.shape[axes.sequence or 0] == sequences


def _effect(met_there: Sequence[_Pair], axes: StreamAxes | None, sequences: int, place: str) -> Tensor:
    """<gradient, value> for each sequence; 0 where the metric does not depend on it on this way."""
    device = met_there[0].value.device if met_there else None
    total = torch.zeros(sequences, dtype=torch.float64, device=device)
    for pair in met_there:
        if pair.by_sequence is not None:
            total = total + (pair.by_sequence.double() * pair.value.double()).flatten(1).sum(-1)
        elif pair.gradient is not None:
            product = pair.value.double() * pair.gradient.double()
            if sequences == 1:
                total = total + product.sum()
            elif _is_laid(product, axes, sequences) and axes is not None and axes.sequence is not None:
                total = total + product.movedim(axes.sequence, 0).flatten(1).sum(-1)
            else:
                raise UnsupportedModel(
                    f"attribute: expected sequences that can be told apart in what {place} adds, got {list(product.shape)} for "
                    f"{sequences} of them. Pass one sequence at a time, or a metric that gives one number."
                )
    return total


def _embedding(number: int, block: Block, direct: _Met, full: _Met, sequences: int) -> Effect:
    entry = Effect("embedding", stack=block.stack)
    place = "the embedding"
    entry.direct, entry.first_order = (
        _effect([each.entries[number]], block.axes, sequences, place) for each in (direct, full)
    )
    return entry


def _of_part(
    number: int, block: Block, index: int, part: Part, direct: _Met, full: _Met, heads: _Heads, sequences: int
) -> list[Effect]:
    """The effects of one sublayer: of each of its heads and of the rest that it adds, or of the whole."""
    key, place = (number, index), f"block {number} ({part.module})"
    whole = {
        name: _effect(each.updates.get(key, []), block.axes, sequences, place)
        for name, each in (("direct", direct), ("first_order", full))
    }
    if part.attention:
        kind: Literal["self", "cross"] = "cross" if part.kind == "cross" else "self"
        found, reason = heads.effects(key, block, kind, direct, full, sequences)
        if not reason:
            rest = _rest("attention_bias", number, block, whole, found, kind)
            return [*found, rest] if _is_more_than_rounding(rest, found, direct, key) else found
        return [_whole("attention", number, block, kind, whole, {"heads": reason})]
    name: EffectKind = "mixer" if part.kind == "mixer" else "mlp"
    bias = _mlp_bias(key, block, part, direct, full, sequences)
    if isinstance(bias, str):
        return [_whole(name, number, block, None, whole, {"mlp_bias": bias})]
    rest = _rest(name, number, block, whole, [bias], None)
    return [rest, bias] if bool(direct.zeros[key].any()) else [rest]


def _whole(
    kind: EffectKind,
    number: int,
    block: Block,
    attention: Literal["self", "cross"] | None,
    whole: Mapping[str, Tensor],
    reasons: dict[str, str],
) -> Effect:
    """The effects of a sublayer of which no parts can be told."""
    found = Effect(kind, number, None, block.stack, attention, reasons=reasons)
    found.direct, found.first_order = whole["direct"], whole["first_order"]
    return found


def _rest(
    kind: EffectKind,
    number: int,
    block: Block,
    whole: Mapping[str, Tensor],
    found: Sequence[Effect],
    attention: Literal["self", "cross"] | None,
) -> Effect:
    """What is left of a sublayer's effects beside some of its components."""
    rest = Effect(kind, number, None, block.stack, attention)
    rest.direct = whole["direct"] - sum(e.direct for e in found if e.direct is not None)
    rest.first_order = whole["first_order"] - sum(e.first_order for e in found if e.first_order is not None)
    return rest


def _is_more_than_rounding(rest: Effect, heads: Sequence[Effect], direct: _Met, key: Key) -> bool:
    """Whether what an attention adds beside its heads is anything."""
    assert rest.direct is not None
    size = sum(effect.direct.abs() for effect in heads if effect.direct is not None)
    eps = torch.finfo(direct.written[key].value.dtype).eps
    return bool((rest.direct.abs() > ROUNDINGS * eps * size).any())


def _mlp_bias(key: Key, block: Block, part: Part, direct: _Met, full: _Met, sequences: int) -> Effect | str:
    """The effect of what an MLP's last map gives for zeros, or why it stands for no component of its own."""
    zero = direct.zeros.get(key)
    if part.writes is None or zero is None or key not in direct.written or key not in full.written:
        return "no module of its own makes its last map"
    found = Effect("mlp_bias", key[0], None, block.stack)
    for name, each in (("direct", direct), ("first_order", full)):
        pair = each.written[key]
        if pair.value.shape[-1] != len(zero):
            return "its last map gives something of another width"
        if not _is_laid(pair.value, block.axes, sequences):
            return "which rows of its last map belong to which sequence is not known"
        there = _Pair(zero.to(pair.value).expand(pair.value.shape), pair.gradient)
        setattr(found, name, _effect([there], block.axes, sequences, f"block {key[0]} ({part.module})"))
    return found


def _of_norms(anatomy: Anatomy, direct: _Met, sequences: int) -> list[Effect]:
    """The effects of the shifts of norms on the stream's way."""
    of_block = {norm.where: number for number, block in enumerate(anatomy.blocks) for norm in block.norms}
    found = []
    for where, pair in direct.shifts.items():
        if pair.gradient is None:
            continue
        number = of_block.get(where)
        block = anatomy.blocks[-1 if number is None else number]
        axes = block.axes
        count = pair.value.ndim
        if axes is not None and axes.ndim != count and pair.value.shape[0] == sequences:
            axes = StreamAxes(0, tuple(range(1, count - 1)), count - 1)
        effect = _effect([pair], axes, sequences, "a norm")
        if bool(effect.any()):
            missing = {"first_order": "it is no vector that is added at one place"}
            found.append(Effect("norm_bias", number, None, block.stack, direct=effect, reasons=missing))
    return found


class _Heads:
    """What the heads of each attention write on one batch, and whether that is what the passes met."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, layout: Layout | None) -> None:
        self.model, self.batch, self.anatomy, self.layout = model, batch, anatomy, layout
        self._coming: Iterator[HeadContributions] | None = None
        self._tellable = {
            number
            for number, block in enumerate(anatomy.blocks)
            if all(p.written is not None and not p.no_output_map for p in block.parts if p.attention)
        }

    def _next(self, key: Key, kind: Literal["self", "cross"]) -> Tensor | str:
        """The same as `contributions`, asked in order of depth: one pass serves all."""
        if key[0] not in self._tellable:
            return self.contributions(key, kind)
        try:
            if self._coming is None:
                numbers = sorted(self._tellable)
                self._coming = head_contributions(self.model, self.batch, blocks=numbers, layout=self.layout)
            found = next(self._coming)
        except UncollapseError as error:
            return _reason(error)
        assert (found.block, found.kind) == (key[0], kind)
        return found.contributions

    def contributions(self, key: Key, kind: Literal["self", "cross"]) -> Tensor | str:
        """What the heads of one attention write [sequence, token, head, width], or why they cannot be told."""
        block = self.anatomy.blocks[key[0]]
        same = [
            i for i, p in enumerate(block.parts) if p.attention and ("cross" if p.kind == "cross" else "self") == kind
        ]
        try:
            made = [
                c
                for c in head_contributions(self.model, self.batch, blocks=[key[0]], layout=self.layout)
                if c.kind == kind
            ]
        except UncollapseError as error:
            return _reason(error)
        return made[same.index(key[1])].contributions

    def effects(
        self,
        key: Key,
        block: Block,
        kind: Literal["self", "cross"],
        direct: _Met,
        full: _Met,
        sequences: int,
    ) -> tuple[list[Effect], str]:
        """The effects of each head, or why they cannot be told."""
        made = self._next(key, kind)
        if key not in direct.written or key not in full.written or block.axes is None:
            return [], "what its heads write together is not met at one place"
        if isinstance(made, str):
            return [], made
        written = block.axes.cloud(full.written[key].value)
        if made.shape[:2] != written.shape[:2] or made.shape[-1] != written.shape[-1]:
            return [], "what its heads write is not laid out as the stream is"
        rest = written.double() - made.double().sum(-2)
        # One vector for all tokens is what is left: the bias.
        size = torch.maximum(made.double().abs().sum(-2), written.double().abs()).amax()
        eps = torch.finfo(written.dtype).eps
        finite = rest.isfinite().all(-1)
        spread = (rest[finite] - rest[finite][:1]).abs().amax() if bool(finite.any()) else torch.zeros(())
        if not bool(spread <= ROUNDINGS * eps * size):
            return [], "what its heads write does not add up to what it adds, a bias aside"
        found = [Effect("head", key[0], h, block.stack, kind) for h in range(made.shape[2])]
        for name, each in (("direct", direct), ("first_order", full)):
            gradient = each.written[key].gradient
            if gradient is None:
                values = torch.zeros(sequences, made.shape[2], dtype=torch.float64, device=made.device)
            else:
                laid = block.axes.cloud(gradient).double()
                values = torch.einsum("bthw,btw->bh", made.double(), laid)
                values = values.sum(0, keepdim=True) if sequences == 1 else values
                if name == "direct":
                    reach = (laid.norm(dim=-1) * written.double().norm(dim=-1)).sum(-1)
                    for effect in found:
                        effect.reach = reach.sum(0, keepdim=True) if sequences == 1 else reach
            for h, effect in enumerate(found):
                setattr(effect, name, values[:, h])
        return found, ""


def _reason(error: UncollapseError) -> str:
    """What a refusal got, without what to do."""
    return str(error).partition(", got ")[2].partition(". ")[0] or str(error)


# Exact ----------------------------------------------------------------------------------------------------------------


def _exact(
    passes: _Passes,
    found: Sequence[Effect],
    full: _Met,
    heads: _Heads,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Fill in exact direct effects: one pass without each component, the others held."""
    whole = passes.held(full)
    made: dict[Key, Tensor] = {}
    for done, effect in enumerate(found):
        if progress is not None:
            progress("exact direct effects", done, len(found))
        key = None if effect.block is None or effect.part is None else (effect.block, effect.part)
        if effect.kind == "embedding":
            stack = next(s for s in passes.anatomy.stacks if passes.anatomy.blocks[s.blocks[0]].stack == effect.stack)
            effect.exact = whole - passes.held(full, entry=stack.blocks[0])
            continue
        if key is None:
            effect.reasons["exact"] = "it is no vector that is added at one place"
            continue
        written: Callable[[Tensor], Tensor] | None = None
        if effect.kind in {"head", "attention_bias"} and effect.attention is not None:
            if key not in made:
                made.clear()
                contributions = heads.contributions(key, effect.attention)
                assert isinstance(contributions, Tensor)
                made[key] = contributions
            axes = passes.anatomy.blocks[key[0]].axes
            assert axes is not None
            all_heads = made[key]
            if effect.head is None:
                written = functools.partial(_laid_instead, all_heads.sum(-2), axes)
            else:
                written = functools.partial(_laid_off, all_heads[:, :, effect.head], axes)
        elif any(e.kind == "mlp_bias" and (e.block, e.part) == key for e in found):
            zero = full.zeros[key]
            written = functools.partial(_less, zero) if effect.kind == "mlp_bias" else zero.expand_as
        effect.exact = whole - passes.held(full, gone=key, written=written)
    if progress is not None:
        progress("exact direct effects", len(found), len(found))


def _laid_off(part: Tensor, axes: StreamAxes, written: Tensor) -> Tensor:
    return written - axes.stream(part, written).to(written)


def _laid_instead(part: Tensor, axes: StreamAxes, written: Tensor) -> Tensor:
    return axes.stream(part, written).to(written)


def _less(zero: Tensor, written: Tensor) -> Tensor:
    return written - zero.to(written)
