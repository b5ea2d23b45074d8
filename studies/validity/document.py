"""docs/validity.md from the measured cases: every figure in it is filled in from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import torch

from studies.validity import fresh, scoring
from studies.validity.cases import OUTPUT_KEPT, Case, Measured
from studies.validity.models import SUBJECTS
from studies.validity.planting import UNDERFLOW
from studies.validity.scoring import GROWS, ORDER, THRESHOLDS, AtHalf, Judged, Scores
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
    "ENTROPY-FROZEN": "the larger of keys within reach / 0.5 and rest entropy / 0.044, in the most frozen head",
    "HEADS-IDENTICAL": "mean squared sine between two write spaces, relative to random ones",
    "HEADS-KERNEL": "dimensions lost beyond what the shape forces, in units of a head",
}
LOGITS_UP = [plant for plant in ORDER if plant.startswith("logits scaled up")]
# Order parameters taken as they stand, without a resolution.
PLAIN: list[tuple[Phenomenon, dict[str, str]]] = [
    ("rank-collapse-depth", {"residual scaled down": "consensus as read"}),
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
    alarms = [j for j in scores.healthy(lambda _: True) if j.found()]
    return {
        "torch": torch.__version__,
        "models": models(scores),
        "runs": sum(len(case.runs) for case, _ in scores.cases()),
        "places": sum(case.phenomenon is not None for case, _ in scores.cases()),
        "healthy_runs": len(scores.healthy(lambda _: True)),
        "thresholds": thresholds(scores),
        "disagreeing": [c for c, (worst, _) in scores.derived.items() if not in_force(c, scoring.threshold(c, worst))],
        "swapped": swapped(scores),
        "half": half(scores),
        "places_right": places_right(scores),
        "independent": independent(scores),
        "independent_places": independent_places(scores),
        "not_derived": not_derived(),
        "plain": plain(scores),
        "by_severity": by_severity(scores),
        "confusion_at_half": confusion(scores, scores_half(scores)),
        "confusion_complete": confusion(scores, lambda case, _: len(case.runs) - 1),
        "missed": missed(scores),
        "confounders": confounders(scores),
        "alarms": [_alarm(j) for j in alarms if not j.is_harmed],
        "harmed_alarms": [_alarm(j) for j in alarms if j.is_harmed],
        "harmed": sum(j.is_harmed for j in scores.healthy(lambda _: True)),
        "single": single_key_heads(scores),
        "stuck": stuck(measured),
        "nearest_pair": nearest_pair(scores),
        "resolutions": {order: figure(value) for order, value in scores.resolutions.items()},
        "underflow": UNDERFLOW,
        "lost_heads": findings.LOST_HEADS,
        "different_tokens": findings.DIFFERENT_TOKENS,
        "carried": findings.CARRIED,
        "carried_before": findings.CARRIED_BEFORE,
        "figure": figure,
    }


def scores_half(scores: Scores) -> Callable[[Case, str], int | None]:
    """Where a case's resolved order parameter has moved by half."""
    return lambda case, order: scoring.moved_by_half(case, order, scores.resolutions)


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
        half_of = "derives" if name in scores.deriving_models else "scores"
        cases = [case for case, _ in scores.cases() if case.subject == name]
        planted = sum(c.phenomenon is not None for c in cases)
        parameters = f"{figure(scores.measured[name].parameters / 1e6)} M"
        rows.append([f"`{name}`", SUBJECTS[name].about, parameters, half_of, str(planted), str(len(cases) - planted)])
    return table(["model", "", "parameters", "half", "damaged places", "healthy runs"], rows)


def in_force(code: str, derived: float) -> bool:
    """Whether the constant in findings.py is the derived one, to two figures."""
    return math.isclose(THRESHOLDS[code], derived, rel_tol=0.06)


def _where(judged: Judged) -> str:
    return f"{judged.case.subject}, {judged.case.plant}"


def _alarm(judged: Judged) -> str:
    kept = judged.run.orders.get(OUTPUT_KEPT)
    left = "" if kept is None else f" (output kept: {figure(kept)})"
    codes = dict.fromkeys(r.finding.code for r in judged.readings if r.margin > 0)
    return f"{_where(judged)}{left}: {', '.join(codes)}"


def thresholds(scores: Scores) -> str:
    rows = []
    other = scores.extremes(scores.on_other_models)
    for code, (worst, at) in scores.derived.items():
        elsewhere, there = other[code]
        margin = elsewhere / THRESHOLDS[code] if code not in GROWS else THRESHOLDS[code] / max(elsewhere, 1e-9)
        rows.append(
            [
                f"`{code}`",
                MEASURED[code],
                f"{figure(worst)} ({_where(at)})",
                figure(scoring.threshold(code, worst)),
                figure(THRESHOLDS[code]),
                f"{figure(elsewhere)} ({_where(there)})",
                f"× {margin:.1f}" if margin < 1e3 else "never",
            ]
        )
    header = ["rule", "reads", "nearest healthy, deriving half", "half of it", "in force"]
    return table([*header, "nearest healthy, other models", "away from the threshold"], rows)


