"""The parts of a Transformer, each written in the ways people write it.

Everything here is ordinary model code. What is not is marked: `switches.is_off(...)` leaves a part out, and what stands
under `if recorder` takes note of the truth. `truth` says what that means.

A mask arrives as [1 or batch, 1, query, key]: boolean, True where a query may look, or numbers that are added to the logits.
A bias of positions arrives as [1 or batch, head, query, key]. Queries, keys and values are [batch, token, head, width], or
[token, batch, head, width] in models that put tokens first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studies.random_models.specification import DIFFERENCES, Specification
from studies.random_models.truth import Recorder, Switches, array

F = nn.functional
CAP = 4.0
WHOLE_VALUES = ("values as wide as the stream, summed", "values as wide as the stream, one einsum")
WHOLE = ("b h q k", "b h k d", "b h q d")


def forbidden_number(spec: Specification, dtype: torch.dtype) -> float:
    """What the model writes for a forbidden pair."""
    named = {"minus infinity": -math.inf, "dtype minimum": torch.finfo(dtype).min}
    return named[spec.forbidden] if spec.forbidden in named else float(spec.forbidden)


# Weights ---------------------------------------------------------------------------------------------------------------


def placed(pairs: Tensor, axes: str, batch: int, heads: int) -> Tensor:
    """A mask or bias [1 or batch, 1 or head, query, key], where the logits have these axes."""
    if axes == "b h q k":
        return pairs
    if axes == "b q h k":
        return pairs.transpose(1, 2)
    if axes == "h b q k":
        return pairs.transpose(0, 1)
    if axes == "b h k q":
        return pairs.transpose(-1, -2)
    if axes == "b g r q k":
        return pairs.unsqueeze(2) if pairs.shape[1] == 1 else pairs.unflatten(1, (-1, heads))
    if axes == "b q k":
        return pairs[:, 0]
    if axes == "b*h q k":
        return pairs.expand(batch, heads, -1, -1).reshape(batch * heads, *pairs.shape[-2:])
    assert axes == "h*b q k", axes
    return pairs.transpose(0, 1).expand(heads, batch, -1, -1).reshape(batch * heads, *pairs.shape[-2:])


def softmax(spec: Specification, L: Tensor, dim: int) -> Tensor:
    """The softmax, as a function, a method, a module, or by hand."""
    if spec.softmax == "F.softmax":
        return F.softmax(L, dim=dim)
    if spec.softmax == "torch.softmax":
        return torch.softmax(L, dim)
    if spec.softmax == "nn.Softmax":
        return nn.Softmax(dim=dim)(L)
    if spec.softmax == "float32":
        return F.softmax(L, dim=dim, dtype=torch.float32).to(L.dtype)
    if spec.softmax == "exp over sum":
        E = torch.exp(L)
        return E / E.sum(dim, keepdim=True)
    if spec.softmax == "exp of less the maximum":
        E = (L - L.amax(dim, keepdim=True)).exp()
        return E / E.sum(dim=dim, keepdim=True)
    if spec.softmax == "exp of log_softmax":
        return L.log_softmax(dim).exp()
    return L.softmax(dim)


def allowed_pairs(spec: Specification, tokens: int, block: int) -> Tensor:
    """Which real tokens may look at which in this block, [query, key]."""
    ones = torch.ones(tokens, tokens, dtype=torch.bool)
    if spec.mask == "causal" or (spec.mask == "causal, every other block in a window" and block % 2 == 0):
        return ones.tril()
    if spec.mask == "window":
        return ones.triu(1 - spec.window).tril(spec.window - 1)
    return ones if spec.mask == "none" else ones.tril().triu(1 - spec.window)


def as_mask(spec: Specification, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Allowed pairs in the form in which this model takes them."""
    if not spec.masking.startswith("added"):
        return allowed
    number = forbidden_number(spec, dtype)
    if spec.forbidden in {"-1e4", "-1e9"}:  # as BERT has always done it
        return (1.0 - allowed.to(dtype)) * number
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, number)


@dataclass(frozen=True)
class Pairs:
    """What is known of pairs of tokens inside an attention, and the number of sequences."""

    mask: Tensor | None
    bias: Tensor | None
    batch: int
    is_applied: bool = False  # mask and bias are in the logits already


