"""Record one forward pass as a dataflow graph: which operation made which value from which, and inside which module.

A `TorchFunctionMode` sees every torch call the model's own code makes, whatever the model is called and however it is
written; module hooks supply the call stack. Values are numbered in static single assignment form: an in-place
operation makes a new value of every tensor on that storage, an operation that returns its own input makes none.

When not to use this: on long inputs. Every tensor of the pass is kept alive so that identities stay unique, weights aside that a
module has only while it runs (offloaded, gathered); eight tokens tell as much about the wiring as eight thousand.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uncollapse.anatomy.torch_calls import (
    LEARNED_MAPS,
    MATRIX_PRODUCTS,
    PASSES,
    SCALINGS,
    TEMPLATES,
    Path,
    counted_name,
    opened,
    operands_of,
    operation_name,
    tensors_at,
    tensors_in,
    writes_in_place,
)
from uncollapse.restoring import restoring


@dataclass(frozen=True)
class Node:
    """One value. `operation` made it from `inputs` in the module call `call`; parameters, constants and the batch have
    no inputs. `ordinal` counts what is `counted` as the same operation within the module's own forward (its children's do
    not count)."""

    index: int
    operation: str
    inputs: tuple[int, ...]
    call: int
    ordinal: int
    shape: tuple[int, ...]
    is_data: bool
    is_parameter: bool
    is_floating: bool
    counted: str
    scalars: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        total = 1
        for length in self.shape:
            total *= length
        return total


@dataclass
class Call:
    """One run of one module: the `ordinal`-th of that module in the pass. Nodes `first` ≤ i < `last` ran inside. `inputs` are
    the values found in its arguments, by path (`tensors_at`), `outputs` those in what it returns, under `None` where that is
    the tensor itself; `written` those that it put into its arguments itself (a state that is passed from block to block). Nodes
    from `ran` on were made by somebody's forward hooks."""

    index: int
    name: str
    ordinal: int
    parent: int
    first: int
    last: int = -1
    ran: int = -1
    inputs: dict[Path, int] = field(default_factory=dict)
    outputs: dict[Path | None, int] = field(default_factory=dict)
    written: dict[Path, int] = field(default_factory=dict)
    children: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A tensor among an operation's recorded arguments: value `node`, or (not `is_whole`) another view of its memory."""

    node: int
    is_whole: bool


