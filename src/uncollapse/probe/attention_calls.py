"""Measure the attention of one sublayer inside the model's own pass, row by row, from what really mixes the values.

A fused call is measured from its queries and keys; a product from its own weights. What forbids a pair and what the logits were is
carried along the operations that lead to the weights, so that it arrives in the weights' own order of axes. Before any figure is
taken the pass must bear the reading out, on the user's own batch: the weights times the values are the result (on a few rows of
every head), rows sum to one or the logits explain why they do not, and what a mask forbids has no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uncollapse.anatomy.carrying import Observer, Way
from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.masking import LEAST_SHARE, forbidden_by_addition
from uncollapse.anatomy.operands import Mixed, UnreadableError, arranged, fused_arguments, product_operands, replaced
from uncollapse.anatomy.output_maps import laid_out, unreplaced
from uncollapse.anatomy.pieces import Piece, Whole
from uncollapse.anatomy.torch_calls import operands_of, operation_name
from uncollapse.anatomy.vocabulary import AttentionCall
from uncollapse.measures import mixing

CHECKED_ROWS = 3  # query rows of every head on which weights times values are computed again


@dataclass(frozen=True)
class Forbidding:
    """What forbade pairs in a pass: an operation between logits and weights, or the `argument` of a fused call. `axes` says of each
    axis of the operation's result what it holds."""

    point: Point
    argument: str | None = None
    axes: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class AttentionRows:
    """One attention call in one pass. shape: sequences, heads and queries. rows: of [sequence, head, query], where they are
    wanted. values [sequence, head, key, width] and mixed [sequence, head, query, width] over the keys that are tokens, None
    where attention stays within windows. spectrum [sequence, head]: where spectra are wanted. `weights` only where they are wanted.
    `deviation`: how far weights times values are
    from the result, over the result's size. `row_sums`: the smallest and the largest sum of a row's weights over the keys that
    are tokens. `forbids`: what forbade pairs. `finite`: some row's weights are numbers. queries and keys
    [sequence, head, token, width]: of a fused call. `logit_range` [sequence, head, query]: of other calls, how far the logits of a
    row's allowed keys lie apart, as a share of the largest."""

    shape: tuple[int, int, int]
    rows: mixing.RowStatistics | None
    values: Tensor | None
    mixed: Tensor | None
    spectrum: mixing.LeadingSpectrum | None
    weights: Tensor | None
    deviation: float
    row_sums: tuple[float, float]
    forbids: tuple[Forbidding, ...]
    finite: bool
    reasons: dict[str, str] = field(default_factory=dict)
    queries: Tensor | None = None
    keys: Tensor | None = None
    logit_range: Tensor | None = None


