"""Weights that accelerate keeps elsewhere between the runs of their modules: in memory, or in the files of a checkpoint.

Between two runs such a parameter stands on `meta`. When its module runs, it is read, and then let go. `kept_weight` reads one for
somebody who wants the numbers and not the run. Within `held_weights` a module that runs many times reads its weights once.

When not to use it: around a whole model, which would then be held as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.restoring import restoring


def kept_weight(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter, read from where accelerate keeps it; None where it keeps none of that name."""
    for hook in _offloading(module):
        with contextlib.suppress(KeyError):
            return torch.as_tensor(hook.weights_map[name])
    return None


@contextlib.contextmanager
def held_weights(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of `module`, and of the modules in it, are read when they are first wanted, and kept."""
    with restoring() as changes:
        for each in module.modules():
            for hook in _offloading(each):
                changes.set(hook, "weights_map", _Held(hook.weights_map))
        yield


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that bring a module its weights."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None]


class _Held(Mapping[str, Any]):
    """Weights by name, each read once."""

    def __init__(self, kept: Mapping[str, Any]) -> None:
        self._kept, self._read = kept, dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._kept[name]
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
