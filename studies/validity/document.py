"""docs/validity.md from the measured cases: every figure in it is filled in from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jinja2
import torch

from studies.validity import fresh, scoring
from studies.validity.cases import AS_BEFORE, OUTPUT_KEPT, TOLD_APART, Case, Measured, Run
from studies.validity.models import SUBJECTS
from studies.validity.planting import UNDERFLOW
from studies.validity.scoring import CODES, INDEPENDENT, ORDER, STRICTER, THRESHOLDS, AtHalf, Judged, Scores
from uncollapse.judgement import findings
from uncollapse.records.common import PHENOMENA, Phenomenon

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "validity.md"
NAMES: dict[Phenomenon, str] = {
    "rank-collapse-depth": "depth",
    "rank-collapse-width": "width",
    "head-channel-non-identifiability": "heads",
    "entropy-collapse": "entropy",
}
MEASURED = {
    "DEPTH-CONSENSUS": "consensus distance behind the norms that read the stream, relative to the embedding's",
    "DEPTH-RANK": "share of the attainable affine rank, relative to the embedding's",
    "WIDTH-UNIFORM": "share of the keys left unused by the least uniform head",
    "WIDTH-RANK-ONE": "‖CAV‖/‖CV‖ of the head that keeps most, relative to min(1, n/16)",
    "ENTROPY-FROZEN": f"the larger of keys within reach / {findings.WITHIN_REACH} and rest entropy / {findings.REST_ENTROPY}, "
    "in the most frozen head",
    "HEADS-IDENTICAL": "mean squared sine between two write spaces, relative to random ones",
    "HEADS-KERNEL": "dimensions lost beyond what the shape forces, in units of a head",
}
GOAL = 0.95  # for the area under the ROC and the share of right places, by the independent quantities
LOGITS_UP = [plant for plant in ORDER if plant.startswith("logits scaled up")]
DEPTH = [plant for plant, order in INDEPENDENT.items() if order == TOLD_APART]
# Order parameters taken as they stand, without a resolution.
PLAIN: list[tuple[Phenomenon, dict[str, str]]] = [
    ("rank-collapse-depth", dict.fromkeys(DEPTH, "consensus as read")),
    ("rank-collapse-width", {"logits to zero": "unused keys"}),
    ("rank-collapse-width", {"queries alike": "value contraction"}),
    ("head-channel-non-identifiability", {"one head made a copy of another": "distinctness"}),
    ("entropy-collapse", dict.fromkeys(LOGITS_UP, "entropy")),
    ("entropy-collapse", dict.fromkeys(LOGITS_UP, "rest entropy")),
]


def write(measured: Mapping[str, Measured]) -> None:
    """Score and write."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    DOCUMENT.write_text(templates.get_template("validity.md.j2").render(context(measured)), encoding="utf-8")
    print(f"wrote {DOCUMENT.name}")


