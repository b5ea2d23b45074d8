"""Damage of known kind, place and size, planted into a live model while it is observed; and what must not be taken for damage.

Everything acts at operations that the proved anatomy names (an addition, an attention call, a block's stream), so one plant
fits every architecture, and a model is itself again afterwards. Copied heads and lost ranks are in the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, intercepted
from uncollapse.anatomy.operands import replaced
from uncollapse.anatomy.streams import met
from uncollapse.anatomy.tracing import tensors_in
from uncollapse.anatomy.vocabulary import STREAM, Anatomy, AttentionCall, ModuleCall

UNDERFLOW = (
    88.0  # exp(-88) is where single precision, and bfloat16 with it, ends: a weight below it and its gradient are 0
)
OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
Given = dict[str, Any]


def attention_call(anatomy: Anatomy, block: int) -> AttentionCall:
    """The self-attention of a block."""
    return next(part.attention[0] for part in anatomy.blocks[block].parts if part.kind == "attention")


@contextlib.contextmanager
def at_attention(
    model: nn.Module, anatomy: Anatomy, blocks: Sequence[int], change: Callable[[Given, int], None]
) -> Iterator[None]:
    """`change(operands, block)` acts on the named operands of each fused attention call before it runs."""

    def handler(block: int) -> Handler:
        def act(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = {**dict(zip(OPERANDS, args, strict=False)), **kwargs}
            change(given, block)
            return function(**given)

        return act

    with intercepted(model, {attention_call(anatomy, b).product: handler(b) for b in blocks}):
        yield


# Damage ---------------------------------------------------------------------------------------------------------------


def residual_scaled(model: nn.Module, anatomy: Anatomy, first: int, factor: float) -> Any:
    """The stream multiplied by `factor` at every residual addition from block `first` on."""
    handlers: dict[Point, Handler] = {}
    for block in anatomy.blocks[first:]:
        for residual in block.residuals:
            node = next(n for n in residual.additions if {STREAM} in n.leaves)
            handlers[node.point] = _scaling(factor, node.leaves.index(frozenset({STREAM})))
    return intercepted(model, handlers)


def _scaling(factor: float, operand: int) -> Handler:
    def act(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = list(tensors_in([args, kwargs]))[operand]
        return function(
            *replaced(args, stream, stream * factor),
            **{k: replaced(v, stream, stream * factor) for k, v in kwargs.items()},
        )

    return act


def logits_scaled(given: Given, heads: Sequence[int] | None, factor: float) -> None:
    """All logits of some heads, or of every head, times `factor`: what larger query weights do."""
    query = given["query"].clone()
    chosen = slice(None) if heads is None else list(heads)
    query[:, chosen] = query[:, chosen] * factor
    given["query"] = query


def queries_alike(given: Given, share: float) -> None:
    """Each query moved towards the mean query of its sequence and head: query weights to zero beside a query bias."""
    query = given["query"]
    given["query"] = (1 - share) * query + share * query.mean(-2, keepdim=True)


@contextlib.contextmanager
def projection_changed(
    model: nn.Module, anatomy: Anatomy, block: int, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """`change` of W_O as [mixed, width] in one block; the weights come back bit for bit."""
    place = attention_call(anatomy, block).projection
    assert isinstance(place, ModuleCall)  # so in every subject
    module = model.get_submodule(place.name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    kept, is_linear = weight.detach().clone(), isinstance(module, nn.Linear)
    with torch.no_grad():
        changed = change(kept.T if is_linear else kept)
        weight.copy_(changed.T if is_linear else changed)
        try:
            yield
        finally:
            weight.copy_(kept)


def head_copied(matrix: Tensor, head_width: int, source: int, target: int, share: float) -> Tensor:
    """W_h -> (1 - share) W_h + share W_g."""
    blocks = matrix.unflatten(0, (-1, head_width)).clone()
    blocks[target] = (1 - share) * blocks[target] + share * blocks[source]
    return blocks.flatten(0, 1)


def rank_reduced(matrix: Tensor, share: float) -> Tensor:
    """The last `share` of the singular values of W_O set to zero."""
    U, values, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = len(values) - round(share * len(values))
    return (U[:, :kept] * values[:kept] @ V[:kept]).to(matrix.dtype)


# What must not alarm --------------------------------------------------------------------------------------------------


def bias_added(given: Given, bias: Tensor) -> None:
    """`bias`, broadcast to [batch, head, query, key], added to the logits; the mask that was there stays."""
    queries, keys = given["query"].shape[-2], given["key"].shape[-2]
    dtype = given["query"].dtype
    total = torch.zeros(1, 1, queries, keys, dtype=dtype)
    lowest = torch.finfo(dtype).min
    if given.pop("is_causal", False):
        total = total.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), lowest)
    mask = given.get("attn_mask")
    if mask is not None:
        total = total.masked_fill(~mask, lowest) if mask.dtype == torch.bool else total + mask
    given["attn_mask"] = (total + bias.to(dtype)).clamp(min=lowest)


def sink(given: Given, heads: Sequence[int], strength: float) -> None:
    """The first key's logit raised by `strength` in some heads: a head that looks at the first token."""
    bias = torch.zeros(1, given["query"].shape[1], 1, given["key"].shape[-2])
    bias[:, list(heads), :, 0] = strength
    bias_added(given, bias)


