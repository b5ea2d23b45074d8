"""The tables of an ablation's page: every run and site, the rates, the contraction block by block, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from uncollapse.records import AblationRecord, AblationRun, SiteRecord, Statistic, followed
from uncollapse.report import ablation_wording as say
from uncollapse.report import cells, tables, wording
from uncollapse.report.cells import Cell, Column, Measure, Table, slug

ROUNDING = "rounding"
NOT_LINED_UP = "not every block has one self-attention of its own"


@dataclass(frozen=True)
class Along:
    """One depth, across all runs: `position` counts the followed sites from the embedding."""

    position: int
    site: SiteRecord
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class At:
    """One run at one site."""

    number: int
    run: AblationRun
    site: SiteRecord

    @property
    def unavailable(self) -> dict[str, str]:
        return self.site.unavailable


def depth_key(site: SiteRecord) -> str:
    """The key of a depth's row in the table of all curves."""
    return slug("curves", site.stack, "in" if site.block is None else site.block)


def run_site_key(number: int, site: SiteRecord) -> str:
    """The key of the row of one run and site."""
    return slug("run", number, cells.site_key(site))


def curves_table(record: AblationRecord, key: str) -> Table:
    """One row a site, one column a run: the consensus distance."""
    depths = [Along(i, site) for i, site in enumerate(followed(record.runs[0].trajectory))]

    def consensus(run: AblationRun) -> Callable[[Along], Cell | None]:
        sites = followed(run.trajectory)

        def value(depth: Along) -> Cell | None:
            statistic = sites[depth.position].consensus
            if statistic is None:
                return None
            spread = ROUNDING if say.at_floor(run, depth.position) else wording.spread(statistic)
            return Cell(wording.mean(statistic), spread, statistic.mean)

        return value

    return cells.table(
        key,
        "Consensus distance of every run along depth",
        [(Column("site", numeric=False), lambda depth: Cell(wording.site_name(depth.site), sort=float(depth.position)))],
        [Measure("consensus_distance", _heading(run, record), consensus(run)) for run in record.runs],
        depths,
        lambda depth: depth_key(depth.site),
    )


def _heading(run: AblationRun, record: AblationRecord) -> Column:
    return Column(say.mark(run, say.components(record)), say.name(run))


def _naming(record: AblationRecord) -> list[tuple[Column, Callable[[AblationRun], Cell]]]:
    """The columns that say which run a row is about."""
    among = say.components(record)
    return [
        (Column("run", say.key_to_marks(among), numeric=False), lambda run: Cell(say.mark(run, among))),
        (Column("taken away", numeric=False), lambda run: Cell(say.taken(run), sort=say.taken(run))),
    ]


def rates_table(record: AblationRecord, key: str) -> Table:
    """One row a run: how its consensus distance falls."""
    order = {id(run): number for number, run in enumerate(record.runs)}

    def slope(run: AblationRun) -> Cell | None:
        if run.rate is None or run.rate.slope is None:
            return None
        return Cell(wording.number(run.rate.slope), say.interval(run).strip(), run.rate.slope)

    def floor(run: AblationRun) -> Cell:
        met = say.floor_position(run)
        if met is None:
            return Cell("not met", sort=float(len(followed(run.trajectory))))
        return Cell(say.place(followed(run.trajectory)[met]), sort=float(met))

    return cells.table(
        key,
        "How fast the tokens come together",
        _naming(record),
        [
            Measure("rate", Column("rate", numeric=False), lambda run: run.rate and run.rate.kind),
            Measure("slope", Column("slope", "of ln r′ against ln r, 95 %"), slope),
            Measure("rate", Column("factor", "a block"), lambda run: run.rate and run.rate.factor),
            Measure("consensus_distance", Column("start"), say.start),
            Measure("consensus_distance", Column("lowest"), lambda run: _lowest(run)),
            Measure("floor", Column("rounding floor met"), floor),
            Measure("rate", Column("the floor"), lambda run: run.rate and run.rate.floor),
        ],
        [_reasoned(run) for run in record.runs],
        lambda run: slug("rate", _number(run, record.runs, order)),
    )


def _reasoned(run: AblationRun) -> AblationRun:
    """The run with the reason for a slope that cannot be fitted."""
    if run.rate is None or run.rate.slope is not None:
        return run
    run.unavailable.setdefault("slope", "fewer than three values above the rounding floor")
    return run


def _number(run: AblationRun, runs: Sequence[AblationRun], order: dict[int, int]) -> int:
    return order[id(run)]


def _lowest(run: AblationRun) -> Cell | None:
    """The lowest consensus distance and where; at the floor it says that this is rounding."""
    low = say.lowest(run)
    if low is None:
        return None
    where = ROUNDING if say.floor_position(run) is not None else say.place(low[1])
    return Cell(wording.number(low[0]), where, low[0])
