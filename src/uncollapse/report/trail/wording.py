"""How a monitored run is put into words: what it was, what each alarm says, and what happened next."""

from __future__ import annotations

from collections.abc import Sequence

from uncollapse.records.trail import Alarm, TrailReading, TrailRecord
from uncollapse.report import wording

AGAINST = {
    "threshold": "past the threshold of the diagnosis",
    "baseline": "against a baseline",
    "trend": "on its way to the threshold",
}
SITE_TITLES = {
    "consensus_after_norm": "Consensus distance after normalisation",
    "stream_carried": "Share of the stream carried on",
}
HEAD_TITLES = {
    "rest_entropy": "Normalised entropy without the strongest key",
    "max_logit": "Largest logit",
}


def headline(record: TrailRecord) -> str:
    """The run in one sentence."""
    alarms = record.alarms
    if not record.readings:
        return "Nothing has been read yet."
    last = record.readings[-1].step
    looked = f"{wording.count(len(record.readings), 'look')} up to step {last:,}"
    if not alarms:
        return f"No alarm in {looked}."
    first = alarms[0]
    over = sum(over_at(record, alarm) is not None for alarm in alarms)
    subject = "it is" if len(alarms) == 1 else f"{over} of them {'is' if over == 1 else 'are'}"
    standing = f"; {subject} over" if over else ""
    return (
        f"{wording.count(len(alarms), 'alarm')} in {looked}{standing}. The first: {first.code} at step {first.step:,}, "
        f"{wording.finding_place(first)}."
    )


def over_at(record: TrailRecord, alarm: Alarm) -> int | None:
    """The step at which an alarm was over; None while it stands."""
    return next((r.step for r in record.readings if r.step > alarm.step and alarm.key in r.cleared), None)


def what_next(record: TrailRecord, alarm: Alarm) -> str:
    """What happened after an alarm: whether it was over, how far its rule went, and what the loss did."""
    later = [r for r in record.readings if r.step > alarm.step]
    if not later:
        return "It is the last look so far."
    said = []
    over = over_at(record, alarm)
    said.append(f"It stands at step {later[-1].step:,}." if over is None else f"It was over at step {over:,}.")
    rule = alarm.key.removesuffix("/trend")
    margins = [(r.margins[rule], r.step) for r in later if rule in r.margins]
    if margins and alarm.phenomenon != "dead-component":  # a part is dead or it is not
        worst, step = max(margins)
        if alarm.against == "trend":
            crossed = next((s for margin, s in margins if margin > 0), None)
            said.append(
                "The threshold was not reached."
                if crossed is None
                else f"The threshold was reached at step {crossed:,}."
            )
        else:
            said.append(f"The rule was furthest past its threshold at step {step:,}." if worst > 0 else "")
    losses = [r for r in record.readings if r.loss is not None]
    before = [r.loss for r in losses if r.step <= alarm.step]
    after = [r.loss for r in losses if r.step > alarm.step]
    if before and after:
        said.append(f"The loss was {wording.number(before[-1])} then and is {wording.number(after[-1])} now.")
    return " ".join(each for each in said if each)


def steps_sentence(readings: Sequence[TrailReading]) -> str:
    """Over which steps the run was looked at."""
    if len(readings) < 2:
        return ""
    return f"From step {readings[0].step:,} to step {readings[-1].step:,}."