def context(measured: Mapping[str, Measured]) -> dict[str, object]:
    """All that the template fills in."""
    scores = Scores(measured)
    shipped = scores.oddities(as_shipped=True)
    return {
        "torch": torch.__version__,
        "models": models(scores),
        "model_count": len(scores.measured),
        "real": sum(SUBJECTS[name].is_real for name in scores.measured),
        "not_measured": [name for name in SUBJECTS if name not in measured],
        "runs": sum(len(case.runs) for case, _ in scores.cases()),
        "places": sum(case.phenomenon is not None for case, _ in scores.cases()),
        "oddities": len(shipped),
        "thresholds": thresholds(scores),
        "disagreeing": disagreeing(scores),
        "left_out": left_out(scores),
        "half": half(scores),
        "places_right": places_right(scores),
        "independent": independent(scores),
        "independent_places": independent_places(scores),
        "warned_places": warned_places(scores),
        "depth_by_model": depth_by_model(scores),
        "residuals_alone": residuals_alone(scores),
        "by_constant": by_constant(scores),
        "beside_earlier": beside_earlier(scores),
        "first_blocks": first_blocks(scores),
        "missed_goals": missed_goals(scores),
        "goal": GOAL,
        "when": when(scores),
        "depth_ladder": depth_ladder(scores),
        "not_derived": not_derived(),
        "plain": plain(scores),
        "by_severity": by_severity(scores),
        "confusion_at_half": confusion(scores, scores.half),
        "confusion_complete": confusion(scores, lambda case: len(case.runs) - 1),
        "missed": missed(scores, scores.half),
        "missed_independent": missed(scores, independently(scores)),
        "confounders": confounders(scores),
        "alarms": [_alarm(j) for j in shipped if j.found() and not j.is_harmed],
        "harmed_alarms": [_alarm(j) for j in shipped if j.found() and j.is_harmed],
        "harmed": sum(j.is_harmed for j in shipped),
        "new_alarms": [_alarm(j) for j in scores.healthy() if j.found()],
        "single": single_key_heads(scores),
        "stuck": stuck(measured),
        "nearest_pair": nearest_pair(scores),
        "resolutions": resolutions(scores),
        "underflow": UNDERFLOW,
        "lost_heads": findings.LOST_HEADS,
        "different_tokens": findings.DIFFERENT_TOKENS,
        "carried": findings.CARRIED,
        "figure": figure,
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def figure(value: float) -> str:
    """Two or three figures; 0 for what is below single precision's rounding."""
    if math.isnan(value):
        return "–"
    if abs(value) < 1e-6:
        return "0"
    if abs(value) >= 1e-3:
        return f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.2g}"
    return f"{value:.0e}".replace("e-0", "e-")


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def models(scores: Scores) -> str:
    rows = []
    for name in sorted(scores.measured, key=lambda n: -scores.measured[n].parameters):
        cases = [case for case, _ in scores.cases() if case.subject == name]
        planted = sum(c.phenomenon is not None for c in cases)
        harmed = sum(j.is_harmed for j in scores.oddities() if j.case.subject == name)
        parameters = f"{figure(scores.measured[name].parameters / 1e6)} M"
        row = [
            f"`{name}`",
            SUBJECTS[name].about,
            parameters,
            str(planted),
            str(len(cases) - planted - harmed),
            str(harmed),
        ]
        rows.append(row)
    return table(["model", "", "parameters", "damaged places", "healthy runs", "harmed"], rows)


def in_force(code: str, derived: float) -> bool:
    """Whether the constant in findings.py is the derived one, to two figures."""
    return THRESHOLDS[code] == float(f"{derived:.2g}")


def _where(judged: Judged) -> str:
    return f"{judged.case.subject}, {judged.case.plant}"


def _alarm(judged: Judged) -> str:
    kept = judged.run.orders.get(OUTPUT_KEPT)
    left = "" if kept is None else f" (output kept: {figure(kept)})"
    codes = dict.fromkeys(r.finding.code for r in judged.readings if r.margin > 0)
    return f"{_where(judged)}{left}: {', '.join(codes)}"


def thresholds(scores: Scores) -> str:
    rows = []
    for code, (worst, at) in scores.extremes(scores.measured).items():
        without = [scoring.value(limits, code) for limits in scores.left_out.values()]
        spread = f"{figure(min(without))} to {figure(max(without))}"
        row = [f"`{code}`", MEASURED[code], f"{figure(worst)} ({_where(at)})", figure(scoring.threshold(code, worst))]
        rows.append([*row, figure(THRESHOLDS[code]), spread])
    header = ["rule", "reads", "nearest healthy run", "half of it", "in force", "without one model"]
    return table(header, rows)


def disagreeing(scores: Scores) -> list[str]:
    """The constants in findings.py that are not the derived ones."""
    found = [
        code
        for code, (worst, _) in scores.extremes(scores.measured).items()
        if not in_force(code, scoring.threshold(code, worst))
    ]
    if (derived := scores.derived).carried != findings.CARRIED:
        found.append(f"the beginning of a fall (derived: {derived.carried:g})")
    return found