def swapped(scores: Scores) -> str:
    """What the thresholds would be had they been derived from the scoring models, and whom they would have accused."""
    rows = []
    for code, (worst, _) in scores.extremes(scores.on_other_models).items():
        limit = scoring.threshold(code, worst)
        accused = []
        for j in scores.healthy(lambda case: case.subject in scores.deriving_models):
            distance = j.distance(code)
            if distance is not None and (distance > limit if code in GROWS else distance < limit):
                accused.append(_where(j))
        named = "; ".join(accused[:3]) + (f" and {len(accused) - 3} more" if len(accused) > 3 else "")
        rows.append([f"`{code}`", figure(limit), figure(THRESHOLDS[code]), named or "none"])
    return table(["rule", "half of the other models' nearest", "in force", "healthy runs it would accuse"], rows)


def _row(found: AtHalf) -> list[str]:
    return [
        str(found.cases),
        str(found.never),
        "–" if math.isnan(found.area) else f"{found.area:.3f}",
        percent(found.detected),
        f"{percent(found.located)} of {found.locatable}",
    ]


def half(scores: Scores) -> str:
    rows = []
    for p in PHENOMENA:
        orders = dict.fromkeys(order for plant, order in ORDER.items() if _planted(scores, plant) == p)
        named = ", ".join(orders)
        rows.append([NAMES[p], named, "other models", *_row(scoring.at_half(scores, p, scores.on_other_models))])
        rows.append(["", "", "all not used to derive", *_row(scoring.at_half(scores, p, scores.scored))])
        rows.append(["", "", "all", *_row(scoring.at_half(scores, p, lambda _: True))])
    header = ["collapse", "order parameter", "scored on", "cases", "never moved by half", "area under the ROC"]
    return table([*header, "alarm", "place right"], rows)


def independent(scores: Scores) -> str:
    """As `half`, graded by quantities that no rule reads."""
    rows = []
    for p in PHENOMENA:
        orders = [o for plant, o in scoring.INDEPENDENT.items() if _planted(scores, plant) == p]
        if not orders:
            continue
        for name, keep in (("other models", scores.on_other_models), ("all not used to derive", scores.scored)):
            found = scoring.at_half(scores, p, keep, scoring.INDEPENDENT, scores.independent_resolutions)
            named = ", ".join(dict.fromkeys(orders)) if name == "other models" else ""
            rows.append([NAMES[p] if named else "", named, name, *_row(found)])
    header = ["collapse", "graded by", "scored on", "cases", "never moved by half", "area under the ROC"]
    return table([*header, "alarm", "place right"], rows)


def independent_places(scores: Scores) -> str:
    """Right places over the three collapses that have an independent quantity."""
    found = [
        at
        for p in PHENOMENA
        if (
            at := scoring.at_half(scores, p, scores.scored, scoring.INDEPENDENT, scores.independent_resolutions)
        ).locatable
    ]
    right, places = sum(round(f.located * f.locatable) for f in found), sum(f.locatable for f in found)
    return f"{right} of {places} cases ({right / places:.1%})" if places else "–"


def not_derived() -> str:
    """Models as initialised and two towers, diagnosed whole."""
    rows = [[d["model"], ", ".join(d["warned"]) or "none", ", ".join(d["told"]) or "none"] for d in fresh.diagnosed()]
    return table(["model", "warnings", "information"], rows)


def places_right(scores: Scores) -> str:
    """Over all four collapses, on cases that did not derive."""
    found = [at for p in PHENOMENA if (at := scoring.at_half(scores, p, scores.scored)).locatable]
    right, places = sum(round(f.located * f.locatable) for f in found), sum(f.locatable for f in found)
    return f"{right} of {places} cases ({right / places:.1%})"


def _planted(scores: Scores, plant: str) -> str | None:
    return next((c.phenomenon for c, _ in scores.cases(lambda c: c.plant == plant)), None)


def plain(scores: Scores) -> str:
    rows = []
    for phenomenon, orders in PLAIN:
        healthy = [case.runs[0].orders[orders[case.plant]] for case, _ in scores.cases() if case.plant in orders]
        found = scoring.at_half(scores, phenomenon, scores.scored, orders)
        name = next(iter(orders.values()))
        spread = f"{figure(min(healthy))} to {figure(max(healthy))}"
        rows.append([NAMES[phenomenon], name, spread, *_row(found)])
    header = ["collapse", "order parameter", "in healthy places", "cases", "never moved by half"]
    return table([*header, "area under the ROC", "alarm", "place right"], rows)


