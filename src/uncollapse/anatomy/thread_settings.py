"""What torch keeps for each thread by itself, carried over to a new one.

Whether gradients are noted, under which automatic mixed precision operations run, who watches them, on which device and stream:
a new thread begins with torch's defaults, whatever its caller has set. Other settings are those of the process, and changed for all
threads at once.

When not to use it: in a thread that goes on to do something else. The watchers of operations stay with it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch.overrides import _get_current_function_mode_stack

from uncollapse.anatomy.autocast import AutocastState


def process_settings() -> tuple[object, ...]:
    """What torch and Python keep once for all threads, and code of a model may change for a while."""
    cuda = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        id(warnings.filters),
    )


class ThreadSettings:
    """The settings of the thread in which this is made."""

    def __init__(self) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = AutocastState.here("cuda", "mps", "xpu"), torch.is_autocast_cache_enabled()
        self._modes = _get_current_function_mode_stack()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        self._streams = [torch.cuda.current_stream(device) for device in devices]
        self._device = torch.cuda.current_device() if self._streams else None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """In a new thread: what is inside runs as in the one where this was noted."""
        autocast, keeps_casts = self._autocast
        for stream in self._streams:
            torch.cuda.set_stream(stream)
        if self._device is not None:
            torch.cuda.set_device(self._device)
        for (
            mode
        ) in self._modes:  # not entered: what stands for the default device would note that it is the present one
            torch._C._push_on_torch_function_stack(mode)
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad), autocast.entered():
            torch.set_autocast_cache_enabled(keeps_casts)
            yield
