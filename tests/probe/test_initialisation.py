"""Nearly uniform attention is expected of a model that was just made, and a fault where something made it so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe import initialisation
from uncollapse.records.common import Finding
from uncollapse.sources import default_texts

Make = Callable[[], Any]
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


class Encoder(nn.Module):
    """torch's own layers: Xavier-uniform queries and keys, biases drawn from a range."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.embed, self.blocks = nn.Embedding(64, 64), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.blocks(self.embed(input_ids))
        return found


FRESH: dict[str, Make] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=64, n_layer=3, n_head=4)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_TEXT)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, num_key_value_heads=2)),
    "encoder": Encoder,
}


def model(name: str) -> Any:
    torch.manual_seed(0)
    return FRESH[name]().eval()


def width(given: Any) -> list[Finding]:
    """The findings about attention that gives every token the same."""
    ids = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    return [
        f for f in uc.diagnose(given, batches=[{"input_ids": ids}]).findings if f.phenomenon == "rank-collapse-width"
    ]


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_model_is_told_with_the_reason_and_no_warning(name: str) -> None:
    found = width(model(name))
    assert {f.block for f in found} >= {0, 1, 2} or name == "encoder"  # its larger queries and keys make it choose
    assert {f.severity for f in found} <= {"info"}
    assert all("as it was initialised" in f.message for f in found)


def smaller(given: Any, blocks: list[int], factor: float) -> None:
    with torch.no_grad():
        for block in blocks:
            given.encoder.layer[block].attention.self.query.weight.mul_(factor)
            given.encoder.layer[block].attention.self.key.weight.mul_(factor)


def test_one_block_with_smaller_queries_and_keys_is_a_warning_and_the_others_are_not() -> None:
    given = model("bert")
    smaller(given, [1], 0.3)
    assert {f.block: f.severity for f in width(given)} == {0: "info", 1: "warning", 2: "info"}


def test_queries_and_keys_that_are_too_small_for_their_values_everywhere_are_a_warning() -> None:
    given = model("bert")
    smaller(given, [0, 1, 2], 0.1)
    assert {f.severity for f in width(given)} == {"warning"}


