"""How a sweep is put into words: how far it got, and at which checkpoint each kind of finding appears first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.records.common import Finding
from uncollapse.records.sweep import SweepRecord, SweptCheckpoint, SweptFigure, SweptRun
from uncollapse.report import wording

# Every measure, and what it is called. Of the first ones a curve is drawn first.
TITLES = {
    "consensus_after_norm": "Consensus distance after normalisation",
    "rest_entropy": "Normalised entropy without the strongest key",
    "max_logit": "Largest logit",
    "effective_rank": "Effective rank",
    "consensus_distance": "Consensus distance",
    "affine_rank_share": "Share of the attainable affine rank",
    "stream_carried": "Share of the stream carried on",
    "normalized_entropy": "Normalised entropy",
    "key_share": "Share of keys used",
    "value_contraction": "Value contraction",
    "not_finite": "Sequences with NaN or infinity",
}
OF_HEADS = ("rest_entropy", "max_logit", "normalized_entropy", "key_share", "value_contraction")


@dataclass(frozen=True)
class First:
    """A kind of finding in a run: the first checkpoint that has it (`index` in the run), the worst such finding there, and how
    many of the `among` checkpoints that were measured have it."""

    run: SweptRun
    index: int
    finding: Finding
    having: int
    among: int

    @property
    def checkpoint(self) -> SweptCheckpoint:
        """The first one that has it."""
        return self.run.checkpoints[self.index]


def firsts(record: SweepRecord) -> list[First]:
    """The first finding of each kind in each run, in the order in which they appear; worst first at one checkpoint."""
    found = []
    for run in record.runs:
        seen: dict[str, list[int]] = {}
        for index, checkpoint in enumerate(run.checkpoints):
            for code in dict.fromkeys(finding.code for finding in checkpoint.findings):
                seen.setdefault(code, []).append(index)
        measured = sum(checkpoint.failure is None for checkpoint in run.checkpoints)
        of_run = []
        for code, having in seen.items():
            there = [finding for finding in run.checkpoints[having[0]].findings if finding.code == code]
            of_run.append(First(run, having[0], wording.worst_first(there)[0], len(having), measured))
        order = {id(each.finding): place for place, each in enumerate(of_run)}
        worst = [id(f) for f in wording.worst_first(each.finding for each in of_run)]
        found += sorted(of_run, key=lambda each: (each.index, worst.index(id(each.finding)), order[id(each.finding)]))
    return found


def headline(record: SweepRecord) -> str:
    """The sweep in one sentence."""
    several = wording.count(len(record.checkpoints), "checkpoint")
    failed = sum(checkpoint.failure is not None for checkpoint in record.checkpoints)
    failing = f", {failed} of which could not be measured" if failed else ""
    serious = [each for each in firsts(record) if each.finding.severity != "info"]
    if not serious:
        nothing = (
            "No warning in any that was measured." if failed < len(record.checkpoints) else "Nothing could be judged."
        )
        return f"{several}{failing}. {nothing}"
    first = serious[0]
    return (
        f"{several}{failing}. The first warning: {first.finding.code} at {name(first.checkpoint)}, "
        f"{wording.finding_place(first.finding)}."
    )


def name(checkpoint: SweptCheckpoint) -> str:
    """What a checkpoint is called in running text."""
    return checkpoint.name if checkpoint.step is None else f"step {checkpoint.step:,}"


def short_names(run: SweptRun) -> list[str]:
    """What the checkpoints of a run are called on an axis: their steps, or the last part of their names."""
    return [
        f"{each.step:,}" if each.step is not None else each.name.rstrip("/").rpartition("/")[2]
        for each in run.checkpoints
    ]


def place(figure: SweptFigure) -> str:
    """Where the worst figure was."""
    if figure.block is None:
        return f"{figure.stack} embedding" if figure.stack else "embedding"
    return wording.place(block=figure.block, head=figure.head, stack=figure.stack, kind=figure.kind)


def extent(each: First) -> str:
    """In how many checkpoints it was found."""
    return f"in {each.having} of {wording.count(each.among, 'checkpoint')}"


def measures(runs: Sequence[SweptRun]) -> list[str]:
    """The measures that some checkpoint has, in the order of the page. Sequences that are not finite only where there are some."""
    there = {
        measure
        for run in runs
        for checkpoint in run.checkpoints
        for measure, figure in checkpoint.figures.items()
        if measure != "not_finite" or figure.worst
    }
    return [measure for measure in TITLES if measure in there]
