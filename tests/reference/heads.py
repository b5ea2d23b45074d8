"""An attention layer written head by head, and what its derivative says of its symmetries."""

import math

import numpy as np
import torch


def nullity(function, parameters):
    """Dimension of the directions in which no parameter step changes `function`, to first order, and the rank's gap."""
    names = list(parameters)
    sizes = [parameters[n].numel() for n in names]

    def flat(vector):
        pieces = torch.split(vector, sizes)
        return function({n: p.view_as(parameters[n]) for n, p in zip(names, pieces, strict=True)}).flatten()

    at = torch.cat([parameters[n].flatten() for n in names])
    jacobian = torch.func.jacrev(flat)(at)
    assert jacobian.shape[0] > jacobian.shape[1], "too few outputs to see every parameter"
    sigma = torch.linalg.svdvals(jacobian)
    rank = int((sigma > 1e-9 * sigma[0]).sum())
    assert rank == len(sigma) or sigma[rank] < 1e-3 * sigma[rank - 1], "no clear cut"
    return len(sigma) - rank


def rotate(x, rotary_width):
    """The first `rotary_width` channels of [token, width] turned pairwise by position."""
    turned = x.clone()
    for pair in range(rotary_width // 2):
        angle = torch.arange(len(x), dtype=x.dtype) * 0.9**pair * (pair + 1) ** 0.5
        first, second = x[:, 2 * pair], x[:, 2 * pair + 1]
        turned[:, 2 * pair] = angle.cos() * first - angle.sin() * second
        turned[:, 2 * pair + 1] = angle.sin() * first + angle.cos() * second
    return turned


def logits(p, x, heads, groups, rotary_width=0):
    """[head, query, key] for one sequence. Biases and gains are used where `p` has them."""
    scores = []
    for h in range(heads):
        g = h * groups // heads
        q = x @ p["W_Q"][h] + (p["b_Q"][h] if "b_Q" in p else 0)
        k = x @ p["W_K"][g] + (p["b_K"][g] if "b_K" in p else 0)
        if "gain_Q" in p:
            q = p["gain_Q"] * q / q.square().mean(-1, keepdim=True).sqrt()
            k = p["gain_K"] * k / k.square().mean(-1, keepdim=True).sqrt()
        scores.append(rotate(q, rotary_width) @ rotate(k, rotary_width).T / math.sqrt(q.shape[-1]))
    return torch.stack(scores)


def attention(p, x, heads, groups):
    """The layer's output [token, width]: heads mixed one by one, contributions added."""
    weights = torch.softmax(logits(p, x, heads, groups), -1)
    out = p.get("b_O", 0)
    for h in range(heads):
        g = h * groups // heads
        out = out + weights[h] @ (x @ p["W_V"][g] + (p["b_V"][g] if "b_V" in p else 0)) @ p["W_O"][h]
    return out


def contribution_energy(outputs, W, heads):
    """||C O_h W_h||_F^2 with every matrix written out, for outputs [token, mixed]."""
    centre = np.eye(len(outputs)) - np.ones((len(outputs),) * 2) / len(outputs)
    head_width = W.shape[0] // heads
    cuts = [slice(h * head_width, (h + 1) * head_width) for h in range(heads)]
    return [np.sum((centre @ outputs[:, cut] @ W[cut]) ** 2) for cut in cuts]


def storage_tolerance(W, eps):
    """Up to where a singular value may be rounding, of W stored with relative rounding `eps`."""
    rows, columns = W.shape
    if not rows:
        return 0.0
    sigma = np.linalg.svd(W, compute_uv=False)
    return eps * np.linalg.norm(W) * (rows**-0.5 + columns**-0.5) + max(rows, columns) * 2.0**-52 * sigma[0]


def write_space_figures(W, heads, eps):
    """Rank of W, condition number, noise gains and overlaps of the write spaces, by singular values alone."""
    bases = []
    for block in np.split(W, heads):
        _, sigma, rows = np.linalg.svd(block, full_matrices=False)
        bases.append(rows[sigma > storage_tolerance(block, eps)])
    stack = np.concatenate(bases)
    left, sigma, _ = np.linalg.svd(stack, full_matrices=False)
    cut = storage_tolerance(stack, eps)
    kept = sigma > cut
    condition = sigma[0] / sigma[-1] if 0 < len(stack) <= W.shape[1] and kept.all() else math.inf
    gains, start = [], 0
    for basis in bases:
        own = left[start : start + len(basis), kept]
        start += len(basis)
        if not len(basis):
            gains.append(0.0)
        elif len(basis) - np.sum(own**2) > cut and kept.sum() < len(stack):
            gains.append(math.inf)
        else:
            gains.append(np.linalg.norm(own / sigma[kept], 2))
    overlaps = [
        [np.sum((a @ b.T) ** 2) / min(len(a), len(b)) if len(a) and len(b) else math.nan for b in bases] for a in bases
    ]
    rank = int((np.linalg.svd(W, compute_uv=False) > storage_tolerance(W, eps)).sum())
    return {"rank": rank, "condition": condition, "gains": np.array(gains), "overlaps": np.array(overlaps)}
