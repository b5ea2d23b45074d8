"""What an output projection leaves of its heads: which observer can tell them apart, and by how much.

`Y_i = sum_h O_{h,i} W_h + b` sums the heads of each token; `W_O` stacks the row blocks W_h (head width × width), D = H·d_k
rows in all. Every figure here is the same for all models that compute the same function: replacing V_h by V_h M_h and W_h by
M_h⁻¹ W_h moves none of them. Slicing the projection's *output* by head is after the mixing and means nothing.

`output_projection` is always W_O as [mixed, width], rows the concatenated heads: the transpose of an `nn.Linear` weight, the
weight itself of a `Conv1D`. Spectra are computed in float64.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import InputError

# Reading a head back amplifies noise by the conditioning of the write spaces. Up to 10, one digit of a measurement is lost:
# less than the difference between two probes of a few dozen sequences.
MODEST_NOISE_GAIN = 10.0


def ambiguous_degrees_of_freedom(heads: int, head_width: int, tokens: int = 1) -> int:
    """How many numbers a layer's heads can change without an observer noticing who sees only the sum of the head outputs.

    n (H − 1) d_k: the kernel of (O_1 … O_H) ↦ Σ_h O_h, with n `tokens`, H `heads` and d_k `head_width`.

    0 for a single head. It is a count of dimensions, the same for every weight: no property of a trained model, and nothing
    that training repairs. The observer is one who reads all heads in one shared channel space; one who knows W_O sees more
    (`kernel_dimension`).

    >>> ambiguous_degrees_of_freedom(heads=12, head_width=64, tokens=128)
    90112

    Cirrincione, Rank, Head-Channel Non-Identifiability, and Symmetry Breaking, arXiv 2604.23681, abstract.
    Raises `InputError` for sizes below one.
    """
    _require_positive("ambiguous_degrees_of_freedom", heads=heads, head_width=head_width, tokens=tokens)
    return tokens * (heads - 1) * head_width


def kernel_dimension(output_projection: Float[Tensor, "mixed width"], tokens: int = 1) -> int:
    """How many numbers of the head outputs the projection forgets: what one who sees Y and knows W_O still cannot know.

    n (D − rank W_O), the kernel of O ↦ O W_O. The rank counts singular values above
    ε‖W‖_F(1/√D + 1/√d) + max(D, d) ε₆₄ σ_max, ε of the dtype the weights are stored in: what rounding alone can produce.

    0 for an invertible W_O; at least n (D − d) where the heads together are wider than the model (some Qwen3 and Gemma
    sizes). Gauge-invariant. It says nothing of directions that are nearly forgotten: see `conditioning`.

    >>> kernel_dimension(torch.eye(4)[:, :3], tokens=10)
    10

    Elementary. Raises `InputError` for a matrix that is none or is not finite.
    """
    _require_matrix("kernel_dimension", output_projection)
    _require_positive("kernel_dimension", tokens=tokens)
    return tokens * (output_projection.shape[0] - _rank(output_projection))


def contribution_ambiguity(output_projection: Float[Tensor, "mixed width"], heads: int, tokens: int = 1) -> int:
    """How many numbers of the heads' contributions O_h W_h remain unknown to one who sees their sum Y and knows W_O.

    n (Σ_h rank W_h − rank W_O): contributions live in the write spaces row(W_h), and only where these are independent does
    their sum determine them.

    0 when the write spaces are independent. Less than `kernel_dimension` where single heads lose dimensions of their own.

    >>> contribution_ambiguity(torch.eye(2).repeat(2, 1), heads=2)  # two heads that write into the same plane
    2

    Elementary. Raises `InputError` for a matrix that `heads` does not divide.
    """
    blocks = _blocks("contribution_ambiguity", output_projection, heads)
    _require_positive("contribution_ambiguity", tokens=tokens)
    return tokens * (sum(_rank(block) for block in blocks) - _rank(output_projection))


def factorization_ambiguity(mixed: int, width: int, tokens: int) -> int:
    """How many numbers of the pair (O, W_O) remain unknown to one who sees only the product Y = O W_O.

    nD + Dd − r (n + d − r), r = min(n, D, d): the dimension of {(O, W_O): O W_O = Y} at a generic Y, with D `mixed`,
    d `width`, n `tokens`.

    D² when n and d are at least D (any invertible matrix may sit between); never 0 for D ≥ 1.

    >>> factorization_ambiguity(mixed=2, width=3, tokens=5)
    4

    Elementary (the fibre of the matrix product). Raises `InputError` for sizes below one.
    """
    _require_positive("factorization_ambiguity", mixed=mixed, width=width, tokens=tokens)
    r = min(tokens, mixed, width)
    return tokens * mixed + mixed * width - r * (tokens + width - r)


def gauge_dimension(groups: int, head_width: int, *, value_bias: bool = False, output_bias: bool = False) -> int:
    """How many directions the value and output weights can move in without changing the function they compute.

    G d_k² for G key/value `groups` (V_g → V_g M_g, W_h → M_g⁻¹ W_h), and G d_k more when values and output both have a
    bias (b_V → b_V + δ, b_O → b_O − Σ_h δ_{g(h)} W_h, because attention rows sum to one).

    Head figures that move under this gauge are figures of the parametrisation, not of the model.

    >>> gauge_dimension(groups=2, head_width=3), gauge_dimension(groups=2, head_width=3, value_bias=True, output_bias=True)
    (18, 24)

    Elementary; holds for value and output weights of full rank. Raises `InputError` for sizes below one.
    """
    _require_positive("gauge_dimension", groups=groups, head_width=head_width)
    return groups * head_width**2 + (groups * head_width if value_bias and output_bias else 0)


def write_space_overlap(output_projection: Float[Tensor, "mixed width"], heads: int) -> Float[Tensor, "head head"]:
    """How far two heads write into the same directions: what one of them wrote can have come from the other.

    ‖Q_g Q_hᵀ‖_F² / min(rank W_g, rank W_h), Q_h an orthonormal basis of row(W_h): the mean squared cosine of the principal
    angles between the two write spaces.

    0: orthogonal write spaces. 1: one contains the other; 1 on the diagonal. Two random d_k-dimensional spaces in d dimensions
    overlap by d_k/d. Gauge-invariant. A head that writes nothing has NaN in its row and column.

    >>> write_space_overlap(torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]]), heads=2)
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]], dtype=torch.float64)

    Björck and Golub, Numerical Methods for Computing Angles Between Linear Subspaces, 1973.
    Raises `InputError` for a matrix that `heads` does not divide.
    """
    bases = [_basis(block) for block in _blocks("write_space_overlap", output_projection, heads)]
    overlap = torch.full((heads, heads), math.nan, dtype=torch.float64)
    for g, first in enumerate(bases):
        for h, second in enumerate(bases[: g + 1]):
            smaller = min(first.shape[0], second.shape[0])
            if smaller:
                overlap[g, h] = overlap[h, g] = float((first @ second.mT).square().sum()) / smaller
    return overlap


def principal_angles(
    first: Float[Tensor, "head_width width"], second: Float[Tensor, "head_width_ width"]
) -> Float[Tensor, "angle"]:
    """The angles between two heads' write spaces, in radians, ascending: 0 is a shared direction.

    arccos of the singular values of Q_1 Q_2ᵀ, Q an orthonormal basis of each block's row space; as many as the smaller rank.

    0 to π/2. Gauge-invariant. Angles below about 1e-8 are rounding.

    >>> principal_angles(torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1.0, 0]]))
    tensor([0.7854], dtype=torch.float64)

    Björck and Golub 1973. Raises `InputError` for anything but two matrices of one width.
    """
    _require_matrix("principal_angles", first)
    _require_matrix("principal_angles", second)
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"principal_angles: expected two blocks [head_width, width] of one width, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}. They belong to different projections. Take both from one output projection."
        )
    return torch.linalg.svdvals(_basis(first) @ _basis(second).mT).clamp(max=1).arccos()


def conditioning(output_projection: Float[Tensor, "mixed width"], heads: int) -> float:
    """How much noise is amplified when the sum of the heads is read back into single contributions.

    σ_max/σ_min of the stacked orthonormal bases of row(W_1) … row(W_H). (The condition number of W_O itself is no property
    of the model: a gauge change took it from 150 to 70,299 where this figure stayed.)

    1: mutually orthogonal write spaces, contributions are plain projections. Infinite when the write spaces are linearly
    dependent, so also whenever Σ rank W_h exceeds the width.

    >>> conditioning(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), heads=2)  # two lines at 45 degrees
    2.41421...

    THEORY of this project, section 6. Raises `InputError` for a matrix that `heads` does not divide.
    """
    stacked = torch.cat([_basis(block) for block in _blocks("conditioning", output_projection, heads)])
    if stacked.shape[0] == 0 or stacked.shape[0] > stacked.shape[1]:
        return math.inf
    sigma = torch.linalg.svdvals(stacked)
    # A basis taken from weights stored with rounding ε is itself known to about ε only.
    smallest = torch.finfo(output_projection.dtype).eps if output_projection.dtype != torch.float64 else 1e-14
    return float(sigma[0] / sigma[-1]) if float(sigma[-1]) > smallest else math.inf


def write_grams(output_projection: Float[Tensor, "mixed width"], heads: int) -> Float[Tensor, "head width width"]:
    """W_h W_hᵀ of every head, [head, head_width, head_width]: all that `contribution_energy` needs of the weights.

    >>> write_grams(torch.eye(4), heads=2).shape
    torch.Size([2, 2, 2])

    Raises `InputError` for a matrix that `heads` does not divide.
    """
    blocks = _blocks("write_grams", output_projection, heads)
    dtype = torch.promote_types(output_projection.dtype, torch.float32)
    return torch.stack([block.to(dtype) @ block.to(dtype).mT for block in blocks])


def contribution_energy(
    head_outputs: Float[Tensor, "*batch token mixed"],
    output_projection: Float[Tensor, "mixed width"],
    heads: int,
    mask: Bool[Tensor, "*batch token"] | None = None,
    *,
    grams: Float[Tensor, "head width width"] | None = None,
) -> Float[Tensor, "*batch head"]:
    """How much each head moves the tokens apart: the energy of its centred contribution to the residual stream.

    ‖C O_h W_h‖_F² = tr((C O_h)ᵀ(C O_h) · W_h W_hᵀ), C the centring over real tokens. Never forms O_h W_h: n D d_k operations
    instead of the n D d of the projection. `grams` are the `write_grams`, if they are at hand.

    0 for a head that tells every token the same, then upwards. Invariant under the gauge and under a value bias. The energies
    do not sum to ‖C Y‖²: the cross terms between heads are the point.

    >>> contribution_energy(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.eye(2), heads=2)
    tensor([2., 0.])

    THEORY of this project, section 6. Raises `InputError` where the axes do not fit.
    """
    mixed = output_projection.shape[0]
    if head_outputs.ndim < 2 or head_outputs.shape[-1] != mixed:
        raise InputError(
            f"contribution_energy: expected head outputs [*batch, token, mixed] with mixed = {mixed}, got "
            f"{tuple(head_outputs.shape)}. They may be split by head already. Flatten the last two axes."
        )
    if mask is not None and mask.shape != head_outputs.shape[:-1]:
        raise InputError(
            f"contribution_energy: expected a mask {tuple(head_outputs.shape[:-1])}, got {tuple(mask.shape)}. "
            "It marks real tokens. Pass the attention mask as bool."
        )
    grams = write_grams(output_projection, heads) if grams is None else grams
    dtype = torch.promote_types(head_outputs.dtype, torch.float32)
    O = head_outputs.to(dtype)
    if mask is None:
        O = O - O.mean(-2, keepdim=True)
    else:
        real = mask[..., None]
        O = torch.where(real, O, 0)
        O = torch.where(real, O - O.sum(-2, keepdim=True) / real.sum(-2, keepdim=True), 0)
    O = O.unflatten(-1, (heads, mixed // heads)).transpose(-2, -3)  # [*batch, head, token, head_width]
    return ((O.mT @ O) * grams.to(dtype)).sum((-2, -1))


def gate_rank(gates: Float[Tensor, "position head"], tolerance: float | None = None) -> tuple[int, float]:
    """How many heads the gates can tell apart when contents recur, and how well: (rank G, σ_max/σ_min over the heads).

    Singular values of G (m positions × H heads) above `tolerance`, by default ε max(m, H) σ_max with ε of G's dtype.

    1 for constant or proportional gates (heads stay mixed) to min(m, H). The condition is infinite below full column rank.

    >>> gate_rank(torch.tensor([[1.0, 1.0], [1.0, 2.0]]))[0], gate_rank(torch.ones(3, 2))
    (2, (1, inf))

    THEORY of this project, section 7. Raises `InputError` for anything but a finite matrix.
    """
    _require_matrix("gate_rank", gates)
    sigma = torch.linalg.svdvals(gates.detach().double())
    limit = torch.finfo(gates.dtype).eps * max(gates.shape) * float(sigma[0]) if tolerance is None else tolerance
    found = int((sigma > limit).sum())
    return found, float(sigma[0] / sigma[-1]) if found == gates.shape[1] else math.inf


def attribution_verdict(kernel: int, noise_gain: float) -> str:
    """In words, whether a result may be attributed to a head: from `kernel_dimension` and `conditioning`.

    `attributable`: the contributions can be read back, with noise amplified at most tenfold; `attributable with care (noise
    gain …)`: they can, with more; `not attributable (kernel …)`: part of the head outputs is gone, or (kernel 0) the write
    spaces are dependent.

    >>> attribution_verdict(0, 3.0), attribution_verdict(0, 120.0), attribution_verdict(64, float("inf"))
    ('attributable', 'attributable with care (noise gain 120)', 'not attributable (kernel 64)')
    """
    if kernel > 0 or not math.isfinite(noise_gain):
        return f"not attributable (kernel {kernel})"
    if noise_gain <= MODEST_NOISE_GAIN:
        return "attributable"
    return f"attributable with care (noise gain {noise_gain:.3g})"


# Pieces -------------------------------------------------------------------------------------------------------------


def _rank(matrix: Tensor) -> int:
    """Numerical rank, against what storing the matrix in its dtype can have added."""
    rows, columns = matrix.shape
    sigma = torch.linalg.svdvals(matrix.detach().double())
    return int((sigma > _tolerance(matrix, sigma, rows, columns)).sum())


def _tolerance(matrix: Tensor, sigma: Tensor, rows: int, columns: int) -> float:
    stored = torch.finfo(matrix.dtype).eps * float(sigma.norm()) * (rows**-0.5 + columns**-0.5)
    return stored + max(rows, columns) * torch.finfo(torch.float64).eps * float(sigma[0])


def _basis(block: Tensor) -> Tensor:
    """An orthonormal basis of the row space, [rank, width], float64."""
    _, sigma, rows = torch.linalg.svd(block.detach().double(), full_matrices=False)
    return rows[sigma > _tolerance(block, sigma, *block.shape)]


def _blocks(function: str, output_projection: Tensor, heads: int) -> tuple[Tensor, ...]:
    _require_matrix(function, output_projection)
    if heads < 1 or output_projection.shape[0] % heads:
        raise InputError(
            f"{function}: expected an output projection [mixed, width] whose rows {heads} heads share equally, got "
            f"{tuple(output_projection.shape)}. It may be transposed: nn.Linear stores [width, mixed]. Pass weight.T."
        )
    return output_projection.chunk(heads)


def _require_matrix(function: str, matrix: Tensor) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape or not matrix.is_floating_point() or not bool(matrix.isfinite().all()):
        what = f"{str(matrix.dtype).removeprefix('torch.')}{list(matrix.shape)}"
        raise InputError(
            f"{function}: expected a finite floating-point matrix, got {what}. "
            "Weights may hold NaN, or be quantised. Pass the dequantised 2-D weight."
        )


def _require_positive(function: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(
                f"{function}: expected {name} of 1 or more, got {size}. Count from the model's configuration."
            )
