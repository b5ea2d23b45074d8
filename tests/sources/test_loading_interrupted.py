"""Ctrl-C while a model is loaded: the settings of transformers, of the hub and of the process come back."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from torch.nn.modules import module as registration
from torch.overrides import _get_current_function_mode_stack
from transformers.utils import logging

from tests.helpers.interrupted import interruptions
from uncollapse import restoring
from uncollapse.sources import checkpoints, load_model, loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("saved")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=24
    )
    transformers.BertModel(config).save_pretrained(place)
    return str(place)


def settings() -> dict[str, Any]:
    return {
        "verbosity": (logging.get_verbosity(), hub_logging.get_verbosity()),
        "bars": (logging.is_progress_bar_enabled(), are_progress_bars_disabled()),
        "modes": (torch.get_default_device(), _get_current_function_mode_stack()),
        "conversion": os.environ.get("DISABLE_SAFETENSORS_CONVERSION"),
        "filters": list(warnings.filters),
        "registration": (
            list(registration._global_parameter_registration_hooks.values()),
            list(registration._global_buffer_registration_hooks.values()),
        ),
    }


def _tokenizer(*_: Any, **__: Any) -> tuple[None, str]:
    return None, "not looked for: it takes longer than all else"


@pytest.mark.parametrize("own_bars", [True, False])
def test_ctrl_c_in_what_silences_leaves_every_setting_as_it_was(own_bars: bool) -> None:
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if own_bars else logging.disable_progress_bar)()
    enable_progress_bars()  # the hub's, of which transformers is not asked
    found, count, left = settings(), 0, []

    def silenced() -> None:
        with loading._transformers_silenced(), checkpoints.counted(max_parameters=10):
            assert logging.get_verbosity() == logging.CRITICAL
            assert are_progress_bars_disabled()

    for line, raised in interruptions([loading, checkpoints, restoring], silenced):
        count += raised is not None
        if settings() != found:
            left.append(line)
    (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert not left
    assert count > 60


@pytest.mark.parametrize("own", [None, "cpu"])
def test_ctrl_c_while_parameters_are_counted_leaves_the_device_as_it_was(own: str | None) -> None:
    """Tensors made afterwards are no longer on the meta device, on which the parameters are counted."""
    left, count = [], 0
    with torch.device(own) if own else contextlib.nullcontext():
        found = settings()

        def count_them() -> None:
            checkpoints.require_affordable("tiny", lambda: nn.Linear(2, 2), max_parameters=10)

        for line, raised in interruptions([checkpoints, restoring], count_them):
            count += raised is not None
            if settings() != found:
                left.append(line)
                break
    assert not left
    assert count > 30


@pytest.mark.slow
def test_ctrl_c_at_any_line_of_loading_leaves_every_setting_as_it_was(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_tokenizer", _tokenizer)
    load_model(folder, device="cpu")
    found, count, left = settings(), 0, []
    for line, raised in interruptions([loading, checkpoints, restoring], lambda: load_model(folder, device="cpu")):
        count += raised is not None
        if settings() != found:
            left.append(line)
    assert not left
    assert count > 150


def test_two_threads_that_load_leave_the_settings_as_they_were(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each used to note what the other had silenced, and to put that back."""
    monkeypatch.setattr(loading, "_tokenizer", _tokenizer)
    before, failed = settings(), []

    def load() -> None:
        try:
            for _ in range(3):
                load_model(folder, device="cpu")
        except BaseException as error:  # a thread's own would only be printed
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert settings() == before
