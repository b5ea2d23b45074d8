"""Four architectures written out from their papers, in float64, with components left out where they would stand.

Nothing of the model but its weights (and its table of rotary frequencies) is used. Each function returns the stream after
every block. `without` holds "norm", "residual", "attention-residual", "mlp-residual", "mlp", "attention": a removed sublayer is
skipped with its own norm and residual;
a removed residual lets the sublayer's output alone go on; a removed norm is the identity, inside the blocks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def _alone(without: Collection[str], which: str) -> bool:
    """Whether the sublayer's output goes on without the stream."""
    return "residual" in without or f"{which}-residual" in without


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, softcap: float | None = None) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _rotated(x: Tensor, frequencies: Tensor, width: int) -> Tensor:
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    turned, rest = x[..., :width], x[..., width:]
    half = width // 2
    turned = turned * cos + torch.cat([-turned[..., half:], turned[..., :half]], -1) * sin
    return torch.cat([turned, rest], -1)


def bert(model: nn.Module, ids: Tensor, without: Collection[str]) -> list[Tensor]:
    """Post-norm: Devlin et al. 2019, arXiv 1810.04805."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    config = model.config
    eps = config.layer_norm_eps
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = _layer_norm(x, w, "embeddings.LayerNorm", eps)
    clouds = []
    for i in range(config.num_hidden_layers):
        p = f"encoder.layer.{i}"

        def joined(x: Tensor, update: Tensor, norm: str, which: str) -> Tensor:
            y = update if _alone(without, which) else x + update
            return y if "norm" in without else _layer_norm(y, w, norm, eps)

        if "attention" not in without:
            q, k, v = (
                _heads(_linear(x, w, f"{p}.attention.self.{n}"), config.num_attention_heads)
                for n in ("query", "key", "value")
            )
            mixed = _attend(q, k, v, q.shape[-1] ** -0.5, causal=False)
            x = joined(
                x, _linear(mixed, w, f"{p}.attention.output.dense"), f"{p}.attention.output.LayerNorm", "attention"
            )
        if "mlp" not in without:
            hidden = _gelu(_linear(x, w, f"{p}.intermediate.dense"))
            x = joined(x, _linear(hidden, w, f"{p}.output.dense"), f"{p}.output.LayerNorm", "mlp")
        clouds.append(x)
    return clouds


def gpt2(model: nn.Module, ids: Tensor, without: Collection[str]) -> list[Tensor]:
    """Pre-norm, causal: Radford et al. 2019."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    config = model.config
    x = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    clouds = []

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    for i in range(config.n_layer):
        p = f"h.{i}"

        def normed(x: Tensor, name: str) -> Tensor:
            return x if "norm" in without else _layer_norm(x, w, name, config.layer_norm_epsilon)

        if "attention" not in without:
            q, k, v = (_heads(t, config.n_head) for t in conv(normed(x, f"{p}.ln_1"), f"{p}.attn.c_attn").chunk(3, -1))
            update = conv(_attend(q, k, v, q.shape[-1] ** -0.5, causal=True), f"{p}.attn.c_proj")
            x = update if _alone(without, "attention") else x + update
        if "mlp" not in without:
            update = conv(_gelu_tanh(conv(normed(x, f"{p}.ln_2"), f"{p}.mlp.c_fc")), f"{p}.mlp.c_proj")
            x = update if _alone(without, "mlp") else x + update
        clouds.append(x)
    return clouds


def gpt_neox(model: nn.Module, ids: Tensor, without: Collection[str]) -> list[Tensor]:
    """Parallel attention and MLP, partial rotary embedding, causal: Black et al. 2022, arXiv 2204.06745."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    config = model.config
    heads = config.num_attention_heads
    frequencies = model.rotary_emb.inv_freq.double()
    x = w["embed_in.weight"][ids]
    clouds = []
    for i in range(config.num_hidden_layers):
        p = f"layers.{i}"

        def normed(x: Tensor, name: str) -> Tensor:
            return x if "norm" in without else _layer_norm(x, w, name, config.layer_norm_eps)

        updates = []
        if "attention" not in without:
            mixed = _linear(normed(x, f"{p}.input_layernorm"), w, f"{p}.attention.query_key_value")
            q, k, v = _heads(mixed, heads).chunk(3, -1)  # each head holds its own q, k, v
            q, k = (_rotated(t, frequencies, 2 * len(frequencies)) for t in (q, k))
            updates.append(_linear(_attend(q, k, v, q.shape[-1] ** -0.5, causal=True), w, f"{p}.attention.dense"))
        if "mlp" not in without:
            hidden = _gelu(_linear(normed(x, f"{p}.post_attention_layernorm"), w, f"{p}.mlp.dense_h_to_4h"))
            updates.append(_linear(hidden, w, f"{p}.mlp.dense_4h_to_h"))
        if updates:
            alone = all(_alone(without, which) for which in ("attention", "mlp") if which not in without)
            x = sum(updates[1:], updates[0]) if alone else x + sum(updates[1:], updates[0])
        clouds.append(x)
    return clouds


def gemma2(model: nn.Module, ids: Tensor, without: Collection[str]) -> list[Tensor]:
    """Sandwich norms, soft-capped logits, grouped queries, causal: Gemma team 2024, arXiv 2408.00118."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    config = model.config
    frequencies = model.rotary_emb.inv_freq.double()
    # the model keeps its embedding scale rounded to single precision
    x = w["embed_tokens.weight"][ids] * torch.tensor(config.hidden_size**0.5, dtype=torch.float32).double()
    clouds = []
    for i in range(config.num_hidden_layers):
        p = f"layers.{i}"

        def normed(x: Tensor, name: str) -> Tensor:
            if "norm" in without:
                return x
            return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * (1 + w[f"{name}.weight"])

        def around(x: Tensor, before: str, after: str, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
            update = normed(sublayer(normed(x, before)), after)
            return update if _alone(without, sublayer.__name__) else x + update

        def attention(x: Tensor, p: str = p) -> Tensor:
            q = _heads(_linear(x, w, f"{p}.self_attn.q_proj"), config.num_attention_heads)
            k, v = (_heads(_linear(x, w, f"{p}.self_attn.{n}_proj"), config.num_key_value_heads) for n in "kv")
            q, k = (_rotated(t, frequencies, 2 * len(frequencies)) for t in (q, k))
            scale = config.query_pre_attn_scalar**-0.5
            mixed = _attend(q, k, v, scale, causal=True, softcap=config.attn_logit_softcapping)
            return _linear(mixed, w, f"{p}.self_attn.o_proj")

        def mlp(x: Tensor, p: str = p) -> Tensor:
            gate, up = (_linear(x, w, f"{p}.mlp.{n}_proj") for n in ("gate", "up"))
            return _linear(_gelu_tanh(gate) * up, w, f"{p}.mlp.down_proj")

        if "attention" not in without:
            x = around(x, f"{p}.input_layernorm", f"{p}.post_attention_layernorm", attention)
        if "mlp" not in without:
            x = around(x, f"{p}.pre_feedforward_layernorm", f"{p}.post_feedforward_layernorm", mlp)
        clouds.append(x)
    return clouds
