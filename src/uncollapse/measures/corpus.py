"""The cloud of a whole corpus: one point a sequence, or one a token, and what its principal directions say.

`geometry` looks inside one sequence. Here the points come from all sequences, pooled: the mean of a sequence's tokens, its last
token, its first, or every token. A model whose sequences all lie in a few directions has collapsed, however far apart the tokens
of one sequence are; people who train embedding models know this as dimensional collapse.

A cloud is a `RunningCloud`. While it keeps all of its points the spectra come from those, otherwise from its second moment, or
from a sample of its points where the stream is wider than that (`running.WIDEST`). Everything is computed in float64.

Only directions above the rounding of the format count, as in `geometry.rank_tolerance`: in a collapsed cloud the rest is noise,
which has every direction there is.

When not to use it: with a handful of sequences. n points have at most n - 1 directions of their own, so read every figure beside
the attainable one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import InputError
from uncollapse.measures.admission import admitting
from uncollapse.measures.line_fit import LineFit, line_fit
from uncollapse.measures.running import RunningCloud
from uncollapse.measures.storage_noise import storage_noise
from uncollapse.measures.symmetric_eigenvalues import eigenvalues

_EPS_64 = torch.finfo(torch.float64).eps
_LAW_FROM, _LAW_TO, _LAW_LEAST = 4, 100, 10  # the eigenvalues that a power law is fitted to, and how few are enough
# Numbers of clouds that are decomposed together: with more, what is worked out on the way leaves the cache.
_AT_ONCE: Final = 2**19
HELD: Final = 0.9  # of the variance: what the principal directions that a cloud is compared by hold


class Spectrum(NamedTuple):
    """Singular values of a cloud X [n, d] and of the centred one, descending; those at the level of rounding are 0."""

    whole: Tensor
    centred: Tensor


@dataclass(frozen=True)
class CorpusMeasures:
    """The figures of one cloud. `points` n; `sampled`: how many of them the spectrum comes from, where those are not all. A figure
    is None where it is undefined: for fewer than two points, and for what concerns the spread of points that are all equal."""

    points: int
    sampled: int | None
    attainable_rank: int
    attainable_centred_rank: int
    effective_rank: float | None
    centred_effective_rank: float | None
    participation_ratio: float | None
    stable_rank: float | None
    alpha: float | None
    alpha_low: float | None
    alpha_high: float | None
    k90: int | None
    k95: int | None
    top_share: float | None
    top_ten_share: float | None
    isoscore: float | None
    mean_cosine: float | None
    mean_share: float | None


@dataclass(frozen=True)
class Comparison:
    """What lies between two clouds of the same points, before and after a block; see the functions of the same names."""

    novelty: float | None
    cka: float | None
    unbiased_cka: float | None
    cosine: float | None


# One spectrum ---------------------------------------------------------------------------------------------------------


@admitting
def effective_rank(values: Float[Tensor, "*batch direction"]) -> Float[Tensor, "*batch"]:
    """How many directions a cloud uses, counting each by its share: a number of directions.

    exp(-sum_i p_i ln p_i), p_i = sigma_i / sum_j sigma_j, over the singular values sigma_i of the cloud (0 ln 0 = 0). From the
    singular values of the uncentred cloud this is RankMe without its epsilon; from those of the centred one the common mean does
    not count.

    From 1 (one direction) to min(n, d), reached when all sigma_i are equal. 0 for a cloud without any direction, such as a
    centred one of equal points. Invariant under rotation and scale; the centred one under translation.

    Misleads across different n: with more sequences it grows. One direction of enormous size, as a common mean often is,
    hides the others from the uncentred one.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])).item(), 9)
    2.0

    Source: Q. Garrido, R. Balestriero, L. Najman, Y. LeCun, "RankMe: Assessing the downstream performance of pretrained
    self-supervised representations by their rank", arXiv 2210.02885, eq. 1 to 3; O. Roy, M. Vetterli, "The effective rank", 2007.
    """
    values = values.double()
    total = values.sum(-1, keepdim=True)
    found: Tensor = torch.special.entr(values / total).sum(-1).exp()
    return found.where(total.squeeze(-1) > 0, 0)


@admitting
def participation_ratio(values: Float[Tensor, "*batch direction"]) -> Float[Tensor, "*batch"]:
    """How many directions hold the variance: a number of directions.

    (sum_i lambda_i)^2 / sum_i lambda_i^2, lambda_i = sigma_i^2 the variances along the principal directions.

    From 1 to min(n - 1, d). Invariant under rotation, scale and translation. NaN for a cloud without spread.

    Misleads where one variance is enormous: the others hardly count, many as they may be. `effective_rank` counts them more.

    >>> round(participation_ratio(torch.tensor([1.0, 1.0, 0.0])).item(), 9)
    2.0

    Source: P. Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", bioRxiv 214262, eq. 2.
    """
    variances = values.double().square()
    return variances.sum(-1).square() / variances.square().sum(-1)


@admitting
def isoscore(values: Float[Tensor, "*batch direction"], width: int) -> Float[Tensor, "*batch"]:
    """How evenly the variance fills all `width` dimensions: a share.

    With v = sqrt(d) lambda / ||lambda||_2 and delta = ||v - 1||_2 / sqrt(2 (d - sqrt d)) it is ((d - delta^2 (d - sqrt d))^2 - d) /
    (d (d - 1)), lambda the variances along the principal directions, d the width. That is (PR - 1)/(d - 1) with PR the
    participation ratio: sum v = sqrt(d PR) and ||v||^2 = d.

    From 0 (one direction) to 1 (the same in every one). Invariant under rotation, scale and translation. NaN for a cloud without
    spread, and for width 1.

    Misleads for n <= d points: directions that so few points cannot have count as empty. Then it is at most (n - 2)/(d - 1).

    >>> round(isoscore(torch.tensor([1.0, 1.0, 1.0]), 3).item(), 9), round(isoscore(torch.tensor([1.0]), 3).item(), 9)
    (1.0, 0.0)

    Source: W. Rudman, N. Gillman, T. Rayne, C. Eickhoff, "IsoScore: Measuring the Uniformity of Embedding Space Utilization",
    arXiv 2108.07344, algorithm 1.
    """
    return (participation_ratio(values) - 1) / (width - 1 if width > 1 else math.nan)


@admitting
def directions_holding(values: Float[Tensor, "*batch direction"], share: float) -> Int[Tensor, "*batch"]:
    """The fewest principal directions that hold `share` of the variance: a count.

    min{k : sum_{i<=k} lambda_i >= share sum_i lambda_i}. From 1 to min(n - 1, d). Invariant under rotation, scale and translation.

    >>> [directions_holding(torch.tensor([3.0, 1.0, 0.1]), share).item() for share in (0.89, 0.95)]
    [1, 2]

    Source: principal component analysis.
    """
    variances = values.double().square()
    held = variances.cumsum(-1)
    # A sum in another order may differ in its last digits: what is reached but for those is reached.
    return (held < share * held[..., -1:] * (1 - _EPS_64 * held.shape[-1])).sum(-1) + 1


@admitting
def top_share(values: Float[Tensor, "*batch direction"], count: int) -> Float[Tensor, "*batch"]:
    """The share of the variance that the first `count` principal directions hold.

    sum_{i<=count} lambda_i / sum_i lambda_i. From count/min(n - 1, d) to 1. NaN for a cloud without spread.

    >>> round(top_share(torch.tensor([3.0, 1.0]), 1).item(), 9)
    0.9

    Source: principal component analysis.
    """
    variances = values.double().square()
    return variances[..., :count].sum(-1) / variances.sum(-1)


@admitting
def power_law(values: Float[Tensor, " direction"]) -> LineFit:
    """The exponent alpha of the decay lambda_i ~ i^-alpha of the variances, and the 95 % interval of that line.

    The slope of -ln lambda_i on ln i for i = 4, ..., 100 (or as many as there are), each with weight 1/i, as in the authors'
    code. The interval is that of the slope if the points scattered about the line independently. They do not, for eigenvalues are
    in order: it says how straight the spectrum is, and nothing of what another text would give.

    About 1 for representations that generalise well, by the authors; larger where few directions dominate. Invariant under
    rotation, scale and translation. None for fewer than 10 variances in that range.

    Misleads for few points: the variances of n points in a wide stream fall off towards i = n for that reason alone.

    >>> round(power_law(torch.arange(1, 60).double() ** -0.5).slope, 6)  # variances i^-1
    1.0

    Source: K. K. Agrawal, A. K. Mondal, A. Ghosh, B. Richards, "alpha-ReQ: Assessing Representation Quality in Self-Supervised
    Learning by measuring eigenspectrum decay", NeurIPS 2022; range and weights from its code, after C. Stringer et al., "High-
    dimensional geometry of population responses in visual cortex", Nature 571, 2019.
    """
    last = min(_LAW_TO, int((values > 0).sum()))
    if last - _LAW_FROM + 1 < _LAW_LEAST:
        return LineFit(None, None, None)
    variances = values.double().square()[_LAW_FROM - 1 : last].tolist()
    places = range(_LAW_FROM, last + 1)
    logarithms = [-math.log(value) for value in variances]
    return line_fit([math.log(i) for i in places], logarithms, [1 / i for i in places])


def mean_cosine(cloud: RunningCloud) -> float:
    """The mean cosine between different points: how much the cloud is a cone, its anisotropy.

    (||sum_i x_i/||x_i|| ||^2 - m) / (m (m - 1)) over the m points that are not zero.

    1 when all point the same way, 0 for directions drawn independently, at least -1/(m - 1). Invariant under rotation and the
    scale of every point. NaN for fewer than two points that are not zero.

    Misleads where a few dimensions are enormous in every point: they alone decide it.

    Source: K. Ethayarajh, "How Contextual are Contextualized Word Representations?", arXiv 1909.00512, section 3 (his baseline for
    anisotropy).
    """
    m = cloud.pointing
    if m < 2:
        return math.nan
    return min(1.0, (float(cloud.unit.square().sum()) - m) / (m * (m - 1)))  # the sizes may be of single precision


# Clouds -----------------------------------------------------------------------------------------------------------------


def corpus_measures(clouds: Sequence[RunningCloud], eps: Sequence[float]) -> list[CorpusMeasures]:
    """Every figure of each cloud. eps: for each the relative rounding of the format that its points were computed in.

    Singular values come from Gram matrices of the points, or of the second moment, and from the points themselves where a Gram
    would lose them (below 1e-6 of the largest); from a second moment nothing is resolved below sqrt(d eps(float64)) of it.

    >>> cloud = RunningCloud.of(torch.eye(3), torch.arange(3.0))
    >>> (found,) = corpus_measures([cloud], [1e-7])
    >>> round(found.effective_rank, 9), round(found.centred_effective_rank, 9), found.attainable_centred_rank
    (3.0, 2.0, 2)

    Source: as in the single measures.
    """
    found: dict[int, CorpusMeasures] = {}
    groups: dict[tuple[int, int], list[int]] = {}
    known = spectra(clouds, eps)
    for place, spectrum in enumerate(known):
        groups.setdefault((len(spectrum.whole), len(clouds[place].mean)), []).append(place)
    for places in groups.values():
        chosen = Spectrum(*(torch.stack(values) for values in zip(*(known[place] for place in places), strict=True)))
        found |= zip(places, _measures([clouds[place] for place in places], chosen), strict=True)
    return [found[place] for place in range(len(clouds))]


def spectra(clouds: Sequence[RunningCloud], eps: Sequence[float]) -> list[Spectrum]:
    """The singular values of each cloud, on the CPU; see `corpus_measures`."""
    found: list[Spectrum | None] = [None] * len(clouds)
    for places in _alike(clouds):
        first = clouds[places[0]]
        if first.scatter is not None:
            for place in places:
                found[place] = _from_moments(clouds[place], eps[place])
            continue
        noise = torch.tensor([eps[place] for place in places], dtype=torch.float64)
        points = torch.stack([clouds[place].points.cpu().double() for place in places])
        for place, whole, centred in zip(places, *_from_points(points, noise), strict=True):
            found[place] = Spectrum(whole, centred)
    return [spectrum for spectrum in found if spectrum is not None]


def _alike(clouds: Sequence[RunningCloud]) -> Iterator[list[int]]:
    """Places of clouds that can be decomposed in one call."""
    groups: dict[tuple[tuple[int, ...], int | None], list[int]] = {}
    for place, cloud in enumerate(clouds):
        own = place if cloud.scatter is not None else None
        groups.setdefault((tuple(cloud.points.shape), own), []).append(place)
    for (shape, _), places in groups.items():
        step = max(1, _AT_ONCE // max(math.prod(shape), 1))
        yield from (places[start : start + step] for start in range(0, len(places), step))


def _from_points(x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Of clouds [cloud, n, d] in float64: singular values of each and of the centred ones, those of rounding 0."""
    n, width = x.shape[-2:]
    if not n:
        return x.new_zeros(len(x), 0), x.new_zeros(len(x), 0)
    mean = x.mean(-2, keepdim=True)
    centred = x - mean
    size = x.square().sum((-2, -1)).sqrt()
    floor = eps * storage_noise(1.0, size, n, width)
    below = centred.square().sum((-2, -1)).sqrt() <= floor  # all points are one, up to rounding
    gram, of_mean = _gram_of_short_side(centred), mean.square().sum(-1, keepdim=True)
    apart = _singular_values(centred, gram, floor, ~below, min(n - 1, width))  # n points have n - 1 directions
    # X = CX + 1 m^T gives the Gram of X without a second product. Where the mean is large it errs no more than that would.
    if n <= width:
        along = centred @ mean.mT
        gram = gram + along + along.mT + of_mean
    else:
        gram = gram + n * (mean.mT @ mean)
    # Interlacing: sigma_2(X) <= sigma_1(CX), so all but the first are rounding where the points are one.
    whole = _singular_values(x, gram, floor, ~below, min(n, width))
    alone = torch.zeros_like(whole)
    alone[:, 0] = size
    whole = torch.where(below[:, None], alone, whole)
    least = (floor + max(n, width) * _EPS_64 * whole[:, 0])[:, None]
    apart = torch.where((apart > least) & ~below[:, None], apart, 0)
    return torch.where(whole > least, whole, 0), apart


