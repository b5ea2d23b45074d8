"""Decompositions of small matrices side by side, in as many threads as torch may use.

torch shares out each large operation by itself, and LAPACK loses time where it shares out a small matrix: a hundred tokens' Gram
matrix takes a third longer with two threads than with one. So several such matrices run side by side here, each in a thread of its
own that torch does not divide any further. Threads are kept over a whole pass (`threads_kept`), since each new one starts others.

When not to use it: for many small operations, which spend their time in Python, where one thread runs at a time. They gain nothing.
Nor for tensors on an accelerator, which computes in the order of one stream, nor for works that write to the same thing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Made = TypeVar("Made")


class _Own(threading.local):
    """Of this thread: its pool, while that is kept, and whether it belongs to one."""

    pool: ThreadPoolExecutor | None = None
    is_worker: bool = False


_own = _Own()


def shared_out(works: Sequence[Callable[[], Made]]) -> list[Made]:
    """What each of `works` returns, in their order. They run side by side; one after the other, in this thread, where torch may
    use a single one, where this is called within another call, and where somebody watches the operations of this thread. Raised
    is what the first of them raises that raises, once all are over.

    >>> shared_out([lambda: 1, lambda: 2])
    [1, 2]
    """
    if len(works) < 2 or torch.get_num_threads() == 1 or _own.is_worker or _is_watched():
        return [work() for work in works]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(work: Callable[[], Made]) -> Made:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work()

    with threads_kept():
        pool = _own.pool
        assert pool is not None
        futures = [pool.submit(run, work) for work in works]
        wait(futures)
        return [future.result() for future in futures]


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Within the block the threads of `shared_out` are kept from one call in this thread to the next. None are where torch may
    use a single one."""
    if _own.pool is not None or _own.is_worker or torch.get_num_threads() == 1:
        yield
        return
    with _threads(torch.get_num_threads()) as pool:
        _own.pool = pool
        try:
            yield
        finally:
            _own.pool = None


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads in each of which torch uses one only."""
    arrived = threading.Barrier(count + 1)

    def arrive() -> None:
        _own.is_worker = True
        # A thread keeps its number from the first time it is asked for on. Setting it is noted for threads to come, too.
        torch.set_num_threads(1)
        torch.get_num_threads()
        arrived.wait()

    with ThreadPoolExecutor(count, "uncollapse") as pool:
        for _ in range(count):
            pool.submit(arrive)
        arrived.wait()
        torch.set_num_threads(count)
        yield pool


def _is_watched() -> bool:
    """Whether a mode of torch's stands at this thread's operations. It would not see what runs in another one."""
    watching = torch._C._len_torch_function_stack() and torch._C._is_torch_function_mode_enabled()
    return bool(watching or torch._C._len_torch_dispatch_stack())
