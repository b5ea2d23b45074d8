"""What an output projection says about its heads: which of them can be told apart in the sum, and how well.

A multi-head layer adds its heads' contributions: Y = sum_h O_h W_h, with head outputs O_h (n x d_k) and row blocks W_h
(d_k x d) of the output projection W_O (D x d, D = H d_k). An observer who sees only Y, as every later layer does, cannot
always say which head wrote what. This module measures how much is undetermined (`ambiguous_degrees_of_freedom`, `kernel_dimension`,
`contribution_ambiguity`, `factorization_ambiguity`), which changes of the weights cannot be seen (`gauge_dimension`,
`query_key_gauge_dimension`), and how well posed the rest is (`write_space_overlap`, `conditioning`, `head_noise_gain`).

W_O comes as `[mixed, width]`, the concatenated heads along its rows: the transpose of an `nn.Linear`'s weight. All
figures of single heads are the same for every model that computes the same function: they depend on the write spaces
row(W_h) and on the contributions O_h W_h, which the change of basis W_h -> M^-1 W_h, O_h -> O_h M does not change. The
norms of O_h and W_h and the condition number of W_O do change, so they are not measured here.

When not to use it: to cut the output of the projection into heads. By then the heads are mixed, and the parts mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from uncollapse.errors import InputError
from uncollapse.measures.admission import admitting, at_size_one, described, is_ordinary, times_power_of_two
from uncollapse.measures.random_projections import beside_random
from uncollapse.measures.symmetric_eigenvalues import eigenvalues
from uncollapse.measures.write_spaces import (
    WriteSpaces as WriteSpaces,
)
from uncollapse.measures.write_spaces import (
    computed_in,
    float64_matrix,
    numerical_rank,
    row_blocks,
    tolerance,
)

LayerNormBefore = Literal["centred", "shifted"]  # what the attention reads: sum_i beta_i / gamma_i is 0, or not

# bfloat16 rounds by 2^-8 = 0.4 %. Ten times that is 4 %: a head's share is still right to a few per cent.
CARE_GAIN = 10.0
_CLOSE = 0.7  # the cosine from which on an angle is taken from its sine: its own cosine has lost digits


def ambiguous_degrees_of_freedom(heads: int, head_width: int, tokens: int = 1) -> int:
    """How many numbers stay free when only the sum of the heads in one shared channel space is seen. A count.

    n (H-1) d_k, the dimension of the kernel of (O_1, ..., O_H) -> sum_h O_h for n `tokens`.

    0 for one head. Depends on sizes only, not on weights.

    It is the count for an observer who does not know W_O. For one who does, see `kernel_dimension`, which is mostly 0.

    >>> ambiguous_degrees_of_freedom(heads=12, head_width=64)
    704

    Cirrincione, Rank, Head-Channel Non-Identifiability, and Symmetry Breaking, arXiv 2604.23681.
    """
    return tokens * (heads - 1) * head_width


@admitting
def kernel_dimension(output_projection: Float[Tensor, "mixed width"], tokens: int = 1) -> int:
    """How many numbers of the head outputs do not reach the layer's output, for an observer who knows W_O. A count.

    n (D - rank W_O): the dimension of the kernel of O -> O W_O. Rank counts singular values above
    eps ||W_O||_F (1/sqrt D + 1/sqrt d) + max(D, d) eps_64 sigma_1. eps is that of float32, or that of float64 where the numbers
    need more digits than float32 has: below it a computation with these numbers cannot tell a singular value from 0. The format
    that they are stored in does not matter. Numbers in bfloat16 are as exact as the same numbers in float32.

    0 (head outputs follow from Y; any W_O of full row rank) to n D. At least n (D - d), so positive wherever the heads
    are wider together than the stream. Invariant under the value-output gauge.

    Even with kernel 0, attribution may be useless in practice: see `conditioning`.

    >>> kernel_dimension(torch.ones(4, 2))  # rank 1
    3

    Linear algebra; the question is that of arXiv 2604.23681. Raises `InputError` for anything but a finite matrix.
    """
    W = at_size_one(float64_matrix("kernel_dimension", output_projection), (0, 1))[0]
    return tokens * (W.shape[0] - numerical_rank(W, computed_in(W)))


def _decomposed(name: str, output_projection: Tensor | WriteSpaces, heads: int) -> WriteSpaces:
    if not isinstance(output_projection, WriteSpaces):
        return WriteSpaces(output_projection, heads, name=name)
    if output_projection.heads != heads:
        raise InputError(
            f"{name}: expected spaces of {heads} heads, got {output_projection.heads}. They belong to another layer. "
            "Decompose the output projection of this layer."
        )
    return output_projection


@admitting
def contribution_ambiguity(
    output_projection: Float[Tensor, "mixed width"] | WriteSpaces, heads: int, tokens: int = 1
) -> int:
    """How many numbers of the contributions O_h W_h stay free, for an observer who sees their sum and knows W_O. A count.

    n (sum_h rank W_h - rank W_O), ranks as in `kernel_dimension`.

    0 exactly where the write spaces are linearly independent: every contribution then follows from Y, even if a head's
    own output does not (its W_h may have a kernel). At most n (D - rank W_O). Invariant under the value-output gauge.

    It counts directions, not how hard they are to tell apart: see `conditioning`.

    >>> contribution_ambiguity(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), heads=2)  # the second head writes nothing
    0

    Linear algebra. Raises `InputError` as `kernel_dimension` does, and where the rows are no multiple of `heads`.
    """
    spaces = _decomposed("contribution_ambiguity", output_projection, heads)
    return tokens * (int(spaces.ranks.sum()) - spaces.rank)


def factorization_ambiguity(tokens: int, mixed: int, width: int) -> int:
    """How many numbers stay free, for an observer who sees only Y and knows neither the head outputs nor W_O. A count.

    n D + D d - r (n + d - r), r = min(n, D, d): the dimension of {(O, W_O) : O W_O = Y} at a generic such Y.

    At least r^2, the changes of basis between O and W_O; never 0. Depends on sizes only.

    This is the count for one sequence. An observer of many sequences with the same W_O knows more; take all their tokens as n.

    >>> factorization_ambiguity(tokens=3, mixed=2, width=2)  # 3x2 times 2x2: GL(2)
    4

    Dimension of the matrices of rank r: r (n + d - r), for instance Harris, Algebraic Geometry, proposition 12.2.
    """
    rank = min(tokens, mixed, width)
    return tokens * mixed + mixed * width - rank * (tokens + width - rank)


def gauge_dimension(
    groups: int,
    head_width: int,
    *,
    value_bias: bool = False,
    output_bias: bool = False,
    width: int | None = None,
    layer_norm: LayerNormBefore | None = None,
) -> int:
    """In how many directions value and output weights can move together without changing the function. A count.

    G d_k^2 for G key-value groups: W_V,g -> W_V,g M_g, W_h -> M_g^-1 W_h for all heads h of group g. With both biases
    G d_k more: b_V,g -> b_V,g + delta_g, b_O -> b_O - sum_h delta_g(h) W_h, since the weights of a row sum to one.

    A value bias without an output bias to take it up is free only where sum_h delta_g(h) W_h = 0: max(0, G d_k - d)
    directions, d the `width` of the stream (default: at least G d_k).
    `layer_norm` says that the attention reads the output of a layer norm (gains gamma without zeros, shift beta). Its tokens lie
    in a hyperplane, and G d_k more directions W_V,g + (1/gamma) c^T are invisible: where it is `"centred"`, sum_i beta_i /
    gamma_i = 0 (in particular beta = 0), and where it is `"shifted"` if a value or output bias takes the constant back.
    These belong to the norm, not to the heads.

    Holds for generic weights. On top come finitely many permutations of heads within groups and of groups.

    Sink columns make the value bias visible: leave `value_bias` off there.

    >>> gauge_dimension(groups=2, head_width=64, value_bias=True, output_bias=True)
    8320
    >>> gauge_dimension(groups=1, head_width=2, layer_norm="centred")
    6

    Derived here, checked by the rank of the Jacobian of attention layers; the question is that of arXiv 2604.23681.
    """
    channels = groups * head_width
    shifts = 0
    if value_bias:
        shifts = channels if output_bias else max(0, channels - (channels if width is None else width))
    hidden = layer_norm == "centred" or (layer_norm == "shifted" and (value_bias or output_bias))
    return groups * head_width**2 + shifts + (channels if hidden else 0)


def query_key_gauge_dimension(
    heads: int,
    groups: int,
    head_width: int,
    *,
    bias: bool = False,
    rotary_width: int = 0,
    norm: bool = False,
    layer_norm: LayerNormBefore | None = None,
) -> int:
    """In how many directions query and key weights can move together without changing the softmax of the logits. A count.

    With r = `rotary_width` of the d_k channels rotated by position (0: none; d_k: all) and G key groups:
    G (r + (d_k - r)^2), pairs of channels of one frequency scaling and turning together, the others freely; with `bias`
    G (d_k - r) more, since what a key bias adds to the logits of unrotated channels is the same for all keys.
    With `norm`, an RMS norm of queries and keys with one gain each for all heads: H + G + r/2 + (d_k - r), the scales of
    each head's weights, and what passes between the two gains; a bias changes nothing then.
    `layer_norm` says that the attention reads the output of a layer norm, as in `gauge_dimension`. Then W_K + (1/gamma) e^T adds
    a constant to each row of logits: G d_k more directions, with or without biases (of rotated channels only where the norm is
    `"centred"` or the keys have a bias). W_Q + (1/gamma) c^T is invisible where it is `"centred"` or queries have a bias: H d_k
    more. Not counted with `norm`.

    Holds for generic weights and gains with d_k <= d, distinct frequencies, and a norm whose epsilon is negligible. At
    initialisation all gains are 1, and rotations common to a group's queries and keys add to the count.

    >>> query_key_gauge_dimension(12, 12, 64, bias=True), query_key_gauge_dimension(16, 8, 128, rotary_width=128)
    (49920, 1024)
    >>> query_key_gauge_dimension(16, 8, 128, rotary_width=128, norm=True)
    88
    >>> query_key_gauge_dimension(2, 1, 2, layer_norm="centred"), query_key_gauge_dimension(2, 1, 2, layer_norm="shifted")
    (10, 6)

    Derived here, checked by the rank of the Jacobian of the logits (claims `query-key-gauge`, `gauge-with-norms`).
    """
    free = head_width - rotary_width
    if norm:
        return heads + groups + rotary_width // 2 + free
    constant = layer_norm == "centred" or (
        layer_norm == "shifted" and bias
    )  # nothing is shifted, or a bias takes it back
    hidden = 0
    if layer_norm is not None:
        hidden = groups * (head_width if constant else free) + (heads * head_width if constant else 0)
    return groups * (rotary_width + free**2) + (groups * free if bias else 0) + hidden


@admitting
def write_space_overlap(
    output_projection: Float[Tensor, "mixed width"] | WriteSpaces, heads: int
) -> Float[Tensor, "head head"]:
    """How much of what one head writes lies where another head writes: a share between 0 and 1 for every pair.

    ||B_h B_g^T||_F^2 / min(r_h, r_g), B_h an orthonormal basis of row(W_h), r_h its rank: the mean squared cosine of
    the principal angles between the two write spaces. Tolerance as in `kernel_dimension`, block by block.

    0 (orthogonal) to 1 (one contains the other; the diagonal). Spaces of dimension r in random position in R^d have
    about r/d. Invariant under the value-output gauge, scale of a head, and rotation of the stream. NaN for a head that
    writes nothing.

    An overlap of 0 for all pairs is sufficient for attribution, not necessary; small overlaps of many heads may still
    be dependent together: see `conditioning`.

    >>> write_space_overlap(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), heads=2)  # 45 degrees
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]], dtype=torch.float64)

    Principal angles: Bjorck and Golub, Numerical methods for computing angles between linear subspaces, 1973.
    Raises `InputError` as `contribution_ambiguity` does.
    """
    spaces = _decomposed("write_space_overlap", output_projection, heads)
    size, ranks = spaces.bases.shape[1], spaces.ranks
    shared = spaces.cosines.square().view(heads, size, heads, size).sum((1, 3))
    return shared / torch.minimum(ranks[:, None], ranks)


@admitting
def principal_angles(
    output_projection: Float[Tensor, "mixed width"] | WriteSpaces, heads: int
) -> Float[Tensor, "head head head_width"]:
    """The angles between every two write spaces, smallest first, in radians.

    The cosines of theta_1 <= theta_2 <= ... are the singular values of B_h B_g^T, the sines those of B_h - B_h B_g^T B_g,
    with B_h as in `write_space_overlap`; theta = atan2 of the two, exact for small and for right angles.

    0 (a common direction) to pi/2 (orthogonal), as many as the smaller space has dimensions, then NaN. Invariances as
    in `write_space_overlap`.

    >>> (principal_angles(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), heads=2)[0, 1] * 180 / math.pi).round(decimals=3)
    tensor([45.], dtype=torch.float64)

    Bjorck and Golub 1973. Raises `InputError` as `contribution_ambiguity` does.
    """
    spaces = _decomposed("principal_angles", output_projection, heads)
    bases, ranks = spaces.bases, spaces.ranks
    own = [basis[: int(rank)] for basis, rank in zip(bases, ranks, strict=True)]
    angles = bases.new_full((heads, heads, spaces.blocks.shape[1]), math.nan)
    for h in range(heads):
        for g in range(h, heads):
            small, large = sorted((own[h], own[g]), key=len)
            inside = small @ large.T
            cosines = torch.linalg.svdvals(inside)
            sines = torch.linalg.svdvals(small - inside @ large).flip(0)
            angles[h, g, : len(small)] = angles[g, h, : len(small)] = torch.atan2(sines, cosines)
    return angles


@admitting
def smallest_principal_angle(
    output_projection: Float[Tensor, "mixed width"] | WriteSpaces, heads: int
) -> Float[Tensor, "head head"]:
    """The smallest angle between every two write spaces, in radians: do two heads have a direction in common?

    theta_1 of `principal_angles`, without the others: u the direction of row(W_h) nearest to row(W_g), theta_1 = atan2 of
    its parts outside and inside row(W_g), exact for small angles.

    0 (a common direction; the diagonal; any two spaces of together more than d dimensions) to pi/2 (orthogonal). NaN for a
    head that writes nothing. Invariances as in `write_space_overlap`.

    One common direction out of many may not matter: see `write_space_overlap` for the mean, `head_noise_gain` for all heads.

    >>> (smallest_principal_angle(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), heads=2) * 180 / math.pi).round(decimals=3)
    tensor([[ 0., 45.],
            [45.,  0.]], dtype=torch.float64)

    Bjorck and Golub 1973. Raises `InputError` as `contribution_ambiguity` does.
    """
    spaces = _decomposed("smallest_principal_angle", output_projection, heads)
    bases, ranks = spaces.bases, spaces.ranks
    size = bases.shape[1]
    cosines = spaces.cosines.view(heads, size, heads, size).transpose(1, 2)
    angles = bases.new_zeros(heads, heads)
    pairs = [cosines[h, h + 1 :] for h in range(heads - 1)]
    squared = eigenvalues([each @ each.mT for each in pairs])
    for h in range(heads - 1):
        nearest = squared[h][:, -1].clamp(min=0).sqrt()
        found = nearest.clamp(max=1).acos()
        close = nearest > _CLOSE
        if bool(close.any()):
            others = bases[h + 1 :][close]
            direction = torch.linalg.svd(cosines[h, h + 1 :][close]).U[..., :1].mT @ bases[h]  # [head, 1, width]
            inside = direction @ others.mT @ others
            found[close] = torch.atan2((direction - inside).norm(dim=(-2, -1)), inside.norm(dim=(-2, -1)))
        angles[h, h + 1 :] = angles[h + 1 :, h] = found
    silent = ranks == 0
    return angles.masked_fill(silent[:, None] | silent, math.nan)


@admitting
def conditioning(output_projection: Float[Tensor, "mixed width"] | WriteSpaces, heads: int) -> float:
    """By how much noise in the layer's output is amplified, at worst, when it is attributed to heads. A factor.

    sigma_max / sigma_min of the stacked orthonormal bases [B_1; ...; B_H] of the write spaces row(W_h).

    It bounds the *relative* gain: an error of a share e of the output becomes at most a share sigma_max/sigma_min e of all
    contributions together. For the absolute gain, 1/sigma_min, see `absolute_noise_gain`.

    1 (mutually orthogonal write spaces) to infinity: the bases are linearly dependent, up to
    eps sqrt(R) (1/sqrt R + 1/sqrt d) + max(R, d) eps_64 sigma_max with R rows in the stack and eps as in `kernel_dimension`,
    and other heads can undo a change in one head. Always so when R > d. Invariant under the value-output gauge,
    scale of a head, and rotation of the stream; the condition number of W_O itself is not.

    A worst case over directions: most noise is amplified less. Infinite for a projection of zeros. Random projections have a
    large gain too: see `random_projections.random_noise_gain`.

    >>> conditioning(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), heads=2)
    1.0

    Singular values as noise gains: any text on least squares, for instance Golub and Van Loan, Matrix Computations.
    Raises `InputError` as `contribution_ambiguity` does.
    """
    spaces = _decomposed("conditioning", output_projection, heads)
    return float(spaces.largest / spaces.least) if spaces.are_independent else math.inf


@admitting
def absolute_noise_gain(output_projection: Float[Tensor, "mixed width"] | WriteSpaces, heads: int) -> float:
    """By how much an error in the layer's output can grow, in units of the stream, when it is attributed to heads. A factor.

    1 / sigma_min of the stacked orthonormal bases of `conditioning`: the norm of the map from the output to all contributions.

    1 (orthogonal write spaces) to infinity, exactly where `conditioning` is. At least the largest `head_noise_gain`.
    Invariances as in `conditioning`.

    A worst case, too.

    >>> absolute_noise_gain(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), heads=2)  # 45 degrees
    1.847...

    Golub and Van Loan, Matrix Computations. Raises `InputError` as `contribution_ambiguity` does.
    """
    spaces = _decomposed("absolute_noise_gain", output_projection, heads)
    return float(1 / spaces.least) if spaces.are_independent else math.inf


@admitting
def head_noise_gain(
    output_projection: Float[Tensor, "mixed width"] | WriteSpaces, heads: int
) -> Float[Tensor, " head"]:
    """By how much noise in the layer's output is amplified, at worst, when one head's contribution is read off it. A factor
    per head.

    1 / sin theta_h, theta_h the smallest angle between row(W_h) and the sum of all other heads' write spaces: the norm of
    the projection onto row(W_h) along that sum. From the singular values of the stack in `conditioning`, cut as there; a
    head is undetermined where more than the square root of the tolerance of a dependent direction is its own.

    1 (at right angles to all others) to infinity (other heads can write part of its contribution), never above
    `conditioning`; 0 for a head that writes nothing. Unlike `conditioning` it tells the heads apart: two copies are
    infinite, the others may be near 1. Invariances as there.

    A worst case over directions: most noise is amplified less.

    >>> head_noise_gain(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), heads=3)  # two at 45 degrees
    tensor([1.4142, 1.4142, 1.0000], dtype=torch.float64)

    Ipsen and Meyer, The angle between complementary subspaces, 1995.
    Raises `InputError` as `contribution_ambiguity` does.
    """
    return _decomposed("head_noise_gain", output_projection, heads).gains


@admitting
def write_grams(
    output_projection: Float[Tensor, "mixed width"], heads: int
) -> Float[Tensor, "head head_width head_width"]:
    """W_h W_h^T for every head, in float64: what `contribution_energy` needs of the weights, to be computed once.

    Positive semi-definite; not gauge invariant by itself, only together with the head outputs.

    >>> write_grams(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), heads=2).flatten()
    tensor([25.,  1.], dtype=torch.float64)

    Raises `InputError` as `contribution_ambiguity` does.
    """
    return _grams("write_grams", output_projection, heads)


@admitting
def contribution_energy(
    head_outputs: Float[Tensor, "*batch token mixed"],
    output_projection: Float[Tensor, "mixed width"],
    heads: int,
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    grams: Float[Tensor, "head head_width head_width"] | None = None,
) -> Float[Tensor, "*batch head"]:
    """How much every head moves the tokens apart from their mean: the energy of its centred contribution.

    ||C O_h W_h||_F^2 = <(C O_h)^T (C O_h), W_h W_h^T>, C = I - 1 1^T/n over the real tokens; O_h W_h is never formed.
    `head_outputs` is the input of the output projection, `grams` what `write_grams` gives.

    0 (the head writes the same for all tokens, or nothing) and above, in squared units of the stream. Invariant under
    the value-output gauge and under a value bias.

    The energies do not add up to that of the layer: heads may cancel each other, which the cross terms show.

    >>> outputs = torch.tensor([[1.0, 5.0], [3.0, 5.0]])  # the second head does not vary
    >>> contribution_energy(outputs, torch.eye(2), heads=2)
    tensor([2., 0.])

    Derived here. Raises `InputError` where the tensors do not fit together.
    """
    return _energy("contribution_energy", head_outputs, output_projection, heads, mask, grams)


@admitting
def energy_share(
    head_outputs: Float[Tensor, "*batch token mixed"],
    output_projection: Float[Tensor, "mixed width"],
    heads: int,
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    grams: Float[Tensor, "head head_width head_width"] | None = None,
) -> Float[Tensor, "*batch head"]:
    """The share of each head in the sum of all heads' energies. The shares sum to one.

    e_h / sum_g e_g with e_h of `contribution_energy`.

    0 to 1; 1/H for equal heads, 1 where one head does everything. Invariances as there. NaN where no head moves anything.

    A share of the sum of energies, not of the energy of the sum.

    >>> energy_share(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.eye(2), heads=2)
    tensor([0.1000, 0.9000])

    Derived here. Raises `InputError` as `contribution_energy` does.
    """
    energy = _energy("energy_share", head_outputs, output_projection, heads, mask, grams, is_share=True)
    return energy / energy.sum(-1, keepdim=True)


@admitting
def gate_rank(gates: Float[Tensor, "position head"], tol: float | None = None) -> int:
    """How many of the heads become separable by gates that differ from position to position. A count.

    rank G, the gate values of m positions and H heads; singular values above `tol`, by default as in `kernel_dimension`.
    Where the same contents recur at the m positions, heads are recovered up to H - rank G dimensions.

    0 (all gates closed) or 1 (gates without effect: all rows proportional) to min(m, H). Invariant under the order of
    positions and heads.

    Rank says possible, not practicable: see `gate_conditioning`.

    >>> gate_rank(torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]))
    2

    Recovery from recurring contents: derived here, for the gates of arXiv 2604.23681. Raises `InputError` for anything
    but a finite matrix.
    """
    return _gate_spectrum("gate_rank", gates, tol)[1]


@admitting
def gate_conditioning(gates: Float[Tensor, "position head"], tol: float | None = None) -> float:
    """By how much noise is amplified, at worst, when heads are recovered from their position gates. A factor.

    sigma_1 / sigma_H of the gate values G (m x H); infinite where `gate_rank` with the same `tol` is below H.

    1 (orthogonal gate profiles of equal norm) to infinity (some mixture of heads cannot be told apart). Invariant under
    a common scale, and under the order of positions and heads.

    >>> gate_conditioning(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    2.0

    As for `gate_rank`. Raises `InputError` as that does.
    """
    sigma, rank = _gate_spectrum("gate_conditioning", gates, tol)
    return math.inf if rank < gates.shape[1] else float(sigma[0] / sigma[-1])


def attribution_verdict(kernel_dimension: int, conditioning: float, random: Sequence[float] | None = None) -> str:
    """Can the layer's output be attributed to its heads? In words, from `kernel_dimension` and `conditioning`.

    No, if head outputs are undetermined. With care, if noise is amplified more than `CARE_GAIN` times. Otherwise yes. With
    `random`, the points of `random_projections.random_noise_gain`, the gain is also put beside that of random weights.

    The verdict is for an observer of the layer's output. If you record the heads before the projection, you know their
    contributions in any case; then the question is only what the rest of the model can do with them.

    >>> attribution_verdict(0, 3.0), attribution_verdict(0, 352.0), attribution_verdict(1024, math.inf)
    ('attributable', 'attributable with care (noise gain 352)', 'not attributable (kernel 1024)')
    """
    if kernel_dimension > 0:
        return f"not attributable (kernel {kernel_dimension})"
    if not math.isfinite(conditioning):
        return "not attributable (write spaces dependent to within rounding)"
    if conditioning > CARE_GAIN:
        beside = f", {beside_random(conditioning, random)}" if random else ""
        return f"attributable with care (noise gain {conditioning:{',.0f' if conditioning >= 1000 else '.3g'}}{beside})"
    return "attributable"


def _grams(name: str, output_projection: Tensor, heads: int) -> Tensor:
    blocks = row_blocks(name, output_projection, heads, finite=False)
    return blocks @ blocks.mT


def _energy(
    name: str,
    head_outputs: Tensor,
    output_projection: Tensor,
    heads: int,
    mask: Tensor | None,
    grams: Tensor | None,
    is_share: bool = False,
) -> Tensor:
    """`contribution_energy`, refusing under the name of the function that was called; `is_share`: in any unit."""
    of_weights = torch.zeros((), dtype=torch.int32, device=head_outputs.device)
    if grams is None:
        blocks, exponent = at_size_one(row_blocks(name, output_projection, heads, finite=False), (0, 1, 2))
        grams, of_weights = blocks @ blocks.mT, 2 * exponent.flatten()
    if head_outputs.ndim < 2 or head_outputs.shape[-1] != grams.shape[0] * grams.shape[1] or grams.shape[0] != heads:
        raise InputError(
            f"{name}: expected head_outputs[..., token, mixed] with mixed = {output_projection.shape[0]} = "
            f"heads x head_width, heads = {heads}, got {described(head_outputs)} and grams {described(grams)}. "
            "These may be the outputs of the projection, or grams of another one. "
            "Pass the projection's input and write_grams(output_projection, heads)."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != head_outputs.shape[:-1]):
        raise InputError(
            f"{name}: expected boolean mask[..., token] = {list(head_outputs.shape[:-1])}, got "
            f"{described(mask)}. It may be an integer attention mask. Pass mask.bool(), True for real tokens."
        )
    if not head_outputs.is_floating_point():
        raise InputError(
            f"{name}: expected floating-point head_outputs, got {described(head_outputs)}. They may be token ids. "
            "Pass the projection's input."
        )
    O = head_outputs.detach().to(torch.promote_types(head_outputs.dtype, torch.float32))
    dtype, sizes = O.dtype, of_weights
    if not (is_ordinary(O, 50) and is_ordinary(grams, 20)):  # squares would leave the range
        O = O.double() if mask is None else torch.where(mask[..., None], O, 0).double()
        O, of_outputs = at_size_one(O, (-2, -1))
        grams, of_grams = at_size_one(grams.double(), (0, 1, 2))
        sizes = 2 * of_outputs.flatten(-2) + of_grams.flatten() + of_weights
    # centred before the Gram: the common part of the tokens would drown the rest
    if mask is None:
        O = O - O.mean(-2, keepdim=True)
    else:
        O = torch.where(mask[..., None], O, 0)
        O = torch.where(mask[..., None], O - O.sum(-2, keepdim=True) / mask.sum(-1)[..., None, None], 0)
    O = O.unflatten(-1, (heads, -1)).transpose(-2, -3)
    with torch.autocast(O.device.type, enabled=False):
        energy = (O.mT @ O * grams.to(O)).sum((-1, -2))
    energy = energy.clamp(min=0)
    return (energy if is_share else times_power_of_two(energy, sizes)).to(dtype)


def _gate_spectrum(name: str, gates: Tensor, tol: float | None) -> tuple[Tensor, int]:
    """The singular values of the gates, and how many stand above the tolerance."""
    G, exponent = at_size_one(float64_matrix(name, gates), (0, 1))
    sigma = torch.linalg.svdvals(G)
    if tol is None:
        return sigma, int((sigma > tolerance(G, sigma[0], gates.dtype)).sum())
    return sigma, int((times_power_of_two(sigma, exponent[0]) > tol).sum())


@admitting
def gauge_of_gates(gates: Float[Tensor, "position head"], head_width: int, tol: float | None = None) -> int:
    """In how many directions heads can still be mixed unseen, given their gates at some positions. A count.

    sum_c (m_c d_k)^2 over classes of m_c heads with proportional gate profiles: a mixing M survives where it commutes with
    every diag(g(i)/g(j)), so its blocks M_hk are free for heads of one class and zero for others. Two profiles
    are proportional where their directions differ by at most `tol`, by default 16 eps of the gates' dtype; classes are chains
    of such pairs.

    H d_k^2 (all profiles distinct: mixing within heads always survives) to (H d_k)^2 (gates constant in position, or one
    position). Invariant under a positive factor of a head or of a position, and under the order of either.

    The count holds for known positive gates and an output projection of full row rank; otherwise more may survive. It counts
    directions, not how hard they are to tell apart: see `gate_conditioning`.

    >>> gauge_of_gates(torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 2.0]]), head_width=4)  # the first and third are alike
    80

    Derived here, for the gates of arXiv 2604.23681. Raises `InputError` for anything but a finite matrix of positive gates.
    """
    if gates.ndim != 2 or not gates.is_floating_point() or not gates.numel():
        raise InputError(
            f"gauge_of_gates: expected positive gates[position, head] in floating point, got {described(gates)}. "
            "A single position has an axis of its own, too. Pass gates[None].float()."
        )
    if not bool((gates.isfinite() & (gates > 0)).all()):
        raise InputError(
            f"gauge_of_gates: expected positive gates[position, head], got {list(gates.shape)}, some of them not positive or not "
            "finite. A closed head mixes with nothing. Leave it out, or pass the gates of fewer positions."
        )
    tol = 16 * torch.finfo(gates.dtype).eps if tol is None else tol
    profiles = normalize(at_size_one(gates.detach().double(), (0,))[0], dim=0)
    alike = torch.cdist(profiles.T, profiles.T, compute_mode="donot_use_mm_for_euclid_dist") <= tol
    reached = alike.double()
    for _ in range(math.ceil(math.log2(gates.shape[1]))):  # chains of pairs, doubled in length each time
        reached = ((reached @ reached) > 0).double()
    return int(reached.sum()) * head_width**2
