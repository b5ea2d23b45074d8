"""docs/early-warning.md and its picture, from finished runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import altair as alt

from studies.early_warning.runs import EVERY, OTHERS, PROBED, SCENARIOS, Alarm, NormRule, Run, Scenario, SpikeRule
from studies.pictures import BLUE, ORANGE, RED, saved
from uncollapse.judgement.findings import CONSENSUS
from uncollapse.report import wording

SMOOTHED, ABOVE = 10, 0.15  # steps, nats
# The rules of the alarms were chosen and mended with the seeds up to this one in sight; the others are counted.
CHOSEN_ON = 31
SEEDS = 10
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
PICTURED = "post-norm, 18 blocks, no warm-up"


def shown_by_the_loss(run: Run, twin: Run) -> int | None:
    """From which step on the smoothed loss stays `ABOVE` that of the healthy twin: what nobody can see without the twin."""
    steps = range(SMOOTHED, min(len(run.losses), len(twin.losses)))
    worse = [_smoothed(run, s) > _smoothed(twin, s) + ABOVE for s in steps]
    stays = next((i for i in range(len(worse)) if all(worse[i:])), None)
    return None if stays is None else steps[stays]


def _smoothed(run: Run, step: int) -> float:
    return statistics.fmean(run.losses[step - SMOOTHED : step])


def first_alarm(run: Run, scenario: Scenario) -> Alarm | None:
    """The first alarm about what the run fails of, not before its fault begins."""
    return next((a for a in run.alarms if a[3] == scenario.phenomenon and a[0] >= scenario.begins), None)


@dataclass(frozen=True)
class Judged:
    """A failing run: the first alarm about what it fails of, and the step from which the loss shows it. `has_twin`: whether its
    healthy twin was run."""

    run: Run
    scenario: Scenario
    alarm: Alarm | None
    loss: int | None
    has_twin: bool

    def lead(self, step: int | None) -> int | None:
        """How many steps before the loss shows it."""
        return None if step is None or self.loss is None else self.loss - step

    @property
    def first_of_all(self) -> Alarm | None:
        """The first alarm since the fault began, whatever it is about."""
        return next((a for a in self.run.alarms if a[0] >= self.scenario.begins), None)


def judged(runs: Sequence[Run]) -> list[Judged]:
    """The failing runs, each beside its twin."""
    by_run = {(run.scenario, run.seed): run for run in runs}
    found = []
    for run in runs:
        scenario = BY_NAME[run.scenario]
        if scenario.phenomenon:
            twin = by_run.get((scenario.twin, run.seed))
            loss = None if twin is None else shown_by_the_loss(run, twin)
            found.append(Judged(run, scenario, first_alarm(run, scenario), loss, twin is not None))
    return found


def document(runs: Sequence[Run]) -> str:
    """The report."""
    failing = judged(runs)
    healthy = [run for run in runs if not BY_NAME[run.scenario].phenomenon]
    scored = [each for each in failing if each.run.seed > CHOSEN_ON]
    scored_healthy = [run for run in healthy if run.seed > CHOSEN_ON]
    looked_at = [each for each in failing if each.run.seed <= CHOSEN_ON]
    looked_at_healthy = [run for run in healthy if run.seed <= CHOSEN_ON]
    shown = [each for each in scored if each.loss is not None]
    leads = [lead for each in shown if each.alarm and (lead := each.lead(each.alarm[0])) is not None]
    first = sum(each.first_of_all is not None and each.first_of_all[3] == each.scenario.phenomenon for each in scored)
    alarmed = [run for run in scored_healthy if run.alarms]
    seeds = sorted({each.run.seed for each in scored})
    compared, compared_healthy = scored, scored_healthy
    if not all(run.others for run in (*scored_healthy, *(each.run for each in scored))):
        compared = [each for each in failing if each.run.others]
        compared_healthy = [run for run in healthy if run.others]
    lines = [
        "# How early a monitor warns",
        "",
        "Small language models (4 to 18 blocks of width 32 or 48) learn Python's own documentation letter by letter. Some are",
        "trained so that they fail, the others are their healthy twins with the same seeds and batches. `make early-warning`",
        f"writes this page. The monitor looks every {EVERY} steps at {PROBED} held-out sequences, with its defaults.",
        "",
        f"Seeds 0 to {CHOSEN_ON} were looked at while the rules of the alarms were chosen and mended. What follows counts only the",
        f"{wording.count(len(seeds), 'seed')} that had no part in it ({_range(seeds)}): {len(scored)} failing and",
        f"{len(scored_healthy)} healthy runs.",
        "",
        f"* **Found**, with the right phenomenon: {_of(sum(each.alarm is not None for each in scored), len(scored))} failing runs.",
        f"  In {first} of them the first alarm of all names it.",
        f"* **Before the loss shows it**: {_of(sum(lead > 0 for lead in leads), len(shown))} runs whose loss shows it at all.",
        f"  Lead: {_spread(leads, 'steps')}.",
        f"* **Alarms on healthy runs**: {_of(len(alarmed), len(scored_healthy))} runs.",
        f"* On the seeds that were looked at: {_of(sum(e.alarm is not None for e in looked_at), len(looked_at))} found, alarms on",
        f"  {_of(sum(bool(run.alarms) for run in looked_at_healthy), len(looked_at_healthy))} healthy runs.",
        "",
        f"“The loss shows it” is generous to the loss: from that step on, its mean over {SMOOTHED} steps stays {ABOVE} nats above",
        "that of the healthy twin. Nobody has the twin in practice.",
        "",
        "## Failing runs",
        "",
        "| run | seeds | found | first alarm, step | against | the loss shows it, step | lead, steps | right block |",
        "|---|---|---|---|---|---|---|---|",
        *(_failing_row(name, [e for e in scored if e.scenario.name == name]) for name in _names(scored)),
        "",
        "Steps are medians, with the smallest and the largest in brackets. The block can be right only where the fault was planted",
        "in one.",
        "",
        *_exceptions(scored),
        f"![Loss and consensus distance of the {PICTURED} run](images/early-warning.svg)",
        "",
        *MENDED,
        "## Beside other rules",
        "",
        *(
            []
            if compared == scored
            else [
                f"The other rules ran on {wording.count(len(compared), 'failing run')} and {len(compared_healthy)} healthy ones "
                f"(seeds {_range(sorted({e.run.seed for e in compared}))}).",
                "",
            ]
        ),
        "| rule | speaks in failing runs | before the loss shows it | lead, steps | speaks in healthy runs |",
        "|---|---|---|---|---|",
        _rule_row(
            "this monitor", scored, [e.alarm[0] if e.alarm else None for e in scored], len(alarmed), scored_healthy
        ),
        *(
            _rule_row(
                RULES[name],
                compared,
                [each.run.others[name] for each in compared],
                sum(run.others[name] is not None for run in compared_healthy),
                compared_healthy,
            )
            for name in OTHERS
        ),
        "",
        "Of this monitor only alarms with the right phenomenon count as speaking in a failing run; the other rules name none, so",
        "whatever they say from the fault on counts. Every rule runs with its own defaults.",
        *_suspects(compared),
        "",
        "## Healthy runs",
        "",
        "| run | seeds | runs with an alarm | deepest consensus distance on the way | last loss |",
        "|---|---|---|---|---|",
        *(
            _healthy_row(name, [r for r in healthy if r.scenario == name])
            for name in dict.fromkeys(r.scenario for r in healthy)
        ),
        "",
        "All seeds are in this table. While they learn how often each letter occurs, healthy models come as near to a collapse as",
        f"it says. Their tokens part again. The threshold alone ({CONSENSUS}) would raise an alarm wherever the distance is below.",
        "",
        "In “residual decays, 4 blocks” every residual connection keeps 2 % less of the stream at every step from step 80 on. The",
        "model adapts: its loss suffers, its tokens stay apart. It is counted as healthy here, for there is no collapse to find.",
        "",
        *MISSING,
        *(
            []
            if len(seeds) >= SEEDS
            else ["", f"{SEEDS} seeds are meant to be counted, {len(seeds)} have been run so far."]
        ),
        "",
    ]
    return "\n".join(lines)


RULES = {
    "loss spike": f"loss {SpikeRule.SIGMAS:.0f} deviations above its last {SpikeRule.WINDOW}",
    "gradient norm": f"gradient norm {NormRule.FACTOR:.0f} times its median of {NormRule.WINDOW}",
    "trainscope": "`trainscope` 1.8.1, CUSUM of the loss, upwards",
    "arc-vigil": "`arc-vigil` 1.0.0",
}
MENDED = (
    "## False alarms, and what was mended",
    "",
    "With the first rules, 8 of 41 healthy runs (seeds 2, 3 and 7 to 10) raised an alarm. All were about heads that still",
    "learn:",
    "",
    "* `WIDTH-UNIFORM`, in 6 runs. Attention that begins uniform leaves that, and falls back for up to 34 looks while the",
    "  loss goes on falling. In two of these runs a lower threshold was enough (below). Attention that began uniform now has",
    "  to stay away from it for 40 looks before a fall back is an alarm, unless it loses everything.",
    "* `BASELINE-ENTROPY`, in 2 runs. A head that used nearly all of its keys alike began to choose among them, and its",
    "  entropy fell within three looks. It is now judged once it has chosen for eight looks.",
    "* `BASELINE-LOGIT-SCALE`, in 2 runs. The product of the query and key weights grew, and the logits were no larger than",
    "  they had been before. It now speaks only where the logits are not measured.",
    "* A trend of `ENTROPY-FROZEN`, in 1 run. At 1.9 times the threshold it was said to be reached in about 100 steps, and",
    "  the fall slowed down and turned. A trend is now extrapolated no farther than it was watched (55 steps here), and must",
    "  last two looks.",
    "",
    "Seed 11 was the first to judge this, and of its two healthy runs one raised a `BASELINE-ENTROPY`: a head became as sharp",
    "as it had been 80 steps before. Beside its own history a head must now be beyond all it ever was. Seed 11 counts as",
    "looked at.",
    "",
    "On the seeds that were looked at, the mended rules raise none of these alarms. What they find is found as before or",
    "later: “no weight decay” after 125 steps instead of 120, “logits grow” after 190 instead of 170 (medians). Where",
    "residual connections decay from one block on, the alarm named it in 1 of 5 runs, and in 5 of 5 since the stream is",
    "compared with the run's own past.",
    "",
    "On seeds 12 to 14 the first rules raise alarms on 3 of 24 healthy runs, the mended ones on none. The price is one late",
    "alarm: “bfloat16 rounded away from zero”, seed 12, was on its way to the threshold at step 880, 7 steps before the loss",
    "showed it, and is now said to be at step 920. All others are found within 5 steps of the first rules' alarm, but for",
    "seed 14 of that scenario: there the first rules spoke at step 140, of a head that began to choose.",
    "",
    "Seeds 12 to 21 were then the first ten to judge the mended rules: 79 of 80 failing runs found, and one of 80 healthy runs",
    "with an alarm. In “residual decays, 4 blocks”, seed 17, a block attended selectively for five looks and uniformly for the",
    "next 41, while the loss went on falling. Such a block had been an alarm after 40 looks without getting better. It no longer",
    "is, and these seeds count as looked at, too. What was missed is “queries and keys shrink”, seed 15: training made up for",
    "the shrinking, and the attention stayed this side of the threshold.",
    "",
    "Seeds 22 to 31 were the next ten: 78 of 80 failing runs found, 41 of 48 before the loss showed it, and three of 80 healthy",
    "runs with an alarm. All three were “weight decay 0.1”, which learns at 1.5e-2: a head that is sharp for a while, or one of",
    "rank one. Six of the seven that were late or not found were the rounding fault. Trends are now followed over a second,",
    "longer window, a rise that slows down is none, and a trend must last three looks, a warning two in a row. Of the three",
    "false alarms seed 29 stays: its heads freeze for 17 looks and thaw after about 400 steps. Its last loss is the largest of",
    "ten.",
    "These seeds count as looked at, too. The rules were frozen after that, and seeds 32 to 41 had no part in them.",
    "",
)
MISSING = (
    "## What is missing",
    "",
    "**The aims were 95 % found, 90 % of them before the loss shows it, twice the lead of the best other rule, no false alarm.**",
    "On seeds 32 to 41 they are met. None in 80 does not mean none ever: with 95 % confidence the rate is below 4 %, and of the",
    "27 healthy runs at 1.5e-2 before, one froze heads for a while, which no rule tells from a failure.",
    "",
    "The models are small and the runs short. The rules of the alarms were chosen and mended on other seeds of these very",
    "kinds of runs; runs of another kind may need others. A trend of `CORPUS-DIMENSIONS` was a false alarm on seed 2, and",
    "that rule has none since.",
    "",
    "The runs on seeds that were looked at stand in these tables as the rules of their time judged them. Some fifty of them were",
    "judged again by the rules of today. Of the false alarms of seeds 24, 29 and 31 only that of seed 29 is left.",
    "",
    "“Queries and keys shrink” was first planted at step 200, when attention in that block had hardly left the uniform it",
    "began with. It was then found in 2 of 4 runs. A block that never attends to anything raises no alarm.",
    "",
    "The rounding fault is one of storage: the query and key weights are kept in bfloat16, and each step rounds them away",
    "from zero. The published fault, a fused kernel whose result is rounded with a bias (arXiv 2510.04212), takes thousands",
    "of steps. In one run of such a kernel nothing failed within 300 steps, not even with one bit left of each result. It is",
    "not counted.",
    "",
    "A residual scale that begins to decay once the model has learnt (at step 160 of 320, in one run) costs loss, and the",
    "tokens stay apart. It is not counted either.",
)


def _names(failing: Sequence[Judged]) -> list[str]:
    return list(dict.fromkeys(each.scenario.name for each in failing))


def _failing_row(name: str, runs: Sequence[Judged]) -> str:
    found = [each for each in runs if each.alarm is not None]
    steps = [each.alarm[0] for each in found if each.alarm]
    losses = [each.loss for each in runs if each.loss is not None]
    leads = [lead for each in found if each.alarm and (lead := each.lead(each.alarm[0])) is not None]
    against = Counter(each.alarm[5] for each in found if each.alarm)
    planted = runs[0].scenario.planted
    right = "–"
    if planted is not None:
        right = _of(sum(each.alarm[4] == planted for each in found if each.alarm), len(found))
    shown = "no twin was run" if not any(e.has_twin for e in runs) else _spread(losses, absent="not within the run")
    if losses and len(losses) < len(runs):
        shown += f", in {len(losses)} of {len(runs)}"
    said = ", ".join(f"{kind} {count}" for kind, count in against.most_common())
    cells = [name, len(runs), len(found), _spread(steps), said or "–", shown, _spread(leads), right]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _exceptions(scored: Sequence[Judged]) -> list[str]:
    """The runs that were not found, or found after the loss showed it, one by one."""
    missed = [f"{e.scenario.name}, seed {e.run.seed}" for e in scored if e.alarm is None]
    late = [
        f"{e.scenario.name}, seed {e.run.seed} (loss {e.loss}, alarm {e.alarm[0]})"
        for e in scored
        if e.alarm and e.loss is not None and e.loss <= e.alarm[0]
    ]
    lines = []
    for words, runs in (("Not found", missed), ("Found after the loss showed it", late)):
        if runs:
            lines += [f"{words}: {'; '.join(runs)}.", ""]
    return lines


def _rule_row(
    name: str, runs: Sequence[Judged], steps: Sequence[int | None], false: int, healthy: Sequence[Run]
) -> str:
    shown = [(each, step) for each, step in zip(runs, steps, strict=True) if each.loss is not None]
    leads = [lead for each, step in shown if (lead := each.lead(step)) is not None]
    cells = [
        name,
        _of(sum(step is not None for step in steps), len(steps)),
        _of(sum(lead > 0 for lead in leads), len(shown)),
        _spread(leads),
        _of(false, len(healthy)),
    ]
    return f"| {' | '.join(cells)} |"


def _suspects(scored: Sequence[Judged]) -> list[str]:
    """How often arc-vigil named the block that a fault was planted in."""
    planted = [each for each in scored if each.scenario.planted is not None and each.run.suspect is not None]
    right = sum(each.run.suspect == f"blocks.{each.scenario.planted}" for each in planted)
    named = f"Where a fault was planted in one block, `arc-vigil` named that block in {_of(right, len(planted))} runs."
    return [
        *([named] if planted else []),
        "Called as its page says, `arc-vigil` sees no gradients, for they are set to nothing by then. What speaks is the curvature",
        "of the weights' path.",
    ]


def _healthy_row(name: str, runs: Sequence[Run]) -> str:
    said = [f"{a[2]} at {a[0]} (seed {run.seed})" for run in runs for a in run.alarms]
    deepest = min(value for run in runs for step, value in run.consensus if step)
    last = statistics.fmean(_smoothed(run, len(run.losses)) for run in runs)
    count = sum(bool(run.alarms) for run in runs)
    alarms = f"{count}: {', '.join(said)}" if said else "none"
    return f"| {name} | {len(runs)} | {alarms} | {deepest:.3f} | {last:.2f} |"


def _of(some: int, all_: int) -> str:
    return f"{some} of {all_}"


def _range(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none yet"


def _spread(values: Sequence[int], unit: str = "", *, absent: str = "–") -> str:
    """The median, with the smallest and the largest."""
    if not values:
        return absent
    words = f"{statistics.median(values):.0f}{f' {unit}' if unit else ''}"
    return words if len(values) == 1 else f"{words} ({min(values)} to {max(values)})"


def picture(runs: Sequence[Run], path: Path) -> None:
    """The loss of one run and the consensus distance of its worst block, with the first alarm; beside its healthy twin."""
    run = next(r for r in runs if r.scenario == PICTURED)
    twin = next(r for r in runs if r.scenario == BY_NAME[PICTURED].twin and r.seed == run.seed)
    names = {"post-norm": run, "pre-norm twin": twin}
    color = alt.Color(
        "model:N",
        title=None,
        scale=alt.Scale(domain=list(names), range=[ORANGE, BLUE]),
        legend=alt.Legend(orient="top"),
    )
    losses = [
        {"step": step, "y": statistics.fmean(r.losses[max(0, step - 4) : step + 1]), "model": name}
        for name, r in names.items()
        for step in range(len(r.losses))
    ]
    distances = [
        {"step": step, "y": max(value, 1e-5), "model": name} for name, r in names.items() for step, value in r.consensus
    ]
    first = run.alarms[0]
    mark = alt.Chart(alt.Data(values=[{"step": first[0], "words": f"alarm at step {first[0]}: {first[2]}"}]))
    rule = mark.mark_rule(color=RED, strokeWidth=1.5).encode(x="step:Q")
    words = mark.mark_text(align="left", dx=6, color=RED, fontSize=12).encode(
        x="step:Q", text="words:N", y=alt.value(12)
    )
    x = alt.X("step:Q", title="step")
    above = alt.Chart(alt.Data(values=losses)).mark_line(strokeWidth=2)
    above = above.encode(x=x, y=alt.Y("y:Q", title="training loss", scale=alt.Scale(zero=False)), color=color)
    below = alt.Chart(alt.Data(values=distances)).mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18))
    scale = alt.Scale(type="log", domain=[1e-5, 1], clamp=True)
    distance = alt.Y(
        "y:Q", title="consensus distance, worst block", scale=scale, axis=alt.Axis(format=".0e", tickCount=5)
    )
    below = below.encode(x=x, y=distance, color=color)
    upper = alt.layer(rule, words, above).properties(width=620, height=170)
    lower = alt.layer(rule, below).properties(width=620, height=170)
    saved(alt.vconcat(upper, lower), path)
