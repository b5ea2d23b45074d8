"""Drawn cases of what nobody expects: `python -m tests.fuzzing --count 100000 --write docs/reliability.md`.

Each target takes a seed and does one case. It ends well in two ways: `computed`, or `refused` by the package in one line. Whatever
else comes out of it, an error of torch or Python or a model that is left changed, is a fault, and its seed repeats it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import uncollapse as uc
from tests.helpers import records_samples
from tests.helpers.hostile import CALLS, FORMATS, OTHERS, called, tensors_of
from tests.helpers.interrupted import BATCH, interrupted_at, llama, standing
from uncollapse import restoring
from uncollapse.anatomy import interception, probing, turns
from uncollapse.interventions import without as without_module
from uncollapse.records.encoding import to_json

COMPONENTS = ("mlp", "attention", "residual", "norm", "mask")
MODULES = [restoring, turns, interception, probing, without_module]
BEGIN, END = "<!-- written by python -m tests.fuzzing -->", "<!-- to here -->"


def pure_function(seed: int) -> str:
    """A measure with up to three of its tensors replaced, each by up to two changes."""
    draw = random.Random(seed)
    name = draw.choice(list(CALLS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about sparse and nested tensors
        changed = _changed(name, draw)
        return _ended(lambda: called(name, **changed))


def _changed(name: str, draw: random.Random) -> dict[str, Any]:
    arguments = tensors_of(name)
    changed: dict[str, Any] = {}
    for argument in draw.sample(arguments, draw.randint(1, min(3, len(arguments)))):
        value = CALLS[name][1][argument]
        for _ in range(draw.randint(1, 2)):
            kind = draw.choice([*OTHERS] * 3 + [*FORMATS])
            try:
                value = {**OTHERS, **FORMATS}[kind](value)
            except (RuntimeError, IndexError, AttributeError, TypeError, ValueError):
                break  # this change cannot be made of that tensor
        changed[argument] = value
    return changed


def stored_record(seed: int) -> str:
    """A stored record that somebody's program, or disk, has damaged: read, and shown where it can be read."""
    draw = random.Random(seed)
    make = draw.choice(
        [records_samples.encoder, records_samples.ablation, records_samples.symmetries, records_samples.quiet]
    )
    data = json.loads(to_json(make()))
    for _ in range(draw.randint(0, 3)):
        _damaged(data, draw)
    text = json.dumps(data).encode()
    if draw.random() < 0.3:
        text = text[: draw.randrange(len(text))]
    if draw.random() < 0.3:
        at = draw.randrange(len(text)) if text else 0
        text = text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        path.write_bytes(text)
        return _ended(lambda: uc.load(path).show(Console(file=io.StringIO(), width=80)))


_ODD = (None, -1, 1e308, 10**30, "", "x" * 999, "\x1b[2J", "\ud7ff", [], {}, True, [[]], float("nan"))


def _damaged(value: Any, draw: random.Random) -> None:
    """Change one place somewhere inside."""
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
            value[key] = draw.choice(_ODD)
        return


def borrowed_model(seed: int) -> str:
    """Contexts around a model, entered and left in any order, with Ctrl-C at some line of what restores."""
    draw = random.Random(seed)
    model = _model()
    before = standing(model)

    def run() -> None:
        opened: list[Any] = []
        with contextlib.ExitStack() as stack:
            for _ in range(draw.randint(1, 4)):
                if opened and draw.random() < 0.5:
                    opened.pop(draw.randrange(len(opened))).__exit__(None, None, None)
                    continue
                context = uc.without(model, *draw.sample(COMPONENTS, draw.randint(1, 2)))
                context.__enter__()
                stack.push(context)
                opened.append(context)
                if draw.random() < 0.5:
                    model(**BATCH)

    ended = _ended(lambda: interrupted_at(MODULES, run, draw.randrange(3000)))
    torch.set_rng_state(torch.tensor(before["process"][-1], dtype=torch.uint8))
    if standing(model) != before:
        raise AssertionError("the model is left changed")
    return ended


_models: list[torch.nn.Module] = []


def _model() -> torch.nn.Module:
    """One model for all cases, proved once: whatever a case leaves behind, the next ones meet."""
    if not _models:
        _models.append(llama())
        with uc.without(_models[0], "mlp", batch=BATCH):
            pass
    return _models[0]


def _ended(case: Callable[[], object]) -> str:
    try:
        case()
    except uc.UncollapseError as refusal:
        if "\n" in str(refusal):
            raise AssertionError(f"a refusal of several lines: {refusal}") from refusal
        return "refused"
    return "computed"


TARGETS: dict[str, Callable[[int], str]] = {
    "pure functions": pure_function,
    "stored records": stored_record,
    "borrowed models": borrowed_model,
}
SHARES = {"pure functions": 0.975, "stored records": 0.02, "borrowed models": 0.005}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| target | cases | computed | refused | faults | seconds |", "|---|--:|--:|--:|--:|--:|"]
    faults: list[str] = []
    for name, target in TARGETS.items():
        counts: collections.Counter[str] = collections.Counter()
        begun, cases = time.process_time(), max(1, round(chosen.count * SHARES[name]))
        for seed in range(chosen.seed, chosen.seed + cases):
            try:
                counts[target(seed)] += 1
            except Exception as error:  # whatever it is: that is what is looked for
                counts["fault"] += 1
                faults.append(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:150]}")
        lines.append(
            f"| {name} | {cases:,} | {counts['computed']:,} | {counts['refused']:,} | {counts['fault']:,} | "
            f"{time.process_time() - begun:.0f} |"
        )
        print(lines[-1], flush=True)
    print(*faults[:40], sep="\n")
    if chosen.write:
        text = chosen.write.read_text()
        first, last = text.index(BEGIN), text.index(END)
        chosen.write.write_text(text[:first] + "\n".join([BEGIN, *lines, ""]) + text[last:])


if __name__ == "__main__":
    main()
