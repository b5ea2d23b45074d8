"""The tables of an ablation's page: every run and site, the rates, the contraction in each block, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from uncollapse.records.ablation import AblationRecord, AblationRun
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import SiteRecord, followed
from uncollapse.report import wording
from uncollapse.report.ablation import wording as say
from uncollapse.report.healthy import References, in_percent
from uncollapse.report.page import cells
from uncollapse.report.page.cells import Cell, Column, Measure, Table, slug
from uncollapse.report.page.trajectory import NOT_FINITE, TRAJECTORY

ROUNDING = "rounding"


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
    """One row per site, one column per run: the consensus distance."""
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
        [
            (
                Column("site", numeric=False),
                lambda depth: Cell(wording.site_name(depth.site), sort=float(depth.position)),
            )
        ],
        [Measure("consensus_distance", _heading(run, record), consensus(run)) for run in record.runs],
        depths,
        lambda depth: depth_key(depth.site),
    )


def _heading(run: AblationRun, record: AblationRecord) -> Column:
    return Column(say.mark(run, say.components(record)), say.name(run))


@dataclass(frozen=True)
class Numbered:
    """One run, its number in the record, and why some of its figures are absent."""

    number: int
    run: AblationRun

    @property
    def unavailable(self) -> dict[str, str]:
        rate, known = self.run.rate, dict(self.run.unavailable)
        if rate is None:
            return {**dict.fromkeys(("kind", "slope", "factor", "floor"), known.get("rate", cells.NO_REASON)), **known}
        return {
            "slope": "fewer than three different values above the rounding floor",
            "factor": "fewer than two values above the rounding floor",
            "affine_rank": "no site has an affine rank",
            "consensus_distance": "no site has a consensus distance",
            **known,
        }


def _numbered(record: AblationRecord) -> list[Numbered]:
    return [Numbered(number, run) for number, run in enumerate(record.runs)]


def _naming(record: AblationRecord) -> list[tuple[Column, Callable[[Numbered], Cell]]]:
    """The columns that name the run."""
    among = say.components(record)
    return [
        (Column("run", say.key_to_marks(among), numeric=False), lambda row: _named(say.mark(row.run, among))),
        (Column("removed", numeric=False), lambda row: _named(say.taken(row.run))),
    ]


def _named(words: str) -> Cell:
    return Cell(words, sort=words)


def _of_run(key: str, column: Column, value: Callable[[AblationRun], object]) -> Measure:
    return Measure(key, column, lambda row: value(row.run))


def _slope(run: AblationRun) -> Cell | None:
    if run.rate is None or run.rate.slope is None:
        return None
    return Cell(wording.number(run.rate.slope), say.interval(run).strip(), run.rate.slope)


def _floor(run: AblationRun) -> Cell:
    met = say.floor_position(run)
    if met is None:
        return Cell("not reached", sort=float(len(run.trajectory)))
    return Cell(say.place(followed(run.trajectory)[met]), sort=float(met))


def _lowest(run: AblationRun) -> Cell | None:
    """The lowest consensus distance and where; at the floor, a note that it is rounding error."""
    low = say.lowest(run)
    if low is None:
        return None
    where = ROUNDING if say.floor_position(run) is not None else say.place(low[1])
    return Cell(wording.number(low[0]), where, low[0])


def _share(run: AblationRun) -> Cell | None:
    share = say.lowest_share(run)
    if share is None:
        return None
    where = "at every site" if share[0] == 1.0 else say.place(share[1])
    return Cell(wording.percent(share[0]), where, share[0])


def _elsewhere(record: AblationRecord, healthy: References) -> dict[str, str]:
    """What the figures of a run are in healthy models, which are whole."""
    consensus = say.healthy_consensus(record, healthy)
    ranks = healthy.of("trajectory.affine_rank")
    return {
        "consensus_distance": f"healthy {consensus}" if consensus else "",
        "affine_rank": f"healthy lowest {in_percent(*ranks.lows)}" if ranks else "",
    }


def rates_table(record: AblationRecord, key: str, healthy: References) -> Table:
    """One row per run: how its consensus distance falls."""
    return cells.table(
        key,
        "How fast the tokens converge",
        _naming(record),
        [
            _of_run("kind", Column("rate", numeric=False), lambda run: run.rate and run.rate.kind),
            _of_run("slope", Column("slope", "of ln r′ on ln r; 95 %"), _slope),
            _of_run("factor", Column("factor", "per block, on average"), lambda run: run.rate and run.rate.factor),
            _of_run("consensus_distance", Column("start"), say.start),
            _of_run("consensus_distance", Column("lowest"), _lowest),
            _of_run("floor", Column("rounding floor reached", "at"), _floor),
            _of_run("floor", Column("rounding floor"), lambda run: run.rate and run.rate.floor),
        ],
        _numbered(record),
        lambda row: slug("rate", row.number),
        references=_elsewhere(record, healthy),
    )


def quality_table(record: AblationRecord, key: str, healthy: References) -> Table:
    """One row per run: the collapse in both measures, and what happens to the model's output."""
    return cells.table(
        key,
        "Collapse and output side by side",
        _naming(record),
        [
            _of_run("affine_rank", Column("lowest affine rank", "of the attainable"), _share),
            _of_run("consensus_distance", Column("lowest consensus distance"), _lowest),
            _of_run("kind", Column("rate", numeric=False), lambda run: run.rate and run.rate.kind),
            _of_run("output_shift", Column("output shift", "1 − cosine"), lambda run: run.output_shift),
            _of_run("loss", Column("next-token loss", "nats"), lambda run: run.loss),
        ],
        _numbered(record),
        lambda row: slug("quality", row.number),
        references=_elsewhere(record, healthy),
    )


