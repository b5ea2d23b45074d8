"""How many directions of the query and key weights no softmax can see: plain, with biases, RoPE and QK-RMSNorm."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flint import fmpq, fmpq_mat, nmod, nmod_mat

from uncollapse.claims.draws import Draws, shifted
from uncollapse.claims.jacobian import between, flat, generic, matrices
from uncollapse.claims.ledger import HERE, Claim, Finding, bracketed, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample, Evidence

# Cosine and sine of two angles, rational, no multiple of which is a full turn: the rotations of two channel pairs.
ANGLES = ((fmpq(3, 5), fmpq(4, 5)), (fmpq(5, 13), fmpq(12, 13)))
_PRIME = (1 << 61) - 1


@dataclass(frozen=True)
class Layout:
    """Sizes of one attention layer; `rotary` channels (in pairs) are rotated by position."""

    heads: int
    groups: int
    head_width: int
    width: int
    biases: bool = False
    rotary: int = 0

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """W_Q of every head, W_K of every group, then b_Q and b_K."""
        k, d = self.head_width, self.width
        both = self.heads + self.groups
        return [(d, k)] * both + [(1, k)] * both * self.biases


LAYOUTS = (
    Layout(2, 2, 1, 2),
    Layout(2, 1, 2, 3),
    Layout(4, 2, 2, 3),
    Layout(2, 1, 2, 3, biases=True),
    Layout(2, 1, 2, 3, rotary=2),
    Layout(2, 1, 4, 4, rotary=4),
    Layout(2, 1, 2, 2, biases=True, rotary=2),
    Layout(2, 1, 3, 3, biases=True, rotary=2),
)


def dimension(a: Layout) -> int:
    """The claimed gauge: GL on the channels without rotation and their key bias; a complex number a rotated pair."""
    plain = a.head_width - a.rotary
    return a.groups * (plain * plain + a.rotary + a.biases * plain)


def rotation(position: int, layout: Layout) -> fmpq_mat:
    """The rotation of the channels at one position; channels beyond `rotary` stay."""
    turn = exact.identity(layout.head_width).tolist()
    for pair in range(layout.rotary // 2):
        c, s = ANGLES[pair]
        i = 2 * pair
        turn[i][i], turn[i][i + 1], turn[i + 1][i], turn[i + 1][i + 1] = c, s, -s, c
    power = exact.identity(layout.head_width)
    for _ in range(position):
        power = power * exact.from_rows(turn, layout.head_width)
    return power


def logits(layout: Layout, clouds: Sequence[fmpq_mat], values: Sequence[Any], *, shift: bool = True) -> list[Any]:
    """All logits, minus the first of their row: what the softmax sees. `shift=False` keeps the row's constant."""
    blocks = matrices(values, *layout.shapes)
    both = layout.heads + layout.groups
    weights = blocks[:both]
    biases = blocks[both:] if layout.biases else [exact.zeros(1, layout.head_width)] * both
    per_group = layout.heads // layout.groups
    entries: list[Any] = []
    for x in clouds:
        rows = []
        for weight, bias in zip(weights, biases, strict=True):
            given = shifted(x * weight, bias)
            turned = [exact.part(given, [i], range(layout.head_width)) * rotation(i, layout) for i in range(x.nrows())]
            rows.append(exact.above(*turned) if layout.rotary else given)
        for h in range(layout.heads):
            scores = rows[h] * rows[layout.heads + h // per_group].transpose()
            entries += [s - row[0] if shift else s for row in scores.tolist() for s in row]
    return entries


def moved(draws: Draws, layout: Layout, values: Sequence[Any]) -> list[Any]:
    """A finite gauge move: W_Q T and W_K T^-T, T commuting with the rotations; the unrotated key bias is shifted."""
    blocks = matrices(values, *layout.shapes)
    both, per_group = layout.heads + layout.groups, layout.heads // layout.groups
    plain = layout.head_width - layout.rotary
    changes = []
    for _ in range(layout.groups):
        t = exact.identity(layout.head_width).tolist()
        for i in range(0, layout.rotary, 2):
            a, b = draws.randint(1, 3), draws.randint(-3, 3)
            t[i][i], t[i][i + 1], t[i + 1][i], t[i + 1][i + 1] = fmpq(a), fmpq(b), fmpq(-b), fmpq(a)
        free = draws.invertible(plain).tolist() if plain else []
        for i, row in enumerate(free):
            t[layout.rotary + i][layout.rotary :] = row
        changes.append(exact.from_rows(t, layout.head_width))
    result = []
    for index, block in enumerate(blocks):
        which = index % both
        is_key = which >= layout.heads
        group = which - layout.heads if is_key else which // per_group
        turn = changes[group].inv().transpose() if is_key else changes[group]
        if is_key and index >= both:
            free_shift = [0] * layout.rotary + [draws.randint(-3, 3) for _ in range(plain)]
            block = block + exact.rational([free_shift])
        result.append(block * turn)
    return flat(*result)


def moves(layout: Layout, values: Sequence[Any]) -> list[list[Any]]:
    """The tangents of those moves: (W_Q E, b_Q E, -W_K E^T, -b_K E^T), E commuting with rotations, and b_K alone."""
    blocks = matrices(values, *layout.shapes)
    both, per_group, k = layout.heads + layout.groups, layout.heads // layout.groups, layout.head_width

    def unit(*entries: tuple[int, int, int]) -> fmpq_mat:
        rows = [[0] * k for _ in range(k)]
        for i, j, entry in entries:
            rows[i][j] = entry
        return exact.rational(rows)

    units = [unit((i, i, 1), (i + 1, i + 1, 1)) for i in range(0, layout.rotary, 2)]
    units += [unit((i, i + 1, 1), (i + 1, i, -1)) for i in range(0, layout.rotary, 2)]
    units += [unit((i, j, 1)) for i in range(layout.rotary, k) for j in range(layout.rotary, k)]
    tangents = []
    for g in range(layout.groups):
        for e in units:
            parts = []
            for index, block in enumerate(blocks):
                which = index % both
                mine = which == layout.heads + g if which >= layout.heads else which // per_group == g
                turned = block * (-e.transpose() if which >= layout.heads else e)
                parts.append(turned if mine else block * 0)
            tangents.append(flat(*parts))
        for channel in range(layout.rotary, k * layout.biases):
            parts = [block * 0 for block in blocks]
            parts[both + layout.heads + g] = fmpq_mat(1, k, [int(channel == index) for index in range(k)])
            tangents.append(flat(*parts))
    return tangents


def check(
    trials: int,
    seed: int,
    *,
    formula: Callable[[Layout], int] = dimension,
    normed_formula: Callable[[int, int, int, bool], int] = lambda h, g, k, rope: h + g + (k // 2 if rope else k),
    shift: bool = True,
) -> Finding:
    """The formulas can be corrupted; `shift=False` lets the observer see logits instead of softmax weights."""
    draws = Draws("query-key-gauge", seed)
    evidence: list[Evidence] = []
    invariant: list[bool | None] = []
    for layout in LAYOUTS:
        what = (
            f"H={layout.heads} G={layout.groups} d_k={layout.head_width} biases={layout.biases} rotary={layout.rotary}"
        )
        bounds = []
        for _ in range(max(2, trials // 200)):
            clouds = [draws.matrix(4, layout.width) for _ in range(6)]
            point = flat(*(draws.of_rank(r, c, min(r, c)) for r, c in layout.shapes))
            seen = functools.partial(logits, layout, clouds, shift=shift)
            bounds.append(between(seen, point, moves(layout, point)))
            invariant.append(seen(point) == seen(moved(draws, layout, point)))
        evidence.append(bracketed(f"dimension of the gauge at {what}", *generic(bounds), formula(layout)))
    evidence.append(tally("a finite move W_Q T, W_K T^-T, b_K + delta changes no softmax", invariant))
    for heads, groups, width, rope in ((2, 1, 3, False), (2, 2, 2, False), (2, 1, 4, True), (4, 2, 2, True)):
        lower, upper = normed_gauge(draws, heads, groups, width, rope)
        what = f"dimension under QK-RMSNorm with shared gamma, H={heads} G={groups} d_k={width} RoPE={rope}"
        evidence.append(bracketed(what, lower, upper, normed_formula(heads, groups, width, rope)))
    lower, upper = normed_gauge(draws, 2, 1, 3, False, gamma=(1, 1, 1))
    what = "exception: with all gamma equal, rotations of the channels join in"
    evidence.append(bracketed(what, lower, upper, 2 + 1 + 3 + 3, role="boundary"))
    return evidence, Counterexample(
        "the QK-RMSNorm gauge is H + G + d_k for every gamma",
        {"gamma_q = gamma_k": [["1", "1", "1"]]},
        "with equal entries (as at initialisation) W_Q O, W_K O with O orthogonal changes no logit: 3 more.",
        "all entries one",
    )


def normed_gauge(
    draws: Draws, heads: int, groups: int, k: int, rope: bool, gamma: tuple[int, ...] | None = None
) -> tuple[int, int]:
    """(lower, upper) bound of the gauge at a generic point: known invisible moves, and the Jacobian's kernel.

    A row is divided by its 2-norm: gamma takes up the factor sqrt(d_k). Norms are irrational, so the point lies in a finite
    field where they have roots. It lifts to a point over the p-adic numbers (Hensel), whose Jacobian has no smaller rank, and a
    generic point has no smaller rank still.
    """
    p, d = _PRIME, k
    layout = Layout(heads, groups, k, d, rotary=k if rope else 0)
    weights = [[[draws.randrange(1, p) for _ in range(k)] for _ in range(d)] for _ in range(heads + groups)]
    gammas = [list(gamma) if gamma else [draws.randrange(1, p) for _ in range(k)] for _ in range(2)]

    def image(x: list[int], weight: list[list[int]]) -> list[int]:
        return [sum(a * row[m] for a, row in zip(x, weight, strict=True)) for m in range(k)]

    def root(square: int) -> int | None:
        found = pow(square, p // 4 + 1, p)  # p is 3 modulo 4
        return found if found * found % p == square else None

    tokens: list[tuple[list[int], list[list[int]], list[int]]] = []
    while len(tokens) < 2 * d + 4:
        x = [draws.randrange(p) for _ in range(d)]
        images = [image(x, weight) for weight in weights]
        roots = [root(sum(u * u for u in row) % p) for row in images]
        if None not in roots:
            tokens.append((x, images, [r for r in roots if r is not None]))
    turns = [
        [[int(nmod(entry, p)) for entry in row] for row in rotation(i, layout).tolist()] for i in range(len(tokens))
    ]
    count = (heads + groups) * d * k + 2 * k

    def side(token: int, which: int) -> tuple[list[int], list[list[int]]]:
        """The normed, scaled, rotated vector of one token and head, and its derivative by every parameter."""
        x, images, roots = tokens[token]
        u, r, g = images[which], roots[which], gammas[int(which >= heads)]
        inverse = pow(r, -1, p)
        vector = [g[m] * u[m] * inverse for m in range(k)]
        derivative = [[0] * k for _ in range(count)]
        for a in range(d):
            for c in range(k):  # by W[a][c]: du_c = x_a
                du = x[a]
                row = [-g[m] * u[m] * u[c] * du * inverse**3 for m in range(k)]
                row[c] += g[c] * du * inverse
                derivative[(which * d + a) * k + c] = row
        for m in range(k):
            derivative[(heads + groups) * d * k + int(which >= heads) * k + m][m] = u[m] * inverse % p
        turn = turns[token]
        turned = [[sum(row[m] * turn[m][j] for m in range(k)) % p for j in range(k)] for row in [vector, *derivative]]
        return turned[0], turned[1:]

    sides = [[side(t, which) for which in range(heads + groups)] for t in range(len(tokens))]
    rows = []
    for h in range(heads):
        group = heads + h // (heads // groups)
        for i in range(len(tokens)):
            query, by_query = sides[i][h]

            def gradient(j: int, query: list[int] = query, by_query: Any = by_query, group: int = group) -> list[int]:
                key, by_key = sides[j][group]
                return [
                    sum(a * b for a, b in zip(dq, key, strict=True))
                    + sum(a * b for a, b in zip(query, dk, strict=True))
                    for dq, dk in zip(by_query, by_key, strict=True)
                ]

            # The softmax sees differences within a row.
            for one, other in itertools.pairwise(gradient(j) for j in range(len(tokens))):
                rows.append([a - b for a, b in zip(one, other, strict=True)])
    jacobian = nmod_mat(rows, p)
    known = []
    for which, weight in enumerate(weights):  # the scale of each W_Q and W_K
        move = [0] * count
        for a in range(d):
            move[(which * d + a) * k : (which * d + a + 1) * k] = weight[a]
        known.append(move)
    if gamma:  # equal entries: the channels of all queries and keys may be rotated together
        for group in range(groups):
            for i, j in itertools.combinations(range(k), 2):
                move = [0] * count
                per_group = heads // groups
                for which in [h for h in range(heads) if h // per_group == group] + [heads + group]:
                    for a in range(d):
                        move[(which * d + a) * k + i] = -weights[which][a][j]
                        move[(which * d + a) * k + j] = weights[which][a][i]
                known.append(move)
    width = 2 if rope else 1
    for start in range(0, k, width):  # gamma_q up, gamma_k down, together within a rotated pair
        move = [0] * count
        for m in range(start, start + width):
            move[(heads + groups) * d * k + m] = gammas[0][m]
            move[(heads + groups) * d * k + k + m] = -gammas[1][m]
        known.append(move)
    invisible = [move for move in known if (jacobian * nmod_mat([[entry] for entry in move], p)).rank() == 0]
    moving = nmod_mat(len(invisible), count, [entry for move in invisible for entry in move], p)
    return int(moving.rank()), count - int(jacobian.rank())


CLAIM = Claim(
    "query-key-gauge",
    "The query and key weights have a gauge of dimension G d_k^2, G d_k more with biases (the key bias is invisible); "
    "G d_k in all under RoPE; H + G + d_k under QK-RMSNorm with shared gamma, H + G + d_k/2 with RoPE besides.",
    HERE,
    check,
    title="The gauge of queries and keys",
    formula=r"(W_Q, W_K) \to (W_Q T, W_K T^{-T}): \quad G d_k^2",
    theory="7. Heads: who can tell them apart",
    hypotheses=(
        "weights of full rank; generic gamma",
        "RoPE turns every channel pair, with different frequencies (unturned channels keep GL and their key bias)",
        "no biases under QK-RMSNorm",
    ),
)
