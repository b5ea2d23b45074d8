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
