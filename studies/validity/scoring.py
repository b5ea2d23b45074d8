"""What the rules say of the measured cases, scored: thresholds from one half, everything else from the other.

Models are split by size, alternately, the largest into the deriving half; within those, cases are split by their number, even
ones deriving. A threshold is half of the least distance from collapse that a healthy model or a confounder of the deriving half
has (for the kernel, a count that grows, twice the most). No planted damage enters it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from studies.validity.cases import OUTPUT_KEPT, Case, Measured, Run
from studies.validity.models import SUBJECTS
from uncollapse.judgement import findings
from uncollapse.judgement.findings import Reading
from uncollapse.records.common import PHENOMENA, Phenomenon

# The order parameter by which each plant is graded.
ORDER = {
    "residual scaled down": "consensus as read",
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
    "residual scaled down": "own share of a change",
    "logits to zero": "rows apart",
    "queries alike": "rows apart",
    "one head made a copy of another": "smallest angle",
    "rank of the projection reduced": "effective rank",
}
THRESHOLDS = {
    "DEPTH-CONSENSUS": findings.CONSENSUS,
    "DEPTH-RANK": findings.RANK,
    "WIDTH-UNIFORM": findings.UNUSED_KEYS,
    "WIDTH-RANK-ONE": findings.CONTRACTION,
    "ENTROPY-FROZEN": 1.0,
    "HEADS-IDENTICAL": findings.DISTINCTNESS,
    "HEADS-KERNEL": findings.LOST_HEADS,
}
# Order parameters that healthy models have in different size, and the rule that reads them: graded beside a resolution.
RESOLVED = {
    "consensus as read": "DEPTH-CONSENSUS",
    "unused keys": "WIDTH-UNIFORM",
    "value contraction": "WIDTH-RANK-ONE",
    "distinctness": "HEADS-IDENTICAL",
}
DEAD: Phenomenon = "dead-component"
HEALTHY_SHARE = 0.8  # of a resolved order parameter, which every healthy run of the deriving half must have
HARMED = 0.5  # of the output, which a change that is meant to be harmless must leave
GROWS = {"HEADS-KERNEL"}  # counts what is lost, so that more is worse


@dataclass(frozen=True)
class Judged:
    """One run as the present rules read it. Readings that would only inform are left out: they are no alarm."""

    case: Case
    run: Run
    readings: tuple[Reading, ...]

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
        return THRESHOLDS[code] * math.exp(max(margins) * (1 if code in GROWS else -1))


class Scores:
    """All measured models, judged once."""

    def __init__(self, measured: Mapping[str, Measured]) -> None:
        self.measured = {name: m for name, m in measured.items() if SUBJECTS[name].is_healthy}
        by_size = sorted(self.measured, key=lambda name: -self.measured[name].parameters)
        self.deriving_models, self.scoring_models = by_size[::2], by_size[1::2]
        self.judged: dict[tuple[str, int], list[Judged]] = {}
        for name, m in self.measured.items():
            for case in m.cases:
                self.judged[name, case.number] = [judged(m, case, run) for run in case.runs]

    def is_deriving(self, case: Case) -> bool:
        return case.subject in self.deriving_models and case.number % 2 == 0

    def cases(self, keep: Callable[[Case], bool] = lambda _: True) -> Iterator[tuple[Case, list[Judged]]]:
        for (name, _), runs in self.judged.items():
            case = runs[0].case
            assert case.subject == name
            if keep(case):
                yield case, runs

    def healthy(self, keep: Callable[[Case], bool]) -> list[Judged]:
        """Healthy models and confounders."""
        return [runs[0] for case, runs in self.cases(keep) if case.phenomenon is None]

    def scored(self, case: Case) -> bool:
        return not self.is_deriving(case)

    def on_other_models(self, case: Case) -> bool:
        return case.subject in self.scoring_models

    @functools.cached_property
    def derived(self) -> dict[str, tuple[float, Judged]]:
        """By code: the extreme healthy distance of the deriving half, and where."""
        return self.extremes(self.is_deriving)

    @functools.cached_property
    def independent_resolutions(self) -> dict[str, float]:
        """As `resolutions`, from what the independent quantities are in healthy places of the deriving half."""
        found = {}
        for order in dict.fromkeys(INDEPENDENT.values()):
            starts = [
                case.runs[0].orders[order]
                for case, _ in self.cases(self.is_deriving)
                if INDEPENDENT.get(case.plant) == order
            ]
            found[order] = resolution(min(starts)) if starts else math.nan
        return found

    @functools.cached_property
    def resolutions(self) -> dict[str, float]:
        """By order parameter: the coarsest power of ten beside which all healthy runs of the deriving half agree."""
        return {order: resolution(self.derived[code][0]) for order, code in RESOLVED.items()}

    def extremes(self, keep: Callable[[Case], bool]) -> dict[str, tuple[float, Judged]]:
        found = {}
        for code in THRESHOLDS:
            values = [(d, j) for j in self.healthy(keep) if (d := j.distance(code)) is not None]
            choose = max if code in GROWS else min
            found[code] = choose(values, key=lambda pair: pair[0])
        return found


def threshold(code: str, extreme: float) -> float:
    """Half of the way from the worst healthy value to the collapse."""
    return 2 * extreme if code in GROWS else extreme / 2


def judged(measured: Measured, case: Case, run: Run) -> Judged:
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
    )
    return Judged(case, run, tuple(r for r in found if r.finding.severity != "info"))


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
    scores: Scores,
    phenomenon: Phenomenon,
    keep: Callable[[Case], bool],
    plain: Mapping[str, str] | None = None,
    resolutions: Mapping[str, float] | None = None,
) -> AtHalf:
    """By the resolved order parameters; `plain` names others of the plants, taken as they are or beside `resolutions`. Plants
    without are left out."""
    orders = ORDER if plain is None else plain
    resolutions = (scores.resolutions if plain is None else {}) if resolutions is None else resolutions
    reached: list[tuple[Case, Judged]] = []
    never = 0
    for case, runs in scores.cases(keep):
        if case.phenomenon != phenomenon or case.plant not in orders:
            continue
        index = moved_by_half(case, orders[case.plant], resolutions)
        if index is None:
            never += 1
        else:
            reached.append((case, runs[index]))
    negative = [j.score(phenomenon) for j in scores.healthy(keep)]
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