def _gram_of_short_side(x: Tensor) -> Tensor:
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


def _singular_values(x: Tensor, gram: Tensor, floor: Tensor, wanted: Tensor, attainable: int) -> Tensor:
    """Descending; 0 beyond the attainable ones. From the Gram of the short side; from `x` itself where that could hide a value
    above `floor`."""
    n, width = x.shape[-2:]
    squares = eigenvalues([gram])[0].flip(1).clamp(min=0)
    squares[:, attainable:] = 0
    lost = (squares < 1e-12 * squares[:, :1]) & (1e-12 * squares[:, :1] > floor[:, None].square())
    values = squares.sqrt()
    rows = (lost[:, :attainable].any(1) & wanted).nonzero().flatten()
    if len(rows):
        upright = x[rows].mT if n < width else x[rows]  # the other way it takes twice as long
        values[rows, :attainable] = torch.linalg.svdvals(upright)[:, :attainable]
    return values


def _from_moments(cloud: RunningCloud, eps: float) -> Spectrum:
    assert cloud.scatter is not None
    width, n = len(cloud.mean), cloud.count
    scatter, mean = cloud.scatter.cpu(), cloud.mean.cpu()
    uncentred = scatter + n * torch.outer(mean, mean)
    size = float(uncentred.diagonal().sum().sqrt())
    floor = storage_noise(eps, size, n, width) + max(n, width) * _EPS_64 * size
    found = []
    for moment in (uncentred, scatter):
        values = torch.linalg.eigvalsh(moment).flip(-1).sqrt()  # NaN, and not above the cut, where rounding is below 0
        resolved = math.sqrt(width * _EPS_64) * float(values[0])
        found.append(torch.where(values > max(floor, resolved), values, 0))
    if float(scatter.diagonal().sum().sqrt()) <= floor:
        found[1] = torch.zeros_like(found[1])
    return Spectrum(*found)


