"""All runs of the section on position gates: which they are, run beside each other, each kept as soon as it is there."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from safetensors.torch import save_file

from studies.language_models import corpus
from studies.position_gates import large, planted, recovery, training
from studies.weights import CACHE

SAVED = CACHE / "results" / "gates"
SWITCHING_ARMS = ("learned gates", "no gates, MLP behind")
SWITCHING_TASKS = ("halves", "even and odd")
Run = tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]


def language_model(arm: str, seed: int, steps: int = training.STEPS) -> dict[str, Any]:
    """One training, and what can be recovered in the trained model."""
    found, made = training.run(arm, seed, steps)
    _, held_out = corpus()
    SAVED.mkdir(parents=True, exist_ok=True)
    save_file(made.state_dict(), SAVED / f"model-{arm}-{seed}.safetensors")
    return found | {
        "placed": recovery.placed(made, arm, held_out),
        "recurring": recovery.recurring(made, arm, held_out),
    }


def planted_tasks(seed: int, steps: int = planted.STEPS) -> dict[str, Any]:
    """Every planted task with one seed."""
    return {
        "fixed": [planted.run(task, arm, seed, steps=steps) for task in planted.TASKS for arm in planted.ARMS],
        "switching": [
            planted.run(task, arm, seed, switching=True, steps=steps)
            for task in SWITCHING_TASKS
            for arm in SWITCHING_ARMS
        ],
    }


def small_runs() -> list[Run]:
    trainings: list[Run] = [
        (f"model-{arm}-{seed}", language_model, (arm, seed)) for seed in training.SEEDS for arm in training.ARMS
    ]
    return [*trainings, *((f"planted-{seed}", planted_tasks, (seed,)) for seed in training.SEEDS)]


def section(workers: int = 2, resume: bool = False) -> dict[str, Any]:
    """Every run of the small comparison, anew or those that are missing; the cost of a step at the end, by itself."""
    if SAVED.exists() and not resume:
        for path in SAVED.glob("[mp]*-*"):
            path.unlink()
    runs = [run for run in small_runs() if not (SAVED / f"{run[0]}.json").is_file()]
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for finished in as_completed([pool.submit(kept, *run) for run in runs]):
            print(finished.result(), flush=True)
    found = {name: json.loads((SAVED / f"{name}.json").read_text(encoding="utf-8")) for name, _, _ in small_runs()}
    torch.set_num_threads(1)
    return {
        "models": [content for name, content in found.items() if name.startswith("model-")],
        "planted": [content for name, content in found.items() if name.startswith("planted-")],
        "cost": training.cost(),
        "large": larger(),
    }


def kept(name: str, measure: Callable[..., dict[str, Any]], arguments: Sequence[Any]) -> str:
    """Run it and save what it found; a line about it."""
    start = time.process_time()
    found = measure(*arguments)
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    SAVED.mkdir(parents=True, exist_ok=True)
    (SAVED / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return f"{name}: {found['cpu_seconds']} s"


def large_runs(size: str, device: str, files: Sequence[str], steps: int | None) -> None:
    """The plain and the gated model of a larger size, one after the other."""
    for seed in large.SEEDS:
        for arm in ("plain", "gated"):
            print(kept(f"large-{size}-{arm}-{seed}", large.run, (size, arm, seed, device, files, steps)), flush=True)


def larger() -> list[dict[str, Any]]:
    """The runs of GPT-2 small that are there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SAVED.glob("large-124m-*.json"))]
