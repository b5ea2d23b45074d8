"""Measures of an attention matrix: how sharply each query chooses its keys, and what the mixture does to the tokens.

Two families. From the *weights* a softmax produced: `entropy`, `normalized_entropy`, `contraction`, `spectral_gap`,
`dobrushin`. From *queries and keys*, without ever holding an n x n matrix: `fused_entropy`, `entropy_floor`,
`susceptibility`, and `row_statistics`, which takes all of them in one pass and knows masks, biases, softcaps and sinks.

Queries and keys are those the softmax saw: after rotary embedding and QK-norm, and with the scale of the layer. Where a
model adds something to its logits, hand it to `row_statistics`; the entropy of a softmax the model never ran is no
measurement. Where it cannot be had, use the weights. Entropies are in nats.

The logits exist one tile at a time, small enough to stay in the processor's cache (`TILE_BYTES`). On CPUs that was no slower
than the fused attention kernel at the sizes tried (16 to 512 keys), because entropy, extremes and variance come from one
product of queries and keys where the fused kernel needs two; on other devices the tiles are larger.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import InputError
from uncollapse.measures import leading_spectrum as krylov
from uncollapse.measures.admission import admitting, at_size_one, described, is_ordinary, times_power_of_two
from uncollapse.measures.shared_out import shared_out
from uncollapse.measures.symmetric_eigenvalues import eigenvalues

TILE_BYTES = 2 << 20  # measured: 1 to 4 MiB are equal, from 8 MiB on the tile leaves the cache and costs double
# Rows of a tile of long rows, if these are no more than four times as much: every tile has its price in calls.
LEAST_ROWS = 64
DEVICE_TILE_BYTES = 64 << 20  # accelerators want few large launches
CAUSAL_ROWS = 128  # rows of a causal tile: its keys end with its last row, so that half of all pairs are never computed
# Numbers that a processor takes at once, or a multiple of them: rows of other lengths cost more than what is left out of them.
LANES = 16
FEW_KEYS = 4  # rows over fewer keys have no key share: two keys leave little to be uniform about
FEW_RIVALS = 16  # rows over fewer keys have no rest entropy: with few others, one of them wins by chance
FLAT = 0.75  # up to this weight of the strongest key, 1 less it keeps the digits of what the others have
LEAST_REST = 1e-6  # below this share of a row, what the others have is taken from their own logits
UNDERFLOW = 88.0  # exp(-88) is where single precision, and bfloat16 with it, ends
DIRECT = 128  # up to so many rows or keys a decomposition is as fast as products are
# Of weights that lie in memory at once while their spectra are taken. Larger matrices exist in tiles only.
KEPT_BYTES = 24 << 20
VECTORS = 16  # of a block; products with fewer are no faster
BLOCKS = 16  # so many products at most where the weights lie in memory
TILED_BLOCKS = 8  # and where they are made anew for each
CLOSE, TILED_CLOSE = 3e-7, 1e-4  # when to stop: the error of a leading singular value, as a share of it
COARSE = 1e-2  # a larger error makes no figure
FORBIDDEN = -1e37  # the logit of a forbidden pair. Finite, since 0 * FORBIDDEN is 0 where 0 * -inf would be NaN
FARTHER = -math.sqrt(torch.finfo(torch.float64).max)  # the same in double precision, for logits out of the ordinary
LOST = FORBIDDEN / 2  # a logit below is one of a forbidden pair, or that of a weight of 0
LARGEST = 480  # binary digits of logits in double precision: their squares, and sums of these, stay within its range


@dataclass(frozen=True)
class RowStatistics:
    """What every query row of an attention call did. NaN in padded rows and in rows that are allowed no key.

    `entropy_floor` is the best of the floors that the rows' logits admit; `max_logit` the largest allowed logit as the
    softmax saw it (scaled, capped, with its bias); `susceptibility` the variance of the logits under the row's own
    weights; `sink_mass` what a sink took from the row. `None`: not asked for, or not to be had from what was given.
    `route` is `logits` (recomputed from queries and keys) or `weights` (the model's own softmax).

    `rest_entropy` is the normalised entropy of what is left of the row when its strongest key is taken out: of
    a_ij / (1 - a_i*) over the other T_i - 1 keys, divided by ln(T_i - 1). 0 to 1. A head that looks at one key for a reason (the
    first token, itself) keeps an ordinary distribution over the others, however little weight they have; where the logits as a
    whole are too large, there is a winner among the others too, and it falls to 0. From logits it does not matter how far the
    others are below the strongest; from weights it is NaN where all others have underflowed.
    `keys_within_reach` is the share of these T_i - 1 keys whose weight beside the strongest *of them* is not 0 in single precision:
    whose logit is less than `UNDERFLOW` below. A key out of reach gets neither weight nor gradient. 1 where every key can still
    win or lose, also for a head that a position decides; NaN where weights alone are known and have underflowed.
    `key_share` is (exp(H_i) - 1) / (T_i - 1), the share of the other keys that a row uses beside one: 1 for uniform, 0 for a
    single key. For random logits of small variance v it is 1 - v/2 whatever T_i is, where the normalised entropy depends on it.
    The three are NaN in rows of fewer than `FEW_RIVALS` and `FEW_KEYS` keys: whether the few others of a short row are spread or
    not is chance (SmolLM2 goes down to 0.03 over 5 keys, to 0.06 over 8, and to 0.16 over 64).
    """

    entropy: Float[Tensor, "batch head query"]
    normalized_entropy: Float[Tensor, "batch head query"]
    allowed_keys: Int[Tensor, "batch head query"]
    entropy_floor: Float[Tensor, "batch head query"] | None
    max_logit: Float[Tensor, "batch head query"] | None
    susceptibility: Float[Tensor, "batch head query"] | None
    sink_mass: Float[Tensor, "batch head query"] | None
    rest_entropy: Float[Tensor, "batch head query"]
    keys_within_reach: Float[Tensor, "batch head query"]
    key_share: Float[Tensor, "batch head query"]
    route: Literal["logits", "weights"]


def dispersion_length(logit_range: float, weight: float = 0.5) -> float:
    """Over how many keys a head cannot be sharp any more, if the logits of a row differ by at most `logit_range`. A count of keys.

    n = 1 + e^delta (1 - w)/w: the largest weight is at most e^delta/(n - 1 + e^delta), so over more than n allowed keys none
    has more than the share w = `weight`.

    From 1 (w = 1) to infinity; 2 for delta = 0 and w = 1/2. Rises with the range, falls with the weight.

    It says what a head *cannot* do. Below n nothing follows: the head may be spread all the same.

    >>> dispersion_length(math.log(3)), dispersion_length(math.log(3), weight=0.75)  # weights 3/4 and 1/4 over two keys
    (4.0, 2.0)

    Velickovic et al., softmax is not enough, arXiv 2410.01104; the claim `dispersion`. Raises `InputError` for a negative or
    infinite range and a weight outside of (0, 1].
    """
    if not 0 <= logit_range < math.inf or not 0 < weight <= 1:
        raise InputError(
            f"dispersion_length: expected a finite logit_range of at least 0 and a weight above 0 and at most 1, got {logit_range} "
            f"and {weight}. A range of logits is their maximum less their minimum. Pass for example logit_range=8.0, weight=0.5."
        )
    return 1 + math.exp(min(logit_range, 700.0)) * (1 - weight) / weight


@admitting
def entropy(
    weights: Float[Tensor, "*batch query key"], mask: Bool[Tensor, "*batch_ token"] | None = None
) -> Float[Tensor, "*batch query"]:
    """How many keys a row looks at, on a logarithmic scale: exp(H_i) is an effective number of keys. In nats.

    H_i = -sum_j a_ij ln a_ij, with row i of `weights` scaled to sum to one (rows that a sink, a padded key or half
    precision left short of one thereby count as distributions over the keys they have), and 0 ln 0 = 0.

    0 (one key) to ln T_i (uniform over the T_i allowed keys). Entropy collapse is H near 0; the mixture that shrinks
    the token cloud fastest is H = ln T_i. Invariant under permutations of keys and shifts of the row's logits.

    `mask` marks real tokens. Its leading axes stand for the first axes of `weights`: `[batch, token]` serves
    `[batch, head, query, key]`. Padded keys are left out; in a square matrix padded queries come out NaN. A row over
    few keys cannot have a high entropy: compare `normalized_entropy` where lengths differ.

    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([0.0000, 0.6931])

    Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296, section 3.
    Raises `InputError` for weights that are no floating-point matrix or a mask that does not fit.
    """
    A, _, _ = _real_part("entropy", weights, mask, _accumulation(weights.dtype))
    if not is_ordinary(A):
        A = at_size_one(A.double(), (-1,))[0].to(A.dtype)
    A = A / A.sum(-1, keepdim=True)  # padded rows are 0: NaN from here on
    return 0 - torch.xlogy(A, A).sum(-1)  # no weight is above 1


@admitting
def normalized_entropy(
    weights: Float[Tensor, "*batch query key"],
    mask: Bool[Tensor, "*batch_ token"] | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, "*batch query"]:
    """The share of its possible entropy that a row has: comparable between rows over different numbers of keys.

    H_i / ln T_i, with H_i of `entropy` and T_i the number of keys that row i was allowed.

    0 (one key) to 1 (uniform). NaN for T_i = 1: the first row under a causal mask has no choice, which is no collapse.

    Weights do not tell a forbidden key from an unlikely one, so T_i is what you say: all keys, those that `mask` calls
    real, and with `causal=True` only keys j <= i. Under any other pattern (sliding window, blocks) the figure is too
    small: use `row_statistics_from_weights` with `allowed`.

    >>> normalized_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), causal=True)
    tensor([nan, 1.])

    Zhai et al. 2023, arXiv 2303.06296. Raises `InputError` as `entropy` does, and where a causal matrix is not square.
    """
    _, real = _real_queries_and_keys("normalized_entropy", weights, mask)
    if causal:
        _require_square("normalized_entropy", *weights.shape[-2:])
    T = real.cumsum(-1) if causal else real.sum(-1, keepdim=True)
    return _normalized(entropy(weights, mask), T)


@admitting
def fused_entropy(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch group key width"],
    *,
    mask: Bool[Tensor, "batch key"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch head query"]:
    """`entropy` of softmax(scale q k^T), with scores, softmax and entropy fused tile by tile: memory O(n). In nats.

    H_i = ln Z_i - sum_j a_ij (s_ij - m_i), with s_ij = scale <q_i, k_j>, m_i = max_j s_ij, Z_i = sum_j exp(s_ij - m_i)
    and a_ij = exp(s_ij - m_i) / Z_i, over the allowed keys j. `scale` is 1/sqrt(width) unless given.

    0 to ln T_i. Invariant under a common shift of all keys. `head` is a multiple of `group`; query head h reads key
    group h // (head / group). Half precision is computed in float32.

    `mask` marks real keys, and in a square call (as many queries as keys) the same tokens as queries: padded rows come
    out NaN. For cross-attention that happens to be square, and for anything that the model adds to its logits, use
    `row_statistics`.

    >>> q = torch.zeros(1, 1, 3, 8)  # zero queries choose uniformly; a causal row i over i + 1 keys
    >>> fused_entropy(q, torch.ones(1, 1, 3, 8), causal=True)
    tensor([[[0.0000, 0.6931, 1.0986]]])

    Zhai et al. 2023, arXiv 2303.06296, section 3. Raises `InputError` where queries, keys and mask do not fit together.
    """
    return _measure(_self_scores("fused_entropy", q, k, mask, causal, scale), False, False).entropy


@admitting
def susceptibility(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch group key width"],
    *,
    mask: Bool[Tensor, "batch key"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch head query"]:
    """How fast a row loses entropy when its logits grow: the variance of the logits under the row's own weights.

    Var_{j~A_i}(s_ij) = sum_j a_ij s_ij^2 - (sum_j a_ij s_ij)^2 = -dH_i / d ln t at t = 1 for logits t s_ij. In nats per
    unit of ln t; symbols of `fused_entropy`.

    0 and above. 0 exactly where the row is uniform on the keys it looks at, which is so at both ends: uniform attention
    and complete entropy collapse. Large between them: the row is on its way. Invariant under a shift of all keys.

    It says nothing of direction: a row of susceptibility 0 may be healthy or dead, its entropy tells.

    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)  # weights 1/4 and 3/4
    >>> susceptibility(q, k)  # 3/16 (ln 3)^2
    tensor([[[0.2263]]])

    The derivative is elementary; the logit scale as control of collapse is Zhai et al. 2023, arXiv 2303.06296.
    Raises `InputError` as `fused_entropy` does.
    """
    return _measure(_self_scores("susceptibility", q, k, mask, causal, scale), False, True).variance


@admitting
def entropy_floor(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch group key width"],
    *,
    mask: Bool[Tensor, "batch key"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch head query"]:
    """The least entropy that a row's logits can have, given only how large they are. In nats; no attention pass.

    ln(1 + (T-1) b) + g (T-1) b / (1 + (T-1) b), b = exp(-g), g = sigma sqrt(T/(T-1)), where T = T_i counts the allowed
    keys and sigma_i^2 = scale^2 q_i^T (K_c^T K_c) q_i is the squared norm of the row's centred logits (K_c: the keys
    that the row is allowed, centred over them; prefix moments when causal). The floor is attained by one key that
    stands g above all others. O(n width^2) time.

    0 (logits so large that one key may take all) to ln T_i (no differences at all). Below ln T_i - 1, say, the bound
    permits a collapse; it does not assert one.

    Usually vacuous for long rows: sigma grows like sqrt(T), and at 512 keys with logits of unit variance the floor is
    1e-6 where the entropy is 5.7. `row_statistics` has sharper floors, which need the logits.

    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    >>> entropy_floor(q, k)  # two keys: the floor is the entropy, ln 4 - 3/4 ln 3
    tensor([[[0.5623]]])

    Zhai et al. 2023, arXiv 2303.06296, theorem 3.1, for a given norm. Raises `InputError` as `fused_entropy` does.
    """
    batch, groups, repeats, queries, keys = _sizes("entropy_floor", q, k)
    if causal:
        _require_square("entropy_floor", queries, keys)
    real = k.new_ones(batch, keys, dtype=torch.bool)
    if mask is not None:
        real = _real_tokens("entropy_floor", "mask", mask, batch, keys)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # float64: a causal variance is a small difference of large prefix sums
    Q = q.detach().double().view(batch, groups, repeats, queries, -1) * scale
    counted = real[:, None, :, None].double()
    K = torch.where(real[:, None, :, None], k.detach().double(), 0)
    K = (K - K.sum(2, keepdim=True) / counted.sum(2, keepdim=True)) * counted
    T = real.cumsum(-1) if causal else real.sum(-1, keepdim=True).expand(batch, queries)
    square_norm = _prefix_square_norm(Q, K, T) if causal else ((Q @ (K.mT @ K)[:, :, None]) * Q).sum(-1)
    floor = _floor_from_norm(square_norm, T[:, None, None])  # NaN where T is 0
    if queries == keys:
        floor = floor.masked_fill(~real[:, None, None], math.nan)
    return floor.flatten(1, 2).to(_accumulation(q.dtype))


def _prefix_square_norm(
    Q: Float[Tensor, "batch group repeat token width"],
    K: Float[Tensor, "batch group token width"],
    T: Int[Tensor, "batch token"],
) -> Float[Tensor, "batch group repeat token"]:
    """sum_{j<=i} <q_i, k_j>^2 less T_i times the squared mean: moments of the blocks before, pairs within the block."""
    block = LEAST_ROWS  # any number of rows will do
    prefix_mean = K.cumsum(2) / T[:, None, :, None]  # NaN before the first real token
    centre = (Q * prefix_mean[:, :, None]).sum(-1)
    moments = K.new_zeros(*K.shape[:2], K.shape[3], K.shape[3])
    squares = []
    for start in range(0, K.shape[2], block):
        rows, keys = Q[..., start : start + block, :], K[:, :, start : start + block]
        before = ((rows @ moments[:, :, None]) * rows).sum(-1)
        squares.append(before + (rows @ keys.mT[:, :, None]).square().tril().sum(-1))
        moments += keys.mT @ keys
    return torch.cat(squares, -1) - T[:, None, None] * centre.square()


@admitting
def contraction(
    weights: Float[Tensor, "*batch query key"], mask: Bool[Tensor, "*batch_ token"] | None = None
) -> Float[Tensor, "*batch"]:
    """The most that mixing by `weights` can spread the tokens about their mean: below 1 it can only pull them together.

    kappa = ||C_q A C_k||_2, C = I - 1 1^T/n over the real queries and keys. For A 1 = 1, as a softmax has it, that is
    ||C A||_2, and the centred token cloud obeys ||C A X||_F <= kappa ||C X||_F.

    0 (all rows equal: consensus after one step) to sqrt(n/2); 1 for a permutation. Invariant under permutations of the
    queries and of the keys.

    It certifies nothing alone: a layer multiplies it by the norm of its value and output map, sums over heads and adds
    a residual. It may exceed 1 (uniform causal attention: always). Rows that do not sum to one (sinks, dropout) also
    move the cloud by C A 1 times its mean, which this leaves out.

    >>> contraction(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    tensor(0.8000, dtype=torch.float64)

    Elementary; compare Dong et al., Attention Is Not All You Need, arXiv 2103.03404. Float64; NaN without real tokens.
    Raises `InputError` as `entropy` does.
    """
    A, rows, keys = _real_part("contraction", weights, mask, torch.float64)
    A, exponent = at_size_one(A, (-2, -1))
    A = torch.where(rows[..., None], A - A.sum(-2, keepdim=True) / rows.sum(-1)[..., None, None], 0)
    A = torch.where(keys[..., None, :], A - A.sum(-1, keepdim=True) / keys.sum(-1)[..., None, None], 0)
    empty = ~(rows.any(-1) & keys.any(-1))
    return times_power_of_two(_singular_values(A)[..., 0], exponent.squeeze((-2, -1))).masked_fill(empty, math.nan)


@admitting
def spectral_gap(
    weights: Float[Tensor, "*batch query key"], mask: Bool[Tensor, "*batch_ token"] | None = None
) -> Float[Tensor, "*batch"]:
    """How far the mixture is from one that tells tokens apart: 1 when a single direction survives it.

    1 - sigma_2 / sigma_1, singular values of A over the real queries and keys.

    0 (an isometry on two directions or more, as a permutation) to 1 (rank one: all rows proportional, rank collapse in
    width). Invariant under scaling, and under permutations of queries and of keys.

    With a full mask and nearly independent logits the gap opens as n grows; uniform causal attention opens none.

    >>> spectral_gap(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    tensor(0.2000, dtype=torch.float64)

    Nait Saada, Naderi and Tanner, Mind the Gap: a Spectral Analysis of Rank Collapse and Signal Propagation in
    Attention Layers, arXiv 2410.07799. Float64; NaN for fewer than two real queries or keys, and for A = 0.
    Raises `InputError` as `entropy` does.
    """
    first, second = _leading("spectral_gap", weights, mask).unbind(-1)
    return 1 - second / first


@admitting
def leading_singular_values(
    weights: Float[Tensor, "*batch query key"], mask: Bool[Tensor, "*batch_ token"] | None = None
) -> Float[Tensor, "*batch 2"]:
    """The gains of the two directions that the mixture passes best: where the second vanishes, one direction is all that is left.

    sigma_1 >= sigma_2 of A over the real queries and keys.

    sigma_1 is at least 1 for row-stochastic A (it maps 1 to 1) and at most sqrt(n). sigma_2: 0 for equal rows (rank collapse in
    width), 1 for a permutation. Invariant under permutations of queries and of keys.

    How sigma_2 moves with n is the question, not its value at one n: it falls like n^(-1/2) for independent logits and rises
    for a uniform causal pattern, and in most blocks of the packaged MiniLM.

    >>> leading_singular_values(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    tensor([1.0000, 0.8000], dtype=torch.float64)

    As for `spectral_gap`. Float64; NaN for fewer than two real queries or keys. Raises `InputError` as `entropy` does.
    """
    return _leading("leading_singular_values", weights, mask)


@admitting
def dobrushin(
    weights: Float[Tensor, "*batch query key"], mask: Bool[Tensor, "*batch_ token"] | None = None
) -> Float[Tensor, "*batch"]:
    """The factor by which mixing at least shrinks the diameter of the token cloud.

    tau = 1/2 max_{i,j} ||A_i - A_j||_1 over the real query rows; diam(A X) <= tau diam(X) in every norm, for A 1 = 1.

    0 (all rows equal) to 1 (two rows without a common key, so a causal or windowed matrix nearly always has 1).
    Invariant under permutations of the queries and of the keys.

    A worst case over pairs of tokens: one far pair makes it 1 while all others contract.

    >>> dobrushin(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    tensor(0.8000, dtype=torch.float64)

    Dobrushin, Central Limit Theorem for Nonstationary Markov Chains I, 1956. Float64; NaN without real queries.
    Raises `InputError` as `entropy` does.
    """
    A, rows, _ = _real_part("dobrushin", weights, mask, torch.float64)
    distances: Tensor = torch.cdist(A, A, p=1)
    distances = distances.masked_fill(~(rows[..., :, None] & rows[..., None, :]), 0)
    return (distances.amax((-2, -1)) / 2).masked_fill(~rows.any(-1), math.nan)


@admitting
def row_statistics(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch group key width"],
    *,
    allowed: Bool[Tensor, "#batch #head #query #key"] | None = None,
    bias: Float[Tensor, "#batch #head #query #key"] | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    query_mask: Bool[Tensor, "batch query"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, "head"] | None = None,  # noqa: F821 - the name of an axis
    max_logit: bool = True,
    floor: bool = True,
    susceptibility: bool = False,
) -> RowStatistics:
    """Everything that queries and keys tell of an attention call, row by row, in one pass and memory O(n).

    The logits are s_ij = scale <q_i, k_j>, then `softcap` tanh(s / softcap), then + `bias`; forbidden where `allowed`,
    `key_mask` or `causal` forbid and where the bias is at most half the lowest number of its dtype (how models write
    minus infinity). Of the allowed logits: entropy, susceptibility (see the functions of these names), maximum, and as
    `entropy_floor` the better of two lower bounds: that of the function `entropy_floor` for the row's logit norm, and
    ln sum_j exp s_ij - max_j s_ij.
    `max_logit=False` and `floor=False` leave those out; the maximum costs nothing.
    `sink`, one logit a head, joins the softmax's denominator: entropy and susceptibility are those of the weights over
    real keys scaled to sum to one, and `sink_mass` is the share that the sink took.

    Ranges as there. NaN in all figures of rows that `query_mask` calls padding or that are allowed no key.

    A bias of -10,000 is no -inf: it counts as an allowed, unlikely key in T. Give `allowed` beside it if it means
    forbidden.

    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    >>> rows = row_statistics(q, k, sink=torch.zeros(1), key_mask=torch.tensor([[True, True]]))
    >>> rows.entropy, rows.max_logit, rows.sink_mass  # denominators: 1 + 3 without the sink, 1 + 1 + 3 with it
    (tensor([[[0.5623]]]), tensor([[[1.0986]]]), tensor([[[0.2000]]]))

    Floors: Zhai et al. 2023, arXiv 2303.06296, theorem 3.1; the other follows from sum_j a_ij s_ij <= max_j s_ij.
    Raises `InputError` where the tensors do not fit together.
    """
    scores = _scores("row_statistics", q, k, allowed, bias, key_mask, query_mask, causal, scale, softcap)
    if sink is not None and sink.shape != q.shape[1:2]:
        raise InputError(
            f"row_statistics: expected sink[head] with head = {q.shape[1]}, got {described(sink)}. "
            "A sink is one logit a query head. Pass the layer's own parameter."
        )
    rows = _measure(scores, floor, susceptibility)
    log_sum = rows.maximum - rows.peak.log()
    return RowStatistics(
        entropy=rows.entropy,
        normalized_entropy=_normalized(rows.entropy, rows.allowed_keys),
        allowed_keys=rows.allowed_keys,
        entropy_floor=rows.floor if floor else None,
        max_logit=rows.maximum if max_logit else None,
        susceptibility=rows.variance if susceptibility else None,
        sink_mass=None if sink is None else torch.sigmoid(sink.detach().to(log_sum)[:, None] - log_sum),
        rest_entropy=_rest(rows),
        keys_within_reach=_reach(rows),
        key_share=_key_share(rows),
        route="logits",
    )


@admitting
def row_statistics_from_weights(
    weights: Float[Tensor, "batch head query key"],
    logits: Float[Tensor, "batch head query key"] | None = None,
    *,
    allowed: Bool[Tensor, "#batch #head #query #key"] | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    query_mask: Bool[Tensor, "batch query"] | None = None,
    causal: bool = False,
    floor: bool = True,
    susceptibility: bool = False,
) -> RowStatistics:
    """`row_statistics` of a softmax that the model ran itself, from its weights and, where they were seen, its logits.

    Entropy and susceptibility are those of the weights, each row scaled to sum to one over its allowed keys (s_ij is
    ln a_ij up to a constant of the row). The rest entropy comes from the `logits` if they are given: weights underflow.
    Maximum and floor need `logits`, the softmax's input, where a pair at or below
    half the lowest number of the dtype is forbidden; without them both are `None`. Weights of a sink are left out by
    the caller, as the columns that are no keys.

    Ranges, masks and NaN as in `row_statistics`; a row whose weights are all 0, or NaN, is NaN in every figure but the maximum.
    Weights in half precision are coarse: bfloat16 keeps 8 bits, and susceptibility feels every weight that underflowed to 0.

    >>> rows = row_statistics_from_weights(torch.tensor([[[[0.25, 0.75]]]]))
    >>> rows.entropy, rows.entropy_floor, rows.max_logit
    (tensor([[[0.5623]]]), None, None)

    Sources as in `row_statistics`. Raises `InputError` where the tensors do not fit together.
    """
    name = "row_statistics_from_weights"
    if (
        weights.ndim != 4
        or not weights.is_floating_point()
        or not weights.numel()
        or (logits is not None and (logits.shape != weights.shape or not logits.is_floating_point()))
    ):
        raise InputError(
            f"{name}: expected floating-point weights[batch, head, query, key] and logits of the same shape, got "
            f"{described(weights)} and {'no logits' if logits is None else described(logits)}. "
            "Heads may be folded into the batch, or the logits have a column for a sink. Reshape, or cut that off."
        )
    batch, heads, queries, keys = weights.shape
    sizes = (batch, heads, 1, queries, keys)
    A = weights.detach()[:, :, None]
    L = None if logits is None else logits.detach()[:, :, None]

    def possible(tile: _Tile) -> Tensor | None:
        return None if L is None else L[tile] > torch.finfo(L.dtype).min / 2

    def from_weights(tile: _Tile, S: Tensor) -> Tensor | None:
        S.copy_(A[tile]).log_().clamp_(min=FORBIDDEN)
        return possible(tile)

    def from_logits(tile: _Tile, S: Tensor) -> Tensor | None:
        assert L is not None  # only called where logits were given
        S.copy_(L[tile]).clamp_(min=FORBIDDEN)
        return possible(tile)

    pairs = _pairs(name, sizes, allowed, key_mask, query_mask, causal)
    scores = _Scores(sizes, _accumulation(weights.dtype), weights.device, from_weights, *pairs)
    rows = _measure(scores, False, susceptibility)
    # A sink took the whole row, to the last bit, or its weights are NaN: no distribution over keys is left.
    nothing = ~(rows.maximum > FORBIDDEN)
    for figure in (rows.entropy, rows.rest, rows.peak, rows.variance):
        figure.masked_fill_(nothing, math.nan)
    given = None if L is None else _measure(replace(scores, fill=from_logits), floor, False)
    if given is not None:  # the same rows in every figure of a distribution: a mean floor is to bound the mean entropy
        for figure in (given.rest, given.reach, given.floor):
            figure.masked_fill_(nothing, math.nan)
        # Weights that underflowed have lost what the logits still tell, also where they were scaled up again since.
        torch.minimum(given.floor, rows.entropy, out=given.floor)
    return RowStatistics(
        entropy=rows.entropy,
        normalized_entropy=_normalized(rows.entropy, rows.allowed_keys),
        allowed_keys=rows.allowed_keys,
        entropy_floor=given.floor if given is not None and floor else None,
        max_logit=None if given is None else given.maximum,
        susceptibility=rows.variance if susceptibility else None,
        sink_mass=None,
        rest_entropy=_rest(rows if given is None else given),
        keys_within_reach=_reach(rows, weights.dtype) if given is None else _reach(given),
        key_share=_key_share(rows),
        route="weights",
    )


@admitting
def attention_weights(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch group key width"],
    *,
    allowed: Bool[Tensor, "#batch #head #query #key"] | None = None,
    bias: Float[Tensor, "#batch #head #query #key"] | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch head query key"]:
    """The weights that a fused attention call used, for `contraction`, `spectral_gap`, `dobrushin`: these are n x n.

    a_ij = exp(s_ij) / sum_j exp(s_ij) over the allowed keys, logits s as in `row_statistics`.

    Rows sum to one; rows that are allowed no key are 0. Computed and returned in float32 at least, so the weights of a
    half-precision model differ from its own by its rounding.

    >>> attention_weights(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4), causal=True)
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])

    Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 1. Raises `InputError` as `row_statistics`.
    """
    scores = _scores("attention_weights", q, k, allowed, bias, key_mask, None, causal, scale, softcap)
    weights = torch.zeros(scores.sizes, dtype=scores.dtype, device=scores.device)
    for tile, P in _weight_tiles(scores):
        weights[tile] = P
    return weights.flatten(1, 2)


@dataclass(frozen=True)
class LeadingSpectrum:
    """Of each attention matrix: `contraction`, the two `leading_singular_values`, and how far these may be too small: `error`, a
    share of each, or of 1e-4 sigma_1 where that is more. Float64. NaN where the functions of these names have it, and where the
    error is above `COARSE`."""

    contraction: Float[Tensor, "batch head"]
    singular_values: Float[Tensor, "batch head 2"]
    error: Float[Tensor, "batch head"]


@admitting
def leading_spectrum(
    q: Float[Tensor, "batch head query width"],
    k: Float[Tensor, "batch group key width"],
    *,
    allowed: Bool[Tensor, "#batch #head #query #key"] | None = None,
    bias: Float[Tensor, "#batch #head #query #key"] | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    query_mask: Bool[Tensor, "batch query"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> LeadingSpectrum:
    """`contraction` and `leading_singular_values` of the weights that a fused attention call used, which need not exist at once.

    sigma_1 (C_q A C_k), sigma_1 (A) and sigma_2 (A), with a_ij as in `attention_weights`. Up to `DIRECT` rows or keys they are the
    roots of eigenvalues of A^T A. Beyond, block Lanczos takes A^T A X in blocks of `VECTORS` vectors (`measures.leading_spectrum`),
    with weights that lie in memory while a head or a few are at work (`KEPT_BYTES`), or, of longer sequences, tile by tile, where a
    product costs about as much as the attention itself. Memory O(n).

    `error` is how far a value may lie below the one it stands for, as a share of it (or of 1e-4 sigma_1): it stops at `CLOSE`, or
    at `TILED_CLOSE` where the weights do not fit, and gives up after `TILED_BLOCKS` blocks there, in double precision if single was
    too coarse. What lies in memory and is not `CLOSE` after `BLOCKS` is decomposed. Logits in single precision add 1e-6 of sigma_1
    or so.

    Singular values that lie close together, as those of heads that look at a neighbour, converge slowly. The bound holds if the
    random start met every direction, which it does with probability one, and by how much it does is not proved.

    `key_mask` leaves out the columns of padded keys, whatever weight they have: `allowed` is what forbids them.

    >>> spectrum = leading_spectrum(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))  # every row is uniform
    >>> spectrum.singular_values.round(decimals=6).tolist(), spectrum.contraction.round(decimals=6).tolist()
    ([[[1.0, 0.0]]], [[0.0]])

    Sources as in the two functions. Raises `InputError` as `row_statistics` does.
    """
    name = "leading_spectrum"
    scores = _scores(name, q, k, allowed, bias, None, query_mask, causal, scale, softcap)
    batch, groups, repeats, queries, keys = scores.sizes
    columns = None if key_mask is None else _real_tokens(name, "key_mask", key_mask, batch, keys)
    size = repeats * queries * keys * _bytes(scores.dtype, queries, keys)
    is_tiled = size > KEPT_BYTES and min(queries, keys) > DIRECT

    def found(part: slice, heads: slice) -> krylov.Leading:
        few = _part(scores, part, heads)
        rows, real = _real_matrices(few.sizes, part, query_mask, columns, scores)
        if is_tiled:
            there = real.any(0).nonzero().flatten()  # one sequence: its heads have the same padding
            if len(there) <= DIRECT:
                return _dense_spectrum(_weights_of(few, there), rows, real[:, there])
            return _usable(_tiled_spectrum(few, rows, real), rows, real)
        A = torch.zeros(few.sizes, dtype=few.dtype, device=few.device)
        for tile, weights in _weight_tiles(few):
            A[tile] = weights
        return _dense_spectrum(A.flatten(0, 2), rows, real)

    return _over_parts(found, batch, groups, size, aside=is_tiled and q.device.type == "cpu")


@admitting
def leading_spectrum_from_weights(
    weights: Float[Tensor, "batch head query key"],
    *,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    query_mask: Bool[Tensor, "batch query"] | None = None,
) -> LeadingSpectrum:
    """`leading_spectrum` of a softmax that the model ran itself, from its weights. Each row is scaled to sum to one over all keys.

    Raises `InputError` where the tensors do not fit together.
    """
    name = "leading_spectrum_from_weights"
    if weights.ndim != 4 or not weights.is_floating_point() or not weights.numel():
        raise InputError(
            f"{name}: expected floating-point weights[batch, head, query, key], got {described(weights)}. "
            "Heads may be folded into the batch. Reshape."
        )
    batch, heads, queries, keys = weights.shape
    rows_mask = None if query_mask is None else _real_tokens(name, "query_mask", query_mask, batch, queries)
    columns = None if key_mask is None else _real_tokens(name, "key_mask", key_mask, batch, keys)
    dtype = _accumulation(weights.dtype)

    def found(part: slice, few: slice) -> krylov.Leading:
        A = weights.detach()[part, few].to(dtype)
        A = A / A.sum(-1, keepdim=True)
        sizes = (A.shape[0], A.shape[1], 1, queries, keys)
        rows, real = _real_matrices(sizes, part, rows_mask, columns, weights)
        return _dense_spectrum(A.flatten(0, 1), rows, real)

    size = queries * keys * _bytes(dtype, queries, keys)
    return _over_parts(found, batch, heads, size)


# The one pass over the logits ---------------------------------------------------------------------------------------

_Tile = tuple[slice, slice, slice, slice, slice]  # of [batch, group, repeat, query, key]


@dataclass(frozen=True)
class _Scores:
    """The logits [batch, group, repeat, query, key] of an attention call, written tile by tile, and its allowed pairs.

    `fill(tile, S)` writes logits into `S` and returns which pairs the logits themselves allow (`None`: all).
    """

    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    fill: Callable[[_Tile, Tensor], Tensor | None]
    allowed: Tensor | None
    query_mask: Tensor | None
    causal: bool
    shrunk: int = 0  # the logits are divided by this power of two
    forbidden: float = FORBIDDEN  # what forbidden pairs have

    @functools.cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """For each sequence the row and the key behind which all is padding or forbidden. Elsewhere than on the CPU a tile holds
        many sequences, and the longest mostly needs all of it."""
        batch, _, _, queries, keys = self.sizes
        rows, columns = (self.query_mask, self.allowed) if self.device.type == "cpu" else (None, None)
        if columns is not None:
            for axis in (1, 2, 3):
                is_one = columns.shape[axis] == 1 or columns.stride(axis) == 0
                columns = columns.narrow(axis, 0, 1) if is_one else columns.any(axis, keepdim=True)
            columns = columns.flatten(1).expand(batch, -1)
        return _last(rows, batch, queries), _last(columns, batch, keys)


@dataclass(frozen=True)
class _Rows:
    """What the pass leaves, [batch, head, query] each: `peak` is the row's largest weight, `rest` the entropy in nats of what
    is left without it, `reach` how many keys are within reach of the largest logit there. `second` is that logit relative to the
    row's largest, where not all keys are within reach."""

    entropy: Tensor
    rest: Tensor
    reach: Tensor
    second: Tensor
    maximum: Tensor
    peak: Tensor
    floor: Tensor
    variance: Tensor
    allowed_keys: Tensor