def weigh(
    spec: Specification, L: Tensor, axes: str, pairs: Pairs, sink: Tensor | None, heads: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits to weights; also the logits before the mask. A sink of zeros that is kept leaves one more key."""
    key = axes.split().index("k") - len(axes.split())
    heads = spec.heads if heads is None else heads
    batch = pairs.batch

    def put(tensor: Tensor) -> Tensor:
        return placed(tensor, axes, batch, heads)

    if spec.softcap == "tanh":
        L = CAP * torch.tanh(L / CAP)
    if pairs.bias is not None and not pairs.is_applied:
        L = L + put(pairs.bias)
    seen, mask = L, None if pairs.is_applied else pairs.mask
    if mask is not None and spec.masking.startswith("added"):
        L = L + put(mask)
    elif mask is not None and spec.masking == "masked_fill":
        L = L.masked_fill(~put(mask), forbidden_number(spec, L.dtype))
    elif mask is not None and spec.masking == "torch.where":
        L = torch.where(put(mask), L, torch.tensor(forbidden_number(spec, L.dtype), dtype=L.dtype))
    columns = L.shape[key]
    if spec.sink == "learned logit":
        assert sink is not None
        if "*" in axes:
            sink = sink.repeat(batch) if axes.startswith("b*h") else sink.repeat_interleave(batch)
        column = sink.view([-1 if "h" in a else 1 for a in axes.split()])
        L = torch.cat([L, column.expand([1 if i == L.ndim + key else s for i, s in enumerate(L.shape)])], key)
    elif spec.sink in {"zero column in front", "zero column in front, kept"}:
        L = torch.cat([torch.zeros_like(L.narrow(key, 0, 1)), L], key)
    elif spec.sink == "zero column behind":
        L = torch.cat([L, torch.zeros_like(L.narrow(key, 0, 1))], key)
    if spec.sink == "one more in the sum":
        E = torch.exp(L)
        A = E / (1 + E.sum(key, keepdim=True))
    else:
        A = softmax(spec, L, key)
    if spec.sink == "zero column in front":
        A = A.narrow(key, 1, columns)
    elif spec.sink in {"learned logit", "zero column behind"}:
        A = A.narrow(key, 0, columns)
    if mask is not None and spec.masking.startswith("after the softmax"):
        A = A * put(mask)
    if spec.masking == "after the softmax, renormalised":  # also without a mask: behind a sink that is another step
        A = A / A.sum(key, keepdim=True)
    return F.dropout(A, 0.1, training=False) if spec.softmax == "torch.softmax" else A, seen


def with_zero_value(spec: Specification, v: Tensor, key: int) -> Tensor:
    """Values beside a kept column of zeros: one more key, which holds nothing."""
    if spec.sink != "zero column in front, kept":
        return v
    return torch.cat([torch.zeros_like(v.narrow(key, 0, 1)), v], key)


# Attention -------------------------------------------------------------------------------------------------------------


class OneHead(nn.Module):
    """A head as a module of its own, as lectures write it."""

    def __init__(self, spec: Specification, switches: Switches, head: int) -> None:
        super().__init__()
        self.spec, self.switches, self.head = spec, switches, head
        self.query, self.key, self.value = (nn.Linear(spec.width, spec.head_width, bias=False) for _ in range(3))
        if spec.sink == "learned logit":
            self.sink = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        if self.spec.token_first:
            x = x.transpose(0, 1)
        q, k, v = self.query(x), self.key(x), self.value(x)
        bias = None if pairs.bias is None else pairs.bias[:, self.head : self.head + 1]
        own = Pairs(pairs.mask, bias, pairs.batch)
        L = q @ k.transpose(-2, -1) * self.spec.head_width**-0.5
        A, seen = weigh(self.spec, L, "b q k", own, getattr(self, "sink", None), 1)
        v = with_zero_value(self.spec, v, -2)
        y = A @ v
        if self.switches.recorder is not None:
            note(self.spec, self.switches.recorder, self.switches.block, A, v, y, seen, ("b q k", "b k d", "b q d"))
        return y.transpose(0, 1) if self.spec.token_first else y


def note(
    spec: Specification,
    recorder: Recorder,
    block: int,
    A: Tensor | None,
    v: Tensor,
    y: Tensor,
    logits: Tensor | None,
    axes: tuple[str, str, str] = WHOLE,
    kind: str = "softmax",
) -> None:
    """Tell the recorder of one mixing; a kept column of zeros is no key."""
    if spec.sink == "zero column in front, kept" and A is not None:
        key, of_values = axes[0].split().index("k"), axes[1].split().index("k")
        A, v = A.narrow(key, 1, A.shape[key] - 1), v.narrow(of_values, 1, v.shape[of_values] - 1)
    recorder.mixing(block, A, v, y, logits, axes, kind)


class Attention(nn.Module):
    """Self-attention with everything the specification says. Returns what the output projection gives."""

    def __init__(self, spec: Specification, switches: Switches, block: int) -> None:
        super().__init__()
        self.spec, self.switches = spec, switches
        D, H, G, d = spec.width, spec.heads, spec.key_value_heads, spec.head_width
        self.scale = d**-0.5
        self.has_bias = spec.seed % 2 == 0
        own = spec.attention in {"one module per head", "nn.MultiheadAttention"}
        if spec.attention == "one module per head":
            self.heads = nn.ModuleList(OneHead(spec, switches, h) for h in range(H))
        elif spec.attention == "nn.MultiheadAttention":
            self.mha = nn.MultiheadAttention(
                D, H, batch_first=not spec.token_first, bias=self.has_bias, add_zero_attn=spec.sink == "zero key"
            )
            self.need_weights = spec.seed % 3 == 0
        else:
            twice = 2 if spec.attention in DIFFERENCES else 1
            value_width = D if spec.attention in WHOLE_VALUES else d
            self.sizes = [twice * H * d, twice * G * d, G * value_width]
            if spec.inputs == "three modules":
                self.query, self.key, self.value = (nn.Linear(D, n, bias=self.has_bias) for n in self.sizes)
            elif spec.inputs == "F.linear":
                self.weight = nn.Parameter(torch.empty(sum(self.sizes), D))
            elif spec.inputs == "einsum":
                self.weight_q, self.weight_k, self.weight_v = (
                    nn.Parameter(torch.empty(D, n // d, d)) for n in self.sizes
                )
            else:
                self.qkv = nn.Linear(D, sum(self.sizes), bias=self.has_bias)
        if spec.attention.startswith("talking heads"):
            self.talk = nn.Parameter(torch.eye(H) + 0.4 * torch.randn(H, H))
        if spec.attention in DIFFERENCES:
            self.weight_of_second = nn.Parameter(torch.tensor(0.3 + 0.1 * block))
        if spec.queries == "norm modules":
            self.norm_q, self.norm_k = nn.LayerNorm(d), nn.LayerNorm(d)
        if spec.sink == "learned logit" and not own:
            self.sink = nn.Parameter(torch.randn(H))
        if spec.gate != "none":
            self.gate = nn.Linear(D, H if spec.gate == "per head" else H * d)
        if spec.attention not in {"nn.MultiheadAttention", *WHOLE_VALUES}:
            self._make_projection(H * d, D)

    # Ways in and out ---------------------------------------------------------------------------------------------------
    def _make_projection(self, mixed: int, width: int) -> None:
        spec = self.spec
        if spec.projection == "module":
            self.o: nn.Module = nn.Linear(mixed, width, bias=self.has_bias)
            if spec.adapter != "none":
                self.o = ADAPTERS[spec.adapter](self.o)
        elif spec.projection == "Conv1D":
            self.o = Conv1D(mixed, width)
        elif spec.projection == "F.linear":
            self.weight_o = nn.Parameter(torch.empty(width, mixed))
            self.bias_o = nn.Parameter(torch.randn(width) * 0.3) if self.has_bias else None
        elif spec.projection == "a module per head":
            self.o = nn.ModuleList(nn.Linear(spec.head_width, width, bias=False) for _ in range(spec.heads))
        elif spec.projection == "matmul":
            self.weight_o = nn.Parameter(torch.empty(mixed, width))
        else:
            self.weight_o = nn.Parameter(torch.empty(spec.heads, spec.head_width, width))

    def output_map(self) -> tuple[Tensor, Tensor | None]:
        """W_O [mixed, width] and the bias, in float64: what the projection is as a map."""
        kind = self.spec.projection
        if self.spec.attention == "nn.MultiheadAttention":
            return self.mha.out_proj.weight.double().T, self.mha.out_proj.bias
        if kind in {"module", "Conv1D"}:
            return output_map(self.o)
        if kind == "a module per head":
            assert isinstance(self.o, nn.ModuleList)
            return torch.cat([weight.double().T for one in self.o for weight in one.parameters()]), None
        if kind == "F.linear":
            return self.weight_o.double().T, self.bias_o
        return self.weight_o.double().reshape(-1, self.spec.width), None

    def projected(self, y: Tensor) -> Tensor:
        """[.., head, head width] to [.., width]."""
        kind = self.spec.projection
        if kind in {"module", "Conv1D"}:
            return self.o(y.flatten(-2))
        if kind == "F.linear":
            return F.linear(y.flatten(-2), self.weight_o, self.bias_o)
        if kind == "matmul":
            return y.flatten(-2) @ self.weight_o
        if kind == "einsum":
            return torch.einsum("xyhd,hdo->xyo", y, self.weight_o)
        if kind == "a module per head":
            assert isinstance(self.o, nn.ModuleList)
            summed: Tensor = sum(one(y[..., head, :]) for head, one in enumerate(self.o))
            return summed
        total = y[..., 0, :] @ self.weight_o[0]
        for head in range(1, self.spec.heads):
            total = total + y[..., head, :] @ self.weight_o[head]
        return total

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [.., head, head width] from the normed stream."""
        d = self.spec.head_width
        if self.spec.inputs == "three modules":
            parts = (self.query(x), self.key(x), self.value(x))
        elif self.spec.inputs == "einsum":
            q, k, v = (torch.einsum("xyi,ihd->xyhd", x, w) for w in (self.weight_q, self.weight_k, self.weight_v))
            return q, k, v
        elif self.spec.inputs == "F.linear":
            parts = F.linear(x, self.weight).split(self.sizes, -1)
        elif self.spec.inputs == "interleaved":  # BLOOM, GPT-NeoX: q, k and v of one head side by side
            q, k, v = self.qkv(x).view(*x.shape[:2], self.spec.heads, 3 * d).chunk(3, -1)
            return q, k, v
        else:
            parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k = (p.view(*p.shape[:2], -1, d) for p in parts[:2])
        return q, k, parts[2].view(*x.shape[:2], self.spec.key_value_heads, -1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """`keep` marks real tokens [batch, token], for linear attention, which has no mask to put them into."""
        spec, recorder = self.spec, self.switches.recorder
        batch, tokens = (x.shape[1], x.shape[0]) if spec.token_first else x.shape[:2]
        made_here = spec.route == "made in the attention" and spec.masking != "flag"
        if made_here and not self.switches.is_off("mask"):
            mask = as_mask(spec, allowed_pairs(spec, tokens, 0), x.dtype)[None, None]
        pairs = Pairs(mask, bias, batch)
        if spec.positions == "rotary, in the attention":
            numbers = torch.arange(tokens)
            rotation = angles(numbers * 0 if self.switches.is_off("positions") else numbers, spec, x.dtype)
        if spec.attention == "nn.MultiheadAttention":
            return self._torch_attention(x, pairs)
        if spec.attention == "one module per head":
            y = torch.stack([head(x, pairs) for head in self.heads], -2)
        else:
            q, k, v = self.inputs(x)
            if spec.queries == "norm modules":
                q, k = self.norm_q(q), self.norm_k(k)
            elif spec.queries == "F.normalize":
                q, k = 2 * F.normalize(q, dim=-1) * spec.head_width**0.5, F.normalize(k, dim=-1)
            elif spec.queries == "F.rms_norm":
                q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
            if rotation is not None:
                cos, sin = (r.transpose(0, 1) if spec.token_first else r for r in rotation)
                q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            if spec.key_value_heads < spec.heads and spec.attention not in {"SDPA", "grouped einsum"}:
                # A difference has two sets of queries and of keys, which stay in two.
                r = spec.heads // spec.key_value_heads
                k, v = k.repeat_interleave(r, dim=2), v.repeat_interleave(r, dim=2)
            y = STYLES[spec.attention](self, q, k, v, pairs, keep)
            if spec.attention in WHOLE_VALUES:
                return y
        if spec.gate == "per head":
            y = y * torch.sigmoid(self.gate(x)).unsqueeze(-1)
        elif spec.gate == "per channel":
            y = y * torch.sigmoid(self.gate(x)).view_as(y)
        out = self.projected(y)
        if recorder is not None:
            self._note_projection(recorder, y, out)
        return out

    def _note_projection(self, recorder: Recorder, y: Tensor, out: Tensor) -> None:
        note_projection(self.spec, recorder, self.switches.block, y, out, *self.output_map())

    def _torch_attention(self, x: Tensor, pairs: Pairs) -> Tensor:
        mask, padding = torch_masks(self.spec, pairs.mask)
        y, _ = self.mha(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=self.need_weights)
        if self.switches.recorder is not None:
            note_torch_attention(
                self.spec, self.switches.recorder, self.switches.block, self.mha, x, y, not self.need_weights
            )
        return y


def note_projection(
    spec: Specification,
    recorder: Recorder,
    block: int,
    y: Tensor,
    out: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
) -> None:
    """Tell the recorder what the output projection reads and gives, and which map it is."""
    one = recorder.of(block)
    one.read, one.projected = (array(t.transpose(0, 1) if spec.token_first else t) for t in (y, out))
    one.matrix = array(matrix)
    one.bias = array(torch.zeros(out.shape[-1]) if bias is None else bias)


def torch_masks(spec: Specification, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask [1 or batch, 1, query, key] as torch's own attention takes it: over pairs, and over padded keys."""
    if mask is None:
        return None, None
    adds = spec.masking.startswith("added")
    if mask.shape[0] > 1 and spec.mask == "none" and not adds:
        return None, ~mask[:, 0, -1]  # a mask of padding alone is the same for all queries
    alone = mask.shape[0] == 1
    mask = mask[0, 0] if alone else placed(mask, "b*h q k", mask.shape[0], spec.heads)
    return (mask if adds else ~mask), None  # torch's booleans forbid


def _masked(spec: Specification, L: Tensor, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits as the model's mask leaves them: a number that it adds may leave a forbidden pair some weight."""
    adds = spec.masking.startswith("added") and spec.forbidden != "none"
    number = forbidden_number(spec, dtype) if adds else -math.inf
    return torch.where(allowed[:, None], L, L + number)


def note_torch_attention(
    spec: Specification,
    recorder: Recorder,
    block: int,
    mha: nn.MultiheadAttention,
    x: Tensor,
    out: Tensor,
    is_fused: bool = True,
) -> None:
    """The same in float64, from torch's own parameters: it keeps its weights to itself."""
    x = (x.transpose(0, 1) if spec.token_first else x).double()
    bias = None if mha.in_proj_bias is None else mha.in_proj_bias.double()
    q, k, v = F.linear(x, mha.in_proj_weight.double(), bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (spec.heads, -1)).transpose(1, 2) for t in (q, k, v))
    L = q @ k.mT * spec.head_width**-0.5
    S = _masked(spec, L, recorder.allowed, x.dtype)
    A = (torch.cat([S, torch.zeros_like(S[..., :1])], -1) if spec.sink == "zero key" else S).softmax(-1)
    A = A[..., : S.shape[-1]]
    y = A @ v
    recorder.mixing(block, A, v, y, L)
    if is_fused:
        recorder.of(block).scaled = array(S.softmax(-1))
    read = y.transpose(1, 2)
    read = read.transpose(0, 1) if spec.token_first else read
    note_projection(spec, recorder, block, read, out, mha.out_proj.weight.double().T, mha.out_proj.bias)


class TorchLayer(nn.TransformerEncoderLayer):
    """torch's own layer, as it is. Only when something is switched off it is written out, with the same weights."""

    def __init__(self, spec: Specification, switches: Switches, block: int) -> None:
        super().__init__(
            spec.width,
            spec.heads,
            2 * spec.width,
            activation="gelu",
            batch_first=not spec.token_first,
            norm_first=spec.placement == "pre",
        )
        self.spec, self.switches = spec, switches

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
        if self.switches.off:
            return self._written_out(src, masks)
        out = super().forward(src, src_mask, src_key_padding_mask, is_causal)
        recorder = self.switches.recorder
        if recorder is not None:
            x = self.norm1(src) if self.norm_first else src
            y = self.self_attn(x, x, x, need_weights=False, **masks)[0]
            note_torch_attention(self.spec, recorder, self.switches.block, self.self_attn, x, y)
        return out

    def _written_out(self, x: Tensor, masks: dict[str, Tensor | None]) -> Tensor:
        is_off = self.switches.is_off

        def update(name: str, x: Tensor) -> Tensor:
            if name == "mlp":
                return self.linear2(F.gelu(self.linear1(x)))
            return self.self_attn(x, x, x, need_weights=False, **masks)[0]

        for name, norm in (("attention", self.norm1), ("mlp", self.norm2)):
            if is_off(name):
                continue
            f = update(name, norm(x) if self.norm_first and not is_off("norm") else x)
            x = f if is_off("residual") or is_off(f"{name}-residual") else x + f
            x = x if self.norm_first or is_off("norm") else norm(x)
        return x


def angles(positions: Tensor, spec: Specification, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1 or batch, token, 1, half a head's width] of positions [token] or [batch, token]."""
    half = spec.head_width // 2
    frequencies = 1.0 / 100.0 ** (torch.arange(half, dtype=torch.float32) / half)
    turned = (positions if positions.ndim == 2 else positions[None])[..., None].float() * frequencies
    return turned.cos().to(dtype)[:, :, None], turned.sin().to(dtype)[:, :, None]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves against each other."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


# The ways of mixing, from [.., head, width] to the same ------------------------------------------------------------------

Style = Callable[[Attention, Tensor, Tensor, Tensor, Pairs, Any], Tensor]


def _heads_first(spec: Specification, *tensors: Tensor) -> tuple[Tensor, ...]:
    """To [batch, head, token, width]."""
    return tuple(t.permute(1, 2, 0, 3) if spec.token_first else t.transpose(1, 2) for t in tensors)


def _heads_last(spec: Specification, y: Tensor) -> Tensor:
    """Back from [batch, head, token, width]."""
    return y.permute(2, 0, 1, 3) if spec.token_first else y.transpose(1, 2)


def _matmul(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    spec = self.spec
    q, k, v = _heads_first(spec, q, k, v)
    A, seen = weigh(
        spec, torch.matmul(q, k.transpose(-2, -1)) * self.scale, WHOLE[0], pairs, getattr(self, "sink", None)
    )
    v = with_zero_value(spec, v, -2)
    y = A @ v
    if self.switches.recorder is not None:
        note(spec, self.switches.recorder, self.switches.block, A, v, y, seen)
    return _heads_last(spec, y)


def _einsum(axes: str) -> Style:
    def mix(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
        spec = self.spec
        of_q, of_k, of_y = ("qbhd", "kbhd", "qbhd") if spec.token_first else ("bqhd", "bkhd", "bqhd")
        letters = axes.replace(" ", "")
        L = torch.einsum(f"{of_q},{of_k}->{letters}", q * self.scale, k)
        A, seen = weigh(spec, L, axes, pairs, getattr(self, "sink", None))
        v = with_zero_value(spec, v, of_k.index("k"))
        y = torch.einsum(f"{letters},{of_k}->{of_y}", A, v)
        if self.switches.recorder is not None:
            note(
                spec, self.switches.recorder, self.switches.block, A, v, y, seen, (axes, " ".join(of_k), " ".join(of_y))
            )
        return y

    return mix


def _grouped_einsum(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """Queries that share a key, without repeating it."""
    spec = self.spec
    q = q.unflatten(2, (spec.key_value_heads, -1)) * self.scale
    r = q.shape[3]
    first = spec.token_first
    L = torch.einsum("qbgrd,kbgd->bgrqk" if first else "bqgrd,bkgd->bgrqk", q, k)
    A, seen = weigh(spec, L, "b g r q k", pairs, None, r)
    v = with_zero_value(spec, v, 0 if first else 1)
    y = torch.einsum("bgrqk,kbgd->qbgrd" if first else "bgrqk,bkgd->bqgrd", A, v).flatten(2, 3)
    if self.switches.recorder is not None:
        of_v, of_y = ("k b h d", "q b h d") if first else ("b k h d", "b q h d")
        A, seen = A.flatten(1, 2), seen.flatten(1, 2)
        note(spec, self.switches.recorder, self.switches.block, A, v, y, seen, (WHOLE[0], of_v, of_y))
    return y


def _fused(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """torch's fused call: the flag for a causal mask, a boolean mask, or numbers to add."""
    spec = self.spec
    q, k, v = _heads_first(spec, q, k, v)
    mask, given = pairs.mask, {}
    if spec.masking == "flag":
        given["is_causal"] = spec.mask == "causal" and not self.switches.is_off("mask")
    if pairs.bias is not None:  # one operand for both: a bias that is minus infinity where a pair is forbidden
        mask = pairs.bias if mask is None else pairs.bias + mask
    if spec.key_value_heads < spec.heads:
        if spec.seed % 2:
            given["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(spec.heads // spec.key_value_heads, 1) for t in (k, v))
    keys, values = k, v
    if spec.sink == "zero key":  # a key of zeros in front, with a value of zeros
        keys, values = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=1 if mask.dtype == torch.bool else 0)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, **given)
    if self.switches.recorder is not None:
        _note_fused(self, self.switches.recorder, q, k, v, y, pairs)
    return _heads_last(spec, y)


def _note_fused(self: Attention, recorder: Recorder, q: Tensor, k: Tensor, v: Tensor, y: Tensor, pairs: Pairs) -> None:
    """The weights of a fused call, in float64: it does not hand them out."""
    r = q.shape[1] // k.shape[1]
    L = q.double() @ k.double().repeat_interleave(r, 1).mT * self.scale
    if pairs.bias is not None:
        L = L + pairs.bias.double()
    S = _masked(self.spec, L, recorder.allowed, q.dtype)
    A = (torch.cat([S, torch.zeros_like(S[..., :1])], -1) if self.spec.sink == "zero key" else S).softmax(-1)
    A = A[..., : S.shape[-1]]
    recorder.mixing(self.switches.block, A, v, y, L)
    recorder.of(self.switches.block).scaled = array(S.softmax(-1))


def _folded(axes: str, adds: bool) -> Style:
    """Heads and sequences in one axis, in either order; `adds` puts the mask into the product."""

    def mix(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
        spec = self.spec
        heads, d = spec.heads, spec.head_width
        batch = q.shape[1] if spec.token_first else q.shape[0]

        def fold(t: Tensor) -> Tensor:
            if spec.token_first and axes == "b*h":  # [token, batch, head, width]: nothing to copy
                return t.reshape(t.shape[0], batch * heads, d).transpose(0, 1)
            order = {"b*h": "bhtd", "h*b": "hbtd"}[axes]
            of = "tbhd" if spec.token_first else "bthd"
            return t.permute([of.index(a) for a in order]).reshape(batch * heads, -1, d)

        q, k, v = fold(q), fold(k), fold(v)
        of_weights = f"{axes} q k"
        if adds:
            added = [placed(p, of_weights, batch, heads) for p in (pairs.bias, pairs.mask) if p is not None]
            base = sum(added[1:], start=added[0]) if added else q.new_zeros(1)
            L = torch.baddbmm(
                base.expand(batch * heads, q.shape[1], k.shape[1]), q, k.transpose(1, 2), alpha=self.scale
            )
            A, _unused = weigh(spec, L, of_weights, Pairs(None, None, batch, True), getattr(self, "sink", None))
        else:
            L = torch.bmm(q * self.scale, k.transpose(1, 2))
            A, _unused = weigh(spec, L, of_weights, pairs, getattr(self, "sink", None))
        v = with_zero_value(spec, v, 1)
        y = torch.bmm(A, v)
        if self.switches.recorder is not None:
            seen = torch.bmm(q * self.scale, k.transpose(1, 2))
            if spec.softcap == "tanh":
                seen = CAP * torch.tanh(seen / CAP)
            if pairs.bias is not None:
                seen = seen + placed(pairs.bias, of_weights, batch, heads)
            every = (of_weights, f"{axes} k d", f"{axes} q d")
            note(spec, self.switches.recorder, self.switches.block, A, v, y, seen, every)
        if spec.token_first and axes == "b*h":
            return y.transpose(0, 1).reshape(-1, batch, heads, d)
        apart = y.view(*((batch, heads) if axes == "b*h" else (heads, batch)), -1, d)
        order = {"b*h": "bhtd", "h*b": "hbtd"}[axes]
        return apart.permute([order.index(a) for a in ("tbhd" if spec.token_first else "bthd")])

    return mix


def _loop(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """A loop over heads."""
    spec, outputs = self.spec, []
    for head in range(spec.heads):
        one = [t[:, :, head] for t in (q, k, v)]
        q_h, k_h, v_h = [t.transpose(0, 1) for t in one] if spec.token_first else one
        bias = None if pairs.bias is None else pairs.bias[:, head : head + 1]
        sink = self.sink[head] if spec.sink == "learned logit" else None
        L = q_h @ k_h.mT * self.scale
        A, seen = weigh(spec, L, "b q k", Pairs(pairs.mask, bias, pairs.batch), sink, 1)
        v_h = with_zero_value(spec, v_h, 1)
        y = A @ v_h
        if self.switches.recorder is not None:
            note(spec, self.switches.recorder, self.switches.block, A, v_h, y, seen, ("b q k", "b k d", "b q d"))
        outputs.append(y.transpose(0, 1) if spec.token_first else y)
    return torch.stack(outputs, 2)


def _chunked(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """A few queries at a time."""
    spec, outputs, weights, logits = self.spec, [], [], []
    q, k, v = _heads_first(spec, q, k, v)
    values = with_zero_value(spec, v, 2)
    for start in range(0, q.shape[2], 4):
        rows = slice(start, start + 4)
        mask, bias = (p if p is None or p.shape[2] == 1 else p[:, :, rows] for p in (pairs.mask, pairs.bias))
        L = q[:, :, rows] @ k.transpose(-1, -2) * self.scale
        A, seen = weigh(spec, L, WHOLE[0], Pairs(mask, bias, pairs.batch), getattr(self, "sink", None))
        outputs.append(A @ values)
        if self.switches.recorder is not None:
            weights.append(A)
            logits.append(seen)
    y = torch.cat(outputs, 2)
    if self.switches.recorder is not None:
        note(spec, self.switches.recorder, self.switches.block, torch.cat(weights, 2), values, y, torch.cat(logits, 2))
    return _heads_last(spec, y)


def _channels_first(by_rows: bool) -> Style:
    """Values [.., width, key], as convolutional code has them: the weights stand behind, the other way round."""

    def mix(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
        spec = self.spec
        q, k, v = (t.transpose(-1, -2) for t in _heads_first(spec, q, k, v))
        if by_rows:
            A, seen = weigh(spec, q.mT @ k * self.scale, WHOLE[0], pairs, getattr(self, "sink", None))
        else:
            A, seen = weigh(spec, k.mT @ q * self.scale, "b h k q", pairs, getattr(self, "sink", None))
        v = with_zero_value(spec, v, -1)
        y = v @ A.transpose(-1, -2) if by_rows else v @ A
        if self.switches.recorder is not None:
            axes = (WHOLE[0] if by_rows else "b h k q", "b h d k", "b h d q")
            note(spec, self.switches.recorder, self.switches.block, A, v, y, seen, axes)
        return _heads_last(spec, y.transpose(-1, -2))

    return mix


def _summed_products(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """No matrix product with the values: every pair's share, summed over the keys."""
    spec = self.spec
    q, k, v = _heads_first(spec, q, k, v)
    A, seen = weigh(spec, q @ k.mT * self.scale, WHOLE[0], pairs, getattr(self, "sink", None))
    v = with_zero_value(spec, v, -2)
    y = (A.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)
    if self.switches.recorder is not None:
        note(spec, self.switches.recorder, self.switches.block, A, v, y, seen)
    return _heads_last(spec, y)


def _windows(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """Windows of four tokens that never meet: they are folded into the batch (Swin without its shift)."""
    spec, size = self.spec, 4
    q, k, v = (t.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for t in _heads_first(spec, q, k, v))
    A, seen = weigh(spec, q @ k.mT * self.scale, WHOLE[0], Pairs(None, None, len(q)), getattr(self, "sink", None))
    y = A @ v

    def together(t: Tensor) -> Tensor:
        return t.unflatten(0, (pairs.batch, -1)).transpose(1, 2).flatten(2, 3)

    if self.switches.recorder is not None:
        tokens = self.switches.recorder.allowed.shape[-1]
        whole = [t.new_zeros(pairs.batch, spec.heads, tokens, tokens) for t in (A, seen)]
        for t, of in zip(whole, (A, seen), strict=True):
            for number, window in enumerate(of.unflatten(0, (pairs.batch, -1)).unbind(1)):
                rows = slice(number * size, (number + 1) * size)
                t[:, :, rows, rows] = window
        window_of = torch.arange(tokens) // size
        self.switches.recorder.pairs((window_of[:, None] == window_of).expand(pairs.batch, -1, -1))
        note(spec, self.switches.recorder, self.switches.block, whole[0], together(v), together(y), whole[1])
    return _heads_last(spec, together(y))


def _difference(two_products: bool) -> Style:
    """The difference of two softmaxes over the same values (differential attention)."""

    def mix(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
        spec = self.spec
        q, k, v = _heads_first(spec, q, k, v)
        weights = []
        for q_i, k_i in zip(q.chunk(2, 1), k.chunk(2, 1), strict=True):
            A, _seen = weigh(spec, q_i @ k_i.transpose(-1, -2) * self.scale, WHOLE[0], pairs, None)
            weights.append(A)
        first, second = weights
        share = self.weight_of_second
        y = first @ v - share * (second @ v) if two_products else (first - share * second) @ v
        if self.switches.recorder is not None:
            A = first - share * second
            note(spec, self.switches.recorder, self.switches.block, A, v, y, None, WHOLE, "difference")
            self.switches.recorder.of(self.switches.block).parts = (array(first), array(second))
        return _heads_last(spec, y)

    return mix


def _talking(after: bool) -> Style:
    """Heads that are mixed with each other, as logits or as weights."""

    def mix(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
        spec = self.spec
        q, k, v = _heads_first(spec, q, k, v)
        L = q @ k.transpose(-1, -2) * self.scale
        if not after:
            L = torch.einsum("bhqk,hg->bgqk", L, self.talk)
        A, seen = weigh(spec, L, WHOLE[0], pairs, getattr(self, "sink", None))
        if after:
            A = torch.einsum("bhqk,hg->bgqk", A, self.talk)
        y = A @ v
        if self.switches.recorder is not None:
            of_logits = (None, "difference") if after else (seen, "softmax")
            note(spec, self.switches.recorder, self.switches.block, A, v, y, of_logits[0], WHOLE, of_logits[1])
        return _heads_last(spec, y)

    return mix


def _whole_values(summed_apart: bool) -> Style:
    """Values as wide as the stream: each head writes there itself, and no projection follows."""

    def mix(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
        spec = self.spec
        q, k, v = _heads_first(spec, q, k, v)
        A, seen = weigh(spec, q @ k.mT * self.scale, WHOLE[0], pairs, getattr(self, "sink", None))
        v = with_zero_value(spec, v, -2)
        y = (A @ v).sum(1) if summed_apart else torch.einsum("bhqk,bhkd->bqd", A, v)
        if self.switches.recorder is not None:
            note(spec, self.switches.recorder, self.switches.block, A, v, A @ v, seen)
            one = self.switches.recorder.of(self.switches.block)
            one.read, one.projected = array((A @ v).transpose(1, 2)), array(y)
            one.matrix = array(torch.eye(spec.width).repeat(spec.heads, 1))
            one.bias = array(torch.zeros(spec.width))
        return y.transpose(0, 1) if spec.token_first else y

    return mix


def _sigmoid(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """Every pair for itself."""
    spec = self.spec
    q, k, v = _heads_first(spec, q, k, v)
    L = q @ k.transpose(-2, -1) * self.scale - math.log(k.shape[2])
    if pairs.bias is not None:
        L = L + pairs.bias
    if pairs.mask is not None and spec.masking.startswith("added"):
        L = L + pairs.mask
    elif pairs.mask is not None and not spec.masking.startswith("after"):
        L = L.masked_fill(~pairs.mask, forbidden_number(spec, L.dtype))
    A = torch.sigmoid(L)
    if pairs.mask is not None and spec.masking.startswith("after"):
        A = A * pairs.mask
    y = A @ v
    if self.switches.recorder is not None:
        note(spec, self.switches.recorder, self.switches.block, A, v, y, None, WHOLE, "sigmoid")
    return _heads_last(spec, y)


def _linear_matrix(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """elu + 1 of queries and keys, their products scaled to sum to one."""
    spec = self.spec
    q, k, v = _heads_first(spec, q, k, v)
    P = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    if pairs.mask is not None:
        P = P * pairs.mask
    A = P / P.sum(-1, keepdim=True)
    y = A @ v
    if self.switches.recorder is not None:
        note(spec, self.switches.recorder, self.switches.block, A, v, y, None, WHOLE, "linear")
    return _heads_last(spec, y)


def _linear(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, keep: Tensor | None) -> Tensor:
    """The same without a mask, keys and values first: no matrix of tokens anywhere."""
    spec = self.spec
    q, k = F.elu(q) + 1, F.elu(k) + 1
    if keep is not None:
        k = k * (keep.T if spec.token_first else keep)[..., None, None]
    if spec.token_first:
        summed = torch.einsum("kbhd,kbhe->bhde", k, v)
        y = torch.einsum("qbhd,bhde->qbhe", q, summed) / torch.einsum("qbhd,bhd->qbh", q, k.sum(0)).unsqueeze(-1)
    else:
        summed = torch.einsum("bkhd,bkhe->bhde", k, v)
        y = torch.einsum("bqhd,bhde->bqhe", q, summed) / torch.einsum("bqhd,bhd->bqh", q, k.sum(1)).unsqueeze(-1)
    if self.switches.recorder is not None:
        q_, k_, v_, y_ = _heads_first(spec, q, k, v, y)
        P = q_ @ k_.transpose(-2, -1)
        note(
            spec,
            self.switches.recorder,
            self.switches.block,
            P / P.sum(-1, keepdim=True),
            v_,
            y_,
            None,
            WHOLE,
            "linear",
        )
    return y


def _channels(self: Attention, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, _: Any) -> Tensor:
    """XCiT: which channels go with which. Tokens meet in the sums only."""
    spec = self.spec
    q, k, v = (t.transpose(-1, -2) for t in _heads_first(spec, q, k, v))
    A = softmax(spec, F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * 3.0, -1)
    y = (A @ v).transpose(-1, -2)
    if self.switches.recorder is not None:
        self.switches.recorder.of(self.switches.block, "channels")
    return _heads_last(spec, y)


STYLES: dict[str, Style] = {
    "matmul": _matmul,
    "einsum bhqk": _einsum("b h q k"),
    "einsum bqhk": _einsum("b q h k"),
    "einsum hbqk": _einsum("h b q k"),
    "einsum bhkq": _einsum("b h k q"),
    "grouped einsum": _grouped_einsum,
    "SDPA": _fused,
    "bmm, heads behind the batch": _folded("b*h", False),
    "bmm, heads before the batch": _folded("h*b", False),
    "baddbmm, heads behind the batch": _folded("b*h", True),
    "baddbmm, heads before the batch": _folded("h*b", True),
    "loop over heads": _loop,
    "queries in chunks": _chunked,
    "values first, weights transposed": _channels_first(True),
    "values first, softmax over the rows": _channels_first(False),
    "products summed": _summed_products,
    "windows apart": _windows,
    "difference, one product": _difference(False),
    "difference, two products": _difference(True),
    "talking heads, before the softmax": _talking(False),
    "talking heads, after the softmax": _talking(True),
    "values as wide as the stream, summed": _whole_values(True),
    "values as wide as the stream, one einsum": _whole_values(False),
    "sigmoid": _sigmoid,
    "linear from a matrix": _linear_matrix,
    "linear without a matrix": _linear,
    "channels": _channels,
}


# Output projections ----------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's: a linear map with its weight the other way round."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(given, width)), nn.Parameter(torch.randn(width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)

    def output_map(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.double(), self.bias


class LoRA(nn.Module):
    """A low-rank update beside a linear map."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base, self.scaling = base, 2.0
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * self.scaling

    def output_map(self) -> tuple[Tensor, Tensor | None]:
        update = self.up.weight.double() @ self.down.weight.double()
        return (self.base.weight.double() + self.scaling * update).T, self.base.bias


class DoRA(LoRA):
    """The updated weight's rows, each with a learned length."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__(base, rank)
        self.magnitude = nn.Parameter(torch.rand(base.out_features) + 0.5)

    def weight(self) -> Tensor:
        updated = self.base.weight + self.scaling * self.up.weight @ self.down.weight
        return self.magnitude[:, None] * updated / updated.norm(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.base.bias)

    def output_map(self) -> tuple[Tensor, Tensor | None]:
        updated = self.base.weight.double() + self.scaling * self.up.weight.double() @ self.down.weight.double()
        return (self.magnitude.double()[:, None] * updated / updated.norm(dim=1, keepdim=True)).T, self.base.bias


class SplitDoRA(DoRA):
    """The same as adapters' libraries write it: what the base gives, corrected by the lengths."""

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.base.weight + self.scaling * self.up.weight @ self.down.weight).norm(dim=1)
        factor = (self.magnitude / norm).view(1, -1)
        bare = F.linear(x, self.base.weight)
        return self.base(x) + (factor - 1) * bare + factor * self.up(self.down(x)) * self.scaling


class OFT(nn.Module):
    """A learned rotation of what a linear map reads, by Cayley's formula."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.angles = nn.Parameter(torch.empty(base.in_features, base.in_features))

    def rotation(self, dtype: torch.dtype) -> Tensor:
        S = (self.angles - self.angles.T).to(dtype if dtype == torch.float64 else torch.float32) * 0.3
        one = torch.eye(len(S), dtype=S.dtype)
        return torch.linalg.solve(one + S, one - S)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x @ self.rotation(x.dtype).to(x.dtype))

    def output_map(self) -> tuple[Tensor, Tensor | None]:
        weight = self.base.weight
        return self.rotation(weight.dtype).to(weight.dtype).double() @ weight.double().T, self.base.bias


ADAPTERS: dict[str, Callable[[Any], nn.Module]] = {"LoRA": LoRA, "DoRA": DoRA, "DoRA, split": SplitDoRA, "OFT": OFT}


def output_map(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W_O [mixed, width] in float64, and the bias."""
    if isinstance(module, nn.Linear):
        return module.weight.double().T, module.bias
    assert isinstance(module, LoRA | OFT | Conv1D)
    return module.output_map()


# Norms -----------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Written by hand, as LLaMA has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class AdaptiveNorm(nn.Module):
    """A layer norm whose gain and shift come from a condition [batch, width]."""

    def __init__(self, width: int, token_first: bool) -> None:
        super().__init__()
        self.to_gain, self.token_first = nn.Linear(width, 2 * width), token_first

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, shift = self.to_gain(condition).unsqueeze(0 if self.token_first else 1).chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:]) * (1 + gain) + shift


def make_norm(spec: Specification, parts: nn.Module, name: str) -> None:
    """What the norm `name` needs, put into `parts`: a module, or the parameters of a function."""
    D = spec.width
    modules: dict[str, Callable[[], nn.Module]] = {
        "nn.LayerNorm": lambda: nn.LayerNorm(D),
        "nn.RMSNorm": lambda: nn.RMSNorm(D),
        "own RMSNorm module": lambda: RMSNorm(D),
        "adaptive module": lambda: AdaptiveNorm(D, spec.token_first),
        "adaptive in the block": lambda: nn.LayerNorm(D, elementwise_affine=False),
    }
    if spec.norm in modules:
        parts.add_module(name, modules[spec.norm]())
    if spec.norm == "adaptive in the block":
        parts.add_module(f"{name}_gain", nn.Linear(D, 2 * D))
    if spec.norm in {"F.layer_norm, with a gain", "layer norm by hand", "RMS norm by hand"}:
        parts.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(D)))
    if spec.norm in {"F.layer_norm, with a gain", "layer norm by hand"}:
        parts.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(D)))


def normed(spec: Specification, parts: nn.Module, name: str, x: Tensor, condition: Tensor | None) -> Tensor:
    """The norm `name` of `parts`, in the code of whoever calls this."""
    kind = spec.norm
    if kind in {"nn.LayerNorm", "nn.RMSNorm", "own RMSNorm module"}:
        return getattr(parts, name)(x)
    if kind == "adaptive module":
        return getattr(parts, name)(x, condition)
    if kind == "adaptive in the block":
        assert condition is not None
        gain, shift = getattr(parts, f"{name}_gain")(condition).unsqueeze(0 if spec.token_first else 1).chunk(2, -1)
        return getattr(parts, name)(x) * (1 + gain) + shift
    if kind == "F.layer_norm":
        return F.layer_norm(x, x.shape[-1:])
    if kind == "F.layer_norm, with a gain":
        return F.layer_norm(x, (x.shape[-1],), getattr(parts, f"{name}_weight"), getattr(parts, f"{name}_bias"))
    if kind == "F.rms_norm":
        return F.rms_norm(x, (x.size(-1),))
    if kind == "F.normalize":
        return F.normalize(x, dim=-1) * spec.width**0.5
    if kind == "layer norm by hand":
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return unit * getattr(parts, f"{name}_weight") + getattr(parts, f"{name}_bias")
    if kind == "RMS norm by hand":
        return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * getattr(parts, f"{name}_weight")
    assert kind == "none", kind
    return x


# MLPs ------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """The feed-forward part."""

    def __init__(self, spec: Specification) -> None:
        super().__init__()
        self.spec = spec
        hidden = 2 * spec.width
        self.up, self.down = nn.Linear(spec.width, hidden), nn.Linear(hidden, spec.width)
        if spec.mlp == "SwiGLU":
            self.gate = nn.Linear(spec.width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.spec.mlp
        if kind == "SwiGLU":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if kind == "squared ReLU":
            return self.down(F.relu(self.up(x)).square())
        if kind == "in chunks":
            tokens = 0 if self.spec.token_first else 1
            return torch.cat([self.down(F.gelu(self.up(part))) for part in x.split(5, tokens)], tokens)
        return self.down(F.gelu(self.up(x)))


# Additions -------------------------------------------------------------------------------------------------------------


def make_scales(spec: Specification, parts: nn.Module, name: str) -> None:
    """The factors at the addition `name`, put into `parts`."""
    for operand, kind, level in (("stream", spec.stream_scale, 0.8), ("update", spec.update_scale, 0.6)):
        key = f"{name}_{operand}_scale"
        if kind == "learned":
            parts.register_parameter(key, nn.Parameter(torch.tensor(level)))
        elif kind == "learned, per channel":
            parts.register_parameter(key, nn.Parameter(level + 0.2 * torch.randn(spec.width)))
        elif kind == "buffered":
            parts.register_buffer(key, torch.tensor(level + 0.1))
        elif kind == "conditioned":
            parts.add_module(key, nn.Linear(spec.width, spec.width))


def added(
    spec: Specification,
    parts: nn.Module,
    name: str,
    x: Tensor | None,
    update: Tensor | None,
    condition: Tensor | None,
    scales_stream: bool = True,
) -> Tensor:
    """a·x + b·update in one of the ways to write it. None for what is switched off: the other is left, with its scale."""
    fixed = {"stream": 0.75, "update": 0.5}

    def scale(operand: str, kind: str) -> float | Tensor | None:
        if kind == "none" or (operand == "stream" and not scales_stream):
            return None
        switches = parts.switches
        assert isinstance(switches, Switches)
        if operand == "update" and switches.is_off("update-scale"):
            return None
        if kind == "fixed":
            return fixed[operand]
        found = getattr(parts, f"{name}_{operand}_scale")
        return found(condition).unsqueeze(0 if spec.token_first else 1) if kind == "conditioned" else found

    a, b = scale("stream", spec.stream_scale), scale("update", spec.update_scale)
    way = spec.addition
    is_sum = x is not None and update is not None
    alpha_a = a if is_sum and way == "torch.add(f, x, alpha=)" and isinstance(a, float) else None
    alpha_b = b if is_sum and way in {"torch.add(x, f, alpha=)", "x.add_(f)"} and isinstance(b, float) else None
    if x is not None and a is not None and alpha_a is None:
        x = a * x
    unscaled = update
    if update is not None and b is not None and alpha_b is None:
        update = update * b
    if way == "torch.lerp(x, f, 0.4)":
        if x is not None and update is not None:
            return torch.lerp(x, update, 0.4)
        x, update = None if x is None else 0.6 * x, None if update is None else 0.4 * update
    if x is None or update is None:
        left = update if x is None else x
        assert left is not None
        return left
    if way == "x + f":
        return x + update
    if way == "f + x":
        return update + x
    if way == "torch.add(x, f, alpha=)":
        return torch.add(x, update) if alpha_b is None else torch.add(x, update, alpha=alpha_b)
    if way == "torch.add(f, x, alpha=)":
        return torch.add(update, x) if alpha_a is None else torch.add(update, x, alpha=alpha_a)
    if way == "torch.addcmul(x, b, f)":
        assert unscaled is not None
        return torch.addcmul(x, b, unscaled) if isinstance(b, Tensor) else x + update
    if way == "x.add_(f)":
        return x.add_(update) if alpha_b is None else x.add_(update, alpha=alpha_b)
    assert way == "x += f", way
    x += update
    return x
