"""The same small language model with and without position gates: one seed, one order of the data, everything else alike.

plain      the model of `studies.language_models`
gated      the same weights, its output projections behind gates that start at 1
perturbed  the same, the gates started at random around 1
constant   as many parameters as `gated`, but the gates see position 0 everywhere: what does position itself contribute?
"""

from __future__ import annotations

import math
import time
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

import uncollapse as uc
from studies.language_models import BATCH, CONTEXT, HEADS, LanguageModel, corpus, fit, loss_of
from uncollapse.gates.broken import gate_report

DEPTH, WIDTH = 2, 96
STEPS, EVERY = 400, 50
SEEDS = (0, 1, 2, 3, 4)
ARMS = ("plain", "gated", "perturbed", "constant")
PERTURBATION = 0.25


def model(arm: str, seed: int) -> LanguageModel:
    """Weights drawn as for the plain model whatever the arm, then the gates."""
    torch.manual_seed(seed)
    made = LanguageModel(DEPTH, WIDTH)
    for number, block in enumerate(made.blocks if arm != "plain" else ()):
        perturbation = PERTURBATION if arm == "perturbed" else 0.0
        gate = uc.PositionGatedProjection(block.projection, HEADS, perturbation=perturbation, seed=100 * seed + number)
        if arm == "constant":
            gate.register_forward_pre_hook(lambda _, given: (given[0], _nowhere(given[0])))
        block.projection = gate
    return made


def _nowhere(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], dtype=torch.long)


def windows(text: Tensor, context: int = CONTEXT, most: int = 10**6) -> Tensor:
    """Windows that do not overlap, over the whole text; evenly thinned out to `most`."""
    whole = text.unfold(0, context + 1, context + 1)
    return whole[torch.linspace(0, len(whole) - 1, min(most, len(whole))).long()]


@torch.no_grad()
def judged(made: nn.Module, held_out: Tensor) -> float:
    """Loss on windows of text it never saw."""
    device = next(made.parameters()).device
    sums = [float(loss_of(made(w[:, :-1]).logits.float(), w[:, 1:])) * len(w) for w in held_out.to(device).split(BATCH)]
    return sum(sums) / len(held_out)


def gates_now(made: nn.Module, arm: str, context: int = CONTEXT) -> list[dict[str, Any]]:
    """Rank, condition, surviving gauge and range of every layer's gates, at the positions the model is trained on."""
    if arm == "plain":
        return []
    at = torch.zeros(context, dtype=torch.long) if arm == "constant" else torch.arange(context)
    return [
        {
            "rank": gate.rank,
            "condition": gate.condition if math.isfinite(gate.condition) else None,
            "surviving": gate.surviving_dimension,
            "plain": gate.plain_dimension,
            "smallest": gate.smallest,
            "largest": gate.largest,
        }
        for gate in gate_report(made, at.to(next(made.parameters()).device))
    ]


def run(arm: str, seed: int, steps: int = STEPS, every: int = EVERY) -> tuple[dict[str, Any], LanguageModel]:
    """One training, with what it did on the way, and the model."""
    training, held_out = corpus()
    found, made = record(model(arm, seed), arm, seed, training, windows(held_out), steps, every)
    gate = made.blocks[0].projection
    found["overhead"] = gate.overhead if isinstance(gate, uc.PositionGatedProjection) else 0.0
    return found, made


def record(
    made: nn.Module, arm: str, seed: int, training: Tensor, judge: Tensor, steps: int, every: int, **recipe: Any
) -> tuple[dict[str, Any], Any]:
    """Train it by the common recipe; every so many steps, note the losses and the gates."""
    curve: list[dict[str, Any]] = []
    since: list[float] = []
    context = recipe.get("context", CONTEXT)

    def watch(step: int, loss: float) -> None:
        since.append(loss)
        if step % every == 0 or step == steps:
            note(step)

    def note(step: int) -> None:
        mean = fmean(since) if since else None
        gates = gates_now(made, arm, context)
        curve.append({"step": step, "training": mean, "held_out": judged(made, judge), "gates": gates})
        since.clear()

    start = time.process_time()
    note(0)
    fit(made, training, seed, steps, watch, **recipe)
    parameters = sum(p.numel() for p in made.parameters())
    found = {"arm": arm, "seed": seed, "parameters": parameters, "curve": curve}
    return found | {"seconds": round(time.process_time() - start, 1)}, made.eval()


def cost(pairs: int = 100) -> dict[str, Any]:
    """A training step of the gated model over one of the plain model, in turns in one process, in CPU time of its one thread."""
    training, _ = corpus()
    steps = []
    for arm in ("plain", "gated"):
        made = model(arm, 0)
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
        steps.append((made, optimizer))
    ratios = []
    for i in range(pairs + 5):
        window = training[torch.randint(len(training) - CONTEXT - 1, (BATCH, 1)) + torch.arange(CONTEXT + 1)]
        taken = [_step(made, optimizer, window) for made, optimizer in (steps if i % 2 else steps[::-1])]
        ratios.append(taken[1] / taken[0] if i % 2 else taken[0] / taken[1])
    ratios = sorted(ratios[5:])  # the first are warming up
    return {
        "ratio": median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[3 * len(ratios) // 4],
        "pairs": pairs,
    }


def _step(made: nn.Module, optimizer: torch.optim.Optimizer, window: Tensor) -> float:
    start = time.process_time()
    optimizer.zero_grad()
    loss_of(made(window[:, :-1]).logits, window[:, 1:]).backward()
    optimizer.step()
    return time.process_time() - start
