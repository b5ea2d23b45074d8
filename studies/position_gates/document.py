"""The section of docs/results.md on position gates, from the saved numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2

import uncollapse as uc
from studies.position_gates import large, pictures, planted, recovery, training
from uncollapse.measures.student import mean_and_half

BEGIN, END = "<!-- position gates: begin -->", "<!-- position gates: end -->"
NAMES = {
    "plain": "plain",
    "gated": "gated",
    "perturbed": "gated, perturbed start",
    "constant": "constant gates (control)",
}


def plus_minus(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    mean, half = mean_and_half(values)
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def short(value: float) -> str:
    """Two figures; a count as it is."""
    if isinstance(value, int):
        return str(value)
    text = f"{value:#.2g}".removesuffix(".").replace("e-0", "e-")
    return f"{value:.0f}" if "e+" in text else text


def exactly(values: Sequence[float]) -> str:
    """Mean and interval of small numbers, with two figures of the interval."""
    mean, half = mean_and_half(values)
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def spread(values: Sequence[float]) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Numbers:
    """What the prose and the tables ask of the saved runs."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.models = found["models"]
        self.fixed = [run for seed in found["planted"] for run in seed["fixed"]]
        self.switching = [run for seed in found["planted"] for run in seed["switching"]]

    def of(self, arm: str) -> list[dict[str, Any]]:
        """The trainings of an arm, by seed."""
        return sorted((m for m in self.models if m["arm"] == arm), key=lambda m: int(m["seed"]))

    @property
    def seeds(self) -> int:
        return len(self.of("plain"))

    @property
    def minutes(self) -> float:
        return sum(run["cpu_seconds"] for run in [*self.models, *self.found["planted"]]) / 60

    # The language model -----------------------------------------------------------------------------------------------
    def final(self, arm: str, key: str = "held_out") -> list[float]:
        return [m["curve"][-1][key] for m in self.of(arm)]

    def difference(self, arm: str, key: str = "held_out", of: str = "plain") -> list[float]:
        """By seed."""
        return [a - b for a, b in zip(self.final(arm, key), self.final(of, key), strict=True)]

    def no_difference(self, arm: str, key: str = "held_out") -> bool:
        """Whether the interval of the paired difference from the plain model contains 0."""
        mean, half = mean_and_half(self.difference(arm, key))
        return abs(mean) <= half

    def overall(self) -> str:
        if self.no_difference("gated"):
            return "no difference"
        return "a lower loss" if fmean(self.difference("gated")) < 0 else "a higher loss"

    def conclusion(self) -> str:
        """Which arms' losses differ from the plain model's, and how much could have been seen."""
        words = []
        for arm in training.ARMS[1:]:
            for key, name in (("held_out", "held-out"), ("training", "training")):
                if not self.no_difference(arm, key):
                    which = "lower" if fmean(self.difference(arm, key)) < 0 else "higher"
                    words.append(f"The {name} loss of the arm *{NAMES[arm]}* is {which} than the plain model's.")
        seen = mean_and_half(self.difference("gated"))[1]
        words = words or [
            "No arm's loss differs from the plain model's, held-out or in training: every interval contains 0."
        ]
        return " ".join([*words, f"A difference in held-out loss below {seen:.3f} nats could not have been seen."])

    def condition(self, arm: str, step: int = -1) -> float:
        """The median over blocks and seeds, after the given number of noted steps; at the end by default."""
        at = self.of(arm)[0]["curve"][step]["step"]
        return median(v for block in range(training.DEPTH) for v in self.gates(arm, at, "condition", block))

    @property
    def features(self) -> int:
        """How many features of the position the gates have."""
        gate = training.model("gated", 0).blocks[0].projection
        assert isinstance(gate, uc.PositionGatedProjection)
        return gate.position_width

    def losses(self) -> str:
        rows = []
        for arm in training.ARMS:
            row = [NAMES[arm], f"{self.of(arm)[0]['parameters']:,}"]
            row += [plus_minus(self.final(arm, key)) for key in ("training", "held_out")]
            row += (
                ["–", "–"]
                if arm == "plain"
                else [plus_minus(self.difference(arm, key), 4, "+") for key in ("training", "held_out")]
            )
            rows.append(row)
        header = ["", "parameters", "training loss", "held-out loss", "training, minus plain", "held-out, minus plain"]
        return table(header, rows)

    def gates(self, arm: str, step: int, key: str, block: int) -> list[float]:
        values = [p["gates"][block][key] for m in self.of(arm) for p in m["curve"] if p["step"] == step]
        return [math.inf if value is None else value for value in values]

    def gates_table(self) -> str:
        """Over training: rank, condition and what survives of the gauge."""
        steps = [p["step"] for p in self.of("gated")[0]["curve"]]
        rows = []
        for arm in ("gated", "perturbed"):
            for step in steps[:2] + steps[2::2]:
                cells = []
                for block in range(training.DEPTH):
                    condition = self.gates(arm, step, "condition", block)
                    finite = (
                        "∞" if not math.isfinite(max(condition)) else f"{median(condition):.0f} ({spread(condition)})"
                    )
                    low = min(self.gates(arm, step, "smallest", block))
                    high = max(self.gates(arm, step, "largest", block))
                    cells += [spread(self.gates(arm, step, "rank", block)), finite, f"{low:.2f} to {high:.2f}"]
                survives = [v for block in range(training.DEPTH) for v in self.gates(arm, step, "surviving", block)]
                least, most = (f"{bound:,.0f}" for bound in (min(survives), max(survives)))
                rows.append([NAMES[arm], str(step), *cells, least if least == most else f"{least} to {most}"])
        header = ["", "step"]
        for block in range(training.DEPTH):
            header += [f"rank, block {block}", "condition", "gates"]
        return table([*header, "surviving gauge"], rows)

    # Recovery ---------------------------------------------------------------------------------------------------------
    def placed(self, arm: str, observer: str, positions: int) -> list[dict[str, Any]]:
        return [
            p for m in self.of(arm) for p in m["placed"] if (p["observer"], p["positions"]) == (observer, positions)
        ]

    def recovery_errors(self, arm: str, observer: str, positions: int) -> list[float]:
        return [error for p in self.placed(arm, observer, positions) for error in p["errors"]]

    def recovery_table(self, observer: str) -> str:
        """The median over heads, blocks and seeds, the worst, and how many directions are predicted to stay unresolved."""
        arms = ("plain", "constant", "gated", "perturbed")
        rows = []
        for m in recovery.POSITIONS:
            row = [str(m)]
            for arm in arms:
                errors = self.recovery_errors(arm, observer, m)
                left = spread([p["unresolved"] for p in self.placed(arm, observer, m)])
                row.append(f"{short(median(errors))}, worst {short(max(errors))} ({left})")
            rows.append(row)
        return table(["positions", *(NAMES[arm] for arm in arms)], rows)

    def heads_table(self, positions: Sequence[int] = (4, 16, 64)) -> str:
        """The error of each head of the gated models in the shared channel, the geometric mean over seeds."""
        rows = []
        for block in range(training.DEPTH):
            for m in positions:
                chosen = [p for p in self.placed("gated", "shared channel", m) if p["block"] == block]
                per_head = zip(*(p["errors"] for p in chosen), strict=True)
                predicted = zip(*(p["from_noise"] for p in chosen), strict=True)
                cells = [
                    f"{short(_geometric(seen))} ({short(_geometric(noise))})"
                    for seen, noise in zip(per_head, predicted, strict=True)
                ]
                rows.append([str(block), str(m), *cells])
        return table(["block", "positions", *(f"head {h}" for h in range(len(rows[0]) - 2))], rows)

    def noise_ratio(self) -> str:
        """Error over what the noise alone predicts, wherever the prediction is that all heads are recovered."""
        ratios = [
            seen / noise
            for arm in ("gated", "perturbed")
            for m in recovery.POSITIONS
            for p in self.placed(arm, "shared channel", m)
            if p["unresolved"] == 0
            for seen, noise in zip(p["errors"], p["from_noise"], strict=True)
        ]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    def recurring_values(self, arm: str, key: str) -> list[float]:
        return [value for m in self.of(arm) for r in m["recurring"] for value in r[key]]

    # Planted tasks ----------------------------------------------------------------------------------------------------
    def planted_table(self) -> str:
        rows = []
        for task in planted.TASKS:
            for arm in planted.ARMS:
                chosen = [run for run in self.fixed if (run["task"], run["arm"]) == (task, arm)]
                floor = f"{planted.FLOOR[task]:.1f}" if arm == "no gates, MLP behind" else "–"
                loss = exactly([run["loss"] for run in chosen])
                rows.append([task, arm, f"{chosen[0]['parameters']:,}", floor, loss])
        return table(["task", "layer", "parameters", "cannot be below", "error"], rows)

    def planted_errors(self, task: str, arm: str, switching: bool = False) -> list[float]:
        runs = self.switching if switching else self.fixed
        return [run["loss"] for run in runs if (run["task"], run["arm"]) == (task, arm)]

    def switching_table(self) -> str:
        rows = []
        for task, arm in dict.fromkeys((run["task"], run["arm"]) for run in self.switching):
            errors = self.planted_errors(task, arm, switching=True)
            rows.append([task, arm, short(median(errors)), short(max(errors))])
        return table(["task", "layer", "error, median over seeds", "worst seed"], rows)

    def worst_switching(self) -> float:
        return max(run["loss"] for run in self.switching)

    def narrow_table(self) -> str:
        """Recovery in the planted layers, whose sum is half as wide as their heads together."""
        rows = []
        for i, m in enumerate([r["positions"] for r in self.fixed[0]["recovered"]]):
            row = [str(m)]
            for arm in ("no gates, MLP behind", "learned gates"):
                chosen = [run["recovered"][i] for run in self.fixed if (run["task"], run["arm"]) == ("halves", arm)]
                left = spread([r["unresolved"] for r in chosen])
                row.append(f"{spread([e for r in chosen for e in r['errors']])} ({left})")
            rows.append(row)
        return table(["positions", "no gates", "learned gates"], rows)

    def large_table(self) -> str:
        """The larger runs, where there are any."""
        rows = []
        for arm in ("plain", "gated"):
            chosen = [run for run in self.found["large"] if run["arm"] == arm]
            losses = [run["curve"][-1]["held_out"] for run in chosen]
            said = plus_minus(losses) if len(losses) > 1 else short(losses[0])
            rows.append([arm, f"{chosen[0]['parameters']:,}", chosen[0]["where"], str(len(chosen)), said])
        return table(["", "parameters", "where", "seeds", "held-out loss (nats per byte)"], rows)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


