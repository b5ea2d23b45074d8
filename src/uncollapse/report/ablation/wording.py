"""How an ablation is put into words and marks, shared by the page and the terminal so that both say the same.

What the runs show and how the predictions fared was decided when the model ran; here it is only repeated. Wherever a value
at the rounding floor is shown, it is marked as rounding error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.records.ablation import AblationRecord, AblationRun, VerdictRecord
from uncollapse.records.diagnosis import SiteRecord, followed
from uncollapse.report import wording
from uncollapse.report.healthy import References
from uncollapse.report.wording import NAMES, listed, number

ALWAYS_MARKED = ("norm", "residual", "mlp")
MEASURES = {"affine_rank": "exact rank", "consensus_distance": "consensus distance"}
SIGNS = {"agrees": "✓", "disagrees": "✗", "open": "?"}
KINDS = {"open": "rate open"}
CAVEAT = "Removing a part from a trained model is not the same as training without it."
DIFFERENT_ANSWERS = (
    "The two measures disagree. One counts the dimensions that the tokens span, the other says how far apart they are."
)
CAUSAL = (
    "This model has a causal mask, so it is compared with theory for causal masks. The first token sees only itself and does "
    "not move. The others approach it geometrically, in the limit by a factor of ½ per block. Under a full mask all tokens would "
    "converge doubly exponentially."
)


def positions_sentence(record: AblationRecord) -> str:
    """What a causal mask, or positions in the logits, change about the predicted rate; empty where they change nothing."""
    if record.is_causal:
        return CAUSAL
    kept = max(record.contraction_at_consensus or [0.0])
    predicted = [
        v.predicted for v in record.verdicts if v.without == ["residual"] and v.measure == "consensus_distance"
    ]
    if "falls doubly exponentially" in predicted or not predicted or not kept:
        return ""
    return (
        "Positions act on the logits of this model: with all tokens made equal, attention still tells keys apart (‖CA‖ up to "
        f"{number(kept)}). Without residual connections its tokens converge geometrically in the end, at a rate that depends on "
        "this pattern and on the values. Without such positions they would converge doubly exponentially."
    )


@dataclass(frozen=True)
class Question:
    """One prediction and the run that tests it, in each measure that it is about."""

    prediction: str
    source: str
    run: AblationRun
    verdicts: list[VerdictRecord]

    @property
    def divided(self) -> bool:
        """Whether the prediction holds in one measure and fails in the other."""
        return {True, False} <= {verdict.agrees for verdict in self.verdicts}


def components(record: AblationRecord) -> list[str]:
    """The components that marks have a digit for, in order: norm, residual, MLP, and whatever else a run removes."""
    named = [component for run in record.runs for component in run.without]
    return list(dict.fromkeys([*ALWAYS_MARKED, *(each for each in NAMES if each in named), *named]))


def mark(run: AblationRun, among: Sequence[str]) -> str:
    """One digit per component: 1 means present, 0 removed.

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
    """The components that were removed.

    >>> taken(AblationRun(["norm", "residual", "mlp"], [], None, None, None, []))
    'norm, residual and MLP'
    """
    return listed(names(run)) or "nothing"


def names(run: AblationRun) -> list[str]:
    """The components that were removed, as a list."""
    return [NAMES.get(component, component) for component in run.without]


def name(run: AblationRun) -> str:
    """The run in words.

    >>> name(AblationRun([], [], None, None, None, [])), name(AblationRun(["mlp"], [], None, None, None, []))
    ('whole model', 'without MLP')
    """
    return f"without {taken(run)}" if run.without else "whole model"


def floor_position(run: AblationRun) -> int | None:
    """Where along the followed sites the rounding floor is reached, counted from the embedding; `None` if it is not."""
    if run.rate is None or run.rate.floor_block is None:
        return None
    values = [site.consensus for site in followed(run.trajectory)]
    return next((i for i, value in enumerate(values) if i and value and value.mean <= run.rate.floor), None)


def at_floor(run: AblationRun, position: int) -> bool:
    """Whether the value measured here is rounding error."""
    met = floor_position(run)
    return met is not None and position >= met


def floor_words(run: AblationRun) -> str:
    """Where the rounding floor is reached; empty if it is not."""
    met = floor_position(run)
    return "" if met is None else f"rounding floor from {place(followed(run.trajectory)[met])}"


