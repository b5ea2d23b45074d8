"""Training with a monitor gives the same weights, bit for bit, as training without: in every way people train."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.own_models import OwnGPT

STEPS = 6
Loop = Callable[[uc.Monitor | None, nn.Module], None]


def gpt2() -> nn.Module:
    """With dropout in every place, so that the random state matters."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config).train()


def probe() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 64, (3, 24), generator=generator)}]


def data(step: int) -> Tensor:
    return torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def plain(monitor: uc.Monitor | None, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(1)
    for step in range(STEPS):
        loss = loss_of(model, data(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(step, loss=loss)


def autocast(monitor: uc.Monitor | None, model: nn.Module) -> None:
    """Looks inside the autocast too, in the middle of a step: a cast weight that were kept there would be an old one."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(1)
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            first = loss_of(model, data(step))
            if monitor is not None:
                monitor.step(step)
            loss = first + loss_of(model, data(step + 100))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulated(monitor: uc.Monitor | None, model: nn.Module) -> None:
    """Looks while gradients are there that belong to the next step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(1)
    for step in range(2 * STEPS):
        loss_of(model, data(step)).backward()
        if monitor is not None:
            monitor.step(step)
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


def between_forward_and_backward(monitor: uc.Monitor | None, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-1)
    torch.manual_seed(1)
    for step in range(STEPS):
        loss = loss_of(model, data(step))
        if monitor is not None:
            monitor.step(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def checkpointed(monitor: uc.Monitor | None, model: nn.Module) -> None:
    model.activation_checkpointing_enable()  # type: ignore[operator]
    between_forward_and_backward(monitor, model)
    assert model.is_activation_checkpointing


def trained(
    loop: Loop, build: Callable[[], nn.Module], *, monitored: bool, on: Literal["probe", "train"] = "probe"
) -> dict[str, Tensor]:
    model = build()
    monitor = uc.Monitor(model, probe(), every=2, on=on) if monitored else None
    loop(monitor, model)
    if monitor is not None:
        assert len(monitor.readings) >= STEPS // 2
        assert monitor.readings[-1].margins
        assert all(m.training for m in model.modules())
    return {name: value.clone() for name, value in model.state_dict().items()} | {"random": torch.get_rng_state()}


def assert_same(with_monitor: dict[str, Tensor], without: dict[str, Tensor]) -> None:
    assert with_monitor.keys() == without.keys()
    assert [name for name, value in without.items() if not torch.equal(value, with_monitor[name])] == []


@pytest.mark.parametrize("loop", [plain, autocast, accumulated, between_forward_and_backward, checkpointed])
def test_a_loop_gives_the_same_weights(loop: Loop) -> None:
    without = trained(loop, gpt2, monitored=False)
    for on in ("probe", "train"):
        assert_same(trained(loop, gpt2, monitored=True, on=on), without)


def test_a_look_that_moved_the_random_state_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a monitor that draws one number gives other weights."""
    look = uc.Monitor.look

    def drawing(self: uc.Monitor, step: int, **given: Any) -> Any:
        torch.rand(1)
        return look(self, step, **given)

    without = trained(plain, gpt2, monitored=False)
    monkeypatch.setattr(uc.Monitor, "look", drawing)
    with_monitor = trained(plain, gpt2, monitored=True)
    assert not torch.equal(without["transformer.wte.weight"], with_monitor["transformer.wte.weight"])


def test_a_compiled_model_is_not_compiled_again() -> None:
    """The monitor sees the same model through the wrapper, and the compiled code stays what it was."""
    counted = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        counted.append(graph)
        return graph.forward

    weights = []
    compiled_graphs = []
    for monitored in (True, False):
        counted.clear()
        torch._dynamo.reset()
        model = OwnGPT()
        compiled = torch.compile(model, backend=backend)
        monitor = uc.Monitor(compiled, [{"idx": probe()[0]["input_ids"]}], every=2) if monitored else None
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(STEPS):
            ids = data(step)
            logits = compiled(ids)
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(step)
        weights.append(dict(model.state_dict()))
        compiled_graphs.append(len(counted))
    assert_same(*weights)
    assert compiled_graphs[0] == compiled_graphs[1] > 0


RANK = """
import os, sys
import torch
import torch.distributed as dist
from tests.helpers.several_processes import end_at_once
from tests.monitoring.test_bit_identical import data, gpt2, loss_of, probe, STEPS
import uncollapse as uc
dist.init_process_group("gloo")
rank = dist.get_rank()
model = gpt2()
model.register_buffer("counted", torch.zeros(1))  # what DDP hands round before every forward
ddp = torch.nn.parallel.DistributedDataParallel(model)
monitor = uc.Monitor(ddp, probe(), every=2, trail=sys.argv[1]) if len(sys.argv) > 2 else None
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
torch.manual_seed(rank)
for step in range(STEPS):
    loss_of(ddp, data(2 * step + rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if monitor is not None:
        monitor.step(step)
if monitor is not None:
    assert len(monitor.readings) == (3 if rank == 0 else 0)
if rank == 0:
    torch.save(model.state_dict(), sys.argv[1] + ".pt")
dist.destroy_process_group()
end_at_once(0)
"""


def test_two_processes_give_the_same_weights_and_one_trail(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    weights = []
    for name in ("with", "without"):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port=0",
            "--standalone",
        ]
        arguments = [
            str(tmp_path / "rank.py"),
            str(tmp_path / f"{name}.jsonl"),
            *(["monitored"] if name == "with" else []),
        ]
        ended = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        weights.append(torch.load(tmp_path / f"{name}.jsonl.pt", weights_only=True))
    assert_same(*weights)
    assert [r.step for r in uc.load(tmp_path / "with.jsonl").readings] == [0, 2, 4]