# Pictures -------------------------------------------------------------------------------------------------------------


def _band(values: Sequence[float]) -> dict[str, float]:
    mean, half = mean_and_half(values)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def draw(numbers: Numbers, images: Path) -> None:
    losses: dict[str, list[pictures.Row]] = {"training loss": [], "held-out loss": []}
    differences, conditions = [], []
    for arm in training.ARMS:
        for i, point in enumerate(numbers.of(arm)[0]["curve"]):
            common = {"arm": arm, "step": point["step"]}
            at = {key: [m["curve"][i][key] for m in numbers.of(arm)] for key in ("training", "held_out")}
            plain = [m["curve"][i]["held_out"] for m in numbers.of("plain")]
            if i:  # at step 0 nothing is learned, and the axis would show nothing else
                losses["training loss"].append(common | _band(at["training"]))
                losses["held-out loss"].append(common | _band(at["held_out"]))
            if arm != "plain":
                differences.append(common | _band([a - b for a, b in zip(at["held_out"], plain, strict=True)]))
            for block in range(training.DEPTH if arm in ("gated", "perturbed") else 0):
                values = numbers.gates(arm, point["step"], "condition", block)
                if math.isfinite(max(values)):
                    conditions.append(common | {"block": block, "mean": median(values)})
    pictures.training(losses, differences, conditions, images / "results-gates-training.svg")
    rows = []
    for arm in training.ARMS:
        for observer in ("shared channel", "stream"):
            for m in recovery.POSITIONS:
                errors = numbers.recovery_errors(arm, observer, m)
                common = {"arm": arm, "observer": observer, "positions": m}
                rows.append(common | {"mean": median(errors), "low": min(errors), "high": max(errors)})
    pictures.recovery(rows, images / "results-gates-recovery.svg")
    rows = []
    for task in planted.TASKS:
        for arm in planted.ARMS:
            curves = [run["curve"] for run in numbers.fixed if (run["task"], run["arm"]) == (task, arm)]
            for points_of_step in zip(*curves, strict=True):
                values = [value for _, value in points_of_step]
                common = {"task": task, "arm": arm, "step": points_of_step[0][0]}
                rows.append(common | {"mean": fmean(values), "low": min(values), "high": max(values)})
    pictures.planted(rows, planted.FLOOR, images / "results-gates-planted.svg")


# Text -----------------------------------------------------------------------------------------------------------------


def text(found: dict[str, Any], images: Path) -> str:
    """The section, and its pictures in `images`."""
    numbers = Numbers(found)
    draw(numbers, images)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # markdown, from our own numbers
    )
    given = {"training": training, "planted": planted, "recovery": recovery, "large": large, "interval": mean_and_half}
    given |= {"median": median, "short": short, "spread": spread, "plus_minus": plus_minus, "numbers": numbers}
    return environment.get_template("section.md.j2").render(**given)


def splice(document: Path, section: str) -> None:
    """Put the section in its place in the document, atomically."""
    whole = document.read_text(encoding="utf-8")
    before, rest = whole.split(BEGIN)
    after = rest.split(END)[1]
    beside = document.with_suffix(".new")
    beside.write_text(f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{after}", encoding="utf-8")
    os.replace(beside, document)