def left_out(scores: Scores) -> str:
    """Each rule's warnings on healthy runs of a model that had no part in its threshold."""
    rows = []
    for code in CODES:
        judged = [j for j in scores.healthy() if any(r.finding.code == code for r in j.readings)]
        accused = [j for j in judged if any(r.finding.code == code and r.margin > 0 for r in j.readings)]
        names = dict.fromkeys(j.case.subject for j in accused)
        read = len({j.case.subject for j in judged})
        named = ", ".join(f"{name} ({sum(j.case.subject == name for j in accused)})" for name in names)
        rows.append([f"`{code}`", str(len(judged)), str(len(accused)), f"{len(names)} of {read}", named or "none"])
    return table(["rule", "healthy runs", "warned of", "models", "which (runs)"], rows)


def _row(found: AtHalf) -> list[str]:
    return [
        str(found.cases),
        str(found.never),
        "–" if math.isnan(found.area) else f"{found.area:.3f}",
        percent(found.detected),
        f"{percent(found.located)} of {found.locatable}",
    ]


HEADER = ["cases", "never moved by half", "area under the ROC", "alarm", "place right"]


def half(scores: Scores) -> str:
    rows = []
    for p in PHENOMENA:
        orders = dict.fromkeys(order for plant, order in ORDER.items() if _planted(scores, plant) == p)
        rows.append([NAMES[p], ", ".join(orders), *_row(scoring.at_half(scores, p, scores.half))])
    return table(["collapse", "order parameter", *HEADER], rows)


def independently(scores: Scores, orders: Mapping[str, str] = INDEPENDENT) -> Callable[[Case], int | None]:
    """Where a quantity that no rule reads has moved by half; None for plants without."""

    def moved(case: Case) -> int | None:
        order = orders.get(case.plant)
        return None if order is None else scoring.moved_by_half(case, order, fineness[case.subject])

    fineness = {name: scores.independent_resolutions(name) for name in scores.measured}
    return moved


def independent(scores: Scores) -> str:
    """As `half`, graded by quantities that no rule reads."""
    rows = []
    for orders in (INDEPENDENT, STRICTER):
        for p in PHENOMENA:
            of_it = [plant for plant in orders if _planted(scores, plant) == p]
            if of_it:
                named = ", ".join(dict.fromkeys(orders[plant] for plant in of_it))
                found = scoring.at_half(scores, p, independently(scores, orders), of_it)
                rows.append([NAMES[p], named, *_row(found)])
    return table(["collapse", "graded by", *HEADER], rows)


def _over_all(scores: Scores, moved: Callable[[Case], int | None], plants: Mapping[str, str]) -> str:
    found = [at for p in PHENOMENA if (at := scoring.at_half(scores, p, moved, plants)).locatable]
    right, places = sum(round(f.located * f.locatable) for f in found), sum(f.locatable for f in found)
    return f"{right} of {places} cases ({right / places:.1%})" if places else "–"


def places_right(scores: Scores) -> str:
    """Over all four collapses."""
    return _over_all(scores, scores.half, ORDER)


def independent_places(scores: Scores) -> str:
    """Over the three collapses that have an independent quantity."""
    return _over_all(scores, independently(scores), INDEPENDENT)


def warned_places(scores: Scores) -> str:
    """Right places over the cases that were warned of at the independent half."""
    moved = independently(scores)
    right = []
    for case, runs in scores.cases(lambda case: case.phenomenon is not None and case.block is not None):
        index = moved(case)
        if index is not None and case.phenomenon is not None and runs[index].score(case.phenomenon) > 0:
            right.append(scoring.is_located(case, runs[index].top(case.phenomenon)))
    return f"{sum(right)} of {len(right)} cases ({scoring.share(right):.1%})" if right else "–"


