"""One run: a small language model trained on characters, watched by the monitor and by the rules that people use without one."""

from __future__ import annotations

import functools
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import uncollapse as uc
from studies.early_warning.models import VOCABULARY, LanguageModel, Shape

BATCH, EVERY, PROBED = 8, 5, 8
HELD_OUT = 0.9  # the probe comes from the text behind this share of it
OTHERS = ("loss spike", "gradient norm", "trainscope", "arc-vigil")
Alarm = tuple[int, int, str, str, int | None, str]  # step, onset, code, phenomenon, block, against
Fault = Callable[[LanguageModel, int], None]


@dataclass(frozen=True)
class Scenario:
    """A way of training. `phenomenon`: what it fails of, empty for a healthy twin. `fault`: what is done to the model after each
    step, which changes something from step `begins` on, and first in block `planted`, if it is planted in one. `hurts`: the fault
    costs loss, but there is no collapse to find."""

    name: str
    shape: Shape
    rate: float
    warm_up: int
    steps: int
    phenomenon: str = ""
    twin: str = ""
    fault: Fault | None = None
    begins: int = 0
    planted: int | None = None
    weight_decay: float = 0.0
    hurts: bool = False


@dataclass(frozen=True)
class Run:
    """What a run showed: the loss at every step, the monitor's alarms, when each other rule first spoke of the fault, the smallest
    consensus distance at each look, and whom `arc-vigil` suspected."""

    scenario: str
    seed: int
    losses: list[float]
    alarms: list[Alarm] = field(default_factory=list)
    others: dict[str, int | None] = field(default_factory=dict)
    consensus: list[tuple[int, float]] = field(default_factory=list)
    suspect: str | None = None


def decaying(model: LanguageModel, step: int, *, begins: int, block: int, kept: float) -> None:
    """From step `begins` on the residual connections from `block` on keep less of the stream at every step."""
    if step >= begins:
        for number in range(block, len(model.blocks)):
            model.get_buffer(f"blocks.{number}.kept").mul_(kept)


def growing(model: LanguageModel, step: int) -> None:
    """From step 80 on the queries and keys of block 1 grow by 1.5 % at every step."""
    if step >= 80:
        weight = model.get_parameter("blocks.1.attention.read.weight")
        weight.data[: 2 * weight.shape[1]] *= 1.015


def shrinking(model: LanguageModel, step: int) -> None:
    """From step 600 on the queries and keys of block 1 shrink by 5 % at every step."""
    if step >= 600:
        weight = model.get_parameter("blocks.1.attention.read.weight")
        weight.data[: 2 * weight.shape[1]] *= 0.95


def rounding(model: LanguageModel, step: int) -> None:
    """The queries and keys of every block are kept in bfloat16, and every step rounds them away from zero."""
    for number in range(len(model.blocks)):
        weight = model.get_parameter(f"blocks.{number}.attention.read.weight")
        rows = weight.data[: 2 * weight.shape[1]]
        rows.copy_(rounded_away(rows))


def rounded_away(x: Tensor, bits: int = 7) -> Tensor:
    """To so many bits behind the leading one, away from zero.

    >>> rounded_away(torch.tensor([1.3, -1.3, 1.5]), 2)
    tensor([ 1.5000, -1.5000,  1.5000])
    """
    mantissa, exponent = torch.frexp(x)
    scale = 2.0 ** (bits + 1)
    return torch.ldexp((mantissa.abs() * scale).ceil() / scale * x.sign(), exponent)


