"""Checkpoints that lie: about where their weights are, and about how large they are."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import uncollapse as uc
from tests.helpers.tokenizers import word_tokenizer
from uncollapse.errors import InputError
from uncollapse.sources import checkpoint_folder, checkpoints, load_model

WORDS = "the quick brown fox jumps over the lazy dog"
LLAMA = transformers.LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=24,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    transformers.LlamaForCausalLM(LLAMA).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def edited(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def index_of(folder: Path, files: Any) -> Path:
    """Put an index in the place of the one file of weights."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    with_keys = dict.fromkeys(transformers.LlamaForCausalLM(LLAMA).state_dict(), files)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": with_keys}))
    return folder


def refused(folder: Path, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


class Trap:
    """What a pickle runs when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    "where", ["w.bin", "../w.bin", "sub/w.pt", "w.safetensors.bin", "absolute", "../a.safetensors", 5, None, ["a"]]
)
def test_an_index_names_safetensors_of_its_own_folder_or_is_refused(
    checkpoint: Path, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint)
    for file in ("w.bin", "../w.bin", "w.safetensors.bin"):
        torch.save({"x": Trap()}, checkpoint / file)
    if where == "absolute":
        where = str(checkpoint.parent / "elsewhere.safetensors")
        shutil.copy(checkpoint / "model.safetensors", where)
    refused(
        index_of(checkpoint, where),
        r"expected model\.safetensors\.index\.json .* to name \.safetensors files in the same folder",
    )
    assert not (checkpoint / "sprung").exists()


def test_an_index_of_safetensors_loads(checkpoint: Path) -> None:
    loaded = load_model(str(index_of(checkpoint, "a.safetensors")))
    assert sum(p.numel() for p in loaded.model.parameters()) > 1000


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\ud800", "[" * 100_000]
)
def test_an_index_that_is_none_is_refused(checkpoint: Path, content: str) -> None:
    index_of(checkpoint, "a.safetensors")
    (checkpoint / "model.safetensors.index.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(checkpoint, r"expected model\.safetensors\.index\.json")


@pytest.mark.parametrize("named", ["w.bin", "../model.safetensors", "adapter_model.bin", 5, ["model.safetensors"]])
def test_weights_that_the_configuration_names_are_safetensors_of_its_folder(checkpoint: Path, named: Any) -> None:
    torch.save({}, checkpoint / "w.bin")
    torch.save({}, checkpoint / "adapter_model.bin")
    refused(edited(checkpoint, transformers_weights=named), "config.json")


def test_an_adapter_of_pickles_is_refused(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(checkpoint)}))
    torch.save({"x": Trap()}, checkpoint / "adapter_model.bin")
    refused(checkpoint, "adapter_model.safetensors")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "model.safetensors", "chat_template.jinja"]
)
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_pipe_or_a_device_in_the_folder_is_not_read(checkpoint: Path, name: str, what: str) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name) if what == "pipe" else (checkpoint / name).symlink_to("/dev/zero")
    began = time.monotonic()
    refused(checkpoint, f"{name}.*pipe or a device")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("value", [5, "LlamaModel", [5], [None], [["LlamaModel"]], {"a": 1}, True])
def test_architectures_of_another_type_are_refused(checkpoint: Path, value: Any) -> None:
    refused(edited(checkpoint, architectures=value), "architectures|config.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers up to"),
        ({"num_labels": 10**9}, "num_labels up to"),
        ({"num_attention_heads": 10**12}, "num_attention_heads up to"),
        ({"hidden_size": 10**30}, "hidden_size up to"),
        ({"num_hidden_layers": 90_000}, "times as large"),
        ({"vocab_size": 10**9}, "times as large"),
        ({"intermediate_size": 10**8}, "times as large"),
        ({"vocab_size": 10**12}, "at most 2,000,000,000,000 parameters"),
        ({"hidden_size": 10**7, "head_dim": 8}, "at most 2,000,000,000,000 parameters|times as large"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_or_minutes_are_spent(
    checkpoint: Path, changes: dict[str, int], said: str
) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(edited(checkpoint, **changes), said)
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_max_parameters_counts_those_of_the_model(checkpoint: Path) -> None:
    parameters = sum(p.numel() for p in load_model(str(checkpoint)).model.parameters())
    assert load_model(str(checkpoint), max_parameters=parameters).name == str(checkpoint)
    for call in (load_model, lambda name, **options: uc.diagnose(name, [WORDS], **options)):
        with pytest.raises(InputError, match=f"at most {parameters - 1:,} parameters.*--max-parameters"):
            call(str(checkpoint), max_parameters=parameters - 1)
    for wrong in (0, -1, 1.5, "many", True, None):
        with pytest.raises(InputError, match="expected max_parameters as a whole number"):
            load_model(str(checkpoint), max_parameters=wrong)  # type: ignore[arg-type]


def test_counting_leaves_no_hook_behind(checkpoint: Path) -> None:
    load_model(str(checkpoint))
    with pytest.raises(InputError):
        load_model(str(checkpoint), max_parameters=1)
    registration = nn.modules.module
    assert not registration._global_parameter_registration_hooks
    assert not registration._global_buffer_registration_hooks


def test_a_shared_thread_is_not_counted() -> None:
    """A model that another thread makes meanwhile is no part of the checkpoint."""
    import threading

    with checkpoints.counted(max_parameters=10):
        other = threading.Thread(target=lambda: made.append(nn.Linear(10, 10)))
        made: list[nn.Module] = []
        other.start()
        other.join()
        nn.Linear(3, 2)
        with pytest.raises(Exception, match="parameters"):
            nn.Linear(3, 2)
    assert len(made) == 1


@pytest.mark.parametrize("value", ["many", [], {}, -1, 0, True, "512", float("nan")])
def test_a_tokenizer_of_no_sensible_length_is_refused(checkpoint: Path, value: Any) -> None:
    edited(checkpoint, "tokenizer_config.json", model_max_length=value)
    with pytest.raises(InputError, match=r"tokeni[sz]e") as error:
        uc.diagnose(str(checkpoint), [WORDS])
    assert "\n" not in str(error.value)


def test_names_that_would_act_on_a_terminal_are_spelled_out(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.rename(tmp_path / "a\x1b[2J\u202eb\n")
    found = uc.diagnose(str(folder), [WORDS])
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert r"a\x1b[2J\u202eb\n" in page
    assert not {"\x1b", "\u202e"} & set(page)
    assert found.record.model.name == str(folder)  # the record says what it is


def test_a_folder_whose_name_is_no_utf_8_loads_and_is_recorded(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    found = uc.diagnose(str(folder), [WORDS])
    assert json.loads(found.to_json(tmp_path / "r.json"))["model"]["name"] == rf"{tmp_path}/caf\xe9"
    assert uc.load(tmp_path / "r.json").record.model.name.endswith(r"caf\xe9")


def test_a_configuration_nested_without_end_is_looked_through() -> None:
    configuration: Any = {"layers": 10**6}
    for _ in range(5000):
        configuration = [configuration]
    with pytest.raises(InputError, match="expected layers up to 100000"):
        checkpoints.require_sound_sizes("a model", configuration)


@pytest.mark.parametrize("name", ["x" * 300, "a model", "--", "a..b", "\x1b[31m"])
def test_a_name_that_no_hub_takes_has_no_folder(name: str) -> None:
    assert checkpoint_folder(name) is None
