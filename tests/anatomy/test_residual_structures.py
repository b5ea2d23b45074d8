"""Residual streams as people write them: read, proved, measured and taken away, against what each model records itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import uncollapse as uc
from tests.helpers.observing import observe
from tests.helpers.residual_structures import STRUCTURES, Owned
from tests.reference.geometry import consensus_distance, effective_rank
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.sites import PLAIN_MEASURES

EPS = 2.0**-23
structures = pytest.mark.parametrize("name", STRUCTURES)


def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))


def own_streams(model: Owned, batch: dict[str, Tensor]) -> list[np.ndarray]:
    model.seen.clear()
    with torch.no_grad():
        model(**batch)
    return [stream.double().numpy() for stream in model.seen]


@structures
def test_every_block_is_found_and_its_stream_measured_where_the_model_has_it(name: str) -> None:
    model, batch = STRUCTURES[name]().eval(), {"idx": tokens()}
    streams = own_streams(model, batch)
    anatomy = proved_anatomy(model, batch)
    assert [[p.kind for p in b.parts] for b in anatomy.blocks] == [["attention", "mlp"]] * (len(streams) - 1)
    observed = observe(model, [batch])
    assert len(observed.sites) == len(streams)
    for site, stream in zip(observed.sites, streams, strict=True):
        for measure, reference in (("consensus_distance", consensus_distance), ("effective_rank", effective_rank)):
            got = site.plain.summary(PLAIN_MEASURES.index(measure))[0]
            assert got == pytest.approx(np.mean([reference(x, EPS) for x in stream]), rel=1e-4), (site.site, measure)


@structures
@pytest.mark.parametrize("gone", [("mlp",), ("attention",), ("attention", "mlp")], ids="+".join)
def test_what_is_taken_away_is_what_the_model_leaves_out_itself(name: str, gone: tuple[str, ...]) -> None:
    model, batch = STRUCTURES[name]().eval(), {"idx": tokens()}
    with torch.no_grad():
        whole = model(**batch)
        model.off = set(gone)
        expected = model(**batch)
        model.off = set()
        with uc.without(model, *gone, batch=batch):
            got = model(**batch)
        assert torch.equal(model(**batch), whole)
    assert torch.equal(got, expected)
    assert not torch.equal(got, whole)


@structures
def test_a_full_diagnosis_runs(name: str) -> None:
    model, batch = STRUCTURES[name]().eval(), {"idx": tokens()}
    found = uc.diagnose(model, batches=[batch], level="full")
    assert all(u.relative_norm is not None for u in found.record.updates)
    assert all(a.entropy is not None for a in found.record.attention)
