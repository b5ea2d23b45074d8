"""Run a piece of a recorded pass again: from one value to another, with the first replaced.

Everything beside the path keeps the value that it had in the pass. `rehearsed` does so in float64 and away from zero starts,
to ask what kind of function the piece is; `replayed` repeats the piece bit for bit, in its own number formats.

When not to use this: behind a decision of the model's own Python code on a value (`if x.max() > 1`, `.item()`), which is
repeated as it fell. And in an arbitrary memory layout: a piece that reads another view of what it wrote in place is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.tracing import Operation, Reference, Trace, is_freed
from uncollapse.errors import UnsupportedModel

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double}


class NotReplayable(UnsupportedModel):
    """The piece cannot be run again; the message says why."""


def replayed(trace: Trace, source: int, target: int, value: Tensor) -> Tensor:
    """Value `target` if value `source` had been `value`, bit for bit as the model would have made it."""
    return _run(trace, source, [target], value, recorded_tensor(trace))[target]


def rehearsed(trace: Trace, source: int, targets: Iterable[int]) -> Callable[[Tensor], dict[int, Tensor]]:
    """The values `targets` as a function of value `source`, in float64. Whatever is learned and entirely zero at this moment is
    taken at random instead: training will change it."""
    known: dict[int, Tensor] = {}
    plain = recorded_tensor(trace)
    wanted = list(targets)

    def side(node: int) -> Tensor:
        if node not in known:
            tensor = plain(node)
            if tensor.is_floating_point():
                tensor = tensor.detach().to(_precise(tensor.device))
                if not bool(tensor.any()) and _is_learned(trace, node):
                    generator = torch.Generator().manual_seed(node)
                    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) / 2 + 0.5
                    tensor = noise.to(tensor)
            known[node] = tensor
        return known[node]

    return lambda value: _run(trace, source, wanted, value.to(_precise(value.device)), side, precise=True)


def recorded_tensor(trace: Trace) -> Callable[[int], Tensor]:
    """The tensor of a node, as it was when it was made."""

    def tensor(node: int) -> Tensor:
        copy = trace.tape.copies.get(node)
        if copy is not None:
            return copy
        found, version = trace.tape.tensor(node), trace.tape.tensors[node][1]
        if found is None or (found.numel() and not found.is_meta and is_freed(found)):
            raise NotReplayable(
                f"a weight beside the path ({trace.nodes[node].operation}) exists only while its block runs"
            )
        if version is not None and found._version != version:
            raise NotReplayable(f"a value beside the path ({trace.nodes[node].operation}) was overwritten later")
        return found

    return tensor


def between(trace: Trace, source: int, target: int) -> list[int]:
    """The values on the way from `source` to `target`, that one included, in the order they were made. Where a matrix product
    stands on a way that only chooses (which tokens an expert is given), and on no other, what was chosen stays as it was."""
    reaching = trace.ancestors[target] | 1 << target
    found = [i for i in range(source + 1, target + 1) if reaching >> i & 1 and trace.depends(i, source)]
    if any(trace.is_matrix_product(i) for i in found):
        carried = _carrying(trace, source, target)
        if carried and not any(trace.is_matrix_product(i) for i in carried):
            return carried
    return found


def _carrying(trace: Trace, source: int, target: int) -> list[int]:
    """Those of the values that numbers of the source come through, and no whole numbers or booleans made of them."""
    found, frontier = set[int](), [target]
    while frontier:
        index = frontier.pop()
        if index != source and index not in found and trace.nodes[index].is_floating and trace.depends(index, source):
            found.add(index)
            frontier.extend(trace.nodes[index].inputs)
    return sorted(found)


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _is_learned(trace: Trace, node: int) -> bool:
    return any(trace.nodes[i].is_parameter for i in (node, *_members(trace.ancestors[node])))


def _members(bits: int) -> Iterable[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _run(
    trace: Trace,
    source: int,
    targets: list[int],
    value: Tensor,
    side: Callable[[int], Tensor],
    *,
    precise: bool = False,
) -> dict[int, Tensor]:
    values = {source: value}

    path = sorted({i for target in targets for i in between(trace, source, target)})
    for index in path:
        operation = trace.tape.operations.get(index)
        if operation is None or operation.kwargs.get("out") is not None:
            raise NotReplayable(f"{trace.nodes[index].operation} writes into a tensor it was given")
        precision = _precise(value.device) if precise else None
        args, kwargs = (_filled(given, values, side, precision) for given in (operation.args, operation.kwargs))
        values[index] = _done(operation, args, kwargs, precise)
    return {target: values[target] for target in targets}


def _filled(
    item: Any, values: Mapping[int, Tensor], side: Callable[[int], Tensor], precision: torch.dtype | None
) -> Any:
    """Recorded arguments with tensors in place of the references. No closure that calls itself: it would be a cycle that keeps
    tensors, and the model, alive."""
    if isinstance(item, Reference):
        if not item.is_whole:
            raise NotReplayable("another view of a value was written to in place")
        return values[item.node] if item.node in values else side(item.node)
    if type(item) in (list, tuple):
        return type(item)(_filled(i, values, side, precision) for i in item)
    if type(item) is dict:
        return {k: _filled(v, values, side, precision) for k, v in item.items()}
    if precision is not None and isinstance(item, torch.dtype) and item.is_floating_point:
        return precision
    if precision is not None and isinstance(item, Tensor) and item.is_floating_point():
        return item.to(precision)
    return item


def _done(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], precise: bool) -> Tensor:
    if precise and operation.function in _CASTS:
        first: Tensor = args[0]
        return first.to(_precise(first.device))
    with contextlib.ExitStack() as stack:  # states of this thread, which the probe around it puts back as well
        stack.enter_context(torch.no_grad())
        device = next(tensors_in([args, kwargs])).device.type
        if not precise and operation.autocast is not None:
            stack.enter_context(torch.autocast(device, operation.autocast))
        elif device != "meta" and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if operation.writes:
            args = (args[0].clone(), *args[1:])
            operation.function(*args, **kwargs)
            written: Tensor = args[0]
            return written
        return list(tensors_in(operation.function(*args, **kwargs)))[operation.result]
