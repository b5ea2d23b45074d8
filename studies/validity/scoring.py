"""What the rules say of the measured cases, scored: each model by thresholds that were derived without it.

A threshold is half of the least distance from collapse that any healthy run has (for the kernel, a count that grows, twice the
most). Healthy are the models as they are, and the confounders that left them more than half of their output. No planted damage
enters a threshold. The constant that says where a fall in depth began is the middle of those that place most of the damaged
cases as soon as they are warned of; it, too, comes from the other models.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from studies.validity.cases import AS_BEFORE, OUTPUT_KEPT, TOLD_APART, Case, Measured, Run
from studies.validity.models import SUBJECTS
from uncollapse.judgement import findings
from uncollapse.judgement.findings import IN_FORCE, Observed, Reading, Thresholds
from uncollapse.records.common import PHENOMENA, Phenomenon

# The order parameter by which each plant is graded.
ORDER = {
    "residual scaled down": "consensus as read",
    "a common part added": "consensus as read",
    "logits scaled up in one head": "keys within reach",
    "logits scaled up in one block": "keys within reach",
    "logits scaled up in all blocks": "keys within reach",
    "logits to zero": "unused keys",
    "queries alike": "value contraction",
    "one head made a copy of another": "distinctness",
    "rank of the projection reduced": "rank",
}
# For the same plants one that no rule holds against a threshold, nor a function of it.
INDEPENDENT = {
    "residual scaled down": TOLD_APART,
    "a common part added": TOLD_APART,
    "logits to zero": "rows apart",
    "queries alike": "rows apart",
    "one head made a copy of another": "smallest angle",
    "rank of the projection reduced": "effective rank",
}
STRICTER = dict.fromkeys(("residual scaled down", "a common part added"), AS_BEFORE)
# The field of a rule's threshold; two constants make that of the frozen heads, which is told in units of what is in force.
FIELDS = {
    "DEPTH-CONSENSUS": "consensus",
    "DEPTH-RANK": "rank",
    "WIDTH-UNIFORM": "unused_keys",
    "WIDTH-RANK-ONE": "contraction",
    "HEADS-IDENTICAL": "distinctness",
    "HEADS-KERNEL": "lost_heads",
}
FROZEN = "ENTROPY-FROZEN"
CODES = (*list(FIELDS)[:4], FROZEN, *list(FIELDS)[4:])
# Order parameters that healthy models have in different size, and the rule that reads them: graded beside a resolution.
RESOLVED = {
    "consensus as read": "DEPTH-CONSENSUS",
    "unused keys": "WIDTH-UNIFORM",
    "value contraction": "WIDTH-RANK-ONE",
    "distinctness": "HEADS-IDENTICAL",
}
DEAD: Phenomenon = "dead-component"
HEALTHY_SHARE = 0.8  # of a resolved order parameter, which every healthy run that derives must have
HARMED = 0.5  # of the output, which a change that is meant to be harmless must leave
GROWS = {"HEADS-KERNEL"}  # counts what is lost, so that more is worse
LEAST_LOST = 0.5  # of a head: where healthy projections lose nothing, twice nothing would be no threshold
# Where to look for the constant that says where a fall began.
CARRIED = tuple(n / 10 for n in range(1, 10))


def value(thresholds: Thresholds, code: str) -> float:
    """Where a rule fires, in the unit in which it is told."""
    if code == FROZEN:
        return thresholds.rest_entropy / IN_FORCE.rest_entropy
    found: float = getattr(thresholds, FIELDS[code])
    return found


THRESHOLDS = {code: value(IN_FORCE, code) for code in CODES}


@dataclass(frozen=True)
class Judged:
    """One run as the present rules read it, with some thresholds. Readings that only inform are left out: they are no alarm."""

    case: Case
    run: Run
    readings: tuple[Reading, ...]
    thresholds: Thresholds = IN_FORCE

    def score(self, phenomenon: Phenomenon) -> float:
        """How far beyond its threshold the phenomenon's furthest rule is; above 0 it fires."""
        top = self.top(phenomenon)
        return -math.inf if top is None else top.margin

    def top(self, phenomenon: Phenomenon) -> Reading | None:
        of_it = [r for r in self.readings if r.finding.phenomenon == phenomenon]
        return max(of_it, key=lambda r: r.margin, default=None)

    def found(self) -> list[Phenomenon]:
        return [p for p in (*PHENOMENA, DEAD) if self.score(p) > 0]

    @property
    def is_harmed(self) -> bool:
        """Whether a change that was meant to be harmless took more of the model's output than it left."""
        return self.case.phenomenon is None and self.run.orders.get(OUTPUT_KEPT, 1.0) < HARMED

    def distance(self, code: str) -> float | None:
        """The least distance from collapse that this rule read (the kernel's count, the most)."""
        margins = [r.margin for r in self.readings if r.finding.code == code]
        if not margins:
            return None
        return value(self.thresholds, code) * math.exp(max(margins) * (1 if code in GROWS else -1))


