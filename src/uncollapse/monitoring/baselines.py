"""Alarms against a baseline: a head whose logits grew by half, which no snapshot can see.

Two baselines. A *record* that was given (a diagnosis, or the end of an earlier trail): a head is compared with itself there. Its
*own history*: the median of its last `HISTORY` looks. There the common course of all heads is removed, for training moves
them all, and what is left must exceed `SIGMAS` times what the heads have done until now (median absolute deviation).

Three things are no news beside a head's own history:

* It is where it has been before. A head that learns goes back and forth for longer than `HISTORY` looks. To be news it must be
  beyond whatever it was at any look before, by `HYSTERESIS`.
* It begins to choose among its keys. Its entropy falls when it does, and heads learn so one after another. It is judged once it has
  left at least `CHOICE` of its keys unused for `HISTORY` looks, twice what attention that counts as uniform leaves.
* The size of its query-key product, where its logits are measured. That size says how large they get only where nothing comes
  between, such as query-key normalisation, so the logits are judged instead.

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
from uncollapse.judgement.findings import UNUSED_KEYS
from uncollapse.monitoring.alarms import CALM, HYSTERESIS, alarm
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.trail import Alarm, HeadPlace, TrailRecord

HISTORY = 8
SIGMAS = 8.0
CHOICE = 2 * UNUSED_KEYS  # share of the keys

Figures = Mapping[str, Sequence[float | None]]


@dataclass
class _Standing:
    over: int = 0
    calm: int = 0
    onset: int = 0
    before: float = 0.0
    worst: float = -math.inf  # of all looks before, in the direction that is worse
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
    _worst: dict[str, dict[int, float]] = field(default_factory=dict)
    _chose: dict[int, int] = field(default_factory=dict)  # for how many looks a head has chosen among its keys

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
            worst = self._worst.setdefault(measure, {})
            before, least = self._before(measure, now)
            if self.given is None:
                silent = self._silent(measure, figures)
                before = [math.nan if silent[place] else value for place, value in enumerate(before)]
            for place, (here, there) in enumerate(zip(now, before, strict=True)):
                name = self._key(measure, place)
                standing = self._places.setdefault(name, _Standing())
                reference = standing.before if standing.over else there
                if math.isnan(here) or math.isnan(reference):
                    continue
                if course.worse * (here - reference) > least:
                    if not standing.over:
                        standing.onset, standing.before = step, there
                        standing.worst = worst.get(place, -math.inf)
                    standing.over, standing.calm = standing.over + 1, 0
                    is_new = self.given is not None or course.worse * here > standing.worst + HYSTERESIS
                    if standing.over >= self.patience and is_new and not standing.is_raised:
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
            for place, here in enumerate(now):
                if math.isfinite(here):
                    worst[place] = max(worst.get(place, -math.inf), course.worse * here)
        return raised, cleared

    def standing(self, key: str) -> None:
        """Take an alarm of an earlier part of the run as raised."""
        if key in self._places:
            self._places[key].is_raised = True

    def _key(self, measure: str, place: int) -> str:
        head = self.heads[place]
        return f"{HEAD_COURSES[measure].code}/block.{head.block}/{head.kind}/head.{head.head}"

    def _silent(self, measure: str, figures: Figures) -> list[bool]:
        """Of which heads a measure says nothing beside their own history."""
        none: list[float | None] = [None] * len(self.heads)
        if measure == "query_key_norm":
            return [value is not None for value in figures.get("max_logit", none)]
        if measure == "rest_entropy":
            shares = figures.get("key_share", none)
            for place, share in enumerate(shares):
                chooses = share is None or 1 - share >= CHOICE
                self._chose[place] = self._chose.get(place, 0) + 1 if chooses else 0
            return [self._chose[place] <= HISTORY for place in range(len(self.heads))]
        return [False] * len(self.heads)

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