def depth_by_model(scores: Scores) -> str:
    """Where tokens can be told apart half as well: how far apart they are, the alarms, and the area among all healthy runs."""
    placed = {name: "after" if "post-norm" in SUBJECTS[name].about else "before" for name in scores.measured}
    rows = [_depth_row(scores, f"`{name}`", placed[name], [name], DEPTH) for name in scores.measured]
    for plant in DEPTH:
        for placement in ("after", "before", "either"):
            names = [name for name in scores.measured if placement in (placed[name], "either")]
            rows.append(_depth_row(scores, f"**{plant}**", placement, names, [plant]))
    header = ["", "norms", "cases", "never moved by half", "share of the distance", "area under the ROC", "alarm"]
    return table([*header, "place right"], rows)


def _depth_row(scores: Scores, title: str, placement: str, names: Sequence[str], plants: Sequence[str]) -> list[str]:
    cases = list(scores.cases(lambda c: c.plant in plants and c.subject in names))
    at = [(case, runs[i]) for case, runs in cases if (i := scoring.moved_by_half(case, TOLD_APART)) is not None]
    margins = [j.score("rank-collapse-depth") for _, j in at]
    shares = sorted(j.run.orders["consensus as read"] for _, j in at)
    area = scoring.area(margins, [j.score("rank-collapse-depth") for j in scores.healthy()])
    spread = f"{figure(shares[0])} to {figure(shares[-1])}" if shares else "–"
    found = "–" if math.isnan(area) else f"{area:.3f}"
    warned = percent(scoring.share(m > 0 for m in margins))
    right = percent(scoring.share(scoring.is_located(case, j.top("rank-collapse-depth")) for case, j in at))
    return [title, placement, str(len(at)), str(len(cases) - len(at)), spread, found, warned, right]


def by_constant(scores: Scores) -> str:
    """Right places of depth at the independent half, in each half of the models, for every constant that may say where a fall
    began, and which constant the half gives by itself."""
    moved = independently(scores)
    rows = []
    for title, names in zip(("chosen on", "not chosen on"), scores.halves(), strict=True):
        of_half = [case for case, _ in scores.cases(lambda c: c.plant in DEPTH) if case.subject in names]
        runs = [(case, case.runs[index]) for case in of_half if (index := moved(case)) is not None]
        right = [sum(_is_placed(scores, case, run, carried) for case, run in runs) for carried in scoring.CARRIED]
        derived = f"{scores.beginning(names):g}"
        rows.append([title, ", ".join(f"`{name}`" for name in names), str(len(runs)), *map(str, right), derived])
    header = ["half", "models", "cases", *(f"{carried:g}" for carried in scoring.CARRIED), "derived"]
    return table(header, rows)


def _is_placed(scores: Scores, case: Case, run: Run, carried: float) -> bool:
    limits = replace(scores.left_out[case.subject], carried=carried)
    judged = scoring.judged(scores.measured[case.subject], case, run, limits)
    return scoring.is_located(case, judged.top("rank-collapse-depth"))


def beside_earlier(scores: Scores) -> str:
    """How many of the same cases an earlier record of the same model would place: at the first block where one of the two figures
    that a site has of its own differs from that record by more than a twentieth."""
    moved = independently(scores)
    right = []
    for case, _ in scores.cases(lambda c: c.plant in DEPTH):
        index = moved(case)
        if index is not None:
            before, after = (_site_figures(run) for run in (case.runs[0], case.runs[index]))
            right.append(_first_that_differs(before, after) == case.block)
    return f"{sum(right)} of {len(right)}"


def _site_figures(run: Run) -> dict[int, tuple[float, ...]]:
    return {
        site.block: tuple(
            math.nan if each is None else each.mean for each in (site.stream_carried, site.consensus_after_norm)
        )
        for site in run.trajectory or []
        if site.block is not None
    }


def _first_that_differs(before: Mapping[int, tuple[float, ...]], after: Mapping[int, tuple[float, ...]]) -> int | None:
    return next((b for b in before if any(abs(x - y) > 0.05 for x, y in zip(before[b], after[b], strict=True))), None)


