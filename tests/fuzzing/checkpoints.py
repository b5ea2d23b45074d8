"""Checkpoints whose files are damaged, lie, or name something else."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.fuzzing.outcomes import ended
from tests.fuzzing.records import ODD, damage
from tests.helpers.tokenizers import word_tokenizer
from tests.sources.test_loading_interrupted import settings
from uncollapse.sources import load_model


def checkpoint(seed: int) -> str:
    """A checkpoint that is damaged in up to three places: it loads whole, or is refused. No pickle is opened, no other file is
    read, and the settings of transformers stay."""
    draw = random.Random(seed)
    kept = saved(draw.choice(["llama", "bert"]))
    before = settings()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(kept, folder)
        for _ in range(draw.randint(0, 3)):
            draw.choice(DAMAGES)(folder, draw)
        files = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
        how = ended(lambda: _load(folder))
        if (Path(place) / "sprung").exists():
            raise AssertionError("a pickle was opened")
        if {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} != files:
            raise AssertionError("a file of the checkpoint was written")
    if settings() != before:
        raise AssertionError("a setting is left changed")
    return how


def _load(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu")
    if loaded.model.training or any(p.is_meta for p in loaded.model.parameters()):
        raise AssertionError("not loaded whole")


class Trap:
    """What a pickle runs when it is opened."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


@functools.cache
def saved(kind: str) -> Path:
    """A small checkpoint, loaded once: that imports what may add filters of warnings."""
    folder = Path(tempfile.mkdtemp(prefix="saved-"))
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "vocab_size": 24,
    }
    model: Any = (
        transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
        if kind == "llama"
        else transformers.BertModel(transformers.BertConfig(**sizes))
    )
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    word_tokenizer(pad_token="<pad>").save_pretrained(folder)
    load_model(str(folder), device="cpu")
    return folder


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint that can be read to their end. One that holds nothing is always there."""
    (folder / "left.txt").touch()
    return sorted(file for file in folder.iterdir() if stat.S_ISREG(file.lstat().st_mode))


def _json(folder: Path, draw: random.Random) -> None:
    file = draw.choice([f for f in _files(folder) if f.suffix == ".json"] or [folder / "left.txt"])
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(document, dict | list):
        return
    damage(document, draw)
    file.write_text(json.dumps(document))


def _configuration(folder: Path, draw: random.Random) -> None:
    file = folder / "config.json"
    try:
        document = json.loads(file.read_bytes()) if file in _files(folder) else None
    except ValueError:
        return
    if not isinstance(document, dict):
        return
    key = draw.choice(
        [*document, "architectures", "model_max_length", "auto_map", "transformers_weights", "model_type"]
    )
    document[key] = draw.choice(
        [
            *ODD,
            -(2**70),
            2**20,
            2**40,
            0.5,
            "w.bin",
            "../w.bin",
            ["w.bin"],
            {"AutoModel": "own.Own"},
            "gpt2",
            "../../etc",
        ]
    )
    file.write_text(json.dumps(document))


def _bytes(folder: Path, draw: random.Random) -> None:
    file = draw.choice(_files(folder))
    content = bytearray(file.read_bytes())
    if not content:
        return
    match draw.choice(["cut", "flip", "first", "empty"]):
        case "cut":
            del content[draw.randrange(len(content)) :]
        case "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        case "first":  # the length of a safetensors header
            content[:8] = draw.randbytes(8)
        case _:
            content.clear()
    file.write_bytes(content)


def _gone(folder: Path, draw: random.Random) -> None:
    draw.choice(_files(folder)).unlink()


def _pickle(folder: Path, draw: random.Random) -> None:
    """Pickles beside the weights, and something that names them."""
    name = draw.choice(["pytorch_model.bin", "w.bin", "adapter_model.bin", "training_args.bin", "rng_state.pth"])
    torch.save({"x": Trap(str(folder.parent / "sprung"))}, folder / name)
    if draw.random() < 0.5:
        keys = ["embed_tokens.weight", "x"]
        index = {
            "metadata": {},
            "weight_map": dict.fromkeys(keys, draw.choice([name, "../" + name, "model.safetensors"])),
        }
        beside = draw.choice(["model.safetensors.index.json", "pytorch_model.bin.index.json"])
        (folder / beside).write_text(json.dumps(index))
    if draw.random() < 0.5 and (weights := folder / "model.safetensors") in _files(folder):
        weights.unlink()
    if draw.random() < 0.2:
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))


def _kind(folder: Path, draw: random.Random) -> None:
    """A file of another kind in its place."""
    file = folder / draw.choice(["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
    if file.is_dir():
        return
    file.unlink(missing_ok=True)
    match draw.choice(["folder", "pipe", "circle", "device"]):
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "circle":
            file.symlink_to(file)
        case _:
            file.symlink_to("/dev/zero")


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    _json,
    _configuration,
    _configuration,
    _bytes,
    _gone,
    _pickle,
    _kind,
]