@dataclass(frozen=True)
class Operation:
    """How one value was made: `function` of `args` and `kwargs`, which hold `Reference`s for tensors; `result` counts the tensors
    of its output, `member` the members of a tuple it returned (None: a tensor). `is_exchangeable` says whether another tensor
    can be put in its place there. `autocast` is the number format it ran under, None without."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int
    writes: bool
    autocast: torch.dtype | None
    member: int | None = None
    is_exchangeable: bool = True


_LARGE = 1 << 18  # bytes: more than any vector has
_COPIED = 1 << 17  # numbers in a weight that is copied because it will be freed: norms have no more


@dataclass
class Tape:
    """What is needed to run pieces of a pass again: the operations by node, and each node's tensor with its version. `noise` are
    the random values that pieces were run on, by shape and seed: most pieces begin with the same shape.
    `clear` it when the reading is over: it keeps every tensor of the pass alive. Weights that a module has only while it runs, and
    large tensors that are made of these alone, are let go, the small weights copied."""

    operations: dict[int, Operation] = field(default_factory=dict)
    copies: dict[int, Tensor] = field(default_factory=dict)
    tensors: dict[int, tuple[Tensor | weakref.ref[Tensor], int | None]] = field(default_factory=dict)
    noise: dict[tuple[tuple[int, ...], int], Tensor] = field(default_factory=dict)

    def tensor(self, node: int) -> Tensor | None:
        """The very tensor of a node; None if it is gone."""
        found = self.tensors[node][0]
        return found() if isinstance(found, weakref.ref) else found

    def clear(self) -> None:
        self.operations.clear()
        self.copies.clear()
        self.tensors.clear()
        self.noise.clear()


@dataclass
class Trace:
    """The graph of one pass. `ancestors[i]` and `learned_ancestors[i]` are bit sets over node numbers: everything value i
    depends on, and what it depends on through at least one matrix product with a weight. `results` are the values that the
    model returned. `pieces` names pieces of the graph, source and target, that the reading found and the proof runs again.
    `counts` says how often each call, by its number, did each operation itself."""

    nodes: list[Node]
    calls: list[Call]
    ancestors: list[int]
    learned_ancestors: list[int]
    consumers: list[list[int]]
    output: Any
    tape: Tape = field(default_factory=Tape)
    results: tuple[int, ...] = ()
    pieces: dict[Any, tuple[int, int]] = field(default_factory=dict)
    counts: dict[tuple[int, str], int] = field(default_factory=dict)

    def paths(self) -> dict[tuple[str, int], dict[str, int]]:
        """By module and run how often its own code did each operation, counted as `interception` does. Of a run in which
        somebody's hooks did some as well, nothing is said."""
        found: dict[tuple[str, int], dict[str, int]] = {(call.name, call.ordinal): {} for call in self.calls}
        hooked = {node.call for node in self.nodes if node.index >= self.calls[node.call].ran >= 0}
        for (number, operation), count in self.counts.items():
            if number not in hooked:
                found[self.calls[number].name, self.calls[number].ordinal][operation] = count
        return found

    def is_matrix_product(self, index: int) -> bool:
        return self.nodes[index].operation in MATRIX_PRODUCTS

    def is_learned_product(self, index: int) -> bool:
        """A matrix product of data with a weight."""
        return index in self._learned_products

    @functools.cached_property
    def _learned_products(self) -> frozenset[int]:
        return frozenset(
            node.index
            for node in self.nodes
            if node.operation in MATRIX_PRODUCTS
            and node.is_data
            and sum(self.nodes[i].is_data for i in node.inputs) == 1
            and any(self.nodes[i].is_parameter for i in node.inputs)
        )

    def is_data_product(self, index: int) -> bool:
        """A matrix product of data with data."""
        node = self.nodes[index]
        return node.operation in MATRIX_PRODUCTS and sum(self.nodes[i].is_data for i in node.inputs) >= 2

    def passes_through(self, index: int) -> int | None:
        """The value that node `index` merely moves, casts or scales, or `None` where it does more."""
        node = self.nodes[index]
        data = [i for i in node.inputs if self.nodes[i].is_data]
        if len(data) != 1:
            return None
        if node.operation in PASSES or node.operation in SCALINGS or node.operation == "add":
            return data[0]
        return None

    def depends(self, index: int, on: int) -> bool:
        return bool(self.ancestors[index] >> on & 1)

    def learned(self, index: int, on: int) -> bool:
        """Whether value `index` depends on value `on` through a learned matrix product."""
        return bool(self.learned_ancestors[index] >> on & 1)

    def is_learned_from(self, index: int) -> bool:
        """Whether value `index` comes from data through a learned matrix product."""
        return self.learned_ancestors[index] != 0

    def call_path(self, call: int) -> list[int]:
        """The call and those around it, innermost first."""
        path = []
        while call >= 0:
            path.append(call)
            call = self.calls[call].parent
        return path


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, batch: Iterable[Tensor]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.ancestors: list[int] = []
        self.learned_ancestors: list[int] = []
        self.consumers: list[list[int]] = []
        self.calls: list[Call] = [Call(0, "", 0, -1, 0)]
        self.stack = [0]
        self._value_of: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._on_storage: dict[int, list[int]] = {}
        self._ordinals: dict[tuple[int, str], int] = {}
        self._module_calls: dict[str, int] = {}
        self._passing: set[int] = set()
        self._watching: list[weakref.ref[Tensor]] = []
        self.tape = Tape()
        self._own = [*model.parameters(), *model.buffers()]  # kept: the numbers are theirs as long as they are there
        self._parameters = {id(p) for p in self._own}
        for tensor in batch:
            self._new(tensor, "batch", (), is_data=True)

    # Values -------------------------------------------------------------------------------------------------------
    def _new(
        self,
        tensor: Tensor,
        operation: str,
        inputs: tuple[int, ...],
        *,
        is_data: bool = False,
        is_parameter: bool = False,
        ordinal: int = 0,
        counted: str = "",
        scalars: tuple[float, ...] = (),
    ) -> int:
        index = len(self.nodes)
        node = Node(
            index,
            operation,
            inputs,
            self.stack[-1],
            ordinal,
            tuple(tensor.shape),
            is_data,
            is_parameter,
            tensor.is_floating_point(),
            counted or operation,
            scalars,
        )
        ancestors = learned = 0
        for i in inputs:
            ancestors |= self.ancestors[i] | 1 << i
            learned |= self.learned_ancestors[i]
            self.consumers[i].append(index)
        if operation in MATRIX_PRODUCTS:
            data = [i for i in inputs if self.nodes[i].is_data]
            if len(data) == 1 and any(self.nodes[i].is_parameter for i in inputs):
                learned |= self.ancestors[data[0]] | 1 << data[0]
        self.nodes.append(node)
        self.ancestors.append(ancestors)
        self.learned_ancestors.append(learned)
        self.consumers.append([])
        is_own = id(tensor) in self._parameters
        is_passing = not is_data and not is_own and self._is_passing(tensor, operation, inputs)
        self._remember(tensor, index, is_passing=is_passing)
        if is_passing:
            self._passing.add(index)
        self.tape.tensors[index] = (weakref.ref(tensor) if is_passing else tensor, _version(tensor))
        if is_parameter and not is_own and tensor.numel() <= _COPIED:
            self.tape.copies[index] = tensor.detach().clone()
        return index

    def _is_passing(self, tensor: Tensor, operation: str, inputs: tuple[int, ...]) -> bool:
        """Whether this is a weight that its module has only while it runs, what accelerate makes it of, or made of such alone."""
        if operation == "parameter":
            return True
        made_of_such = bool(inputs) and self._passing.issuperset(inputs)
        return _bytes(tensor) > _LARGE and (operation == "constant" or made_of_such)

    def _remember(self, tensor: Tensor, index: int, *, is_passing: bool) -> None:
        number = id(tensor)
        if number not in self._value_of:
            storage = storage_of(tensor)
            if storage:
                self._on_storage.setdefault(storage, []).append(number)
            if is_passing:  # its number, and the place of its memory, may then be those of another tensor
                forget = functools.partial(_forget, self._value_of, self._on_storage, number, storage)
                self._watching.append(weakref.ref(tensor, forget))
            else:
                self._alive.append(tensor)
        self._value_of[number] = index

    def value(self, tensor: Tensor) -> int:
        known = self._value_of.get(id(tensor))
        if known is not None:
            return known
        parameter = id(tensor) in self._parameters or isinstance(tensor, nn.Parameter)
        return self._new(tensor, "parameter" if parameter else "constant", (), is_parameter=parameter)

    def _referred(self, value: Any) -> Any:
        """The arguments of an operation with references in the place of tensors."""
        if isinstance(value, Tensor):
            node = self._value_of.get(id(value))
            return value if node is None else Reference(node, self.tape.tensor(node) is value)
        if type(value) in (list, tuple):
            return type(value)(self._referred(v) for v in value)
        if type(value) is dict:
            return {k: self._referred(v) for k, v in value.items()}
        return value

    # Operations ---------------------------------------------------------------------------------------------------
    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inner = opened(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        output = func(*args, **kwargs)
        name = operation_name(func)
        in_place = writes_in_place(func) or kwargs.get("out") is not None
        written = [kwargs["out"]] if kwargs.get("out") is not None else [args[0]] if in_place and args else []
        results = list(tensors_in(output))
        if not results and not in_place:
            return output
        if any(isinstance(a, torch.UntypedStorage) for a in args):
            return output  # a weight, read from a file in the middle of the pass: a constant, once it is used
        operands = operands_of(name, args, kwargs)[: 1 if name in TEMPLATES else None]
        inputs = tuple(self.value(t) for t in operands)
        is_data = any(self.nodes[i].is_data for i in inputs)
        is_parameter = not is_data and any(self.nodes[i].is_parameter for i in inputs)
        scalars = tuple(float(a) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool))
        counted = counted_name(name, operands)
        ordinal = self._next_ordinal(counted)
        referred = self._referred(args), self._referred(kwargs)
        device = operands[0].device.type if operands else "cpu"
        # Offloaded weights stand on "meta" between their runs; autocast knows no such device.
        is_cast = device != "meta" and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if is_cast else None
        for tensor in tensors_in(written):
            index = self._new(
                tensor,
                name,
                inputs,
                is_data=is_data,
                is_parameter=is_parameter,
                ordinal=ordinal,
                counted=counted,
                scalars=scalars,
            )
            for other in self._on_storage.get(storage_of(tensor), ()):
                self._value_of[other] = index
            self.tape.operations[index] = Operation(func, *referred, 0, True, autocast)
        if not in_place:
            ids = {id(t) for t in operands}
            for number, tensor in enumerate(results):
                if id(tensor) not in ids:
                    index = self._new(
                        tensor,
                        name,
                        inputs,
                        is_data=is_data,
                        is_parameter=is_parameter,
                        ordinal=ordinal,
                        counted=counted,
                        scalars=scalars,
                    )
                    member = None
                    if isinstance(output, (tuple, list)):
                        member = next((i for i, item in enumerate(output) if item is tensor), None)
                    exchangeable = isinstance(output, Tensor) or (type(output) is tuple and member is not None)
                    self.tape.operations[index] = Operation(
                        func, *referred, number, False, autocast, member, exchangeable
                    )
        return output

    def _next_ordinal(self, name: str) -> int:
        key = (self.stack[-1], name)
        ordinal = self._ordinals.get(key, 0)
        self._ordinals[key] = ordinal + 1
        return ordinal

    # Modules ------------------------------------------------------------------------------------------------------
    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ordinal = self._module_calls.get(name, 0)
        self._module_calls[name] = ordinal + 1
        call = Call(len(self.calls), name, ordinal, self.stack[-1], len(self.nodes))
        call.inputs = self._values_at(args, kwargs)
        call.first = len(self.nodes)
        self.calls[self.stack[-1]].children.append(call.index)
        self.calls.append(call)
        self.stack.append(call.index)

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self.calls[self.stack.pop()]
        call.last = len(self.nodes)
        after = self._values_at(args, kwargs)
        call.written = {path: index for path, index in after.items() if call.inputs.get(path) != index}
        for path, item in tensors_at(output):
            call.outputs[path or None] = self.value(item)

    def _values_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Path, int]:
        return {path: self.value(item) for given in (args, kwargs) for path, item in tensors_at(given)}


