"""What each head of an attention writes: the vectors O_h W_h that its output projection adds up, from a live model.

When not to use this: to say what the model makes of a head. Whatever comes behind the sum sees the sum alone; whether one
head could be told from the others there is what `attribution` answers.
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

from uncollapse.anatomy.interception import Handler, Point, addition_operands, counted, device_of, intercepted
from uncollapse.anatomy.probing import full_precision, probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.tracing import operation_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, Block, Layout, ModuleCall
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.probe.projections import projected_cloud, projection_map
from uncollapse.sources import check_batches, token_mask


@dataclass(frozen=True)
class HeadContributions:
    """What each head of one attention call adds to its output projection's output.

    contributions: O_h W_h, in the model's number format, single precision at least. bias: the projection's, zeros where it has
    none. `contributions.sum(-2) + bias` is the projection's output, up to rounding. mask: True for a real token.
    added_as_is: that output is, bit for bit, what the residual addition adds to the stream. False where something stands
    between: a sandwich or output norm (Gemma, OLMo-2), a LayerScale (DINOv2), a residual multiplier (Granite).
    """

    block: int
    kind: Literal["self", "cross"]
    stack: Literal["encoder", "decoder"] | None
    contributions: Float[Tensor, "batch token head width"]
    bias: Float[Tensor, " width"]
    mask: Bool[Tensor, "batch token"]
    added_as_is: bool


def head_contributions(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    blocks: Collection[int] | None = None,
    layout: Layout | None = None,
) -> Iterator[HeadContributions]:
    """What each head writes, vector by vector: an iterator over the attention calls in order of depth, self before cross.

    Y = sum_h O_h W_h + 1 b^T, with O_h the h-th part of what the output projection reads and W_h its rows: the contributions
    O_h W_h [batch, token, head, width] are exact, whatever stands between attention and projection (position gates, a norm):
    it has acted on O_h. They are invariant under the value-output gauge; a change of the value bias moves constants between
    them and b.

    The model runs once, when this is called, in evaluation mode and without gradients, on `batch` as it stands. blocks: their
    numbers from 0, all of them by default. layout: see `uncollapse.Layout`. Between two steps of the iterator there are only
    the projections' inputs, n D numbers a call; the n H d numbers of one call are made when it is reached, from the weights
    as they are then. `list(...)` keeps all.

    "Y" is the projection's output. Where `added_as_is` is False that is not yet what enters the residual stream: a factor
    behind it multiplies each contribution alike, but a norm divides by the size of the whole sum.

    Misleading as a measure of importance: contributions cancel, and the energy of their sum is not that of its terms.
    With quantised activations they sum to the output only as far as the projection is linear.

        for found in uc.head_contributions(model, tokenizer("A sentence.", return_tensors="pt")):
            found.contributions.norm(dim=-1)

    Raises `InputError` for a batch or block that cannot be used, `UnsupportedModel` where the anatomy cannot be proved or an
    attention has no output projection that is a linear map of its heads.
    """
    (given,) = check_batches([batch], model=model)
    anatomy = proved_anatomy(model, given, layout)
    readings = _readings(model, anatomy, blocks)
    device = device_of(model)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    with probing(model), _installed(model, readings):
        model(**given)
    return map(_Contributor(model, given), readings)


@dataclass
class _Reading:
    """One output projection in one pass: what it read, and where that came from. `weight` and `bias` are those of a product in
    the attention's own code."""

    number: int
    kind: Literal["self", "cross"]
    block: Block
    part: int
    call: AttentionCall
    given: Tensor | None = None
    heads_output: Tensor | None = None
    output: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    added_as_is: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @property
    def place(self) -> str:
        return f"block {self.number} ({self.block.parts[self.part].module})"

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
            for call in {c.projection: c for c in part.attention}.values():
                if call.projection is None:
                    raise UnsupportedModel(
                        f"head_contributions: expected an output projection behind each attention, got none of the "
                        f"width of its heads in block {number} ({part.module}) of {type(model).__name__}. It may mix heads "
                        "in another way. Choose other blocks."
                    )
                found.append(_Reading(number, "cross" if part.kind == "cross" else "self", block, index, call))
    return found


