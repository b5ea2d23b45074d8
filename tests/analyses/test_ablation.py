"""Ablation: rates of known sequences, verdicts that follow from the runs, and the packaged model as measured before."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from tests.helpers.tiny_models import text_batch
from uncollapse.analyses import preparation
from uncollapse.anatomy.interception import ChangedPath
from uncollapse.judgement.predictions import rate_without_residual, verdicts
from uncollapse.judgement.rates import rate
from uncollapse.records.ablation import AblationRecord, AblationRun, RateRecord
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import SiteRecord
from uncollapse.records.encoding import from_json

EPSILON = torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("values", "kind", "factor", "slope"),
    [
        ([0.9, 0.88, 0.87, 0.85, 0.84], "none", (0.84 / 0.9) ** 0.25, None),
        ([0.8 * 0.5**i for i in range(10)], "geometric", 0.5, 1.0),
        ([0.9 * 0.75**i for i in range(13)], "geometric", 0.75, 1.0),
        ([0.9 ** (3**i) for i in range(5)], "doubly exponential", None, 3.0),
        ([0.5 ** (2**i) for i in range(5)], "doubly exponential", None, 2.0),
    ],
)
def test_known_sequences_have_their_rate(
    values: list[float], kind: str, factor: float | None, slope: float | None
) -> None:
    found = rate(values, EPSILON)
    assert found.kind == kind
    if factor is not None:
        assert found.factor == pytest.approx(factor)
    if slope is not None:
        assert found.slope == pytest.approx(slope)
        assert found.slope_low == pytest.approx(slope)
        assert found.slope_high == pytest.approx(slope)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.98, 0.95, 0.9, 0.3, 0.02], "open"),  # the slope's interval reaches below 1 and beyond 3
        ([0.9, 0.67, 0.2, 0.06, 0.06, 0.06, 0.06, 0.06], "open"),  # it stops
        ([0.9, 1e-16], "open"),  # one step
        ([0.9, 0.5, 0.02], "open"),  # two steps of different size
        ([0.98, 0.83, 0.66, 0.53, 0.37, 0.3, 0.2, 0.16, 0.11, 0.08], "geometric"),
    ],
)
def test_a_rate_is_said_only_where_the_figures_support_it(values: list[float], kind: str) -> None:
    assert rate(values, EPSILON).kind == kind


def test_the_rounding_floor_is_no_level() -> None:
    values = [0.9 ** (3**i) for i in range(5)]
    noisy = [*values, 6e-16, 4e-16, 5e-16]
    found, clean = rate(noisy, EPSILON), rate(values, EPSILON)
    assert found.floor_block == 4
    assert (found.slope, found.factor) == (clean.slope, clean.factor)
    assert rate([0.9, 0.5, 1e-7, 1e-7], torch.finfo(torch.float32).eps).floor_block == 1


def test_a_plunge_onto_the_floor_within_two_blocks_is_called_what_it_is() -> None:
    assert rate([0.9, 0.4, 1e-16], EPSILON).kind == "doubly exponential"


def test_the_interval_is_that_of_student() -> None:
    logs = [0.0, -1.0, -1.9, -3.1, -4.0, -5.2]
    found = rate([math.exp(v) for v in logs], EPSILON)
    x, y = logs[:-1], logs[1:]
    n, mx, my = len(x), sum(x) / len(x), sum(y) / len(y)
    sxx = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sxx
    error = math.sqrt(sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True)) / (n - 2) / sxx)
    assert found.slope == pytest.approx(slope)
    assert found.slope_high == pytest.approx(slope + 3.182 * error)  # 97.5 % quantile for 3 degrees of freedom


@pytest.fixture(scope="module")
def minilm() -> uc.Ablation:
    return uc.ablate(
        "demo", sequences=6, dtype="float64", without=[("norm",), ("residual",), ("mlp",), ("residual", "mlp")]
    )


def curve(found: uc.Ablation, *without: str) -> list[float]:
    run = next(r for r in found.runs if r.without == list(without))
    return [s.consensus_distance.mean for s in run.trajectory if s.consensus_distance is not None]


def test_minilm_is_held_up_by_its_residual_connections_not_by_its_mlp(minilm: uc.Ablation) -> None:
    # Measured before on other text: 1·1·0 .97 … .79; 1·0·1 .97 .68 .23 1.6e-2 5.5e-6 1e-15; 1·0·0 at the floor by block 4.
    assert min(curve(minilm, "mlp")) > 0.5
    without_residual = curve(minilm, "residual")
    assert without_residual[1] > 0.5
    assert without_residual[-1] < 1e-12
    assert curve(minilm, "residual", "mlp")[5] < 1e-12
    rates = {tuple(r.without): r.rate.kind for r in minilm.runs if r.rate is not None}
    assert rates[()] == rates["mlp",] == "none"
    assert rates["residual",] == rates["residual", "mlp"] == "doubly exponential"


def test_the_verdicts_say_so_in_rank_and_in_distance(minilm: uc.Ablation) -> None:
    agreed = {(v.prediction.split()[1], v.measure): v.agrees for v in minilm.verdicts}
    assert agreed == {
        ("MLP", "affine_rank"): False,
        ("MLP", "consensus_distance"): False,
        ("connections", "affine_rank"): True,
        ("connections", "consensus_distance"): True,
        ("residual", "affine_rank"): True,
        ("residual", "consensus_distance"): True,
        ("normalisation", "affine_rank"): True,
    }


def test_verdicts_follow_the_runs_and_turn_with_them(minilm: uc.Ablation) -> None:
    runs = list(minilm.runs)
    swapped = {("mlp",): ["residual"], ("residual",): ["mlp"]}
    turned = verdicts([replace(r, without=swapped.get(tuple(r.without), r.without)) for r in runs], is_causal=False)
    for before, after in zip(minilm.verdicts, turned, strict=True):
        if before.prediction.startswith("Layer"):
            assert before.agrees == after.agrees
        else:
            assert before.agrees is not after.agrees


def test_the_output_moves_and_the_record_survives_json(minilm: uc.Ablation) -> None:
    whole, *rest = minilm.runs
    assert whole.output_shift is None
    assert all(r.output_shift is not None and r.output_shift.mean > 0.01 for r in rest)
    assert from_json(minilm.to_json(), AblationRecord) == minilm.record


def test_causal_models_are_judged_by_what_causal_masks_do() -> None:
    family = FAMILIES["gpt2"]
    found = uc.ablate(family.build(), batches=[inputs_for(family)], without=[("residual",)])
    assert found.record.is_causal
    predicted = {v.measure: v.predicted for v in found.verdicts}
    assert predicted["consensus_distance"] == "falls geometrically"


def without_residual(model: nn.Module, batch: dict[str, Any]) -> AblationRecord:
    return uc.ablate(model, batches=[batch], without=[("residual",)]).record


def falls(record: AblationRecord) -> str:
    return next(v.predicted for v in record.verdicts if v.measure == "consensus_distance")


@pytest.mark.parametrize("name", ["t5", "mpnet", "bert"])
def test_positions_in_the_logits_are_told_by_what_is_left_at_consensus(name: str) -> None:
    """With the bias table at zero the same model is predicted to collapse doubly exponentially, as BERT is."""
    family = FAMILIES[name]
    model, batch = family.build().double(), inputs_for(family)
    tables = [module for path, module in model.named_modules() if path.endswith("relative_attention_bias")]
    with torch.no_grad():
        for table in tables:
            table.weight.normal_(0, 2)
    if not tables:
        assert falls(without_residual(model, batch)) == "falls doubly exponentially"
        return
    if name == "mpnet":  # an encoder, whose pattern is that of the table alone
        found = without_residual(model, batch)
        assert falls(found) == "falls geometrically"
        positions = torch.arange(batch["input_ids"].shape[1])
        bias = model.encoder.compute_position_bias(batch["input_ids"][..., None].float())[0]
        assert len(positions) == bias.shape[-1]
        patterns = bias.double().softmax(-1)
        centred = patterns - patterns.mean(-2, keepdim=True)
        expected = torch.linalg.matrix_norm(centred, 2).max().item()
        assert found.contraction_at_consensus == pytest.approx([expected] * len(model.encoder.layer), rel=1e-6)
    with torch.no_grad():
        for table in tables:
            table.weight.zero_()
    zeroed = without_residual(model, batch)
    assert zeroed.contraction_at_consensus is not None
    if zeroed.is_causal:  # the decoder's mask is still there
        assert falls(zeroed) == "falls geometrically"
    else:
        assert max(zeroed.contraction_at_consensus) < 1e-8
        assert falls(zeroed) == "falls doubly exponentially"


def test_a_pattern_too_weak_to_tell_predicts_no_rate() -> None:
    assert rate_without_residual(False, [0.02], 1e-7) == ""
    assert rate_without_residual(True, None, 1e-7) == "geometrically"


def test_a_language_model_reports_its_loss() -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = FAMILIES["gpt2"].build().config
    model = hf.GPT2LMHeadModel(config).eval()
    batch = text_batch(3, 9)
    found = uc.ablate(model, batches=[batch], without=[("mlp",)])
    with torch.no_grad():
        expected = [model(input_ids=i[None], labels=i[None]).loss.item() for i in batch["input_ids"]]
    loss = found.runs[0].loss
    assert loss is not None
    assert loss.mean == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert (loss.min, loss.max) == pytest.approx((min(expected), max(expected)), rel=1e-5)
    assert found.runs[1].loss is not None


def test_level_full_says_what_the_whole_models_sublayers_and_norms_do() -> None:
    family = FAMILIES["bert"]
    model, batch = family.build(), inputs_for(family)
    found = uc.ablate(model, batches=[batch], without=[("mlp",)], level="full").record
    alone = uc.diagnose(model, batches=[batch], level="full").record
    assert len(found.norms) == 2 * family.blocks
    assert (found.norms, found.updates) == (alone.norms, alone.updates)
    assert uc.ablate(model, batches=[batch], without=[("mlp",)]).record.norms == []


def test_a_decoders_blocks_keep_their_numbers() -> None:
    family = FAMILIES["bart"]
    found = uc.ablate(family.build().double(), batches=[inputs_for(family)], without=[("residual",)])
    decoder = range(family.blocks - family.decoder_blocks, family.blocks)
    assert {v.block for v in found.verdicts if v.measure == "consensus_distance"} <= set(decoder)


def test_tokens_that_are_all_zero_are_at_the_floor() -> None:
    family = FAMILIES["gpt2"]
    model = family.build()
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight.zero_()
        model.h[1].mlp.c_proj.bias.zero_()
    found = uc.ablate(model, batches=[inputs_for(family)], without=[("residual",)], blocks=[1])
    assert found.runs[1].rate is not None
    assert found.runs[1].rate.floor_block == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": [("mpl",)]}, "got 'mpl'"),
        ({"without": "mlp"}, "list of combinations"),
        ({"without": ["mlp"]}, "list of combinations"),
        ({"grid": True, "without": [("mlp",)]}, "expected grid or without, got both"),
        ({"blocks": [99]}, r"got \[99\]"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(uc.InputError, match=message):
        uc.ablate(FAMILIES["bert"].build(), batches=[text_batch()], **arguments)


def test_a_model_whose_residual_cannot_be_located_is_refused() -> None:
    with pytest.raises(uc.UnsupportedModel, match="0 residual additions"):
        uc.ablate(nn.Embedding(8, 4), batches=[{"input": torch.ones(2, 3, dtype=torch.long)}])


def test_a_run_that_is_not_finite_says_so() -> None:
    family = FAMILIES["bert"]
    model = family.build()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[0] = math.nan
    found = uc.ablate(model, batches=[inputs_for(family)], without=[("mlp",)])
    assert found.runs[0].rate is None
    assert found.runs[0].unavailable["rate"] == "the consensus distance is not finite"
    assert isinstance(found.runs[1].rate, RateRecord)
    assert isinstance(found.runs[1], AblationRun)


def test_three_blocks_that_are_falling_decide_nothing() -> None:
    def run(without: list[str], *distances: float, rank: float = 10.0) -> AblationRun:
        sites = [site(i - 1 if i else None, d, rank=rank if i else 7.9) for i, d in enumerate(distances)]
        return AblationRun(without, sites, rate(list(distances), EPSILON), None, None, [])

    whole, falling = run([], 0.9, 0.9, 0.9, 0.9), run(["residual"], 0.9, 0.6, 0.35, 0.2, rank=7.9)
    by_measure = {v.measure: v for v in verdicts([whole, falling], is_causal=True)}
    assert by_measure["consensus_distance"].agrees is None
    level = verdicts([whole, run(["residual"], 0.9, 0.88, 0.87, 0.9)], is_causal=True)
    assert [v.agrees for v in level if v.measure == "consensus_distance"] == [False]


def test_ranks_are_relative_to_the_best_by_the_first_block() -> None:
    """Repeated ids make the embedding poor; the first attention tells them apart."""
    ranks = [7.9, 10.0, 10.0, 7.9]
    sites = [site(i - 1 if i else None, 0.9, rank=rank) for i, rank in enumerate(ranks)]
    whole = AblationRun([], sites, rate([0.9] * 4, EPSILON), None, None, [])
    found = verdicts([whole, replace(whole, without=["mlp"])], is_causal=False)
    assert any("79%" in v.observed for v in found if v.measure == "affine_rank")


def site(block: int | None, distance: float, *, rank: float) -> SiteRecord:
    def one(value: float) -> Statistic:
        return Statistic(value, value, value, 4)

    return SiteRecord(
        site="embedding" if block is None else f"block.{block}",
        block=block,
        stack=None,
        rank=one(rank),
        affine_rank=one(rank),
        attainable_rank=one(10),
        attainable_affine_rank=one(10),
        effective_rank=None,
        stable_rank=None,
        participation_ratio=None,
        consensus_distance=one(distance),
        token_similarity=None,
    )


def test_the_loss_of_an_encoder_decoder_is_that_of_the_decoders_tokens() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.randint(1, 40, (3, 9)), "decoder_input_ids": torch.randint(1, 40, (3, 6))}
    found = uc.ablate(model, batches=[batch], without=[("mlp",)]).record.runs[0].loss
    with torch.no_grad():
        log_shares = model(**batch).logits.double().log_softmax(-1)[:, :-1]
    expected = -log_shares.gather(-1, batch["decoder_input_ids"][:, 1:, None]).mean()
    assert found is not None
    assert found.mean == pytest.approx(float(expected), rel=1e-5)


def test_what_was_seen_before_a_pass_began_anew_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second batch the model takes another way, is proved anew, and the pass begins with the first batch again."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_head=4, n_layer=2, n_positions=32)
    model, batches = transformers.GPT2LMHeadModel(config).eval(), [text_batch(4, 9), text_batch(3, 7)]
    expected = uc.ablate(model, batches=batches, without=[("mlp",)]).record.runs
    captured, passes = preparation.capture, [0]

    def capture(model: Any, batches: Any, *given: Any, **options: Any) -> Any:
        passes[0] += 1
        if passes[0] > 1:
            return captured(model, batches, *given, **options)
        captured(model, batches[:1], *given, **options)
        changed = ChangedPath("another way")
        changed.batch = batches[1]
        raise changed

    monkeypatch.setattr(preparation, "capture", capture)
    assert uc.ablate(model, batches=batches, without=[("mlp",)]).record.runs == expected
    passes[0] = 0
    pooler = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
        )
    ).eval()
    corpus = [entry for entry in uc.diagnose(pooler, batches=batches).record.corpus if entry.pooling == "own"]
    assert [entry.points for entry in corpus] == [7]
    assert passes[0] > 1


class _TokenFirst(nn.Module):
    """Tokens come before sequences in the stream, in the output where `turns` is False."""

    def __init__(self, *, turns: bool, vectors: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.turns = nn.Linear(16, 16) if vectors else nn.Embedding(30, 16), turns
        self.qkv, self.out, self.mlp = (nn.Linear(16, n) for n in (48, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 1, 3, 0, 4)
        x = x + self.out(((q @ k.mT).softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2))
        x = x + self.mlp(x).relu()
        return x.transpose(0, 1) if self.turns else x


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_the_output_s_turn_is_a_sequence_s_whichever_axis_holds_it(turns: bool, vectors: bool) -> None:
    """As many sequences as tokens: their sizes do not tell which is which, in the output or on the way there."""
    model = _TokenFirst(turns=turns, vectors=vectors).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 6, 16, generator=generator) if vectors else torch.randint(30, (6, 6), generator=generator)
    run = uc.ablate(model, batches=[{"x": x}], without=[("mlp",)]).runs[1]
    with torch.no_grad():
        whole = model(x)
        for weights in model.mlp.parameters():
            weights.zero_()
        left = model(x)
    means = [(t if turns else t.transpose(0, 1)).double().mean(1) for t in (whole, left)]
    expected = 1 - torch.cosine_similarity(*means, dim=-1)
    assert run.output_shift is not None
    assert run.output_shift.mean == pytest.approx(float(expected.mean()), rel=1e-5)
    assert run.output_shift.n == 6


class _OtherRows(nn.Module):
    """What it returns has other rows than its tokens: `every` second one, the `first` three, or one number for each."""

    def __init__(self, rows: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.bert = rows, FAMILIES["bert"].build()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        vectors = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"every": vectors[:, ::2], "first": vectors[:, :3], "number": vectors[..., 0]}[self.rows]


@pytest.mark.parametrize("rows", ["every", "first", "number"])
def test_which_rows_of_another_output_are_padding_is_not_guessed(rows: str) -> None:
    batch = {"input_ids": torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(0))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model = _OtherRows(rows).eval()
    whole = uc.ablate(model, batches=[batch], without=[("mlp",)]).runs[1]
    assert whole.output_shift is not None
    batch["attention_mask"][0, 5:] = 0
    padded = uc.ablate(model, batches=[batch], without=[("mlp",)]).runs[1]
    assert padded.output_shift is None
    assert padded.unavailable["output_shift"] == "which rows of the output are padding is not known"
