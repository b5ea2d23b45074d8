"""The monitor in transformers' own trainer: its logs, and the same weights as without."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

import uncollapse as uc
from tests.monitoring.test_bit_identical import assert_same, data, gpt2, probe
from uncollapse.huggingface import MonitorCallback


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = data(number)[0]
        return {"input_ids": row, "labels": row}


def trainer(folder: Path, **options: object) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return hf.Trainer(gpt2(), arguments, train_dataset=Rows())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_gives_the_same_weights_and_logs_the_figures(bf16: bool, tmp_path: Path) -> None:
    weights, losses = [], []
    for monitored in (True, False):
        own = trainer(tmp_path, bf16=bf16)
        if monitored:
            callback = MonitorCallback(own, probe(), every=2, trail=tmp_path / "run.jsonl")
            own.add_callback(callback)
        own.train()
        weights.append(dict(own.model.state_dict()))
        losses.append([(entry["step"], entry["loss"]) for entry in own.state.log_history if "loss" in entry])
        if monitored:
            logged = [e for e in own.state.log_history if "uncollapse/worst/rest_entropy" in e]
            assert [e["step"] for e in logged] == [0, 2, 4, 6]
            assert "uncollapse/block.1/consensus_distance" in logged[0]
    assert_same(*weights)
    assert losses[0] == losses[1]  # a log of the monitor takes no log of the trainer's away
    assert len(losses[0]) == 3
    readings = uc.load(tmp_path / "run.jsonl").readings
    assert [r.step for r in readings] == [0, 2, 4, 6]
    assert readings[-1].loss is not None


def test_nothing_waits_in_the_model_when_training_is_over(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    callback = MonitorCallback(own, probe(), every=7, on="train")  # it would read the step after the last one
    own.add_callback(callback)
    own.train()
    assert callback.monitor is not None
    assert [reading.step for reading in callback.monitor.readings] == [1]
    assert not any("__reduce_ex__" in vars(module) for module in own.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in own.model.modules())


def test_the_monitor_is_freed_with_its_callback(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    callback = MonitorCallback(own, probe(), every=3)
    own.add_callback(callback)
    callback.on_train_begin(own.args, own.state, own.control, model=own.model)
    assert callback.monitor is not None
    watched = weakref.ref(callback.monitor)
    gc.collect()
    gc.disable()
    try:
        own.callback_handler.callbacks.remove(callback)
        del callback
        assert watched() is None
    finally:
        gc.enable()


def test_texts_go_through_the_trainers_tokenizer(tmp_path: Path) -> None:
    own = trainer(tmp_path)

    class Letters:
        model_max_length = 32
        all_special_ids: tuple[int, ...] = ()

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 60 + 3 for c in text][:30]}

    callback = MonitorCallback(own, texts=["a text of letters", "and another one"], max_tokens=16)
    callback.on_train_begin(own.args, own.state, own.control, model=own.model, processing_class=Letters())
    assert callback.monitor is not None
    assert callback.monitor.record is not None
    assert callback.monitor.record.probe.sequences == 2
