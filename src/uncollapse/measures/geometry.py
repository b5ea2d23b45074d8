"""A token cloud: how many directions its tokens span, how evenly, and how far apart they are.

`x` is one sequence's cloud, a row a token, or many of them along leading axes. `mask` says which rows are real (True);
padded rows are left out of everything, whatever they hold. Spectra are computed in float64 from float16, bfloat16,
float32 or float64 input. What cannot be said is NaN and never a guess: a zero cloud has no effective rank, one token
has no distance to others. Floats are NaN too where a real token is NaN or infinite; the integer ranks, which have no
NaN, raise `InputError` there.

The single measures take the singular values themselves: for reading, and for one question at a time. `cloud_measures`
gives all of them at once, much faster, and is what a probe pass calls at every site.

When not to use it: never compare ranks of sequences of different length without the attainable rank beside them. Ten
tokens cannot have rank eleven, and are not collapsed for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import InputError
from uncollapse.measures.admission import admitting, at_size_one, is_ordinary, times_power_of_two
from uncollapse.measures.gram import column_gram
from uncollapse.measures.shared_out import shared_out
from uncollapse.measures.storage_noise import storage_noise
from uncollapse.measures.symmetric_eigenvalues import eigenvalues

_EPS_64 = torch.finfo(torch.float64).eps
_MASSIVE_RATIO = 10.0  # a token's norm over the median token norm of its sequence
_HELD_OUT_SHARE = 0.25


@admitting
def rank(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    precision: torch.dtype | None = None,
) -> Int[Tensor, "*batch"]:
    """How many linearly independent directions the tokens span: a count.

    rank X = #{i : sigma_i(X) > tol}, sigma_i the singular values, tol as in `rank_tolerance`; `precision` is the dtype
    the model computed in (default: that of `x`).

    From 0 (zero cloud) to min(n, d); 1 when all tokens are multiples of one, and also at consensus away from 0.
    Invariant under permutation of tokens, rotation and scale.

    Misleads as a measure of size: rank can be full while distances are already 1e-5. Read `consensus_distance` beside
    it, and `rank_gap` to see whether the cut was clear.

    >>> rank(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [1.0, 1.0, 3.0]])).item()  # third = first + second
    2

    Source: linear algebra; tolerance in `rank_tolerance`.

    Raises `InputError` for another shape or dtype, and where a real token is NaN or infinite.
    """
    return _rank("rank", x, mask, precision, affine=False)


@admitting
def affine_rank(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    precision: torch.dtype | None = None,
) -> Int[Tensor, "*batch"]:
    """The dimension of the flat through all tokens: a count, 0 when they coincide.

    affine rank X = #{i : sigma_i(CX) > tol}, C = I - 11^T/n; the tolerance is that of X, not of CX. At consensus CX is
    rounding noise, which has full rank relative to itself and none relative to X.

    From 0 (consensus) to min(n - 1, d); equals rank X - [1 in col X]. Invariant under permutation, rotation, scale;
    under translation too, up to the tolerance.

    Misleads on a large common mean: tokens at distance 1e-8 of their norm are one point in float32 and many in float64.

    >>> affine_rank(torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])).item()  # three points on a line, which misses 0
    1

    Source: G. Cirrincione, "Rank, Head-Channel Non-Identifiability, and Symmetry Breaking", arXiv 2604.23681 (the
    notion); tolerance in `rank_tolerance`.

    Raises `InputError` for another shape or dtype, and where a real token is NaN or infinite.
    """
    return _rank("affine_rank", x, mask, precision, affine=True)


@admitting
def attainable_rank(
    x: Float[Tensor, "*batch token width"], mask: Bool[Tensor, "*batch token"] | None = None, *, affine: bool = False
) -> Int[Tensor, "*batch"]:
    """The largest rank so many tokens of this width can have: a count to normalise by.

    min(n, d), and min(n - 1, d) with `affine`; n real tokens, width d. 0 for a fully masked sequence.

    Depends on the shape and mask alone. Misleads nowhere; leaving it out does: short sequences then look collapsed.

    >>> attainable_rank(torch.zeros(5, 8)).item(), attainable_rank(torch.zeros(5, 8), affine=True).item()
    (5, 4)

    Source: linear algebra.

    Raises `InputError` for another shape or dtype.
    """
    cloud = _cloud("attainable_rank", x, mask)
    return (cloud.tokens - int(affine)).clamp(0, x.shape[-1])


@admitting
def rank_tolerance(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    precision: torch.dtype | None = None,
) -> Float[Tensor, "*batch"]:
    """The size, in the unit of `x`, up to which a singular value of this cloud is rounding and not a direction.

    tol = eps(precision) ||X||_F (1/sqrt n + 1/sqrt d) + max(n, d) eps(float64) sigma_1(X). The first term bounds the
    largest singular value of the noise that storing X in `precision` leaves, the second what the decomposition adds.

    0 for the zero cloud; the first term is at most 2 eps sigma_1. Invariant under permutation, rotation; scales with X.

    Misleads after long computations: it covers storage, with hardly a margin at an exact consensus, and no forward error
    gathered over blocks. Read `rank_gap` too.

    >>> round(rank_tolerance(torch.eye(4), precision=torch.bfloat16).item(), 9)  # 2^-7 * 2 * (1/2 + 1/2)
    0.015625

    Source: noise of deviation s has norm about s (sqrt n + sqrt d): M. Rudelson, R. Vershynin, "Non-asymptotic theory
    of random matrices: extreme singular values", arXiv 1003.2990, section 2. The constant is this project's.

    Raises `InputError` for another shape or dtype. NaN where a real token is NaN or infinite.
    """
    cloud = _cloud("rank_tolerance", x, mask, precision)
    tolerance = _tolerance(_singular_values(cloud.x), cloud.tokens, x.shape[-1], cloud.eps)
    return times_power_of_two(tolerance, cloud.exponent)


@admitting
def rank_gap(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    precision: torch.dtype | None = None,
) -> Float[Tensor, "*batch"]:
    """How clear the cut was that decided `rank`: the ratio of the last singular value counted to the first one not.

    sigma_r / sigma_{r+1}, r = rank X. Infinite where nothing lies below the cut, as at full rank; NaN for a zero cloud.

    From 1 (the rank is a matter of taste) to infinity; 1e3 and more is clear. Invariant under permutation, rotation,
    scale. A collapse in progress passes through small gaps: a trajectory's rank is to be trusted before and after.

    Misleads where it is beyond 1e8 or so: what lies below the cut is then mostly the rounding of the decomposition, and how
    large the ratio is says nothing. It never says anything of gaps elsewhere in the spectrum.

    >>> round(rank_gap(torch.diag(torch.tensor([2.0, 1.0, 1e-9]))).item() / 1e9, 6)
    1.0

    Source: this project.

    Raises `InputError` for another shape or dtype.
    """
    cloud = _cloud("rank_gap", x, mask, precision)
    values = _singular_values(cloud.x)
    ranks = _count_above(values, _tolerance(values, cloud.tokens, x.shape[-1], cloud.eps))
    return _gap(values, ranks, cloud.tokens.clamp(max=x.shape[-1]))


@admitting
def effective_rank(
    x: Float[Tensor, "*batch token width"], mask: Bool[Tensor, "*batch token"] | None = None
) -> Float[Tensor, "*batch"]:
    """How many directions the cloud uses, counting each by its share: a number of directions.

    exp(-sum_i p_i ln p_i), p_i = sigma_i / sum_j sigma_j, over all singular values (0 ln 0 = 0).

    From 1 (rank one, also consensus) to the rank, reached when all non-zero sigma_i are equal. Invariant under
    permutation, rotation, scale. NaN for a zero cloud.

    Misleads where one token is massive (it approaches 1 at full rank), across lengths (normalise by the attainable
    rank), and in low precision at a collapse: the rounding noise is part of the spectrum, and a bfloat16 consensus of
    128 tokens can show 1.3, more than its rank. Never add an epsilon to cure that: it biases a true 1 upwards.

    >>> round(effective_rank(torch.diag(torch.tensor([3.0, 3.0, 3.0, 0.0]))).item(), 9)
    3.0

    Source: O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. 3.

    Raises `InputError` for another shape or dtype.
    """
    return _entropy_rank(_singular_values(_cloud("effective_rank", x, mask).x))


@admitting
def stable_rank(
    x: Float[Tensor, "*batch token width"], mask: Bool[Tensor, "*batch token"] | None = None
) -> Float[Tensor, "*batch"]:
    """How many times the strongest direction's energy the whole cloud holds: a number of directions.

    ||X||_F^2 / ||X||_2^2 = sum_i sigma_i^2 / sigma_1^2.

    From 1 (rank one, also consensus) to the rank; never above the participation ratio. Invariant under permutation,
    rotation, scale. NaN for a zero cloud.

    Misleads where one token or a common mean carries most of the energy: it is then 1.00 at any rank.

    >>> round(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 9)  # 6 / 4
    1.5

    Source: M. Rudelson, R. Vershynin, "Sampling from large matrices", arXiv math/0503442, section 1 (numerical rank).

    Raises `InputError` for another shape or dtype.
    """
    values = _singular_values(_cloud("stable_rank", x, mask).x)
    return (values / values.amax(-1, keepdim=True)).square().sum(-1)


@admitting
def participation_ratio(
    x: Float[Tensor, "*batch token width"], mask: Bool[Tensor, "*batch token"] | None = None
) -> Float[Tensor, "*batch"]:
    """How many directions share the cloud's energy: a number of directions, found without a decomposition.

    (sum_i sigma_i^2)^2 / sum_i sigma_i^4 = tr(G)^2 / ||G||_F^2 with G = X X^T.

    From 1 (rank one, also consensus) to the rank, between stable and effective rank. Invariant under permutation,
    rotation, scale. NaN for a zero cloud.

    Misleads like the stable rank: energies are squares, so one massive token hides all others. X is not centred here;
    neuroscience applies the same formula to the covariance.

    >>> round(participation_ratio(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 9)  # 36 / 18
    2.0

    Source: P. Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", bioRxiv 214262 (2017).

    Raises `InputError` for another shape or dtype.
    """
    cloud = _cloud("participation_ratio", x, mask)
    return _participation_ratio(cloud.x.mT @ cloud.x if x.shape[-2] > x.shape[-1] else cloud.x @ cloud.x.mT)


@admitting
def consensus_distance(
    x: Float[Tensor, "*batch token width"], mask: Bool[Tensor, "*batch token"] | None = None
) -> Float[Tensor, "*batch"]:
    """How far the tokens are from being all equal, relative to their size: a share of the cloud's norm.

    ||CX||_F / ||X||_F with C = I - 11^T/n.

    0: all tokens equal (consensus); 1: no common part. Invariant under permutation, rotation, scale; not under
    translation. NaN for a zero cloud, and for one token, which is neither apart from others nor with them.

    Misleads on a large common mean, which the next norm layer removes (LN of 1000 + noise: 1e-3 before, .99 after), and
    where one token is massive (.995 whatever the others do).

    >>> round(consensus_distance(torch.tensor([[2.0, 1.0], [2.0, -1.0]])).item() ** 2, 9)  # 2 / 10
    0.2

    Source: Y. Dong, J.-B. Cordonnier, A. Loukas, "Attention is not all you need: pure attention loses rank doubly
    exponentially with depth", arXiv 2103.03404, section 2 (res, relative and in the Frobenius norm here).

    Raises `InputError` for another shape or dtype.
    """
    cloud = _cloud("consensus_distance", x, mask)
    energy = torch.linalg.vector_norm(cloud.x, dim=(-2, -1)).square()
    apart = 1 - cloud.x.sum(-2).square().sum(-1) / (cloud.tokens * energy)
    distance = apart.sqrt()
    if not bool((apart > 1e-4).all()):  # the difference has lost 4 digits, or there is none
        distance = _frobenius(_centred(cloud.x, cloud.real)) / _frobenius(cloud.x)
    return distance.where(cloud.tokens > 1, math.nan)


@admitting
def consensus_after_norm(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    centred: bool = True,
) -> Float[Tensor, "*batch"]:
    """How far the tokens are from being all equal to whoever reads them through a norm: a share of the cloud's norm.

    `consensus_distance` of the rows x_i / ||x_i||, each first freed of its mean over the features with `centred`, as a layer
    norm does and an RMS norm does not. Gain, shift and epsilon of the norm are left out.

    0: the next sublayer cannot tell the tokens apart; 1: no common part. Invariant under permutation, rotation (without
    `centred`), a positive scale *per token*, and with `centred` under adding a constant to all features: neither a massive
    token nor a large common level moves it. 1 - c^2 is the mean cosine of all pairs. NaN with fewer than two tokens that have
    a direction; tokens that have none are left out.

    Misleads in a model without norms, where sizes count, and where the norm's gain silences the common part.

    >>> x = torch.tensor([[1000.0, 1002.0], [1003.0, 1001.0], [-2e6, 2e6]])  # a common level, and a massive token
    >>> round(consensus_after_norm(x).item() ** 2, 6)  # directions +, -, +: mean square 1, mean 1/3
    0.888889

    Source: Y. Dong et al., arXiv 2103.03404, section 2, of what a norm makes of the stream; this project.

    Raises `InputError` for another shape or dtype.
    """
    cloud = _cloud("consensus_after_norm", x, mask)
    x, real = cloud.x, cloud.real
    if centred:
        x = x - x.mean(-1, keepdim=True)
    if x.dtype == torch.float64 and x.numel():
        x, _ = at_size_one(x, (-1,))
    norms = torch.linalg.vector_norm(x, dim=-1)  # padded rows are zero, and stay so
    real = real & (norms > 0)
    unit = x * _reciprocal(norms).unsqueeze(-1)
    count = real.sum(-1)
    mean = unit.sum(-2, keepdim=True) / count[..., None, None]
    distances = torch.linalg.vector_norm(unit.sub_(mean), dim=-1)  # in place: one cloud less to write
    apart = torch.where(real, distances.square(), 0).sum(-1) / count
    return (apart.sqrt() + 0 * norms.sum(-1)).where(count > 1, math.nan)  # NaN where a real token is not finite


@admitting
def stream_carried(
    before: Float[Tensor, "*batch token width"],
    after: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    is_normalized: bool = False,
) -> Float[Tensor, "*batch"]:
    """How much of each token's stream a block hands on, the rest being what it adds: a factor.

    The median over tokens of <x_i, y_i> / <x_i, x_i>, x before the block and y after it; with `is_normalized`, for a stream that
    passes a norm on its way (post-norm), of the cosine instead, since the norm sets the size of y.

    1 where a residual passes the stream and the update is unrelated to it; 0 where nothing passes. Invariant under
    rotation and a common scale. A median, so that no massive token decides it.

    Misleads where an update is aligned with its own stream (it may erase the stream, or write it again), as in the first block of
    many models, and says nothing of distances: read `consensus_after_norm` for those.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> stream_carried(x, 0.5 * x + torch.tensor([[0.0, 3.0], [3.0, 0.0]])).item()
    0.5

    Source: this project.

    Raises `InputError` for another shape or dtype.
    """
    _check("stream_carried", before, mask, None)
    _check("stream_carried", after, mask, None)
    if before.shape != after.shape:
        raise InputError(
            f"stream_carried: expected before and after with the same axes, got {tuple(before.shape)} and {tuple(after.shape)}. "
            "They may come from different batches. Pass both of one pass."
        )
    precision = torch.promote_types(
        before.dtype, torch.float32
    )  # a median factor needs no double, nor a copy to be made
    x, y = before.to(precision), after.to(precision)
    exponent = torch.zeros((), dtype=torch.int32, device=x.device)
    if not (is_ordinary(x, 40) and is_ordinary(y, 40)):
        (x, small), (y, large) = (at_size_one(part.double(), (-2, -1)) for part in (x, y))
        exponent = (large - small).squeeze((-2, -1)) * (not is_normalized)
    real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    product, size = (x * y).sum(-1), torch.linalg.vector_norm(x, dim=-1)
    share = product / (size * (torch.linalg.vector_norm(y, dim=-1) if is_normalized else size))
    middle: Tensor = share.where(real, math.nan).nanmedian(-1).values
    middle = times_power_of_two(middle, exponent).to(precision)
    return middle.where((product.isfinite() | ~real).all(-1), math.nan)


@admitting
def token_similarity(
    x: Float[Tensor, "*batch token width"], mask: Bool[Tensor, "*batch token"] | None = None
) -> Float[Tensor, "*batch"]:
    """How alike the directions of two tokens are on average: a cosine.

    mean over i != j of <x_i, x_j> / (||x_i|| ||x_j||). A token that is exactly 0 has no direction and is left out.

    From -1/(n-1) to 1, reached when all tokens are positive multiples of one; about 0 for isotropic tokens. Invariant
    under permutation, rotation, and a positive scale *per token*. For equal norms it is 1 - n/(n-1) consensus^2. NaN
    with fewer than two tokens that have a direction.

    Misleads on a large common mean, as every cosine does, and cannot see a collapse of norms.

    >>> round(token_similarity(torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 0.0]])).item(), 6)  # cosines 0, 1, 0
    0.333333

    Source: K. Ethayarajh, "How contextual are contextualized word representations?", arXiv 1909.00512, section 3.

    Raises `InputError` for another shape or dtype.
    """
    cloud = _cloud("token_similarity", x, mask)
    rows = at_size_one(cloud.x, (-1,))[0]  # a scale per token changes nothing, and a small one must not vanish
    norms = torch.linalg.vector_norm(rows, dim=-1)
    summed = (_reciprocal(norms).unsqueeze(-2) @ rows).squeeze(-2)
    return _mean_cosine(summed.square().sum(-1), norms)


@admitting
def row_space(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    precision: torch.dtype | None = None,
) -> Float[Tensor, "*batch direction width"]:
    """An orthonormal basis of the span of the tokens, a row a direction, and zero rows for the directions it lacks.

    The right singular vectors whose singular value exceeds `rank_tolerance`: its non-zero rows number `rank`.

    The projector basis^T basis is invariant under permutation and scale of the tokens; the basis itself is not unique.
    Misleads where `rank_gap` is small: the last directions are then rounding.

    >>> basis = row_space(torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    >>> basis.abs().sum(-2).tolist()
    [1.0, 0.0, 0.0]

    Source: linear algebra.

    Raises `InputError` for another shape or dtype, and where a real token is NaN or infinite.
    """
    return _row_space("row_space", x, mask, precision)


@admitting
def out_of_span_energy(
    update: Float[Tensor, "*batch token width"],
    embeddings: Float[Tensor, "*batch token width"] | None = None,
    mask: Bool[Tensor, "*batch token"] | None = None,
    embeddings_mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    basis: Float[Tensor, "*batch direction width"] | None = None,
    precision: torch.dtype | None = None,
) -> Float[Tensor, "*batch"]:
    """How much of what a sublayer adds lies outside the span of the embeddings: a share of the update's energy.

    ||D (I - P_U)||_F^2 / ||D||_F^2, D the update, U = row(X_0) the span of the embeddings' rows. `embeddings_mask` is
    `mask` where left out. `basis=row_space(embeddings)` instead of `embeddings` spares a decomposition per sublayer.

    0: inside the span, as for any attention with W_V W_O = c I; 1: orthogonal to it. Invariant under permutation of
    tokens, common rotation, scale. NaN for a zero update, and where the embeddings span the whole width (n >= d as a
    rule), so that nothing can lie outside.

    Misleads without its null, `null_out_of_span_energy`: a random update scores 1 - rank(X_0)/d if isotropic, and real
    ones are not. Generic attention leaves the span as well; only `nonlinear_innovation` tells it from an MLP.

    >>> embeddings, update = torch.eye(2, 4), torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    >>> round(out_of_span_energy(update, embeddings).item(), 9)  # 16 / 25
    0.64

    Source: claim of G. Cirrincione, arXiv 2604.23681; the measure is this project's.

    Raises `InputError` for another shape or dtype, or NaN in the embeddings. NaN where the update is not finite.
    """
    name = "out_of_span_energy"
    delta = _cloud(name, update, mask).x
    if embeddings is not None and embeddings_mask is None and embeddings.shape[:-1] == update.shape[:-1]:
        embeddings_mask = mask
    basis = _basis(name, embeddings, embeddings_mask, basis, precision, update).double()
    outside = delta - (delta @ basis.mT) @ basis
    energy = outside.square().sum((-2, -1)) / delta.square().sum((-2, -1))
    return energy.where(~_spans_all(basis), math.nan)


@admitting
def null_out_of_span_energy(
    second_moment: Float[Tensor, "*#batch width width"],
    embeddings: Float[Tensor, "*batch token width"] | None = None,
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    basis: Float[Tensor, "*batch direction width"] | None = None,
    precision: torch.dtype | None = None,
) -> Float[Tensor, "*batch"]:
    """The out-of-span energy that the same sublayer's updates on *other* sequences have for this span: a share.

    1 - tr(P_U S) / tr S, S = D'^T D' summed over the updates D' of the other sequences, in any scale. S is not centred,
    because the energy it is held against is not: an update common to all tokens is in both. `basis` as there.

    0..1; 1 - rank(X_0)/d for isotropic updates. Invariant under common rotation and the scale of S. NaN for S = 0, and
    where the embeddings span the whole width.

    Misleads if this sequence's own update went into S. Leave it out: S_total - D^T D.

    >>> null_out_of_span_energy(torch.diag(torch.tensor([1.0, 1.0, 2.0, 4.0])), torch.eye(2, 4)).item()  # 6 / 8
    0.75

    Source: this project.

    Raises `InputError` for another shape or dtype, or NaN in the embeddings. NaN where S is not finite.
    """
    name = "null_out_of_span_energy"
    width = second_moment.shape[-1]
    if second_moment.ndim < 2 or second_moment.shape[-2] != width:
        raise InputError(
            f"{name}: expected second_moment with axes (*batch, width, width), got shape {tuple(second_moment.shape)}. "
            "It may hold the updates themselves. Pass updates.mT @ updates."
        )
    _check(name, second_moment, None, None)
    basis = _basis(name, embeddings, mask, basis, precision, second_moment).double()
    moment = at_size_one(second_moment.double(), (-2, -1))[0]
    inside = ((basis @ moment) * basis).sum((-2, -1))
    energy = (1 - inside / moment.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=0)
    return energy.where(~_spans_all(basis), math.nan)


@admitting
def nonlinear_innovation(
    inputs: Float[Tensor, "*batch token feature"],
    outputs: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> Float[Tensor, "*batch"]:
    """How much of a sublayer's output no affine map of its input can supply: a share of the output's variance.

    ||Y - X B - 1c||_F^2 / ||Y - 1m||_F^2 over held-out tokens. (B, c) is the least-squares affine map, m the mean
    output, of the other tokens; directions of X below its rank tolerance are left out of the fit, no ridge. A quarter
    of the real tokens, drawn with `seed`, is held out.

    0: the output is affine in the input, as attention is in [A_1 X ... A_H X]; 1: an affine map says no more than the
    mean. Above 1 it overfitted. Invariant under invertible affine maps of the input, and rotation, scale and shift of
    the output. NaN for a constant output and where a real token is not finite.

    Misleads with few tokens: pool sequences (`x.flatten(0, -2)`) until there are ten times as many as features. Tokens
    of one sequence are alike, so held-out ones are easier than new text. One massive token can decide everything.

    >>> x = torch.linspace(-1, 1, 41, dtype=torch.float64).unsqueeze(-1)
    >>> round(nonlinear_innovation(x, 3 * x + 2).item(), 9), nonlinear_innovation(x, x.square()).item() > 0.9
    (0.0, True)

    Source: this project; compare A. Razzhigaev et al., "Your Transformer is Secretly Linear", arXiv 2405.12250.

    Raises `InputError` with fewer real tokens than a fit needs, saying how many, and for another shape or dtype.
    """
    name = "nonlinear_innovation"
    source, target = (_cloud(name, tokens, mask, precision) for tokens in (inputs, outputs))
    if inputs.shape[:-1] != outputs.shape[:-1]:
        raise InputError(
            f"{name}: expected inputs and outputs with the same axes (*batch, token), got {tuple(inputs.shape[:-1])} "
            f"and {tuple(outputs.shape[:-1])}. They may come from different batches. Pass both of one pass."
        )
    features = inputs.shape[-1]
    needed = max(4, math.ceil((features + 1) / (1 - _HELD_OUT_SHARE)))
    fewest = int(source.tokens.min()) if source.tokens.numel() else needed
    if fewest < needed:
        raise InputError(
            f"{name}: expected at least {needed} real tokens for inputs of width {features}, got {fewest}. "
            f"Fewer do not determine an affine map and leave {_HELD_OUT_SHARE:.0%} to score it on. "
            "Pool the tokens of several sequences: x.flatten(0, -2)."
        )
    batch = source.tokens.shape
    pairs = [part.reshape(math.prod(batch), *part.shape[len(batch) :]) for part in (source.x, target.x, source.real)]
    shares = [
        _unexplained_share(x[real], y[real], seed, max(source.eps, target.eps))
        for x, y, real in zip(*pairs, strict=True)
    ]
    return torch.tensor(shares, dtype=torch.float64, device=inputs.device).reshape(batch)


@dataclass(frozen=True)
class WithoutMassiveTokens:
    """The norm-sensitive measures without a sequence's massive tokens, `tokens_left_out` of them; `*batch` float64."""

    tokens_left_out: Float[Tensor, "*batch"]
    effective_rank: Float[Tensor, "*batch"]
    stable_rank: Float[Tensor, "*batch"]
    participation_ratio: Float[Tensor, "*batch"]
    consensus_distance: Float[Tensor, "*batch"]
    token_similarity: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class CloudMeasures:
    """Every measure of a token cloud, `*batch` float64 each: the ranks too, so that NaN can say undefined.

    `tokens` counts the real tokens and is never NaN. `without_massive` repeats what depends on norms.
    """

    tokens: Float[Tensor, "*batch"]
    rank: Float[Tensor, "*batch"]
    affine_rank: Float[Tensor, "*batch"]
    attainable_rank: Float[Tensor, "*batch"]
    attainable_affine_rank: Float[Tensor, "*batch"]
    rank_gap: Float[Tensor, "*batch"]
    effective_rank: Float[Tensor, "*batch"]
    stable_rank: Float[Tensor, "*batch"]
    participation_ratio: Float[Tensor, "*batch"]
    consensus_distance: Float[Tensor, "*batch"]
    token_similarity: Float[Tensor, "*batch"]
    consensus_after_norm: Float[Tensor, "*batch"]
    without_massive: WithoutMassiveTokens


@admitting
@torch.no_grad()
def cloud_measures(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    precision: torch.dtype | None = None,
    massive_tokens: int | None = None,
    read_centred: bool = True,
) -> CloudMeasures:
    """All measures of a token cloud from one Gram matrix and one decomposition: what a probe pass calls at each site.

    G = X X^T (or X^T X if that is smaller) in float64 gives every figure; the definitions are those of the functions of
    the same names, which it equals to rounding. G squares the condition number, so where that could matter (a singular
    value below 1e-6 of the largest, or one at the tolerance) it takes the singular values of X itself. The affine rank
    mostly costs nothing: eigenvalues of CGC interlace with those of G (Cauchy), so full token rank n implies affine
    rank n - 1. The rest is decided by a Cholesky factorisation or a second spectrum, and by the singular values of
    centred X where one of those is at the tolerance.

    A token is massive if its norm exceeds 10 times the (lower) median token norm of its sequence, a rule of ours; with
    `massive_tokens=k` the k of largest norm are. `without_massive` leaves them out; where none is, it repeats the
    figures. `read_centred` is the `centred` of `consensus_after_norm`.

    A sequence with NaN or infinity in a real token is NaN throughout (except `tokens`); nothing is raised for it. A fully masked
    one has rank 0 and NaN for the rest.

    Misleads where the single measures do. The rule for massive tokens is blind if they are more than half of all.

    >>> x = torch.eye(4)
    >>> x[0] *= 1000
    >>> cloud = cloud_measures(x)
    >>> round(cloud.stable_rank.item(), 3), round(cloud.without_massive.stable_rank.item(), 3), cloud.rank.item()
    (1.0, 3.0, 4.0)

    Source: as in the single measures. M. Sun, X. Chen, J. Z. Kolter, Z. Liu, "Massive Activations in Large Language
    Models", arXiv 2402.17762, section 2, call a single *activation* massive above 100 and about 1,000 times the median
    magnitude; token norms differ less, because a norm sums over the width.

    Raises `InputError` for another shape or dtype.
    """
    name = "cloud_measures"
    _check(name, x, mask, precision)
    if massive_tokens is not None and massive_tokens < 0:
        raise InputError(
            f"{name}: expected massive_tokens of at least 0, got {massive_tokens}. "
            "It counts the tokens to leave out of each sequence. Pass 0 for none, None for the rule."
        )
    batch = x.shape[:-2]
    x = x.reshape(math.prod(batch), *x.shape[-2:])
    real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask.reshape(x.shape[:-1])
    if (real[:, 1:] > real[:, :-1]).any():  # left-padded, or with holes: real tokens first, so that a slice holds them
        real, places = real.sort(dim=1, descending=True, stable=True)
        x = x.gather(-2, places.unsqueeze(-1).expand_as(x))
    eps = torch.finfo(precision or x.dtype).eps
    if x.dtype == torch.float64 and x.numel():
        x = at_size_one(_float64(x, real), (-2, -1))[0]
    if x.shape[-2] > x.shape[-1]:
        x = _float64(x, real)
    measured, without, gram = _measured(x, real, eps, massive_tokens)
    measured["consensus_after_norm"] = _consensus_after_norm(x, real, gram, read_centred)
    measured, without = ({key: value.reshape(batch) for key, value in part.items()} for part in (measured, without))
    return CloudMeasures(**measured, without_massive=WithoutMassiveTokens(**without))


@admitting
@torch.no_grad()
def cloud_ranks(
    x: Float[Tensor, "*batch token width"],
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`rank` and `affine_rank` as `cloud_measures` has them, where nothing else of it is wanted: mostly without a spectrum.

    G - t I, G the smaller Gram matrix and t above the squared tolerance, has a Cholesky factor only if all eigenvalues of G are
    above t: then the rank is n or d. It costs a tenth of the eigenvalues. With rank n the affine rank is n - 1; with rank d it is
    d where the centred Gram matrix passes as well. Clouds that fail are left to `cloud_measures`.

    Ranges, invariances and NaN as there; it misleads where that does.

    >>> [ranks.item() for ranks in cloud_ranks(torch.eye(4))]
    [4.0, 3.0]

    Source: linear algebra (Sylvester, Cauchy). Raises `InputError` for another shape or dtype.
    """
    name = "cloud_ranks"
    _check(name, x, mask, precision)
    batch, (tokens, width) = x.shape[:-2], x.shape[-2:]
    x = x.reshape(math.prod(batch), tokens, width)
    real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask.reshape(x.shape[:-1])
    eps, X = torch.finfo(precision or x.dtype).eps, _float64(x, real)
    if x.dtype == torch.float64 and x.numel():
        X = at_size_one(X, (-2, -1))[0]
    count, side = real.sum(1), min(tokens, width)
    G = X @ X.mT if tokens <= width else X.mT @ X
    energy = G.diagonal(dim1=-2, dim2=-1).sum(1)
    # ||X||_F is at least sigma_1. The second part covers the rounding of G, of its centring, and of the factorisation.
    tolerance = storage_noise(eps, energy.sqrt(), count.double(), width)
    tolerance = tolerance + count.clamp(min=width) * _EPS_64 * energy.sqrt()
    least = (tolerance.square() + 8 * max(tokens, width) * _EPS_64 * energy).nan_to_num()  # 0 where there is no token

    def exceeds(gram: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(gram - least[:, None, None] * identity).info == 0

    identity = torch.eye(side, dtype=G.dtype, device=G.device)
    if tokens <= width:
        G = G + torch.diag_embed((~real) * energy[:, None])  # more than `least`: padded rows hide nothing
        known = exceeds(G) & energy.isfinite()
        ranks, affine = count.double(), (count - 1).double()
    else:
        full = exceeds(G) & energy.isfinite()
        total = X.sum(-2)
        centred = G - total.unsqueeze(-1) * (total / count[:, None]).unsqueeze(-2)
        known = full & exceeds(centred)
        ranks = affine = torch.full_like(energy, width)
        square = full & ~known & (count == width)
        affine = torch.where(square, width - 1, affine)
        known = known | square
    rows = (~known).nonzero().flatten()
    if len(rows):
        apart = cloud_measures(x[rows], real[rows], precision=precision)
        ranks = ranks.index_put((rows,), apart.rank.to(ranks))
        affine = affine.index_put((rows,), apart.affine_rank.to(affine))
    return ranks.reshape(batch), affine.reshape(batch)


class _Cloud(NamedTuple):
    """A checked cloud: float64 with padded rows zero, which rows are real, how many, and the precision's epsilon. It is `x`
    times 2^exponent: numbers whose squares are out of range are brought to size one."""

    x: Tensor
    real: Tensor
    tokens: Tensor
    eps: float
    exponent: Tensor


def _check(function: str, x: Tensor, mask: Tensor | None, precision: torch.dtype | None) -> None:
    if x.ndim < 2 or 0 in x.shape[-2:] or not x.is_floating_point():
        raise InputError(
            f"{function}: expected a floating-point tensor with axes (*batch, token, width), got {x.dtype} of shape "
            f"{tuple(x.shape)}. It may hold token ids or one token's vector. Pass hidden states."
        )
    if mask is None:
        pass
    elif mask.dtype != torch.bool:
        raise InputError(
            f"{function}: expected a mask of torch.bool, True = real token, got {mask.dtype}. "
            "An additive or 0/1 attention mask reads differently. Pass attention_mask.bool() of the 0/1 mask."
        )
    elif mask.shape != x.shape[:-1]:
        raise InputError(
            f"{function}: expected a mask with axes (*batch, token) = {tuple(x.shape[:-1])}, "
            f"got shape {tuple(mask.shape)}. It may belong to another batch. Pass the mask of these tokens."
        )
    if precision is not None and not precision.is_floating_point:
        raise InputError(
            f"{function}: expected a floating-point precision, got {precision}. Quantised weights are computed with in "
            "another dtype. Pass the dtype of the hidden states."
        )


def _cloud(function: str, x: Tensor, mask: Tensor | None, precision: torch.dtype | None = None) -> _Cloud:
    _check(function, x, mask, precision)
    eps = torch.finfo(precision or x.dtype).eps
    real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    double = x.double() if mask is None else _float64(x, mask)
    exponent = torch.zeros(x.shape[:-2], dtype=torch.int32, device=x.device)
    if x.dtype == torch.float64 and x.numel():  # squares of the other formats stay within float64
        double, found = at_size_one(double, (-2, -1))
        exponent = found.squeeze((-2, -1))
    return _Cloud(double, real, real.sum(-1), eps, exponent)


def _float64(x: Tensor, real: Tensor) -> Tensor:
    if bool(real.all()):
        return x.double()
    # `where`, not a product: 0 times NaN in a padded row would be NaN.
    return torch.where(real.unsqueeze(-1), x, 0).double()


def _basis(
    function: str,
    embeddings: Tensor | None,
    mask: Tensor | None,
    basis: Tensor | None,
    precision: torch.dtype | None,
    update: Tensor,
) -> Tensor:
    """The basis given, or that of the embeddings, once it is sure that it fits the update."""
    given = embeddings if basis is None else basis
    if given is None or (embeddings is not None and basis is not None):
        raise InputError(
            f"{function}: expected embeddings or basis, got {'neither' if given is None else 'both'}. "
            "The span can come from one of them. Pass basis=row_space(embeddings) where it is used more than once."
        )
    leading = (given.shape[:-2], update.shape[:-2])
    if given.shape[-1] != update.shape[-1] or (leading[0] != leading[1] and () not in leading):
        raise InputError(
            f"{function}: expected embeddings or basis with the update's axes batch and width, got "
            f"{tuple(given.shape)} against {tuple(update.shape)}. They may come from different sites or batches. "
            "Pass those of the same sequences."
        )
    return _row_space(function, given, mask, precision) if basis is None else basis


def _row_space(function: str, x: Tensor, mask: Tensor | None, precision: torch.dtype | None) -> Tensor:
    """`row_space`, refusing under the name of the function that was called."""
    cloud = _cloud(function, x, mask, precision)
    _refuse_nan(function, cloud.x)
    _, values, directions = torch.linalg.svd(cloud.x, full_matrices=False)
    above = values > _tolerance(values, cloud.tokens, x.shape[-1], cloud.eps).unsqueeze(-1)
    return torch.where(above.unsqueeze(-1), directions, 0)


def _spans_all(basis: Tensor) -> Tensor:
    return basis.square().sum((-2, -1)).round() == basis.shape[-1]  # orthonormal rows: the sum of squares counts them


def _centred(x: Tensor, real: Tensor) -> Tensor:
    """CX. Twice, because the mean's own rounding is larger than the cloud when the tokens agree to the last digits."""
    tokens = real.sum(-1)[..., None, None]
    for _ in range(2):
        x = torch.where(real.unsqueeze(-1), x - x.sum(-2, keepdim=True) / tokens, 0)
    return x


def _frobenius(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1)).sqrt()


def _reciprocal(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms, 0)


def _singular_values(x: Tensor) -> Tensor:
    """Descending; NaN for a matrix with NaN or infinity, where LAPACK would fail for the whole batch."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values: Tensor = torch.linalg.svdvals(x.where(finite, 0))
    return values.where(finite.squeeze(-1), math.nan)


def _tolerance(values: Tensor, tokens: Tensor, width: int, eps: float) -> Tensor:
    tokens = tokens.clamp(min=1).double()
    storage = storage_noise(eps, torch.linalg.vector_norm(values, dim=-1), tokens, width)
    return storage + tokens.clamp(min=width) * _EPS_64 * values[..., 0]


def _count_above(values: Tensor, tolerance: Tensor) -> Tensor:
    return (values > tolerance.unsqueeze(-1)).sum(-1)


def _rank(function: str, x: Tensor, mask: Tensor | None, precision: torch.dtype | None, *, affine: bool) -> Tensor:
    cloud = _cloud(function, x, mask, precision)
    _refuse_nan(function, cloud.x)
    values = _singular_values(cloud.x)
    tolerance = _tolerance(values, cloud.tokens, x.shape[-1], cloud.eps)
    return _count_above(_singular_values(_centred(cloud.x, cloud.real)) if affine else values, tolerance)


def _refuse_nan(function: str, x: Tensor) -> None:
    broken = ~x.isfinite().all(-1).all(-1)
    if broken.any():
        place = f" at batch index {tuple(broken.nonzero()[0].tolist())}" if broken.ndim else ""
        raise InputError(
            f"{function}: expected finite real tokens, got NaN or infinity in the sequence{place}. "
            "A layer before this site overflowed, or padding is missing from the mask. "
            "Pass the mask, or call cloud_measures, which marks such sequences with NaN."
        )


def _unexplained_share(x: Tensor, y: Tensor, seed: int, eps: float) -> float:
    """The share of y's held-out variance that the affine map fitted to the other rows leaves."""
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.nan
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    quarter = int(len(x) * _HELD_OUT_SHARE)
    held_out, fitted = drawn[:quarter], drawn[quarter:]
    origin, mean = x[fitted].mean(0), y[fitted].mean(0)
    total = y[held_out] - mean
    if _frobenius(total) <= eps * _frobenius(y[held_out]):  # constant up to rounding: no variance to explain
        return math.nan
    Q, R = torch.linalg.qr(x[fitted] - origin)
    U, values, directions = torch.linalg.svd(R)
    tolerance = _tolerance(_singular_values(x[fitted]), torch.tensor(len(fitted), device=x.device), x.shape[1], eps)
    kept = values > tolerance
    slopes = directions[kept].mT @ ((U[:, kept].mT @ (Q.mT @ (y[fitted] - mean))) / values[kept].unsqueeze(-1))
    rest = total - (x[held_out] - origin) @ slopes
    return (_frobenius(rest) / _frobenius(total)).item() ** 2


def _entropy_rank(values: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1)
    return entropy.exp()


def _participation_ratio(gram: Tensor) -> Tensor:
    return (gram.diagonal(dim1=-2, dim2=-1).sum(-1) / _frobenius(gram)).square()


def _mean_cosine(summed: Tensor, norms: Tensor) -> Tensor:
    """From the squared length of the sum of the unit tokens, n of which is their cosines with themselves."""
    n = (norms > 0).sum(-1)
    return ((summed - n) / (n * (n - 1))).where(n > 1, math.nan)


def _gap(values: Tensor, ranks: Tensor, attainable: Tensor) -> Tensor:
    last = values.gather(-1, (ranks - 1).clamp(min=0).unsqueeze(-1))
    below = values.gather(-1, ranks.clamp(max=values.shape[-1] - 1).unsqueeze(-1))
    full = (ranks == attainable) & (ranks > 0)  # padded rows add singular values that are no part of the cloud
    return (last / below).squeeze(-1).masked_fill(full, math.inf)


# What `cloud_measures` is made of. All of it works on a flat batch (sequence, token, width) with the real tokens first.
# Where tokens outnumber the width, `x` is float64 with padded rows zero, and Grams are width by width.

# Neighbouring sequences, the side to which their Grams are cut, and whether that leaves padded rows in.
_Groups = list[tuple[slice, int, bool]]


def _groups(x: Tensor, tokens: Tensor) -> _Groups:
    """Sequences to decompose in one call: neighbours that agree on ceil(n / step)."""
    if x.shape[-2] > x.shape[-1]:
        return [(slice(None), x.shape[-1], False)]
    step, groups, start = _length_step(x.device), [], 0
    for _, members in itertools.groupby(tokens.tolist(), key=lambda n: -(-n // step)):
        lengths = list(members)
        groups.append((slice(start, start + len(lengths)), max(lengths), min(lengths) < max(lengths)))
        start += len(lengths)
    return groups


def _length_step(device: torch.device) -> int:
    # LAPACK takes one matrix after another anyway, so on the CPU a group holds one length and no padding: the cost is
    # cubic in the length. An accelerator is better off with a few larger groups.
    return 1 if device.type == "cpu" else 32


def _measured(
    x: Tensor, real: Tensor, eps: float, massive_tokens: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The fields of `CloudMeasures` and those of `WithoutMassiveTokens`, and the Gram matrices."""
    tokens, width = real.sum(1), x.shape[-1]
    groups = _groups(x, tokens)
    found = gram = _gram(x, real, groups)
    finite = gram.diagonal(dim1=-2, dim2=-1).sum(1).isfinite()
    if not finite.all():  # measured as zero clouds, for LAPACK refuses the whole batch; NaN is put back at the end
        gram = gram.where(finite[:, None, None], 0)
        x = x.where(finite[:, None, None], 0)
    attainable = tokens.clamp(max=width)
    squares = _eigenvalues(gram, attainable, groups)
    tolerance = _tolerance(squares.sqrt(), tokens, width, eps)
    values = _resolved(x, real, squares, attainable, squares[:, 0], tolerance)
    ranks = _count_above(values, tolerance)
    norms = _token_norms(x, gram)
    sensitive = _norm_sensitive(x, real, gram, norms, values)
    measured = {
        "rank": ranks,
        "affine_rank": _affine_ranks(x, real, gram, ranks, squares[:, 0], tolerance),
        "attainable_rank": attainable,
        "attainable_affine_rank": (tokens - 1).clamp(0, width),
        "rank_gap": _gap(values, ranks, attainable),
        **sensitive,
    }
    massive = _massive(norms, real, massive_tokens)
    left_out = massive.sum(1)
    without = {"tokens_left_out": left_out, **sensitive}
    rows = left_out.nonzero().flatten()
    if len(rows):
        again = _norm_sensitive_again(x[rows], real[rows] & ~massive[rows])
        without |= {key: sensitive[key].index_put((rows,), value) for key, value in again.items()}
    measured, without = ({key: value.double() for key, value in part.items()} for part in (measured, without))
    if not finite.all():
        measured, without = (
            {key: value.where(finite, math.nan) for key, value in part.items()} for part in (measured, without)
        )
    return {"tokens": tokens.double(), **measured}, without, found


def _consensus_after_norm(x: Tensor, real: Tensor, gram: Tensor, centred: bool) -> Tensor:
    """From the Gram, or from sums over the tokens where these outnumber the width, as long as the differences keep their digits;
    else from the cloud itself.

    With weights w_i = 1 / ||x_i|| the unit rows sum to a vector of the squared length w^T G w, and freed of their means m_i
    over d features ||x_i||^2 is G_ii - d m_i^2, the squared length w^T G w - d <w, m>^2. w^T G w = ||X^T w||^2.
    """
    is_long = x.shape[-2] > x.shape[-1]
    count = real.sum(1)
    squares = torch.linalg.vector_norm(x, dim=-1).square() if is_long else gram.diagonal(dim1=-2, dim2=-1)
    mean = torch.where(real, x.mean(-1, dtype=torch.float64), 0) if centred else torch.zeros_like(squares)
    freed = squares - x.shape[-1] * mean.square()
    weights = _reciprocal(freed.sqrt())  # 0 in padded rows; where nothing is left it does not count
    if is_long:
        summed = (weights.unsqueeze(-2) @ x).square().sum((-2, -1))
    else:
        summed = (weights.unsqueeze(-2) @ gram @ weights.unsqueeze(-1)).sum((-2, -1))
    apart = 1 - (summed - x.shape[-1] * (weights * mean).sum(1).square()) / count.square()
    kept = ((freed > 1e-6 * squares) | ~real).all(1) & (apart > 1e-4)  # false for NaN
    apart = apart.sqrt().where(count > 1, math.nan)
    rows = (~kept & (count > 1)).nonzero().flatten()
    if len(rows):
        apart[rows] = consensus_after_norm(x[rows], real[rows], centred=centred)
    return apart.where(squares.sum(1).isfinite(), math.nan)


def _gram(x: Tensor, real: Tensor, groups: _Groups) -> Tensor:
    if x.shape[-2] > x.shape[-1]:
        return column_gram(x)
    gram = torch.zeros(*real.shape, real.shape[1], dtype=torch.float64, device=x.device)
    for sequences, side, padded in groups:
        part = x[sequences, :side]
        part = _float64(part, real[sequences, :side]) if padded else part.double()
        gram[sequences, :side, :side] = column_gram(part.mT)
    return gram


def _eigenvalues(gram: Tensor, attainable: Tensor, groups: _Groups) -> Tensor:
    """Descending, as many as the `attainable` number allows; the places beyond are 0."""
    values = gram.new_zeros(gram.shape[:-1])
    found = eigenvalues([gram[sequences, :side, :side] for sequences, side, _ in groups])
    for (sequences, side, _), ascending in zip(groups, found, strict=True):
        values[sequences, :side] = ascending.flip(1)
    return values.clamp(min=0).where(_places(values, attainable), 0)


def _places(values: Tensor, attainable: Tensor) -> Tensor:
    return torch.arange(values.shape[1], device=values.device) < attainable[:, None]


def _resolved(
    x: Tensor, real: Tensor, squares: Tensor, attainable: Tensor, largest: Tensor, tolerance: Tensor
) -> Tensor:
    """Singular values: roots of the Gram's eigenvalues where those can be trusted, else taken from `x` itself.

    The Gram errs by about max(n, d) eps of the `largest` eigenvalue of X: an eigenvalue of 1e-12 of that is known to
    1 % or so, one below is not worth much, and one so close to the squared tolerance may be on its wrong side.
    """
    _, tokens, width = x.shape
    largest, tolerance = largest[:, None], tolerance[:, None]
    noise = max(tokens, width) * _EPS_64 * largest
    unsure = (squares < 1e-12 * largest) | ((squares - tolerance.square()).abs() < noise)
    values = squares.sqrt()
    rows = (unsure & _places(values, attainable)).any(1).nonzero().flatten()
    if len(rows):
        values[rows] = _exact_values(x[rows], real[rows])
    return values


def _exact_values(x: Tensor, real: Tensor) -> Tensor:
    """The singular values of clouds with the real tokens first, from these alone; the places beyond are 0."""
    count, tokens, width = x.shape
    values = x.new_zeros(count, min(tokens, width), dtype=torch.float64)
    step = _length_step(x.device)
    lengths = (-(-real.sum(1) // step) * step).clamp(max=tokens)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        cut = _float64(x[rows, :length], real[rows, :length])
        # Upright: of a matrix that is wider than high LAPACK takes them at twice the price.
        values[rows, : min(length, width)] = torch.linalg.svdvals(cut.mT if length < width else cut)
    return values


def _affine_ranks(x: Tensor, real: Tensor, gram: Tensor, ranks: Tensor, largest: Tensor, tolerance: Tensor) -> Tensor:
    """By interlacing rank - 1 or rank; never more than n - 1, so rank n decides it. The others are looked at."""
    affine = (ranks - 1).clamp(min=0)
    tokens, (_, most, width) = real.sum(1), x.shape
    rows = (ranks < tokens).nonzero().flatten()
    if len(rows) and most > width:
        # X^T C X minus a multiple of I has a Cholesky factor iff all its eigenvalues are above: the usual case with
        # more tokens than width, at a fifth of a spectrum's price. X^T C X = G - s s^T / n, s the sum of the tokens, errs by no
        # more than G itself, for s^T s / n is at most its largest eigenvalue.
        least = tolerance[rows].square() + 4 * most * _EPS_64 * largest[rows]

        def is_full(row: int, shift: Tensor) -> bool:
            total = x[row].sum(0)
            centred = torch.addr(gram[row], total, total / tokens[row], alpha=-1)
            centred.diagonal().sub_(shift)
            return bool(torch.linalg.cholesky_ex(centred).info == 0)

        several = list(zip(rows.tolist(), least, strict=True))  # one by one: in the cache
        if x.device.type == "cpu":
            found = shared_out([functools.partial(is_full, *each) for each in several])
        else:
            found = [is_full(*each) for each in several]
        full = torch.tensor(found, device=rows.device)
        affine[rows[full]] = width
        rows = rows[~full]
    if len(rows):
        attainable = tokens[rows] - 1
        whole: _Groups = [(slice(None), min(most, width), False)]
        centred = _centred(_float64(x[rows], real[rows]), real[rows])
        squares, least = _eigenvalues(_gram(centred, real[rows], whole), attainable, whole), tolerance[rows, None]
        # Only on which side of the tolerance they are is asked, and the Gram errs by as much as its own largest says.
        noise = max(most, width) * _EPS_64 * squares[:, :1]
        unsure = ((squares - least.square()).abs() <= noise) & _places(squares, attainable)
        values, again = squares.sqrt(), unsure.any(1).nonzero().flatten()
        if len(again):
            values[again] = _exact_values(centred[again], real[rows][again])
            values = values.where(_places(values, attainable), 0)
        affine[rows] = _count_above(values, tolerance[rows])
    return affine


def _token_norms(x: Tensor, gram: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1) if x.shape[-2] > x.shape[-1] else gram.diagonal(dim1=-2, dim2=-1).sqrt()


def _norm_sensitive(x: Tensor, real: Tensor, gram: Tensor, norms: Tensor, values: Tensor) -> dict[str, Tensor]:
    tokens, energy, unit = real.sum(1), norms.square().sum(1), _reciprocal(norms)
    if x.shape[-2] > x.shape[-1]:
        common = x.sum(-2).square().sum(-1)
        summed = (unit.unsqueeze(-2) @ x).square().sum((-2, -1))
    else:
        common = gram.sum((-2, -1))
        summed = (unit.unsqueeze(-2) @ gram @ unit.unsqueeze(-1)).sum((-2, -1))
    apart = 1 - common / (tokens * energy)
    distance = apart.sqrt().where(tokens > 1, math.nan)
    rows = ((apart < 1e-4) & (tokens > 1)).nonzero().flatten()  # there the difference has lost 4 digits
    if len(rows):
        distance[rows] = _frobenius(_centred(_float64(x[rows], real[rows]), real[rows])) / energy[rows].sqrt()
    return {
        "effective_rank": _entropy_rank(values),
        "stable_rank": energy / values[:, 0].square(),
        "participation_ratio": _participation_ratio(gram),
        "consensus_distance": distance,
        "token_similarity": _mean_cosine(summed, norms),
    }


def _norm_sensitive_again(x: Tensor, real: Tensor) -> dict[str, Tensor]:
    """The same from the start, for the tokens left over, which may lie anywhere."""
    real, places = real.sort(dim=1, descending=True, stable=True)
    x = _float64(x.gather(-2, places.unsqueeze(-1).expand_as(x)), real)
    _, tokens, width = x.shape
    whole: _Groups = [(slice(None), min(tokens, width), False)]
    gram, attainable = _gram(x, real, whole), real.sum(1)
    squares = _eigenvalues(gram, attainable, whole)
    values = _resolved(x, real, squares, attainable, squares[:, 0], torch.zeros_like(squares[:, 0]))
    return _norm_sensitive(x, real, gram, _token_norms(x, gram), values)


def _massive(norms: Tensor, real: Tensor, count: int | None) -> Tensor:
    """Which tokens are massive: by the rule, or the `count` of largest norm. Padded rows have norm 0 and come last."""
    if count is not None:
        position = norms.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return real & (position < count)
    middle = (real.sum(1, keepdim=True) - 1).clamp(min=0) // 2
    median = norms.where(real, math.inf).sort(1).values.gather(1, middle)
    return real & (median > 0) & (norms > _MASSIVE_RATIO * median)