SMALL, DEEP = Shape(), Shape(18, 32, 4, 32, wide_start=True)
TWELVE = Shape(12, 32, 4, 32, wide_start=True)
DEPTH, WIDTH, ENTROPY = "rank-collapse-depth", "rank-collapse-width", "entropy-collapse"
PLAIN = "learning rate 2e-3"
SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "post-norm, 18 blocks, no warm-up", replace(DEEP, post=True), 1e-3, 0, 200, DEPTH, "pre-norm, 18 blocks"
    ),
    Scenario("pre-norm, 18 blocks", DEEP, 1e-3, 40, 200),
    Scenario("attention only, 8 blocks", Shape(8, 32, 4, 32, wide_start=True, attention_only=True), 1e-3, 20, 200,
             DEPTH, "whole, 8 blocks"),
    Scenario("whole, 8 blocks", Shape(8, 32, 4, 32, wide_start=True), 1e-3, 20, 200),
    Scenario("residual decays, 12 blocks", TWELVE, 1e-3, 20, 240, DEPTH, "pre-norm, 12 blocks",
             functools.partial(decaying, begins=80, block=4, kept=0.95), 80, 4),
    Scenario("pre-norm, 12 blocks", TWELVE, 1e-3, 20, 240),
    Scenario("learning rate 5e-2", SMALL, 5e-2, 0, 200, ENTROPY, PLAIN),
    Scenario("no weight decay, learning rate 1.5e-2", SMALL, 1.5e-2, 20, 400, ENTROPY, "weight decay 0.1"),
    Scenario("weight decay 0.1", SMALL, 1.5e-2, 20, 400, weight_decay=0.1),
    Scenario("bfloat16 rounded away from zero", SMALL, 2e-3, 20, 1000, ENTROPY, PLAIN, rounding),
    Scenario("logits grow", SMALL, 2e-3, 20, 300, ENTROPY, PLAIN, growing, 80, 1),
    Scenario("queries and keys shrink", SMALL, 2e-3, 20, 700, WIDTH, PLAIN, shrinking, 600, 1),
    Scenario(PLAIN, SMALL, 2e-3, 20, 1000),
    Scenario("learning rate 1e-2, bounded logits", Shape(bounded=True), 1e-2, 20, 300),
    Scenario("post-norm, 4 blocks, warm-up", Shape(post=True), 1e-3, 50, 300),
    Scenario("residual decays, 4 blocks", SMALL, 2e-3, 20, 300, "", PLAIN,
             functools.partial(decaying, begins=80, block=0, kept=0.98), 80, hurts=True),
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


class OtherRules:
    """What people use without a monitor, and two monitors of others, each with its own defaults: the first step from `begins` on at
    which each speaks. Of trainscope's CUSUM only what points upwards counts. arc-vigil is asked about each block by name."""

    def __init__(self, model: LanguageModel, begins: int) -> None:
        try:
            from arc_vigil import BendexMonitor
            from trainscope.core.detectors import ChangePointDetector
        except ImportError as error:
            raise SystemExit(
                f"studies.early_warning: expected {error.name}, which `make early-warning` installs."
            ) from None
        self._spike, self._norm, self._cusum = SpikeRule(), NormRule(), ChangePointDetector()
        blocks = [f"blocks.{number}" for number in range(len(model.blocks))]
        self._vigil = BendexMonitor(model, monitored_modules=["token", "position", *blocks, "norm", "predict"])
        self.first: dict[str, int | None] = dict.fromkeys(OTHERS)
        self._begins = begins
        self.suspect: str | None = None

    def before(self, step: int) -> None:
        """Before the forward pass."""
        event = self._vigil.observe(step)
        if event is not None and step >= self._begins and self.first["arc-vigil"] is None:
            self.first["arc-vigil"], self.suspect = step, event["suspect_module"]

    def after(self, step: int, loss: float, norm: float) -> None:
        """After a step with this loss and gradient norm."""
        speaks = {
            "loss spike": self._spike.speaks(loss),
            "gradient norm": self._norm.speaks(norm),
            "trainscope": (self._cusum.update(loss) or 0.0) > 0,
        }
        for name, speaks_now in speaks.items():
            if speaks_now and step >= self._begins and self.first[name] is None:
                self.first[name] = step


def run(scenario: Scenario, seed: int) -> Run:
    """Train once."""
    torch.manual_seed(seed)
    shape, text = scenario.shape, characters()
    model = LanguageModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), scenario.rate, weight_decay=scenario.weight_decay)
    generator = torch.Generator().manual_seed(seed + 1)
    monitor, others = uc.Monitor(model, probe(shape), every=EVERY), OtherRules(model, scenario.begins)
    losses: list[float] = []
    for step in range(scenario.steps):
        for group in optimizer.param_groups:
            group["lr"] = scenario.rate * min(1.0, (step + 1) / max(1, scenario.warm_up))
        most = int(HELD_OUT * len(text)) - shape.tokens - 1
        starts = torch.randint(0, most, (BATCH,), generator=generator)
        ids = text[starts[:, None] + torch.arange(shape.tokens + 1)]
        others.before(step)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        monitor.step(step, loss=loss)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if scenario.fault is not None:
            with torch.no_grad():
                scenario.fault(model, step)
        losses.append(round(float(loss.detach()), 4))
        others.after(step, losses[-1], norm)
    alarms: list[Alarm] = [(a.step, a.onset, a.code, a.phenomenon, a.block, a.against) for a in monitor.alarms]
    worst = [
        (r.step, float(f"{min(v for v in r.sites['consensus_after_norm'] if v is not None):.4g}"))
        for r in monitor.readings
        if r.sites.get("consensus_after_norm")
    ]
    return Run(scenario.name, seed, losses, alarms, others.first, worst, others.suspect)
