"""How an ablation is put into words and marks: shared by its page and its terminal form, so that both say the same.

What the runs show and how the predictions fared was decided where the model ran; here it is repeated. A value at the
rounding floor is said to be rounding wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.records.ablation import AblationRecord, AblationRun, VerdictRecord
from uncollapse.records.diagnosis import SiteRecord, followed
from uncollapse.report import wording
from uncollapse.report.wording import NAMES, listed

ALWAYS_MARKED = ("norm", "residual", "mlp")
MEASURES = {"affine_rank": "exact rank", "consensus_distance": "consensus distance"}
SIGNS = {"agrees": "✓", "disagrees": "✗", "open": "?"}
CAVEAT = "Removed from a trained model, which is not the same as trained without."
DIFFERENT_ANSWERS = (
    "The two measures answer differently: how many dimensions the tokens span is not how far apart they are."
)
CAUSAL = (
    "This model is causal and is judged by what causal masks do: the first token sees only itself and stays, the others come "
    "towards it geometrically, in the limit by a factor ½ a block; a full mask brings all together doubly exponentially."
)


@dataclass(frozen=True)
class Question:
    """One prediction and the run that answers it, in each measure it speaks about."""

    prediction: str
    source: str
    run: AblationRun
    verdicts: list[VerdictRecord]

    @property
    def divided(self) -> bool:
        """Whether one measure agrees and the other does not."""
        return {True, False} <= {verdict.agrees for verdict in self.verdicts}


def components(record: AblationRecord) -> list[str]:
    """What the marks speak about, in their order; beside norm, residual and MLP only what a run goes without."""
    named = [component for run in record.runs for component in run.without]
    return list(dict.fromkeys([*ALWAYS_MARKED, *(each for each in NAMES if each in named), *named]))


def mark(run: AblationRun, among: Sequence[str]) -> str:
    """A digit a component: 1 where it is there, 0 where it was taken away.

    >>> mark(AblationRun(["residual"], [], None, None, None, []), ["norm", "residual", "mlp"])
    '1·0·1'
    """
    return "·".join("0" if component in run.without else "1" for component in among)


def key_to_marks(among: Sequence[str]) -> str:
    """What the digits of a mark stand for.

    >>> key_to_marks(["norm", "residual", "mlp"])
    'norm·residual·MLP'
    """
    return "·".join(NAMES.get(component, component) for component in among)


def taken(run: AblationRun) -> str:
    """The components that were taken away.

    >>> taken(AblationRun(["norm", "residual", "mlp"], [], None, None, None, []))
    'norm, residual and MLP'
    """
    return listed(names(run)) or "nothing"


def names(run: AblationRun) -> list[str]:
    """The components that were taken away, one by one."""
    return [NAMES.get(component, component) for component in run.without]


def name(run: AblationRun) -> str:
    """The run in words.

    >>> name(AblationRun([], [], None, None, None, [])), name(AblationRun(["mlp"], [], None, None, None, []))
    ('whole model', 'without MLP')
    """
    return f"without {taken(run)}" if run.without else "whole model"


def floor_position(run: AblationRun) -> int | None:
    """Where along the followed sites the rounding floor is met, counted from the embedding; `None` where it is not."""
    if run.rate is None or run.rate.floor_block is None:
        return None
    values = [site.consensus for site in followed(run.trajectory)]
    return next((i for i, value in enumerate(values) if i and value and value.mean <= run.rate.floor), None)


def at_floor(run: AblationRun, position: int) -> bool:
    """Whether what was measured here is rounding and no level."""
    met = floor_position(run)
    return met is not None and position >= met


def floor_words(run: AblationRun) -> str:
    """Where the rounding floor is met; empty where it is not."""
    met = floor_position(run)
    return "" if met is None else f"rounding floor from {place(followed(run.trajectory)[met])} on"


def place(site: SiteRecord) -> str:
    """The site, without the stack where it is the only one that is followed."""
    return wording.site_name(site, with_stack=False)


def lowest(run: AblationRun) -> tuple[float, SiteRecord] | None:
    """The smallest mean consensus distance along depth, and where."""
    seen = [(site.consensus.mean, site) for site in followed(run.trajectory) if site.consensus is not None]
    return min(seen, key=lambda pair: pair[0]) if seen else None


def start(run: AblationRun) -> float | None:
    """The consensus distance of what enters the first block."""
    first = followed(run.trajectory)[0].consensus if run.trajectory else None
    return None if first is None else first.mean


def lowest_share(run: AblationRun) -> tuple[float, SiteRecord] | None:
    """The smallest share of the attainable affine rank along depth, and where."""
    return wording.lowest_rank_share(followed(run.trajectory))


def collapses(run: AblationRun) -> bool:
    """Whether the consensus distance was found to fall."""
    return run.rate is not None and run.rate.kind != "none"


def rate_figure(run: AblationRun) -> str:
    """The figure that belongs to the kind of rate; empty where nothing falls."""
    rate = run.rate
    if rate is None or rate.kind == "none":
        return ""
    if rate.kind == "geometric":
        return f"×{wording.number(rate.factor, 2)} a block"
    if rate.slope is None:
        return "too few for a slope"
    return f"slope {wording.number(rate.slope, 2)}{interval(run)}"


def interval(run: AblationRun) -> str:
    """The slope's 95 % interval in brackets; empty where there are too few points for one."""
    rate = run.rate
    if rate is None or rate.slope_low is None or rate.slope_high is None:
        return ""
    return f" [{wording.number(rate.slope_low, 2)}, {wording.number(rate.slope_high, 2)}]"