def windowed(given: Given, size: int) -> None:
    """Only keys less than `size` tokens away are allowed."""
    positions = torch.arange(given["key"].shape[-2])
    far = (positions[:, None] - positions).abs() >= size
    bias_added(given, torch.zeros(far.shape).masked_fill(far, torch.finfo(given["query"].dtype).min))


@contextlib.contextmanager
def stream_changed(
    model: nn.Module, anatomy: Anatomy, block: int, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """`change` of the stream that enters a block, which reaches every block behind it too."""
    with met(model, [(anatomy.blocks[block].entry, change)]):
        yield


def first_token_massive(stream: Tensor) -> Tensor:
    """The first token with 100 times the usual norm, in three of its features, as trained language models have it."""
    stream = stream.clone()
    stream[:, 0, :3] += 100 * stream.norm(dim=-1).median() / 3**0.5
    return stream


def low_rank(stream: Tensor) -> Tensor:
    """The cloud of all tokens in a quarter of its directions, the strongest."""
    tokens = stream.flatten(0, 1)
    mean = tokens.mean(0)
    _, _, V = torch.linalg.svd((tokens - mean).float(), full_matrices=False)
    V = V[: stream.shape[-1] // 4].to(stream.dtype)
    return (stream - mean) @ V.T @ V + mean


# What was planted, measured by its own means ----------------------------------------------------------------------------


def keys_within_reach(given: Mapping[str, Any], heads: Sequence[int] | None, real: Tensor) -> Tensor:
    """The share of keys, the strongest of each row left out, whose weight beside the strongest of the others is not zero in
    single precision: 1 where every key can still win or lose, 0 where the logits leave none. [sequence]"""
    q, k = given["query"].float(), given["key"].float()
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    chosen = slice(None) if heads is None else list(heads)
    logits = (q[:, chosen] @ k[:, chosen].mT) * (given.get("scale") or q.shape[-1] ** -0.5)
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool).expand(logits.shape)
    if given.get("is_causal"):
        allowed = allowed.tril()
    mask = given.get("attn_mask")
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
    logits = logits.masked_fill(~allowed, -torch.inf)
    others = logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf)
    within = (others > others.amax(-1, keepdim=True) - UNDERFLOW).sum(-1).double() / (allowed.sum(-1) - 1)
    rows = (allowed.sum(-1) >= 4) & real[:, None]
    return torch.where(rows, within, 0).sum((1, 2)) / rows.sum((1, 2))
