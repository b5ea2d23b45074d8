"""Poke a stream and see what moves: how the axes of a stream, its sequences and its padding are told.

No shape and no size decides. A block is run by itself on its own arguments, a piece of the stream that enters it is replaced,
and what its attention then adds is compared with what it added before:

* along the *sequence* axis nothing reaches anything;
* along a *token* axis the attention reaches other places;
* the *width* is the axis whose poking changes every row that the first learned product contracts.

When not to use it: on values that training will change. Parameters that are all zero at the start are replaced by small random
ones for the duration (`without_zeros`), so that a block that does nothing yet can be told apart, too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uncollapse.anatomy.masking import LEAST_SHARE, laid_like
from uncollapse.anatomy.offloaded_weights import replaced_weights
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.torch_calls import opened, operation_name, tensors_in, writes_in_place
from uncollapse.anatomy.tracing import is_freed, storage_of
from uncollapse.anatomy.turns import closed_to_others
from uncollapse.anatomy.vocabulary import StreamAxes
from uncollapse.restoring import restoring

Update = Callable[[Tensor], Tensor]  # the stream that enters a block → what its attention adds

EVERY = 3  # one in three places along an axis is poked, the others are watched
MOST_PRODUCTS = 64  # of the first products of a run, one must be the first that reads the stream
MOST_SEGMENTS = 512


# Copies -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_zeros(module: nn.Module, *, without_nan: bool = False) -> Iterator[None]:
    """Within the block, parameters that are zero throughout are random copies; with `without_nan` also those that are not finite.

    The parameters themselves are not touched; they are back in their places afterwards, also after an exception.
    """
    generator = torch.Generator().manual_seed(0)
    copies: dict[int, nn.Parameter] = {}

    def noise_like(parameter: Tensor) -> Tensor:
        noise = torch.randn(parameter.shape, generator=generator)
        # Biases are among them: a large one would hide in half precision what moves beside it.
        noise = noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.02 + 0.004 * noise
        return noise.to(parameter)

    silent = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and _says_nothing(parameter, without_nan)
    ]
    with restoring() as changes:
        if silent:
            changes.enter(closed_to_others())
        for owner, name, parameter in silent:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(noise_like(parameter), requires_grad=False)
            changes.place(owner._parameters, name, copies[id(parameter)])
        # Of weights that are kept elsewhere it shows when they are read.
        changes.enter(replaced_weights(module, lambda w: noise_like(w) if _says_nothing(w, without_nan) else None))
        yield


def _says_nothing(parameter: Tensor, without_nan: bool) -> bool:
    if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
        return False
    try:
        if without_nan and not bool(parameter.isfinite().all()):
            return True
        first = float(parameter.detach().flatten()[0])  # not zero in most: nothing more is read of them
        return first == 0 and not bool(parameter.any())
    except (RuntimeError, NotImplementedError, TypeError):  # a quantised weight: float8, or of a class of its own
        return False


# Pokes --------------------------------------------------------------------------------------------------------------


def poked(stream: Tensor, axis: int, places: Tensor) -> Tensor:
    """The stream with other values, of the same size, at the given places along an axis. It lies in memory as the stream does: a
    product of half-precision numbers that lie otherwise is rounded otherwise, at all places."""
    generator = torch.Generator().manual_seed(1)
    whole = stream.detach().float()
    finite = whole[whole.isfinite()]
    scale = float(finite.std()) if finite.numel() > 1 else 1.0
    noise = torch.randn(stream.shape, generator=generator).to(whole.device) * (scale or 1.0)
    noise = noise + (finite.mean() if finite.numel() else 0.0)
    mask = torch.zeros(stream.shape[axis], dtype=torch.bool, device=stream.device)
    mask[places.to(stream.device)] = True
    mask = mask.view(*(-1 if i == axis % stream.ndim else 1 for i in range(stream.ndim)))
    return laid_like(torch.where(mask, noise.to(stream.dtype), stream), stream)


def moved(plain: Tensor, other: Tensor, axis: int, coarsest: float = 0.0, *, beyond: float = 0.0) -> Tensor:
    """Which places along an axis differ beyond rounding, as [places]: by more than two units in the last place of what was
    there, and by more than a trace of the largest difference. Experts run on groups of tokens, and the size of a group decides
    how its sums are rounded: that is no influence. `coarsest`: the rounding of a coarser number format on the way.

    beyond: that many units in the last place of the feature's largest element besides. An element that is small because its sum
    cancels is rounded as others of its feature are."""
    eps = max(torch.finfo(plain.dtype).eps, coarsest)
    change = (other.double() - plain.double()).abs()
    change = change.where(change.isfinite(), 0.0)
    trace = (2 if is_coarse(eps) else 256) * eps * change.max()
    size = plain.double().abs()
    different = (change > trace) & ~(change <= 2 * eps * size)
    if beyond:
        different &= change > beyond * eps * size.nan_to_num(0.0, 0.0, 0.0).amax(axis, keepdim=True)
    across = tuple(i for i in range(plain.ndim) if i != axis % plain.ndim)
    return different.any(across) if across else different


def moved_rows(before: Tensor, after: Tensor) -> Tensor:
    """Which rows [*lead, row] of what an attention mixes differ beyond rounding.

    Raises `UnreadableError` where there are other rows than before."""
    if before.shape != after.shape:
        raise UnreadableError("its sizes depend on what the tokens are")
    if before.dtype.itemsize <= 2:
        # A poke that half precision hardly shows; what it does not reach is the same, bit for bit.
        return ((after != before) & (before == before)).any(-1)
    rounding = 8 * torch.finfo(before.dtype).eps * before.abs().nan_to_num(0, 0, 0).max()
    return ((after - before).abs() > rounding).any(-1)


def is_coarse(eps: float) -> bool:
    """Whether this is the machine epsilon of a half-precision format."""
    return eps > 1e-4


def reaches(update: Update, stream: Tensor, axis: int, places: Tensor, plain: Tensor | None = None) -> bool:
    """Whether other values at the given places along an axis move what is added at other places."""
    before = update(stream) if plain is None else plain
    if before.shape != stream.shape:
        return False
    others = moved(before, update(poked(stream, axis, places)), axis)
    others[places.to(others.device)] = False
    return bool(others.any())


# The first learned product ------------------------------------------------------------------------------------------


@dataclass
class Products(TorchFunctionMode):
    """The operands of the first matrix products of a run as they were when they met, each with the axis that is contracted, and the
    `formats` of all numbers that it made. An operand is copied only if it is written to later on (`x.add_(attention(x))`)."""

    found: list[tuple[tuple[Tensor, int | None], tuple[Tensor, int | None]]] = field(default_factory=list)
    formats: set[torch.dtype] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def coarsest(self) -> float:
        """The rounding of the coarsest number format that a product was computed in (autocast), or of single precision if anything
        was: a softmax, say. In half precision much else may be that no token goes through."""
        given = [t for pair in self.found for t, _ in pair if t.is_floating_point()]
        formats = {t.dtype for t in given} | ({torch.float32} & self.formats)
        return max((torch.finfo(each).eps for each in formats), default=0.0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inner = opened(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        if len(self.found) < MOST_PRODUCTS:
            pair = _contracted(operation_name(func), args, kwargs)
            if pair is not None:
                self.found.append(pair)
        self._keep(args[:1] if writes_in_place(func) else kwargs.get("out"))
        result = func(*args, **kwargs)
        self.formats |= {t.dtype for t in tensors_in(result) if t.is_floating_point()}
        return result

    def _keep(self, written: Any) -> None:
        """Copy the operands that lie in memory that is about to be written to."""
        memories = {storage_of(t) for t in tensors_in(written)} - {0}
        if memories:
            for number, pair in enumerate(self.found):
                first, second = ((t.clone() if storage_of(t) in memories else t, axis) for t, axis in pair)
                self.found[number] = first, second


def _contracted(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, int | None], tuple[Tensor, int | None]] | None:
    """The two operands of a product and the axis of each that is contracted, counted from behind; None for anything else."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if name == "einsum" and args and isinstance(args[0], str):
        operands = [t for a in args[1:] for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        return _einsum(args[0], operands)
    if name in {"addmm", "baddbmm", "addbmm"}:
        tensors = tensors[1:]
    if len(tensors) < 2:
        return None
    first, second = tensors[:2]
    if name == "linear":
        return (first, -1), (second, -1)
    if name in {"conv1d", "conv2d", "conv3d"}:
        return (first, -1 - int(name[4])), (second, -1 - int(name[4]))
    if name in {"matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "grouped_mm"}:
        return (first, -1), (second, -2 if second.ndim > 1 else -1)
    if name == "rmatmul":
        return (second, -1), (first, -2 if first.ndim > 1 else -1)
    return None


def _einsum(
    equation: str, operands: Sequence[Tensor]
) -> tuple[tuple[Tensor, int | None], tuple[Tensor, int | None]] | None:
    given, _, result = re.sub(r"\s", "", equation).partition("->")
    letters = given.split(",")
    if len(letters) != 2 or len(operands) != 2:
        return None
    summed = [c for c in letters[0] if c in letters[1] and c not in result and c.isalpha()]
    if len(summed) != 1:
        return (operands[0], None), (operands[1], None)
    axes = []
    for own in letters:
        behind = own[own.index(summed[0]) :]
        before = own.index(summed[0])
        axes.append(before if "..." in behind else -len(behind))
    return (operands[0], axes[0]), (operands[1], axes[1])


def _rows_changed(plain: Tensor, other: Tensor, axis: int) -> float:
    """The share of the rows along a contracted axis that changed at all."""
    if plain.shape != other.shape:
        return 0.0
    different = (plain != other) & ~(plain.isnan() & other.isnan())
    return float(different.any(axis).double().mean())


# Axes ---------------------------------------------------------------------------------------------------------------


def stream_axes(update: Update, stream: Tensor, where: str) -> tuple[StreamAxes | None, str]:
    """The axes of the stream that enters a block, and the reason where they cannot be told.

    update: what the block's attention adds (its only part, if it has none), given the stream. Runs once plain and once for
    each axis that is longer than one.
    """
    first = stream
    if not bool(stream.isfinite().all()):  # nothing can be seen to move where all is NaN
        first = torch.where(stream.isfinite(), stream, torch.randn(stream.shape).to(stream))
    seen = Products()
    with seen:
        plain = update(first)
    if plain.shape != first.shape:
        return None, f"what {where} adds has {plain.ndim} axes of sizes {tuple(plain.shape)}, not those of its stream"
    reaching: set[int] = set()
    shares: dict[int, list[float]] = {}
    long = [axis for axis in range(first.ndim) if first.shape[axis] > 1]
    operands: list[tuple[Tensor, int] | None] = []
    for axis in long:
        places = torch.arange(0, first.shape[axis], EVERY)
        again = Products()
        with again:
            other = update(poked(first, axis, places))
        others = moved(plain, other, axis, seen.coarsest())
        others[places.to(others.device)] = False
        if bool(others.any()):
            reaching.add(axis)
        shares[axis], operands = _learned_rows(seen, again, operands)
    width, reason = _width(first, shares, operands, reaching)
    if width is None:
        return None, f"{reason} in {where}"
    tokens = tuple(axis for axis in long if axis in reaching and axis != width)
    rest = [axis for axis in range(first.ndim) if axis != width and axis not in tokens]
    apart = [axis for axis in rest if first.shape[axis] > 1] or rest[:1]
    if len(apart) > 1:
        return (
            None,
            f"the attention reaches along none of the axes {apart} of {where}, and one of them only can be the sequences",
        )
    if not tokens:
        if len(rest) < 2:
            return None, f"the attention of {where} reaches along no axis of the stream"
        tokens = tuple(axis for axis in rest if axis not in apart)
        return StreamAxes(apart[0], tokens, width), ""
    single = [axis for axis in rest if axis not in apart]  # axes of length one: a grid of one row
    tokens = tuple(sorted((*tokens, *single)))
    return StreamAxes(apart[0] if apart else None, tokens, width), ""


def _changed(before: Tensor, after: Tensor) -> bool:
    """Whether an operand did; a weight that has been freed meanwhile is one, and did not."""
    if is_freed(before) or is_freed(after):
        return False
    try:
        return before.shape != after.shape or not torch.equal(before, after)
    except NotImplementedError:  # a quantised weight: float8, or of a class of its own
        return False


def _learned_rows(
    plain: Products, other: Products, known: list[tuple[Tensor, int] | None]
) -> tuple[list[float], list[tuple[Tensor, int] | None]]:
    """For each product the share of rows that changed, where exactly one operand did; 0 where none or both."""
    found: list[float] = []
    operands = known or [None] * len(plain.found)
    for number, (before, after) in enumerate(zip(plain.found, other.found, strict=False)):
        changed = [_changed(a, b) for (a, _), (b, _) in zip(before, after, strict=True)]
        share = 0.0
        if sum(changed) == 1:
            side = changed.index(True)
            (a, axis), (b, _) = before[side], after[side]
            if axis is not None:
                share = _rows_changed(a, b, axis)
                operands[number] = (a, axis)
        found.append(share)
    return found, operands


def _width(
    stream: Tensor, shares: dict[int, list[float]], operands: list[tuple[Tensor, int] | None], reaching: set[int]
) -> tuple[int | None, str]:
    first = next((i for i in range(len(operands)) if any(s[i] for s in shares.values() if i < len(s))), None)
    if first is None or operands[first] is None:
        return None, "no learned product reads the stream"
    found = {axis: s[first] for axis, s in shares.items() if first < len(s) and axis in reaching}
    largest = max(found.values(), default=0.0)
    candidates = [axis for axis, share in found.items() if share > 0.75 * largest]
    if len(candidates) > 1:  # a norm over tokens and features at once moves them all
        operand = operands[first]
        assert operand is not None
        contracted = operand[0].shape[operand[1]]
        sized = [axis for axis in candidates if stream.shape[axis] == contracted]
        candidates = sized or candidates
    if len(candidates) != 1:
        return None, "no single axis of the stream is the one that the first learned product contracts"
    return candidates[0], ""


# Sequences and padding on the user's own batch -------------------------------------------------------------------------


def segments(update: Update, rows: Tensor, axis: int) -> list[Tensor] | None:
    """Which rows of a stream with sequences laid end to end belong together: those that influence each other, as lists of
    places along `axis`. None where there are too many to find."""
    plain = update(rows)
    count = rows.shape[axis]
    free = torch.ones(count, dtype=torch.bool)
    found: list[Tensor] = []
    while bool(free.any()):
        if len(found) == MOST_SEGMENTS:
            return None
        place = int(free.nonzero()[0])
        reached, before = torch.zeros_like(free), 0
        reached[place] = True
        while int(reached.sum()) > before:
            # In half precision one row may be lost on another: those that were found are asked for the rest.
            own = reached.nonzero().flatten()
            before = len(own)
            reached |= moved(plain, update(poked(rows, axis, own)), axis).cpu() & free
            last = int(reached.nonzero()[-1])
            reached[place : last + 1] = free[place : last + 1]
        found.append(reached.nonzero().flatten())
        free &= ~reached
    return found


def hearing(update: Update, stream: Tensor, axes: StreamAxes) -> Tensor:
    """How much each row of the stream reaches any other row, as [sequence, token]: a padded row reaches none.

    By two gradients: of what is added at the even rows with respect to the odd ones, and the other way round.
    """
    with torch.enable_grad():
        given = stream.detach().clone().requires_grad_()
        added = axes.cloud(update(given))
        numbers = torch.arange(added.shape[1], device=added.device)
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(added.shape, generator=generator).to(added)
        found = torch.zeros(added.shape[:2], dtype=torch.float64, device=added.device)
        for parity in (0, 1):
            rows = (numbers % 2 == parity).view(1, -1, 1)
            loss = torch.where(rows, added * weights, 0).nan_to_num().sum()
            (gradient,) = torch.autograd.grad(loss, given, retain_graph=parity == 0)
            size = axes.cloud(gradient).abs().double().amax(-1)
            # A mask of -100 leaves a forbidden key 4e-44 of a weight, and a gradient that is not quite zero.
            found += torch.where((size > LEAST_SHARE * size.max()) & (numbers % 2 != parity), size, 0.0)
    return found


def is_heard(size: Tensor, open_size: Tensor, precision: float) -> Tensor:
    """Which rows reach others, [sequence, token], by how much they do (`hearing`) and how much they would with nothing hidden.

    Weights that are renormalised after the softmax cancel what a hidden key does in the softmax's own sum, up to rounding: what
    hiding leaves of a row must be more than that. A row that is faint by itself is as faint with nothing hidden.
    `precision`: the machine epsilon of the coarsest number format on the way."""
    rounding = (8 if is_coarse(precision) else 256) * precision
    return (size > 0) & (size > rounding * open_size)


def hearing_one_by_one(update: Update, stream: Tensor, axes: StreamAxes) -> Tensor | None:
    """The same by poking one token after another, for a block that cannot be differentiated; None where there are too many."""
    cloud = axes.cloud(stream)
    if cloud.shape[1] > MOST_SEGMENTS or axes.sequence is None or len(axes.token) != 1:
        return None
    found = torch.zeros(cloud.shape[:2], dtype=torch.float64, device=stream.device)
    plain = axes.cloud(update(stream))
    for token in range(cloud.shape[1]):
        other = axes.cloud(update(poked(stream, axes.token[0], torch.tensor([token]))))
        change = (other.double() - plain.double()).abs().nan_to_num()
        change[:, token] = 0
        found[:, token] = change.flatten(1).amax(-1)
    return found
