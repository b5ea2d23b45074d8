"""Contexts around one model, entered and left in any order, with Ctrl-C in between."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch

import uncollapse as uc
from tests.fuzzing.outcomes import ended
from tests.helpers.interrupted import BATCH, interrupted_at, llama, standing
from uncollapse import restoring
from uncollapse.anatomy import interception, probing, turns
from uncollapse.interventions import without as without_module

COMPONENTS = ("mlp", "attention", "residual", "norm", "mask")
MODULES = [restoring, turns, interception, probing, without_module]


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

    how = ended(lambda: interrupted_at(MODULES, run, draw.randrange(3000)))
    torch.set_rng_state(torch.tensor(before["process"][-1], dtype=torch.uint8))
    if standing(model) != before:
        raise AssertionError("the model is left changed")
    return how


_models: list[torch.nn.Module] = []


def _model() -> torch.nn.Module:
    """One model for all cases, proved once: whatever a case leaves behind, the next ones meet."""
    if not _models:
        _models.append(llama())
        with uc.without(_models[0], "mlp", batch=BATCH):
            pass
    return _models[0]
