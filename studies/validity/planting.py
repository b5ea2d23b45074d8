"""Damage of known kind, place and size, planted into a live model while it is observed; and what must not be taken for damage.

Everything acts at operations that the proved anatomy names (an addition, an attention call, a block's stream), so one plant
fits every architecture, and a model is itself again afterwards. Copied heads and lost ranks are in the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, intercepted
from uncollapse.anatomy.operands import replaced
from uncollapse.anatomy.streams import met
from uncollapse.anatomy.torch_calls import tensors_in
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


def common_part_added(model: nn.Module, anatomy: Anatomy, block: int, dose: float, seed: int) -> Any:
    """One vector added to all tokens where `block` first adds to the stream, in a random direction: `dose` times as long as the
    median token there. What distinguishes the tokens stays in the stream, and is small beside what they share to every norm that
    reads it from there on."""
    residual = anatomy.blocks[block].residuals[0]
    node = next(n for n in residual.additions if {STREAM} in n.leaves)

    def act(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream: Tensor = function(*args, **kwargs)
        direction = torch.randn(stream.shape[-1], generator=torch.Generator().manual_seed(seed)).to(stream)
        return stream + dose * stream.norm(dim=-1).median() * direction / direction.norm()

    return intercepted(model, {node.point: act})


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


def on_offsets(given: Given, offsets: Sequence[int]) -> None:
    """Every other head looks at the tokens so many places before its own: 12 nats for each, and nothing for the others."""
    queries, keys = given["query"].shape[-2], given["key"].shape[-2]
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    there = torch.stack([distance == offset for offset in offsets]).any(0)
    bias = torch.zeros(1, given["query"].shape[1], queries, keys)
    bias[:, ::2, there] = 12.0
    bias_added(given, bias)


def inducing(given: Given, ids: Tensor) -> None:
    """Every other head looks at the keys whose token before is the query's own token, as induction heads do."""
    heads, queries = given["query"].shape[1], given["query"].shape[-2]
    same = torch.zeros(len(ids), queries, queries, dtype=torch.bool)
    same[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
    bias = torch.zeros(len(ids), heads, queries, queries)
    bias[:, ::2] = 12.0 * same[:, None]
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


def gains_before_readers(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The norms that read the stream, where all are RMS norms that multiply by their weight and the stream itself is not normed;
    otherwise none."""
    norms = [norm for block in anatomy.blocks for norm in block.norms if norm.role == "before"]
    if "post" in anatomy.norm_placement or not norms or any(norm.kind != "rms" for norm in norms):
        return []
    modules = [model.get_submodule(norm.module.name) for norm in norms if norm.piece is None]
    return modules if len(modules) == len(norms) and all(map(_multiplies, modules)) else []


def _multiplies(norm: nn.Module) -> bool:
    """Whether the result is 0 where the weight is. Gemma's gain is one more than its weight."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    zero = torch.func.functional_call(norm, {"weight": torch.zeros_like(weight)}, torch.ones(1, len(weight)))
    return not bool(zero.any())


@contextlib.contextmanager
def massive_feature(
    model: nn.Module, anatomy: Anatomy, gains: Sequence[nn.Module], batches: Sequence[Mapping[str, Any]]
) -> Iterator[None]:
    """Feature 0 of the stream at a level that holds 99 % of the energy of a token at the entry, and gains that leave what is read
    as it was up to the differences between tokens: 0 for that feature, larger for the others."""
    level: list[float] = []
    squares: dict[nn.Module, float] = {}

    def reading(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares[module] = float(args[0][..., 1:].square().mean())

    def note(stream: Tensor) -> None:
        level[:] = [10.0 * float(stream.square().sum(-1).mean().sqrt())]

    hooks = [module.register_forward_pre_hook(reading) for module in gains]
    try:
        with torch.no_grad(), met(model, [(anatomy.blocks[0].entry, note)]):
            model(**batches[0])
    finally:
        for hook in hooks:
            hook.remove()

    def raised(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[..., 0] = level[0]
        return stream

    weights = [module.get_parameter("weight") for module in gains]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for module, weight in zip(gains, weights, strict=True):
            weight.mul_(math.sqrt(1 + level[0] ** 2 / len(weight) / squares[module]))
            weight[0] = 0
    try:
        with stream_changed(model, anatomy, 0, raised):
            yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def low_rank(stream: Tensor) -> Tensor:
    """The cloud of all tokens in a quarter of its directions, the strongest."""
    tokens = stream.flatten(0, 1)
    mean = tokens.mean(0)
    _, _, V = torch.linalg.svd((tokens - mean).float(), full_matrices=False)
    V = V[: stream.shape[-1] // 4].to(stream.dtype)
    return (stream - mean) @ V.T @ V + mean


# What was planted, measured by its own means ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Somebody who learnt which token of a sequence stands where from a model's output: linear, one class a token, for each
    sequence anew."""

    scale: Tensor  # of each feature
    means: list[Tensor]  # of a sequence, by feature
    weights: list[Tensor]  # of a sequence, [width, token]

    def told_apart(self, outputs: Sequence[Tensor], batches: Sequence[Mapping[str, Any]]) -> float:
        """How much what it says depends on which token it looks at: the mutual information between the token's place in its
        sequence and the class, H(mean of p) - mean of H(p), in nats; the mean over sequences. 0 just if it says the same of every
        token, whether or not it is right, and at most the logarithm of the number of tokens. Not finite outputs say nothing of
        anything."""
        found = []
        for states, mean, weight in zip(_sequences(outputs, batches), self.means, self.weights, strict=True):
            if not bool(states.isfinite().all()):
                return 0.0
            p = (((states - mean) / self.scale) @ weight).softmax(-1)
            found.append(float(torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(-1).mean()))
        return sum(found) / len(found)


def reader(outputs: Sequence[Tensor], batches: Sequence[Mapping[str, Any]], scale: Tensor | None = None) -> Reader:
    """Multinomial logistic regression, for each sequence, from the output to the token that stands there. Each feature is centred,
    and divided by `scale`, by default its own deviation. The penalty, one thousandth of the squared weights beside the mean loss,
    keeps weights bounded: with the scale of a healthy output, differences that have shrunk are lost to whoever learns anew, too.
    Not finite outputs teach nothing."""
    sequences = _sequences(outputs, batches)
    scale = torch.cat(sequences).std(0).clamp(min=1e-12) if scale is None else scale
    means = [states.mean(0) for states in sequences]
    weights = [_learnt((states - mean) / scale) for states, mean in zip(sequences, means, strict=True)]
    return Reader(scale, means, weights)


def _sequences(outputs: Sequence[Tensor], batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The states of the real tokens of each sequence, [token, width]."""
    return [
        row[real]
        for output, batch in zip(outputs, batches, strict=True)
        for row, real in zip(output, batch["attention_mask"].bool(), strict=True)
    ]


def _learnt(z: Tensor) -> Tensor:
    """The weights of the regression from features [token, width] to tokens. They lie in what the features span, where they are
    sought."""
    if not bool(z.isfinite().all()):
        return torch.zeros(z.shape[1], len(z), dtype=z.dtype)
    U, values, V = torch.linalg.svd(z, full_matrices=False)
    there, tokens = U * values, torch.arange(len(z))
    weight = torch.zeros(len(values), len(z), dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.cross_entropy(there @ weight, tokens) + 1e-3 * weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return V.T @ weight.detach()


def outputs(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The last hidden states of each batch, in double precision."""
    with torch.no_grad():
        return [model(**batch).last_hidden_state.double() for batch in batches]


def output_kept(intact: Sequence[Tensor], changed: Sequence[Tensor], batches: Sequence[Mapping[str, Any]]) -> float:
    """How much a changed model's output still says of its tokens what the intact one said: the correlation of the two over all
    real tokens of a sequence, each feature without its mean over them. 1 where nothing but a scale and a level changed, 0 where
    what remains has nothing to do with what was there. The mean over sequences."""
    found = []
    for before, after, batch in zip(intact, changed, batches, strict=True):
        mask = batch["attention_mask"].bool()[..., None]
        one, other = (_without_mean(output, mask) for output in (before, after))
        found.append((one * other).sum((1, 2)) / (one.norm(dim=(1, 2)) * other.norm(dim=(1, 2))).clamp(min=1e-300))
    return float(torch.cat(found).mean())


def _without_mean(output: Tensor, mask: Tensor) -> Tensor:
    real = torch.where(mask, output, 0)
    return torch.where(mask, output - real.sum(1, keepdim=True) / mask.sum(1, keepdim=True), 0)


def attention_weights(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The weights of a fused call and its allowed pairs, both [batch, head, query, key], formed from its operands."""
    logits, allowed = _logits(given, None)
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0), allowed


def rows_apart(given: Mapping[str, Any], real: Tensor) -> Tensor:
    """How differently two tokens in a row attend: the total variation between their weights on the keys that both may see, in the
    head where it is largest. 0 where all rows say the same. [sequence]"""
    weights, allowed = attention_weights(given)
    shared = allowed[..., 1:, :] & allowed[..., :-1, :]
    one, other = (torch.where(shared, rows, 0) for rows in (weights[..., 1:, :], weights[..., :-1, :]))
    one, other = (rows / rows.sum(-1, keepdim=True).clamp(min=1e-30) for rows in (one, other))
    counted = (real[:, 1:] & real[:, :-1])[:, None] & (shared.sum(-1) >= 4)
    distance = torch.where(counted, (one - other).abs().sum(-1) / 2, 0)
    return (distance.sum(-1) / counted.sum(-1)).amax(-1)


def keys_within_reach(given: Mapping[str, Any], heads: Sequence[int] | None, real: Tensor) -> Tensor:
    """The share of keys, the strongest of each row left out, whose weight beside the strongest of the others is not zero in
    single precision: 1 where every key can still win or lose, 0 where the logits leave none. [sequence]"""
    logits, allowed = _logits(given, heads)
    logits = logits.masked_fill(~allowed, -torch.inf)
    others = logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf)
    within = (others > others.amax(-1, keepdim=True) - UNDERFLOW).sum(-1).double() / (allowed.sum(-1) - 1)
    rows = (allowed.sum(-1) >= 4) & real[:, None]
    return torch.where(rows, within, 0).sum((1, 2)) / rows.sum((1, 2))


def _logits(given: Mapping[str, Any], heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The logits of some heads, a bias in the mask included, and which pairs are allowed."""
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
        if mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, chosen]
        allowed = allowed & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
        if mask.dtype != torch.bool:
            logits = logits + mask.float().clamp(min=-1e30)
    return logits, allowed