def _measures(clouds: Sequence[RunningCloud], spectrum: Spectrum) -> Iterator[CorpusMeasures]:
    """Of clouds whose spectra, [cloud, direction], have one length."""
    width = len(clouds[0].mean)
    whole, apart = spectrum
    figures = {
        "effective_rank": effective_rank(whole),
        "centred_effective_rank": effective_rank(apart),
        "participation_ratio": participation_ratio(apart),
        "stable_rank": 1 / top_share(apart, 1),
        "k90": directions_holding(apart, 0.9),
        "k95": directions_holding(apart, 0.95),
        "top_share": top_share(apart, 1),
        "top_ten_share": top_share(apart, 10),
        "isoscore": isoscore(apart, width),
        "energy": whole.square().sum(1),
        "spread": apart.square().sum(1),
    }
    columns = zip(*(values.tolist() for values in figures.values()), strict=True)
    for cloud, values, line in zip(clouds, columns, apart, strict=True):
        found = dict(zip(figures, values, strict=True))
        n, energy, spread = cloud.count, found.pop("energy"), found.pop("spread")
        sampled = len(cloud.points) if cloud.scatter is None and len(cloud.points) < n else None
        counted = n if sampled is None else sampled
        law = power_law(line)
        defined = {
            "effective_rank": energy > 0,
            "centred_effective_rank": energy > 0 and n > 1,
            "isoscore": spread > 0 and width > 1,
        }
        similarity = mean_cosine(cloud)
        yield CorpusMeasures(
            points=n,
            sampled=sampled,
            attainable_rank=min(counted, width),
            attainable_centred_rank=max(min(counted - 1, width), 0),
            alpha=law.slope,
            alpha_low=law.low,
            alpha_high=law.high,
            mean_cosine=similarity if math.isfinite(similarity) else None,
            mean_share=max(0.0, 1 - spread / energy) if energy > 0 else None,
            **{k: v if defined.get(k, spread > 0) else None for k, v in found.items()},
        )


