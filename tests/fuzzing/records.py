"""Stored records that somebody's program, or disk, has damaged."""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import uncollapse as uc
from tests.fuzzing.outcomes import ended
from tests.helpers import records_samples
from tests.helpers.own_models import OwnGPT, tokens
from uncollapse.records.encoding import to_json

GOLDEN = Path(__file__).parent.parent / "records" / "golden"
ODD = (None, -1, 0, 1e308, 10**30, "", "x" * 999, "\x1b[2J", "\ud7ff", "\u202e", [], {}, True, [[]], float("nan"))


def stored_record(seed: int) -> str:
    """A damaged record: read, and then shown, drawn as a page, written again, or compared with another."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        path.write_bytes(damaged_record(draw))
        return ended(lambda: draw.choice(USES)(path))


def damaged_record(draw: random.Random) -> bytes:
    """The bytes of a record that is changed in up to three places, cut short, or has another byte somewhere."""
    make = draw.choice(list(_RECORDS))
    lines = _RECORDS[make]().splitlines(keepends=True) if make == "trail" else [_RECORDS[make]()]
    at = draw.randrange(len(lines))
    data = json.loads(lines[at])
    for _ in range(draw.randint(0, 3)):
        damage(data, draw)
    lines[at] = json.dumps(data).encode() + b"\n"
    text = b"".join(lines)
    if draw.random() < 0.3:
        text = text[: draw.randrange(len(text))]
    if draw.random() < 0.3:
        at = draw.randrange(len(text)) if text else 0
        text = text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
    return text


def damage(value: Any, draw: random.Random) -> None:
    """Change one place somewhere inside a JSON document."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(value[key], (dict, list)) and draw.random() < 0.8:
            value = value[key]
            continue
        if draw.random() < 0.3:
            del value[key]
        else:
            value[key] = draw.choice(ODD)
        return


@functools.cache
def _golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes()


@functools.cache
def _sample(name: str) -> bytes:
    return to_json(getattr(records_samples, name)()).encode()


@functools.cache
def _comparison() -> bytes:
    diagnosis = uc.load(GOLDEN / "diagnosis.json")
    return uc.compare(diagnosis, diagnosis).to_json().encode()


@functools.cache
def _attribution() -> bytes:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=32, bos_token_id=0, eos_token_id=0
    )
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    return (
        uc.attribute(transformers.GPT2LMHeadModel(config).eval(), batch, uc.logit_difference(5, 7)).to_json().encode()
    )


@functools.cache
def _trail() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        monitor = uc.Monitor(OwnGPT(), [{"idx": tokens()}], every=1, trail=path)
        for step in range(3):
            monitor.step(step)
        return path.read_bytes()


_RECORDS: dict[str, Callable[[], bytes]] = {
    **{
        name: functools.partial(_sample, name) for name in ("encoder", "ablation", "symmetries", "quiet", "translation")
    },
    **{name: functools.partial(_golden, name) for name in ("diagnosis", "heads", "ledger")},
    "comparison": _comparison,
    "attribution": _attribution,
    "trail": _trail,
}


def _show(path: Path) -> None:
    uc.load(path).show(Console(file=io.StringIO(), width=80))


def _draw(path: Path) -> None:
    found = uc.load(path)
    found.to_html(path.with_suffix(".html"))
    if "\x1b" in (page := path.with_suffix(".html").read_text("utf-8")) or "\u202e" in page:
        raise AssertionError("a control character on the page")


def _write_again(path: Path) -> None:
    again = path.with_name("again.json")
    uc.load(path).to_json(again)
    uc.load(again)


def _compare(path: Path) -> None:
    other = uc.load(GOLDEN / "diagnosis.json")
    uc.compare(uc.load(path), other).show(Console(file=io.StringIO(), width=80))


USES: list[Callable[[Path], None]] = [
    *[_show] * 3,
    *[_write_again] * 3,
    *[_compare] * 3,
    _draw,
]  # a page takes its time
