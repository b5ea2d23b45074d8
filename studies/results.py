"""docs/results.md, with its tables and pictures: what real models are without norms, residuals and MLPs, and with position gates.

    make results                                 every section that the present code has not measured yet, then the document
    python -m studies.results --only smollm2       one section anew; the document is rebuilt from the saved numbers
    python -m studies.results --only document      nothing anew: the document alone

Each section leaves its numbers in .cache/results/<section>.json, so that a run that was broken off goes on where it was. The prose
is in studies/results.md.j2; every figure in it is filled in from those numbers. The document is written when all sections are
there: a part of it would take the place of the whole.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from studies import fingerprints, language_models, pictures, pretrained, published
from studies.position_gates import document as gates_document
from studies.position_gates import experiments as gates
from studies.weights import CACHE
from uncollapse.judgement import predictions
from uncollapse.judgement.rates import depth_rate
from uncollapse.measures.student import mean_and_half
from uncollapse.records.ablation import AblationRecord
from uncollapse.records.encoding import from_json, to_json

ROOT = Path(__file__).resolve().parents[1]
SAVED = CACHE / "results"
DOCUMENT = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
NORM_RESIDUAL_MLP = ("norm", "residual", "mlp")
NAMES = {"norm": "norms", "residual": "residuals", "mlp": "MLPs"}


def _subject(key: str) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "grid": pretrained.grid(key),
        "noted": pretrained.noted(key),
        "each_alone": pretrained.each_alone(key),
    }


SECTIONS: dict[str, Callable[[], Any]] = {
    **{key: _subject(key) for key in pretrained.SUBJECTS},
    "positions": pretrained.positions,
    "dong": pretrained.dong,
    "trained": language_models.section,
    "gates": gates.section,
}


# What can change a saved number: the package but for what only judges and shows, and the studies but for their documents.
SHOWING = ("cli", "judgement", "report", "monitoring")
STUDIES = ("language_models.py", "molecules.txt", "pretrained.py", "published.py", "weights.py", "position_gates")


def fingerprint(root: Path = ROOT) -> str:
    """Of the code and the libraries whose change makes saved numbers worthless."""
    package = root / "src" / "uncollapse"
    files = [f for f in package.rglob("*.py") if f.relative_to(package).parts[0] not in SHOWING]
    for name in STUDIES:
        place = root / "studies" / name
        files += (
            [f for f in place.rglob("*.py") if f.name not in ("document.py", "pictures.py")]
            if place.is_dir()
            else [place]
        )
    return fingerprints.fingerprint(files, root)


def is_measured(section: str) -> bool:
    """Whether the present code has measured a section."""
    place = SAVED / f"{section}.json"
    return place.exists() and json.loads(place.read_text(encoding="utf-8")).get("fingerprint") == fingerprint()


def measure(section: str) -> None:
    """Run one section and save what it found."""
    start = time.perf_counter()
    found = SECTIONS[section]()
    SAVED.mkdir(parents=True, exist_ok=True)
    saved = {"seconds": round(time.perf_counter() - start), "fingerprint": fingerprint(), "found": found}
    (SAVED / f"{section}.json").write_text(json.dumps(saved), encoding="utf-8")
    print(f"{section}: {saved['seconds']} s", flush=True)


def judged_again(record: dict[str, Any]) -> dict[str, Any]:
    """A saved ablation with the rates and verdicts of the present rules: a change of a rule costs no run."""
    read = from_json(json.dumps(record), AblationRecord)
    runs = [replace(run, rate=depth_rate(run.trajectory, EPSILON)) for run in read.runs]
    at_consensus = read.contraction_at_consensus
    found = predictions.verdicts(runs, is_causal=read.is_causal, at_consensus=at_consensus, epsilon=EPSILON)
    again: dict[str, Any] = json.loads(to_json(replace(read, runs=runs, verdicts=found)))
    return again


# Reading a run --------------------------------------------------------------------------------------------------------


def mark(without: Sequence[str]) -> str:
    """`1·0·1` for norm·residual·MLP without the residual."""
    return "·".join("0" if component in without else "1" for component in NORM_RESIDUAL_MLP)


def consensus(run: dict[str, Any]) -> list[float | None]:
    """Along depth, from the embedding on, massive tokens left out; None where a value is not finite."""
    values = []
    for site in run["trajectory"]:
        left_out = (site["massive_tokens_left_out"] or {}).get("consensus_distance")
        found = left_out or site["consensus_distance"]
        values.append(None if found is None else found["mean"])
    return values


def floor(record: dict[str, Any]) -> float:
    """The rounding floor of the number format that the model was run in."""
    return next(run["rate"]["floor"] for run in record["runs"] if run["rate"])


def number(value: float | None, lowest: float = 0.0) -> str:
    """Two figures; `floor` where only rounding is left, a dash where nothing is finite."""
    if value is None:
        return "–"
    if value <= lowest:
        return "floor"
    if value >= 0.095:
        return f"{value:.2f}"
    if value >= 0.0095:
        return f"{value:.3f}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def lowest(run: dict[str, Any], below: float) -> str:
    """The lowest mean consensus distance after a block, the block, and the extreme sequences there."""
    values = consensus(run)[1:]
    finite = [(v, i) for i, v in enumerate(values) if v is not None]
    value, block = min(finite)
    if value <= below:
        return f"floor, from block {next(i for v, i in finite if v <= below)} on"
    site = run["trajectory"][block + 1]
    found = (site["massive_tokens_left_out"] or {}).get("consensus_distance") or site["consensus_distance"]
    return f"{number(value)} (block {block}; {number(found['min'], below)} to {number(found['max'], below)})"


def rank_share(run: dict[str, Any]) -> str:
    """The lowest share of the attainable affine rank after a block, and the block where it is first met."""
    shares = [
        (s["affine_rank"]["mean"] / s["attainable_affine_rank"]["mean"], s["block"])
        for s in run["trajectory"][1:]
        if s["affine_rank"]
    ]
    share, block = min(shares)
    return f"{share:.0%} (block {block})" if round(share, 2) < 1 else "100%"


def rate(run: dict[str, Any]) -> tuple[str, str]:
    """The rate in words, and the slope of ln r_(l+1) against ln r_l with its interval."""
    found = run["rate"]
    if found is None:
        block = next(i - 1 for i, v in enumerate(consensus(run)) if v is None)
        return f"overflows in block {block}", "–"
    words = found["kind"] if found["kind"] != "none" else "no collapse"
    if found["kind"] == "geometric":
        words += f", × {found['factor']:.2f} per block"
    if found["slope"] is None:
        return words, "–"
    interval = f" [{found['slope_low']:.1f}, {found['slope_high']:.1f}]" if found["slope_low"] is not None else ""
    return words, f"{found['slope']:.2f}{interval}"


def kept_by_attention(run: dict[str, Any]) -> str:
    """The median over blocks of ‖CAV‖/‖CV‖ of each block's most alive head."""
    values = sorted(s["mean"] for s in run["attention_contraction"] if s)
    return number(values[len(values) // 2]) if values else "–"


# Tables ---------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(record: dict[str, Any]) -> str:
    """One row a run: what is left of distance and rank, the rate, and what becomes of the output."""
    below, with_loss = floor(record), any(run["loss"] for run in record["runs"])
    header = ["norm·residual·MLP", "lowest consensus distance", "lowest rank share", "rate", "slope [95 %]"]
    header += ["attention keeps", "output shift", *(["loss (nats)"] if with_loss else [])]
    rows = []
    for run in record["runs"]:
        shift, loss = run["output_shift"], run["loss"]
        row = [f"**{mark(run['without'])}**", lowest(run, below), rank_share(run), *rate(run), kept_by_attention(run)]
        row.append(f"{shift['mean']:.2f}" if shift else "–")
        rows.append([*row, *([f"{loss['mean']:.2f}" if loss else "–"] if with_loss else [])])
    return table(header, rows)


def by_block(record: dict[str, Any]) -> str:
    """One row a site, one column a run."""
    curves = [consensus(run) for run in record["runs"]]
    sites = [site["site"] for site in record["runs"][0]["trajectory"]]
    rows = [[site, *(number(curve[i], floor(record)) for curve in curves)] for i, site in enumerate(sites)]
    return table(["site", *(mark(run["without"]) for run in record["runs"])], rows)


def beside_noted(key: str, record: dict[str, Any], again: dict[str, Any] | None) -> str:
    """The runs that were noted before, with the noted values in the row above ours."""
    below = floor(record)
    found = [("here", {mark(run["without"]): consensus(run) for run in record["runs"]})]
    if again is not None:
        found.append(("here, 100 tokens", {mark(run["without"]): consensus(run) for run in again["runs"]}))
    rows = []
    for name, values in published.NOTED[key].items():
        rows.append([f"**{name}**", "noted", *("…" if v is None else number(v, below) for v in values)])
        rows += [["", label, *(number(v, below) for v in curves[name])] for label, curves in found if name in curves]
    blocks = [str(i) for i in range(len(record["runs"][0]["trajectory"]) - 1)]
    return table(["run", "", "embedding", *blocks], rows)


def verdicts(record: dict[str, Any]) -> str:
    """Each prediction against what was observed."""
    answers = {True: "as predicted", False: "**not as predicted**", None: "open"}
    rows = [
        [v["prediction"], v["measure"].replace("_", " "), v["predicted"], v["observed"], answers[v["agrees"]]]
        for v in record["verdicts"]
    ]
    return table(["prediction", "measured in", "predicted", "observed", ""], rows)


def positions_table(found: Sequence[dict[str, Any]]) -> str:
    """Without residuals, with the relative bias as it is and with its table at zero."""
    rows = []
    for each in found:
        values = consensus(each["run"])
        curve = " ".join(number(v, FLOAT64_FLOOR) for v in values)
        own = each["second_eigenvalues"]
        heads = f"{number(min(own))} to {number(max(own))}" if max(own) else "0"
        words, _ = rate(each["run"])
        kept = number(max(each["contraction_at_consensus"]), 1e-8).replace("floor", "0")
        rows.append([each["model"], each["table"], curve, words, kept, heads])
    header = ["model", "bias table", "consensus distance by block, without residuals", "rate"]
    return table([*header, "‖CA‖ at consensus", "\\|λ₂\\| of the heads’ own patterns"], rows)


def answer(found: dict[str, Any]) -> str:
    """Are production models degraded without MLP blocks? In rank, distance and output, over the trained models."""
    names = {
        "mpnet": "all-mpnet-base-v2",
        "gemma3": "Gemma-3-270M",
        "smollm2": "SmolLM2-135M",
        "albert": "RXNMapper's ALBERT",
        "minilm": "MiniLM",
    }
    there = {key: name for key, name in names.items() if key in found}
    runs = {key: _run(found, key, ("mlp",)) for key in there}
    ranks = [rank_share(run) for run in runs.values()]
    ends: dict[str, tuple[float, float]] = {}
    for key, run in runs.items():
        values = [v for v in consensus(run) if v is not None]
        ends[there[key]] = (values[0], min(values))
    distances = [f"{name} {number(start)} → {number(low)}" for name, (start, low) in ends.items()]
    shifts = [run["output_shift"]["mean"] for run in runs.values()]
    losses = {key: run["loss"]["mean"] for key, run in runs.items() if run["loss"] is not None}
    lost = sum(share != "100%" for share in ranks)
    in_rank = "none loses a dimension" if not lost else f"{lost} lose dimensions"
    return (
        f"**Are production models degraded without their MLP blocks?** Of the {len(there)} trained models here, {in_rank}, but in "
        f"consensus distance {fallen(ends)} ({'; '.join(distances)}). Their output changes: the mean output vector turns by "
        f"1 − cosine = {min(shifts):.2f} to {max(shifts):.2f}, and {against_a_guess(losses, there)}."
    )


def fallen(ends: Mapping[str, tuple[float, float]]) -> str:
    """Which models fall to a tenth of their distance at the embedding or less, and what the others keep."""
    kept = {name: low / start for name, (start, low) in ends.items()}
    others = [f"{name} keeps {share:.1f} of it" for name, share in kept.items() if share > FALLEN]
    count = len(kept) - len(others)
    if not others:
        return "all of them fall to a tenth of the embedding's or less"
    if not count:
        return f"none falls to a tenth of the embedding's: {', '.join(others)}"
    return f"{count} of them {'falls' if count == 1 else 'fall'} to a tenth of the embedding's or less, while {', '.join(others)}"


def against_a_guess(losses: Mapping[str, float], names: Mapping[str, str]) -> str:
    """The losses beside that of a uniform guess over the model's tokens, ln of their number."""
    guesses = {key: math.log(VOCABULARY[key]) for key in losses}
    listed = ", ".join(
        f"{names[key]} {loss:.1f} nats, where a uniform guess over {VOCABULARY[key]:,} tokens has {guesses[key]:.1f}"
        for key, loss in losses.items()
    )
    better = sum(loss < guesses[key] for key, loss in losses.items())
    if not better:
        said = "the language models do no better than a uniform guess"
    elif better < len(losses):
        said = f"of the {len(losses)} language models {better} still {'does' if better == 1 else 'do'} better than a uniform guess"
    else:
        said = "the language models still do better than a uniform guess"
    return f"{said} ({listed})"


FALLEN = 0.1
VOCABULARY = {"gemma3": 262_144, "smollm2": 49_152}


def dong_table(found: dict[str, Any]) -> str:
    """The ratio after the last block: a published row, and ours under it; over seeds, the mean and the range."""
    variants = list(pretrained.VARIANTS)
    ours = {model["counterpart"]: (name, model) for name, model in found.items()}
    rows = []
    for counterpart, values in published.DONG.items():
        rows.append([f"{counterpart}: published", "32", *(f"{v:.3f}" for v in values)])
        if counterpart in ours:
            name, model = ours[counterpart]
            last = [[seed[-1] for seed in model["ratios"][variant]] for variant in variants]
            times = f" × {len(last[0])} seeds" if len(last[0]) > 1 else ""
            rows.append([f"**{name}: here**", f"{model['sequences']}{times}", *map(_three, last)])
    return table(["model", "sequences", *variants], rows)


def _three(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if mean < 5e-4:
        return f"0.000 ({number(mean)})"
    return f"{mean:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def _plus_minus(values: Sequence[float]) -> str:
    mean, half = mean_and_half(values)
    return f"{mean:.2f} ± " + (f"{half:.2f}" if half >= 0.005 else "<0.01")


def _spread(values: Sequence[float], below: float = 0.0) -> str:
    low, high = number(min(values), below), number(max(values), below)
    return low if low == high else f"{low} to {high}"


EPSILON = 2.0**-52  # every grid here runs in float64
FLOAT64_FLOOR = 16 * EPSILON


def trained_table(models: Sequence[dict[str, Any]]) -> str:
    """For each component: trained without it, and removed from the trained whole model."""
    main = [m for m in models if (m["depth"], m["width"]) == (language_models.DEPTH, language_models.WIDTH)]
    rows = []
    for component in language_models.WITHOUT:
        for key, label in (("trained_without", "trained without {}"), ("removed", "{} removed from the trained whole")):
            if not component and key == "removed":
                continue
            other = "removed" if key == "trained_without" else "trained_without"
            chosen = [m for m in main if tuple(m[key]) == component and not m[other]]
            rows.append(_row(label.format(NAMES[component[0]]) if component else "**whole**", chosen))
    return table(
        ["", "parameters", "held-out loss (nats per byte)", "consensus distance by block", "lowest rank share"], rows
    )


def _row(label: str, chosen: Sequence[dict[str, Any]]) -> list[str]:
    curves = zip(*(m["consensus"] for m in chosen), strict=True)
    depth = " · ".join(number(sum(values) / len(values), FLOAT64_FLOOR) for values in curves)
    share = _spread([min(m["rank_share"][1:]) for m in chosen])
    return [label, f"{chosen[0]['parameters']:,}", _plus_minus([m["loss"] for m in chosen]), depth, share]


def shapes_table(models: Sequence[dict[str, Any]]) -> str:
    rows = []
    for depth, width in language_models.SHAPES:
        of_shape = [m for m in models if (m["depth"], m["width"]) == (depth, width)]
        chosen = [m for m in of_shape if not m["trained_without"] and not m["removed"]]
        lows = _spread([min(m["consensus"][1:]) for m in chosen])
        share = _spread([min(m["rank_share"][1:]) for m in chosen])
        loss = _plus_minus([m["loss"] for m in chosen])
        rows.append([f"{depth} × {width}", f"{chosen[0]['parameters']:,}", loss, lows, share])
    return table(
        [
            "blocks × width",
            "parameters",
            "held-out loss (nats per byte)",
            "lowest consensus distance",
            "lowest rank share",
        ],
        rows,
    )


# Document -------------------------------------------------------------------------------------------------------------


def document() -> None:
    """Write docs/results.md and its pictures from the saved numbers, if they are whole."""
    saved = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in SAVED.glob("*.json")}
    missing = [section for section in SECTIONS if section not in saved]
    if missing:
        print(f"{DOCUMENT.name} was left as it is: {', '.join(missing)} not measured yet", flush=True)
        return
    found = {section: content["found"] for section, content in saved.items()}
    for key in pretrained.SUBJECTS:
        if key in found:
            found[key]["grid"] = judged_again(found[key]["grid"])
    for key in pretrained.SUBJECTS:
        if key in found:
            record = found[key]["grid"]
            curves = {mark(run["without"]): consensus(run) for run in record["runs"]}
            pictures.grid(curves, floor(record), IMAGES / f"results-{key}.svg")
    if "dong" in found:
        pictures.dong(found["dong"], IMAGES / "results-dong.svg")
    if "trained" in found:
        pictures.trained(_trained_curves(found["trained"]["models"]), IMAGES / "results-trained.svg")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # markdown, from our own numbers
    )
    text = environment.get_template("results.md.j2").render(
        found=found,
        seconds={section: content["seconds"] for section, content in saved.items()},
        subjects=pretrained.SUBJECTS,
        noted=published.NOTED,
        summary=summary,
        by_block=by_block,
        beside_noted=beside_noted,
        verdicts=verdicts,
        dong_table=dong_table,
        positions_table=positions_table,
        answer=answer(found),
        position_gates=gates_document.text(found["gates"], IMAGES).strip() if "gates" in found else "",
        trained_table=trained_table,
        shapes_table=shapes_table,
        language=language_models,
        run=lambda key, *without: _run(found, key, without),
        floor_block=lambda key, *without: _run(found, key, without)["rate"]["floor_block"] + 1,
        lowest_value=lambda key, *without: min(v for v in consensus(_run(found, key, without)) if v is not None),
        **_prose(found),
        consensus=consensus,
        number=number,
    )
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}", flush=True)


