"""Records as `uncollapse heads` would write them, from drawn output projections: for tests of what is drawn from records.

`mixed` has one block of each verdict and heads that are copies in the last; `deep` is 30 blocks of 32 heads, the most a page has to
bear; `crossed` an encoder and a decoder with a projection that could not be read; `single` one block of one head; `healthy`
and `forced` are attributable everywhere and nowhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.helpers import records_samples as samples
from tests.reference import identifiability as reference
from uncollapse.measures.random_projections import beside_random, random_noise_gain
from uncollapse.records.common import Finding, Statistic
from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.records.heads import IdentifiabilityRecord

COPIES = Finding(
    code="HEADS-IDENTICAL",
    phenomenon="head-channel-non-identifiability",
    severity="warning",
    block=2,
    head=7,
    value=1.0,
    threshold=0.99,
    message="Heads 3 and 7 of block 2 write into the same space.",
    remedy="Attribute to the pair.",
    reference="Cirrincione 2026, arXiv 2604.23681",
    kind="self",
)
NO_MATRIX = "the output projection is not an affine map"


def verdict(kernel: int, gain: float | None, random: list[float] | None = None) -> str:
    if kernel:
        return f"not attributable (kernel {kernel})"
    if gain is None:
        return "not attributable (write spaces dependent to within rounding)"
    beside = f", {beside_random(gain, random)}" if random else ""
    return "attributable" if gain <= 10 else f"attributable with care (noise gain {gain:.3g}{beside})"


def heads_record(block: int, W: np.ndarray, heads: int, rng: np.random.Generator, **place: Any) -> HeadsRecord:
    """The record of one projection W [mixed, width], its figures from the reference, its shares drawn."""
    found = reference.figures(W, heads, eps=torch.finfo(torch.float32).eps)
    mixed, width = W.shape
    angles = np.arccos(np.clip(found.pop("cosine_of_smallest_angle"), 0, 1))
    gains = found["head_noise_gain"]
    unavailable: dict[str, str] = {}
    if found["condition_number"] is None:
        dependent = "the heads' write spaces are linearly dependent: infinite"
        unavailable |= dict.fromkeys(["condition_number", "absolute_noise_gain"], dependent)
    if None in gains:
        unavailable["head_noise_gain"] = "infinite: other heads can write part of what this head writes"
    rank = min(57, mixed, width)
    together, single = ([*p] if np.isfinite(p).all() else None for p in random_noise_gain(heads, mixed // heads, width))
    if together is None:
        wider = "the heads are together wider than the stream: infinite for any weights"
        unavailable |= dict.fromkeys(["random_noise_gain", "random_head_noise_gain"], wider)
    return HeadsRecord(
        block=block,
        stack=place.get("stack"),
        kind=place.get("kind", "self"),
        heads=heads,
        head_width=mixed // heads,
        ambiguous_degrees_of_freedom=(heads - 1) * mixed // heads,
        gauge_dimension=mixed * mixed // heads,
        energy_share=[Statistic(s, 0.7 * s, 1.4 * s, 64) for s in rng.dirichlet(np.full(heads, 3.0)).tolist()],
        verdict=verdict(found["kernel_dimension"], found["condition_number"], together),
        tokens=57,
        factorization_ambiguity=57 * mixed + mixed * width - rank * (57 + width - rank),
        smallest_principal_angle=angles.tolist(),
        head_verdict=[verdict(0, gain, single) for gain in gains],
        random_noise_gain=together,
        random_head_noise_gain=single,
        unavailable=unavailable,
        **found,
    )


def drawn(heads: int, head_width: int, width: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((heads * head_width, width))


def identifiability(heads: list[HeadsRecord], name: str = "all-MiniLM-L6-v2", **changes: Any) -> IdentifiabilityRecord:
    base = samples.encoder(name)
    probe = replace(base.probe, command="uncollapse heads demo --html heads.html")
    first = heads[0]
    model = replace(
        base.model,
        blocks=1 + max(h.block for h in heads),
        heads=first.heads,
        key_value_heads=first.heads,
        width=first.width,
        head_width=first.head_width,
    )
    record = IdentifiabilityRecord(
        schema="uncollapse/heads/1", versions=base.versions, model=model, probe=probe, heads=heads, findings=[]
    )
    return replace(record, **changes)


def mixed(name: str = "all-MiniLM-L6-v2") -> IdentifiabilityRecord:
    """Three blocks of 8 heads: yes, with care, no; in the last, heads 3 and 7 are copies."""
    rng = np.random.default_rng(0)
    wide, narrow, copied = drawn(8, 4, 72, rng), drawn(8, 4, 32, rng), drawn(8, 4, 72, rng)
    copied[28:32] = copied[12:16]
    records = [heads_record(b, W, 8, rng) for b, W in enumerate((wide, narrow, copied))]
    return identifiability(records, name, findings=[COPIES])


def healthy() -> IdentifiabilityRecord:
    rng = np.random.default_rng(1)
    return identifiability([heads_record(b, drawn(6, 4, 64, rng), 6, rng) for b in range(4)])


def forced() -> IdentifiabilityRecord:
    """Heads that are together wider than the stream."""
    rng = np.random.default_rng(2)
    return identifiability([heads_record(b, drawn(4, 16, 32, rng), 4, rng) for b in range(4)])


def single() -> IdentifiabilityRecord:
    rng = np.random.default_rng(3)
    return identifiability([heads_record(0, drawn(1, 16, 32, rng), 1, rng)])


def crossed() -> IdentifiabilityRecord:
    """Two encoder blocks, two decoder blocks with cross-attention; one cross-attention could not be read, one head is silent."""
    rng = np.random.default_rng(4)
    calls = [
        *((b, "encoder", "self") for b in (0, 1)),
        *((b, "decoder", k) for b in (2, 3) for k in ("self", "cross")),
    ]
    records = [heads_record(b, drawn(4, 8, 64, rng), 4, rng, stack=s, kind=k) for b, s, k in calls]
    always = {"block", "stack", "kind", "heads", "head_width", "width", "ambiguous_degrees_of_freedom", "unavailable"}
    keys = [key for key in vars(records[3]) if key not in always]
    absent: dict[str, Any] = dict.fromkeys(keys)
    records[3] = replace(records[3], **absent, unavailable=dict.fromkeys(keys, NO_MATRIX), width=0)
    angles = records[5].smallest_principal_angle
    assert angles is not None
    silent = [[None if 2 in (g, h) else a for g, a in enumerate(row)] for h, row in enumerate(angles)]
    records[5] = replace(
        records[5], smallest_principal_angle=silent, unavailable={"smallest_principal_angle": "a head writes nothing"}
    )
    return identifiability(records)


def deep() -> IdentifiabilityRecord:
    """30 blocks of 32 heads, made up: the gains fall with depth."""
    rng = np.random.default_rng(5)
    records = []
    for block in range(30):
        overlap = np.clip(0.1 + 0.05 * rng.standard_normal((32, 32)), 0.01, 1)
        angle = np.clip(0.8 + 0.2 * rng.standard_normal((32, 32)), 0.01, 1.5)
        overlap, angle = (overlap + overlap.T) / 2, (angle + angle.T) / 2
        np.fill_diagonal(overlap, 1.0)
        np.fill_diagonal(angle, 0.0)
        gain = 40.5 - block
        gains = (1 + (gain - 1) * rng.random(32)).tolist()
        records.append(
            HeadsRecord(
                block=block,
                stack=None,
                kind="self",
                heads=32,
                head_width=64,
                width=2048,
                ambiguous_degrees_of_freedom=31 * 64,
                kernel_dimension=0,
                gauge_dimension=32 * 64**2,
                output_projection_rank=2048,
                condition_number=gain,
                absolute_noise_gain=gain / 1.9,
                random_noise_gain=[*random_noise_gain(32, 64, 2048).together],
                random_head_noise_gain=[*random_noise_gain(32, 64, 2048).single],
                write_space_overlap=overlap.tolist(),
                energy_share=[Statistic(s, 0.7 * s, 1.4 * s, 64) for s in rng.dirichlet(np.full(32, 3.0)).tolist()],
                verdict=verdict(0, gain, [*random_noise_gain(32, 64, 2048).together]),
                tokens=57,
                contribution_ambiguity=0,
                factorization_ambiguity=2048**2,
                smallest_principal_angle=angle.tolist(),
                head_noise_gain=gains,
                head_verdict=[verdict(0, one, [*random_noise_gain(32, 64, 2048).single]) for one in gains],
            )
        )
    return identifiability(records)