def first_blocks(scores: Scores) -> dict[str, object]:
    """What healthy first blocks carry on of their stream, beside the others."""
    carried = [
        [site.stream_carried.mean for site in m.healthy.trajectory or [] if site.stream_carried is not None]
        for m in scores.measured.values()
    ]
    first, others = [each[0] for each in carried], [c for each in carried for c in each[1:]]
    short, short_others = (sum(c < findings.CARRIED for c in group) for group in (first, others))
    return {
        "least": min(first),
        "most": max(first),
        "short": f"{short} of {len(first)}",
        "short_others": f"{short_others} of {len(others)}",
    }


def residuals_alone(scores: Scores) -> str:
    """The area of the older of the two plants in depth."""
    found = scoring.at_half(scores, "rank-collapse-depth", independently(scores), DEPTH[:1])
    return f"{found.area:.3f} over {found.cases} cases" if found.cases else "open, for none has moved by half"


def missed_goals(scores: Scores) -> list[str]:
    """What was to be reached by the independent quantities, and was not."""
    found = []
    for p in PHENOMENA:
        at = scoring.at_half(
            scores, p, independently(scores), [plant for plant in INDEPENDENT if _planted(scores, plant) == p]
        )
        if at.cases and at.area < GOAL:
            found.append(f"{NAMES[p]} has an area of {at.area:.3f} under the ROC")
        if at.locatable and at.located < GOAL:
            found.append(f"{NAMES[p]} has {at.located:.0%} of its places right")
    return found


def when(scores: Scores) -> str:
    """Where each quantity of depth has moved by half: how far the tokens then are, and whether the rule has fired."""
    rows = []
    for order in ("consensus as read", TOLD_APART, AS_BEFORE, OUTPUT_KEPT):
        shares, alarms = [], []
        for case, runs in scores.cases(lambda c: c.phenomenon == "rank-collapse-depth"):
            index = scoring.moved_by_half(case, order)
            if index is not None:
                shares.append(case.runs[index].orders["consensus as read"])
                alarms.append(runs[index].score("rank-collapse-depth") > 0)
        spread = [figure(f(shares)) if shares else "–" for f in (min, _median, max)]
        rows.append([order, str(len(shares)), *spread, percent(scoring.share(alarms))])
    return table(["moved by half", "cases", "least share of the distance", "median", "most", "alarm"], rows)


def depth_ladder(scores: Scores) -> str:
    """The quantities of depth along the ladder of each plant, over all places."""
    blocks = []
    for plant in DEPTH:
        cases = _of_plant(scores, plant)
        if not cases:
            continue
        ladder = cases[0][0].severities
        rows = []
        for order in ("consensus as read", TOLD_APART, AS_BEFORE, OUTPUT_KEPT):
            medians = (figure(_median([c.runs[i].orders[order] for c, _ in cases])) for i in range(len(ladder)))
            rows.append([f"{order} (median)", *medians])
        blocks.append(table([f"**{plant}** ({len(cases)} places)", *(f"{s:g}" for s in ladder)], rows))
    return "\n\n".join(blocks)


def not_derived() -> str:
    """Models that no threshold comes from, diagnosed whole."""
    rows = [[d["model"], ", ".join(d["warned"]) or "none", ", ".join(d["told"]) or "none"] for d in fresh.diagnosed()]
    return table(["model", "warnings", "information"], rows)


def _planted(scores: Scores, plant: str) -> str | None:
    return next((case.phenomenon for case, _ in _of_plant(scores, plant)), None)


def _of_plant(scores: Scores, plant: str) -> list[tuple[Case, list[Judged]]]:
    return list(scores.cases(lambda case: case.plant == plant))


def plain(scores: Scores) -> str:
    rows = []
    for phenomenon, orders in PLAIN:
        healthy = [case.runs[0].orders[orders[case.plant]] for case, _ in scores.cases() if case.plant in orders]
        if not healthy:
            continue

        def moved(case: Case, orders: Mapping[str, str] = orders) -> int | None:
            return scoring.moved_by_half(case, orders[case.plant])

        found = scoring.at_half(scores, phenomenon, moved, orders)
        spread = f"{figure(min(healthy))} to {figure(max(healthy))}"
        rows.append([NAMES[phenomenon], next(iter(orders.values())), spread, *_row(found)])
    return table(["collapse", "order parameter", "in healthy places", *HEADER], rows)


