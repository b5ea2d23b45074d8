"""The heads of one attention written out in NumPy, float64, from weights and hooked inputs: no code of the package."""

from __future__ import annotations

import numpy as np


def row_basis(W, tol):
    """Orthonormal rows spanning row(W), singular values up to `tol` dropped."""
    _, sigma, rows = np.linalg.svd(W, full_matrices=False)
    return rows[sigma > tol]


def tolerance(W, eps):
    """What computing in a format of that eps may leave in the place of a zero."""
    rows, columns = W.shape
    stored = eps * np.linalg.norm(W) * (rows**-0.5 + columns**-0.5)
    return stored + max(rows, columns) * np.finfo(float).eps * np.linalg.norm(W, 2)


def figures(W_O, heads, eps):
    """Every figure of the weights. A head's noise gain is the norm of the oblique projection onto its write space along the
    others', found by least squares; None where a direction of it is theirs too."""
    W = np.asarray(W_O, dtype=float)
    blocks = np.split(W, heads)
    bases = [row_basis(block, tolerance(block, eps)) for block in blocks]
    rank = len(row_basis(W, tolerance(W, eps)))
    stack = np.vstack(bases)
    cut = tolerance(stack, eps)
    sigma = np.linalg.svd(stack, compute_uv=False)
    gains = []
    for h, basis in enumerate(bases):
        others = np.vstack([b for g, b in enumerate(bases) if g != h]) if heads > 1 else np.zeros((0, W.shape[1]))
        rest = row_basis(others, cut) if len(others) else others
        outside = basis - basis @ rest.T @ rest
        smallest = np.linalg.svd(outside, compute_uv=False)[-1]
        gains.append(None if smallest < 1e-7 else 1 / smallest)
    pairs = [[a @ b.T for b in bases] for a in bases]
    return {
        "width": W.shape[1],
        "output_projection_rank": rank,
        "kernel_dimension": W.shape[0] - rank,
        "contribution_ambiguity": sum(map(len, bases)) - rank,
        "condition_number": None if len(stack) > W.shape[1] or sigma[-1] <= cut else sigma[0] / sigma[-1],
        "absolute_noise_gain": None if len(stack) > W.shape[1] or sigma[-1] <= cut else 1 / sigma[-1],
        "write_space_overlap": [[np.sum(p**2) / min(p.shape) for p in row] for row in pairs],
        "cosine_of_smallest_angle": [[np.linalg.norm(p, 2) for p in row] for row in pairs],
        "head_noise_gain": gains,
    }


def fibre_of_the_product(tokens, mixed, width):
    """Dimension of {(O, W_O) : O W_O = Y} at a random pair, from the rank of the derivative of the product."""
    rng = np.random.default_rng(0)
    O, W = rng.standard_normal((tokens, mixed)), rng.standard_normal((mixed, width))
    jacobian = np.hstack([np.kron(np.eye(tokens), W.T), np.kron(O, np.eye(width))])
    return jacobian.shape[1] - np.linalg.matrix_rank(jacobian @ jacobian.T, hermitian=True)


def contributions(read, W_O, heads):
    """O_h W_h for every head: `read` [batch, token, mixed] is what the projection reads."""
    read, W = np.asarray(read, dtype=float), np.asarray(W_O, dtype=float)
    size = W.shape[0] // heads
    cuts = [slice(h * size, (h + 1) * size) for h in range(heads)]
    return np.stack([read[..., cut] @ W[cut] for cut in cuts], axis=-2)


def energy_shares(read, W_O, heads, mask=None):
    """Each head's share of the summed energies of the centred contributions, a row a sequence."""
    written = contributions(read, W_O, heads)
    shares = []
    for i, sequence in enumerate(written):
        real = sequence if mask is None else sequence[np.asarray(mask[i], dtype=bool)]
        centred = real - real.mean(0)
        energies = (centred**2).sum((0, 2))
        shares.append(energies / energies.sum())
    return np.array(shares)
