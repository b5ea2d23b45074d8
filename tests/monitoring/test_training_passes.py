"""A monitor that reads training's own passes: what it reads is what that pass computed."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.monitoring.test_bit_identical import data, loss_of, probe
from uncollapse.errors import InputError, UncollapseError
from uncollapse.records import trail


def gpt2(**dropout: float) -> nn.Module:
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | dropout
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    config.update(rates)
    return hf.GPT2LMHeadModel(config).train()


class Seen:
    """What each block of GPT-2 returned, and what its softmax gave, in the last pass."""

    def __init__(self, model: nn.Module) -> None:
        self.streams: list[np.ndarray] = []
        model.transformer.h[0].register_forward_pre_hook(self._first)
        for block in model.transformer.h:
            block.register_forward_hook(lambda *given: self._keep(given[-1]))

    def _first(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.streams = [given[0].detach().double().numpy().copy()]

    def _keep(self, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        self.streams.append(stream.detach().double().numpy().copy())

    def consensus(self) -> list[float]:
        """The share of the stream's size that lies off its mean token, at each site: the mean over sequences."""
        found = []
        for stream in self.streams:
            off = stream - stream.mean(1, keepdims=True)
            found.append(float(np.mean(np.linalg.norm(off, axis=(1, 2)) / np.linalg.norm(stream, axis=(1, 2)))))
        return found


def train(model: nn.Module, monitor: uc.Monitor, steps: range) -> dict[int, list[float]]:
    seen, optimizer, found = Seen(model), torch.optim.SGD(model.parameters(), 0.1), {}
    for step in steps:
        with torch.no_grad():
            model.eval()
            model(input_ids=data(100)[:1])  # a validation pass is none of training
            model.train()
        loss = loss_of(model, data(step))
        found[step] = seen.consensus()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(step, loss=loss)
    return found


def test_it_reads_the_training_batch_in_its_own_pass_and_runs_nothing() -> None:
    model = gpt2()
    # Where the heads' weights are is proved at the first look, by passes of its own.
    monitor = uc.Monitor(model, probe(), every=3, on="train", watch=["tokens", "attention", "heads"])
    passes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: passes.append(module.training))
    found = train(model, monitor, range(8))
    assert [reading.step for reading in monitor.readings] == [0, 3, 6]
    for reading in monitor.readings:
        assert reading.sites["consensus_distance"] == pytest.approx(found[reading.step], rel=1e-5)
        assert all(value is not None for name in ("max_logit", "rest_entropy") for value in reading.heads[name])
    assert passes == [False, True] * 8
    assert monitor.record is not None
    assert monitor.record.probe.source == "training batches"


def test_dropout_in_the_stream_is_read_as_it_is_and_in_attention_it_leaves_figures_out() -> None:
    model = gpt2(resid_pdrop=0.3, attn_pdrop=0.3)
    monitor = uc.Monitor(model, probe(), every=1, on="train")
    found = train(model, monitor, range(3))
    for reading in monitor.readings:
        assert reading.sites["consensus_distance"] == pytest.approx(found[reading.step], rel=1e-5)
        assert "rest_entropy" not in reading.heads


def test_steps_may_be_counted_in_strides() -> None:
    model = gpt2()
    monitor = uc.Monitor(model, probe(), every=4, on="train")
    train(model, monitor, range(0, 20, 2))
    assert [reading.step for reading in monitor.readings] == [0, 4, 8, 12, 16]