def resolutions(scores: Scores) -> dict[str, str]:
    """By order parameter: the values that leaving out one model gives, as a rule all the same."""
    found: dict[str, set[float]] = {}
    for name in scores.measured:
        for order, resolution in scores.resolutions(name).items():
            found.setdefault(order, set()).add(resolution)
    return {order: " or ".join(figure(each) for each in sorted(values)) for order, values in found.items()}


def by_severity(scores: Scores) -> str:
    """Share of the places where the planted collapse is found, along each ladder."""
    blocks = []
    for plant in ORDER:
        of_it = _of_plant(scores, plant)
        if not of_it:
            continue
        ladder = of_it[0][0].severities
        phenomenon = of_it[0][0].phenomenon
        assert phenomenon is not None
        row = [percent(scoring.share(runs[i].score(phenomenon) > 0 for _, runs in of_it)) for i in range(len(ladder))]
        order = [_median([case.runs[i].orders[ORDER[plant]] for case, _ in of_it]) for i in range(len(ladder))]
        reached = [scores.half(case) for case, _ in of_it]
        moved = [percent(scoring.share(h is not None and h <= i for h in reached)) for i in range(len(ladder))]
        header = [f"**{plant}** ({len(of_it)} places)", *(f"{s:g}" for s in ladder)]
        rows = [["alarm", *row], [f"{ORDER[plant]} (median)", *map(figure, order)], ["moved by half", *moved]]
        blocks.append(table(header, rows))
    return "\n\n".join(blocks)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def confusion(scores: Scores, at: Callable[[Case], int | None]) -> str:
    rows = []
    for planted in PHENOMENA:
        runs = [
            judged[index]
            for case, judged in scores.cases(lambda case, planted=planted: case.phenomenon == planted)  # type: ignore[misc]
            if scores.half(case) is not None and (index := at(case)) is not None
        ]
        counts = [sum(p in j.found() for j in runs) for p in PHENOMENA]
        nothing = sum(not j.found() for j in runs)
        rows.append([f"**{NAMES[planted]}**", *map(str, counts), str(nothing), str(len(runs))])
    healthy = scores.healthy()
    counts = [sum(p in j.found() for j in healthy) for p in PHENOMENA]
    nothing = sum(not j.found() for j in healthy)
    rows.append(["**nothing**", *map(str, counts), str(nothing), str(len(healthy))])
    return table(["planted ↓ found →", *NAMES.values(), "nothing", "runs"], rows)


def missed(scores: Scores, moved: Callable[[Case], int | None]) -> list[str]:
    """Every case whose place is wrong at the half, by name."""
    found = []
    for case, runs in scores.cases(lambda case: case.phenomenon is not None and case.block is not None):
        index = moved(case)
        if index is None or case.phenomenon is None:
            continue
        top = runs[index].top(case.phenomenon)
        if not scoring.is_located(case, top):
            place = f"block {case.block}" + (f", head {case.head}" if case.head else "")
            said = "nowhere"
            if top is not None:
                head = "" if top.finding.head is None else f", head {top.finding.head}"
                said = f"at block {top.finding.block}{head} ({top.finding.code}{'' if top.margin > 0 else ', which has not fired'})"
            found.append(
                f"{case.subject}, {case.plant} {case.severities[index]:g} at {place}: the worst reading is {said}"
            )
    return found


