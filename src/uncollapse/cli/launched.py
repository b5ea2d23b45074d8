"""A command that `torchrun` started in several processes: they come together, the first speaks, and all of them end together.

`LOCAL_RANK` chooses the GPU (`sources.load_model`). A process that ends early breaks its connections, and torchrun stops the
others; either way one of them says so in one line.

When not to use it: with another launcher, or from Python. There the caller makes the process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_SAID = "uncollapse/said"
_GRACE = 5.0  # seconds in which a stopped process ends by itself; torchrun kills it after 30
ENDED = (
    "uncollapse: expected all processes to stay until the end, got one that ended before, or the run was stopped. It may have been "
    "out of memory. Nothing was written: run it again."
)


class Stopped(BaseException):  # as KeyboardInterrupt, nobody on the way out takes it for an error
    """torchrun has asked this process to end."""


def is_launched() -> bool:
    """Whether torchrun started this command more than once."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process shows and writes what is found."""
    return not is_launched() or os.environ.get("RANK") == "0"


def speaks() -> bool:
    """Whether this process is the one to say why all of them end: the first to ask."""
    if not is_launched():
        return True
    import torch.distributed as d

    if not d.is_initialized():
        return is_first()
    store: Any = d.distributed_c10d._get_default_store()
    mine = os.environ["RANK"]
    with contextlib.suppress(Exception):  # its keeper may be gone
        return bool(store.compare_set(_SAID, "", mine) == mine.encode())
    return is_first()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the block this process belongs to the group of those that torchrun started. Nothing happens without torchrun."""
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed as d

    from uncollapse import processes

    with _stoppable():
        has_cuda = torch.cuda.is_available() and d.is_nccl_available()
        if has_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        d.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=processes.LASTING)
        yield
        d.destroy_process_group()


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Leave the block only when all processes can."""
    if not is_launched():
        yield
        return
    from uncollapse import processes

    with processes.agreed("uncollapse"):
        yield


def read_by_the_first(read: Callable[[], T]) -> T:
    """What the first process reads, in all of them: a file may lie on one machine only."""
    if not is_launched():
        return read()
    from uncollapse import processes

    return processes.by_the_first(read, "uncollapse")


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM raise `Stopped`; where nothing of Python runs, inside a library that waits, end the process."""

    def stop(*_: Any) -> None:
        handled.set()
        raise Stopped

    def watch() -> None:
        while os.read(reading, 1) not in (bytes([signal.SIGTERM]), b""):
            pass
        time.sleep(_GRACE)
        if not handled.is_set() and not over.is_set():
            if speaks():
                os.write(2, ENDED.encode() + b"\n")
            os._exit(2)

    handled, over = threading.Event(), threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.signal(signal.SIGTERM, stop)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)
        os.close(writing)