def test_a_first_pass_that_cannot_be_read_is_an_error_and_a_later_one_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Twice(nn.Module):
        """Runs its blocks as often as it is told."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.rounds = gpt2(), 1

        def forward(self, input_ids: Tensor) -> Tensor:
            for _ in range(self.rounds):
                logits = self.inner(input_ids=input_ids).logits
            return logits

    for first in (True, False):
        model = Twice().train()
        monitor = uc.Monitor(model, probe(), every=1, on="train")
        if not first:
            loss_of(model, data(0)).backward()
            monitor.step(0)
        model.rounds = 2
        loss_of(model, data(1)).backward()
        if first:
            with pytest.raises(UncollapseError, match="runs of"):
                monitor.step(1)
        else:
            with caplog.at_level(logging.WARNING):
                assert monitor.step(1) == []
            assert "training pass like the first" in caplog.text
            assert [reading.step for reading in monitor.readings] == [0]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_pass_that_fails_is_not_read_and_its_error_comes_through(fails_at: int) -> None:
    class OutOfMemoryError(RuntimeError):
        """What a loop may wait for, in order to go on with a smaller batch."""

    model = gpt2()
    monitor = uc.Monitor(model, probe(), every=2, on="train")
    if fails_at:
        train(model, monitor, range(fails_at))
    model.register_forward_hook(lambda *_: None)  # one that torch comes to after the monitor's

    def fail(*_: Any) -> None:
        raise OutOfMemoryError

    failing = model.transformer.h[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemoryError):
        loss_of(model, data(fails_at))
    failing.remove()
    monitor.step(fails_at)
    assert [reading.step for reading in monitor.readings] == list(range(0, fails_at, 2))
    found = train(model, monitor, range(fails_at + 1, fails_at + 4))
    read = monitor.readings[-2:] if fails_at else monitor.readings
    assert [reading.step for reading in read] == [fails_at + 1, fails_at + 2]
    for reading in read:
        assert reading.sites["consensus_distance"] == pytest.approx(found[reading.step], rel=1e-5)


def test_what_cannot_be_read_is_refused() -> None:
    model = gpt2()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(InputError, match="compiled"):
        uc.Monitor(torch.compile(model, backend="eager"), probe(), on="train")
    assert not passes  # before anything is proved
    with pytest.raises(InputError, match="on='probe' or on='train'"):
        uc.Monitor(gpt2(), probe(), on="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="makes none of its own"):
        uc.Monitor(gpt2(), probe(), on="train").look(3)


def test_a_model_that_is_compiled_later_is_refused_at_its_first_pass() -> None:
    model = gpt2()
    monitor = uc.Monitor(model, probe(), on="train")
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=data(0)).logits.sum().backward()
    with pytest.raises(InputError, match="compiled"):
        monitor.step(0)


def test_closed_or_over_it_leaves_no_hook() -> None:
    model = gpt2()
    assert _hooks(model) == 0
    monitor = uc.Monitor(model, probe(), every=50, on="train")
    assert _hooks(model) > 0
    loss_of(model, data(0)).backward()
    assert _hooks(model) == 0
    monitor.step(0)
    assert len(monitor.readings) == 1
    other = uc.Monitor(model, probe(), on="train")
    other.close()
    assert _hooks(model) == 0


def test_a_copy_made_while_it_waits_is_of_the_model_alone() -> None:
    model = gpt2()
    before = [set(vars(module)) for module in model.modules()]
    monitor = uc.Monitor(model, probe(), every=1, on="train")
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert _hooks(copied) == 0
        with torch.no_grad():
            copied.lm_head.weight.zero_()
        assert not copied(input_ids=data(0)).logits.any()
        assert [set(vars(module)) for module in copied.modules()] == before
    assert model(input_ids=data(0)).logits.any()
    monitor.step(0)
    assert len(monitor.readings) == 1
    monitor.close()
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_monitor_that_was_closed_reads_nothing_more() -> None:
    model = gpt2()
    monitor = uc.Monitor(model, probe(), every=1, on="train")
    train(model, monitor, range(2))
    monitor.close()
    seen = Seen(model)
    before = _hooks(model)
    for step in (2, 3):
        loss_of(model, data(step)).backward()
        assert monitor.step(step) == []
        assert _hooks(model) == before
    assert seen.streams
    assert [reading.step for reading in monitor.readings] == [0, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_two_monitors_of_one_model_may_be_closed_in_any_order(first: int) -> None:
    model = gpt2()
    before = [set(vars(module)) for module in model.modules()]
    monitors = [uc.Monitor(model, probe(), on="train") for _ in range(2)]
    monitors[first].close()
    assert _hooks(copy.deepcopy(model)) == 0  # the other one still waits
    monitors[1 - first].close()
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_trail_of_a_probe_is_not_gone_on_with_in_training_passes(tmp_path: Path) -> None:
    model = gpt2()
    uc.Monitor(model, probe(), trail=tmp_path / "probe.jsonl").step(0)
    monitor = uc.Monitor(model, probe(), every=1, on="train", trail=tmp_path / "probe.jsonl")
    with pytest.raises(InputError, match="on='train' and not on='probe'"):
        train(model, monitor, range(1, 2))
    train(model, uc.Monitor(model, probe(), every=1, on="train", trail=tmp_path / "train.jsonl"), range(2))
    with pytest.raises(InputError, match="on='probe' and not on='train'"):
        uc.Monitor(model, probe(), trail=tmp_path / "train.jsonl").step(2)


def test_each_kind_of_warning_is_given_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt2()
    monitor = uc.Monitor(model, probe(), every=1, on="train", trail=tmp_path / "run.jsonl")
    train(model, monitor, range(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trail, "_write", full)
    train(model, monitor, range(1, 3))
    for step in (3, 4):
        # A pass that is over, and another one than was proved.
        if monitor._next is not None:
            monitor._next.close()  # while one is waited for, no compiled code runs
        monkeypatch.setattr(
            monitor, "_next", SimpleNamespace(is_broken=False, is_over=True, observations=None, problem="?")
        )
        assert monitor.step(step) == []
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("uncollapse")]
    assert [each.partition(",")[0] for each in warnings] == [
        "Monitor: expected a trail that takes more",
        "Monitor: expected a training pass like the first",
    ]
    monitor.close()


@pytest.mark.parametrize("is_read", [True, False])
def test_a_model_is_freed_with_its_monitor(is_read: bool) -> None:
    def used() -> weakref.ref[nn.Module]:
        model = gpt2()
        monitor = uc.Monitor(model, probe(), on="train")
        if is_read:
            loss_of(model, data(0)).backward()
            monitor.step(0)
        return weakref.ref(model)

    used()  # an error that a library caught while it was first imported may hold the first of all
    gc.disable()
    try:
        assert used()() is None
    finally:
        gc.enable()


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())