def trained(given: Any, optimiser: torch.optim.Optimizer, steps: int) -> tuple[float, float]:
    """The losses at the first and at the last step, on English prose, six bits of each byte."""
    text = torch.tensor(list(" ".join(default_texts(16, 0)).encode())) % 64
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(steps):
        ids = text[torch.randint(len(text) - 24, (8, 1), generator=generator) + torch.arange(24)]
        loss = given(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


RATES = [(torch.optim.SGD, rate) for rate in (1e-3, 3e-2)] + [(torch.optim.AdamW, rate) for rate in (1e-5, 1e-3, 3e-3)]


@pytest.mark.parametrize(("kind", "rate"), RATES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_first_steps_of_an_optimiser_are_no_fault_yet(name: str, kind: Any, rate: float) -> None:
    given = model(name)
    for steps in (1, 4):
        trained(given, kind(given.parameters(), rate), steps)
        found = width(given)
        assert found
        assert {f.severity for f in found} == {"info"}


def with_gains_reset(given: Any) -> None:
    with torch.no_grad():
        for name, parameter in given.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def test_gains_that_were_reset_do_not_make_a_few_steps_look_like_none() -> None:
    given = model("gpt2")
    trained(given, torch.optim.AdamW(given.parameters(), 3e-3), 5)
    with_gains_reset(given)
    found = width(given)
    assert found
    assert all(f.severity == "info" and "hardly trained" in f.message for f in found)


@pytest.mark.parametrize("rate", [1e-3, 3e-3])
@pytest.mark.parametrize("are_reset", [False, True])
def test_attention_that_stayed_uniform_through_a_training_is_a_warning(rate: float, are_reset: bool) -> None:
    """All but the queries and keys is trained until the loss is far lower, and the gains may be reset behind it."""
    given = model("llama")
    moving = [p for name, p in given.named_parameters() if "q_proj" not in name and "k_proj" not in name]
    first, last = trained(given, torch.optim.AdamW(moving, rate), 80)
    assert last < 0.8 * first
    if are_reset:
        with_gains_reset(given)
    found = width(given)
    assert found
    assert "warning" in {f.severity for f in found}


@pytest.mark.parametrize(
    "learn",
    [
        lambda w: w.add_(
            torch.outer(torch.randn(w.shape[0]), torch.randn(w.shape[1])), alpha=0.03
        ),  # a direction, with two thirds of the energy
        lambda w: w.mul_(torch.linspace(0.5, 1.5, w.shape[1])),  # gains folded into it
        lambda w: w.mul_(torch.randn_like(w).abs() ** 0.7),  # heavy tails
    ],
)
def test_folded_gains_do_not_hide_what_training_did_to_a_matrix(learn: Callable[[Tensor], Tensor]) -> None:
    """All gains are 1 and there is no bias: only the matrix shows it."""
    given = model("llama")
    assert {f.severity for f in width(given)} == {"info"}  # remembered of the weights as they are now
    with torch.no_grad():
        for layer in given.model.layers:
            learn(layer.mlp.down_proj.weight)
    assert {f.severity for f in width(given)} == {"warning"}


def test_a_vector_that_is_not_finite_is_not_where_it_starts() -> None:
    (trace,) = initialisation._against_start(torch.tensor([1.0, torch.nan]), [])
    assert trace.share >= 1


def test_parameters_without_entries_say_nothing() -> None:
    """Of a model whose weights are elsewhere (partitioned over processes) they are all that is here."""
    given = model("llama")
    anatomy = proved_anatomy(given, {"input_ids": torch.arange(14).view(2, 7)})
    for layer in given.model.layers:
        layer.input_layernorm.weight = nn.Parameter(torch.empty(0))
    assert initialisation.WeightEvidence(given, anatomy).of([0])[0].initial


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_a_random_draw_is_one_in_every_number_format(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    held = nn.Module()
    held.weight = nn.Parameter((scale * torch.randn(96, 192)).to(dtype), requires_grad=False)
    assert initialisation._drawn(held, "weight", held.weight) == []
    assert initialisation._size(held.weight) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("draw", [nn.init.normal_, nn.init.uniform_], ids=["normal", "uniform"])
def test_a_large_random_draw_is_one(draw: Any) -> None:
    """Single precision does not add up ten million fourth powers to three digits."""
    torch.manual_seed(0)
    weight = draw(torch.empty(2048, 5632)) * 2 - float(draw is nn.init.uniform_)
    assert initialisation._traces(weight) == []
    assert initialisation._size(weight) == pytest.approx(float(weight.double().square().mean().sqrt()), rel=1e-6)


def test_small_weights_are_judged_as_large_ones() -> None:
    """Their squares and fourth powers are no numbers of single precision."""
    torch.manual_seed(0)
    drawn = torch.randn(96, 192)
    learnt = drawn * torch.linspace(0.2, 1.8, 192)
    for weight in (drawn, learnt):
        large, small = (initialisation._traces(weight * scale) for scale in (1.0, 1e-15))
        assert [t.words for t in large] == [t.words for t in small]
        assert [t.share for t in large] == pytest.approx([t.share for t in small], rel=1e-3)


def test_what_is_outside_the_blocks_is_asked_once_for_each_state_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model("gpt2")
    with torch.no_grad():
        given.transformer.h[1].ln_1.weight[0] += 0.01  # a trace, so that the rest of the model is asked
    anatomy = proved_anatomy(given, {"input_ids": torch.arange(14).view(2, 7)})
    asked: list[torch.Size] = []

    def counted(p: Tensor, real: Any = initialisation._learnt) -> float:
        asked.append(p.shape)
        return float(real(p))

    monkeypatch.setattr(initialisation, "_learnt", counted)
    first = initialisation.WeightEvidence(given, anatomy).of([0, 1, 2])
    assert len(asked) == 2  # the table of words, which is the output layer too, and that of positions
    assert initialisation.WeightEvidence(given, anatomy).of([0, 1, 2]) == first
    assert first[1].initial
    assert len(asked) == 2
    with torch.no_grad():
        given.lm_head.weight.add_(torch.outer(torch.randn(64), torch.randn(64)))
    assert not initialisation.WeightEvidence(given, anatomy).of([1])[1].initial
    assert len(asked) == 3
