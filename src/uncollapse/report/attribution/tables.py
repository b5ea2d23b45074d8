"""The tables of an attribution's page: every head, and everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from uncollapse.records.attribution import AttributionRecord, EffectRecord, Estimate
from uncollapse.report import wording
from uncollapse.report.attribution import wording as say
from uncollapse.report.page.cells import Cell, Column, Measure, Table, slug, table


def key(effect: EffectRecord) -> str:
    """The key of a component's row."""
    return slug("effect", effect.kind.replace("_", "-"), effect.stack, effect.attention, effect.block, effect.head)


def effects_table(record: AttributionRecord, effects: Sequence[EffectRecord], table_key: str, caption: str) -> Table:
    """One row per component."""
    order = {id(effect): float(place) for place, effect in enumerate(record.effects)}

    def place(effect: EffectRecord) -> Cell:
        return Cell(say.name(effect), sort=order[id(effect)])

    def estimated(name: str, title: str, symbol: str = "") -> Measure:
        return Measure(name, Column(title, symbol), lambda effect: _cell(getattr(effect, name)))

    measures = [
        estimated("direct", "direct", "frozen scale"),
        estimated("exact", "direct", "exact"),
        estimated("total", "total", "taken away"),
        estimated("first_order", "first order", "gradient"),
    ]
    if any(effect.kind == "head" for effect in effects):
        measures += [
            Measure("behind", Column("behind W_O", f"± at {wording.percent(record.noise)}"), lambda e: e.behind),
            Measure("behind_random", Column("random W_O", "±"), lambda e: e.behind_random),
            Measure("noise_gain", Column("noise gain"), lambda e: e.noise_gain),
            Measure(
                "indistinguishable_from",
                Column("not told from", numeric=False),
                lambda e: ", ".join(map(str, e.indistinguishable_from)) or None,
            ),
        ]
        if not any(effect.indistinguishable_from for effect in effects):
            measures.pop()
    naming = [(Column("component", numeric=False), place)]
    elsewhere = {"noise_gain": f"random {random}"} if (random := _random_gain(effects)) else {}
    return table(table_key, caption, naming, measures, effects, _unique(effects), references=elsewhere)


def _random_gain(effects: Sequence[EffectRecord]) -> str:
    """The noise gain of random weights of that size: `behind_random` is to `behind` as it is to the head's own."""
    found = [
        e.noise_gain * e.behind_random / e.behind
        for e in effects
        if e.noise_gain is not None and e.behind_random is not None and e.behind
    ]
    return " or ".join(dict.fromkeys(map(wording.number, found)))


def _unique(effects: Sequence[EffectRecord]) -> Callable[[EffectRecord], str]:
    """A key for each row: several norms of one block have the same place."""
    keys: dict[int, str] = {}
    counts: dict[str, int] = {}
    for effect in effects:
        found = key(effect)
        counts[found] = counts.get(found, 0) + 1
        keys[id(effect)] = found if counts[found] == 1 else f"{found}-{counts[found]}"
    return lambda effect: keys[id(effect)]


def _cell(estimate: Estimate | None) -> Cell | None:
    if estimate is None:
        return None
    half = "" if estimate.half_width is None else f"± {wording.number(estimate.half_width)}"
    return Cell(wording.number(estimate.mean), half, estimate.mean)
