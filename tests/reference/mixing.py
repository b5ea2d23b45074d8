"""Attention measured one row at a time: what a reader would write down first, in float64."""

import math

import numpy as np


def softmax(logits):
    top = max(logits)
    powers = [math.exp(s - top) for s in logits]
    total = math.fsum(powers)
    return [p / total for p in powers]


def row_entropy(weights):
    total = math.fsum(weights)
    return -math.fsum(a / total * math.log(a / total) for a in weights if a > 0)


def least_entropy(norm, count):
    """The entropy of the logits of this centred norm that put one key above all others: the bound's extremal row."""
    if count == 1:
        return 0.0
    above = norm * math.sqrt((count - 1) / count)
    below = -norm / math.sqrt(count * (count - 1))
    return row_entropy(softmax([above] + [below] * (count - 1)))


def row_figures(logits, sink=None):
    """All figures of one row from its allowed logits; NaN where there are none."""
    count = len(logits)
    names = ("entropy", "normalized_entropy", "norm_floor", "entropy_floor", "max_logit", "susceptibility", "sink_mass")
    if count == 0:
        return dict.fromkeys(names, math.nan) | {"allowed_keys": 0}
    weights = softmax(logits)
    entropy = row_entropy(weights)
    mean, top = math.fsum(logits) / count, max(logits)
    expected = math.fsum(a * s for a, s in zip(weights, logits, strict=True))
    norm_floor = least_entropy(math.sqrt(math.fsum((s - mean) ** 2 for s in logits)), count)
    log_sum = top + math.log(math.fsum(math.exp(s - top) for s in logits))
    return {
        "entropy": entropy,
        "normalized_entropy": entropy / math.log(count) if count > 1 else math.nan,
        "norm_floor": norm_floor,
        "entropy_floor": max(norm_floor, log_sum - top, math.log(count) - (top - mean)),
        "max_logit": top,
        "susceptibility": math.fsum(a * (s - expected) ** 2 for a, s in zip(weights, logits, strict=True)),
        "sink_mass": math.nan if sink is None else 1 / (1 + math.exp(log_sum - sink)),
        "allowed_keys": count,
    }


def logits(q, k, scale=None, softcap=None, bias=None):
    """[batch, head, query, key] from q [batch, head, query, width] and k [batch, group, key, width]."""
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    out = np.zeros((batch, heads, queries, keys))
    for b, h, i, j in np.ndindex(out.shape):
        s = sum(q[b, h, i, c] * k[b, h * groups // heads, j, c] for c in range(width)) * (scale or width**-0.5)
        if softcap is not None:
            s = softcap * math.tanh(s / softcap)
        out[b, h, i, j] = s if bias is None else s + bias[b, h, i, j]
    return out


def figures(scores, allowed, real_queries=None, sink=None):
    """`row_figures` of every row of `scores`, as arrays [batch, head, query]; padded queries NaN."""
    rows = {}
    for b, h, i in np.ndindex(scores.shape[:3]):
        real = real_queries is None or real_queries[b, i]
        seen = [scores[b, h, i, j] for j in range(scores.shape[3]) if real and allowed[b, h, i, j]]
        for name, value in row_figures(seen, None if sink is None else sink[h]).items():
            rows.setdefault(name, np.zeros(scores.shape[:3]))[b, h, i] = value
    return rows


def contraction(weights):
    """||C A C||_2 by centring matrices."""
    queries, keys = weights.shape
    left, right = (np.eye(n) - np.ones((n, n)) / n for n in (queries, keys))
    return np.linalg.norm(left @ weights @ right, 2)


def dobrushin(weights):
    return max(np.abs(one - other).sum() / 2 for one in weights for other in weights)
