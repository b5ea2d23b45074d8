"""Attention whose rows are put together of several products: BigBird's block-sparse attention against NumPy, with the blocks that
the model draws and with others, with keys that stand in a row twice, and with padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.helpers.observing import observe
from uncollapse.probe.attention import ATTENTION_MEASURES, AttentionStatistics

HEADS, EACH, SIDE = 4, 8, 4  # heads, their width, tokens of a block
FIGURES = ["entropy", "normalized_entropy", "max_logit", "value_contraction", "contraction"]


def bigbird(blocks: int = 1) -> hf.BigBirdModel:
    torch.manual_seed(0)
    config = hf.BigBirdConfig(
        vocab_size=100, hidden_size=HEADS * EACH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=64,
        block_size=SIDE, num_random_blocks=blocks, max_position_embeddings=256, attention_type="block_sparse",
        initializer_range=0.3,
    )  # fmt: skip
    return hf.BigBirdModel(config).eval()


def pegasus() -> hf.BigBirdPegasusModel:
    torch.manual_seed(0)
    config = hf.BigBirdPegasusConfig(
        vocab_size=100, d_model=HEADS * EACH, encoder_layers=2, decoder_layers=1, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=64, decoder_ffn_dim=64, block_size=SIDE, num_random_blocks=1,
        max_position_embeddings=256, attention_type="block_sparse", init_std=0.3,
    )  # fmt: skip
    return hf.BigBirdPegasusModel(config).eval()


def drawing_others(model: nn.Module, seed: int) -> None:
    """Let each block-sparse attention look at random blocks that are drawn, as in training: in evaluation it takes the first."""
    for number, module in enumerate(m for m in model.modules() if hasattr(m, "_bigbird_block_rand_mask_with_head")):
        module._bigbird_block_rand_mask_with_head = _Drawn(seed + number)


class _Drawn:
    """The same blocks whenever it is asked for so many."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, from_seq_length: int, num_heads: int, **_: Any) -> list[np.ndarray]:
        blocks = from_seq_length // SIDE
        drawn = np.random.default_rng(self.seed + blocks)
        return list(drawn.integers(0, blocks, (num_heads, blocks - 2, 2)))


def times(module: Any, tokens: int) -> np.ndarray:
    """How often each token stands in the row of each other, [head, query, key]."""
    blocks = tokens // SIDE
    rows = module._bigbird_block_rand_mask_with_head(
        from_seq_length=tokens, to_seq_length=tokens, from_block_size=SIDE, to_block_size=SIDE, num_heads=HEADS,
        plan_from_length=None, plan_num_rand_blocks=None,
    ) if _is_replaced(module) else [np.zeros((blocks - 2, 1), dtype=int)] * HEADS  # fmt: skip
    found = np.zeros((HEADS, blocks, blocks))
    found[:, [0, -1]] = 1
    for head in range(HEADS):
        for block in range(1, blocks - 1):
            near = {1: [0, 1, 2, blocks - 1], blocks - 2: [0, blocks - 3, blocks - 2, blocks - 1]}
            seen = near.get(block, [0, block - 1, block, block + 1, blocks - 1])
            for key in [*seen, *np.asarray(rows[head])[block - 1]]:
                found[head, block, key] += 1
    return found.repeat(SIDE, 1).repeat(SIDE, 2)


def _is_replaced(module: Any) -> bool:
    return "_bigbird_block_rand_mask_with_head" in vars(module)