class CallObserver:
    """Stands at one attention call and hands what it measured to `deliver`, in each pass; `refuse` is told why where the pass
    does not bear out what was found on the example."""

    def __init__(
        self,
        call: AttentionCall,
        *,
        sequences: Callable[[], int],
        tokens: Callable[[], int | None],
        query_mask: Callable[[int, int], Tensor | None],
        key_mask: Callable[[int, int], Tensor | None],
        rows: bool,
        susceptibility: bool,
        spectra: bool,
        keeps_weights: bool,
        deliver: Callable[[AttentionRows], None],
        refuse: Callable[[str], None],
    ) -> None:
        self.call = call
        self.sequences, self.tokens = sequences, tokens
        self.query_mask, self.key_mask = query_mask, key_mask
        self.rows, self.susceptibility, self.spectra = rows, susceptibility, spectra
        self.keeps_weights = keeps_weights
        self.deliver, self.refuse = deliver, refuse
        self.way = Way(call)

    def observers(self) -> dict[Point, Observer]:
        return {**self.way.observers(), self.call.product: self._at_product}

    def weights_and_pairs(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Piece, list[Forbidding]]:
        """A product of weights and values as it ran, with what was carried to it: which pairs are forbidden, and by what, and their
        logits, in the canonical order of the weights' axes.

        Raises `UnreadableError` where it cannot be laid out."""
        assert self.call.weight_operand is not None
        operand = operands_of(operation_name(function), args, kwargs)[self.call.weight_operand]
        forbidden, logits = self.way.end(operand)
        forbade = [Forbidding(step.point, None, step.axes) for step in self.way.forbade]
        self.way.forbade.clear()

        def like_weights(known: Tensor | None) -> Tensor | None:
            """The call's own, with this in the weights' place."""
            if known is None:
                return None
            swapped = replaced([args, kwargs], operand, known.expand(operand.shape))
            weights = self.call.weight_operand or 0
            return product_operands(function, swapped[0], swapped[1], output, weights, self.call.pair).weights

        mixed = product_operands(function, args, kwargs, output, self.call.weight_operand, self.call.pair)
        return Piece(mixed, like_weights(forbidden), like_weights(logits)), forbade

    def _at_product(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given, output = output, unreplaced(output)  # a head that is away still has its weights and values
        try:
            if self.call.is_fused:
                found = self._fused(fused_arguments(args, kwargs), output)
            else:
                piece, forbade = self.weights_and_pairs(function, args, kwargs, output)
                found = self._weights(piece.product, piece.forbidden, piece.logits, forbade)
        except UnreadableError as error:
            self.refuse(str(error))
            return
        if output is not given and found.mixed is not None:
            found = replace(found, mixed=laid_out(given, self.call, function, args, kwargs, self.sequences()))
        self.deliver(found)

    # Shapes ---------------------------------------------------------------------------------------------------------
    def _keys(self, count: int) -> slice:
        """The keys that are tokens, of all keys of the call."""
        tokens = self.tokens()
        if self.call.keys_of_tokens and tokens is not None and (self.call.before or self.call.after):
            return slice(self.call.before, self.call.before + tokens)
        return slice(self.call.before, count - self.call.after)

    def _laid(self, tensor: Tensor) -> Tensor:
        return arranged(tensor, self.call.lead, self.sequences())

    @staticmethod
    def _rows_of(tensor: Tensor) -> Tensor:
        """[sequence, head, window, query, ·] as [sequence, head, row, ·]."""
        return tensor.flatten(2, 3)

    # Calls ----------------------------------------------------------------------------------------------------------
    def _weights(
        self, mixed: Mixed, forbidden: Tensor | None, logits: Tensor | None, forbade: Sequence[Forbidding]
    ) -> AttentionRows:
        assert mixed.weights is not None
        deviation = _deviation(mixed.weights, mixed.values, mixed.mixed, mixed.summed)
        if not deviation <= _tolerance(mixed.mixed.dtype):
            raise UnreadableError(
                f"its weights times its values are not its result (off by {deviation:.2g} of its size)"
            )
        keys = self._keys(mixed.weights.shape[-1])
        A = self._rows_of(self._laid(mixed.weights))[..., keys]
        values, result = self._laid(mixed.values)[..., keys, :], self._laid(mixed.by_head)
        barred = None if forbidden is None else self._rows_of(self._laid(forbidden))[..., keys]
        L = None if logits is None else self._rows_of(self._laid(logits))[..., keys]
        queries = None if result.shape[2] > 1 else self.query_mask(A.shape[-2], A.shape[0])
        reasons: dict[str, str] = {}
        if barred is not None:
            barred = _without_weight(A, barred)  # of the others it lowers the logits, and no more
        barred = self._with_padding(A, barred, queries) if result.shape[2] == 1 else barred
        if L is not None and not _explains(A, L, barred):
            L = None
        if L is None:
            reasons = dict.fromkeys(
                ["max_logit", "entropy_floor"], "its weights are not the softmax of one set of logits"
            )
        real = torch.ones(A.shape[:-1], dtype=torch.bool, device=A.device)
        if queries is not None:
            real &= queries[:, None, :]
        if barred is not None:
            real &= ~barred.all(-1)
        sums = A.double().sum(-1)[real] if bool(real.any()) else A.new_ones(1, dtype=torch.float64)
        if self.rows and _is_hiding(A, L, barred, real, self.key_mask(A.shape[-1], A.shape[0])):
            reasons = reasons | dict.fromkeys(OF_ALLOWED_KEYS, "pairs have no weight that nothing was seen to forbid")
        finite = sums[sums.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (math.nan, math.nan)
        lowest = float(A.nan_to_num(0.0).min()) if A.numel() else 0.0
        if lowest < 0:
            raise UnreadableError(
                f"its weights are no distribution over the keys: some are negative (down to {lowest:.2g})"
            )
        slack = 64 * torch.finfo(A.dtype).eps * max(1.0, math.sqrt(A.shape[-1])) if A.dtype.itemsize > 2 else 0.05
        if L is None and finite.numel() and not (abs(low - 1) <= slack and abs(high - 1) <= slack):
            raise UnreadableError(f"its weights are no distribution over the keys: rows sum to {low:.3g} … {high:.3g}")
        if L is None and self.call.sums_to_one is False:  # rounding hides it here
            raise UnreadableError(
                "its weights are no distribution over the keys: in double precision their rows do not sum to 1"
            )
        rows = None
        if self.rows:
            allowed = None if barred is None else ~barred
            rows = mixing.row_statistics_from_weights(
                A, L, allowed=allowed, query_mask=queries, susceptibility=self.susceptibility
            )
        whole = result.shape[2] == 1
        full = A / A.sum(-1, keepdim=True) if self.keeps_weights and whole else None
        spectrum = None
        if self.spectra and whole:
            key_mask = self.key_mask(A.shape[-1], A.shape[0])
            spectrum = mixing.leading_spectrum_from_weights(A, query_mask=queries, key_mask=key_mask)
        forbids = () if barred is None else tuple(forbade)
        borne_out = _BorneOut(deviation, (low, high), bool(finite.numel()))
        found = self._found(rows, values, result, spectrum, full, borne_out, forbids, reasons)
        return found if L is None or not self.rows else replace(found, logit_range=_range(L, barred))

    def _with_padding(self, A: Tensor, barred: Tensor | None, queries: Tensor | None) -> Tensor | None:
        """The forbidden pairs, those of padded keys among them that no real query of the sequence gives any weight. Models skip
        what hides padding where a batch has none: proved on such a one, the operation that forbids it is not known."""
        real = self.key_mask(A.shape[-1], A.shape[0])
        if real is None or bool(real.all()):
            return barred
        weighty = A.nan_to_num(0).double() > LEAST_SHARE * A.nan_to_num(0).amax(-1, keepdim=True).double()
        if queries is not None:
            weighty &= queries[:, None, :, None]
        hidden = (~real & ~weighty.any(1).any(1))[:, None, None, :]
        return hidden if barred is None else barred | hidden

    def _fused(self, given: Mapping[str, Any], output: Tensor) -> AttentionRows:
        query, key, value = given["query"], given["key"], given["value"]
        deviation, is_finite = _fused_deviation(given, output)
        if not deviation <= _tolerance(output.dtype):
            raise UnreadableError(
                f"its weights times its values are not its result (off by {deviation:.2g} of its size)"
            )
        keys = self._keys(key.shape[-2])
        q, k, v = (self._laid(t) for t in (query, key, value))
        if v.shape[2] != q.shape[2] or k.shape[2] != q.shape[2]:
            raise UnreadableError("its keys are not laid out as its queries are")
        result = self._laid(output)
        allowed, bias = self._mask_of(given, query, key, keys)
        if allowed is not None:
            allowed = allowed[..., keys]
        bias = None if bias is None else bias[..., keys]
        causal = bool(given.get("is_causal", False))
        arguments = ["attn_mask"] if allowed is not None and not bool(allowed.all()) else []
        arguments += ["is_causal"] if causal else []
        forbids = tuple(Forbidding(self.call.product, argument) for argument in arguments)
        windows = q.shape[2]
        queries, count = q.shape[3], k[..., keys, :].shape[3]
        if causal and (queries != count or windows > 1):
            own = torch.ones(queries, key.shape[-2], dtype=torch.bool, device=q.device).tril()[:, keys]
            own = own.expand(1, 1, windows, queries, count)
            allowed, causal = own if allowed is None else allowed & own, False
        query_mask = None if windows > 1 else self.query_mask(queries, q.shape[0])
        parts = []
        for w in range(windows if self.rows else 0):
            parts.append(
                mixing.row_statistics(
                    q[:, :, w],
                    k[:, :, w][..., keys, :],
                    allowed=None if allowed is None else allowed[:, :, min(w, allowed.shape[2] - 1)],
                    bias=None if bias is None else bias[:, :, min(w, bias.shape[2] - 1)],
                    query_mask=query_mask,
                    causal=causal,
                    scale=given.get("scale"),
                    susceptibility=self.susceptibility,
                )
            )
        rows = _joined(parts)
        weights = spectrum = None
        if windows == 1 and (self.spectra or self.keeps_weights):
            own_keys = k[:, :, 0][..., keys, :]
            options: dict[str, Any] = {
                "allowed": None if allowed is None else allowed[:, :, 0],
                "bias": None if bias is None else bias[:, :, 0],
                "causal": causal,
                "scale": given.get("scale"),
            }
            if self.spectra:
                key_mask = self.key_mask(count, q.shape[0])
                spectrum = mixing.leading_spectrum(
                    q[:, :, 0], own_keys, query_mask=query_mask, key_mask=key_mask, **options
                )
            if self.keeps_weights:
                weights = mixing.attention_weights(q[:, :, 0], own_keys, **options)
        borne_out = _BorneOut(deviation, (1.0, 1.0), is_finite)
        found = self._found(rows, v[..., keys, :], result, spectrum, weights, borne_out, forbids, {})
        return found if windows > 1 else replace(found, queries=q[:, :, 0], keys=k[:, :, 0][..., keys, :])

    def _mask_of(
        self, given: Mapping[str, Any], query: Tensor, key: Tensor, keys: slice
    ) -> tuple[Tensor | None, Tensor | None]:
        """A fused call's mask as (allowed pairs, bias), each [#sequence, #head, #window, query, key]. `keys` are tokens."""
        mask = given.get("attn_mask")
        if mask is None:
            return None, None
        pairs = (query.shape[-2], key.shape[-2])
        allowed: Tensor | None = None
        bias: Tensor | None = None
        if mask.dtype == torch.bool:
            allowed = mask
        else:
            forbidden, shifts = forbidden_by_addition(mask)
            if forbidden is not None and _may_leave_weight(given, forbidden, keys):
                forbidden, shifts = _without_weight_in(given, forbidden, keys), True
            allowed = None if forbidden is None else ~forbidden
            bias = mask if shifts else None

        def laid(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if tensor.ndim < 2 or tensor.ndim > query.ndim:
                raise UnreadableError(f"its mask has {tensor.ndim} axes")
            tensor = tensor.expand(*tensor.shape[:-2], *pairs)
            if tensor.numel() == pairs[0] * pairs[1]:
                return tensor.reshape(1, 1, 1, *pairs)
            if self.call.is_plain and query.ndim == 4:
                return tensor.reshape(*(1,) * (4 - tensor.ndim), *tensor.shape)[:, :, None]
            return self._laid(tensor.expand(*query.shape[:-2], *pairs))

        return laid(allowed), laid(bias)

    def _found(
        self,
        rows: mixing.RowStatistics | None,
        values: Tensor,
        result: Tensor,
        spectrum: mixing.LeadingSpectrum | None,
        weights: Tensor | None,
        borne_out: _BorneOut,
        forbids: tuple[Forbidding, ...],
        reasons: dict[str, str],
    ) -> AttentionRows:
        whole = result.shape[2] == 1
        if not whole:
            reasons = reasons | dict.fromkeys(
                ["value_contraction", "contraction", "spectral_gap", "second_singular_value"],
                "its attention stays within windows of the sequence",
            )
        return AttentionRows(
            (result.shape[0], result.shape[1], result.shape[2] * result.shape[3]),
            rows,
            values[:, :, 0] if whole else None,
            result[:, :, 0] if whole else None,
            spectrum,
            weights,
            borne_out.deviation,
            borne_out.row_sums,
            forbids,
            borne_out.finite,
            reasons,
        )


class PieceObserver(CallObserver):
    """Stands at one of several products whose rows are put together, and hands on what it was given and gave."""

    def __init__(
        self, call: AttentionCall, come: Callable[[Piece, list[Forbidding]], None], refuse: Callable[[str], None]
    ) -> None:
        self.call, self.come, self.refuse = call, come, refuse
        self.way = Way(call)

    def _at_product(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        try:
            piece, forbade = self.weights_and_pairs(function, args, kwargs, output)
            product = piece.product
            assert product.weights is not None
            deviation = _deviation(product.weights, product.values, product.mixed, product.summed)
            if not deviation <= _tolerance(product.mixed.dtype):
                raise UnreadableError(
                    f"its weights times its values are not its result (off by {deviation:.2g} of its size)"
                )
            weights, values, mixed = (t.detach().clone() for t in (product.weights, product.values, product.mixed))
        except UnreadableError as error:
            self.refuse(str(error))
            return
        self.come(replace(piece, product=Mixed(weights, values, mixed)), forbade)


class WholeObserver(CallObserver):
    """Measures one sequence of an attention that was put together of the rows of several products."""

    def measure(self, found: Whole, forbade: Sequence[Forbidding]) -> None:
        """Measure it, and deliver what was measured, or refuse."""
        product = found.product
        assert product.weights is not None
        queries = self.query_mask(product.weights.shape[-2], 1)
        wanted = found.met if queries is None else found.met | ~queries
        try:
            if not bool(wanted.all()):
                raise UnreadableError("some of its queries are answered for by none of its products")
            gap = _relative((product.weights @ product.values.to(product.weights.dtype)), product.mixed)
            if not gap <= _tolerance(product.mixed.dtype):
                raise UnreadableError(
                    f"its weights times its values, put together, are not its result (off by {gap:.2g} of its size)"
                )
            rows = self._weights(product, found.forbidden, found.logits, forbade)
        except UnreadableError as error:
            self.refuse(str(error))
            return
        keys = self.key_mask(product.weights.shape[-1], 1)
        real = found.valued if keys is None else found.valued | ~keys
        if not bool(real.all()):
            rows = replace(rows, reasons=rows.reasons | {"value_contraction": "some keys meet none of its queries"})
        self.deliver(rows)


class _BorneOut(NamedTuple):
    """What the pass bore out, as in `AttentionRows`."""

    deviation: float
    row_sums: tuple[float, float]
    finite: bool


FARTHEST = 1e3
OF_ALLOWED_KEYS = (
    "normalized_entropy",
    "entropy_floor",
    "rest_entropy",
    "keys_within_reach",
    "key_share",
)


def _is_hiding(
    weights: Tensor, logits: Tensor | None, barred: Tensor | None, queries: Tensor, keys: Tensor | None
) -> bool:
    """Whether a real pair, not all of it barred, is out of reach in every sequence and head: then a mask may have been overlooked.
    Steep logits put pairs far away, too, but not `FARTHEST` nats, nor do they make a weight 0 everywhere. weights, logits
    [sequence, head, query, key], queries [sequence, head, query], keys [sequence, key]."""
    # Half precision takes for 0 what is not, where logits are known.
    in_reach = weights != 0
    if logits is not None:
        best = logits.masked_fill(weights == 0, -math.inf).amax(-1, keepdim=True)
        expected = weights.amax(-1, keepdim=True).double().log() + (logits - best)
        lost = expected <= math.log(torch.finfo(weights.dtype).tiny)  # 0 by rounding alone
        in_reach = (in_reach | lost) & (logits - logits.amax(-1, keepdim=True) > -FARTHEST)
    told = queries[..., None].expand(weights.shape)
    told = told if keys is None else told & keys[:, None, None]
    heard = (in_reach & told).any(1).any(0)
    if barred is not None:
        told = told & ~barred
    open_pairs = told if logits is None else told & ~logits.isneginf()  # to those nobody gives weight, whoever says so
    return bool((open_pairs.any(1).any(0) & ~heard).any())


def _range(logits: Tensor, barred: Tensor | None) -> Tensor:
    """How far the logits of each row lie apart over its allowed keys, as a share of the largest: 0 where all are equal."""
    lowest = torch.finfo(logits.dtype).min / 2
    gone = ~logits.isfinite() | (logits < lowest)
    gone = gone if barred is None else gone | barred
    high = logits.masked_fill(gone, -math.inf).amax(-1).double()
    low = logits.masked_fill(gone, math.inf).amin(-1).double()
    apart = (high - low).clamp(min=0)
    return torch.where(apart > 0, apart / torch.maximum(high.abs(), low.abs()), 0.0)


def _joined(parts: Sequence[mixing.RowStatistics]) -> mixing.RowStatistics | None:
    """The rows of several windows or calls, one after the other; None of none."""
    if len(parts) < 2:
        return parts[0] if parts else None

    def joined(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        return None if any(f is None for f in found) else torch.cat(found, -1)

    names = [n for n in mixing.RowStatistics.__dataclass_fields__ if n != "route"]
    return mixing.RowStatistics(**{n: joined(n) for n in names}, route=parts[0].route)


def in_sequence(parts: Sequence[AttentionRows]) -> AttentionRows:
    """One attention of several calls that answered for its queries in turn."""

    def joined(name: str, axis: int) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(f is None for f in found) else torch.cat(found, axis)

    sequences, count, _ = parts[0].shape
    return AttentionRows(
        (sequences, count, sum(part.shape[2] for part in parts)),
        _joined([part.rows for part in parts if part.rows is not None]),
        parts[0].values,
        joined("mixed", 2),
        None,
        joined("weights", 2),
        max(part.deviation for part in parts),
        (min(part.row_sums[0] for part in parts), max(part.row_sums[1] for part in parts)),
        tuple(dict.fromkeys(one for part in parts for one in part.forbids)),
        any(part.finite for part in parts),
        {name: reason for part in parts for name, reason in part.reasons.items()},
    )


# What the pass must bear out ------------------------------------------------------------------------------------------


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)


def _some_rows(queries: int) -> list[int]:
    return sorted({0, queries // 2, queries - 1})[:CHECKED_ROWS]


def _deviation(weights: Tensor, values: Tensor, mixed: Tensor, summed: tuple[int, ...]) -> float:
    """How far weights times values, added up along `summed`, are from the result on a few rows of every slice, over the result's
    size."""
    rows = _some_rows(mixed.shape[-2])
    dtype = torch.promote_types(mixed.dtype, torch.float32)
    again = weights[..., rows, :].to(dtype) @ values.to(dtype)
    again = again.sum(summed, keepdim=True).expand(again.shape) if summed else again
    return _relative(again, mixed[..., rows, :].to(dtype))


def _relative(again: Tensor, result: Tensor) -> float:
    apart, largest = (again - result).abs().amax(), result.abs().amax()
    if math.isfinite(apart) and math.isfinite(largest):
        return float(apart / largest) if float(largest) else float(apart)
    seen = again.isfinite() & result.isfinite()
    if not bool(seen.any()):
        return 0.0
    size = result[seen].abs().max()
    gap = (again - result)[seen].abs().max()
    return float(gap / size) if float(size) else float(gap)


def _fused_deviation(given: Mapping[str, Any], output: Tensor) -> tuple[float, bool]:
    """The same for a fused call, its weights made anew on these rows; and whether one of the weights is finite."""
    rows = _some_rows(given["query"].shape[-2])
    weights = torch.softmax(_fused_logits(given, rows), -1)
    values = _repeated(given["value"], given).to(weights.dtype)
    is_finite = math.isfinite(weights.sum()) or bool(weights.isfinite().any())
    return _relative(weights @ values, output[..., rows, :].to(weights.dtype)), is_finite


def _fused_logits(given: Mapping[str, Any], rows: Sequence[int]) -> Tensor:
    """[.., row, key] of a fused call on some of its rows, its mask and causal flag among them."""
    query, key, mask, scale = given["query"], given["key"], given.get("attn_mask"), given.get("scale")
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = list(rows)
    k = _repeated(key, given).to(dtype)
    S = query[..., rows, :].to(dtype) @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given.get("is_causal", False):
        index = torch.arange(key.shape[-2], device=query.device)
        S = S.masked_fill(index > torch.tensor(rows, device=query.device)[:, None], -math.inf)
    if mask is None:
        return S
    part = mask.expand(*mask.shape[:-2], query.shape[-2], key.shape[-2])[..., rows, :]
    return S.masked_fill(~part, -math.inf) if mask.dtype == torch.bool else S + part.to(dtype)


def _repeated(tensor: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Keys or values of a fused call, once for each head of the queries."""
    query = given["query"]
    repeats = query.shape[-3] // tensor.shape[-3] if query.ndim > 2 and tensor.ndim == query.ndim else 1
    return tensor.repeat_interleave(repeats, -3) if repeats > 1 else tensor


def _may_leave_weight(given: Mapping[str, Any], forbidden: Tensor, keys: slice) -> bool:
    """Whether a pair that a fused call's additive mask forbids may have weight. By Cauchy and Schwarz two logits of a row lie at
    most 2 |q| |k| scale apart; a mask that lowers a pair by so much more leaves it none, and no weights need be made."""
    query, key, mask, scale = given["query"], given["key"], given["attn_mask"], given.get("scale")
    norms = [float(t.detach().double().norm(dim=-1).nan_to_num().max()) for t in (query, key)]
    spread = 2 * norms[0] * norms[1] * abs(query.shape[-1] ** -0.5 if scale is None else scale)
    part = [t.expand(*t.shape[:-1], key.shape[-2])[..., keys] for t in (mask, forbidden)]
    best = part[0].masked_fill(part[1], -math.inf).amax(-1).double()
    lowered = part[0].masked_fill(~part[1], -math.inf).amax(-1).double()
    margin = (best - lowered)[best.isfinite() & lowered.isfinite()]
    return bool(margin.numel()) and not float(margin.min()) - spread > -math.log(LEAST_SHARE)


def _without_weight_in(given: Mapping[str, Any], forbidden: Tensor, keys: slice) -> Tensor | None:
    """Those pairs [.., query, key] that have no weight in a fused call, of the keys that are tokens."""
    L = _fused_logits(given, range(given["query"].shape[-2]))
    barred = torch.zeros(L.shape, dtype=torch.bool, device=L.device) | forbidden
    found = _without_weight(torch.softmax(L[..., keys], -1), barred[..., keys])
    if found is None:
        return None
    barred[..., keys] = found
    return barred


def _without_weight(weights: Tensor, forbidden: Tensor) -> Tensor | None:
    """Those of the forbidden pairs that have no weight to speak of, head by head; None where all have some. A row that is
    allowed no key stays as it is."""
    barred = forbidden.expand(weights.shape)
    found = weights.nan_to_num(0).double()
    weighty = barred & (found > LEAST_SHARE * found.amax(-1, keepdim=True)) & ~barred.all(-1, keepdim=True)
    if not bool(weighty.any()):
        return forbidden
    left = barred & ~weighty
    return left if bool(left.any()) else None


def _explains(weights: Tensor, logits: Tensor, forbidden: Tensor | None) -> bool:
    """Whether exp(logits) is proportional to the weights in each row, on a few rows of every head."""
    rows = _some_rows(weights.shape[-2])
    A, L = weights[..., rows, :], logits[..., rows, :]
    dtype = torch.promote_types(A.dtype, torch.float32)
    coarse = max(torch.finfo(A.dtype).eps, torch.finfo(L.dtype).eps)
    A, L = A.to(dtype), L.to(dtype)
    seen = (1e-6 * A.amax(-1, keepdim=True) < A) & L.isfinite() & (A > 0)
    if forbidden is not None:
        seen &= ~forbidden.expand(weights.shape)[..., rows, :]
    gap = A.clamp(min=1e-300 if dtype == torch.float64 else 1e-37).log() - L
    high = gap.masked_fill(~seen, -math.inf).amax(-1)
    low = gap.masked_fill(~seen, math.inf).amin(-1)
    size = L.abs().masked_fill(~seen, 0).amax(-1)
    spread = (high - low).masked_fill(~seen.any(-1), 0)
    return bool((spread <= 1e-4 + 16 * coarse * (1 + size)).all())
