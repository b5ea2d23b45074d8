"""Which rows of which parameter make which channel of which head: found by what the model does, without a table of names.

A group that acts on the weights of attention must know where a head keeps its queries, keys, values and its part of the
output projection: apart or fused, head by head or interleaved, shared by several heads, stored as `nn.Linear` or transposed.
All of it is read from one experiment. The output features of the learned products are replaced by known patterns, the same
for every token, and the operands of the attention call show where each feature has gone:

* Every feature gets a random code of signs. Where an operand repeats the code of a feature, times a constant, it is that
  feature: `Rows.features`. Signs are exact in every number format and pass an RMS norm.
* What a rotary embedding mixes, unit impulses show: the pairs of channels that turn with the position (`pairs`), and those
  that do not.
* An operand that does not grow when the features do passes a norm: of each head by itself, or of all heads together.
* The result of the attention is replaced by codes too, and must come into the output projection as it is.

What cannot be acted on carries a reason in words in `Channels.reasons`: quantised or offloaded weights, a weight with two
roles or users, values that are normalised or gated on their way.

When not to use it: to act on a model that keeps part of its work outside of the recorded pass, such as prefix tuning. Its
channels were not there to be seen.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, counted, intercepted
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import example, known_example
from uncollapse.anatomy.tracing import operands_of, operation_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, ModuleCall
from uncollapse.restoring import leaves_no_trace, restoring
from uncollapse.symmetry.layouts import are_rows_of, is_exponential, is_over_last_axis, refused_layout
from uncollapse.symmetry.parameters import Parameters, is_part_of, output_axis
from uncollapse.symmetry.patterns import (
    CODES,
    LOUD,
    PATTERNS,
    by_pattern,
    cut,
    repeated,
    sign_codes,
    stacked,
    unchanged,
)

Place = ModuleCall | Point
Role = Literal["queries", "keys", "values"]
ROLES: tuple[Role, ...] = ("queries", "keys", "values")
_NORMS: dict[str, Literal["head", "layer"]] = {"head": "head", "layer": "layer"}

AGREEMENT = 0.8  # a copy agrees to 1, behind a layer norm over d_k channels to sqrt(1 - 1/d_k)
_MATRIX_OPERANDS = {"matmul", "bmm", "baddbmm", "mm"}  # their second matrix comes transposed: keys as [channel, token]


@dataclass(frozen=True)
class Rows:
    """Where one role's channels lie. `features[g][c]` is the number of channel `c` of head or key-value head `g` along `axis`
    of the parameter `weight` of the module named `module`, and in its `bias`, where there is one. `axis` is that of the outputs
    for queries, keys and values (0 in `nn.Linear`, 1 where the weight is stored transposed), and that of the inputs for the
    output projection, whose bias has no channels of heads."""

    module: str
    weight: str
    bias: str | None
    axis: int
    features: tuple[tuple[int, ...], ...]

    @property
    def place(self) -> str:
        """The qualified name of the weight."""
        return f"{self.module}.{self.weight}" if self.module else self.weight

    def index(self) -> Tensor:
        """`features` as a tensor [head, channel]."""
        return torch.tensor(self.features)


@dataclass(frozen=True)
class Channels:
    """The channels of one attention call. `groups[h]` is the key-value head that head `h` reads. A role is None where it could
    not be found or must not be changed; `reasons` says why, under its name.

    `pairs` are the channels that positions rotate, two by two (empty: none; None: not found, see `reasons["rotary"]`). `norm`
    says whether queries and keys pass a norm of each head or of the whole layer; `reasons["logits"]` is there where the logits
    are not made of products of linear, or alike normalised, queries and keys. `sinks`: the softmax has columns beyond the keys.
    `heads_alike`: heads with equal queries, keys and values give equal outputs; with a bias, a gain or a sink for each head
    they do not (`reasons["heads"]`)."""

    block: int
    kind: Literal["self", "cross"]
    call: AttentionCall
    groups: tuple[int, ...] = ()
    queries: Rows | None = None
    keys: Rows | None = None
    values: Rows | None = None
    projection: Rows | None = None
    pairs: tuple[tuple[int, int], ...] | None = None
    norm: Literal["head", "layer"] | None = None
    sinks: bool = False
    heads_alike: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def group_count(self) -> int:
        return len(set(self.groups))

    @property
    def rotary_width(self) -> int | None:
        """How many channels of a head positions rotate."""
        return None if self.pairs is None else 2 * len(self.pairs)

    @property
    def free(self) -> tuple[int, ...]:
        """The channels of queries and keys that positions do not rotate."""
        turned = {c for pair in self.pairs or () for c in pair}
        width = 0 if self.queries is None or self.pairs is None else len(self.queries.features[0])
        return tuple(c for c in range(width) if c not in turned)


@leaves_no_trace
def channels_of(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> list[Channels]:
    """The channels of every attention call of `anatomy`, in the order of the blocks. `batch` is an input of the model; the
    few tokens on which the anatomy was proved are taken instead where they are known.

    Nothing is changed in the model and no exception raised for what cannot be found: see `Channels.reasons`.
    """
    with probing(model):
        probe = _Probe(model, anatomy, known_example(model) or example(batch))
        return probe.channels()


@dataclass
class _Site:
    """One attention call under study. For each role `where` holds the features found [head, channel], `is_copy` whether the
    operand is just these at every token, and `law` whether it grows with them: `linear`, `norm` or `neither`."""

    block: int
    kind: Literal["self", "cross"]
    call: AttentionCall
    where: dict[str, Tensor] = field(default_factory=dict)
    is_copy: dict[str, bool] = field(default_factory=dict)
    law: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] | None = None
    norm: Literal["head", "layer"] | None = None
    sinks: bool = False
    heads_alike: bool = True
    is_refused: bool = False  # nothing of it can be acted on

    def source(self, role: str) -> Place | None:
        found: Place | None = getattr(self.call, role)
        return found

    def refuse(self, role: str, reason: str) -> None:
        self.reasons.setdefault(role, reason)


class _UnreadableError(Exception):
    """The patterns cannot be laid out one a sequence."""


class _Probe:
    """The passes over one model, and what they showed."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> None:
        self.model = model
        self.sites = [
            _Site(number, "cross" if part.kind == "cross" else "self", call)
            for number, block in enumerate(anatomy.blocks)
            for part in block.parts
            for call in part.attention
        ]
        for site in self.sites:
            if problem := refused_layout(site.call):
                self._refuse(site, problem)
        self.usual = [(n, s) for n, s in enumerate(self.sites) if not refused_layout(s.call)]  # with their numbers
        self.sources = list(dict.fromkeys(p for _, s in self.usual for r in ROLES if (p := s.source(r)) is not None))
        self.widths: dict[Place, int] = {}
        self.runs: dict[str, int] = {}
        self.operands: dict[Point, tuple[str, list[Tensor]]] = {}
        self.columns: dict[int, int] = {}  # of each site's softmax
        self.made: dict[int, Tensor] = {}  # of each site's exponential, where the softmax is written out
        self.whole = dict(batch)
        self.batch, self.patterns = repeated(batch, PATTERNS), PATTERNS
        try:
            self._survey()
        except Exception:  # whatever it is, sequences cannot be repeated: the batch as it is, one pattern a pass
            self.batch, self.patterns = self.whole, 1
            for _, site in self.usual:
                site.reasons.clear()
            self._survey()
        self.usual = [(n, s) for n, s in self.usual if not s.is_refused]

    # Passes -------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        return next((t.shape[0] for t in self.batch.values() if isinstance(t, Tensor) and t.ndim), 1)

    def _survey(self) -> None:
        """Run once as it is: the widths of the products, how often their modules run, what stands before the softmax."""

        def seen(place: Place, output: Tensor) -> Tensor:
            self.widths[place] = output.shape[-1]
            self._axis(output)
            return output

        handlers: dict[Point, Handler] = {p: self._noting(p) for p in self._points()}
        for _, site in self.usual:
            if site.call.score is not None:
                handlers[site.call.score] = self._joined(handlers.get(site.call.score), self._scores(site))
            handlers[site.call.product] = self._joined(handlers.get(site.call.product), self._values(site))
        with self._standing(seen, handlers):
            self.model(**self.batch)

    def _points(self) -> list[Point]:
        places = [*self.sources, *(s.call.projection for _, s in self.usual)]
        return [p for p in dict.fromkeys(places) if isinstance(p, Point)]

    def _noting(self, point: Point) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.operands[point] = operation_name(function), list(tensors_in([args, kwargs]))
            return function(*args, **kwargs)

        return handler

    @staticmethod
    def _joined(first: Handler | None, second: Handler) -> Handler:
        """Both, one after the other: two things may be asked at the same operation."""
        if first is None:
            return second

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            @functools.wraps(function)
            def after(*a: Any, **k: Any) -> Any:
                return second(function, a, k)

            return first(after, args, kwargs)

        return handler

    def _scores(self, site: _Site) -> Handler:
        """Whether a softmax has more columns than keys, and whether a fused call's mask tells heads apart."""

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensors = operands_of(operation_name(function), args, kwargs)
            if not site.call.is_fused:
                self.columns[id(site)] = tensors[0].shape[-1]
                output = function(*args, **kwargs)
                if is_exponential(site.call):
                    self.made[id(site)] = output
                elif not is_over_last_axis(args, kwargs):
                    self._refuse(site, "its softmax is over another axis than the last")
                return output
            if len(tensors) > 3 and tensors[3].ndim == 4 and tensors[3].shape[1] > 1:
                mask = tensors[3]
                if not torch.equal(mask, mask[:, :1].expand_as(mask)):
                    self._unlike(site)
            return function(*args, **kwargs)

        return handler

    @staticmethod
    def _refuse(site: _Site, reason: str) -> None:
        """Refuse everything of one call."""
        site.is_refused, site.heads_alike = True, False
        for what in (*ROLES, "projection", "rotary", "logits", "heads"):
            site.refuse(what, reason)

    @staticmethod
    def _unlike(site: _Site) -> None:
        site.heads_alike = False
        site.refuse("heads", "every head has a bias, a gain or a sink of its own, so that equal heads act differently")

    def _values(self, site: _Site) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            operands = operands_of(operation_name(function), args, kwargs)
            value, made = operands[site.call.value_operand], self.made.pop(id(site), None)
            if made is not None and not are_rows_of(operands[site.call.weight_operand or 0], made):
                self._refuse(site, "its weights are not the softmax of its logits, row by row")
            if self.patterns > 1 and _four_axes(value, self.size).shape[0] != self.size:
                raise _UnreadableError
            site.sinks = self.columns.get(id(site), 0) > value.shape[-2]
            return function(*args, **kwargs)

        return handler

    @contextlib.contextmanager
    def _standing(self, at_source: Callable[[Place, Tensor], Tensor], handlers: dict[Point, Handler]) -> Iterator[None]:
        """Within the context, `at_source` gets the output of every learned product and says what it shall be."""
        modules: dict[str, set[int]] = {}
        handlers = dict(handlers)
        for place in self.sources:
            if isinstance(place, Point):
                handlers[place] = self._joined(self._replacing(place, at_source), handlers.get(place) or unchanged)
            else:
                modules.setdefault(place.name, set()).add(place.call)
        projections = {s.call.projection.name for _, s in self.usual if isinstance(s.call.projection, ModuleCall)}
        thread = threading.get_ident()
        with restoring() as changes:
            runs = changes.enter(counted(self.model, {*modules, *projections}))

            def leave(name: str) -> Callable[..., Tensor | None]:
                def hook(_: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
                    if threading.get_ident() != thread:
                        return None
                    run = runs.begin(name)
                    self.runs[name] = run + 1
                    return at_source(ModuleCall(name, run), output) if run in modules.get(name, ()) else None

                return hook

            # Before the handlers are put up: what a hook computes must not count as the surrounding module's own.
            for name in {*modules, *projections}:
                changes.hook(self.model.get_submodule(name), "forward", leave(name))
            changes.enter(intercepted(self.model, handlers))
            yield

    @staticmethod
    def _replacing(place: Point, at_source: Callable[[Place, Tensor], Tensor]) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return at_source(place, function(*args, **kwargs))

        return handler

    def _axis(self, output: Tensor) -> int | None:
        """The axis of a product's output along which the patterns lie; None with one pattern a pass."""
        if self.patterns == 1:
            return None
        axes = [i for i, length in enumerate(output.shape[:-1]) if length == self.patterns]
        if len(axes) != 1:
            raise _UnreadableError
        return axes[0]

    def respond(self, tables: Mapping[Place, Tensor]) -> dict[tuple[int, str], Tensor]:
        """What the operands of every attention call are when the products' features are `tables[place]` [pattern, feature]:
        by site and role [pattern, head, token, channel], at the first, the middle and the last token. A table for the
        product of weights and values replaces the result of the attention; `projection` is what comes of it [pattern, input].
        `scores` are the logits of a softmax of the model's own, or what a fused call adds to its logits."""
        total = max(t.shape[0] for t in tables.values())
        found: dict[tuple[int, str], list[Tensor]] = {}
        for start in range(0, total, self.patterns):
            piece = {p: cut(t, start, self.patterns) for p, t in tables.items()}
            for key, value in self._respond(piece).items():
                found.setdefault(key, []).append(value)
        return {key: torch.cat(values)[:total] for key, values in found.items()}

    def _respond(self, tables: Mapping[Place, Tensor]) -> dict[tuple[int, str], Tensor]:
        found: dict[tuple[int, str], Tensor] = {}

        def filled(place: Place, output: Tensor) -> Tensor:
            if place not in tables:
                return output
            shape = [1] * output.ndim
            shape[-1] = output.shape[-1]
            axis = self._axis(output)
            if axis is not None:
                shape[axis] = self.patterns
            return tables[place].to(output).view(shape).expand_as(output).clone()

        handlers: dict[Point, Handler] = {}
        for number, site in self.usual:
            call = site.call
            if call.similarity is not None:
                handlers[call.similarity] = self._comparing(number, found)
            if call.score is not None and not call.is_fused:
                handlers[call.score] = self._softmax(number, found)
            handlers[call.product] = self._joined(
                handlers.get(call.product), self._mixing(number, found, tables.get(call.product))
            )
            if isinstance(call.projection, Point):
                handlers[call.projection] = self._projecting(number, found)
        thread = threading.get_ident()
        with restoring() as changes:
            changes.enter(self._standing(filled, handlers))
            by_name: dict[str, dict[int, int]] = {}
            for number, site in self.usual:
                if isinstance(site.call.projection, ModuleCall):
                    by_name.setdefault(site.call.projection.name, {})[site.call.projection.call] = number
            runs = changes.enter(counted(self.model, by_name))
            for name, calls in by_name.items():

                def enter(
                    _: nn.Module, args: Any, kwargs: Any, name: str = name, calls: dict[int, int] = calls
                ) -> None:
                    if threading.get_ident() != thread:
                        return
                    run = runs.begin(name)
                    if run in calls:
                        self._keep(found, calls[run], "projection", next(tensors_in([args, kwargs])))

                changes.hook(self.model.get_submodule(name), "forward_pre", enter, with_kwargs=True)
            self.model(**self.batch)
        return found

    def _comparing(self, number: int, found: dict[tuple[int, str], Tensor]) -> Handler:
        call = self.sites[number].call

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            operands = operands_of(operation_name(function), args, kwargs)
            self._keep(found, number, "queries", operands[call.query_operand])
            if call.is_fused and len(operands) > 3 and operands[3].is_floating_point():
                self._keep(found, number, "scores", operands[3])  # what is added to the logits
            keys = operands[call.key_operand]
            self._keep(found, number, "keys", keys.mT if operation_name(function) in _MATRIX_OPERANDS else keys)
            return function(*args, **kwargs)

        return handler

    def _softmax(self, number: int, found: dict[tuple[int, str], Tensor]) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._keep(found, number, "scores", next(tensors_in([args, kwargs])))
            return function(*args, **kwargs)

        return handler

    def _mixing(self, number: int, found: dict[tuple[int, str], Tensor], table: Tensor | None) -> Handler:
        call = self.sites[number].call

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._keep(found, number, "values", operands_of(operation_name(function), args, kwargs)[call.value_operand])
            output = function(*args, **kwargs)
            mixed = _four_axes(output, self.size)
            if table is None or mixed.ndim != 4 or mixed.shape[1] != call.heads or mixed.shape[3] != call.head_width:
                return output
            pattern = table.to(output).view(-1, call.heads, 1, call.head_width)
            return pattern.expand_as(mixed).reshape(output.shape)

        return handler

    def _projecting(self, number: int, found: dict[tuple[int, str], Tensor]) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._keep(found, number, "projection", next(tensors_in([args, kwargs])))
            return function(*args, **kwargs)

        return handler

    def _keep(self, found: dict[tuple[int, str], Tensor], number: int, role: str, given: Tensor) -> None:
        """Remember an operand, a few tokens of it, as [pattern, head, token, channel]; as [pattern, input] for a projection."""
        kept: Tensor | None
        if role == "projection":
            kept = by_pattern(given, self.patterns)
        else:
            four = _four_axes(given, self.size)
            if four.ndim != 4 or (self.patterns > 1 and four.shape[0] != self.size):
                return
            tokens = four.shape[2]
            kept = four[: self.patterns, :, [0, tokens // 2, tokens - 1]]
        if kept is not None:
            found[number, role] = kept.detach().double().cpu()

    # What they say ------------------------------------------------------------------------------------------------
    def channels(self) -> list[Channels]:
        codes: dict[int, Tensor] = {}
        tables: dict[Place, Tensor] = {}
        for place in self.sources:
            tables[place] = stacked(sign_codes(self.widths[place], codes))
        for _, site in self.usual:
            # In another order: values that reach the projection past the attention must not look like its result.
            tables[site.call.product] = stacked(sign_codes(site.call.heads * site.call.head_width, codes).flip(0))
        answers = self.respond(tables) if self.usual else {}
        for number, site in self.usual:
            for role in ROLES:
                self._locate(site, role, answers.get((number, role)), codes)
            self._group(site)
            self._locate_projection(site, answers.get((number, "projection")), codes)
        answers = self.respond(self._impulses(codes)) if self.usual else {}
        for number, site in self.usual:
            self._compare(number, site, answers, codes)
        rows = [self._rows(site) for site in self.sites]
        self._refuse_shared(rows)
        return [
            Channels(
                site.block,
                site.kind,
                site.call,
                site.groups,
                **{role: None if role in site.reasons else found.get(role) for role in (*ROLES, "projection")},
                pairs=site.pairs,
                norm=site.norm,
                sinks=site.sinks,
                heads_alike=site.heads_alike,
                reasons=site.reasons,
            )
            for site, found in zip(self.sites, rows, strict=True)
        ]

    def _locate(self, site: _Site, role: Role, answer: Tensor | None, codes: Mapping[int, Tensor]) -> None:
        """Which feature every channel of a role shows at the first token, and whether it is that and nothing else."""
        place = site.source(role)
        if place is None:
            site.refuse(role, f"the {role} come from several learned products added or joined together, or from none")
            return
        if answer is None:
            site.refuse(role, f"the {role} do not have the axes batch, head, token and channel")
            return
        if not bool(answer[:CODES].isfinite().all()):
            site.refuse(role, f"the {role} are not finite")
            return
        code = codes[self.widths[place]]
        agreement, feature = _agreement(answer[:CODES, :, 0], code).max(-1)
        quiet, loud, silent = answer[0], answer[-1], answer[-2]
        growth = float(loud[:, 0].norm() / quiet[:, 0].norm().clamp_min(1e-300))
        site.law[role] = "norm" if abs(growth - 1) < 0.05 else "linear" if abs(growth / LOUD - 1) < 0.05 else "neither"
        if not bool((agreement > AGREEMENT).all()) or not _is_partition(feature):
            site.refuse(role, f"the {role} are mixtures of what {_name(place)} makes, not its features")
            return
        site.where[role] = feature
        shown = code[:, feature].unsqueeze(2)  # [pattern, head, 1, channel]
        scale = (answer[:CODES] * shown).mean((0, 2))  # [head, channel]
        eps = self._eps()
        rest = (answer[:CODES] - scale.unsqueeze(1) * shown).abs().max()
        even = bool(((scale - scale[0, 0]).abs() <= 16 * eps * scale.abs().max()).all())
        site.is_copy[role] = bool(rest <= 16 * eps * answer[:CODES].abs().max()) and even
        if site.law[role] != "norm" and bool((silent.abs() > 16 * eps * quiet.abs().max()).any()):
            site.refuse(role, f"something is added to the {role} behind {_name(place)}")
        if role == "values" and site.law[role] == "norm":
            site.refuse(role, f"the values are normalised behind {_name(place)}")
        if role == "values" and not site.is_copy[role]:
            site.refuse(role, f"the values are scaled or cut behind {_name(place)}")

    def _eps(self) -> float:
        """The unit of rounding of the model, single precision at best: parts of a model in float64 mostly stay there."""
        kinds = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return max([torch.finfo(k).eps for k in kinds if torch.finfo(k).bits >= 16] + [torch.finfo(torch.float32).eps])

    def _group(self, site: _Site) -> None:
        """Which key-value head every head reads: heads whose keys, or values, are the same features share one."""
        heads = site.call.heads
        asked = site.where.get("queries")
        if asked is not None and (len(asked) != heads or len({tuple(row) for row in asked.tolist()}) != heads):
            site.refuse("queries", f"the queries of {heads} heads could not be told apart")
            del site.where["queries"]
        members: dict[str, tuple[int, ...]] = {}
        for role in ("keys", "values"):
            if role not in site.where:
                continue
            feature = site.where[role]
            if heads % len(feature):
                site.refuse(role, f"{heads} heads of queries meet {len(feature)} of {role}")
                continue
            known: dict[tuple[int, ...], int] = {}
            rows = [tuple(row) for row in feature.tolist()]
            own = [known.setdefault(row, len(known)) for row in rows]
            members[role] = tuple(own[h * len(own) // heads] for h in range(heads))
            site.where[role] = torch.tensor(list(known))
        if not members:
            return
        site.groups = next(iter(members.values()))
        if len(set(members.values())) > 1:
            for role in members:
                site.refuse(role, "keys and values are shared by different heads")
        sizes = {site.groups.count(g) for g in site.groups}
        if len(sizes) > 1:
            site.refuse("heads", "the key-value heads serve different numbers of heads")
            site.heads_alike = False

    def _locate_projection(self, site: _Site, answer: Tensor | None, codes: Mapping[int, Tensor]) -> None:
        call = site.call
        if call.projection is None:
            site.refuse("projection", "no output projection follows this attention")
            return
        mixed = call.heads * call.head_width
        if answer is None or answer.shape[-1] != mixed:
            site.refuse("projection", "the input of the output projection is not the heads side by side")
            return
        code = codes[mixed].flip(0)
        agreement, channel = _agreement(answer[:CODES], code).max(-1)
        shown = code[:, channel]
        scale = (answer[:CODES] * shown).mean(0)
        rest = (answer[:CODES] - scale[0] * shown).abs().max()
        distinct = len(set(channel.tolist())) == mixed
        if not bool((agreement > AGREEMENT).all()) or not distinct or not rest <= 16 * self._eps() * scale[0].abs():
            site.refuse("projection", "the heads are gated, normalised or mixed on their way to the output projection")
            return
        feature = torch.empty(mixed, dtype=torch.long)
        feature[channel] = torch.arange(mixed)
        site.where["projection"] = feature.view(call.heads, call.head_width)

    def _impulses(self, codes: Mapping[int, Tensor]) -> dict[Place, Tensor]:
        """A table for each product of queries or keys: its channels one by one, in all heads alike; then the first code for
        queries alone, keys alone, neither, and both; and both again with the first head loud."""
        widest = max(f.shape[1] for s in self.sites for f in (*s.where.values(), torch.empty(1, 1)))
        tables = {p: torch.zeros(widest + 5, self.widths[p], dtype=torch.float64) for p in self.sources}
        for _, site in self.usual:
            for role, alone in (("queries", -5), ("keys", -4)):
                place = site.source(role)
                if place is None or role not in site.where:
                    continue
                feature, table = site.where[role], tables[place]
                for channel in range(feature.shape[1]):
                    table[channel, feature[:, channel]] = 1.0
                for row in (alone, -2, -1):
                    table[row, feature.flatten()] = codes[self.widths[place]][0, feature.flatten()]
                table[-1, feature[0]] *= LOUD
        return tables

    def _compare(
        self, number: int, site: _Site, answers: Mapping[tuple[int, str], Tensor], codes: Mapping[int, Tensor]
    ) -> None:
        """What happens to queries and keys between their products and the logits."""
        if not {"queries", "keys"} <= site.where.keys():
            for what in ("rotary", "logits", "heads"):
                site.refuse(what, "queries and keys were not both found")
            site.heads_alike = False
            return
        pairs: list[tuple[tuple[int, int], ...] | None] = []
        laws: list[str] = []
        for role in ("queries", "keys"):
            answer = answers[number, role]
            unit = answer[: site.where[role].shape[1]]
            if not bool(((unit - unit[:, :1]).abs() <= 2 * self._eps() * unit.abs().max()).all()):
                self._unlike(site)
            laws.append(self._law(site, role, answer, codes))
            is_turned = not site.is_copy[role]
            pairs.append(_rotated(unit[:, 0], self._eps(), laws[-1] == "linear") if is_turned else ())
        if site.call.key_value_heads == 1 and laws == ["layer", "head"]:
            laws[1] = "layer"  # with one key head it is the same
        scores = answers.get((number, "scores"))
        if scores is not None and not _alike(scores[:-5], self._eps()):
            self._unlike(site)
        if "neither" in laws or laws[0] != laws[1]:
            site.refuse("logits", "queries and keys are neither linear in their weights nor normalised in the same way")
        elif (
            laws[0] == "linear"
            and scores is not None
            and not torch.equal(scores[-5:-3], scores[-3:-2].expand(2, -1, -1, -1))
        ):
            site.refuse("logits", "queries or keys enter the logits in another way than by their product")
        else:
            site.norm = _NORMS.get(laws[0])
        if pairs[0] is None or pairs[0] != pairs[1]:
            site.refuse("rotary", "positions do not act on queries and keys by rotating pairs of channels")
        else:
            site.pairs = pairs[0]

    def _law(self, site: _Site, role: Role, answer: Tensor, codes: Mapping[int, Tensor]) -> str:
        """How an operand follows its features: `linear`, normalised by `head` or by `layer`, or `neither`."""
        place, feature = site.source(role), site.where[role]
        assert place is not None
        unit, plain, loud = answer[: feature.shape[1]], answer[-2], answer[-1]
        own = list(site.groups) if role == "keys" else list(range(site.call.heads))
        own = own[:: len(own) // len(plain)]  # of each head of the operand: which head of the features it is
        if site.law[role] == "norm":
            apart = [h for h, head in enumerate(own) if head != 0]
            moved = float((loud - plain)[apart].norm() / plain[apart].norm()) if apart else 0.0
            return "head" if moved < 0.05 else "layer"
        if site.law[role] == "linear":
            signs = codes[self.widths[place]][0, feature][own]
            summed = torch.einsum("hi,ihtc->htc", signs, unit)
            allowed = 64 * feature.shape[1] ** 0.5 * self._eps() * plain.abs().max()
            return "linear" if bool((summed - plain).abs().max() <= allowed) else "neither"
        return "neither"

    # Parameters ---------------------------------------------------------------------------------------------------
    def _rows(self, site: _Site) -> dict[str, Rows]:
        rows: dict[str, Rows] = {}
        for role in (*ROLES, "projection"):
            place = site.source(role)
            if role not in site.where or place is None or role in site.reasons:
                continue
            found = self._parameters(place)
            if isinstance(found, str):
                site.refuse(role, found)
                continue
            feature = site.where[role] + (0 if role == "projection" else found.offset)
            axis = 1 - found.out if role == "projection" else found.out
            module, _, weight = found.weight.rpartition(".")
            bias = None
            if found.bias is not None:
                other, _, bias = found.bias.rpartition(".")
                if other != module:
                    site.refuse(role, f"its weight and bias belong to two modules, {module} and {other}")
                    continue
            rows[role] = Rows(module, weight, bias, axis, tuple(tuple(r) for r in feature.tolist()))
        return rows

    def _parameters(self, place: Place) -> Parameters | str:
        """The parameters of a learned product, or why they cannot be changed."""
        if isinstance(place, ModuleCall):
            return self._parameters_of_module(place.name)
        operation, operands = self.operands[place]
        named = dict(self.model.named_parameters())
        found: dict[int, list[tuple[str, int, int]]] = {1: [], 2: []}
        for operand in operands:
            for name, parameter in named.items():
                if operand.ndim in found and is_part_of(operand, parameter):
                    out = 0 if operation == "linear" else operand.ndim - 1
                    strides = parameter.stride()
                    axis = strides.index(operand.stride(0 if operand.ndim == 1 else out))
                    offset = (operand.storage_offset() - parameter.storage_offset()) // strides[axis]
                    found[operand.ndim].append((name, axis, offset))
        if len(found[2]) != 1 or len(found[1]) > 1:
            return f"the weight of {place} is not a parameter of the model"
        (weight, axis, offset) = found[2][0]
        if found[1] and found[1][0][2] != offset:
            return f"weight and bias of {place} are cut differently from their parameters"
        return Parameters(weight, found[1][0][0] if found[1] else None, axis, offset)

    def _parameters_of_module(self, name: str) -> Parameters | str:
        module = self.model.get_submodule(name)
        own = dict(module.named_parameters(recurse=False))
        matrices = [n for n, p in own.items() if p.ndim == 2]
        vectors = [n for n, p in own.items() if p.ndim == 1]
        if len(matrices) != 1 or len(vectors) > 1 or len(matrices) + len(vectors) != len(own):
            return f"{name} has no weight matrix of its own that could be changed; it may be quantised or made of parts"
        weight, bias = own[matrices[0]], own[vectors[0]] if vectors else None
        if weight.device.type == "meta":
            return f"the weights of {name} are not loaded; they are offloaded"
        if not weight.is_floating_point() or torch.finfo(weight.dtype).bits < 16:
            return f"the weights of {name} are quantised ({str(weight.dtype).removeprefix('torch.')})"
        out = output_axis(module, weight.detach(), None if bias is None else bias.detach())
        if out is None:
            return f"{name} does more than its weight and bias say"
        return Parameters(f"{name}.{matrices[0]}", f"{name}.{vectors[0]}" if vectors else None, out)

    def _refuse_shared(self, rows: Sequence[dict[str, Rows]]) -> None:
        """Refuse weights that a change for one attention call would change for somebody else."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        storages: dict[int, set[tuple[int, str]]] = {}
        for name, parameter in named.items():
            owner, _, leaf = name.rpartition(".")
            if parameter.device.type != "meta":
                users = storages.setdefault(parameter.untyped_storage().data_ptr(), set())
                users.add((id(self.model.get_submodule(owner)), leaf))
        referenced: dict[str, set[int]] = {}
        for _, site in self.usual:  # a run in a call that cannot be acted on is one outside of those that can
            for role in (*ROLES, "projection"):
                place = site.source(role)
                if isinstance(place, ModuleCall):
                    referenced.setdefault(place.name, set()).add(place.call)
        features: dict[tuple[str, str], set[tuple[tuple[int, ...], ...]]] = {}
        partners: dict[tuple[str, str], set[tuple[str, ...]]] = {}
        for found in rows:
            for role, row in found.items():
                features.setdefault((row.place, role), set()).add(row.features)
                partners.setdefault((row.place, role), set()).add(tuple(r.place for r in found.values()))
        for site, found in zip(self.sites, rows, strict=True):
            for role, row in found.items():
                mine = {f for g in row.features for f in g}
                place = site.source(role)
                parameter = named[row.place]
                if len(storages[parameter.untyped_storage().data_ptr()]) > 1:
                    site.refuse(role, f"{row.place} is also the weight of another module")
                if isinstance(place, ModuleCall) and self.runs.get(place.name, 0) > len(referenced[place.name]):
                    site.refuse(role, f"{place.name} also runs outside of the attention")
                for (name, another), sets in features.items():
                    theirs = {f for rows_of in sets for g in rows_of for f in g}
                    if name == row.place and another != role and mine & theirs:
                        site.refuse(role, f"the same rows of {row.place} make the {role} and the {another}")
                if len(features[row.place, role]) > 1 or len(partners[row.place, role]) > 1:
                    site.refuse(role, f"{row.place} is shared by attention calls that do not share everything else")


def _name(place: Place) -> str:
    return place.name if isinstance(place, ModuleCall) else str(place)


def _four_axes(tensor: Tensor, batch: int) -> Tensor:
    """[batch, head, token, channel] from that, from [batch*head, token, channel] or from [batch, token, channel]."""
    if tensor.ndim == 3 and tensor.shape[0] % batch == 0:
        return tensor.reshape(batch, tensor.shape[0] // batch, *tensor.shape[1:])
    return tensor


def _agreement(answer: Tensor, code: Tensor) -> Tensor:
    """How far every channel [pattern, ...] follows every feature's code [pattern, feature], or its opposite, as behind a gain
    below 0: the absolute value of the correlation [..., feature]."""
    heard = answer - answer.mean(0)
    heard = heard / heard.norm(dim=0).clamp_min(1e-300)
    sent = code - code.mean(0)
    return torch.einsum("p...,pf->...f", heard.float(), (sent / sent.norm(dim=0)).float()).abs()


def _is_partition(feature: Tensor) -> bool:
    """Whether features [head, channel] are each of one channel, and of heads that share all of them or none."""
    rows = {tuple(row) for row in feature.tolist()}
    flat = [f for row in rows for f in row]
    return len(flat) == len(set(flat))


def _rotated(unit: Tensor, eps: float, is_linear: bool) -> tuple[tuple[int, int], ...] | None:
    """The pairs of channels that are turned together, from the images [impulse, token, channel] of the unit impulses: what is
    0 there is exactly 0. None where it is no rotation of pairs, times a number, with the other channels left alone."""
    mixed = (unit != 0).any(1)
    mixed.fill_diagonal_(False)
    if not torch.equal(mixed, mixed.T) or bool((mixed.sum(0) > 1).any()):
        return None
    pairs = tuple((i, int(mixed[i].nonzero())) for i in range(len(mixed)) if bool(mixed[i, i:].any()))
    if not is_linear:
        return pairs
    allowed = 16 * eps * unit.abs().max()
    own = torch.stack([unit[c, :, c] for c in range(len(unit))])  # [channel, token]
    free = [c for c in range(len(unit)) if not bool(mixed[c].any())]
    even = bool(((own[free] - own[free][:1]).abs() <= allowed).all())
    turned = all(
        bool(((own[i] - own[j]).abs() <= allowed).all())
        and bool(((unit[i, :, j] + unit[j, :, i]).abs() <= allowed).all())
        for i, j in pairs
    )
    return pairs if even and turned else None


def _alike(scores: Tensor, eps: float) -> bool:
    """Whether logits [pattern, head, token, key] are the same for all heads."""
    forbidden = scores <= torch.finfo(torch.float16).min / 2
    kept = scores.masked_fill(forbidden, 0)
    return bool(((kept - kept[:, :1]).abs() <= 8 * eps * kept.abs().max().clamp_min(1)).all())
