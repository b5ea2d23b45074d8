"""The four symmetries of a record: order parameters against figures written out by hand, components against known models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.judgement.order_parameters import Components, symmetry_records
from uncollapse.records.common import PHENOMENA, Statistic
from uncollapse.records.diagnosis import AttentionRecord, DiagnosisRecord
from uncollapse.records.symmetries import SymmetryRecord, WidthScaling

NONE = Components(residuals=0, mlps=0, is_causal=False, takes_positions=False, bounds_logits=False, is_gated=False)


@pytest.fixture(scope="module")
def record() -> DiagnosisRecord:
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    return uc.diagnose(FAMILIES["llama"].build(), batches=[{"input_ids": ids}]).record


def by_phenomenon(record: DiagnosisRecord) -> dict[str, SymmetryRecord]:
    return {s.phenomenon: s for s in record.symmetries}


def test_there_are_four_each_along_the_whole_depth(record: DiagnosisRecord) -> None:
    assert [s.phenomenon for s in record.symmetries] == list(PHENOMENA)
    for symmetry in record.symmetries:
        embedding = ["embedding"] * (symmetry.phenomenon == "rank-collapse-depth")
        assert symmetry.places == [*embedding, "block.0", "block.1", "block.2"]
        assert len(symmetry.order_parameter) == len(symmetry.places)
        assert symmetry.collapsed_value == 0


def test_order_parameters_are_the_measures_named(record: DiagnosisRecord) -> None:
    found = by_phenomenon(record)
    entropies = [
        [r.normalized_entropy.mean for r in record.attention if r.block == b and r.normalized_entropy] for b in range(3)
    ]
    overlaps = [h.write_space_overlap for h in record.heads]
    for b in range(3):
        frozen, uniform = (found[p].order_parameter[b] for p in ("entropy-collapse", "rank-collapse-width"))
        assert frozen is not None
        assert uniform is not None
        assert (frozen.min, frozen.max, frozen.n) == (min(entropies[b]), max(entropies[b]), 4)
        assert uniform.mean == pytest.approx(1 - sum(entropies[b]) / 4)
        assert uniform.min == pytest.approx(1 - max(entropies[b]))
        matrix = overlaps[b]
        assert matrix is not None
        pairs = [1 - matrix[g][h] for g in range(4) for h in range(4) if g < h]
        apart = found["head-channel-non-identifiability"].order_parameter[b]
        assert apart is not None
        assert (apart.n, apart.min) == (6, min(pairs))
        assert apart.mean == pytest.approx(sum(pairs) / 6)
    assert found["rank-collapse-depth"].order_parameter == [s.consensus for s in record.trajectory]


def test_what_was_not_measured_says_so(record: DiagnosisRecord) -> None:
    for symmetry in record.symmetries:
        assert symmetry.equivariance_defect is None
        assert symmetry.unavailable["equivariance_defect"] == "measured by `uncollapse symmetries`"
        assert symmetry.slope is None
        assert "slope" in symmetry.unavailable
    empty = symmetry_records([], [], [], NONE)
    assert all(s.unavailable["order_parameter"] for s in empty)


def components(model: nn.Module) -> Components:
    ids = torch.arange(1, 9)[None]
    return Components.of(model.eval(), proved_anatomy(model.eval(), {"input_ids": ids}))


def test_components_are_those_of_the_architecture() -> None:
    assert components(FAMILIES["bert"].build()) == Components(6, 3, False, True, False, False)
    assert components(FAMILIES["llama"].build()) == Components(6, 3, True, True, False, False)
    assert components(FAMILIES["gpt_neox"].build()).residuals == 3  # attention and MLP share an addition
    assert components(FAMILIES["gemma3"].build()).bounds_logits  # it norms its queries and keys
    assert not components(FAMILIES["t5_encoder"].build()).takes_positions


@pytest.mark.parametrize(
    ("component", "phenomenon", "kind", "word"),
    [
        ({"residuals": 2}, "rank-collapse-depth", "stabilisers", "2 residual additions"),
        ({"mlps": 1}, "rank-collapse-depth", "stabilisers", "1 MLP"),
        ({"is_causal": True}, "rank-collapse-depth", "breakers", "mask"),
        ({"takes_positions": True}, "rank-collapse-depth", "breakers", "positions"),
        ({"is_causal": True}, "rank-collapse-width", "breakers", "mask"),
        ({"is_gated": True}, "head-channel-non-identifiability", "breakers", "position gates"),
        ({"bounds_logits": True}, "entropy-collapse", "stabilisers", "query-key norm"),
    ],
)
def test_each_component_is_named_where_it_acts_and_only_if_present(
    component: dict[str, int], phenomenon: str, kind: str, word: str
) -> None:
    def words(of: Components) -> list[str]:
        (found,) = (s for s in symmetry_records([], [], [], of) if s.phenomenon == phenomenon)
        return list(getattr(found, kind))

    assert word in words(Components(**{**vars(NONE), **component}))
    assert word not in words(NONE)


def attention(block: int, kind: Any, *entropies: float | None) -> list[AttentionRecord]:
    """The heads of one call, by their normalised entropy."""
    known = [None if e is None else Statistic(e, e, e, 2) for e in entropies]
    return [AttentionRecord(block, head, None, kind, None, each, None, None) for head, each in enumerate(known)]


def test_heads_of_one_call_are_taken_together_and_those_without_a_figure_left_out() -> None:
    """Self- and cross-attention of a block are two calls; each order parameter is its mean, least and largest head."""
    heads = [*attention(0, "self", 0.25, None, 0.75), *attention(0, "cross", 0.5), *attention(1, "self", None)]
    found = {s.phenomenon: s for s in symmetry_records([], heads, [], NONE)}
    uniform, frozen = found["rank-collapse-width"], found["entropy-collapse"]
    assert uniform.places == frozen.places == ["block.0", "block.0.cross", "block.1"]
    assert frozen.order_parameter == [Statistic(0.5, 0.25, 0.75, 2), Statistic(0.5, 0.5, 0.5, 1), None]
    assert uniform.order_parameter == frozen.order_parameter  # 1/4 and 3/4 are each other's distance from 1
    assert uniform.unavailable.keys() == {"equivariance_defect", "slope"}
    (alone,) = (
        s for s in symmetry_records([], attention(0, "self", 0.25), [], NONE) if s.phenomenon == uniform.phenomenon
    )
    assert alone.order_parameter == [Statistic(0.75, 0.75, 0.75, 1)]


def width_scaling(slope: float | None) -> WidthScaling:
    return WidthScaling(0, None, "self", [8, 16], [None, None], slope, None, None, "")


def test_only_collapse_in_width_has_a_slope_along_the_length() -> None:
    scaling = [width_scaling(-0.5), width_scaling(None), width_scaling(0.25)]
    for symmetry in symmetry_records([], [], [], NONE, scaling):
        if symmetry.phenomenon == "rank-collapse-width":
            assert symmetry.slope == Statistic(-0.125, -0.5, 0.25, 2)
            assert symmetry.scaling == scaling
            assert "slope" not in symmetry.unavailable
        else:
            assert (symmetry.slope, symmetry.scaling) == (None, [])
            assert symmetry.unavailable["slope"] == "only collapse in width depends on the context length"
    (unknown,) = (s for s in symmetry_records([], [], [], NONE, scaling[1:2]) if s.phenomenon == "rank-collapse-width")
    assert (unknown.slope, unknown.unavailable["slope"]) == (None, "measured with --context-lengths")
