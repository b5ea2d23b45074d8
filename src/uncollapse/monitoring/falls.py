"""Where did a fall begin, beside the run's own past?

One record shows where the tokens are together, and cannot say since when. In a young model they are together early on: its first
block carries little of the embedding, and a fault further on is not the first thing to be seen. A run knows how much of the stream
each block carried on before. The share of that which it still carries on steps down where the fall begins: to 1 before it, to the
median from there on. The step is put where it leaves the least absolute deviations of logarithms, for single blocks learn to carry
more or less. The block there must itself carry on less than `CARRIED` of what it did.

When not to use it: where the stream is carried on as before. Then the tokens came together for another reason, and the block that
the rule names stands.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from uncollapse.judgement.findings import CARRIED
from uncollapse.monitoring.baselines import HISTORY
from uncollapse.records.common import Stack
from uncollapse.records.trail import Alarm, SitePlace

LEAST = 0.01  # share, below which a block carries nothing on


@dataclass
class StreamHistory:
    """How much of the stream each block carried on at the last `HISTORY` looks."""

    sites: Sequence[SitePlace] = ()
    _seen: deque[list[float | None]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def placed(self, alarms: Sequence[Alarm], figures: Mapping[str, Sequence[float | None]]) -> list[Alarm]:
        """The alarms of one look, whose figures these are. Those that tokens converge name the block at which less of the stream is
        carried on than before, where there is one."""
        now = list(figures.get("stream_carried", ()))
        found = [
            self._placed(a, now) if a.code == "DEPTH-CONSENSUS" and a.against == "threshold" else a for a in alarms
        ]
        if now:
            self._seen.append(now)
        return found

    def _placed(self, alarm: Alarm, now: Sequence[float | None]) -> Alarm:
        began = self.began(now, alarm.stack)
        if began is None:
            return alarm
        block, share = began
        message = (
            f"Beside the last {HISTORY} looks the stream is lost from block {block} on, which carries on {share:.2g} times as much "
            f"of it as it did. Now: {alarm.message}"
        )
        return replace(alarm, block=block, message=message)

    def began(self, now: Sequence[float | None], stack: Stack | None = None) -> tuple[int, float] | None:
        """The block at which a fall began, and what it carries on as a share of what it did. None if the looks before are too few,
        or if there is no step down."""
        if len(self._seen) < HISTORY:
            return None
        shares: list[tuple[int, float]] = []
        for i, site in enumerate(self.sites):
            known = [value for look in self._seen if (value := look[i]) is not None]
            here = now[i] if i < len(now) else None
            if site.block is None or site.stack != stack or here is None or not known:
                continue
            if (before := statistics.median(known)) > 0:
                shares.append((site.block, here / before))
        change = [math.log(max(share, LEAST)) for _, share in shares]
        left = [
            _deviations(change[:at], 0.0) + _deviations(change[at:], statistics.median(change[at:]))
            for at in range(len(change))
        ]
        if not left or min(left) >= _deviations(change, 0.0):
            return None
        found = shares[left.index(min(left))]
        return found if found[1] < CARRIED else None


def _deviations(values: Sequence[float], level: float) -> float:
    return sum(abs(value - level) for value in values)