@contextlib.contextmanager
def _installed(model: nn.Module, readings: Sequence[_Reading]) -> Iterator[None]:
    """Within the block every reading takes note of what its projection reads."""
    handlers: dict[Point, Handler] = {}
    modules: dict[str, dict[int, _Reading]] = {}
    for reading in readings:
        projection = reading.call.projection
        handlers[reading.call.product] = _noting_heads(reading)
        if isinstance(projection, ModuleCall):
            modules.setdefault(projection.name, {})[projection.call] = reading
        elif projection is not None:
            handlers[projection] = _noting_product(reading)
    with contextlib.ExitStack() as stack:
        stack.enter_context(intercepted(model, handlers))
        # Not strict: inside a `without` another handler may stand at the same addition, and answer first.
        stack.enter_context(intercepted(model, _noting_additions(readings), strict=False))
        runs = stack.enter_context(counted(model, modules))
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
                    reading.given = next(tensors_in([args, kwargs])).detach()

            def leave(
                _: nn.Module, __: Any, output: Any, name: str = name, by_call: Mapping[int, _Reading] = by_call
            ) -> None:
                reading = by_call.get(runs.counts[name] - 1)
                if reading is not None and reading.is_own():
                    reading.output = next(tensors_in(output)).detach()

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def _noting_heads(reading: _Reading) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        if reading.is_own():
            reading.heads_output = next(tensors_in(output)).detach()
        return output

    return handler


def _noting_product(reading: _Reading) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        operands = list(tensors_in([args, kwargs]))
        if reading.is_own() and operation_name(function) == "linear":
            reading.given, reading.weight, reading.output = operands[0].detach(), operands[1].detach(), output.detach()
            reading.bias = operands[2].detach() if len(operands) > 2 else None
        return output

    return handler


def _noting_additions(readings: Sequence[_Reading]) -> dict[Point, Handler]:
    """Compare what each residual addition adds with what the projection before it gave."""
    added: dict[Point, list[tuple[int, _Reading]]] = {}
    for reading in readings:
        alone = frozenset({reading.part})
        for node in (node for residual in reading.block.residuals for node in residual.additions):
            for operand, leaves in enumerate((node.first, node.second)):
                if leaves == alone:
                    added.setdefault(node.point, []).append((operand, reading))

    def noting(met: Sequence[tuple[int, _Reading]]) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for operand, reading in met:
                if reading.is_own() and reading.output is not None:
                    reading.added_as_is = _same_tokens(addition_operands(args, kwargs)[operand], reading.output)
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


@dataclass(frozen=True)
class _Contributor:
    """Turns what a projection read into contributions, when it is asked."""

    model: nn.Module
    batch: Mapping[str, Any]

    def __call__(self, reading: _Reading) -> HeadContributions:
        cloud = self._cloud(reading)
        matrix, bias = self._map(reading, cloud)
        dtype = torch.promote_types(torch.promote_types(cloud.dtype, matrix.dtype), torch.float32)
        count, width = reading.call.heads, matrix.shape[1]
        with torch.no_grad(), full_precision(cloud):
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
        width = reading.call.heads * reading.call.head_width
        cloud = None
        if mixed is not None and mixed.shape[-1] == width:
            known = heads_output if heads_output is not None and heads_output.ndim == 4 else None
            cloud = projected_cloud(mixed, known, size)
        if cloud is None:
            raise UnsupportedModel(
                f"head_contributions: expected an output projection that reads [batch, token, {width}], the heads side by "
                f"side, got {None if mixed is None else list(mixed.shape)} in {reading.place}. It may be no linear map of the "
                "concatenated heads. Choose other blocks."
            )
        return cloud

    def _map(self, reading: _Reading, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """W_O [mixed, width] and the bias [width]."""
        if reading.weight is not None:
            matrix = reading.weight.T
            return matrix, matrix.new_zeros(matrix.shape[1]) if reading.bias is None else reading.bias
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

    def _mask(self, reading: _Reading, cloud: Tensor) -> Tensor:
        """True for the real tokens of the cloud."""
        is_decoder = reading.block.stack == "decoder" and "decoder_input_ids" in self.batch
        mask = token_mask(self.batch, "decoder_attention_mask" if is_decoder else "attention_mask")
        if mask is not None and mask.shape == cloud.shape[:2]:
            return mask.to(cloud.device)
        if mask is not None and not bool(mask.all()):
            raise InputError(
                f"head_contributions: expected {mask.shape[-1]} tokens in {reading.place}, as in the attention mask, got "
                f"{cloud.shape[1]}. This model changes the number of tokens, so padding cannot be told apart inside it. "
                "Pass a batch without padding."
            )
        return torch.ones(cloud.shape[:2], dtype=torch.bool, device=cloud.device)
