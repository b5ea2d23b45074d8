"""What each head of an attention writes: the vectors O_h W_h that its output projection adds up, from a live model.

When not to use this: to say what the model does with a head. Whatever comes after the sum sees only the sum. `identify`
answers whether one head can be told from the others there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import BlockAlone, blocks_alone, runs_of_sequences
from uncollapse.anatomy.examples import piece_of
from uncollapse.anatomy.interception import ChangedPath, Handler, Point, counted, device_of, in_turn, intercepted
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.output_maps import gate_noted, gated, laid_out, product_map
from uncollapse.anatomy.probing import full_precision, probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.sequence_loops import Runs, Sequences
from uncollapse.anatomy.stacks import Padding, paddings, real_tokens
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.summands import summand
from uncollapse.anatomy.torch_calls import operands_of, operation_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, Block, Gate, Layout, ModuleCall, Place
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.probe.projections import bears_out, holds, projected_cloud, projection_map, side_by_side
from uncollapse.restoring import leaves_no_trace, restoring
from uncollapse.sources import check_batches
from uncollapse.wrappers import module_of


@dataclass(frozen=True)
class HeadContributions:
    """What each head of one attention call adds to its output projection's output.

    contributions: O_h W_h, in the model's number format, in at least single precision. bias: that of the projection, zeros if it
    has none. `contributions.sum(-2) + bias` is the output of the projection, up to rounding. mask: True for a real token.
    added_as_is: this output is, bit for bit, what the residual addition adds to the stream. False if something comes
    between: a sandwich or output norm (Gemma, OLMo-2), a LayerScale (DINOv2), a residual multiplier (Granite).
    """

    block: int
    kind: Literal["self", "cross"]
    stack: Literal["encoder", "decoder"] | None
    contributions: Float[Tensor, "batch token head width"]
    bias: Float[Tensor, " width"]
    mask: Bool[Tensor, "batch token"]
    added_as_is: bool


@leaves_no_trace
def head_contributions(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    blocks: Collection[int] | None = None,
    layout: Layout | None = None,
    grad: bool = False,
) -> Iterator[HeadContributions]:
    """What each head writes, vector by vector: an iterator over the attention calls in order of depth, self before cross.

    Y = sum_h O_h W_h + 1 b^T, with O_h the h-th part of the input of the output projection and W_h its rows. The contributions
    O_h W_h [batch, token, head, width] are exact even if something comes between attention and projection (position gates, a
    norm), since it has already acted on O_h. They are invariant under the value-output gauge. A change of the value bias moves
    constants between them and b.

    The model runs once, when this is called, in evaluation mode and without gradients, on `batch` unchanged. blocks: their
    numbers from 0, all by default. layout: see `uncollapse.Layout`. Between two steps of the iterator only the inputs of the
    projections are kept, n D numbers per call. The n H d numbers of one call are computed when it is reached, from the weights
    at that time. `list(...)` keeps all of them.

    grad: keep the contributions on the graph of that pass, as functions of what the heads mixed, so that they can be differentiated
    by the inputs and weights before them. The graph stays alive as long as they do.

    Y is the output of the projection. If `added_as_is` is False, it is not yet what enters the residual stream: a factor after
    it multiplies all contributions equally, but a norm divides by the size of the whole sum.

    Each product that mixes values counts with its own heads. A difference of two softmaxes that is written as two products,
    A V - c B V, has twice the heads: those of A first, then those of B, with their factor -c. The sum of the two is one head
    of the model.

    Misleading as a measure of importance: contributions cancel, and the energy of their sum is not the sum of their energies.
    With quantised activations they sum to the output only as far as the projection is linear.

        for found in uc.head_contributions(model, tokenizer("A sentence.", return_tensors="pt")):
            found.contributions.norm(dim=-1)

    Raises `InputError` for a batch or block that cannot be used, `UnsupportedModel` if the anatomy cannot be proved or an
    attention has no output projection that is a linear map of its heads.
    """
    model = module_of(model)
    (given,) = check_batches([batch], model=model)
    device = device_of(model)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    try:
        return _contributions(model, given, proved_anatomy(model, given, layout), blocks, grad)
    except ChangedPath:  # it was proved on a batch of another kind
        return _contributions(model, given, proved_anatomy(model, given, layout, anew=True), blocks, grad)


def _contributions(
    model: nn.Module, given: Mapping[str, Any], anatomy: Anatomy, blocks: Collection[int] | None, grad: bool
) -> Iterator[HeadContributions]:
    """What `head_contributions` gives, of a model with this anatomy."""
    readings = _readings(model, anatomy, blocks)
    with probing(model):
        padding = paddings(model, given, anatomy, blocks_alone)
        whole = {r.number for r in readings if r.call.projection is None}
        piece = piece_of(model, given, real_tokens(anatomy, given)) if whole else {}
        alone = blocks_alone(model, piece, anatomy, whole) if whole else {}
        runs = runs_of_sequences(model, given, anatomy, [p.segments for p in padding])
        for reading in readings:
            reading.alone = alone.get(reading.number) if reading.call.projection is None else None
            reading.runs = runs.get((reading.number, reading.part))
            reading.keeps_graph = grad
        with torch.set_grad_enabled(grad), _installed(model, readings):
            model(**given)
    return map(_Contributor(model, given, anatomy, padding), readings)


@dataclass
class _Reading:
    """One output projection in one pass: what it read, and where that came from. `matrix` and `bias` are those of a product in
    the attention's own code. Where W_O is the whole map from the mixed values, `calls_output` holds those of each call, as
    [sequence, head, token, width], or why they are missing; `given` is then what the heads write together."""

    number: int
    kind: Literal["self", "cross"]
    block: Block
    part: int
    call: AttentionCall
    heads: int
    features: tuple[int, ...] = ()
    alone: BlockAlone | None = None  # where W_O is the whole map from the mixed values
    sequences: int = 0
    calls_output: dict[int, Tensor | str] = field(default_factory=dict)
    runs: tuple[Sequences, Runs] | str | None = None  # where calls mix one sequence at a time
    turns: dict[int, list[Tensor]] = field(default_factory=dict)  # and what each turn of a call mixed
    factors: dict[Point, Tensor | None] = field(default_factory=dict)  # what the gates on the mixed values were
    given: Tensor | None = None
    heads_output: Tensor | None = None
    output: Tensor | None = None
    matrix: Tensor | None = None
    bias: Tensor | None = None
    added_as_is: bool = False
    keeps_graph: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @property
    def place(self) -> str:
        return f"block {self.number} ({self.block.parts[self.part].module})"

    def noted(self, value: Tensor) -> Tensor:
        """A value of the pass, off its graph unless that is to be kept."""
        return value if self.keeps_graph else value.detach()

    def is_own(self) -> bool:
        """Whether this is met in the pass that was started for it: another thread may run the model meanwhile."""
        return self.thread == threading.get_ident()


def _readings(model: nn.Module, anatomy: Anatomy, blocks: Collection[int] | None) -> list[_Reading]:
    count = len(anatomy.blocks)
    wanted = range(count) if blocks is None else sorted(set(blocks))
    if isinstance(blocks, str) or not all(isinstance(b, int) and 0 <= b < count for b in wanted):
        raise InputError(
            f"head_contributions: expected block numbers from 0 to {count - 1}, got {blocks!r}. "
            "Blocks are counted from 0, encoder first. Pass for example blocks=[2]."
        )
    found = []
    for number in wanted:
        block = anatomy.blocks[number]
        for index, part in enumerate(block.parts):
            if not part.attention:
                continue
            call = part.attention[0]
            if part.no_output_map or (call.projection is None and part.written is None):
                raise UnsupportedModel(
                    "head_contributions: expected an output projection, or one linear map from the heads to what is added, in "
                    f"block {number} ({part.module}) of {type(model).__name__}, got none: "
                    f"{part.no_output_map or 'nothing learned follows the attention'}. Choose other blocks."
                )
            kind: Literal["self", "cross"] = "cross" if part.kind == "cross" else "self"
            found.append(_Reading(number, kind, block, index, call, part.heads, part.features))
    return found


@contextlib.contextmanager
def _installed(model: nn.Module, readings: Sequence[_Reading]) -> Iterator[None]:
    """Within the block every reading takes note of what its projection reads."""
    handlers: dict[Point, Handler] = {}
    modules: dict[str, dict[int, _Reading]] = {}
    streams: list[tuple[Place, Action]] = []
    for reading in readings:
        projection = reading.call.projection
        if projection is None:
            _note_written(reading, handlers, streams)
            continue
        handlers[reading.call.product] = _noting_heads(reading)
        if isinstance(projection, ModuleCall):
            modules.setdefault(projection.name, {})[projection.call] = reading
        else:
            handlers[projection] = _noting_product(reading)
    with restoring() as changes:
        changes.enter(met(model, streams, handlers=handlers))
        # Not strict: inside a `without` another handler may stand at the same addition, and answer first.
        changes.enter(intercepted(model, _noting_additions(readings), strict=False))
        runs = changes.enter(counted(model, modules))
        for name, by_call in modules.items():
            module = model.get_submodule(name)

            def enter(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                name: str = name,
                by_call: Mapping[int, _Reading] = by_call,
            ) -> None:
                reading = by_call.get(runs.begin(name))
                if reading is not None and reading.is_own():
                    reading.given = reading.noted(next(tensors_in([args, kwargs])))

            def leave(
                _: nn.Module, __: Any, output: Any, name: str = name, by_call: Mapping[int, _Reading] = by_call
            ) -> None:
                reading = by_call.get(runs.counts[name] - 1)
                if reading is not None and reading.is_own():
                    reading.output = next(tensors_in(output)).detach()

            changes.hook(module, "forward_pre", enter, with_kwargs=True)
            changes.hook(module, "forward", leave)
        yield


def _noting_heads(reading: _Reading) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        if reading.is_own():
            reading.heads_output = next(tensors_in(output)).detach()
        return output

    return handler


def _note_written(reading: _Reading, handlers: dict[Point, Handler], streams: list[tuple[Place, Action]]) -> None:
    """Take note of the mixed values of every call of an attention, and of what its heads write together."""
    part, axes = reading.block.parts[reading.part], reading.block.axes
    assert part.written is not None
    assert axes is not None

    def entering(stream: Tensor) -> None:
        if reading.is_own():
            reading.sequences = len(axes.cloud(stream))

    def mixing(number: int, call: AttentionCall) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            if reading.is_own():
                try:
                    at_once = 1 if call.turns else reading.sequences
                    found = laid_out(reading.noted(output), call, function, args, kwargs, at_once).clone()
                    if call.turns:
                        reading.turns.setdefault(number, []).append(found)
                        found = _in_order(reading.turns[number], reading.runs, number)
                    reading.calls_output[number] = found
                except UnreadableError as error:
                    reading.calls_output[number] = str(error)
            return output

        return handler

    def writing(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        if reading.is_own():
            reading.output = next(tensors_in(output)).detach().clone()
            reading.given = reading.output
        return output

    def gating(gate: Gate) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            if reading.is_own():
                reading.factors[gate.point] = gate_noted(gate, args, kwargs, output)
            return output

        return handler

    streams.append((reading.block.entry, entering))
    handlers |= {gate.point: gating(gate) for gate in part.gates}
    for number, call in enumerate(part.attention):
        handlers[call.product] = mixing(number, call)
    own = handlers.get(part.written)
    handlers[part.written] = writing if own is None else in_turn(writing, own)


def _noting_product(reading: _Reading) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        found = product_map(function, args, kwargs) if reading.is_own() else None
        if found is not None:
            reading.given, reading.matrix, reading.bias = found.given, found.matrix, found.bias
            if reading.keeps_graph:
                reading.given = operands_of(operation_name(function), args, kwargs)[_read_operand(function)]
            reading.output = output.detach()
        return output

    return handler


def _in_order(turns: Sequence[Tensor], runs: tuple[Sequences, Runs] | str | None, call: int) -> Tensor:
    """What the turns of a loop mixed so far, in the order of the sequences: [sequence, head, token, width], zeros behind the end of
    the shorter ones.

    Raises `UnreadableError` where it is not known which is which."""
    if runs is None or isinstance(runs, str):
        raise UnreadableError(runs or "its sequences were not told apart")
    order = runs[1][call]
    if len(turns) > len(order):
        raise UnreadableError("its loop over sequences has more turns than there are sequences")
    laid = sorted(zip(order, turns, strict=False), key=lambda each: each[0])
    rows = [mixed[0].transpose(0, 1) for _, mixed in laid]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)


def _read_operand(function: Callable[..., Any]) -> int:
    """Which operand of a product with a weight is read: `addmm` takes what it adds first."""
    return 1 if operation_name(function) == "addmm" else 0


def _noting_additions(readings: Sequence[_Reading]) -> dict[Point, Handler]:
    """Compare what each residual addition adds with what the projection before it gave."""
    added: dict[Point, list[tuple[int, _Reading]]] = {}
    for reading in readings:
        alone = frozenset({reading.part})
        for node in (node for residual in reading.block.residuals for node in residual.additions):
            for operand, leaves in enumerate(node.leaves):
                if leaves == alone:
                    added.setdefault(node.point, []).append((operand, reading))

    def noting(met: Sequence[tuple[int, _Reading]]) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for operand, reading in met:
                if reading.is_own() and reading.output is not None:
                    reading.added_as_is = _same_tokens(summand(function, args, kwargs, operand), reading.output)
                    reading.output = None
            return function(*args, **kwargs)

        return handler

    return {point: noting(met) for point, met in added.items()}


def _same_tokens(update: Tensor, output: Tensor) -> bool:
    """Whether two tensors are equal, the order of their first two axes aside."""
    if update.dtype != output.dtype or update.numel() != output.numel():
        return False
    swapped = update.transpose(0, 1) if update.ndim > 2 else update
    return any(torch.equal(each.flatten(), output.flatten()) for each in (update, swapped))


def _is_read(mixed: Tensor | None, heads_output: Tensor | None) -> bool:
    """Whether the projection reads, bit for bit, what the product gave, the heads side by side: then they are told apart without
    knowing what the product's other axes hold."""
    if mixed is None or heads_output is None or heads_output.ndim not in {3, 4}:
        return False
    return holds(mixed, heads_output if heads_output.ndim == 4 else heads_output.unsqueeze(0))


