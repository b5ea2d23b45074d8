"""Pure functions with tensors that are wrong in up to two ways each."""

from __future__ import annotations

import random
import warnings
from typing import Any

from tests.fuzzing.outcomes import ended
from tests.helpers.hostile import CALLS, FORMATS, OTHERS, called, tensors_of


def pure_function(seed: int) -> str:
    """A measure with up to three of its tensors replaced, each by up to two changes."""
    draw = random.Random(seed)
    name = draw.choice(list(CALLS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about sparse and nested tensors
        changed = _changed(name, draw)
        return ended(lambda: called(name, **changed))


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
