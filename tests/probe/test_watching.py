"""What a pass watches: each observer can be left out, and what the others say stays the same to the last bit."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import uncollapse as uc
from tests.helpers.observing import observe
from tests.helpers.tiny_models import FAMILIES, text_batch
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.measures import geometry, mixing
from uncollapse.measures.running import Running
from uncollapse.probe import projections, sites
from uncollapse.probe.attention import ATTENTION_MEASURES
from uncollapse.probe.corpus import CorpusStatistics
from uncollapse.probe.passes import WATCHED, Observations, Watched, capture

ROWS = ["entropy", "normalized_entropy", "entropy_floor", "max_logit", "rest_entropy", "keys_within_reach"]
ROWS += ["key_share", "susceptibility"]
SPECTRA = ["contraction", "spectral_gap", "second_singular_value"]


def built(family: str) -> nn.Module:
    return FAMILIES[family].build().eval()


def padded() -> list[dict[str, torch.Tensor]]:
    batches = [text_batch(seed=s) for s in range(2)]
    batches[0]["attention_mask"][0, -3:] = 0
    return batches


def told(running: Running) -> list[torch.Tensor]:
    return [t.nan_to_num(nan=-1.0) if t.is_floating_point() else t for t in (running.total, running.count)]


def clouded(statistics: CorpusStatistics) -> list[torch.Tensor]:
    cloud = statistics.cloud
    return [] if cloud is None else [cloud.mean, cloud.unit, cloud.points]


def figures(observed: Observations) -> dict[str, Any]:
    """By what has to be watched for it."""
    found: dict[str, Any] = {
        "sites": [told(s.plain) + told(s.massive) + told(s.stream) for s in observed.sites],
        "attention": [[(a.deviation, a.row_sums, a.forbids, a.finite)] for a in observed.attention],
        "corpus": [clouded(c) for c in observed.corpus if c.pooling != "tokens"],
        "all tokens": [clouded(c) for c in observed.corpus if c.pooling == "tokens"],
        "routers": [r.load.tolist() for r in observed.routers],
        "rows": [],
        "spectra": [],
        "projections": [told(a.energy) + told(a.tokens) for a in observed.attention],
        # What it says about heads comes by way of "attention" and "projections".
        "parts": [(p.update_size, p.update.share(), p.block_change, p.units.dead(p.epsilon)) for p in observed.parts],
        "sublayers": [told(u.values) for u in observed.updates] + [told(n.values) for n in observed.norms],
    }
    for statistics in observed.attention:
        for name, measures in {"rows": ROWS, "spectra": SPECTRA, "attention": ["value_contraction"]}.items():
            rows = [ATTENTION_MEASURES.index(measure) for measure in measures]
            found[name].append([t[rows] for t in told(statistics.values)])
    return found


def are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("left_out", sorted(WATCHED["full"] - {"routers"}))  # these models have none
@pytest.mark.parametrize("family", ["albert", "llama"])
def test_what_is_left_out_changes_nothing_else(family: str, left_out: Watched) -> None:
    model, batches = built(family), padded()
    everything = observe(model, batches, level="full")
    gone: set[Watched] = {left_out, "rows", "spectra"} if left_out == "attention" else {left_out}
    rest = observe(model, batches, level="full", watch=WATCHED["full"] - gone)
    expected, got = figures(everything), figures(rest)
    for name in WATCHED["full"]:
        assert are_equal(got[name], expected[name]) == (name not in gone), name
    assert (rest.sequences, rest.tokens, rest.max_tokens) == (
        everything.sequences,
        everything.tokens,
        everything.max_tokens,
    )
    assert [s.width for s in rest.sites] == [s.width for s in everything.sites]


def test_what_is_not_finite_is_counted_without_measuring_clouds() -> None:
    model, batches = built("llama"), padded()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    counts = [s.not_finite for s in observe(model, batches, watch=()).sites]
    assert counts == [s.not_finite for s in observe(model, batches).sites] == [0, 0, 6, 6]


def test_padding_that_is_not_finite_is_not_counted() -> None:
    cloud = torch.zeros(2, 3, 4)
    cloud[0, 2], cloud[1, 0, 0] = math.nan, 3e38
    cloud[1, 0, 1] = 3e38  # their sum overflows
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert sites.count_not_finite(cloud, mask) == 0
    assert sites.count_not_finite(cloud, None) == 1


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("measured for nothing")


def test_identify_measures_no_token_cloud_and_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = built("llama"), padded()
    for measure in ("cloud_measures", "consensus_after_norm", "stream_carried"):
        monkeypatch.setattr(geometry, measure, refuse)
    for measure in ("row_statistics", "row_statistics_from_weights"):
        monkeypatch.setattr(mixing, measure, refuse)
    assert uc.identify(model, batches=batches).heads[0].energy_share is not None


def test_ablate_measures_no_row_and_no_energy_but_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = built("llama"), padded()
    energies: list[int] = []
    sizes = projections.written_sizes

    def counted(*given: Any, **named: Any) -> torch.Tensor:
        energies.append(1)
        return sizes(*given, **named)

    monkeypatch.setattr(projections, "written_sizes", counted)
    decomposed: list[int] = []
    decompose = mixing.leading_singular_values

    def noted(weights: torch.Tensor) -> torch.Tensor:
        decomposed.append(1)
        return decompose(weights)

    monkeypatch.setattr(mixing, "leading_singular_values", noted)
    for measure in ("row_statistics", "row_statistics_from_weights"):
        monkeypatch.setattr(mixing, measure, refuse)
    runs = uc.ablate(model, batches=batches, level="full").runs
    assert all(c is not None and c.n for run in runs for c in run.attention_contraction)
    assert len(energies) == len(batches) * 3  # one pass, three blocks
    assert len(decomposed) <= 3 * len(batches[0]["input_ids"])  # once, with all tokens made equal, on one batch


def test_a_probe_keeps_no_model_alive() -> None:
    model, batches = built("bert"), padded()
    anatomy = proved_anatomy(model, batches[0])
    gc.collect()
    gc.disable()
    try:
        observed = capture(model, batches, anatomy, level="full")
        alive = weakref.ref(model.encoder.layer[0].attention.output.dense)
        uc.forget(model)
        del model, anatomy
        assert alive() is None
        assert observed.sites
    finally:
        gc.enable()
