"""What tells a model the order of its tokens, its mask and its positions, and how to take that away.

Without both, a Transformer is a function on sets: permuting the tokens permutes the outputs. That is how each removal is
checked before it is believed.

* The *mask*: every real token may attend to every real token. Padding stays hidden, as the batch's `attention_mask` says. At
  a fused call the mask operand is replaced; before a softmax of the model's own, nothing is forbidden any more.
* *Positions*: every token is told that it stands at position 0, through `position_ids`. That takes away learned tables and
  rotary embeddings. A model that does not take `position_ids`, or that knows positions in another way as well (relative
  biases, convolutions), is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, intercepted
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.tracing import operation_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.errors import UnsupportedModel
from uncollapse.wrappers import bound, rebound, takes


@contextlib.contextmanager
def mask_removed(model: nn.Module, anatomy: Anatomy, blocks: frozenset[int]) -> Iterator[None]:
    """Within the context, self-attention in the given blocks sees every real token."""
    padding: list[Tensor | None] = [None]

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = bound(model, args, kwargs).get("attention_mask")
        hides = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
        padding[0] = mask.bool()[:, None, None, :] if hides and isinstance(mask, Tensor) else None

    handlers: dict[Point, Handler] = {}
    for number, block in enumerate(anatomy.blocks):
        for call in (c for p in block.parts if p.kind == "attention" for c in p.attention if number in blocks):
            if call.score == call.product:
                handlers[call.score] = _unmasked_fused(padding)
            for point in call.masking:
                handlers[point] = _unmasked_step(padding)
    hook = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with intercepted(model, handlers):
            yield
    finally:
        hook.remove()


def _unmasked_fused(padding: list[Tensor | None]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            forbidden = mask <= torch.finfo(mask.dtype).min / 2
            if bool((mask.masked_fill(forbidden, 0) != 0).any()):
                raise UnsupportedModel(
                    "without: expected a mask that only forbids, got one that also adds a bias to the logits. The bias of a "
                    "forbidden pair is not known. Load the model with attn_implementation='eager'."
                )
        given |= {"is_causal": False, "attn_mask": padding[0]}
        return function(given.pop("query"), given.pop("key"), given.pop("value"), **given)

    return handler


def _unmasked_step(padding: list[Tensor | None]) -> Handler:
    """An addition or replacement before a softmax that no longer forbids anything but padded keys."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = operation_name(function)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if name == "add" and len(tensors) == 1:  # a number forbids nothing
            result = function(*args, **kwargs)
        elif name == "add":
            first, second = tensors
            result = _allowing(first) + _allowing(second)
        elif name == "masked_fill":
            result = args[0] if _forbids(args[2] if len(args) > 2 else kwargs["value"]) else function(*args, **kwargs)
        else:
            kept = [t for t in tensors[1:] if t.ndim >= 3]
            replaces = len(kept) == 1 and _forbids(next(a for a in args[1:] if a is not kept[0]))
            result = kept[0] if replaces else function(*args, **kwargs)
        real = padding[0]
        if real is None or not isinstance(result, Tensor):
            return result
        keys = real.shape[-1]
        real = real if result.ndim == 4 else real[:, 0].repeat_interleave(result.shape[0] // real.shape[0], 0)
        return result.masked_fill(~real[..., :keys], torch.finfo(result.dtype).min)

    return handler


def _forbids(value: Any) -> bool:
    return bool(torch.as_tensor(value).double().min() <= torch.finfo(torch.float16).min / 2)


def _allowing(operand: Tensor) -> Tensor:
    if not operand.is_floating_point():
        return operand
    return operand.masked_fill(operand <= torch.finfo(operand.dtype).min / 2, 0)


@contextlib.contextmanager
def positions_removed(model: nn.Module) -> Iterator[None]:
    """Within the context every token stands at position 0."""
    if not takes(model, "position_ids"):
        raise UnsupportedModel(
            f"without: expected a model that takes position_ids, got {type(model).__name__}. Its positions cannot be told "
            "from outside. Take away another component."
        )

    def at_zero(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = bound(model, args, kwargs)
        tokens = given.get("input_ids", args[0] if args else None)
        shaped = tokens if tokens is not None else given["inputs_embeds"][..., 0]
        changed = {"position_ids": torch.zeros(shaped.shape[:2], dtype=torch.long, device=shaped.device)}
        if takes(model, "attention_mask") and given.get("attention_mask") is None:
            # Without a mask, positions that start again are taken for sequences packed into one row, and kept apart.
            changed["attention_mask"] = torch.ones_like(changed["position_ids"])
        return rebound(model, args, kwargs, changed)

    hook = model.register_forward_pre_hook(at_zero, with_kwargs=True, prepend=True)  # position gates listen, too
    try:
        yield
    finally:
        hook.remove()


def require_order_blind(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Tensor]) -> None:
    """Raise `UnsupportedModel` unless, without mask and positions, permuting the tokens permutes the outputs."""
    if "input_ids" not in batch:
        raise UnsupportedModel(
            f"without: expected a model proved on input_ids, got {type(model).__name__} on {', '.join(batch) or 'nothing'}. "
            "Positions are taken away from token numbers only. Take away another component."
        )
    every = frozenset(range(len(anatomy.blocks)))
    tokens = batch["input_ids"].shape[1]
    order = torch.arange(tokens).roll(3)
    permuted = {k: v[:, order] if v.ndim == 2 and v.shape[1] == tokens else v for k, v in batch.items()}
    with probing(model), mask_removed(model, anatomy, every), positions_removed(model):
        plain, moved = (next(tensors_in(model(**b))).double() for b in (batch, permuted))
    gap = float((moved - plain[:, order]).abs().max() / plain.abs().max())
    if not gap < 1e-3:
        raise UnsupportedModel(
            f"without: expected {type(model).__name__} without mask and positions to treat its tokens as a set, got outputs that "
            f"still depend on their order (relative difference {gap:.2g}). It knows positions in another way, such as a "
            "relative bias or a convolution. Take away another component."
        )