def contraction_table(record: AblationRecord, key: str) -> Table:
    """One row per block, one column per run: the ratio r′/r across the block, and what its attention alone leaves."""
    depths = [Along(i, site) for i, site in enumerate(followed(record.runs[0].trajectory)) if i]

    def ratio(run: AblationRun) -> Callable[[Along], Cell | None]:
        sites = followed(run.trajectory)

        def value(depth: Along) -> Cell | None:
            before, after = sites[depth.position - 1].consensus, sites[depth.position].consensus
            if before is None or after is None:
                return None
            if say.at_floor(run, depth.position - 1) or not before.mean:
                return Cell(ROUNDING, sort=None)
            figure = after.mean / before.mean
            most = "≤ " if say.at_floor(run, depth.position) else ""
            alive = attention_contraction(record, run, depth.site.block)
            words = wording.ABSENT if alive is None else wording.mean(alive)
            return Cell(f"{most}{wording.number(figure)}", f"attention {words}", figure)

        return value

    return cells.table(
        key,
        "How much of the consensus distance each block leaves, and how much its attention alone leaves",
        [(Column("block"), lambda depth: Cell(str(depth.site.block), sort=float(depth.position)))],
        [Measure("consensus_distance", _heading(run, record), ratio(run)) for run in record.runs],
        depths,
        lambda depth: slug("ratio", depth.site.stack, depth.site.block),
    )


def attention_contraction(record: AblationRecord, run: AblationRun, block: int | None) -> Statistic | None:
    """‖CAV‖/‖CV‖ of the block's self-attention; `None` if the list does not match the blocks."""
    if block is None or len(run.attention_contraction) != record.model.blocks:
        return None
    return run.attention_contraction[block]


def every_table(record: AblationRecord, key: str, healthy: References) -> Table:
    """One row per run and site, with every figure."""
    among = say.components(record)
    left_out = say.largest_norms_left_out(record)
    measures = [Measure(m.key, m.column, lambda at, m=m: m.value(at.site)) for m in TRAJECTORY]  # type: ignore[misc]
    if left_out:
        column = Column("consensus distance", "largest-norm tokens left out")
        measures.append(Measure("consensus_distance", column, lambda at: at.site.consensus))
    rows = [At(number, run, site) for number, run in enumerate(record.runs) for site in run.trajectory]
    if any(at.site.not_finite for at in rows):
        measures.append(Measure("not_finite", NOT_FINITE.column, lambda at: at.site.not_finite))
    order = {id(at): float(index) for index, at in enumerate(rows)}
    return cells.table(
        key,
        "Every run at every site",
        [
            (Column("run", say.key_to_marks(among), numeric=False), lambda at: _named(say.mark(at.run, among))),
            (Column("site", numeric=False), lambda at: Cell(wording.site_name(at.site), sort=order[id(at)])),
        ],
        measures,
        rows,
        lambda at: run_site_key(at.number, at.site),
        references=healthy.columns("trajectory"),
    )
