"""Does attribution name the head that was planted? The layers of `planted`, with gates and without, by who observes.

At every position one of two heads is asked for, so the truth is known. The number that is attributed is <y_i, t_i>, how far the
layer's output at a token lies along what was asked for there. A head's direct effect is <O_h W_h g_h(i), t_i>. Three observers:

before       records the heads before the projection: the effects themselves
behind       sees y, with an error of 1 % of its size, knows W_O and the gates, and takes the least-norm heads that give y
recurring    the same, where the same contents stand at two positions, one in each half: least squares over both

    python -m studies.position_gates.attribution     writes the table into docs/attribution.md (two minutes)
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import uncollapse as uc
from studies.position_gates import planted
from studies.position_gates.planted import BATCH, HEAD_WIDTH, HEADS, RATE, STEPS, TASKS, TOKENS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "attribution.md"
BEGIN, END = "<!-- planted heads: begin -->", "<!-- planted heads: end -->"
ARMS = ("no gates", "gates")
OBSERVERS = ("before", "behind", "recurring")
SEEDS = (0, 1, 2)
NOISE = 0.01


def trained(task: str, arm: str, seed: int, steps: int = STEPS) -> nn.Module:
    """A projection behind the two fixed heads, trained on a task."""
    torch.manual_seed(seed)
    made: nn.Module = nn.Linear(HEADS * HEAD_WIDTH, HEAD_WIDTH)
    if arm == "gates":
        made = planted.layer("sinusoidal gates", seed)
    optimizer = torch.optim.Adam(made.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        outputs = planted.head_outputs(torch.randn(BATCH, TOKENS, HEAD_WIDTH, generator=draws))
        loss = functional.mse_loss(made(outputs), planted.target(task, outputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return made


@torch.no_grad()
def judged(made: nn.Module, task: str, seed: int) -> dict[str, dict[str, float]]:
    """By observer: the share of tokens at which the head that was asked for has the largest effect, and the error of the effects
    relative to their size."""
    contents = torch.randn(64, TOKENS, HEAD_WIDTH, generator=torch.Generator().manual_seed(10_000 + seed)).double()
    contents[:, TOKENS // 2 :] = contents[:, : TOKENS // 2]  # what stands in the first half recurs in the second
    outputs = planted.head_outputs(contents)
    half = torch.arange(TOKENS) % (TOKENS // 2)
    outputs = outputs[:, half]  # also around the ends
    asked = planted.target(task, outputs)
    gates = torch.ones(TOKENS, HEADS, dtype=torch.float64)
    projection = made
    if isinstance(made, uc.PositionGatedProjection):
        gates, inner = made.gates(torch.arange(TOKENS)).double(), made.projection
        assert isinstance(inner, nn.Module)
        projection = inner
    weight = projection.weight
    assert isinstance(weight, Tensor)
    blocks = weight.T.double().unflatten(0, (HEADS, HEAD_WIDTH))
    # [token, mixed, width]: the map from both heads to the sum, at each position
    maps = (gates[:, :, None, None] * blocks).flatten(1, 2)
    heads = outputs.unflatten(-1, (HEADS, HEAD_WIDTH))
    y = torch.einsum("btm,tmd->btd", outputs, maps)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = y + NOISE * noise * y.norm(dim=-1, keepdim=True) / HEAD_WIDTH**0.5
    alone = torch.einsum("btd,tdm->btm", y, torch.linalg.pinv(maps, rtol=1e-6))
    first, second = torch.arange(TOKENS // 2), torch.arange(TOKENS // 2) + TOKENS // 2
    both = torch.cat([maps[first], maps[second]], -1)
    told = torch.einsum("btd,tdm->btm", torch.cat([y[:, first], y[:, second]], -1), torch.linalg.pinv(both, rtol=1e-3))
    seen = {
        "before": heads,
        "behind": alone.unflatten(-1, (HEADS, -1)),
        "recurring": told[:, half].unflatten(-1, (HEADS, -1)),
    }

    def effects(known: Tensor) -> Tensor:
        written = torch.einsum("bthk,hkd->bthd", known, blocks) * gates[:, :, None]
        return (written * asked[:, :, None]).sum(-1)

    truth = effects(heads)
    i = torch.arange(TOKENS)
    right = torch.where(i < TOKENS // 2 if task == "halves" else i % 2 == 0, 0, 1)
    found = {}
    for observer, known in seen.items():
        effect = effects(known)
        other = effect.gather(-1, 1 - right.expand(len(effect), -1)[..., None])
        own = effect.gather(-1, right.expand(len(effect), -1)[..., None])
        error = (effect - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        close = (own - other).abs() <= 1e-3 * truth.square().mean().sqrt()  # no head stands out: half a point
        named = torch.where(close, 0.5, (own > other).double())
        found[observer] = {"named": float(named.mean()), "error": float(error)}
    return found


def table(found: dict[tuple[str, str], list[dict[str, dict[str, float]]]]) -> str:
    """The results as a Markdown table."""
    rows = ["| task | projection | observer | the right head is named | error of an effect |", "|---|---|---|---|---|"]
    for (task, arm), seeds in found.items():
        for observer in OBSERVERS:
            named = fmean(each[observer]["named"] for each in seeds)
            error = fmean(each[observer]["error"] for each in seeds)
            name = "–" if task == "everywhere alike" else f"{100 * named:.0f} %"
            rows.append(f"| {task} | {arm} | {observer} | {name} | {100 * error:.1f} % |")
    return "\n".join(rows)


def run(seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> dict[tuple[str, str], list[Any]]:
    """All tasks, with gates and without."""
    return {
        (task, arm): [judged(trained(task, arm, seed, steps), task, seed) for seed in seeds]
        for task in TASKS
        for arm in ARMS
    }


def main() -> None:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{BEGIN}\n\n{table(run())}\n\n{END}"
    DOCUMENT.write_text(before + text + after, encoding="utf-8")
    print(f"wrote {DOCUMENT.name}")


if __name__ == "__main__":
    main()