def expected(model: nn.Module, given: dict[str, Tensor], real: Tensor) -> list[dict[str, np.ndarray]]:
    """Of each block-sparse attention and head, the mean over the sequences: NumPy, in float64."""
    found = []
    attentions = [m for m in model.modules() if hasattr(m, "bigbird_block_sparse_attention")]
    read: list[np.ndarray] = []
    hooks = [
        m.register_forward_pre_hook(
            lambda _, a, k: read.append((a or list(k.values()))[0].double().numpy()), with_kwargs=True
        )
        for m in attentions
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    for module, states in zip(attentions, read, strict=True):
        several = []
        for x, is_real in zip(states, real.bool().numpy(), strict=True):
            counts = times(module, len(x))
            figures: dict[str, list[float]] = {name: [] for name in FIGURES}
            q, k, v = (linear(m, x) for m in (module.query, module.key, module.value))
            for head in range(HEADS):
                own = slice(head * EACH, head * EACH + EACH)
                with np.errstate(divide="ignore"):
                    logits = q[:, own] @ k[:, own].T / math.sqrt(EACH) + np.log(counts[head])
                logits = logits[is_real][:, is_real]
                A = np.exp(logits - logits.max(-1, keepdims=True))
                A /= A.sum(-1, keepdims=True)
                C, values = np.eye(len(A)) - 1 / len(A), v[is_real][:, own]
                entropy = -np.where(A > 0, A * np.log(np.where(A > 0, A, 1)), 0).sum(-1)
                figures["entropy"].append(entropy.mean())
                figures["normalized_entropy"].append((entropy / np.log(np.isfinite(logits).sum(-1))).mean())
                figures["max_logit"].append(logits.max())
                figures["value_contraction"].append(np.linalg.norm(C @ A @ values) / np.linalg.norm(C @ values))
                figures["contraction"].append(np.linalg.norm(C @ A @ C, 2))
            several.append(figures)
        found.append({name: np.mean([each[name] for each in several], 0) for name in FIGURES})
    return found


def linear(module: nn.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if module.bias is None else module.bias.detach().double().numpy()
    return x @ module.weight.detach().double().numpy().T + bias


def require_right(statistics: AttentionStatistics, wanted: dict[str, np.ndarray]) -> None:
    assert statistics.reasons == {}
    assert statistics.call.heads == statistics.call.key_value_heads == HEADS
    assert statistics.deviation < 1e-5
    assert statistics.row_sums == pytest.approx((1, 1), abs=1e-5)
    for name, figures in wanted.items():
        row = ATTENTION_MEASURES.index(name)
        got = [statistics.values.summary(row, head)[0] for head in range(HEADS)]
        assert got == pytest.approx(figures.tolist(), rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize("draws", [False, True], ids=["as in evaluation", "blocks drawn"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_bigbirds_block_sparse_attention(draws: bool, is_padded: bool) -> None:
    model = bigbird(2 if draws else 1)
    if draws:
        drawing_others(model, 1)
    given = {"input_ids": torch.randint(3, 100, (2, 64), generator=torch.Generator().manual_seed(0))}
    real = torch.ones(2, 64, dtype=torch.long)
    if is_padded:
        real[1, 50:] = 0
        given["attention_mask"] = real
    observed = observe(model, [given], level="full")
    for statistics, wanted in zip(observed.attention, expected(model, given, real), strict=True):
        require_right(statistics, wanted)
        assert statistics.energy.count.tolist() == [2] * HEADS


def test_texts_of_other_lengths_and_the_encoder_of_pegasus() -> None:
    model = pegasus()
    drawn = torch.Generator().manual_seed(0)
    lengths = (64, 80)
    batches = [
        {
            "input_ids": torch.randint(3, 100, (2, n), generator=drawn),
            "decoder_input_ids": torch.randint(3, 100, (2, 5)),
        }
        for n in lengths
    ]
    observed = observe(model, batches)
    several = [expected(model, given, torch.ones(2, n)) for given, n in zip(batches, lengths, strict=True)]
    for number, statistics in enumerate(observed.attention[:2]):
        means = {
            name: np.mean([each[number][name] for each in several], 0) for name in FIGURES if name != "contraction"
        }
        require_right(statistics, means)


class TwoHalves(nn.Module):
    """A row of weights in two products that add up: `share` of them is a softmax over all keys, cut in two."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, width = style, HEADS * EACH
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        q, k, v = (m(read).unflatten(-1, (HEADS, EACH)).transpose(1, 2) for m in (self.query, self.key, self.value))
        half = x.shape[1] // 2
        if self.style == "two softmaxes":
            first, second = ((q @ k[:, :, s].mT / EACH).softmax(-1) for s in (slice(half), slice(half, None)))
        else:
            first, second = (q @ k.mT / EACH).softmax(-1).split([half, x.shape[1] - half], -1)
        values = (v[:, :, :half], v[:, :, half:])
        if self.style == "values of others":
            values = (v[:, :, half:].flip(2)[:, :, :half], v[:, :, half:])
        mixed = first @ values[0] + second @ values[1]
        if self.style == "a norm behind":
            mixed = mixed / mixed.norm(dim=-1, keepdim=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class OfHalves(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.embed = nn.Linear(5, HEADS * EACH)
        self.blocks = nn.ModuleList([TwoHalves(style) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def of_halves(style: str) -> OfHalves:
    torch.manual_seed(0)
    return OfHalves(style).eval()


@pytest.mark.parametrize("style", ["cut", "values of others", "two softmaxes", "a norm behind"])
def test_rows_that_are_cut_in_two(style: str) -> None:
    """Keys are told by the values that they meet, rows must sum to one, and what is no sum of both is not measured."""
    model, x = of_halves(style), torch.randn(3, 8, 5)
    entered: list[np.ndarray] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0].double().numpy()))
    with torch.no_grad():
        model(x)
    hook.remove()
    statistics = observe(model, [{"x": x}]).attention[0]
    if style in {"two softmaxes", "a norm behind"}:
        assert "entropy" in statistics.reasons
        return
    block, wanted = model.blocks[0], []
    for states in entered[0]:
        read = (states - states.mean(-1, keepdims=True)) / np.sqrt(states.var(-1, keepdims=True) + block.norm.eps)
        q, k = (linear(m, read).reshape(8, HEADS, EACH) for m in (block.query, block.key))
        logits = np.einsum("qhd,khd->hqk", q, k) / EACH
        A = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        if style == "values of others":  # the first four keys meet the values of the last four, from behind
            A = np.concatenate([0 * A[..., :4], A[..., 4:] + A[..., 3::-1]], -1)
        wanted.append(-np.where(A > 0, A * np.log(np.where(A > 0, A, 1)), 0).sum(-1).mean(-1))
    assert figures_of(statistics) == pytest.approx(np.mean(wanted, 0).tolist(), rel=1e-4)


def test_numbers_are_told_in_half_precision() -> None:
    """Half precision counts to a hundred or so: numbers are given digit by digit."""
    model = bigbird()
    given = {"input_ids": torch.randint(3, 100, (3, 64), generator=torch.Generator().manual_seed(0))}
    wanted = expected(model, given, torch.ones(3, 64))[0]
    observed = observe(model.bfloat16(), [given])
    assert figures_of(observed.attention[0]) == pytest.approx(wanted["entropy"].tolist(), rel=0.05)
    halves = of_halves("cut")
    x = torch.randn(40, 8, 5)
    plain = observe(halves, [{"x": x}])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = observe(halves, [{"x": x}])
    assert figures_of(rounded.attention[0]) == pytest.approx(figures_of(plain.attention[0]), rel=0.02)


def figures_of(statistics: AttentionStatistics) -> list[float]:
    """The entropy of each head."""
    assert "entropy" not in statistics.reasons
    row = ATTENTION_MEASURES.index("entropy")
    return [statistics.values.summary(row, head)[0] for head in range(HEADS)]