def by_severity(scores: Scores) -> str:
    """Share of the places where the planted collapse is found, along each ladder."""
    blocks = []
    for plant in ORDER:
        of_it = [(case, runs) for case, runs in scores.cases(scores.scored) if case.plant == plant]
        if not of_it:
            continue
        ladder = of_it[0][0].severities
        phenomenon = of_it[0][0].phenomenon
        assert phenomenon is not None
        row = [percent(scoring.share(runs[i].score(phenomenon) > 0 for _, runs in of_it)) for i in range(len(ladder))]
        order = [_median([case.runs[i].orders[ORDER[plant]] for case, _ in of_it]) for i in range(len(ladder))]
        moved = [percent(scoring.share(_moved(scores, case, i) for case, _ in of_it)) for i in range(len(ladder))]
        header = [f"**{plant}** ({len(of_it)} places)", *(f"{s:g}" for s in ladder)]
        rows = [
            ["alarm", *row],
            [f"{ORDER[plant]} (median)", *map(figure, order)],
            ["moved by half", *moved],
        ]
        blocks.append(table(header, rows))
    return "\n\n".join(blocks)


def _moved(scores: Scores, case: Case, index: int) -> bool:
    order = ORDER[case.plant]
    fineness = scores.resolutions.get(order)
    start, value = (scoring.beside(case.runs[i].orders[order], fineness) for i in (0, index))
    return value <= start / 2


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def confusion(scores: Scores, at: Callable[[Case, str], int | None]) -> str:
    rows = []
    for planted in PHENOMENA:
        runs = []
        for case, judged in scores.cases(scores.scored):
            if case.phenomenon != planted:
                continue
            index = at(case, ORDER[case.plant])
            if index is not None and scoring.moved_by_half(case, ORDER[case.plant], scores.resolutions) is not None:
                runs.append(judged[index])
        counts = [sum(p in j.found() for j in runs) for p in PHENOMENA]
        nothing = sum(not j.found() for j in runs)
        rows.append([f"**{NAMES[planted]}**", *map(str, counts), str(nothing), str(len(runs))])
    healthy = scores.healthy(scores.scored)
    counts = [sum(p in j.found() for j in healthy) for p in PHENOMENA]
    nothing = sum(not j.found() for j in healthy)
    rows.append(["**nothing**", *map(str, counts), str(nothing), str(len(healthy))])
    return table(["planted ↓ found →", *NAMES.values(), "nothing", "runs"], rows)


def missed(scores: Scores) -> list[str]:
    """Every case whose place is wrong at the half, by name."""
    found = []
    for case, runs in scores.cases(scores.scored):
        if case.phenomenon is None:
            continue
        index = scoring.moved_by_half(case, ORDER[case.plant], scores.resolutions)
        if index is None or case.block is None:
            continue
        top = runs[index].top(case.phenomenon)
        if not scoring.is_located(case, top):
            place = f"block {case.block}" + (f", head {case.head}" if case.head else "")
            said = "nowhere"
            if top is not None:
                head = "" if top.finding.head is None else f", head {top.finding.head}"
                said = f"at block {top.finding.block}{head} ({top.finding.code})"
            found.append(
                f"{case.subject}, {case.plant} {case.severities[index]:g} at {place}: the worst reading is {said}"
            )
    return found


def confounders(scores: Scores) -> str:
    """For each confounder the models it was tried on, alarms, and the nearest that each rule came to firing."""
    names = list(dict.fromkeys(c.plant for c, _ in scores.cases(lambda c: c.phenomenon is None)))
    rows = []
    for name in names:
        runs = [judged[0] for case, judged in scores.cases() if case.plant == name and case.phenomenon is None]
        nearest = []
        for p in (*PHENOMENA, scoring.DEAD):
            top = max(j.score(p) for j in runs)
            nearest.append("–" if top == -math.inf else f"× {math.exp(-top):.2g}" if top > -7 else "far")
        alarms = sum(bool(j.found()) for j in runs)
        kept = [j.run.orders[OUTPUT_KEPT] for j in runs if OUTPUT_KEPT in j.run.orders]
        least = figure(min(kept)) if kept else "–"
        harmed = str(sum(j.is_harmed for j in runs)) if kept else "–"
        rows.append([name, str(len(runs)), least, harmed, str(alarms), *nearest])
    header = ["healthy, but", "runs", "least output kept", "harmed", "alarms"]
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
        index = scoring.moved_by_half(case, ORDER[case.plant], scores.resolutions)
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
        "planted_entropies": [o["entropy"] for _, _, o in frozen],
        "healthy_entropies": [entropy for entropy, _ in sorted(rows)],
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
