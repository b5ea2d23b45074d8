"""When does a reading become an alarm? Once, when it is news, and not again until it has been over.

A rule of the diagnosis gives at every look and for each place ln(threshold / distance), its *margin*. A snapshot reports whatever
is above 0. A run is another matter, for three reasons.

* A fresh model looks collapsed in places: its attention is uniform. What the first look finds is news only if it gets worse by a
  factor of `WORSE`, or comes back after it was over.
* A fresh model goes through a collapse while it learns how often each token occurs, and comes out again. So a place that has not
  been *settled* (`FAR` from its threshold at the first look, or away from it for `SETTLED` looks) must stay over its bar for
  `STANDING` looks without getting better, or be `SEVERE`ly over it: no healthy run of `studies/early_warning` goes so deep.
* What flickers round its threshold is one alarm: it is over when the margin has been `HYSTERESIS` below the bar for `CALM` looks.
  A warning at a settled place must stand for `patience` looks. What is critical there does not wait.

When not to use it: to judge one record. `findings` does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from uncollapse.judgement.findings import Reading
from uncollapse.records.common import SEVERITIES, Finding
from uncollapse.records.trail import Against, Alarm

HYSTERESIS = math.log(1.25)
WORSE = math.log(2.0)
SEVERE = math.log(30.0)
MOST = math.log(1000.0)  # beyond, a distance is rounding error or as good as none
FAR = math.log(4.0)
CALM, SETTLED, STANDING = 3, 5, 12


def key_of(finding: Finding) -> str:
    """The rule and the place that a margin belongs to. Rules about the stream have one place a stack, wherever in it the finding
    lies; the others have one an attention."""
    parts = [finding.code]
    if finding.stack is not None:
        parts.append(finding.stack)
    if not finding.code.startswith(("DEPTH", "NUMERICS")):
        parts += [f"block.{finding.block}", finding.kind or "self"]
    return "/".join(parts)


def judged(readings: Sequence[Reading]) -> dict[str, Reading]:
    """What a step is judged by, by key. What a rule only remarks on (`info`) is left out."""
    return {key_of(r.finding): r for r in readings if r.finding.severity != "info"}


def margins_of(readings: Mapping[str, Reading]) -> dict[str, float]:
    """The margins by key, as far as they mean something."""
    return {key: min(reading.margin, MOST) for key, reading in readings.items()}


@dataclass
class _Place:
    """What is known of one rule at one place. It is over its `bar` if the margin is: 0, or what the first look found and more."""

    bar: float
    over: int = 0
    calm: int = 0
    onset: int = 0
    least: float = math.inf  # margin since it was first over
    is_settled: bool = False
    raised: int = -1  # how severe the standing alarm is, as an index into SEVERITIES


@dataclass
class ThresholdAlarms:
    """The rules of the diagnosis, look after look."""

    patience: int = 2
    _places: dict[str, _Place] = field(default_factory=dict)

    def look(
        self, step: int, margins: Mapping[str, float], found: Mapping[str, Finding]
    ) -> tuple[list[Alarm], list[str]]:
        """The alarms that this look raises, and the keys of those that are over. `found` holds the finding of each key; without
        it (a reading of an earlier run) nothing is raised anew, and what stood then is taken to stand."""
        raised, cleared = [], []
        for key, margin in margins.items():
            place = self._places.get(key)
            if place is None:
                is_expected = margin > 0 and not key.startswith("NUMERICS")
                place = _Place(margin + WORSE if is_expected else 0.0, is_settled=margin < -FAR)
                self._places[key] = place
            if margin > place.bar:
                if not place.over:
                    place.onset, place.least = step, margin
                place.over, place.calm = place.over + 1, 0
                finding = found.get(key)
                if finding is not None and self._is_news(place, margin, finding):
                    place.raised = SEVERITIES.index(finding.severity)
                    raised.append(alarm(finding, step, place.onset, "threshold", key))
            elif margin <= place.bar - HYSTERESIS:
                place.calm += 1
                if place.calm >= CALM:
                    if place.raised >= 0:
                        cleared.append(key)
                    place.over, place.raised = 0, -1
                    if margin < -HYSTERESIS:
                        place.bar = 0.0
                place.is_settled |= place.calm >= SETTLED and margin < -HYSTERESIS
        return raised, cleared

    def _is_news(self, place: _Place, margin: float, finding: Finding) -> bool:
        if SEVERITIES.index(finding.severity) <= place.raised:
            return False
        if finding.phenomenon == "numerics":
            return True
        if place.is_settled:
            return place.over >= self.patience or finding.severity == "critical"
        if margin > SEVERE:
            return True
        place.least = min(place.least, margin)
        return place.over >= STANDING and margin > place.least - HYSTERESIS and margin > WORSE

    def standing(self, key: str, severity: str) -> None:
        """Take an alarm of an earlier part of the run as raised."""
        if key in self._places:
            self._places[key].raised = SEVERITIES.index(severity)


def alarm(finding: Finding, step: int, onset: int, against: Against, key: str) -> Alarm:
    """The finding as an alarm."""
    return Alarm(**vars(finding), step=step, onset=onset, against=against, key=key)
