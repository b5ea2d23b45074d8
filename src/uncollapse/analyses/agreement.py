"""Whether the processes of a group were asked for the same thing. They share out one corpus, and what they saw is put together: a
share of one text, or of one model, is no share of another.

When not to use it: in a process that is alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse import processes, sources
from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import known_example
from uncollapse.anatomy.sharded_weights import require_faithful
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.errors import InputError
from uncollapse.interventions.without import is_ablated
from uncollapse.probe.passes import on_device

SAME_OUTPUT = 0.02  # of a number: what formats and kernels of two machines differ by is less, two models differ by more
OF_A_MACHINE = frozenset({"device", "device_map"})  # options that every process may have its own of
_COLUMNS = 4096
_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # as which bits are read


def require_same(caller: str, what: str, value: object) -> None:
    """Refuse processes whose `value` is another than that of the first. `what` names it."""
    first, *others = processes.gathered(repr(value), caller)
    for which, other in enumerate(others, 1):
        if other != first:
            raise _another(caller, what, which)


def require_same_request(
    caller: str, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any], *, shares: bool
) -> None:
    """Refuse processes that have other batches, options, weights or outputs than the first, or called another function.

    shares: whether each of them holds the whole model; otherwise they hold one together, which is run by all of them and must be
    the function that it is without a probe.
    """
    batch = on_device(known_example(model) or batches[0], device_of(model))
    with processes.agreed(caller):
        with probing(model):
            output = model(**batch)
        if not shares and not is_ablated(model):
            require_faithful(caller, model, batch, output)
    said = {
        "texts or batches": sources.fingerprint(batches),
        "options": repr(sorted(((k, v) for k, v in options.items() if k not in OF_A_MACHINE), key=str)),
        "model": (type(model).__name__, sum(p.numel() for p in model.parameters())),
        "weights": digests(model) if shares else [],
    }
    (call, mine, output_of_first), *others = processes.gathered((caller, said, _summary(output)), caller)
    for which, (other_call, theirs, other_output) in enumerate(others, 1):
        differ = [what for what in mine if mine[what] != theirs[what]]
        if other_call != call:
            differ = [f"call ({other_call} beside {call})"]
        elif not differ and not torch.allclose(other_output, output_of_first, rtol=SAME_OUTPUT, atol=0, equal_nan=True):
            differ = ["outputs"]
        if differ:
            raise _another(caller, differ[0], which)


def digests(model: nn.Module) -> list[tuple[int, int]]:
    """By what the parameters in memory are told from others: of each, two sums of its bits, read as whole numbers and multiplied
    by random ones: a factor for every row of 4,096 of them, and one for every place in a row.

    Numbers that differ in one place, or that stand in another order, have other sums. Made to agree they can be: this is no
    cryptographic digest, and costs two readings from memory.
    """
    found = []
    for p in model.parameters():
        if not p.is_meta and type(p.data) is Tensor and p.element_size() in _NUMBERS:
            bits = p.detach().contiguous().view(-1).view(_NUMBERS[p.element_size()])
            rows = [
                bits[: len(bits) // _COLUMNS * _COLUMNS].view(-1, _COLUMNS),
                bits[None, len(bits) // _COLUMNS * _COLUMNS :],
            ]
            by_row = torch.cat([each.sum(1, dtype=torch.int64) for each in rows])
            by_place = torch.cat([each.sum(0, dtype=torch.int64) for each in rows])
            found.append((_weighted(by_row), _weighted(by_place)))
    return found


def _weighted(sums: Tensor) -> int:
    generator = torch.Generator().manual_seed(len(sums))
    factors = torch.randint(-(2**62), 2**62, (len(sums),), generator=generator, dtype=torch.int64)
    return int((sums * factors.to(sums.device)).sum())  # what is beyond 64 bits is dropped, alike everywhere


def _summary(output: Any) -> Tensor:
    """Two numbers by which outputs are compared."""
    first = next((t for t in tensors_in(output) if t.is_floating_point()), torch.zeros(1)).double()
    return torch.stack([first.abs().mean(), first.square().mean()]).cpu()


def _another(caller: str, what: str, which: int) -> InputError:
    return InputError(
        f"{caller}: expected the same in every process, got other {what} in process {which} than in process 0. The batches are "
        "shared out here, so each process is given all of them. Pass the same to each, or alone=True."
    )
