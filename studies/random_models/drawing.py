"""A seed becomes a `Specification`, and that a model with its batches.

Pieces are drawn independently, as far as they go together; what does not is drawn again or replaced (`reconciled`). Sizes are
small and coincide now and then, as users' sizes do: as many sequences as heads, as many tokens as a head is wide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studies.random_models import pieces
from studies.random_models.pieces import (
    MLP,
    Attention,
    TorchLayer,
    added,
    allowed_pairs,
    angles,
    as_mask,
    make_norm,
    make_scales,
    normed,
    torch_masks,
)
from studies.random_models.specification import DIFFERENCES, NO_SOFTMAX, Specification
from studies.random_models.truth import Switches, Truth

F = nn.functional
FARTHEST = 6  # distances beyond it share one learned bias
FEATURES = 9  # of a token that is given as numbers
BIASES = ("ALiBi", "relative")
HALVES = ("bfloat16", "float16")
ATTENTIONS = (*pieces.STYLES, "one module per head", "nn.MultiheadAttention")
CHOICES: dict[str, Mapping[str, float]] = {
    "stream": {"batch first": 3, "token first": 1},
    "signature": {  # the plain choice of each piece comes first
        "input_ids, attention_mask": 3,
        "input_ids, attention_mask, position_ids": 3,
        "idx": 2,
        "src, src_key_padding_mask": 1,
        "tokens, keep": 1,
        "src, src_mask": 1,
    },
    "given": {"ids": 6, "features": 1},
    "entries": {"ids first": 2, "mask or label first": 1},
    "ids": {"batch first": 3, "as the stream": 1},
    "state": {"tensor": 4, "tuple": 1, "dict": 1, "dataclass": 1, "tuple returned": 1},
    "route": {"by keyword": 2, "by position": 2, "made in the attention": 1},
    "wrapper": {"none": 5, "a module that passes everything on": 1, "another signature": 1, "autocast": 1},
    "output": {"stream": 3, "logits": 2, "dict": 1, "tuple": 1},
    "dtype": {"float32": 6, "float64": 2, "bfloat16": 1, "float16": 1},
    "attention": dict.fromkeys(ATTENTIONS, 1) | {"matmul": 2, "SDPA": 4, "nn.MultiheadAttention": 2},
    "inputs": {"three modules": 3, "one module": 3, "interleaved": 1, "F.linear": 1, "einsum": 1},
    "queries": {"plain": 6, "norm modules": 1, "F.normalize": 1, "F.rms_norm": 1},
    "softmax": {
        "F.softmax": 3,
        "torch.softmax": 2,
        "softmax method": 2,
        "nn.Softmax": 1,
        "float32": 2,
        "exp over sum": 1,
        "exp of less the maximum": 1,
        "exp of log_softmax": 1,
    },
    "softcap": {"none": 6, "tanh": 1},
    "gate": {"none": 6, "per head": 1, "per channel": 1},
    "mask": {
        "causal": 5,
        "none": 3,
        "window": 1,
        "causal window": 1,
        "causal, every other block in a window": 1,
    },
    "masking": {
        "added": 3,
        "added, padding apart": 1,
        "masked_fill": 3,
        "torch.where": 2,
        "after the softmax": 1,
        "after the softmax, renormalised": 1,
    },
    "forbidden": {"minus infinity": 3, "-1e9": 2, "-1e4": 2, "-100": 1, "dtype minimum": 2},
    "padding": {"none": 3, "right": 2, "left": 1},
    "sink": {
        "none": 8,
        "learned logit": 1,
        "zero column in front": 1,
        "zero column behind": 1,
        "zero column in front, kept": 1,
        "one more in the sum": 1,
        "zero key": 1,
    },
    "beginning": {"none": 8, "learned": 1},
    "projection": {
        "module": 6,
        "F.linear": 1,
        "matmul": 1,
        "einsum": 1,
        "summed over heads": 1,
        "a module per head": 1,
        "Conv1D": 1,
    },
    "adapter": {"none": 4, "LoRA": 1, "DoRA": 1, "DoRA, split": 1, "OFT": 1},
    "positions": {
        "learned": 4,
        "sinusoidal": 1,
        "rotary": 3,
        "rotary, in the attention": 1,
        "ALiBi": 1,
        "relative": 1,
        "none": 1,
    },
    "sharing": {"none": 6, "one layer for all": 1},
    "embedding_again": {"none": 8, "mixed in": 1},
    "residuals": {"in the block": 10, "in the model's loop": 2, "in nn.TransformerEncoderLayer": 1},
    "placement": {"pre": 6, "post": 2, "sandwich": 1, "output": 1, "parallel, one norm": 1, "parallel, two norms": 1},
    "norm": {
        "nn.LayerNorm": 4,
        "nn.RMSNorm": 2,
        "own RMSNorm module": 2,
        "F.layer_norm": 1,
        "F.layer_norm, with a gain": 1,
        "F.rms_norm": 2,
        "F.normalize": 1,
        "layer norm by hand": 1,
        "RMS norm by hand": 1,
        "adaptive module": 1,
        "adaptive in the block": 1,
        "none": 1,
    },
    "norm_home": {"block": 3, "sublayer": 1},
    "addition": {
        "x + f": 3,
        "f + x": 2,
        "torch.add(x, f, alpha=)": 1,
        "torch.add(f, x, alpha=)": 1,
        "x.add_(f)": 1,
        "x += f": 1,
        "torch.addcmul(x, b, f)": 1,
        "torch.lerp(x, f, 0.4)": 0.5,
    },
    "stream_scale": {"none": 8, "fixed": 1, "learned": 1, "buffered": 1},
    "update_scale": {"none": 6, "fixed": 1, "learned": 1, "learned, per channel": 1, "buffered": 1, "conditioned": 1},
    "mlp": {"GELU": 3, "SwiGLU": 2, "squared ReLU": 1, "in chunks": 1},
    "start": {"random": 8, "zero projections": 1},
}


def specification(seed: int) -> Specification:
    """The model of this seed. The same seed gives the same model as long as `CHOICES` is as it is."""
    draw = random.Random(seed)
    heads = draw.choice([2, 3, 4, 4, 5])
    head_width = draw.choice([6, 8, 8, 10])
    # Some models are odd in a piece or two, some in everything: the first show which piece is to blame.
    oddness = draw.choice([0.15, 0.3, 0.6, 1.0])
    chosen = {
        name: draw.choices(list(of), list(of.values()))[0]
        if draw.random() < (max(oddness, 0.6) if name == "attention" else oddness)
        else next(iter(of))
        for name, of in CHOICES.items()
    }
    kv = draw.choice([heads, heads, heads] + [g for g in range(1, heads) if heads % g == 0])
    sizes = [(draw.randint(3, 5), draw.randint(7, 13)) for _ in range(draw.choice([1, 1, 2]))]
    sequences, tokens = sizes[0]
    coincidences = [
        (heads, tokens),
        (sequences, head_width),
        (sequences, heads),
        (sequences, sequences),
        (sequences, sequences * heads),
        (sequences, heads * head_width),
        (1, tokens),  # no coincidence, but what a first try looks like
        (1, 3),
        (sequences, 17),  # enough keys for a rest entropy
    ]
    if draw.random() < 0.35:
        sizes[0] = draw.choice([c for c in coincidences if 3 <= c[1] <= 20])
    drawn = Specification(
        seed=seed,
        vocabulary=draw.choice([23, 31]),
        blocks=draw.choice([2, 2, 2, 2, 3, 1]),
        width=heads * head_width,
        heads=heads,
        key_value_heads=kv,
        head_width=head_width,
        batches=tuple(sizes),
        window=draw.choice([3, 4]),
        **chosen,
    )
    return reconciled(drawn)


def reconciled(spec: Specification) -> Specification:
    """`spec` with the pieces that do not go together replaced."""
    draw = random.Random(-spec.seed - 1)
    s = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    for name, of in CHOICES.items():  # what another piece had forced
        if s[name] not in of:
            s[name] = next(iter(of))
    if s["residuals"] == "in nn.TransformerEncoderLayer":
        s |= {"attention": "nn.MultiheadAttention", "norm": "nn.LayerNorm", "norm_home": "block", "addition": "x + f"}
        s |= {"stream_scale": "none", "update_scale": "none", "mlp": "GELU", "state": "tensor", "sink": "none"}
        s |= {"embedding_again": "none", "route": "by keyword"}
        s["placement"] = "post" if s["placement"] == "post" else "pre"
    attention = s["attention"]
    if s["stream"] == "batch first":
        s["ids"] = "batch first"
    if s["update_scale"] == "conditioned" and not s["norm"].startswith("adaptive"):
        s["norm"] = "adaptive module"
    if s["given"] == "features" and s["signature"].startswith("input_ids"):  # numbers are no ids
        s["signature"] = "src, src_key_padding_mask" if s["padding"] != "none" else "idx"
    if s["signature"] in {"idx", "src, src_mask"}:
        s["padding"] = "none"
    if s["signature"] == "src, src_mask":  # the mask [query, key] is the caller's
        s["route"] = "by keyword" if s["route"] == "made in the attention" else s["route"]
        s["beginning"] = "none"
        if s["mask"] in {"none", "causal, every other block in a window"}:
            s["mask"] = "causal"
    if s["mask"] == "causal, every other block in a window" and s["route"] == "made in the attention":
        s["route"] = "by keyword"
    if s["masking"] == "after the softmax":
        s["padding"] = "none"  # padded tokens would count in the denominators of the others: they were no padding
    if s["masking"] == "added, padding apart":
        if s["padding"] == "none" or s["mask"] == "none":
            s["masking"] = "added"
        elif s["softmax"] == "exp over sum":
            s["masking"] = "added"  # a padded query that sees nothing would be 0 / 0
        elif s["forbidden"] in {"minus infinity", "dtype minimum"}:
            s["forbidden"] = "-1e9"  # here it would become NaN
    if s["state"] != "tensor" or s["residuals"] == "in the model's loop":
        s["route"] = "by keyword" if s["route"] == "made in the attention" else s["route"]
    if s["residuals"] == "in the model's loop":
        s["state"] = "tensor"
    if s["norm"] == "none":
        s["placement"] = "parallel, one norm" if s["placement"].startswith("parallel") else "pre"
    if s["placement"].startswith("parallel") or s["norm"].startswith("adaptive"):
        s["norm_home"] = "block"
    # Attention styles that bring their own way of something.
    if s["softmax"].startswith("exp") and s["forbidden"] in {"dtype minimum"} and s["masking"] == "added":
        s["forbidden"] = "minus infinity"
    if s["softmax"] == "exp over sum" or s["sink"] == "one more in the sum":
        s["softcap"] = "tanh" if s["dtype"] in HALVES else s["softcap"]  # exponentials that can be added up
    if attention in {"SDPA", "nn.MultiheadAttention"}:
        s["softmax"], s["softcap"] = "inside", "none"
        s["sink"] = "zero key" if s["sink"] != "none" and s["sink"].startswith("zero") else "none"
        s["masking"] = draw.choice(["added", "boolean"])
    elif s["sink"] == "zero key":
        s["sink"] = "zero column in front, kept"
    if attention == "SDPA" and s["mask"] == "causal" and s["padding"] == "none" and draw.random() < 0.6:
        s["masking"] = "flag"
    if s["masking"] == "flag" and s["signature"] == "src, src_mask":
        s["masking"] = "boolean"
    if s["masking"] == "flag" and (s["positions"] in BIASES or s["sink"] != "none"):
        s["masking"] = "added"
    if attention == "SDPA" and s["positions"] in BIASES:
        s["masking"] = "added"
    if attention == "nn.MultiheadAttention":
        s |= {"projection": "module", "adapter": "none", "gate": "none", "queries": "plain", "inputs": "one module"}
        s["key_value_heads"] = s["heads"]
        if s["positions"].startswith(("rotary", *BIASES)):
            s["positions"] = draw.choice(["learned", "sinusoidal", "none"])
    if attention == "one module per head":
        s |= {"inputs": "three modules", "queries": "plain", "key_value_heads": s["heads"]}
        if s["positions"].startswith("rotary"):
            s["positions"] = draw.choice(["learned", "ALiBi"])
    if attention.startswith("baddbmm"):
        s["masking"], s["softcap"] = "added", "none"
    if attention in DIFFERENCES:
        s["sink"] = "none"
        if s["masking"].startswith("after"):
            s["masking"] = "masked_fill"
    if s["sink"] == "zero column in front, kept" and s["masking"].startswith("after"):
        s["sink"] = "zero column in front"
    if attention.startswith("talking heads"):
        s["sink"] = "zero column in front" if s["sink"] == "zero column in front, kept" else s["sink"]
    if attention in pieces.WHOLE_VALUES:
        s |= {"projection": "none", "adapter": "none", "gate": "none"}
        s["inputs"] = "three modules" if s["inputs"] in {"interleaved", "einsum"} else s["inputs"]
    if attention in NO_SOFTMAX:
        s["sink"], s["softcap"] = "none", "none"
        s["softmax"] = "F.softmax" if attention == "channels" else "none"
        if attention == "sigmoid":
            if s["masking"] in {"torch.where", "after the softmax, renormalised"}:
                s["masking"] = "masked_fill"
        else:
            s["queries"] = "plain"
            if s["positions"] in BIASES:
                s["positions"] = "learned"
            if attention == "linear from a matrix":
                s["masking"] = "a factor on the products"
    if attention in {"linear without a matrix", "channels"}:
        s["mask"], s["masking"] = "none", "none"
        s["signature"] = "idx" if s["signature"] == "src, src_mask" else s["signature"]
    if attention == "channels":
        s["padding"] = "none"
    if attention == "grouped einsum":
        if s["key_value_heads"] == s["heads"]:
            s["key_value_heads"] = 1 if s["heads"] in {3, 5} else s["heads"] // 2
        if s["sink"] == "learned logit":
            s["sink"] = "zero column in front"
    if s["key_value_heads"] != s["heads"] and s["inputs"] == "interleaved":
        s["inputs"] = "one module"
    if attention in DIFFERENCES and s["inputs"] == "interleaved":
        s["inputs"] = "three modules"
    if s["mask"] == "none" and s["padding"] == "none" and s["masking"] not in {"flag", "none"}:
        s["masking"], s["forbidden"] = "none", "none"
    if s["masking"] in {"none", "flag", "boolean", "a factor on the products"} or s["masking"].startswith("after"):
        s["forbidden"] = "none"
    if s["sink"] == "one more in the sum":
        s["softmax"] = "exp over one more than the sum"
        if s["forbidden"] in {"dtype minimum"}:
            s["forbidden"] = "-1e9"
    if s["dtype"] == "float16" and s["forbidden"] == "-1e9":
        s["forbidden"] = "-1e4"  # the other is no float16
    if s["mask"] == "none" and s["padding"] == "none":
        s["route"] = "none"
    elif s["route"] == "made in the attention" and (s["padding"] != "none" or s["mask"] == "none"):
        s["route"] = "by keyword"
    if s["masking"] == "flag":
        s["route"] = "made in the attention"
    if s["wrapper"] == "autocast":
        s["dtype"] = "float32"
        if s["adapter"] == "OFT" or s["softmax"] == "exp over sum":
            s["wrapper"] = "none"
    if attention == "windows apart":
        s |= {"mask": "none", "masking": "none", "forbidden": "none", "padding": "none", "route": "none"}
        s |= {"beginning": "none", "signature": "idx" if s["signature"] == "src, src_mask" else s["signature"]}
        s["positions"] = "learned" if s["positions"] in BIASES else s["positions"]
        s["sink"] = "zero column in front" if s["sink"] == "zero column in front, kept" else s["sink"]
        s["batches"] = tuple((sequences, 4 * max(2, tokens // 4)) for sequences, tokens in s["batches"])
    if s["projection"] != "module":
        s["adapter"] = "none"
    if s["dtype"] in HALVES and s["adapter"] == "OFT":
        s["adapter"] = "LoRA"
    if s["addition"] == "torch.lerp(x, f, 0.4)":
        s |= {"stream_scale": "none", "update_scale": "none"}
        if s["placement"].startswith("parallel") or s["wrapper"] == "autocast":  # lerp wants one number format
            s["addition"] = "x + f"
    if s["addition"] == "torch.addcmul(x, b, f)" and s["update_scale"] in {"none", "fixed"}:
        s["update_scale"] = "learned, per channel"
    if s["start"] == "zero projections" and s["adapter"] != "none":
        s["adapter"] = "none"  # their own start is another one, and DoRA divides by the weight's length
    if s["wrapper"] == "another signature" and s["signature"].endswith("position_ids"):
        s["signature"] = "input_ids, attention_mask"
    if s["placement"].startswith("parallel") and s["residuals"] == "in the model's loop":
        s["residuals"] = "in the block"
    return Specification(**s)


# The model -------------------------------------------------------------------------------------------------------------


class Sublayer(nn.Module):
    """A sublayer that brings its own norm along (vit-pytorch's `PreNorm`)."""

    def __init__(self, spec: Specification, switches: Switches, inner: nn.Module) -> None:
        super().__init__()
        self.spec, self.switches, self.inner = spec, switches, inner
        make_norm(spec, self, "norm")

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        if not self.switches.is_off("norm"):
            x = normed(self.spec, self, "norm", x, None)
        return self.inner(x, *given, **named)


class Parts(nn.ModuleDict):
    """One block's sublayers, norms and scales, for whoever runs them."""

    def __init__(self, spec: Specification, switches: Switches, block: int) -> None:
        super().__init__()
        self.spec, self.switches = spec, switches
        inside = spec.norm_home == "sublayer" and spec.placement in {"pre", "sandwich"}
        sublayers = {"attention": Attention(spec, switches, block), "mlp": MLP(spec)}
        for name, module in sublayers.items():
            self[name] = Sublayer(spec, switches, module) if inside else module
            if spec.placement in {"pre", "sandwich"} and not inside:
                make_norm(spec, self, f"{name}_norm")
            if spec.placement == "parallel, two norms" or (spec.placement == "parallel, one norm" and name == "mlp"):
                make_norm(spec, self, f"{name}_norm")
            if spec.placement in {"sandwich", "output", "post"}:
                make_norm(spec, self, f"{name}_norm_after")
            make_scales(spec, self, name)
        self.inside = inside
        if spec.embedding_again == "mixed in":
            self.embedding_again = nn.Parameter(torch.tensor([0.9, 0.3]))

    def norm(self, name: str, x: Tensor, condition: Tensor | None) -> Tensor:
        return x if self.switches.is_off("norm") else normed(self.spec, self, name, x, condition)


def passed(
    parts: Parts, x: Tensor, condition: Tensor | None, embedded: Tensor | None, *given: Any, **named: Any
) -> Tensor:
    """The stream through one block. `embedded` is what the first block was given; `given` and `named` go to the attention."""
    spec, is_off = parts.spec, parts.switches.is_off

    def update(name: str, x: Tensor) -> Tensor:
        pre = spec.placement in {"pre", "sandwich"} and not parts.inside
        if pre or spec.placement == "parallel, two norms":
            x = parts.norm(f"{name}_norm", x, condition)
        x = parts["attention"](x, *given, **named) if name == "attention" else parts["mlp"](x)
        if spec.placement in {"sandwich", "output"}:
            x = parts.norm(f"{name}_norm_after", x, condition)
        return x

    if embedded is not None:
        x = parts.embedding_again[0] * x + parts.embedding_again[1] * embedded
        if parts.switches.recorder is not None and parts.switches.block == 0:
            parts.switches.recorder.begin(x, spec.token_first)
    if spec.is_parallel:
        shared = parts.norm("mlp_norm", x, condition) if spec.placement == "parallel, one norm" else x
        f = None if is_off("attention") else update("attention", shared)
        g = None if is_off("mlp") else update("mlp", shared)
        stream = None if is_off("residual") and not (f is None and g is None) else x
        if stream is not None or f is not None:
            stream = added(spec, parts, "attention", stream, f, condition)
        return added(spec, parts, "mlp", stream, g, condition, scales_stream=False)
    for name in ("attention", "mlp"):
        f = None if is_off(name) else update(name, x)
        alone = f is not None and (is_off("residual") or is_off(f"{name}-residual"))
        x = added(spec, parts, name, None if alone else x, f, condition)
        if spec.placement == "post" and f is not None:
            x = parts.norm(f"{name}_norm_after", x, condition)
    return x


@dataclass
class State:
    """What goes from block to block where that is a dataclass."""

    hidden: Tensor
    mask: Tensor | None = None


class Block(nn.Module):
    """A block as a module; the additions stand in its own forward."""

    def __init__(self, spec: Specification, switches: Switches, block: int) -> None:
        super().__init__()
        self.spec, self.parts = spec, Parts(spec, switches, block)

    def forward(
        self,
        state: Any,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        keep: Tensor | None = None,
        condition: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> Any:
        kind = self.spec.state
        x = state
        if kind == "tuple":
            x, mask = state
        elif kind == "dict":
            x, mask = state["hidden"], state["mask"]
        elif kind == "dataclass":
            x, mask = state.hidden, state.mask
        x = passed(self.parts, x, condition, embedded, mask, bias, rotation, keep)
        if kind == "tuple":
            return x, mask
        if kind == "dict":
            return {**state, "hidden": x}
        if kind == "dataclass":
            return dataclasses.replace(state, hidden=x)
        return (x, None) if kind == "tuple returned" else x


class Model(nn.Module):
    """The whole model but for its signature, which the classes below give it."""

    table: Tensor
    slopes: Tensor

    def __init__(self, spec: Specification, switches: Switches) -> None:
        super().__init__()
        self.spec, self.switches = spec, switches
        D = spec.width
        self.embed = nn.Linear(FEATURES, D) if spec.given == "features" else nn.Embedding(spec.vocabulary, D)
        if spec.positions == "learned":
            self.position = nn.Embedding(40, D)
        elif spec.positions == "sinusoidal":
            angle = torch.arange(40)[:, None] / 100.0 ** (torch.arange(D // 2) / (D // 2))
            self.register_buffer("table", torch.cat([angle.sin(), angle.cos()], -1))
        elif spec.positions == "relative":
            self.relative = nn.Embedding(2 * FARTHEST + 1, spec.heads)
        elif spec.positions == "ALiBi":
            self.register_buffer("slopes", 0.5 ** torch.arange(1, spec.heads + 1).float())
        if spec.beginning == "learned":
            self.beginning = nn.Parameter(torch.randn(1, 1, D))
        if spec.norm.startswith("adaptive"):
            self.labels = nn.Embedding(7, D)
        kind = {"in the block": Block, "in the model's loop": Parts}.get(spec.residuals, TorchLayer)
        layers = 1 if spec.sharing == "one layer for all" else spec.blocks
        self.layers = nn.ModuleList(kind(spec, switches, n) for n in range(layers))
        self.norm = nn.LayerNorm(D) if spec.seed % 3 else None
        self.head = nn.Linear(D, spec.vocabulary, bias=False) if spec.output == "logits" else None

    def run(
        self,
        ids: Tensor,
        real: Tensor | None = None,
        position_ids: Tensor | None = None,
        label: Tensor | None = None,
        given_mask: Tensor | None = None,
    ) -> Any:
        """`real` [batch, token] is True where a token is no padding; `given_mask` [query, key] is the caller's."""
        spec, switches, recorder = self.spec, self.switches, self.switches.recorder
        if spec.ids == "as the stream":
            ids = ids.transpose(0, 1)
        x = self.embed(ids)
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1])[None]
        if "positions" in switches.off:
            position_ids = position_ids * 0
        if spec.positions == "learned":
            x = x + self.position(position_ids)
        elif spec.positions == "sinusoidal":
            x = x + self.table[position_ids]
        if spec.beginning == "learned":
            x = torch.cat([self.beginning.expand(len(x), -1, -1), x], 1)
            position_ids = F.pad(position_ids, (1, 0))
            real = None if real is None else F.pad(real, (1, 0), value=True)
        batch, tokens = x.shape[:2]
        rotation = angles(position_ids, spec, x.dtype) if spec.positions == "rotary" else None
        bias = None
        distance = position_ids[:, :, None] - position_ids[:, None, :]
        if spec.positions == "ALiBi":
            bias = -self.slopes[None, :, None, None] * distance[:, None].abs().to(x.dtype)
        elif spec.positions == "relative":  # a learned number for each distance, as T5 has it
            bias = self.relative(distance.clamp(-FARTHEST, FARTHEST) + FARTHEST).permute(0, 3, 1, 2)
        keep = None
        if spec.attention == "linear without a matrix" and real is not None:
            keep = real.to(x.dtype)
        if recorder is not None:
            recorder.tokens(torch.ones(batch, tokens, dtype=torch.bool) if real is None else real)
        condition = self.labels(label) if spec.norm.startswith("adaptive") else None
        if spec.token_first:
            x = x.transpose(0, 1)
        if recorder is not None:
            recorder.stream(x, spec.token_first)
        embedded = x if spec.embedding_again == "mixed in" else None
        for number in range(spec.blocks):
            switches.block = number
            if recorder is not None:
                seen = self._allowed(tokens, real, number, padding_alone=switches.is_off("mask"))
                recorder.pairs(seen.expand(batch, -1, -1))
            mask = None if given_mask is None else given_mask[None, None]
            if given_mask is None or switches.is_off("mask"):
                mask = self._mask(tokens, real, x.dtype, number)
            layer = self.layers[number % len(self.layers)]
            x = self._through(layer, x, mask, bias, rotation, keep, condition, embedded)
            if recorder is not None:
                recorder.stream(x, spec.token_first)
        if self.norm is not None:
            x = self.norm(x)
        if spec.token_first and spec.ids == "batch first":
            x = x.transpose(0, 1)
        if self.head is not None:
            x = self.head(x)
        if spec.output == "dict":
            return {"hidden": x}
        return (x,) if spec.output == "tuple" else x

    def _through(
        self,
        layer: Any,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        keep: Tensor | None,
        condition: Tensor | None,
        embedded: Tensor | None,
    ) -> Tensor:
        spec = self.spec
        if isinstance(layer, Parts):  # the additions stand here, in the model's own forward
            return passed(layer, x, condition, embedded, mask, bias, rotation, keep)
        if isinstance(layer, TorchLayer):
            pairs, padding = torch_masks(spec, mask)
            return layer(x, src_mask=pairs, src_key_padding_mask=padding)
        every = {"mask": mask, "bias": bias, "rotation": rotation, "keep": keep, "condition": condition}
        every["embedded"] = embedded
        given: tuple[Any, ...] = ()
        named = {name: value for name, value in every.items() if value is not None}
        if spec.route == "by position":
            given, named = tuple(every.values()), {}
        if spec.state == "tuple":
            return layer((x, mask), *given, **named)[0]
        if spec.state == "dict":
            return layer({"hidden": x, "mask": mask}, *given, **named)["hidden"]
        if spec.state == "dataclass":
            return layer(State(x, mask), *given, **named).hidden
        left = layer(x, *given, **named)
        return left[0] if spec.state == "tuple returned" else left

    def _allowed(self, tokens: int, real: Tensor | None, block: int, padding_alone: bool = False) -> Tensor:
        """Allowed pairs [1 or batch, query, key]. A padded query without any real key sees itself, lest it become NaN."""
        allowed = torch.ones(1, tokens, tokens, dtype=torch.bool)
        if not padding_alone:
            allowed = allowed_pairs(self.spec, tokens, block)[None]
        if real is None:
            return allowed
        allowed = allowed & real[:, None, :]
        return allowed | (torch.eye(tokens, dtype=torch.bool) & ~allowed.any(-1, keepdim=True))

    def _mask(self, tokens: int, real: Tensor | None, dtype: torch.dtype, block: int) -> Tensor | None:
        """The mask [1 or batch, 1, query, key] in the model's form; switched off, what of it is padding."""
        spec, is_off = self.spec, self.switches.is_off("mask")
        nothing = spec.mask == "none" and real is None
        made_elsewhere = spec.route in {"none", "made in the attention"} or spec.masking == "none"
        if nothing or made_elsewhere or (is_off and real is None):
            return None
        if spec.masking == "added, padding apart":
            assert real is not None
            mask = as_mask(spec, real[:, None, None, :], dtype)
            return mask if is_off else as_mask(spec, allowed_pairs(spec, tokens, block), dtype)[None, None] + mask
        return as_mask(spec, self._allowed(tokens, real, block, padding_alone=is_off), dtype)[:, None]


class WithMask(Model):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, label: Tensor | None = None) -> Any:
        return self.run(input_ids, None if attention_mask is None else attention_mask.bool(), None, label)


class WithPositions(Model):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Any:
        return self.run(input_ids, None if attention_mask is None else attention_mask.bool(), position_ids, label)


class OfIdsAlone(Model):
    def forward(self, idx: Tensor, label: Tensor | None = None) -> Any:
        return self.run(idx, None, None, label)


class AsTorchHasIt(Model):
    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None, label: Tensor | None = None) -> Any:
        return self.run(src, None if src_key_padding_mask is None else ~src_key_padding_mask, None, label)


