"""How many directions of the value and output weights no input can see: the rank of an exact Jacobian."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, shifted
from uncollapse.claims.jacobian import between, flat, generic, matrices, unseen
from uncollapse.claims.ledger import HERE, Claim, Finding, bracketed, equal, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample, Evidence

# heads H, key/value groups G, head width d_k, width d, with biases b_V and b_O
LAYOUTS = ((2, 2, 1, 2, False), (2, 2, 2, 3, True), (4, 2, 1, 2, True), (4, 2, 2, 3, False), (3, 1, 2, 3, True))


@dataclass(frozen=True)
class Layout:
    """Sizes of one attention layer."""

    heads: int
    groups: int
    head_width: int
    width: int
    biases: bool

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """W_V and b_V of every group, W_h of every head, b_O."""
        k, d = self.head_width, self.width
        per_group = [(d, k)] * self.groups + [(1, k)] * self.groups * self.biases
        return per_group + [(k, d)] * self.heads + [(1, d)] * self.biases

    def split(self, values: Sequence[Any]) -> tuple[list[fmpq_mat], list[fmpq_mat], list[fmpq_mat], fmpq_mat]:
        """The flat parameters as (W_V, b_V, W_h, b_O); absent biases are 0."""
        blocks = matrices(values, *self.shapes)
        g, h = self.groups, self.heads
        value, rest = blocks[:g], blocks[g:]
        bias = [exact.zeros(1, self.head_width)] * g
        if self.biases:
            bias, rest = rest[:g], rest[g:]
        return value, bias, rest[:h], rest[h] if self.biases else exact.zeros(1, self.width)


Probe = tuple[fmpq_mat, list[fmpq_mat]]  # tokens and one pattern for each head


def output(layout: Layout, probes: Sequence[Probe], values: Sequence[Any]) -> list[Any]:
    """sum_h A_h (X W_V + 1 b_V) W_h + 1 b_O on every probe, as one flat list."""
    value, bias, out, last = layout.split(values)
    per_group = layout.heads // layout.groups
    entries: list[Any] = []
    for x, patterns in probes:
        y = exact.ones(x.nrows()) * last
        for h, pattern in enumerate(patterns):
            y = y + pattern * shifted(x * value[h // per_group], bias[h // per_group]) * out[h]
        entries += y.entries()
    return entries


def moved(draws: Draws, layout: Layout, values: Sequence[Any]) -> list[Any]:
    """A finite gauge move: W_V -> W_V T, W_h -> T^-1 W_h in every group; with biases b_V shifts and b_O pays for it."""
    value, bias, out, last = layout.split(values)
    per_group = layout.heads // layout.groups
    changes = [draws.invertible(layout.head_width) for _ in value]
    shifts = [draws.matrix(1, layout.head_width) for _ in value]
    if layout.biases:
        for h, weight in enumerate(out):
            last = last - shifts[h // per_group] * weight
        bias = [(b + s) * t for b, s, t in zip(bias, shifts, changes, strict=True)]
    value = [v * t for v, t in zip(value, changes, strict=True)]
    out = [changes[h // per_group].inv() * weight for h, weight in enumerate(out)]
    return flat(*value, *(bias if layout.biases else []), *out, *([last] if layout.biases else []))


def moves(layout: Layout, values: Sequence[Any]) -> list[list[Any]]:
    """The tangents of those moves: (W_V E, b_V E, -E W_h) for every unit matrix E of a group, and the bias shifts."""
    value, bias, out, last = layout.split(values)
    k, per_group = layout.head_width, layout.heads // layout.groups
    tangents = []

    def tangent(dv: dict[int, fmpq_mat], db: dict[int, fmpq_mat], dw: dict[int, fmpq_mat], dl: fmpq_mat) -> list[Any]:
        parts = [dv.get(g, m * 0) for g, m in enumerate(value)]
        parts += [db.get(g, m * 0) for g, m in enumerate(bias)] if layout.biases else []
        parts += [dw.get(h, m * 0) for h, m in enumerate(out)]
        return flat(*parts, *([dl] if layout.biases else []))

    for g in range(layout.groups):
        mine = [h for h in range(layout.heads) if h // per_group == g]
        for unit in range(k * k):
            e = fmpq_mat(k, k, [int(unit == index) for index in range(k * k)])
            tangents.append(tangent({g: value[g] * e}, {g: bias[g] * e}, {h: -e * out[h] for h in mine}, last * 0))
        for channel in range(k * layout.biases):
            row = fmpq_mat(1, k, [int(channel == index) for index in range(k)])
            paid = last * 0
            for h in mine:
                paid = paid - row * out[h]
            tangents.append(tangent({}, {g: row}, {}, paid))
    return tangents


def check(
    trials: int,
    seed: int,
    *,
    formula: Callable[[Layout], int] = lambda a: a.groups * a.head_width**2 + a.biases * a.groups * a.head_width,
    patterns: str = "of their own",
) -> Finding:
    """`formula` is the dimension claimed; `patterns="shared"` gives all heads one pattern."""
    draws = Draws("value-output-gauge", seed)

    def probes_for(layout: Layout, shared: bool) -> list[Probe]:
        probes = []
        for _ in range(8):
            own = [draws.pattern(3) for _ in range(layout.heads)]
            probes.append((draws.matrix(3, layout.width), own[:1] * layout.heads if shared else own))
        return probes

    invariant: list[bool | None] = []
    evidence: list[Evidence] = []
    for sizes in LAYOUTS:
        layout = Layout(*sizes)
        what = "H={} G={} d_k={} d={} biases={}".format(*sizes)
        bounds = []
        for _ in range(max(2, trials // 200)):
            # Full-rank draws: a weight of lower rank has a larger gauge.
            blocks = [draws.of_rank(rows, columns, min(rows, columns)) for rows, columns in layout.shapes]
            probes, point = probes_for(layout, patterns == "shared"), flat(*blocks)
            seen = functools.partial(output, layout, probes)
            bounds.append(between(seen, point, moves(layout, point)))
            invariant.append(seen(point) == seen(moved(draws, layout, point)))
        evidence.append(bracketed(f"dimension of the gauge at {what}", *generic(bounds), formula(layout)))
    layout = Layout(2, 2, 1, 2, False)
    point = flat(*(exact.ones(*shape) for shape in layout.shapes))
    probes = probes_for(layout, True)
    shared = unseen(lambda v: output(layout, probes, v), point)
    return [
        *evidence,
        tally("a finite move W_V T, T^-1 W_h (with b_V + delta, b_O - sum delta W_h) changes no output", invariant),
        equal("heads with one and the same pattern have a larger gauge, 2 by the formula", shared, 5, role="boundary"),
    ], Counterexample(
        "the gauge dimension is G d_k^2 for every choice of patterns",
        {"W_V,1 = W_V,2": [["1"], ["1"]], "W_1 = W_2": [["1", "1"]]},
        "two heads of width one that attend alike act as one: only sum_h W_V,h W_h is seen.",
        "two heads of width one, width two, all weights one",
    )


CLAIM = Claim(
    "value-output-gauge",
    "The value and output weights of a layer have a gauge of dimension G d_k^2 (GL(d_k) for each key/value group), and "
    "G d_k more with value and output biases.",
    HERE,
    check,
    title="The gauge of values and outputs",
    formula=r"(W_V, W_h) \to (W_V T, T^{-1} W_h): \quad G d_k^2",
    theory="7. Heads: who can tell them apart",
    hypotheses=(
        "the heads' patterns are independent",
        "W_V and the group's stacked W_h have rank d_k",
        "A1 = 1 (biases)",
    ),
)