def _scores(
    name: str,
    q: Tensor,
    k: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> _Scores:
    sizes = _sizes(name, q, k)
    dtype = _accumulation(torch.promote_types(q.dtype, k.dtype))
    pairs = _pairs(name, sizes, allowed, key_mask, query_mask, causal)  # first, for what follows reads the masks
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shrunk, forbidden = 0, FORBIDDEN
    if not (is_ordinary(q, 40) and is_ordinary(k, 40) and abs(scale) < 1e6):
        dtype, forbidden = torch.float64, FARTHER
        shrunk = _shrinking(q, k, scale, key_mask, softcap)
    Q, factor = q.detach().unflatten(1, sizes[1:3]), scale
    if shrunk:
        Q, factor = times_power_of_two(Q.double() * scale, torch.tensor(-shrunk, device=q.device)), 1.0
    K = k.detach().to(dtype)
    if key_mask is not None:
        K = torch.where(key_mask[:, None, :, None], K, 0)  # whatever padding holds: NaN + FORBIDDEN would stay NaN
    B = None if bias is None else _pairwise(name, "bias", bias.detach(), sizes)

    def fill(tile: _Tile, S: Tensor) -> Tensor | None:
        rows = (Q[tile[:4]].to(dtype) * factor).flatten(0, 1).flatten(1, 2)
        keys = K[tile[0], tile[1], tile[4]].flatten(0, 1)  # a copy as large as the tile's, if any
        # with `out`, autocast leaves the product in the dtype at hand
        torch.bmm(rows, keys.mT, out=S.view(rows.shape[0], rows.shape[1], keys.shape[1]))
        if softcap is not None:
            S.div_(softcap).tanh_().mul_(softcap)
        if B is None:
            return None
        part = _cut(B, tile)
        possible = part > torch.finfo(part.dtype).min / 2
        S.add_(torch.where(possible, part, 0).to(dtype))
        return possible

    return _Scores(sizes, dtype, q.device, fill, *pairs, shrunk=shrunk, forbidden=forbidden)


def _shrinking(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None, softcap: float | None) -> int:
    """The power of two that logits are divided by so that they stay far above `FARTHER`. Logits that large have one winner, or
    an exact tie, at any size: neither entropy nor weights change. Of a row whose strongest key is small beside the largest logit
    of the call they do; only numbers beyond 1e70 in double precision come there."""
    if softcap is not None:
        return 0
    real = k.detach() if key_mask is None else torch.where(key_mask[:, None, :, None], k.detach(), 0)
    size = 0.0
    for tensor in (q.detach(), real):
        largest = float(tensor.double().abs().max())
        size += math.log2(largest) if 0 < largest < math.inf else 0.0
    size += math.log2(q.shape[-1]) + (math.log2(abs(scale)) if scale else 0.0)
    return max(0, math.ceil(size) - LARGEST)


def _self_scores(name: str, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> _Scores:
    """`_scores` of the plain measures: in a square call the mask of the keys is that of the queries too."""
    *_, queries, keys = _sizes(name, q, k)
    if causal:
        _require_square(name, queries, keys)
    query_mask = mask if queries == keys else None
    return _scores(name, q, k, None, None, mask, query_mask, causal, scale, None)


class _Keep(NamedTuple):
    """Which pairs of a tile are allowed: all before the column `start`, and behind it where `kept` [.., query, key], broadcastable,
    is 1 and not 0. `counts` [.., query]: how many keys each row is allowed."""

    start: int
    kept: Tensor
    counts: Tensor


def _tiles(scores: _Scores) -> Iterator[tuple[_Tile, Tensor, Tensor, _Keep | None]]:
    """Every tile with its logits, forbidden ones at `scores.forbidden`, a scratch tensor of the same shape, and which pairs
    are allowed (`None`: all). The two tensors are overwritten by the next tile. Padded rows and forbidden keys at the end of all
    sequences of a tile are in none."""
    batch, groups, repeats, queries, keys = scores.sizes
    wanted = min(LEAST_ROWS * repeats * keys * scores.dtype.itemsize, 4 * TILE_BYTES)
    budget = (max(TILE_BYTES, wanted) if scores.device.type == "cpu" else DEVICE_TILE_BYTES) // scores.dtype.itemsize
    if scores.causal:  # early rows see few keys: more of them fit
        starts = [0]
        while starts[-1] < queries:
            seen = min(starts[-1] + CAUSAL_ROWS, keys)
            starts.append(starts[-1] + min(CAUSAL_ROWS, max(1, budget // (repeats * seen))))
        starts.pop()
    else:
        starts = list(range(0, queries, max(1, budget // (repeats * keys))))
    ends = [*starts[1:], queries]
    last_rows, last_keys = scores.ends
    row_step = max(end - start for start, end in zip(starts, ends, strict=True))
    head = max(
        repeats * (end - i) * (min(end, keys) if scores.causal else keys) for i, end in zip(starts, ends, strict=True)
    )
    group_step = min(groups, max(1, budget // head))
    batch_step = min(batch, max(1, budget // (head * groups)))
    # one buffer for all tiles: memory that is fresh for each would cost more than the arithmetic
    memory = torch.empty(2, batch_step * group_step * head, dtype=scores.dtype, device=scores.device)
    # On the diagonal of a causal call: the same triangle in every tile.
    triangle = torch.ones(row_step, row_step, dtype=torch.bool, device=scores.device).tril() if scores.causal else None
    for b, g, (i, stop) in itertools.product(
        range(0, batch, batch_step), range(0, groups, group_step), list(zip(starts, ends, strict=True))
    ):
        sequences = slice(b, min(b + batch_step, batch))
        stop, seen = min(stop, max(last_rows[sequences])), min(keys, -(-max(last_keys[sequences]) // LANES) * LANES)
        if stop <= i:
            continue
        tile = (
            sequences,
            slice(g, min(g + group_step, groups)),
            slice(0, repeats),
            slice(i, stop),
            slice(0, min(stop, seen) if scores.causal else seen),
        )
        shape = [part.stop - part.start for part in tile]
        S, scratch = memory[:, : math.prod(shape)].view(2, *shape)
        allowed, start = scores.fill(tile, S), 0
        if scores.allowed is not None:
            allowed = _and(allowed, _cut(scores.allowed, tile))
        if triangle is not None and i < tile[4].stop:
            below = triangle[: stop - i, : tile[4].stop - i]
            if allowed is None:  # all keys before the tile's own rows are allowed
                allowed, start = below, i
            else:
                allowed = allowed.expand(*allowed.shape[:-2], *shape[-2:]).clone()
                allowed[..., i:] &= below
        keep = None
        if allowed is not None:
            kept = allowed.to(scores.dtype)
            S[..., start:].add_((1 - kept) * scores.forbidden)
            keep = _Keep(start, kept, start + kept.sum(-1).long())
        yield tile, S, scratch, keep


def _last(real: Tensor | None, batch: int, size: int) -> list[int]:
    """Behind the last True of each row [batch, size], and at least 1; all of it for None, and for what is not as wide."""
    if real is None or real.shape[1] != size:
        return [size] * batch
    last: list[int] = (real * torch.arange(1, size + 1, device=real.device)).amax(1).clamp(min=1).tolist()
    return last


def _weight_tiles(scores: _Scores) -> Iterator[tuple[_Tile, Tensor]]:
    """Every tile with its weights: 0 for forbidden pairs, and in rows that are allowed no key."""
    for tile, S, _, keep in _tiles(scores):
        torch.softmax(S, -1, out=S)  # a second tile would leave the cache
        if keep is not None:
            S[..., keep.start :].mul_(keep.kept)
        yield tile, S


def _measure(scores: _Scores, floor: bool, susceptibility: bool) -> _Rows:
    # What is read off the logits, tile by tile; figures come from it at the end, for all rows at once.
    read = {
        name: torch.zeros(scores.sizes[:4], dtype=scores.dtype, device=scores.device)
        for name in ("maximum", "peak", "others", "mean", "variance", "total", "squares")
    }
    allowed_keys = torch.zeros(scores.sizes[:4], dtype=torch.int64, device=scores.device)
    numbers = torch.arange(allowed_keys.numel(), device=scores.device).view(scores.sizes[:4])
    # Numbers of rows that are looked at by themselves, and their figures.
    beside: list[tuple[Tensor, dict[str, Tensor]]] = []
    for tile, S, P, keep in _tiles(scores):
        rows = tile[:4]
        allowed_keys[rows] = S.shape[-1] if keep is None else keep.counts
        maximum = S.amax(-1, keepdim=True)  # without its place, which costs ten times as much
        S.sub_(maximum)
        torch.softmax(S, -1, out=P)  # not torch.exp: it is ten times slower where a result underflows
        peak = P.amax(-1)
        others = _others(P, peak)
        mean = P.mul_(S).sum(-1)  # the strongest adds nothing here: its S is 0
        read["maximum"][rows], read["peak"][rows] = maximum.squeeze(-1), peak
        read["others"][rows], read["mean"][rows] = others, mean
        if susceptibility:
            read["variance"][rows] = P.mul_(S).sum(-1)
        if keep is not None:
            S[..., keep.start :].mul_(keep.kept)  # a forbidden pair is as good as the strongest, and adds nothing
        lowest = S.amin(-1)
        if floor:
            read["total"][rows], read["squares"][rows] = S.sum(-1), torch.mul(S, S, out=P).sum(-1)
        # Where one of the others may be out of reach, or all are lost beside the strongest, they are looked at by themselves.
        near = (lowest > -UNDERFLOW) & (others > LEAST_REST)
        if not bool(near.all()):
            alone = ~near & (allowed_keys[rows] >= FEW_RIVALS)
            if bool(alone.any()):
                if keep is not None:
                    S[..., keep.start :].add_((1 - keep.kept) * scores.forbidden)
                beside.append((numbers[rows][alone], _beside_strongest(S[alone], scores.forbidden)))
    T, mean, others, log_peak = allowed_keys, read["mean"], read["others"], read["peak"].log()
    found = {
        "maximum": read["maximum"],
        "peak": read["peak"],
        "entropy": 0 - log_peak - mean,  # both are at most 0, and 0 less 0 has no sign
        "variance": (read["variance"] - mean.square()).clamp_(min=0),
        "floor": torch.zeros_like(mean),
        "rest": (others.log() - (log_peak + mean / others)).clamp_(min=0),
        "reach": (T - 1).to(mean.dtype),
        "second": torch.zeros_like(mean),
    }
    if floor:
        # total^2 / T is at most `squares`, total^2 may overflow. Beyond the range the norm is as good as endless.
        square_norm = read["squares"] - read["total"] * (read["total"] / T)
        square_norm.masked_fill_(read["squares"].isposinf(), 1e30)
        floors = torch.maximum(0 - log_peak, _floor_from_norm(square_norm, T))
        found["floor"] = torch.minimum(floors, found["entropy"])  # where a floor is attained, both are rounded
    for places, figures in beside:
        for name, figure in figures.items():
            found[name].view(-1)[places] = figure
    if scores.forbidden != FORBIDDEN:  # a logit, however low, and no weight of 0
        found["second"].clamp_(min=LOST)
    dead = T == 0
    if scores.query_mask is not None:
        dead |= ~scores.query_mask[:, None, None]
    if scores.shrunk:
        for name, power in (("maximum", 1), ("variance", 2)):
            found[name] = times_power_of_two(found[name], torch.tensor(power * scores.shrunk, device=scores.device))
    results = {name: value.masked_fill_(dead, math.nan).flatten(1, 2) for name, value in found.items()}
    return _Rows(allowed_keys=T.masked_fill_(dead, 0).flatten(1, 2), **results)


# Leading singular values ---------------------------------------------------------------------------------------------


def _over_parts(
    found: Callable[[slice, slice], krylov.Leading], batch: int, groups: int, size: int, *, aside: bool = False
) -> LeadingSpectrum:
    """The spectra of as many sequences and groups at a time as `KEPT_BYTES` have room for; a group's matrices take `size` bytes.
    aside: share them out among torch's threads, which suits matrices that exist as tiles only: a tile is too small to be."""
    group_step = min(groups, max(1, KEPT_BYTES // size))
    batch_step = min(batch, max(1, KEPT_BYTES // (size * groups)))
    sequences = [slice(b, min(b + batch_step, batch)) for b in range(0, batch, batch_step)]
    starts = range(0, groups, group_step)
    works = [
        functools.partial(found, part, slice(g, min(g + group_step, groups))) for part in sequences for g in starts
    ]
    parts = shared_out(works) if aside else [work() for work in works]
    rows = []
    for number, part in enumerate(sequences):
        own = parts[number * len(starts) : (number + 1) * len(starts)]
        rows.append(
            [torch.cat([f.view(part.stop - part.start, -1) for f in same], 1) for same in zip(*own, strict=True)]
        )
    first, second, contraction, error = (torch.cat(same) for same in zip(*rows, strict=True))
    return LeadingSpectrum(contraction, torch.stack([first, second], -1), error)


def _bytes(dtype: torch.dtype, queries: int, keys: int) -> int:
    """Of a weight while its matrix is at work: what is decomposed is so in double precision."""
    return (torch.float64 if min(queries, keys) <= DIRECT else dtype).itemsize


def _part(scores: _Scores, batch: slice, groups: slice) -> _Scores:
    """The scores of some sequences and groups."""

    def fill(tile: _Tile, S: Tensor) -> Tensor | None:
        b, g, repeats, rows, columns = tile
        b = slice(b.start + batch.start, b.stop + batch.start)
        g = slice(g.start + groups.start, g.stop + groups.start)
        return scores.fill((b, g, repeats, rows, columns), S)

    allowed = scores.allowed
    if allowed is not None:
        allowed = allowed[batch] if allowed.shape[0] > 1 else allowed
        allowed = allowed[:, groups] if allowed.shape[1] > 1 else allowed
    sizes = (batch.stop - batch.start, groups.stop - groups.start, *scores.sizes[2:])
    return replace(scores, sizes=sizes, fill=fill, allowed=allowed, query_mask=None)


def _real_matrices(
    sizes: tuple[int, int, int, int, int],
    part: slice,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    like: Tensor | _Scores,
) -> tuple[Tensor, Tensor]:
    """Which rows and columns are real, for every matrix of these sequences: [matrix, query] and [matrix, key]."""
    batch, groups, repeats, queries, keys = sizes
    found = []
    for mask, tokens in ((query_mask, queries), (key_mask, keys)):
        real = torch.ones(batch, tokens, dtype=torch.bool, device=like.device) if mask is None else mask[part]
        found.append(real.to(like.device).repeat_interleave(groups * repeats, 0))
    return found[0], found[1]


class _Tiled:
    """`krylov.Products` in `dtype` of the weights of one group's heads, which are made anew, tile by tile, for each product."""

    def __init__(self, scores: _Scores, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> None:
        self.scores, self.padded, self.dtype = scores, ~rows, dtype
        self.is_padded = not bool(rows.all())
        self.queries, self.keys = rows.to(dtype), columns.to(dtype)

    def _tiles(self) -> Iterator[tuple[Tensor, slice, slice]]:
        """Weights [matrix, query, key], 0 in padded rows, and which rows and columns they are."""
        for (_, _, _, rows, columns), P in _weight_tiles(self.scores):
            A, padded = P.flatten(0, 2), self.padded[:, rows]
            if self.is_padded and bool(padded.any()):
                A[padded] = 0  # whatever padding holds; to fill them in by a mask takes longer than the softmax
            yield A.to(self.dtype), rows, columns

    def begun(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums, made = torch.zeros_like(self.queries), X.new_zeros(len(X), X.shape[-1] + 1, X.shape[-2])
        # One place more for 1, whose product is the sum of the rows.
        X = torch.cat([X, X.new_zeros(()).expand(*X.shape[:-1], 1)], -1)
        for A, rows, columns in self._tiles():
            Y = A @ X[:, columns]
            sums[:, rows] = Y[..., 0]
            Y[..., -1] = 1
            made[..., columns].baddbmm_(Y.mT, A)
        made *= self.keys.unsqueeze(-2)
        return made[:, :-1].mT, made[:, -1] / self.queries.sum(1, keepdim=True), sums

    def centred(self, X: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        # A^T Y as rows: that product is faster with the weights on its right
        made, of_X = X.new_zeros(X.mT.shape), X.new_zeros(*self.queries.shape, X.shape[-1])
        for A, rows, columns in self._tiles():
            Y = (A @ X[:, columns]).sub_(mean.unsqueeze(-2)).mul_(self.queries[:, rows].unsqueeze(-1))
            of_X[:, rows] = Y
            made[..., columns].baddbmm_(Y.mT, A)
        return of_X, made.mul_(self.keys.unsqueeze(-2)).mT


def _tiled_spectrum(scores: _Scores, rows: Tensor, columns: Tensor) -> krylov.Leading:
    """Of weights that are made anew; once more in double precision where squares of what is small beside sigma_1 drown."""
    found = None
    for dtype in dict.fromkeys((scores.dtype, torch.float64)):
        products = _Tiled(scores, rows, columns, dtype)
        found = krylov.leading(products, vectors=VECTORS, steps=TILED_BLOCKS, tolerance=TILED_CLOSE)
        if not bool((found.error > COARSE).any()):  # false for NaN
            break
    assert found is not None
    return found


def _weights_of(scores: _Scores, keys: Tensor) -> Tensor:
    """The weights [matrix, query, key] of some keys, given by their places in ascending order."""
    weights = torch.zeros(*scores.sizes[:4], len(keys), dtype=scores.dtype, device=scores.device)
    for (*some, columns), P in _weight_tiles(scores):
        seen = keys[keys < columns.stop]
        weights[(*some, slice(len(seen)))] = P[..., seen]
    return weights.flatten(0, 2)


def _dense_spectrum(A: Tensor, rows: Tensor, columns: Tensor) -> krylov.Leading:
    """Of weights [matrix, query, key] in memory, with their real rows [matrix, query] and columns [matrix, key]."""
    if not bool(rows.all() and columns.all()):  # whatever padding holds
        A = torch.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), A, 0)
    if min(A.shape[-2:]) <= DIRECT:
        return _usable(_decomposed(A, rows, columns), rows, columns)
    found = krylov.leading(krylov.Dense(A, rows, columns), vectors=VECTORS, steps=BLOCKS, tolerance=CLOSE)
    apart = found.error > CLOSE
    for i in (1, 2):  # what is small beside sigma_1 has few digits in single precision
        apart |= found[i] < krylov.SMALL * found.first
    if bool(apart.any()):
        for value, again in zip(found, _decomposed(A[apart], rows[apart], columns[apart]), strict=True):
            value[apart] = again
    return _usable(found, rows, columns)


def _decomposed(A: Tensor, rows: Tensor, columns: Tensor) -> krylov.Leading:
    """The same from decompositions in float64: roots of eigenvalues of A^T A, and singular values where roots would lose digits."""
    found = A.new_full((4, len(A)), math.nan, dtype=torch.float64)
    found[3] = 0
    kinds, kind = torch.unique(torch.cat([rows, columns], 1), dim=0, return_inverse=True)
    members, matrices, grams = [], [], []
    for number, real in enumerate(kinds):
        own = (kind == number).nonzero().flatten()
        some_rows, some_columns = real.split([rows.shape[1], columns.shape[1]])
        if not bool(some_rows.any() and some_columns.any()):
            continue
        one = A[own]
        if not bool(real.all()):
            one = one[:, some_rows][:, :, some_columns]
        one = one.double()
        finite = one.sum((-2, -1)).isfinite()  # no weight but a finite one leaves the sum finite
        if not bool(finite.all()):
            one = torch.where(finite[:, None, None], one, 0)
        centred = one - one.mean(-2, keepdim=True)
        centred -= centred.mean(-1, keepdim=True)
        members.append((own, finite))
        matrices.append(one)
        grams += [_gram(one), _gram(centred)]
    values = iter(eigenvalues(grams))
    for (own, finite), one in zip(members, matrices, strict=True):
        squares, largest = next(values), next(values)[..., -1].clamp(min=0)
        first, second = largest.new_full((2, len(one)), math.nan)
        if min(one.shape[-2:]) > 1:
            first, second = squares[..., -1].sqrt(), squares[..., -2].sqrt()
            coarse = (squares[..., -2] < 1e-8 * squares[..., -1]) & finite
            if bool(coarse.any()):
                second[coarse] = torch.linalg.svdvals(one[coarse])[..., 1]
        found[:3, own] = torch.stack([first, second, largest.sqrt()]).masked_fill(~finite, math.nan)
    return krylov.Leading(*found.unbind(0))


def _gram(A: Tensor) -> Tensor:
    return A @ A.mT if A.shape[-2] < A.shape[-1] else A.mT @ A


def _usable(found: krylov.Leading, rows: Tensor, columns: Tensor) -> krylov.Leading:
    """NaN where the error leaves no figure, and where too few rows or columns are real."""
    unknown, (n_q, n_k) = found.error > COARSE, (real.sum(1) for real in (rows, columns))
    few = unknown | (n_q < 2) | (n_k < 2)
    first, second = (value.masked_fill(few, math.nan) for value in found[:2])
    return krylov.Leading(first, second, found.contraction.masked_fill(unknown, math.nan), found.error)


def _others(P: Tensor, peak: Tensor) -> Tensor:
    """What the weights `P` leave to all but the strongest, without the digits that one takes away from them."""
    others = 1 - peak
    sharp = ~(peak <= FLAT)
    if bool(sharp.any()):
        others[sharp] = (P[sharp].double().sum(-1) - peak[sharp].double()).to(P.dtype)
    return others


def _beside_strongest(S: Tensor, forbidden: float) -> dict[str, Tensor]:
    """Of rows of logits [row, key], relative to the strongest: the others by themselves, relative to the strongest of them. Far
    below the strongest of all they have no digits left. Writes into `S`."""
    S.scatter_(1, S.argmax(1, keepdim=True), forbidden + forbidden)
    second = S.amax(1, keepdim=True)
    S.sub_(second)
    P = torch.softmax(S, 1)
    rest = (0 - P.amax(1).log() - P.mul_(S).sum(1)).clamp_(min=0)
    reach = torch.gt(S, -UNDERFLOW, out=P).sum(1)  # into a float: four times as fast as into a boolean
    return {"second": second.flatten(), "rest": rest, "reach": reach}


def _floor_from_norm(square_norm: Tensor, T: Tensor) -> Tensor:
    """The least entropy of a softmax over T logits whose centred squared norm is given; 0 for one key."""
    T = T.to(square_norm.dtype)
    gap = (square_norm.clamp(min=0) * T / (T - 1).clamp(min=1)).sqrt()
    odds = (T - 1) * torch.exp(-gap)
    return torch.log1p(odds) + gap * odds / (1 + odds)


def _rest(rows: _Rows) -> Tensor:
    T = rows.allowed_keys
    known = (T >= FEW_RIVALS) & ~(rows.second < LOST)  # weights of 0 say nothing about each other
    return (rows.rest / (T - 1).to(rows.rest.dtype).log()).where(known, math.nan)


def _reach(rows: _Rows, weights: torch.dtype | None = None) -> Tensor:
    """`weights`: the dtype of the weights, where the rows are known by nothing else. What is 0 there may be out of reach or not,
    unless the strongest of the others is large."""
    T = rows.allowed_keys
    share = rows.reach / (T - 1)
    known = (T >= FEW_RIVALS) & ~(rows.second < LOST)
    if weights is not None:
        smallest = math.log(torch.finfo(weights).smallest_normal)
        known &= (share == 1) | (rows.second + rows.peak.log() > smallest + UNDERFLOW)
    return share.where(known, math.nan)


def _key_share(rows: _Rows) -> Tensor:
    T = rows.allowed_keys
    return ((rows.entropy.exp() - 1) / (T - 1)).where(T >= FEW_KEYS, math.nan)


def _normalized(H: Tensor, T: Tensor) -> Tensor:
    return torch.where(T > 1, H / T.to(H.dtype).log(), math.nan)


# What came in, checked and brought to one form -----------------------------------------------------------------------


def _sizes(name: str, q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """(batch, group, repeat, query, key)."""
    fits = (
        q.ndim == k.ndim == 4
        and q.is_floating_point()
        and k.is_floating_point()
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and min(q.numel(), k.numel()) > 0
        and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise InputError(
            f"{name}: expected floating-point q[batch, head, query, width] and k[batch, group, key, width] with head a "
            f"multiple of group, got q {described(q)} and k {described(k)}. "
            "Heads may still be folded into the width. Use view(batch, token, head, width).transpose(1, 2)."
        )
    return q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]


def _pairs(
    name: str,
    sizes: tuple[int, int, int, int, int],
    allowed: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor | None, Tensor | None, bool]:
    """The allowed pairs [#batch, #group, #repeat, #query, #key] that do not come from `causal`; the query mask."""
    batch, _, _, queries, keys = sizes
    pairs = None if allowed is None else _pairwise(name, "allowed", allowed, sizes)
    if key_mask is not None:
        real = _real_tokens(name, "key_mask", key_mask, batch, keys)
        # without padding the pass is faster without a mask
        pairs = pairs if bool(real.all()) else _and(pairs, real[:, None, None, None])
    if query_mask is not None:
        query_mask = _real_tokens(name, "query_mask", query_mask, batch, queries)
    return pairs, query_mask, causal


def _pairwise(name: str, label: str, pairs: Tensor, sizes: tuple[int, int, int, int, int]) -> Tensor:
    """[#batch, #head, #query, #key] as [#batch, #group, #repeat, #query, #key]."""
    batch, groups, repeats, queries, keys = sizes
    full = (batch, groups * repeats, queries, keys)
    kind = "boolean" if label == "allowed" else "floating-point"
    given = (1,) * (4 - pairs.ndim) + tuple(pairs.shape)
    fits = len(given) == 4 and all(size in {1, whole} for size, whole in zip(given, full, strict=True))
    if not fits or not (pairs.dtype == torch.bool if label == "allowed" else pairs.is_floating_point()):
        raise InputError(
            f"{name}: expected {kind} {label}, broadcastable to [batch, head, query, key] = {list(full)}, got "
            f"{described(pairs)}. A boolean mask is passed as allowed (True: may look), an additive one as bias. "
            "Pass it under its own name, with the layer's own axes."
        )
    pairs = pairs.view(given)
    return pairs[:, :, None] if given[1] == 1 else pairs.view(given[0], groups, repeats, *given[2:])


def _cut(pairs: Tensor, tile: _Tile) -> Tensor:
    """The part of broadcastable `pairs` that belongs to `tile`."""
    return pairs[tuple(part if size > 1 else slice(None) for part, size in zip(tile, pairs.shape, strict=True))]


def _and(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left & right


def _real_tokens(name: str, label: str, mask: Tensor, batch: int, tokens: int) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != (batch, tokens):
        raise InputError(
            f"{name}: expected boolean {label}[batch, token] = {[batch, tokens]}, got {described(mask)}. "
            "It may be an integer attention mask or one for other tokens. Pass mask.bool(), True for real tokens."
        )
    return mask


def _require_square(name: str, queries: int, keys: int) -> None:
    if queries != keys:
        raise InputError(
            f"{name}: expected as many queries as keys with causal=True, got {queries} queries and {keys} keys. "
            "With a key-value cache the queries stand at the end of the keys. "
            "Call row_statistics with allowed, True where a query may look."
        )


def _real_queries_and_keys(name: str, weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows and columns of `weights` are real, [*batch, query] and [*batch, key]."""
    if weights.ndim < 2 or not weights.is_floating_point() or not weights.numel():
        raise InputError(
            f"{name}: expected floating-point weights[..., query, key], got {described(weights)}. "
            "These may be logits' arguments or a single row. Pass the softmax's output."
        )
    *leading, queries, keys = weights.shape
    if mask is None:
        return weights.new_ones(*leading, queries, dtype=torch.bool), weights.new_ones(*leading, keys, dtype=torch.bool)
    outer = mask.ndim - 1
    fits = mask.dtype == torch.bool and 0 <= outer <= len(leading) and mask.shape[-1] == keys
    if not fits or list(mask.shape[:-1]) != leading[:outer]:
        raise InputError(
            f"{name}: expected boolean mask[..., token] with token = {keys} and leading axes among the first of "
            f"{leading}, got {described(mask)}. It may be an integer attention mask. "
            "Pass mask.bool(), [batch, token] for weights[batch, head, query, key]."
        )
    real = mask.view(*leading[:outer], *(1,) * (len(leading) - outer), keys).expand(*leading, keys)
    return real if queries == keys else real.new_ones(*leading, queries), real


def _real_part(name: str, weights: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`weights` in `dtype` with padded rows and columns 0 whatever they hold, and which rows and columns are real."""
    rows, keys = _real_queries_and_keys(name, weights, mask)
    A = weights.to(dtype)
    return A if mask is None else torch.where(rows[..., None] & keys[..., None, :], A, 0), rows, keys


def _leading(name: str, weights: Tensor, mask: Tensor | None) -> Tensor:
    """`leading_singular_values`, refusing under the name of the function that was called."""
    A, rows, keys = _real_part(name, weights, mask, torch.float64)
    if min(A.shape[-2:]) < 2:
        return A.new_full((*A.shape[:-2], 2), math.nan)
    sigma = _singular_values(A)[..., :2]
    too_few = (rows.sum(-1) < 2) | (keys.sum(-1) < 2)
    return sigma.masked_fill(too_few[..., None], math.nan)


def _singular_values(A: Tensor) -> Tensor:
    """NaN where the decomposition would raise for all matrices because one holds NaN or infinity."""
    finite = A.isfinite().all((-2, -1))[..., None]
    sigma: Tensor = torch.linalg.svdvals(torch.where(finite[..., None], A, 0))
    return torch.where(finite, sigma, math.nan)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