class OfTokensToKeep(Model):
    def forward(self, tokens: Tensor, keep: Tensor | None = None, label: Tensor | None = None) -> Any:
        return self.run(tokens, keep, None, label)


class OfTheCallersMask(Model):
    def forward(self, src: Tensor, src_mask: Tensor | None = None, label: Tensor | None = None) -> Any:
        return self.run(src, None, None, label, src_mask)


class Passing(nn.Module):
    """A wrapper as `nn.DataParallel` is one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.module(*given, **named)


class Autocasting(Passing):
    """What a trainer makes of a model that it runs in bfloat16."""

    def forward(self, *given: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*given, **named)


class Renaming(nn.Module):
    """A wrapper with a signature of its own, in another order."""

    def __init__(self, inner: nn.Module, names: tuple[str, str | None]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, label: Tensor | None = None, hidden: Tensor | None = None, text: Tensor | None = None) -> Any:
        ids, mask = self.names
        given = {ids: text, "label": label} | ({} if mask is None else {mask: hidden})
        return self.inner(**given)


SIGNATURES: dict[str, tuple[type[Model], str, str | None]] = {
    "input_ids, attention_mask": (WithMask, "input_ids", "attention_mask"),
    "input_ids, attention_mask, position_ids": (WithPositions, "input_ids", "attention_mask"),
    "idx": (OfIdsAlone, "idx", None),
    "src, src_key_padding_mask": (AsTorchHasIt, "src", "src_key_padding_mask"),
    "tokens, keep": (OfTokensToKeep, "tokens", "keep"),
    "src, src_mask": (OfTheCallersMask, "src", "src_mask"),
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Within the block torch's own attention and layer run operation by operation. By themselves they take one fused call where
    they can, into which nobody can look: another order of roundings. No other model has a fused path of its own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class Drawn:
    """A model, ready to be asked: `model` is what a user would hand over, `batches` what they would hand it."""

    spec: Specification
    model: nn.Module
    switches: Switches
    batches: tuple[dict[str, Tensor], ...]

    def run(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's output [sequence, token, width]."""
        with torch.no_grad():
            given = self.model(**batch)
        given = given["hidden"] if isinstance(given, dict) else given[0] if isinstance(given, tuple) else given
        return given.transpose(0, 1) if self.spec.ids == "as the stream" else given

    def truth(self, batch: Mapping[str, Tensor], *without: str) -> Truth:
        """What the model records of one batch, perhaps without some of its parts. Of torch's own modules it is the run that is
        written out, which is the one that can be measured; `comparing` asks how far that is from the fused one."""
        off = dict.fromkeys(without, frozenset(range(self.spec.blocks)))
        with written_out(), self.switches.recording() as recorder, self.switches.without(off):
            self.run(batch)
        return recorder.truth

    def without(self, batch: Mapping[str, Tensor], *parts: str, blocks: Sequence[int] | None = None) -> Tensor:
        """The output of the model that leaves these parts out by itself."""
        every = frozenset(range(self.spec.blocks) if blocks is None else blocks)
        with self.switches.without(dict.fromkeys(parts, every)):
            return self.run(batch)

    def otherwise_padded(self) -> Drawn | None:
        """The same model object with a batch that is padded where these are not, and the other way round; None where its code
        would not heed a padding mask, or has none."""
        spec = self.spec
        mask = SIGNATURES[spec.signature][2]
        deaf = spec.masking in {"none", "flag"} or spec.route == "made in the attention" or spec.mask == "none"
        if (
            mask in {None, "src_mask"}
            or (deaf and spec.padding == "none")
            or spec.masking.endswith(("apart", "after the softmax"))
        ):
            return None
        generator = torch.Generator().manual_seed(spec.seed + 1)
        padding = "right" if spec.padding == "none" else "none"
        other = _batch(spec, generator, 4, 11 if spec.attention != "windows apart" else 12, padding)
        return Drawn(dataclasses.replace(spec, padding=padding), self.model, self.switches, (other,))

    def train(self) -> None:
        """What began at zero has learned something."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        with torch.no_grad():
            for _, p in _last_projections(self.model):
                p.copy_(torch.randn(p.shape, generator=generator) / max(p.shape[-1], 4) ** 0.5)


def drawn(spec: Specification | int) -> Drawn:
    """The model of a specification or of a seed, with its weights and batches."""
    if isinstance(spec, int):
        spec = specification(spec)
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        switches = Switches()
        kind, ids, mask = SIGNATURES[spec.signature]
        model: nn.Module = kind(spec, switches)
        _start(spec, model)
    model = model.to(DTYPES[spec.dtype]).eval()
    batches = tuple(_batch(spec, generator, *sizes, spec.padding) for sizes in spec.batches)
    if spec.wrapper == "a module that passes everything on":
        model = Passing(model)
    elif spec.wrapper == "autocast":
        model = Autocasting(model)
    elif spec.wrapper == "another signature":
        model = Renaming(model, (ids, mask))
    return Drawn(spec, model.eval(), switches, batches)


def _batch(
    spec: Specification, generator: torch.Generator, sequences: int, tokens: int, padding: str
) -> dict[str, Tensor]:
    """What the model is called with."""
    _, ids, mask = SIGNATURES[spec.signature]
    renamed = spec.wrapper == "another signature"
    text = torch.randint(1, spec.vocabulary, (sequences, tokens), generator=generator)
    if spec.given == "features":
        text = torch.randn(sequences, tokens, FEATURES, generator=generator).to(DTYPES[spec.dtype])
    batch: dict[str, Tensor] = {"text" if renamed else ids: text}
    if padding != "none" and mask is not None:
        lengths = torch.randint(tokens // 2 + 1, tokens + 1, (sequences,), generator=generator)
        lengths[0] = tokens
        real = torch.arange(tokens)[None] < lengths[:, None]
        real = real.flip(1) if padding == "left" else real
        text[~real] = 0
        kept = (real.long(), real, real.to(DTYPES[spec.dtype]))[spec.seed % 3]
        form = {"attention_mask": kept, "src_key_padding_mask": ~real, "keep": real}[mask]
        batch["hidden" if renamed else mask] = form
    if mask == "src_mask" and spec.masking != "none":
        form = as_mask(spec, allowed_pairs(spec, tokens, 0), DTYPES[spec.dtype])
        batch["hidden" if renamed else mask] = form
    if spec.ids == "as the stream":
        batch["text" if renamed else ids] = text.transpose(0, 1)
    if spec.norm.startswith("adaptive"):
        batch["label"] = torch.randint(7, (sequences,), generator=generator)
    # A dict has an order, which says nothing.
    return dict(reversed(batch.items())) if spec.entries == "mask or label first" else batch


def _start(spec: Specification, model: nn.Module) -> None:
    """Weights at which attention chooses: logits of about unit variance, gains that are not 1."""
    unnormed = spec.norm == "none" or spec.placement == "output"  # sublayers read the stream as large as it is
    gain = 0.6 if unnormed else 1.2
    with torch.no_grad():
        for name, p in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            if (
                leaf == "sink"
                or leaf.endswith("_scale")
                or leaf in {"weight_of_second", "magnitude", "embedding_again"}
            ):
                continue
            if p.ndim == 1:
                is_gain = leaf.endswith("weight")
                p.copy_(is_gain + 0.25 * torch.randn(p.shape))
            elif leaf == "talk":
                continue
            elif isinstance(owner, nn.Embedding) or leaf == "beginning":
                p.copy_(torch.randn(p.shape))
            elif leaf == "angles":
                p.copy_(0.2 * torch.randn(p.shape))
            else:
                reads = p.shape[-1]
                if isinstance(owner, pieces.Conv1D) or leaf in {"weight_q", "weight_k", "weight_v"}:
                    reads = p.shape[0]
                elif leaf == "weight_o" and spec.projection != "F.linear":
                    reads = math.prod(p.shape[:-1])
                p.copy_(gain * torch.randn(p.shape) / reads**0.5)
        if spec.start == "zero projections":
            for _, p in _last_projections(model):
                p.zero_()


def _last_projections(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of what a sublayer ends with."""
    ends = ("mlp.down.", "inner.down.", ".o.", ".weight_o.", ".bias_o.", "out_proj.", "linear2.")
    return [(name, p) for name, p in model.named_parameters() if any(part in f"{name}." for part in ends)]


def every(seeds: Sequence[int], keep: Callable[[Specification], bool] = lambda _: True) -> list[Specification]:
    """The specifications of these seeds that `keep` wants."""
    return [spec for spec in map(specification, seeds) if keep(spec)]