def _run(found: dict[str, Any], key: str, without: Sequence[str]) -> dict[str, Any]:
    """The run of a subject's grid without exactly these components."""
    run: dict[str, Any] = next(r for r in found[key]["grid"]["runs"] if set(r["without"]) == set(without))
    return run


def _prose(found: dict[str, Any]) -> dict[str, Any]:
    """What the prose says beside the tables."""
    first = next(found[key]["grid"] for key in pretrained.SUBJECTS if key in found)
    alone = found["albert"]["each_alone"] if "albert" in found else []
    alive = [sequence for sequence in alone if sequence["consensus"] > FLOAT64_FLOOR]
    ranks = sorted({round(sequence["affine_rank"]) for sequence in alive})
    models = found["trained"]["models"] if "trained" in found else []
    losses = [m["loss"] for m in models if list(m["trained_without"]) == ["residual"]]
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        "alone": alone,
        "at_floor": len(alone) - len(alive),
        "alive_ranks": " to ".join(str(rank) for rank in (ranks[0], ranks[-1])) if ranks else "none",
        "no_residual_loss": sum(losses) / len(losses) if losses else math.nan,
        "noted_about": published.NOTED_ABOUT,
        "differs": published.DIFFERS,
    }


def _trained_curves(models: Sequence[dict[str, Any]]) -> list[tuple[str, str, Sequence[float]]]:
    curves = []
    for m in models:
        if (m["depth"], m["width"]) != (language_models.DEPTH, language_models.WIDTH):
            continue
        component = next(iter([*m["trained_without"], *m["removed"]]), None)
        name = f"no {NAMES[component]}" if component else "whole"
        panels = ("trained without", "removed from the trained whole")
        for panel in panels if not component else panels[:1] if m["trained_without"] else panels[1:]:
            curves.append((panel, name, m["consensus"]))
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*SECTIONS, "document"]
    parser.add_argument("--only", action="append", choices=choices, help="measure only this section; repeatable")
    options = parser.parse_args()
    for section in SECTIONS:
        if section in options.only if options.only else not is_measured(section):
            measure(section)
    document()


if __name__ == "__main__":
    main()