@dataclass(frozen=True)
class _Contributor:
    """Turns what a projection read into contributions, when it is asked."""

    model: nn.Module
    batch: Mapping[str, Any]
    anatomy: Anatomy
    paddings: Sequence[Padding]

    def __call__(self, reading: _Reading) -> HeadContributions:
        cloud = self._mixed(reading) if reading.alone is not None else self._cloud(reading)
        matrix, bias = self._map(reading, cloud)
        cloud, matrix = side_by_side(cloud, reading.features, -1), side_by_side(matrix, reading.features, 0)
        dtype = torch.promote_types(torch.promote_types(cloud.dtype, matrix.dtype), torch.float32)
        count, width = reading.heads, matrix.shape[1]
        with torch.set_grad_enabled(reading.keeps_graph), full_precision(cloud):
            outputs = cloud.to(dtype).flatten(0, 1).unflatten(-1, (count, -1)).transpose(0, 1)
            written = outputs @ matrix.to(cloud.device, dtype).reshape(count, -1, width)
        return HeadContributions(
            block=reading.number,
            kind=reading.kind,
            stack=reading.block.stack,
            contributions=written.transpose(0, 1).unflatten(0, cloud.shape[:2]),
            bias=bias.to(cloud.device, dtype),
            mask=self._mask(reading, cloud),
            added_as_is=reading.added_as_is,
        )

    def _cloud(self, reading: _Reading) -> Tensor:
        """What the projection read, as [batch, token, mixed]."""
        mixed, heads_output = reading.given, reading.heads_output
        size = next(v.shape[0] for v in self.batch.values() if isinstance(v, Tensor) and v.ndim)
        if heads_output is not None and heads_output.ndim == 3 and heads_output.shape[0] % size == 0:
            heads_output = heads_output.unflatten(0, (size, -1))
        width = reading.heads * reading.call.head_width
        unread = next(
            (call.unreadable for call in reading.block.parts[reading.part].attention if call.unreadable), None
        )
        if unread is not None and not _is_read(mixed, heads_output):
            raise UnsupportedModel(
                f"head_contributions: expected an attention whose heads can be told apart in what its output projection reads, got "
                f"one in {reading.place} that was not read: {unread}. Choose other blocks."
            )
        cloud = None
        if mixed is not None and mixed.shape[-1] == width:
            known = heads_output if heads_output is not None and heads_output.ndim == 4 else None
            axes = None if reading.block.axes is None else reading.block.axes.within
            if axes is not None and len(axes.token) == 1 and mixed.ndim == axes.ndim:
                cloud, _ = self._by_segments(
                    reading, axes.cloud(mixed)
                )  # the stream's own order, which the projection keeps
            else:
                cloud = projected_cloud(mixed, known, size)
        if cloud is None:
            raise UnsupportedModel(
                f"head_contributions: expected an output projection that reads [batch, token, {width}], the heads side by "
                f"side, got {None if mixed is None else list(mixed.shape)} in {reading.place}. It may not be a linear map of the "
                "concatenated heads. Choose other blocks."
            )
        return cloud

    def _mixed(self, reading: _Reading) -> Tensor:
        """The mixed values of all calls, as [batch, token, mixed]."""
        found = [
            reading.calls_output.get(i, "it did not run")
            for i in range(len(reading.block.parts[reading.part].attention))
        ]
        values = [each for each in found if isinstance(each, Tensor)]
        axis = 2 if reading.block.parts[reading.part].shares_queries else 1
        if len(values) < len(found) or len({(*v.shape[:axis], *v.shape[axis + 1 :]) for v in values}) > 1:
            reason = next(
                (each for each in found if isinstance(each, str)), "its calls have other sizes than on the example"
            )
            raise UnsupportedModel(
                f"head_contributions: expected mixed values of each head and token, got none in {reading.place}: {reason}. "
                "Choose other blocks."
            )
        try:
            mixed = gated(torch.cat(values, axis), reading.block.parts[reading.part], reading.factors)
        except UnreadableError as error:
            raise UnsupportedModel(
                f"head_contributions: expected mixed values of each head and token, got others in {reading.place}: {error}. "
                "Choose other blocks."
            ) from error
        return mixed.transpose(1, 2).flatten(2)

    def _whole_map(self, reading: _Reading, alone: BlockAlone, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """W_O and the bias from the mixed values to what the heads write, where this batch bears them out."""
        try:
            with probing(self.model), full_precision(cloud), torch.random.fork_rng(devices=[]):
                matrix, bias = alone.output_map(reading.part)
        except UncollapseError as error:
            raise UnsupportedModel(
                f"head_contributions: expected one linear map from the heads to what is added in {reading.place}, got none: "
                f"{error}. Choose other blocks."
            ) from error
        assert reading.block.axes is not None
        assert reading.given is not None
        written, ends = self._by_segments(reading, reading.block.axes.within.cloud(reading.given))
        with full_precision(cloud):
            holds = written.shape[:2] == cloud.shape[:2] and bears_out(cloud, matrix, bias, written, ends)
        if not holds:
            raise UnsupportedModel(
                f"head_contributions: expected the heads to write in {reading.place} what the map found on the example says, got "
                "something else on this batch. The weights may have changed since the model ran. Call it again."
            )
        return matrix, bias

    def _map(self, reading: _Reading, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """W_O [mixed, width] and the bias [width]."""
        if reading.matrix is not None:
            matrix = reading.matrix
            return matrix, matrix.new_zeros(matrix.shape[1]) if reading.bias is None else reading.bias
        if reading.alone is not None:
            return self._whole_map(reading, reading.alone, cloud)
        projection = reading.call.projection
        assert isinstance(projection, ModuleCall)
        try:
            with full_precision(cloud):
                return projection_map(self.model.get_submodule(projection.name), cloud)
        except UncollapseError as error:
            raise UnsupportedModel(
                f"head_contributions: expected an output projection that is a linear map of the heads, got "
                f"{projection.name} of {reading.place}: {error}. Choose other blocks."
            ) from error

    def _by_segments(self, reading: _Reading, cloud: Tensor) -> tuple[Tensor, Tensor | None]:
        """A cloud with sequences that lie end to end one under the other, zeros behind the shorter ones, and which rows are theirs;
        any other as it is."""
        segments = self.paddings[self.anatomy.stack_of(reading.number)].segments
        if segments is None or len(cloud) != 1 or sum(map(len, segments)) != cloud.shape[1]:
            return cloud, None
        rows = [cloud[0][own.to(cloud.device)] for own in segments]
        found = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return found, self._mask(reading, found)

    def _mask(self, reading: _Reading, cloud: Tensor) -> Tensor:
        """True for the real tokens of the cloud."""
        padding = self.paddings[self.anatomy.stack_of(reading.number)]
        mask = padding.mask
        if padding.segments is not None and len(padding.segments) == len(cloud):
            lengths = torch.tensor([len(own) for own in padding.segments], device=cloud.device)
            return torch.arange(cloud.shape[1], device=cloud.device) < lengths[:, None]
        if mask is not None and mask.shape == cloud.shape[:2]:
            return mask.to(cloud.device)
        if mask is not None or padding.reason:
            raise InputError(
                f"head_contributions: expected {cloud.shape[1] if mask is None else mask.shape[-1]} tokens in {reading.place}, as "
                f"in the mask of its stack, got {padding.reason or cloud.shape[1]}. This model changes the number of tokens, so "
                "padding cannot be told apart inside it. Pass a batch without padding."
            )
        return torch.ones(cloud.shape[:2], dtype=torch.bool, device=cloud.device)
