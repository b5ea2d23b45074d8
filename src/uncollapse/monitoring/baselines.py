"""Alarms against a baseline: a head whose logits grew by half, which no snapshot can see.

Two baselines. A *record* that was given (a diagnosis, or the end of an earlier trail): a head is compared with itself there. Its
*own history*: the median of its last `HISTORY` looks. There the common course of all heads is removed, for training moves
them all, and what is left must exceed `SIGMAS` times what the heads have done until now (median absolute deviation).

When not to use it: with a record of another probe for anything finer than a factor. `compare` says how much two probes differ.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from uncollapse.errors import InputError
from uncollapse.judgement.comparison import GROWN, HEAD_COURSES, LEAST_LOGIT, head_finding
from uncollapse.monitoring.alarms import CALM, alarm
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.trail import Alarm, HeadPlace, TrailRecord

HISTORY = 8
SIGMAS = 8.0

Figures = Mapping[str, Sequence[float | None]]


@dataclass
class _Standing:
    over: int = 0
    calm: int = 0
    onset: int = 0
    before: float = 0.0
    is_raised: bool = False


@dataclass
class BaselineAlarms:
    """Each head beside a baseline. `given` is a record to compare with, None for the heads' own history."""

    heads: Sequence[HeadPlace]
    given: DiagnosisRecord | TrailRecord | None = None
    patience: int = 2
    _history: dict[str, deque[list[float]]] = field(default_factory=dict)
    _moves: dict[str, deque[float]] = field(default_factory=dict)
    _places: dict[str, _Standing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a baseline that has none of these heads: it could never raise an alarm."""
        if self.given is None or not self.heads:
            return
        there = self.given.heads if isinstance(self.given, TrailRecord) else self.given.attention
        known = {(h.block, h.head, h.kind) for h in there}
        if not any((h.block, h.head, h.kind) in known for h in self.heads):
            raise InputError(
                "Monitor: expected a baseline of this model, got one that has none of its heads. It may belong to another "
                "model, or hold no attention. Pass a diagnosis of this model."
            )

    def look(self, step: int, figures: Figures) -> tuple[list[Alarm], list[str]]:
        """The alarms that this look raises, and the keys of those that are over."""
        raised, cleared = [], []
        for measure, course in HEAD_COURSES.items():
            values = figures.get(measure)
            if values is None:
                continue
            now = [_log(measure, value) for value in values]
            before, least = self._before(measure, now)
            for place, (here, there) in enumerate(zip(now, before, strict=True)):
                name = self._key(measure, place)
                standing = self._places.setdefault(name, _Standing())
                reference = standing.before if standing.over else there
                if math.isnan(here) or math.isnan(reference):
                    continue
                if course.worse * (here - reference) > least:
                    if not standing.over:
                        standing.onset, standing.before = step, there
                    standing.over, standing.calm = standing.over + 1, 0
                    if standing.over >= self.patience and not standing.is_raised:
                        standing.is_raised = True
                        beside = (
                            "the baseline says" if self.given is not None else "its own history and the other heads say"
                        )
                        then_and_now = math.exp(reference), math.exp(here)
                        finding = head_finding(course, self.heads[place], *then_and_now, beside)
                        raised.append(alarm(finding, step, standing.onset, "baseline", name))
                else:
                    standing.calm += 1
                    if standing.over and standing.calm >= CALM:
                        if standing.is_raised:
                            cleared.append(name)
                        self._places[name] = _Standing()
        return raised, cleared

    def standing(self, key: str) -> None:
        """Take an alarm of an earlier part of the run as raised."""
        if key in self._places:
            self._places[key].is_raised = True

    def _key(self, measure: str, place: int) -> str:
        head = self.heads[place]
        return f"{HEAD_COURSES[measure].code}/block.{head.block}/{head.kind}/head.{head.head}"

    def _before(self, measure: str, now: list[float]) -> tuple[list[float], float]:
        """The logarithm of what each head is compared with, and how far it may be from there."""
        if self.given is not None:
            return [_log(measure, value) for value in _recorded(self.given, measure, self.heads)], math.log(GROWN)
        history = self._history.setdefault(measure, deque(maxlen=HISTORY))
        moves = self._moves.setdefault(measure, deque(maxlen=HISTORY))
        unknown = [math.nan] * len(now)
        before, least = unknown, math.inf
        if len(history) == HISTORY:
            own = [_median([look[i] for look in history]) for i in range(len(now))]
            common = _median([a - b for a, b in zip(now, own, strict=True)])
            before = [value + common for value in own]
            away = [abs(a - b) for a, b in zip(now, before, strict=True) if not math.isnan(a - b)]
            if len(moves) == HISTORY:
                least = max(math.log(GROWN), SIGMAS * 1.4826 * max(moves))
            if away:
                moves.append(statistics.median(away))
        history.append(now)
        return before if math.isfinite(least) else unknown, least


def _log(measure: str, value: float | None) -> float:
    if value is None or value <= 0 or (measure == "max_logit" and value < LEAST_LOGIT):
        return math.nan
    return math.log(value)


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def _recorded(
    record: DiagnosisRecord | TrailRecord, measure: str, heads: Sequence[HeadPlace]
) -> Sequence[float | None]:
    """What a record says of each head."""
    if isinstance(record, TrailRecord):
        last = record.readings[-1].heads.get(measure, []) if record.readings else []
        known = {(h.block, h.head, h.kind): v for h, v in zip(record.heads, last, strict=False)}
    else:
        known = {
            (r.block, r.head, r.kind): None if (s := getattr(r, measure, None)) is None else s.mean
            for r in record.attention
        }
    return [known.get((h.block, h.head, h.kind)) for h in heads]