# Two clouds -------------------------------------------------------------------------------------------------------------


@admitting
def subspace_novelty(
    before: Float[Tensor, "*batch point width"], after: Float[Tensor, "*batch point width"]
) -> Float[Tensor, "*batch"]:
    """The share of the variance after a block that lies outside the principal directions from before it.

    1 - ||C Y V||_F^2 / ||C Y||_F^2, V the fewest principal directions of the cloud X before that hold 90 % of its variance, Y the
    cloud after, C the centring.

    From 0 to 1; at most 0.1 where nothing has changed, and 1 - k/d for a direction drawn at random, k the number of columns of V.
    Invariant under translation, common rotation, and the scale of either. NaN for a cloud without spread.

    Misleads for few points in a wide stream: V has fewer than n columns, so nearly everything can be new.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> subspace_novelty(x, x).item(), subspace_novelty(x, x.flip(-1)).item()
    (0.0, 1.0)

    Source: this project; compare the subspace similarity of M. Raghu et al., "SVCCA", arXiv 1706.05806.

    Raises `InputError` for clouds of other shapes.
    """
    _require_alike("subspace_novelty", before, after, width=True)
    x, y = _centred(before), _centred(after)
    return _novelty(x, y, _gram(x, y))


def _gram(x: Tensor, y: Tensor) -> Tensor | None:
    """X X^T, which novelty and CKA are computed from where points are fewer than dimensions; None where they are not."""
    return x @ x.mT if x.shape[-2] < min(x.shape[-1], y.shape[-1]) else None


