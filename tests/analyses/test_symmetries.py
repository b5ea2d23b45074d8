"""The groups acting on live models, against what is known of each architecture, and against defects computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES as REAL
from tests.helpers.families import inputs_for
from tests.helpers.tiny_models import FAMILIES
from uncollapse.analyses.symmetries import QUERY_KEY
from uncollapse.records.common import PHENOMENA
from uncollapse.records.symmetries import SymmetriesRecord, SymmetryTest


def batches(sequences: int = 3, tokens: int = 10) -> list[dict[str, Tensor]]:
    """Two lengths, padded on the right."""
    ids = torch.randint(1, 64, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


def lively(build: Callable[[], nn.Module], **settings: Any) -> nn.Module:
    """A tiny model in float64 whose weights are large enough for attention to matter: as built, all attention is uniform."""
    model = build().double().eval()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=draws, dtype=torch.float64) * parameter.shape[-1] ** -0.5
                )
    return model


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_softmax_in_single_precision_breaks_no_symmetry_of_a_model_in_double(backend: str) -> None:
    """Llama's own attention casts to single precision before its softmax, which is no property of the symmetry."""
    model = lively(FAMILIES["llama"].build)
    model.set_attn_implementation(backend)
    record = acted(model)
    assert [t.action for t in record.tests if t.is_symmetry and not t.holds] == []


def acted(model: nn.Module, given: list[dict[str, Tensor]] | None = None) -> SymmetriesRecord:
    return uc.symmetries(model, batches=given or batches()).record


def the(record: SymmetriesRecord, action: str, *without: str) -> SymmetryTest:
    (found,) = (t for t in record.tests if t.action == action and t.without == list(without))
    return found


EXACT = ["value-output gauge", "head permutation", "query-key gauge", "logit shift", "query-key scaling"]


@pytest.fixture(scope="module")
def records() -> dict[str, SymmetriesRecord]:
    return {family: acted(lively(FAMILIES[family].build)) for family in ("bert", "gpt2", "llama", "gemma3")}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3"])
def test_exact_symmetries_hold_to_rounding_and_the_others_do_not(
    records: dict[str, SymmetriesRecord], family: str
) -> None:
    record = records[family]
    for action in EXACT:
        test = the(record, action)
        assert test.defect is not None, (action, test.unavailable)
        if test.is_symmetry:
            assert test.defect.max < 1e-11, action
            assert test.holds is True
        else:  # a query-key norm hides a scale but for its epsilon of 1e-6
            assert (family, "query-key" in action) == ("gemma3", True)
            assert 1e-9 < test.defect.max < 1e-5
            assert test.holds is False
    scaling = the(record, "logit scaling")
    assert scaling.defect is not None
    assert scaling.defect.min > 1e-3
    assert scaling.holds is False


@pytest.mark.parametrize(
    ("family", "found"),
    [("bert", ["positions"]), ("gpt2", ["positions", "mask"]), ("llama", ["positions", "mask"])],
)
def test_the_breakers_of_the_token_permutation_are_found_by_taking_them_away(
    records: dict[str, SymmetriesRecord], family: str, found: list[str]
) -> None:
    record = records[family]
    free = the(record, "token permutation", "positions", "mask")
    assert free.holds is True
    whole = the(record, "token permutation")
    assert whole.defect is not None
    assert free.defect is not None
    assert whole.defect.min > 1e8 * free.defect.max
    depth = record.symmetries[0]
    assert depth.breakers == found
    assert depth.equivariance_defect == whole.defect


def test_keys_may_be_permuted_only_without_weights_and_mask(records: dict[str, SymmetriesRecord]) -> None:
    for family, found in (("bert", [QUERY_KEY]), ("llama", [QUERY_KEY, "mask"])):
        record = records[family]
        assert the(record, "key permutation", QUERY_KEY, "mask").holds is True
        assert record.symmetries[1].breakers == found


def test_dimensions_are_those_of_the_formulas(records: dict[str, SymmetriesRecord]) -> None:
    # THEORY: G d_k^2, and G d_k more with both biases; the query-key gauge G (r + (d_k - r)^2), keys with a bias G (d_k - r) more.
    assert the(records["bert"], "value-output gauge").dimension == 4 * 64 + 4 * 8
    assert the(records["bert"], "query-key gauge").dimension == 4 * 64 + 4 * 8
    assert the(records["llama"], "value-output gauge").dimension == 2 * 64
    assert the(records["llama"], "query-key gauge").dimension == 2 * 8
    assert the(records["llama"], "head permutation").dimension == 0
    assert "norm" in the(records["gemma3"], "query-key gauge").surviving