def rate(run: AblationRun) -> str:
    """How the consensus distance falls, in words."""
    if run.rate is None:
        return wording.ABSENT
    return ", ".join(filter(None, [run.rate.kind, rate_figure(run)]))


def answer(verdict: VerdictRecord) -> str:
    """Whether the model does what was predicted."""
    return {True: "agrees", False: "disagrees", None: "open"}[verdict.agrees]


def questions(record: AblationRecord) -> list[Question]:
    """The verdicts, those of one prediction and one run together."""
    runs = {frozenset(run.without): run for run in record.runs}
    found: dict[tuple[str, str, frozenset[str]], list[VerdictRecord]] = {}
    for verdict in record.verdicts:
        found.setdefault((verdict.prediction, verdict.source, frozenset(verdict.without)), []).append(verdict)
    return [Question(what, source, runs[without], group) for (what, source, without), group in found.items()]


def headline(record: AblationRecord) -> str:
    """What the runs show, in a sentence or two: which components alone, or which combinations, let the tokens collapse."""
    whole, *others = record.runs
    before = (
        f"The whole model’s tokens collapse already ({whole.rate.kind}). " if whole.rate and collapses(whole) else ""
    )
    rated = [run for run in others if run.rate is not None]
    alone = [run for run in rated if len(run.without) == 1]
    compared = alone or rated
    fall, stay = [run for run in compared if collapses(run)], [run for run in compared if not collapses(run)]
    if not compared:
        return f"{before}No run without a component could be followed along depth."
    only = " alone" if alone else ""
    parts = []
    if fall:
        kinds = listed(list(dict.fromkeys(run.rate.kind for run in fall if run.rate)), "or")
        parts.append(
            f"Taking away {listed([taken(run) for run in fall], 'or')}{only} makes the tokens collapse ({kinds})"
        )
    if stay:
        words = f"aking away {listed([taken(run) for run in stay], 'or')}{only} does not"
        parts.append(f"t{words}" if fall else f"T{words} make the tokens collapse")
    return f"{before}{'; '.join(parts)}."


def summary(record: AblationRecord) -> list[str]:
    """Each run in a line: where the consensus distance goes, how, and the lowest share of the attainable affine rank."""
    among = components(record)
    sentences = []
    for run in record.runs:
        low, share = lowest(run), lowest_share(run)
        if low is None:
            continue
        met = floor_position(run)
        end = f"the {floor_words(run)}" if met is not None else f"{wording.number(low[0], 2)} at {place(low[1])}"
        fall = rate(run) if collapses(run) else "no collapse" if run.rate is not None else "not followed"
        words = f"{mark(run, among)} {name(run)}: {wording.number(start(run), 2)} → {end}, {fall}"
        if share is not None:
            words += f"; affine rank {wording.percent(share[0])}"
        sentences.append(f"{words}.")
    return sentences


def scope(record: AblationRecord) -> str:
    """In which blocks the components were taken away."""
    if len(record.blocks) == record.model.blocks:
        return "Taken away in every block."
    runs: list[list[int]] = []
    for block in record.blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    words = listed([f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs])
    return f"Taken away in {'block' if len(record.blocks) == 1 else 'blocks'} {words} only."


def answers_in_words(record: AblationRecord) -> str:
    """How many verdicts agree, disagree or stay open."""
    given = [answer(verdict) for verdict in record.verdicts]
    return ", ".join(
        f"{given.count(kind)} {word}"
        for kind, word in (("agrees", "agree"), ("disagrees", "disagree"), ("open", "open"))
        if kind in given
    )


def largest_norms_left_out(record: AblationRecord) -> bool:
    """Whether a collapse was judged without the tokens of enormous norm, and that changes a figure in print."""
    return any(
        wording.mean(site.consensus) != wording.mean(site.consensus_distance)
        for run in record.runs
        for site in followed(run.trajectory)
    )
