"""What a norm layer does to the rank of a token cloud, by the exact formula and by its three brackets.

LN(x) = gamma * (x P) / s + beta with P = I - 11^T/d over features and s the row's standard deviation; RMSNorm has P = I
and s the root mean square. Exact matrices are decided in rational arithmetic although s is irrational: a column space
with rational generators contains s if and only if it contains the part of s in every square class
(`exact.square_classes`). Tensors are decided by singular values in float64 above a tolerance.

When not to use it: for distances. Layer normalisation can leave every rank unchanged and still move the consensus distance
from 9e-4 to 0.94, on tokens with a large common mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from flint import fmpq, fmpq_mat
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import InputError
from uncollapse.measures import exact
from uncollapse.measures.admission import admitting, described, require_plain, times_power_of_two
from uncollapse.measures.storage_noise import storage_noise

Kind = Literal["layer", "rms"]
_EPS_64 = torch.finfo(torch.float64).eps


class Ranks(NamedTuple):
    """The two ranks of one cloud; integers, or integer tensors with the batch axes."""

    rank: Any
    affine_rank: Any


@dataclass(frozen=True)
class RankChange:
    """After minus before. `brackets` are [1 in col X], [s in col X P Gamma] and dim(row X meet ker Gamma P), and
    affine_rank = brackets[0] - brackets[1] - brackets[2] always. Integers for one matrix, int64 tensors for a batch.
    """

    rank: Any
    affine_rank: Any
    brackets: tuple[Any, Any, Any]
    before: Ranks
    after: Ranks


@admitting
def rank_change(
    x: Float[Tensor, "*batch token width"] | Any,
    *,
    gamma: Any = None,
    beta: Any = None,
    eps: Any = 0.0,
    kind: Kind = "layer",
    mask: Bool[Tensor, "*batch token"] | None = None,
    precision: torch.dtype | None = None,
) -> RankChange:
    """By how much a norm layer changes the rank and the affine rank of these tokens; integers, in directions.

    affrank(LN X) - affrank(X) = [1_n in col X] - [s in col X P Gamma] - dim(row X meet ker Gamma P), and
    rank M = affrank M + [1_n in col M] on both sides; Gamma = diag gamma, s_i = sqrt(var_i + eps) > 0, P = I - 11^T/d.
    `kind="rms"` replaces P by I and the variance by the mean square.

    The affine rank changes by +1 at most and by -1 - dim ker Gamma P at least: -2 without zeros in gamma (RMSNorm: -1).
    0 at consensus. `beta` never moves the affine rank, and moves the rank by one at most. Invariant under permutation
    of the tokens and, with eps = 0, under a common rescaling.

    It misleads near the numerical cut: a tensor's ranks are those above `geometry.rank`'s tolerance, and where the norm
    amplifies a token more than the others it can reveal a direction that was below the cut before, so that brackets
    leave their range. Decide such a cloud exactly, by `rank_change(exact.rational(x), ...)`.

    >>> change = rank_change([[0, 1], [1, 2]])  # two tokens that differ by a multiple of (1, 1) become one
    >>> change.affine_rank, change.brackets
    (-1, (1, 1, 1))
    >>> rank_change([[0, 0, 1], [0, 1, 1], [0, 2, 1]]).affine_rank  # collinear tokens on a line that misses 0
    1

    Derived in docs/theory.md; the sentence it replaces ("precisely affine-rank-neutral") is from G. Cirrincione, "Rank,
    Head-Channel Non-Identifiability, and Symmetry Breaking", arXiv 2604.23681.

    `x` is a tensor (floats, numerical ranks; leading batch axes and `mask` allowed, True = real token; `precision` is
    the dtype the model computed in) or rows of exact numbers or a flint matrix (exact ranks). Raises `InputError` where
    a token has deviation 0 and eps = 0 (the layer divides by 0 there), for negative eps, and for unfit shapes.
    """
    if kind not in ("layer", "rms"):
        raise InputError(
            f'rank_change: expected kind "layer" or "rms", got {kind!r}. Other norms have other formulas. '
            "Pass one of the two."
        )
    if exact.number(eps, name="rank_change") < 0:
        raise InputError(
            f"rank_change: expected eps >= 0, got {eps}. It is added to a variance. Pass the layer's own eps."
        )
    if not isinstance(x, Tensor):
        if mask is not None or precision is not None:
            raise InputError(
                "rank_change: expected mask and precision with a tensor only, got them with an exact matrix. Exact "
                "matrices contain only real tokens. Leave the others out of the rows."
            )
        return _exact_change(exact.rational(x, name="rank_change"), gamma, beta, exact.number(eps), kind)
    for name, given in (("x", x), ("mask", mask), ("gamma", gamma), ("beta", beta)):
        if isinstance(given, Tensor):
            require_plain("rank_change", name, given)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise InputError(
            f"rank_change: expected a boolean mask, got {described(mask) if isinstance(mask, Tensor) else type(mask).__name__}. "
            "An additive or 0/1 attention mask reads differently. Pass attention_mask.bool() of the 0/1 mask."
        )
    if precision is not None and not precision.is_floating_point:
        raise InputError(
            f"rank_change: expected a floating-point precision, got {precision}. Quantised weights are computed with in another "
            "dtype. Pass the dtype of the hidden states."
        )
    if (
        x.ndim < 2
        or 0 in x.shape[-2:]
        or not x.is_floating_point()
        or (mask is not None and mask.shape != x.shape[:-1])
    ):
        raise InputError(
            f"rank_change: expected floats with axes (batch, token, width) and a mask with axes (batch, token), got "
            f"{x.dtype} of shape {tuple(x.shape)} and mask {None if mask is None else tuple(mask.shape)}. A token axis "
            "may be missing. Pass one cloud as (token, width)."
        )
    batch, (tokens, width) = x.shape[:-2], x.shape[-2:]
    clouds = x.detach().reshape(math.prod(batch), tokens, width).to("cpu", torch.float64)
    keep = (
        torch.ones(clouds.shape[:2], dtype=torch.bool)
        if mask is None
        else mask.reshape(math.prod(batch), tokens).bool().cpu()
    )
    scale, shift = (_features(name, value, width) for name, value in (("gamma", gamma), ("beta", beta)))
    eps_data = torch.finfo(precision or x.dtype).eps
    changes = [
        _numerical_change(cloud[kept], scale, shift, float(eps), kind, eps_data)
        for cloud, kept in zip(clouds, keep, strict=True)
    ]
    return changes[0] if not batch else _stacked(changes, batch)


def _assembled(before: Ranks, after: Ranks, rank_of_product: int) -> RankChange:
    brackets = (
        before.rank - before.affine_rank,
        rank_of_product - after.affine_rank,
        before.rank - rank_of_product,
    )
    return RankChange(after.rank - before.rank, after.affine_rank - before.affine_rank, brackets, before, after)


def _stacked(changes: list[RankChange], batch: torch.Size) -> RankChange:
    def axes(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).reshape(batch)

    return RankChange(
        axes([c.rank for c in changes]),
        axes([c.affine_rank for c in changes]),
        (
            axes([c.brackets[0] for c in changes]),
            axes([c.brackets[1] for c in changes]),
            axes([c.brackets[2] for c in changes]),
        ),
        Ranks(axes([c.before.rank for c in changes]), axes([c.before.affine_rank for c in changes])),
        Ranks(axes([c.after.rank for c in changes]), axes([c.after.affine_rank for c in changes])),
    )


def _no_deviation(token: int) -> InputError:
    return InputError(
        f"rank_change: expected tokens with a positive standard deviation (or root mean square), got token {token} "
        "with 0 and eps = 0. A constant token makes the layer divide by 0. Pass the layer's eps, or leave it out."
    )


def deviation_squares(x: fmpq_mat, eps: Any = 0, kind: Kind = "layer") -> list[fmpq]:
    """s_i^2 for every token, exactly: the variance (layer) or mean square (rms) of its entries, plus eps.

    >>> deviation_squares(exact.rational([[0, 2], [3, 4]]), kind="layer")
    [1, 1/4]
    """
    addend = exact.number(eps, name="deviation_squares")
    rows = (x * exact.centring(x.ncols()) if kind == "layer" else x).tolist()
    return [sum((entry * entry for entry in row), fmpq(0)) / x.ncols() + addend for row in rows]


def _exact_change(x: fmpq_mat, gamma: Any, beta: Any, eps: fmpq, kind: Kind) -> RankChange:
    width = x.ncols()
    scale, shift = (_exact_features(name, value, width) for name, value in (("gamma", gamma), ("beta", beta)))
    squares = deviation_squares(x, eps, kind)
    if 0 in squares:
        raise _no_deviation(squares.index(fmpq(0)))
    product = x * exact.centring(width) if kind == "layer" else x
    if scale is not None:
        product = product * exact.diagonal(scale)
    parts = exact.square_classes(squares)
    rank_of_product = exact.rank(product)
    contains_s = all(exact.in_column_space(product, [[entry] for entry in part]) for _, part in parts)
    after = rank_of_product - int(contains_s)
    bias_adds = contains_s if shift is None else _bias_adds(product, parts, shift, contains_s)
    return _assembled(Ranks(exact.rank(x), exact.affine_rank(x)), Ranks(after + int(bias_adds), after), rank_of_product)


def _bias_adds(product: fmpq_mat, parts: list[tuple[fmpq, list[fmpq]]], shift: list[fmpq], contains_s: bool) -> bool:
    """[1 in col M] for M = S^-1 B + 1 beta^T, B = `product`.

    M w = 1 means B w = (1 - beta.w) s. If beta lies outside row B, a w in ker B with beta.w = 1 does it. Otherwise
    beta = lambda B, and w exists iff s in col B and lambda.s != -1; lambda.s is a sum over square classes, rational
    only if every irrational class cancels.
    """
    if not exact.in_row_space(product, [shift]):
        return True
    if not contains_s:
        return False
    weights = _combination(product, shift)
    totals = [(m, sum((w * t for w, t in zip(weights, part, strict=True)), fmpq(0))) for m, part in parts]
    irrational_left = any(total != 0 for m, total in totals if m != 1)
    return irrational_left or sum((total for m, total in totals if m == 1), fmpq(0)) != -1


def _combination(matrix: fmpq_mat, row: list[fmpq]) -> list[fmpq]:
    """Weights lambda with lambda M = row, for a row in the row space: null vectors of [M^T | -row] hold them."""
    columns = exact.beside(matrix.transpose(), exact.from_rows([[-entry] for entry in row], 1))
    for vector in exact.null_space(columns).transpose().tolist():
        if vector[-1] != 0:
            return [entry / vector[-1] for entry in vector[:-1]]
    raise AssertionError("the row is not in the row space")  # unreachable: the caller has checked


def _exact_features(name: str, values: Any, width: int) -> list[fmpq] | None:
    if values is None:
        return None
    numbers = [
        exact.number(value, name="rank_change") for value in (values.tolist() if isinstance(values, Tensor) else values)
    ]
    if len(numbers) != width:
        raise _unfit_features(name, width, (len(numbers),))
    return numbers


def _features(name: str, values: Any, width: int) -> Tensor | None:
    if values is None:
        return None
    tensor = (
        values.detach() if isinstance(values, Tensor) else torch.tensor([float(v) for v in values], dtype=torch.float64)
    )
    if tensor.shape != (width,):
        raise _unfit_features(name, width, tuple(tensor.shape))
    if not bool(tensor.isfinite().all()):
        raise InputError(
            f"rank_change: expected finite numbers in {name}, got NaN or infinity. Training may have diverged. Pass the "
            "parameters of an earlier checkpoint."
        )
    return tensor.to("cpu", torch.float64)


def _unfit_features(name: str, width: int, shape: tuple[int, ...]) -> InputError:
    return InputError(
        f"rank_change: expected {name} with axis (width,) = ({width},), got shape {shape}. It may belong to another "
        "norm. Pass that norm's own parameters."
    )


def _numerical_change(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, kind: Kind, eps_data: float
) -> RankChange:
    tokens, width = x.shape
    if not torch.isfinite(x).all():
        raise InputError(
            "rank_change: expected finite tokens, got a NaN or an infinity. The forward pass may have overflowed. Run "
            "it in a wider dtype."
        )
    if tokens == 0:
        return _assembled(Ranks(0, 0), Ranks(0, 0), 0)
    size = max(float(x.abs().max()), math.sqrt(eps))  # squares of what is much larger or smaller would leave the range
    exponent = torch.tensor(-math.frexp(size)[1] if size else 0)
    x, eps = times_power_of_two(x, exponent), eps * 2.0 ** (2 * int(exponent)) if eps else 0.0
    centred = x - x.mean(1, keepdim=True) if kind == "layer" else x
    if eps == 0:  # decided on the entries: a rounded mean would leave a constant token a deviation of 1e-17
        constant = (x == x[:, :1]).all(1) if kind == "layer" else (x == 0).all(1)
        if constant.any():
            raise _no_deviation(int(constant.int().argmax()))
    deviation = (centred.square().mean(1, keepdim=True) + eps).sqrt()
    scale = torch.ones(width, dtype=torch.float64) if gamma is None else gamma
    normed = centred / deviation * scale
    # What an entry's error is relative to: the entry before the mean was removed, and the mean.
    origin = x.abs() + (x.abs().mean(1, keepdim=True) if kind == "layer" else 0)
    origin = origin / deviation * scale
    cut = _tolerance(x, x, eps_data)
    roundings = width + 4  # of the mean of the squares, of the mean, the difference, the quotient and the products
    cut_after = _tolerance(normed, origin, eps_data, roundings)
    output = normed if beta is None else normed + beta
    cut_output = _tolerance(output, origin, eps_data, roundings)
    before = Ranks(_above(x, cut), _above(x - x.mean(0), cut))
    rank_of_product, affine = _above(normed, cut_after), _above(normed - normed.mean(0), cut_after)
    rank_after = rank_of_product if beta is None else _above(output, cut_output)
    return _assembled(before, Ranks(rank_after, affine), rank_of_product)


def _tolerance(x: Tensor, origin: Tensor, eps_data: float, roundings: int = 0) -> float:
    """The size up to which a singular value of `x` may be rounding, `origin` being what entry errors are relative to.

    To `storage_noise` the decomposition adds max(n, d) eps_64 sigma_1, a norm layer `roundings`
    roundings an entry in float64, which may all fall in one direction.
    """
    tokens, width = x.shape
    size, top = float(torch.linalg.matrix_norm(origin)), float(torch.linalg.matrix_norm(x, 2))
    return storage_noise(eps_data, size, tokens, width) + _EPS_64 * (max(tokens, width) * top + roundings * size)


def _above(x: Tensor, cut: float) -> int:
    return int((torch.linalg.svdvals(x) > cut).sum())