def _novelty(x: Tensor, y: Tensor, K: Tensor | None) -> Tensor:
    """Of centred clouds of one width, with their `_gram`."""
    if K is not None:
        squares, left = torch.linalg.eigh(K)
        scale = torch.where(squares > 0, squares, math.inf).rsqrt().unsqueeze(-2)
        along = (y @ x.mT) @ left * scale  # the directions are X^T u / sigma
    else:
        squares, directions = torch.linalg.eigh(x.mT @ x)
        along = y @ directions
    squares, along = squares.clamp(min=0).flip(-1), along.flip(-1)
    held = squares.cumsum(-1)
    needed = held - squares < HELD * held[..., -1:]  # those before it do not hold enough
    inside = (along.square().sum(-2) * needed).sum(-1)
    return (1 - inside / y.square().sum((-2, -1))).clamp(min=0).where(held[..., -1] > 0, math.nan)


@admitting
def linear_cka(
    before: Float[Tensor, "*batch point width"], after: Float[Tensor, "*batch point other"], *, unbiased: bool = False
) -> Float[Tensor, "*batch"]:
    """How alike two clouds of the same points are, up to rotation and scale: a cosine.

    ||(C Y)^T C X||_F^2 / (||(C X)^T C X||_F ||(C Y)^T C Y||_F). With `unbiased`, each of the three is estimated without bias from
    the points as a sample (HSIC_1), which may be negative.

    From 0 to 1, and 1 for clouds that are equal up to rotation, scale and translation. NaN for a cloud without spread; unbiased
    also for fewer than four points.

    Misleads where points are fewer than dimensions: the plain one is then near 1 for clouds that have nothing in common.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    >>> round(linear_cka(x, -2 * x.flip(-1)).item(), 9)
    1.0

    Source: S. Kornblith, M. Norouzi, H. Lee, G. Hinton, "Similarity of Neural Network Representations Revisited", arXiv 1905.00414,
    section 3; unbiased: L. Song et al., "Feature Selection via Dependence Maximization", JMLR 13, 2012, eq. 5.

    Raises `InputError` for clouds of different numbers of points.
    """
    _require_alike("linear_cka", before, after, width=False)
    x, y = _centred(before), _centred(after)
    return _ckas(x, y, _gram(x, y), _gram(y, x))[int(unbiased)]