def test_a_defect_is_that_of_the_models_outputs() -> None:
    """Written out for one sequence: the value-output gauge fails by as much as the outputs move."""
    model = lively(FAMILIES["bert"].build)
    ids = torch.arange(5, 13)[None]
    record = acted(model, [{"input_ids": ids}])
    order = None
    with torch.no_grad():
        plain = model(input_ids=ids).last_hidden_state[0]
        defects = []
        for shift in range(1, 8):  # the order is random: the defect must be among those that some order gives
            order = torch.arange(8).roll(shift)
            moved = model(input_ids=ids[:, order]).last_hidden_state[0]
            defects.append(float((moved - plain[order]).norm() / plain.norm()))
    measured = the(record, "token permutation").defect
    assert measured is not None
    assert 0.3 * min(defects) < measured.mean < 3 * max(defects)


def test_weights_are_put_back_bit_for_bit() -> None:
    model = lively(FAMILIES["llama"].build)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = batches()[0]
    with torch.no_grad():
        output = model(**ids).last_hidden_state
    acted(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(**ids).last_hidden_state, output)


def test_what_holds_logits_down_is_named() -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 64,
    }
    config = hf.Gemma2Config(
        **small, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=5.0, max_position_embeddings=64
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    capped = acted(lively(lambda: hf.AutoModel.from_config(config)))
    assert "logit soft cap" in capped.symmetries[3].stabilisers
    plain = acted(lively(FAMILIES["llama"].build))
    assert plain.symmetries[3].stabilisers == []


def test_the_tanh_of_an_mlp_as_wide_as_there_are_tokens_is_no_cap_on_the_logits() -> None:
    """All sequences are cut to the 7 tokens of the shortest."""
    model = hf.GPT2Model(hf.GPT2Config(vocab_size=64, n_embd=24, n_head=4, n_layer=1, n_inner=7, n_positions=64))
    assert acted(model.eval()).symmetries[3].stabilisers == []


@pytest.mark.parametrize("family", ["mpnet", "bloom"])
def test_order_told_by_a_relative_bias_is_found_out(family: str) -> None:
    record = acted(lively(REAL[family].build), [inputs_for(REAL[family])])
    free = the(record, "token permutation", "positions", "mask")
    assert free.defect is not None
    assert free.defect.min > 1e-3
    assert free.holds is False
    assert "order told in another way" in record.symmetries[0].breakers


def test_where_positions_cannot_be_taken_away_the_tokens_carry_them() -> None:
    """BART learns positions and takes none from outside: permuted where they enter the blocks, its tokens are a set."""
    record = acted(lively(REAL["bart"].build), [inputs_for(REAL["bart"])])
    assert the(record, "token permutation", "positions", "mask").holds is True
    assert the(record, "token permutation", "positions", "mask").surviving.endswith("carrying its position along")
    assert record.symmetries[0].breakers == ["positions", "mask"]
    assert record.symmetries[1].breakers == [QUERY_KEY, "mask"]


def test_a_mask_that_is_added_to_a_bias_is_taken_away_and_the_bias_stays() -> None:
    record = acted(lively(REAL["t5"].build), [inputs_for(REAL["t5"])])
    tested = the(record, "token permutation", "mask")
    assert tested.unavailable == {}
    assert tested.holds is False  # the relative bias breaks it, too


def test_sinks_break_the_shift_of_logits() -> None:
    record = acted(REAL["gpt_oss"].build(), [inputs_for(REAL["gpt_oss"])])  # its experts run in single precision only
    assert the(record, "logit shift").holds is False
    assert record.symmetries[3].breakers == ["sink columns"]
    assert "sink columns" in record.symmetries[0].stabilisers


def test_images_become_tokens_inside_and_are_permuted_there() -> None:
    images = [{"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}]
    record = acted(lively(FAMILIES["vit"].build), images)
    assert "Pass token numbers or embeddings" in the(record, "token permutation").unavailable["defect"]
    assert the(record, "token permutation", "positions", "mask").holds is True
    assert all(the(record, action).holds for action in EXACT)
    assert record.symmetries[0].equivariance_defect is None
    assert "token numbers" in record.symmetries[0].unavailable["equivariance_defect"]


def test_every_phenomenon_has_its_tests_and_its_record(records: dict[str, SymmetriesRecord]) -> None:
    for record in records.values():
        assert [s.phenomenon for s in record.symmetries] == list(PHENOMENA)
        assert {t.phenomenon for t in record.tests} == set(PHENOMENA)
        assert all(s.equivariance_defect is not None for s in record.symmetries)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_in_half_precision_hides_no_break(dtype: str) -> None:
    """A level of rounding is 0.02 in bfloat16: what counts as rounding must stay far below a break of 1."""
    record = uc.symmetries("demo", sequences=4, max_tokens=32, dtype=dtype).record
    assert record.symmetries[0].breakers == ["positions"]
    assert the(record, "token permutation", "mask").holds is False
    assert the(record, "logit scaling").holds is False
    assert all(the(record, action).holds for action in EXACT)
