"""The sign patterns that are sent through an attention call to find out which row feeds which channel."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, counted, in_turn, intercepted
from uncollapse.anatomy.torch_calls import operands_of, operation_name, tensors_in
from uncollapse.anatomy.vocabulary import ModuleCall
from uncollapse.restoring import restoring
from uncollapse.symmetry.layouts import are_rows_of, is_exponential, is_over_last_axis
from uncollapse.symmetry.studied_calls import ROLES, Place, StudiedCall

PATTERNS = 29  # patterns a pass, one a sequence: a number that no other axis is likely to have
CODES = 128  # signs in the code of a feature: of 2^26 wrong ones, the nearest agrees with a code to .55

LOUD = 16.0
_MATRIX_OPERANDS = {"matmul", "bmm", "baddbmm", "mm"}  # their second matrix comes transposed: keys as [channel, token]


def repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The first sequence of a batch, `times` over."""
    size = next((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.ndim), 1)
    return {
        name: value[:1].repeat(times, *(1,) * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == size
        else value
        for name, value in batch.items()
    }


def sign_codes(features: int, known: dict[int, Tensor]) -> Tensor:
    """Random signs [pattern, feature], the same for every product with so many features."""
    if features not in known:
        generator = torch.Generator().manual_seed(features)
        known[features] = torch.randint(2, (CODES, features), generator=generator).double() * 2 - 1
    return known[features]


def stacked(codes: Tensor) -> Tensor:
    """The codes, then silence, then the first code aloud."""
    return torch.cat([codes, torch.zeros_like(codes[:1]), LOUD * codes[:1]])


def cut(table: Tensor, start: int, length: int) -> Tensor:
    """`length` patterns of a table from `start`, its last one again and again after its end."""
    return table[torch.arange(start, start + length).clamp(max=len(table) - 1)]


def by_pattern(given: Tensor, patterns: int) -> Tensor | None:
    """One token's features [pattern, feature] of a tensor in which all tokens are alike, whatever axes it has."""
    if patterns == 1:
        return given.reshape(-1, given.shape[-1])[:1]
    axes = [i for i, length in enumerate(given.shape[:-1]) if length == patterns]
    if len(axes) == 1:
        return given.movedim(axes[0], 0).reshape(patterns, -1, given.shape[-1])[:, 0]
    rows = given.reshape(-1, given.shape[-1])
    if len(rows) % patterns:
        return None
    for laid in (rows.view(patterns, -1, rows.shape[-1]), rows.view(-1, patterns, rows.shape[-1]).transpose(0, 1)):
        if torch.equal(laid, laid[:, :1].expand_as(laid)):
            return laid[:, 0]
    return None


def four_axes(tensor: Tensor, batch: int) -> Tensor:
    """[batch, head, token, channel] from that, from [batch*head, token, channel] or from [batch, token, channel]."""
    if tensor.ndim == 3 and tensor.shape[0] % batch == 0:
        return tensor.reshape(batch, tensor.shape[0] // batch, *tensor.shape[1:])
    return tensor


class _UnreadableError(Exception):
    """The patterns cannot be laid out one a sequence."""


class PatternPasses:
    """Passes over a model in which its learned products answer with patterns. `usual`: the calls that can be studied, with their
    numbers; `sources`: the products that make their roles, and `widths` how many features each has; `runs`: how often each
    module ran; `operands`: what a product written in a model's own code was given."""

    def __init__(self, model: nn.Module, calls: Sequence[StudiedCall], batch: Mapping[str, Any]) -> None:
        self.model, self._calls = model, calls
        self.usual = [(n, c) for n, c in enumerate(calls) if not c.is_refused]
        self.sources = list(dict.fromkeys(p for _, c in self.usual for r in ROLES if (p := c.source(r)) is not None))
        self.widths: dict[Place, int] = {}
        self.runs: dict[str, int] = {}
        self.operands: dict[Point, tuple[str, list[Tensor]]] = {}
        self.columns: dict[int, int] = {}  # of each call's softmax
        self.made: dict[int, Tensor] = {}  # of each call's exponential, where the softmax is written out
        self.batch, self.patterns = repeated(batch, PATTERNS), PATTERNS
        try:
            self._survey()
        except Exception:  # whatever it is, sequences cannot be repeated: the batch as it is, one pattern a pass
            self.batch, self.patterns = dict(batch), 1
            for _, call in self.usual:
                call.reasons.clear()
            self._survey()
        self.usual = [(n, c) for n, c in self.usual if not c.is_refused]

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
        return second if first is None else in_turn(first, second)

    def _scores(self, site: StudiedCall) -> Handler:
        """Whether a softmax has more columns than keys, and whether a fused call's mask tells heads apart."""

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensors = operands_of(operation_name(function), args, kwargs)
            if not site.call.is_fused:
                self.columns[id(site)] = tensors[0].shape[-1]
                output = function(*args, **kwargs)
                if is_exponential(site.call):
                    self.made[id(site)] = output
                elif not is_over_last_axis(args, kwargs):
                    site.refuse_all("its softmax is over another axis than the last")
                return output
            if len(tensors) > 3 and tensors[3].ndim == 4 and tensors[3].shape[1] > 1:
                mask = tensors[3]
                if not torch.equal(mask, mask[:, :1].expand_as(mask)):
                    site.unlike()
            return function(*args, **kwargs)

        return handler

    def _values(self, site: StudiedCall) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            operands = operands_of(operation_name(function), args, kwargs)
            value, made = operands[site.call.value_operand], self.made.pop(id(site), None)
            if made is not None and not are_rows_of(operands[site.call.weight_operand or 0], made):
                site.refuse_all("its weights are not the softmax of its logits, row by row")
            if self.patterns > 1 and four_axes(value, self.size).shape[0] != self.size:
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
                asked = [handlers[place]] if place in handlers else []
                handlers[place] = in_turn(self._replacing(place, at_source), *asked)
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
        call = self._calls[number].call

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
        call = self._calls[number].call

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._keep(found, number, "values", operands_of(operation_name(function), args, kwargs)[call.value_operand])
            output = function(*args, **kwargs)
            mixed = four_axes(output, self.size)
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
            four = four_axes(given, self.size)
            if four.ndim != 4 or (self.patterns > 1 and four.shape[0] != self.size):
                return
            tokens = four.shape[2]
            kept = four[: self.patterns, :, [0, tokens // 2, tokens - 1]]
        if kept is not None:
            found[number, role] = kept.detach().double().cpu()