def place(site: SiteRecord) -> str:
    """The site, without its stack: only one stack is followed."""
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
    """The figure that goes with the kind of rate; empty if nothing falls."""
    rate = run.rate
    if rate is None or rate.kind == "none":
        return ""
    if rate.kind == "geometric":
        return f"×{wording.number(rate.factor, 2)} per block{_between(rate.factor_low, rate.factor_high)}"
    if rate.slope is None:
        return "too few points"
    return f"slope {wording.number(rate.slope, 2)}{interval(run)}"


def interval(run: AblationRun) -> str:
    """The 95 % interval of the slope in brackets; empty if there are too few points."""
    rate = run.rate
    return "" if rate is None else _between(rate.slope_low, rate.slope_high)


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{wording.number(low, 2)}, {wording.number(high, 2)}]"


def rate(run: AblationRun) -> str:
    """How the consensus distance falls, in words."""
    if run.rate is None:
        return wording.ABSENT
    return ", ".join(filter(None, [KINDS.get(run.rate.kind, run.rate.kind), rate_figure(run)]))


def answer(verdict: VerdictRecord) -> str:
    """Whether the model does what was predicted."""
    return {True: "agrees", False: "disagrees", None: "open"}[verdict.agrees]


def questions(record: AblationRecord) -> list[Question]:
    """The verdicts, grouped by prediction and run."""
    runs = {frozenset(run.without): run for run in record.runs}
    found: dict[tuple[str, str, frozenset[str]], list[VerdictRecord]] = {}
    for verdict in record.verdicts:
        found.setdefault((verdict.prediction, verdict.source, frozenset(verdict.without)), []).append(verdict)
    return [Question(what, source, runs[without], group) for (what, source, without), group in found.items()]


def headline(record: AblationRecord) -> str:
    """What the runs show, in a sentence or two: which components make the tokens collapse when removed, alone or together."""
    whole, *others = record.runs
    fast = "" if whole.rate is None else KINDS.get(whole.rate.kind, whole.rate.kind)
    before = f"The tokens collapse even in the whole model ({fast}). " if collapses(whole) else ""
    rated = [run for run in others if run.rate is not None]
    alone = [run for run in rated if len(run.without) == 1]
    compared = alone or rated
    fall, stay = [run for run in compared if collapses(run)], [run for run in compared if not collapses(run)]
    if not compared:
        return f"{before}None of the runs without a component could be followed along depth."
    only = " alone" if alone else ""
    parts = []
    if fall:
        rates = dict.fromkeys(KINDS.get(run.rate.kind, run.rate.kind) for run in fall if run.rate)
        kinds = listed(list(rates), "or")
        parts.append(f"Removing {listed([taken(run) for run in fall], 'or')}{only} makes the tokens collapse ({kinds})")
    if stay:
        words = f"emoving {listed([taken(run) for run in stay], 'or')}{only} does not"
        parts.append(f"r{words}" if fall else f"R{words} make the tokens collapse")
    return f"{before}{'; '.join(parts)}."


def summary(record: AblationRecord) -> list[str]:
    """One line per run: where the consensus distance goes, how it falls, and the lowest share of the attainable affine rank."""
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
    """The blocks in which components were removed, and the combinations that could not be run."""
    words = _blocks(record)
    for combination, reason in record.probe.options.get("left_out", {}).items():
        words += f" Not run: without {combination} ({reason.rstrip('.')})."
    return words


def _blocks(record: AblationRecord) -> str:
    if len(record.blocks) == record.model.blocks:
        return "Components were removed in every block."
    runs: list[list[int]] = []
    for block in record.blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    words = listed([f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs])
    return f"Components were removed in {'block' if len(record.blocks) == 1 else 'blocks'} {words} only."


def answers_in_words(record: AblationRecord) -> str:
    """How many verdicts agree, disagree or are open."""
    given = [answer(verdict) for verdict in record.verdicts]
    return ", ".join(
        f"{given.count(kind)} {word}"
        for kind, word in (("agrees", "agree"), ("disagrees", "disagree"), ("open", "open"))
        if kind in given
    )


def healthy_consensus(record: AblationRecord, healthy: References) -> str:
    """What the consensus distance is in healthy models; without the tokens of enormous norm if it is judged without them here."""
    part = "left_out" if largest_norms_left_out(record) else "trajectory"
    return healthy.words(f"{part}.consensus_distance")


def largest_norms_left_out(record: AblationRecord) -> bool:
    """Whether the collapse was judged without the tokens of enormous norm, and a printed figure differs because of it."""
    return any(
        wording.mean(site.consensus) != wording.mean(site.consensus_distance)
        for run in record.runs
        for site in followed(run.trajectory)
    )
