"""The adapter for Lightning, with a trainer that stands in for Lightning's own: it calls the same hooks with the same arguments."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.monitoring.test_bit_identical import gpt2, probe


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = types.ModuleType("lightning.pytorch")
    for name in ("Callback", "LightningModule", "Trainer"):
        setattr(names, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", names)
    monkeypatch.delitem(sys.modules, "uncollapse.lightning", raising=False)
    yield importlib.import_module("uncollapse.lightning")
    sys.modules.pop("uncollapse.lightning", None)


class Logger:
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append((step, metrics))


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = gpt2()


def test_it_looks_once_a_step_and_tells_every_logger(adapter: Any) -> None:
    loggers = [Logger(), Logger()]
    trainer, module = SimpleNamespace(global_step=0, loggers=loggers, accumulate_grad_batches=2), Module()
    callback = adapter.MonitorCallback(probe(), model="net", every=2, each_head=False)
    callback.on_train_start(trainer, module)
    for batch in range(8):  # two batches make one step
        trainer.global_step = (batch + 1) // 2
        halved = torch.tensor(2.5) / 2  # Lightning divides the loss of a batch by their number
        callback.on_train_batch_end(trainer, module, {"loss": halved}, None, batch)
    for logger in loggers:
        assert [step for step, _ in logger.seen] == [0, 2, 4]
        assert "uncollapse/worst/max_logit" in logger.seen[0][1]
    assert [r.loss for r in callback.monitor.readings] == [None, 2.5, 2.5]


def test_without_a_name_the_module_itself_is_looked_at(adapter: Any) -> None:
    callback = adapter.MonitorCallback(probe(), every=2)
    callback.on_train_start(SimpleNamespace(global_step=0, loggers=[]), gpt2())
    assert len(callback.monitor.readings) == 1


def test_nothing_waits_in_the_model_when_training_is_over(adapter: Any) -> None:
    trainer, model = SimpleNamespace(global_step=0, loggers=[]), gpt2()
    callback = adapter.MonitorCallback(probe(), every=2, on="train")
    callback.on_train_start(trainer, model)
    assert any(module._forward_pre_hooks for module in model.modules())
    callback.on_train_end(trainer, model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
