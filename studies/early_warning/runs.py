"""One run: a small language model trained on characters, watched by the monitor and by the rules that people use without one."""

from __future__ import annotations

import functools
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import uncollapse as uc
from studies.early_warning.models import VOCABULARY, LanguageModel, Shape

BATCH, EVERY, PROBED = 8, 5, 8
HELD_OUT = 0.9  # the probe comes from the text behind this share of it
Fault = Callable[[LanguageModel, int], None]


@dataclass(frozen=True)
class Scenario:
    """A way of training. `phenomenon`: what it fails of, empty for a healthy twin. `fault`: what is done to the model after each
    step, which changes something from step `begins` on."""

    name: str
    shape: Shape
    rate: float
    warm_up: int
    steps: int
    phenomenon: str = ""
    twin: str = ""
    fault: Fault | None = None
    begins: int = 0


@dataclass(frozen=True)
class Run:
    """What a run showed: the loss at every step, the monitor's alarms, and when the other rules would have spoken."""

    scenario: str
    seed: int
    losses: list[float]
    alarms: list[tuple[int, int, str, str, int | None, str]] = field(default_factory=list)
    others: dict[str, int | None] = field(default_factory=dict)
    consensus: list[tuple[int, float]] = field(default_factory=list)


def decaying(model: LanguageModel, step: int) -> None:
    """From step 80 on all residual connections keep 2 % less of the stream at every step."""
    if step >= 80:
        for number in range(len(model.blocks)):
            model.get_buffer(f"blocks.{number}.kept").mul_(0.98)


def growing(model: LanguageModel, step: int) -> None:
    """From step 80 on the queries and keys of block 1 grow by 1.5 % at every step."""
    if step >= 80:
        weight = model.get_parameter("blocks.1.attention.read.weight")
        weight.data[: 2 * weight.shape[1]] *= 1.015


SMALL = Shape()
DEEP = Shape(blocks=18, width=32, tokens=32, wide_start=True)
SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "post-norm, 18 blocks, no warm-up", Shape(18, 32, 4, 32, post=True, wide_start=True), 1e-3, 0, 160,
        "rank-collapse-depth", "pre-norm, 18 blocks",
    ),
    Scenario("pre-norm, 18 blocks", DEEP, 1e-3, 40, 160),
    Scenario("post-norm, 4 blocks, warm-up", Shape(post=True), 1e-3, 50, 300),
    Scenario("learning rate 5e-2", SMALL, 5e-2, 0, 200, "entropy-collapse", "learning rate 2e-3"),
    Scenario("learning rate 2e-3", SMALL, 2e-3, 20, 300),
    Scenario("learning rate 1e-2, bounded logits", Shape(bounded=True), 1e-2, 20, 300),
    Scenario(
        "residual decays", SMALL, 2e-3, 20, 300, "", "learning rate 2e-3", decaying, 80
    ),
    Scenario("logits grow", SMALL, 2e-3, 20, 300, "entropy-collapse", "learning rate 2e-3", growing, 80),
)  # fmt: skip


@functools.cache
def characters() -> Tensor:
    """Python's own documentation as character codes."""
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    return torch.tensor([min(code, VOCABULARY - 1) for code in text.encode("ascii", "replace")])


def probe(shape: Shape) -> list[dict[str, Tensor]]:
    """A few sequences that are not trained on."""
    text = characters()
    starts = torch.arange(PROBED) * 1000 + int(HELD_OUT * len(text))
    return [{"input_ids": text[starts[:, None] + torch.arange(shape.tokens)]}]


class SpikeRule:
    """The loss stands more than `SIGMAS` deviations above its recent mean."""

    SIGMAS, WINDOW = 5.0, 30

    def __init__(self) -> None:
        self.seen: deque[float] = deque(maxlen=self.WINDOW)

    def speaks(self, value: float) -> bool:
        known = list(self.seen)
        self.seen.append(value)
        if len(known) < self.WINDOW:
            return False
        return value > statistics.fmean(known) + self.SIGMAS * statistics.stdev(known)


class NormRule:
    """The gradient norm is more than `FACTOR` times its recent median."""

    FACTOR, WINDOW = 4.0, 30

    def __init__(self) -> None:
        self.seen: deque[float] = deque(maxlen=self.WINDOW)

    def speaks(self, value: float) -> bool:
        known = list(self.seen)
        self.seen.append(value)
        return len(known) == self.WINDOW and value > self.FACTOR * statistics.median(known)


def run(scenario: Scenario, seed: int) -> Run:
    """Train once."""
    torch.manual_seed(seed)
    shape, text = scenario.shape, characters()
    model = LanguageModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), scenario.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed + 1)
    monitor = uc.Monitor(model, probe(shape), every=EVERY)
    rules: dict[str, SpikeRule | NormRule] = {"loss spike": SpikeRule(), "gradient norm": NormRule()}
    others: dict[str, int | None] = dict.fromkeys(rules)
    losses: list[float] = []
    for step in range(scenario.steps):
        for group in optimizer.param_groups:
            group["lr"] = scenario.rate * min(1.0, (step + 1) / max(1, scenario.warm_up))
        most = int(HELD_OUT * len(text)) - shape.tokens - 1
        starts = torch.randint(0, most, (BATCH,), generator=generator)
        ids = text[starts[:, None] + torch.arange(shape.tokens + 1)]
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        monitor.step(step, loss=loss)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if scenario.fault is not None:
            with torch.no_grad():
                scenario.fault(model, step)
        losses.append(float(loss.detach()))
        for name, value in (("loss spike", losses[-1]), ("gradient norm", norm)):
            if others[name] is None and rules[name].speaks(value):
                others[name] = step
    alarms: list[tuple[int, int, str, str, int | None, str]] = [
        (a.step, a.onset, a.code, a.phenomenon, a.block, a.against) for a in monitor.alarms
    ]
    worst = [
        (r.step, min(v for v in r.sites["consensus_after_norm"] if v is not None))
        for r in monitor.readings
        if r.sites.get("consensus_after_norm")
    ]
    return Run(scenario.name, seed, losses, alarms, others, worst)