def confounders(scores: Scores) -> str:
    """For each confounder the models it was tried on, warnings with the thresholds in force, and the nearest that each rule came to
    firing on a run that was not harmed."""
    every = scores.oddities(as_shipped=True)
    rows = []
    for name in dict.fromkeys(j.case.plant for j in every):
        runs = [j for j in every if j.case.plant == name]
        whole = [j for j in runs if not j.is_harmed]
        nearest = []
        for p in (*PHENOMENA, scoring.DEAD):
            top = max((j.score(p) for j in whole), default=-math.inf)
            nearest.append("–" if top == -math.inf else f"× {math.exp(-top):.2g}" if top > -7 else "far")
        kept = [j.run.orders[OUTPUT_KEPT] for j in runs if OUTPUT_KEPT in j.run.orders]
        least = figure(min(kept)) if kept else "–"
        harmed = str(len(runs) - len(whole)) if kept else "–"
        alarms = [sum(bool(j.found()) for j in group) for group in (whole, [j for j in runs if j.is_harmed])]
        rows.append([name, str(len(runs)), least, harmed, str(alarms[0]), str(alarms[1]) if kept else "–", *nearest])
    header = ["healthy, but", "runs", "least output kept", "harmed", "warned of", "harmed and warned of"]
    return table([*header, *NAMES.values(), "dead"], rows)


def single_key_heads(scores: Scores) -> dict[str, object]:
    """Healthy heads that look at one key, beside heads frozen by their logits."""
    rows, lowest = [], []
    for name, m in scores.measured.items():
        for a in m.healthy.attention or []:
            if a.normalized_entropy is None or a.rest_entropy is None:
                continue
            lowest.append(a.rest_entropy.mean)
            if a.normalized_entropy.mean < 0.1 and a.max_logit is not None and a.value_contraction is not None:
                rows.append(
                    (
                        a.normalized_entropy.mean,
                        [
                            f"{name}, block {a.block}, head {a.head}",
                            figure(a.normalized_entropy.mean),
                            figure(a.rest_entropy.mean),
                            figure(a.value_contraction.mean),
                            figure(a.max_logit.mean),
                        ],
                    )
                )
    frozen: list[tuple[Case, int, dict[str, float]]] = []
    for case, runs in scores.cases(lambda c: c.plant == "logits scaled up in one head"):
        index = scores.half(case)
        if index is not None:
            frozen.append((case, index, runs[index].run.orders))
    planted = [
        [
            f"{case.subject}, block {case.block}, head {case.head[0] if case.head else ''}, logits × {case.severities[i]:g}",
            figure(orders["entropy"]),
            figure(orders["rest entropy"]),
        ]
        for case, i, orders in frozen
    ]
    header = ["healthy head", "normalised entropy", "without the strongest key", "‖CAV‖/‖CV‖", "largest logit"]
    return {
        "healthy": table(header, [row for _, row in sorted(rows)[:12]]),
        "healthy_count": len(rows),
        "planted": table(["frozen head", "normalised entropy", "without the strongest key"], planted[:12]),
        "planted_count": len(planted),
        "least_healthy_rest": min(lowest),
        "most_planted_rest": max((o["rest entropy"] for _, _, o in frozen), default=math.nan),
        "threshold": findings.REST_ENTROPY,
        "entropies": [
            f(
                a.normalized_entropy.mean
                for m in scores.measured.values()
                for a in m.healthy.attention or []
                if a.normalized_entropy
            )
            for f in (min, max)
        ],
    }


def nearest_pair(scores: Scores) -> str:
    """The two healthy heads whose write spaces overlap most."""
    found = []
    for name, m in scores.measured.items():
        for record in m.healthy.heads:
            overlaps = record.write_space_overlap or []
            found += [(o, name, record.block) for g, row in enumerate(overlaps) for h, o in enumerate(row) if h > g]
    overlap, name, block = max(found)
    return f"{overlap:.2f} of their write spaces (in {name}, block {block})"


def stuck(measured: Mapping[str, Measured]) -> list[str]:
    """What the rules say of the model whose training failed."""
    found = []
    for name, m in measured.items():
        if not SUBJECTS[name].is_healthy:
            judged = scoring.judged(m, m.cases[0], m.cases[0].runs[0])
            found += [r.finding.message for r in judged.readings if r.margin > 0]
    return found
