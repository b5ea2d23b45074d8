"""When does a reading become an alarm? Once, when it is news, and not again until it has been over.

A rule of the diagnosis gives at every look and for each place ln(threshold / distance), its *margin*. A snapshot reports whatever
is above 0. A run is another matter, for a fresh model looks collapsed and is not. Its attention is uniform for hundreds of steps.
While it learns how often each token occurs, its tokens come together and part again (docs/early-warning.md shows how far). So:

* A place is *settled* once it is healthy: `FAR` from its threshold at the first look, or `HEALTHY` away for `SETTLED` looks. For
  a stream, `STREAM_FAR` and `STREAM_HEALTHY` take their place: one that was just made keeps a third of the embedding's distance
  for some looks, loses it and gains it again.
* Attention that began over a threshold on width, as that of a fresh model does, comes from where the threshold points. While the
  model learns it goes back and forth, and stays more than `SETTLED` looks. It is settled once it has been healthy for `STANDING`
  looks. That holds for both rules on width: attention that began uniform has not chosen yet, and the mixtures of nearly uniform
  attention may be alike. Not to be judged at the first look counts as such a beginning: it was as initialised, or its tokens were
  alike.
* At a settled place a warning must stand for `patience` looks in a row, and what is critical does not wait.
* A place that is not settled raises an alarm only if it has all but collapsed (`SEVERE`, and worse than at the first look unless it
  had left that behind), which no healthy run does, or if it stays over its threshold for `STANDING` looks without getting better.
  Attention that began over a threshold raises one only if it had left that behind and all but collapsed: uniform attention that
  was never anything else raises none, nor does a young model whose attention is selective for some looks and uniform for more.
* NaN and infinity are an alarm at once, at any place.
* A part that does nothing (a head, an MLP, a block) is an alarm only where it did something before: some initialisations start
  parts at zero, and a pruned head is dead on purpose. It is over when the part has done something again for `CALM` looks.
* What flickers round its threshold is one alarm: it is over when the margin has been `HYSTERESIS` below for `CALM` looks.

When not to use it: to judge one record. `findings` does that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from uncollapse.judgement import dead_components
from uncollapse.judgement.findings import CONSENSUS, Reading
from uncollapse.records.common import SEVERITIES, Finding
from uncollapse.records.trail import Against, Alarm

HYSTERESIS = math.log(1.25)
WORSE = math.log(2.0)
HEALTHY = 0.95 * math.log(2.0)  # thresholds are half the smallest healthy distance
FAR = math.log(4.0)
# The same for a stream, as shares of the embedding's distance that do not move with the threshold.
STREAM_HEALTHY, STREAM_FAR = math.log(0.42 / CONSENSUS), math.log(0.88 / CONSENSUS)
SEVERE = math.log(30.0)
MOST = math.log(1000.0)  # beyond, a distance is rounding error or as good as none
CALM, SETTLED, STANDING = 3, 5, 40


def key_of(finding: Finding) -> str:
    """The rule and the place that a margin belongs to. Rules about the stream have one place a stack, wherever in it the finding
    lies; those about dead parts have one a part or head; the others have one an attention."""
    parts = [finding.code]
    if finding.stack is not None:
        parts.append(finding.stack)
    if finding.code in dead_components.CODES:
        parts.append(_block_word(finding.block))
        if finding.code not in ("DEAD-BLOCK", "EMBEDDINGS-EQUAL"):
            parts.append(finding.kind or "mlp")
        return "/".join(parts if finding.head is None else [*parts, f"head.{finding.head}"])
    if not finding.code.startswith(("DEPTH", "CORPUS", "NUMERICS")):
        parts += [f"block.{finding.block}", finding.kind or "self"]
    return "/".join(parts)


def _block_word(block: int | None) -> str:
    return "embedding" if block is None else f"block.{block}"


def judged(readings: Sequence[Reading]) -> dict[str, Reading]:
    """What a step is judged by, by key. What a rule only remarks on (`info`) is left out."""
    return {key_of(r.finding): r for r in readings if r.finding.severity != "info"}


def margins_of(readings: Mapping[str, Reading]) -> dict[str, float]:
    """The margins by key, as far as they mean something."""
    return {key: min(reading.margin, MOST) for key, reading in readings.items()}


@dataclass
class _Place:
    """What is known of one rule at one place: its margin at the first look, whether it is attention that began over the threshold,
    for how many looks it has been over or away, and how severe the alarm is that stands (an index into SEVERITIES)."""

    first: float
    is_settled: bool
    began_over: bool = False
    has_left: bool = False  # whether it was healthy for `SETTLED` looks
    over: int = 0
    calm: int = 0
    healthy: int = 0
    onset: int = 0
    in_a_row: int = 0  # looks over the threshold since it was last below
    best: float = math.inf  # margin since it was first over, as of the last time that it got better
    standing: int = 0  # looks over the threshold since then
    raised: int = -1


@dataclass
class ThresholdAlarms:
    """The rules of the diagnosis, look after look."""

    patience: int = 2
    _places: dict[str, _Place] = field(default_factory=dict)
    _has_looked: bool = False
    _measured: set[int | None] = field(default_factory=set)  # the blocks whose parts an earlier look has seen

    def look(
        self,
        step: int,
        margins: Mapping[str, float],
        found: Mapping[str, Finding],
        measured: Collection[int | None] = (),
    ) -> tuple[list[Alarm], list[str]]:
        """The alarms that this look raises, and the keys of those that are over. `found` holds the finding of each key; without
        it (a reading of an earlier part of the run) nothing is raised. `measured`: the blocks (None: the embedding) of which this
        look knows whether their parts are dead. Those that are not named in `margins` do something."""
        raised, cleared = [], []
        before, is_first, self._has_looked = self._known_parts(margins), not self._has_looked, True
        for key, margin in [*margins.items(), *((key, -MOST) for key in self._alive(margins, measured))]:
            far, healthy = (STREAM_FAR, STREAM_HEALTHY) if key.startswith("DEPTH-CONSENSUS") else (FAR, HEALTHY)
            first = -MOST if key in before else margin
            began_over = key.startswith("WIDTH") and (not is_first or _is_over_width(key, margins))
            place = self._places.setdefault(key, _Place(first, first < -far and not began_over, began_over))
            place.healthy = place.healthy + 1 if margin < -healthy else 0
            place.has_left |= place.healthy >= SETTLED
            place.is_settled |= place.healthy >= (STANDING if place.began_over else SETTLED)
            place.in_a_row = place.in_a_row + 1 if margin > 0 else 0
            if margin > 0:
                if not place.over:
                    place.onset, place.best, place.standing = step, margin, 0
                if margin < place.best - HYSTERESIS:
                    place.best, place.standing = margin, 0
                place.over, place.calm, place.standing = place.over + 1, 0, place.standing + 1
                finding = found.get(key)
                if finding is not None and self._is_news(place, margin, finding):
                    place.raised = SEVERITIES.index(finding.severity)
                    raised.append(alarm(finding, step, place.onset, "threshold", key))
            elif margin < -HYSTERESIS:
                place.calm += 1
                if place.calm >= CALM:
                    if place.raised >= 0:
                        cleared.append(key)
                    place.over, place.raised = 0, -1
        self._measured |= set(measured)
        return raised, cleared

    def _known_parts(self, margins: Mapping[str, float]) -> set[str]:
        """Those of the dead parts that an earlier look saw doing something: they were measured, and did not lie inside what was
        dead from the start until now."""
        never = [key for key, place in self._places.items() if not place.is_settled and not place.healthy]
        return {
            key
            for key in margins
            if _is_of_part(key)
            and _block_of(key) in self._measured
            and not any(_is_inside(key, other) for other in never)
        }

    def _alive(self, margins: Mapping[str, float], measured: Collection[int | None]) -> Iterator[str]:
        """The parts that were dead at some look and are not at this one. One that lies inside a dead one is not asked about."""
        for key in self._places:
            is_left_out = key not in margins and _is_of_part(key) and _block_of(key) in measured
            if is_left_out and not any(_is_inside(key, other) for other in margins):
                yield key

    def is_settled(self, key: str) -> bool:
        """Whether this place was healthy before."""
        return key in self._places and self._places[key].is_settled

    def _is_news(self, place: _Place, margin: float, finding: Finding) -> bool:
        if SEVERITIES.index(finding.severity) <= place.raised:
            return False
        if finding.phenomenon == "numerics":
            return True
        if place.is_settled:
            return place.in_a_row >= self.patience or finding.severity == "critical"
        if finding.phenomenon == "dead-component" or (
            finding.phenomenon == "rank-collapse-width" and not place.has_left
        ):
            return False
        if margin > SEVERE and (place.has_left or margin > place.first + WORSE):
            return True
        return place.standing >= STANDING and not place.began_over

    def standing(self, key: str, severity: str) -> None:
        """Take an alarm of an earlier part of the run as raised."""
        if key in self._places:
            self._places[key].raised = SEVERITIES.index(severity)


def _is_over_width(key: str, margins: Mapping[str, float]) -> bool:
    """Whether the attention of this key is over any threshold on width."""
    place = key.partition("/")[2]
    return any(margins.get(f"{code}/{place}", -math.inf) > 0 for code in ("WIDTH-UNIFORM", "WIDTH-RANK-ONE"))


def _is_of_part(key: str) -> bool:
    return key.partition("/")[0] in dead_components.CODES


def _is_inside(key: str, wider: str) -> bool:
    """Whether the part of one key lies inside that of another, which says all that could be said of it."""
    _, *place = key.split("/")
    code, *around = wider.split("/")
    return code in dead_components.WIDER_CODES and place[: len(around)] == around


def _block_of(key: str) -> int | None:
    """The block of a dead part; None for the embedding."""
    blocks = [word for word in key.split("/") if word.startswith("block.")]
    return int(blocks[0].removeprefix("block.")) if blocks else None


def alarm(finding: Finding, step: int, onset: int, against: Against, key: str) -> Alarm:
    """The finding as an alarm."""
    return Alarm(**vars(finding), step=step, onset=onset, against=against, key=key)
