"""How patterns change with the context length, against the model's own eager weights and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.measures.line_fit import LineFit
from uncollapse.probe.context_lengths import WINDOWS, regime, require_context_lengths, width_scaling
from uncollapse.records.symmetries import WidthScaling

LENGTHS = [8, 12, 20]


def batches(vocabulary: int = 64) -> list[dict[str, Tensor]]:
    """96 real tokens in sequences of two lengths, padded on the right; number 0 is padding and must never be seen."""
    draws = torch.Generator().manual_seed(3)
    ids = torch.randint(1, vocabulary, (4, 32), generator=draws)
    mask = torch.ones_like(ids)
    mask[2:, 16:] = 0
    return [{"input_ids": ids * mask, "attention_mask": mask}]


def scaling_of(model: nn.Module, given: list[dict[str, Tensor]], lengths: list[int]) -> list[WidthScaling]:
    return width_scaling(model, proved_anatomy(model, given[0]), given, lengths)


def windows(given: list[dict[str, Tensor]], length: int) -> Tensor:
    """The windows written out: the real tokens in a row, cut at evenly spaced starts."""
    row = [
        int(t)
        for ids, mask in zip(given[0]["input_ids"], given[0]["attention_mask"], strict=True)
        for t in ids[mask == 1]
    ]
    count = min(WINDOWS, len(row) // length)
    step = len(row) // count
    return torch.tensor([row[i * step : i * step + length] for i in range(count)])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_values_are_those_of_the_models_own_weights(family: str) -> None:
    model = FAMILIES[family].build().eval()
    found = scaling_of(model, batches(), LENGTHS)
    eager = FAMILIES[family].build().eval()
    eager.set_attn_implementation("eager")
    for column, length in enumerate(LENGTHS):
        with torch.no_grad():
            weights = eager(input_ids=windows(batches(), length), output_attentions=True, use_cache=False).attentions
        for record, pattern in zip(found, weights, strict=True):
            by_head = [
                np.mean([np.linalg.svd(one[h].double().numpy(), compute_uv=False)[1] for one in pattern])
                for h in range(pattern.shape[1])
            ]
            got = record.second_singular_value[column]
            assert got is not None
            assert got.n == pattern.shape[1]
            assert [got.mean, got.min, got.max] == pytest.approx(
                [np.mean(by_head), min(by_head), max(by_head)], rel=1e-5
            )
    first = found[0]
    expected = np.polyfit(np.log(LENGTHS), np.log([s.mean for s in first.second_singular_value if s is not None]), 1)[0]
    assert first.slope == pytest.approx(expected)
    assert first.slope_low is not None
    assert first.slope_high is not None
    assert first.slope_low <= first.slope <= first.slope_high


class Independent(nn.Module):
    """A block whose queries and keys are wide random features of the token, so that its logits are nearly independent."""

    def __init__(self, causal: bool, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Embedding(512, 16384), nn.Embedding(512, 16384)
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.causal, self.gain = causal, gain

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        q, k = (self.gain * e(input_ids)[:, None] for e in (self.query, self.key))
        mixed = functional.scaled_dot_product_attention(q, k, self.value(x)[:, None], is_causal=self.causal)
        return x + self.out(mixed[:, 0])


class OneBlock(nn.Module):
    def __init__(self, causal: bool, gain: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(512, 16)
        self.blocks = nn.ModuleList([Independent(causal, gain)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x, input_ids)
        return x


def distinct() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randperm(512, generator=torch.Generator().manual_seed(0))[None]}]


def test_independent_logits_fall_with_the_square_root() -> None:
    """Closed form for logits of variance v: the centred entries of A are independent, their deviation sqrt(e^v - 1)/n, so that
    sigma_2 tends to 2 sqrt(e^v - 1)/sqrt(n)."""
    v = 0.25
    (found,) = scaling_of(OneBlock(causal=False, gain=v**0.25).eval(), distinct(), [32, 64, 128, 256])
    assert found.slope == pytest.approx(-0.5, abs=0.07)
    assert found.regime.startswith("falls like independent logits")
    last = found.second_singular_value[-1]
    assert last is not None
    assert last.mean == pytest.approx(2 * math.sqrt(math.exp(v) - 1) / math.sqrt(256), rel=0.15)


def test_uniform_causal_attention_opens_no_gap_and_uniform_attention_has_no_second_direction() -> None:
    (causal,) = scaling_of(OneBlock(causal=True, gain=0.0).eval(), distinct(), [64, 128])
    uniform = [torch.tril(torch.ones(n, n, dtype=torch.float64)) / torch.arange(1, n + 1)[:, None] for n in (64, 128)]
    expected = [float(torch.linalg.svdvals(a)[1]) for a in uniform]
    assert [s.mean for s in causal.second_singular_value if s is not None] == pytest.approx(expected, rel=1e-5)
    assert causal.regime == "rises: a causal mask alone opens no spectral gap, from two lengths only: no interval"
    (full,) = scaling_of(OneBlock(causal=False, gain=0.0).eval(), distinct(), [64, 128])
    assert full.slope is None
    assert full.regime.startswith("zero")


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (LineFit(-0.5, -0.6, -0.4), "falls like independent logits"),
        (LineFit(-0.9, -1.0, -0.8), "falls like independent logits"),
        (LineFit(-0.2, -0.3, -0.1), "falls slower"),
        (LineFit(-0.4, -0.45, -0.35), "falls like independent logits"),
        (LineFit(-0.2, -0.8, 0.4), "no trend"),
        (LineFit(0.2, 0.1, 0.3), "rises: longer"),
        (LineFit(None, None, None), "no slope"),
    ],
)
def test_the_regime_needs_an_interval_on_one_side_of_zero(fit: LineFit, words: str) -> None:
    assert regime(fit, causal=False).startswith(words)


def test_both_stacks_of_an_encoder_decoder_have_their_lengths() -> None:
    torch.manual_seed(0)
    small = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = hf.BartConfig(
        **small, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64, max_position_embeddings=64, pad_token_id=0
    )
    model = hf.BartModel(config).eval()
    given = [{"input_ids": torch.arange(1, 41)[None], "decoder_input_ids": torch.arange(1, 41)[None]}]
    kinds = [(s.stack, s.kind) for s in scaling_of(model, given, [8, 16])]
    assert kinds == [("encoder", "self"), ("decoder", "self"), ("decoder", "cross")]


def test_a_diagnosis_carries_the_slopes_and_their_mean() -> None:
    record = uc.diagnose(FAMILIES["bert"].build(), batches=batches(), context_lengths=[20, 8, 8]).record
    width = next(s for s in record.symmetries if s.phenomenon == "rank-collapse-width")
    slopes = [s.slope for s in width.scaling if s.slope is not None]
    assert [s.context_lengths for s in width.scaling] == [[8, 20]] * 3
    assert width.slope is not None
    assert width.slope.mean == pytest.approx(np.mean(slopes))
    assert record.probe.options["context_lengths"] == [8, 20]


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([16], "two or more different lengths"),
        ([4, 16], "at least 8"),
        ([8, 97], "expected at least 97 tokens of text, got 96"),
    ],
)
def test_lengths_that_cannot_be_had_are_refused(lengths: list[int], words: str) -> None:
    with pytest.raises(uc.InputError, match=words):
        uc.diagnose(FAMILIES["bert"].build(), batches=batches(), context_lengths=lengths)


def test_lengths_beyond_the_models_positions_and_inputs_without_tokens_are_refused() -> None:
    model = FAMILIES["gpt2"].build()  # 64 positions
    with pytest.raises(uc.InputError, match="made for fewer positions"):
        uc.diagnose(model, batches=batches(), context_lengths=[16, 80])
    vision = FAMILIES["vit"]
    with pytest.raises(uc.InputError, match="such as input_ids, got pixel_values"):
        uc.diagnose(vision.build(), batches=[{"pixel_values": torch.randn(2, 3, 32, 32)}], context_lengths=[8, 16])


def test_lengths_come_in_order() -> None:
    assert require_context_lengths([64, 16, 64, 32]) == [16, 32, 64]


class Renamed(nn.Module):
    """The same model with other names for what it is given; True is padding."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor, padded: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(tokens) if padded is None else (~padded).long()
        return self.inner(input_ids=tokens, attention_mask=mask).last_hidden_state


def test_windows_hold_real_tokens_whatever_the_mask_is_called() -> None:
    plain = scaling_of(FAMILIES["bert"].build().eval(), batches(), LENGTHS)
    given = [{"tokens": b["input_ids"], "padded": b["attention_mask"] == 0} for b in batches()]
    renamed = scaling_of(Renamed(FAMILIES["bert"].build()).eval(), given, LENGTHS)
    for one, other in zip(plain, renamed, strict=True):
        assert other.second_singular_value == one.second_singular_value