def _ckas(x: Tensor, y: Tensor, K: Tensor | None, L: Tensor | None) -> tuple[Tensor, Tensor]:
    """The plain one and the unbiased one, of centred clouds, with their `_gram`s."""
    n = x.shape[-2]
    if K is not None and L is not None:
        products = tuple(_inner(A, B) for A, B in ((K, L), (K, K), (L, L)))
    else:
        products = tuple(_inner(A, A) for A in (y.mT @ x, x.mT @ x, y.mT @ y))
    plain = _cosine(*products)
    if n < 4:
        return plain, torch.full_like(plain, math.nan)
    k, m = x.square().sum(-1), y.square().sum(-1)
    diagonals = (k, m), (k, k), (m, m)
    return plain, _cosine(*(_corrected(p, *pair, n) for p, pair in zip(products, diagonals, strict=True)))


def _cosine(between: Tensor, within: Tensor, without: Tensor) -> Tensor:
    found: Tensor = between / (within * without).sqrt()
    return found.where((within > 0) & (without > 0), math.nan)


def _corrected(product: Tensor, k: Tensor, m: Tensor, n: int) -> Tensor:
    """n (n - 3) HSIC_1 from tr(K L) of the centred kernels and their diagonals k and m: with centred kernels the rows of K without
    its diagonal sum to -k."""
    sums = (k * m).sum(-1)
    return product - sums + k.sum(-1) * m.sum(-1) / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums


