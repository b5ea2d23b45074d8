"""Under which automatic mixed precision a piece of a model runs, so that it can be run again under the same.

Autocast may be switched on anywhere: by the user around the call, by accelerate around the model's `forward`, or by the model
in the middle of its own. A block run alone under another state rounds differently, and is not the block that was met.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from uncollapse.restoring import restoring


@dataclass(frozen=True)
class AutocastState:
    """For each kind of device: whether autocast is on, and to which number format."""

    devices: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def here(*devices: str) -> AutocastState:
        """The state at this place, for the CPU and the given kinds of device."""
        kinds = [d for d in sorted({"cpu", *devices}) if torch.amp.is_autocast_available(d)]
        return AutocastState(tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in kinds))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run what is inside as if it stood where this state was taken. No cast weight is kept: weights may be changed inside."""
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.devices:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
            yield


@contextlib.contextmanager
def no_casts_kept() -> Iterator[None]:
    """Keep no cast weight meanwhile: within an autocast of the user's it would be met again after its weight was changed."""
    with restoring() as changes:
        changes.switch(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False)
        yield
