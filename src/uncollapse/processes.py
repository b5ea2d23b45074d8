"""The processes of a `torch.distributed` group that answer one request together.

`met` is where they come together, `agreed` goes on only if all of them can, `gathered` and `reduced` exchange what they found, and
`by_the_first` lets one of them do what need not be done twice. A process that is alone passes through all of it unchanged.

A process that ends early breaks its connections, so whoever waits for it gets an error, and that becomes one line. One that was
never called cannot be told from a slow one: `met` waits for it no longer than `PATIENCE`.

When not to use it: inside a loop over batches. Each exchange waits for the slowest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor

from uncollapse.errors import InputError, UncollapseError
from uncollapse.measures.running import reducing_device

T = TypeVar("T")
How = Literal["sum", "least", "most"]

PATIENCE = 120.0  # seconds until a process that does not come was probably not called
# How long a launched process waits for one that still computes. One that has ended is noticed at once, by its connection.
LASTING = timedelta(days=7)
_EVERY = 0.02
_MEETING = "uncollapse/meeting"
_LARGEST = 1 << 22  # numbers that are exchanged at once


class LostProcess(UncollapseError):  # noqa: N818 - it names what was found, like `UnsupportedModel`
    """Another process of the group ended, or stopped, before all was done."""


def count() -> int:
    """How many processes are in the group; 1 where there is none."""
    return torch.distributed.get_world_size() if _is_grouped() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return torch.distributed.get_rank() if _is_grouped() else 0


def _is_grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def met(caller: str) -> None:
    """Wait until every process has come to the same call.

    Raises `InputError` where some do not come: a function that was called by the first process alone would wait for ever.
    """
    size = count()
    if size == 1:
        return
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    with _lost(caller):
        wanted = -(-store.add(_MEETING, 1) // size) * size  # those of this meeting, and of all before it
        deadline = time.monotonic() + PATIENCE
        while (here := store.add(_MEETING, 0)) < wanted:
            if time.monotonic() > deadline:
                store.add(_MEETING, -1)
                raise InputError(
                    f"{caller}: expected all {size} processes of the group to call it, got {here - wanted + size} of them "
                    f"in {PATIENCE:.0f} seconds. It may be called in one process only. Call it in every one, or pass "
                    "alone=True there."
                )
            time.sleep(_EVERY)


def gathered(value: T, caller: str) -> list[T]:
    """What every process has, in their order. The values are pickled: keep them small."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _lost(caller):
        torch.distributed.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def agreed(caller: str) -> Iterator[None]:
    """Leave the block only when all processes can. Where some cannot, they raise their own errors, and the others
    `UncollapseError` with the first of these."""
    try:
        yield
    except LostProcess:
        raise
    except Exception as error:  # whatever it is: the others would wait for this process
        with contextlib.suppress(LostProcess):  # the error of this one says more
            gathered(_said(caller, error), caller)
        raise
    refused = [(which, said) for which, said in enumerate(gathered("", caller)) if said]
    if refused:
        which, said = refused[0]
        raise UncollapseError(f"{said} This was in process {which}.")


def _said(caller: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UncollapseError) else f"{caller}: ended with {type(error).__name__}: {text}."


def by_the_first(make: Callable[[], T], caller: str) -> T:
    """What the first process makes, in all of them: a copy in the others, which wait for it."""
    if count() == 1:
        return make()
    made: list[Any] = [None]
    with agreed(caller):
        if number() == 0:
            made[0] = make()
    with _lost(caller):
        torch.distributed.broadcast_object_list(made, src=0)
    result: T = made[0]
    return result


def reduced(how: How, tensors: Sequence[Tensor], caller: str) -> list[Tensor]:
    """The tensors, all of one number format and of the same shapes in every process, summed over the processes or their smallest
    or largest elements, on the CPU. NaN stays NaN."""
    if count() == 1:
        return [tensor.cpu() for tensor in tensors]
    found: list[Tensor] = []
    while len(found) < len(tensors):
        several = [tensors[len(found)]]
        for further in tensors[len(found) + 1 :]:
            if sum(t.numel() for t in several) + further.numel() > _LARGEST:
                break
            several.append(further)
        flat = torch.cat([t.detach().reshape(-1).to("cpu") for t in several]).to(reducing_device())
        with _lost(caller):
            flat = _reduced(how, flat).cpu()
        parts = flat.split([t.numel() for t in several])
        found += [part.reshape(t.shape).clone() for part, t in zip(parts, several, strict=True)]
    return found


_OPERATIONS: dict[How, str] = {"sum": "SUM", "least": "MIN", "most": "MAX"}


def _reduced(how: How, flat: Tensor) -> Tensor:
    operations = torch.distributed.ReduceOp
    operation = getattr(operations, _OPERATIONS[how])
    if how == "sum" or not flat.is_floating_point():
        torch.distributed.all_reduce(flat, operation)
        return flat
    # Which of two numbers is larger, one of them NaN, each backend decides itself.
    unknown = flat.isnan().to(torch.int32)
    flat = flat.nan_to_num(nan=torch.inf if how == "least" else -torch.inf, posinf=torch.inf, neginf=-torch.inf)
    torch.distributed.all_reduce(flat, operation)
    torch.distributed.all_reduce(unknown, operations.MAX)
    return flat.masked_fill(unknown.bool(), torch.nan)


@contextlib.contextmanager
def _lost(caller: str) -> Iterator[None]:
    """An exchange that fails, because another process is gone, becomes one line."""
    try:
        yield
    except UncollapseError:
        raise
    except RuntimeError as error:  # every backend raises another kind of it
        reason = " ".join(str(error).split())[:120].rstrip(" .:")
        raise LostProcess(
            f"{caller}: expected all {count()} processes to stay until the end, got one that ended before ({reason}). It may have "
            "been out of memory, or stopped. Nothing was written: run it again."
        ) from error