def compared(before: Sequence[RunningCloud], after: Sequence[RunningCloud]) -> list[Comparison]:
    """What lies between the clouds of each pair, from the points that they keep: all of them, or the same sample. None for a
    pair whose points are not the same, and for what is undefined. Of points that are one up to rounding only the cosine says
    anything: the other figures are those of the rounding.

    The cosine is the mean over points of the cosine between a point before and after; 1 less it is the block influence of X. Men
    et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853, section 2.3.
    """
    nothing = Comparison(None, None, None, None)
    found = [nothing] * len(before)
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (one, other) in enumerate(zip(before, after, strict=True)):
        if len(one.points) > 1 and one.count == other.count and torch.equal(one.keys.cpu(), other.keys.cpu()):
            groups.setdefault((*one.points.shape, other.points.shape[1]), []).append(place)
    for (n, width, behind), alike in groups.items():
        step = max(1, _AT_ONCE // (n * (width + behind)))
        for places in (alike[start : start + step] for start in range(0, len(alike), step)):
            is_square = width == behind
            unknown = torch.full((len(places),), math.nan)
            X, Y, x, y, K, L = _sides([before[place] for place in places], [after[place] for place in places])
            novelty = _novelty(x, y, K) if is_square else unknown
            turned = torch.nn.functional.cosine_similarity(X, Y, dim=-1, eps=0).nanmean(-1) if is_square else unknown
            cka, unbiased = _ckas(x, y, K, L)
            for place, *figures in zip(
                places, *(each.tolist() for each in (novelty, cka, unbiased, turned)), strict=True
            ):
                found[place] = Comparison(*(f if math.isfinite(f) else None for f in figures))
    return found


class _Sides(NamedTuple):
    """The points of some pairs of clouds in float64, [pair, point, width], before and after; centred; and their `_gram`s."""

    X: Tensor
    Y: Tensor
    x: Tensor
    y: Tensor
    K: Tensor | None
    L: Tensor | None


def _sides(before: Sequence[RunningCloud], after: Sequence[RunningCloud]) -> _Sides:
    """Of pairs of which all clouds before have one shape, and all after. Most clouds come after one block and before the next: each
    is worked out once."""
    if before[0].points.shape != after[0].points.shape:
        X, Y = (torch.stack([cloud.points.cpu().double() for cloud in side]) for side in (before, after))
        x, y = _centred(X), _centred(Y)
        return _Sides(X, Y, x, y, _gram(x, y), _gram(y, x))
    distinct = {id(cloud): cloud for cloud in (*before, *after)}
    places = {key: place for place, key in enumerate(distinct)}
    points = torch.stack([cloud.points.cpu().double() for cloud in distinct.values()])
    centred = _centred(points)
    gram = _gram(centred, centred)
    one, other = ([places[id(cloud)] for cloud in side] for side in (before, after))
    both = (points[one], points[other], centred[one], centred[other])
    return _Sides(*both, None, None) if gram is None else _Sides(*both, gram[one], gram[other])


def _inner(A: Tensor, B: Tensor) -> Tensor:
    return (A * B).sum((-2, -1))


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(-2, keepdim=True)


def _require_alike(function: str, before: Tensor, after: Tensor, *, width: bool) -> None:
    end = None if width else -1
    if before.ndim < 2 or before.shape[:end] != after.shape[:end]:
        raise InputError(
            f"{function}: expected two clouds with the same axes (*batch, point{', width' if width else ''}), got "
            f"{tuple(before.shape)} and {tuple(after.shape)}. They may hold different sequences. Pass the same points in one order."
        )