def _forget(value_of: dict[int, int], on_storage: dict[int, list[int]], number: int, storage: int, _gone: Any) -> None:
    value_of.pop(number, None)
    if number in on_storage.get(storage, ()):
        on_storage[storage].remove(number)


def storage_of(tensor: Tensor) -> int:
    """The memory that a tensor lies in, the same for all views of it; 0 where it has none of its own."""
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # a tensor subclass without storage of its own
        return 0


def _bytes(tensor: Tensor) -> int:
    """What a tensor keeps in memory, those that it is a view of included."""
    try:
        return int(tensor.untyped_storage().nbytes())
    except (RuntimeError, NotImplementedError):  # as above
        return tensor.numel() * tensor.element_size()


def _version(tensor: Tensor) -> int | None:
    """How often the tensor's memory was written to; None where torch does not count."""
    try:
        return int(tensor._version)
    except RuntimeError:  # an inference tensor
        return None


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor is gone: of the whole weights of a sharded model, behind the block that used them."""
    try:
        return tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # a tensor without storage of its own
        return False


def trace(model: nn.Module, batch: Mapping[str, Any]) -> Trace:
    """The dataflow graph of `model(**batch)`, run once without gradients. The model's output is in `Trace.output`.

    Hooks are gone again afterwards, also after an exception. Errors of the model itself pass through.
    """
    recorder = _Recorder(model, tensors_in(batch))
    thread = threading.get_ident()  # hooks fire for every thread that runs the model; only this one is recorded
    with restoring() as changes:
        for name, module in model.named_modules():
            if name == "":
                continue

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if threading.get_ident() == thread:
                    recorder.enter(name, args, kwargs)

            def done(*_: Any) -> None:
                if threading.get_ident() == thread:
                    recorder.calls[recorder.stack[-1]].ran = len(recorder.nodes)

            def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if threading.get_ident() == thread:
                    recorder.leave(args, kwargs, output)

            changes.hook(module, "forward_pre", enter, with_kwargs=True)
            changes.hook(module, "forward", done, prepend=True)
            changes.hook(module, "forward", leave, with_kwargs=True, always_call=True)
        with torch.no_grad(), recorder:
            recorder.calls[0].inputs = recorder._values_at((), dict(batch))
            output = model(**batch)
    recorder.calls[0].last = recorder.calls[0].ran = len(recorder.nodes)
    results = tuple(dict.fromkeys(recorder.value(t) for t in tensors_in(output)))
    nodes, learned = _with_own_tokens(recorder.nodes, recorder.ancestors)
    graph = recorder.ancestors, learned, recorder.consumers
    return Trace(nodes, recorder.calls, *graph, output, recorder.tape, results, counts=recorder._ordinals)


def _with_own_tokens(nodes: list[Node], ancestors: list[int]) -> tuple[list[Node], list[int]]:
    """Count tokens that do not come from the batch as data too: learned queries, start tokens that a model makes itself.

    They are told by what becomes of them: the input of a learned map, never its weight.
    """
    own: set[int] = set()
    seen: set[int] = set()
    frontier = [n.inputs[0] for n in nodes if n.operation in LEARNED_MAPS and nodes[n.inputs[1]].is_parameter]
    while frontier:
        node = nodes[frontier.pop()]
        if node.index in seen or node.is_data or len(node.shape) < 2 or not node.is_floating:
            continue
        seen.add(node.index)
        if node.operation in {"embedding", "parameter"}:
            own.add(node.index)
        else:
            frontier.extend(node.inputs[:1] if node.operation in MATRIX_PRODUCTS else node.inputs)
    found: list[Node] = []
    learned: list[int] = []
    for node in nodes:
        is_data = node.is_data or node.index in own or any(found[i].is_data for i in node.inputs)
        found.append(replace(node, is_data=is_data, is_parameter=node.is_parameter and not is_data))
        through = 0
        for i in node.inputs:
            through |= learned[i]
        data = [i for i in node.inputs if found[i].is_data]
        if node.operation in MATRIX_PRODUCTS and len(data) == 1 and any(found[i].is_parameter for i in node.inputs):
            through |= ancestors[data[0]] | 1 << data[0]
        learned.append(through)
    return found, learned