Extremes = dict[str, tuple[float, Judged]]


class Scores:
    """All measured models, judged twice: with the thresholds in force, and each with those that the other models give."""

    def __init__(self, measured: Mapping[str, Measured]) -> None:
        self.measured = {name: m for name, m in measured.items() if SUBJECTS[name].is_healthy}
        self.in_force = {name: self._judged(name, IN_FORCE) for name in self.measured}
        self.derived = self.thresholds(self.measured)
        self.left_out = {
            name: self.thresholds(other for other in self.measured if other != name) for name in self.measured
        }
        self.judged = {name: self._judged(name, self.left_out[name]) for name in self.measured}

    def _judged(self, name: str, thresholds: Thresholds) -> list[list[Judged]]:
        m = self.measured[name]
        return [[judged(m, case, run, thresholds) for run in case.runs] for case in m.cases]

    def cases(self, keep: Callable[[Case], bool] = lambda _: True) -> Iterator[tuple[Case, list[Judged]]]:
        """Judged by what was derived from the other models."""
        for runs in itertools.chain.from_iterable(self.judged.values()):
            if keep(runs[0].case):
                yield runs[0].case, runs

    def oddities(self, *, as_shipped: bool = False) -> list[Judged]:
        """Healthy models and confounders, harmed or not; by default each judged without its own model."""
        every = (self.in_force if as_shipped else self.judged).values()
        return [runs[0] for runs in itertools.chain.from_iterable(every) if runs[0].case.phenomenon is None]

    def healthy(self, *, as_shipped: bool = False) -> list[Judged]:
        """Those of them that were not harmed."""
        return [each for each in self.oddities(as_shipped=as_shipped) if not each.is_harmed]

    def extremes(self, names: Iterable[str]) -> Extremes:
        """By code: the extreme healthy distance of some models, and where."""
        found: Extremes = {}
        chosen = set(names)
        healthy = [each for each in self.healthy(as_shipped=True) if each.case.subject in chosen]
        for code in CODES:
            values = [(d, j) for j in healthy if (d := j.distance(code)) is not None]
            if values:
                found[code] = (max if code in GROWS else min)(values, key=lambda pair: pair[0])
        return found

    def thresholds(self, names: Iterable[str]) -> Thresholds:
        """What the healthy runs of some models, and for the beginning of a fall their damaged ones, give."""
        chosen = list(names)
        extremes = self.extremes(chosen)
        given = {FIELDS[c]: threshold(c, worst) for c, (worst, _) in extremes.items() if c != FROZEN}
        if FROZEN in extremes:
            share = threshold(FROZEN, extremes[FROZEN][0])
            given |= {"rest_entropy": IN_FORCE.rest_entropy * share, "within_reach": IN_FORCE.within_reach * share}
        return Thresholds(**given, carried=self.beginning(chosen))

    def halves(self) -> tuple[list[str], list[str]]:
        """The models by size, every second one: what the form of a rule was chosen on, and what it was not."""
        by_size = sorted(self.measured, key=lambda name: -self.measured[name].parameters)
        return by_size[::2], by_size[1::2]

    def beginning(self, names: Sequence[str]) -> float:
        """The middle of the constants that place most of these models' damaged cases of depth, where they are first warned of."""
        placed = [sum(column) for column in zip(*(row for n in names for row in self._placed[n]), strict=True)]
        if not placed or not max(placed):
            return IN_FORCE.carried
        best = [carried for carried, count in zip(CARRIED, placed, strict=True) if count == max(placed)]
        return best[(len(best) - 1) // 2]

    @functools.cached_property
    def _placed(self) -> dict[str, list[list[bool]]]:
        """By model, for each of its damaged cases of depth that is warned of: which of `CARRIED` place it at the first severity at
        which it is. Nobody is told a place before."""
        found: dict[str, list[list[bool]]] = {}
        for name, m in self.measured.items():
            found[name] = []
            for case in m.cases:
                if case.phenomenon != "rank-collapse-depth":
                    continue
                warned = next(
                    (run for run in case.runs if (top := _furthest(run)) is not None and top.margin > 0), None
                )
                if warned is not None:
                    limits = [Thresholds(carried=carried) for carried in CARRIED]
                    found[name].append([is_located(case, _furthest(warned, each)) for each in limits])
        return found

    def resolutions(self, name: str) -> dict[str, float]:
        """By order parameter: the coarsest power of ten beside which all healthy runs of the models other than this one agree."""
        extremes = self.extremes(other for other in self.measured if other != name)
        return {order: resolution(extremes[code][0]) for order, code in RESOLVED.items() if code in extremes}

    def independent_resolutions(self, name: str) -> dict[str, float]:
        """The same from what the independent quantities are in healthy places. A share of an own healthy value needs none."""
        found = {}
        for order in dict.fromkeys(INDEPENDENT.values()):
            starts = [
                case.runs[0].orders[order]
                for case, _ in self.cases(lambda case: case.subject != name)
                if INDEPENDENT.get(case.plant) == order
            ]
            if starts and order != TOLD_APART:
                found[order] = resolution(min(starts))
        return found

    @functools.cached_property
    def _resolutions(self) -> dict[str, dict[str, float]]:
        return {name: self.resolutions(name) for name in self.measured}

    def half(self, case: Case) -> int | None:
        """The first severity at which the order parameter of the plant, beside its resolution, has moved by half."""
        return moved_by_half(case, ORDER[case.plant], self._resolutions[case.subject])


def _furthest(run: Run, thresholds: Thresholds = IN_FORCE) -> Reading | None:
    """What `DEPTH-CONSENSUS` read of a run; None where it read nothing but information."""
    read = findings.consensus(Observed(run.trajectory or [], [], [], thresholds=thresholds))
    return max((r for r in read if r.finding.severity != "info"), key=lambda r: r.margin, default=None)


def threshold(code: str, extreme: float) -> float:
    """Half of the way from the worst healthy value to the collapse."""
    return max(2 * extreme, LEAST_LOST) if code in GROWS else extreme / 2


def judged(measured: Measured, case: Case, run: Run, thresholds: Thresholds = IN_FORCE) -> Judged:
    healthy = measured.healthy
    assert healthy.trajectory is not None
    assert healthy.attention is not None
    changed = {(h.block, h.kind): h for h in run.heads}
    heads = [changed.get((h.block, h.kind), h) for h in healthy.heads]
    is_healthy = case.phenomenon is None
    found = findings.readings(
        run.trajectory or healthy.trajectory,
        run.attention or healthy.attention,
        heads,
        run.parts if is_healthy else [],
        run.embeddings if is_healthy else [],
        thresholds,
    )
    return Judged(case, run, tuple(r for r in found if r.finding.severity != "info"), thresholds)


def beside(value: float, resolution: float | None) -> float:
    """An order parameter beside a resolution r, (1 + r) x / (x + r): nearly 1 for all that is much larger than r, half where
    the two are equal, and 0 at the collapse. As it is without one."""
    value = max(value, 0.0)
    return value if resolution is None else (1 + resolution) * value / (value + resolution)


def resolution(nearest: float) -> float:
    """The largest power of ten beside which a healthy value keeps `HEALTHY_SHARE`."""
    exponent = 0
    while beside(nearest, 10.0**exponent) < HEALTHY_SHARE:
        exponent -= 1
    return 10.0**exponent


def moved_by_half(case: Case, order: str, resolutions: Mapping[str, float] | None = None) -> int | None:
    """The first severity at which the order parameter has gone half of its way to 0; None where it never does."""
    fineness = (resolutions or {}).get(order)
    values = [beside(run.orders[order], fineness) for run in case.runs]
    return next((i for i, value in enumerate(values) if value <= values[0] / 2), None)


def area(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Under the ROC: the chance that a damaged run scores higher than a healthy one, ties counting half."""
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return wins / (len(positive) * len(negative)) if positive and negative else math.nan


def is_located(case: Case, reading: Reading | None) -> bool:
    """The block that was damaged, and the head or the two heads where only they were."""
    if reading is None or reading.finding.block != case.block:
        return False
    if case.head is None:
        return True
    if len(case.head) == 1:
        return reading.finding.head == case.head[0]
    first, second = sorted(case.head)
    return reading.finding.message.startswith(f"Heads {first} and {second} ")


@dataclass(frozen=True)
class AtHalf:
    """The cases of a phenomenon at the severity where an order parameter has moved by half. `never` counts those where it does
    not: the model withstood all of the ladder."""

    cases: int
    never: int
    area: float
    detected: float
    located: float
    locatable: int


def at_half(
    scores: Scores, phenomenon: Phenomenon, moved: Callable[[Case], int | None], plants: Iterable[str] = ORDER
) -> AtHalf:
    """`moved` gives the severity of a case that is looked at; other plants are left out."""
    wanted = set(plants)
    reached: list[tuple[Case, Judged]] = []
    never = 0
    for case, runs in scores.cases():
        if case.phenomenon != phenomenon or case.plant not in wanted:
            continue
        index = moved(case)
        if index is None:
            never += 1
        else:
            reached.append((case, runs[index]))
    negative = [j.score(phenomenon) for j in scores.healthy()]
    places = [is_located(case, j.top(phenomenon)) for case, j in reached if case.block is not None]
    return AtHalf(
        len(reached),
        never,
        area([j.score(phenomenon) for _, j in reached], negative),
        share(j.score(phenomenon) > 0 for _, j in reached),
        share(places),
        len(places),
    )


def share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
