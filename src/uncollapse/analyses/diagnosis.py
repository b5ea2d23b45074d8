"""`diagnose`: which collapse, where, and what to do about it. The main job of the package in one call.

The input is a model and some text, or ready batches of any modality. The anatomy is proved, one probe pass measures, the rules
judge. The result is a `Diagnosis` that can be shown, written to a file, and read again a year later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from torch import nn

from uncollapse.analyses.anatomy_recording import anatomy_record
from uncollapse.analyses.preparation import Prepared, ProbeOptions, prepare
from uncollapse.analyses.recording import (
    attention_records,
    corpus_records,
    model_info,
    probe_record,
    site_records,
    versions,
)
from uncollapse.analyses.result import Recorded
from uncollapse.anatomy.interception import Point
from uncollapse.judgement import findings
from uncollapse.judgement.identifiability import heads_records, weights_reader
from uncollapse.judgement.order_parameters import Components, symmetry_records
from uncollapse.measures.shared_out import threads_kept
from uncollapse.probe.activity import embedding_records, part_records
from uncollapse.probe.context_lengths import require_context_lengths, width_scaling
from uncollapse.probe.initialisation import WeightEvidence
from uncollapse.probe.logit_bounds import LogitBound, LogitBounds
from uncollapse.probe.own_pooling import OwnPooling
from uncollapse.probe.passes import Level, Observations
from uncollapse.probe.routing import router_records
from uncollapse.probe.sublayers import norm_records, update_records
from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import DIAGNOSIS_SCHEMA, DiagnosisRecord, SiteRecord
from uncollapse.restoring import leaves_no_trace

# Uniform attention, and sublayers that start at zero.
AS_AT_THE_START = ("rank-collapse-depth", "rank-collapse-width", "dead-component")


@dataclass(frozen=True, repr=False)
class Diagnosis(Recorded[DiagnosisRecord]):
    """What `diagnose` found. `record` has all of it, as data."""

    @property
    def findings(self) -> list[Finding]:
        """The rules that fired, most severe first."""
        return self.record.findings

    @property
    def trajectory(self) -> list[SiteRecord]:
        """The token cloud along depth: the embedding, then each block's output."""
        return self.record.trajectory


@leaves_no_trace
def diagnose(
    model: nn.Module | str | Path = "demo",
    texts: Iterable[str] | None = None,
    *,
    level: Level = "core",
    context_lengths: Sequence[int] | None = None,
    **probe: Unpack[ProbeOptions],
) -> Diagnosis:
    """Diagnose a model on some text, or on batches of any modality.

    model: a loaded `nn.Module`, a hub id, a local directory, or `"demo"` (the packaged MiniLM).
    texts: one sequence each. Default, if `batches` are not given either: English prose from Python's own documentation.
    level: `"core"`, or `"full"` to measure contraction, spectral gap and susceptibility too.
    context_lengths: lengths in tokens at which to fit how the second singular value of each attention falls (`symmetries`).

    Options shared with `ablate`, `identify` and `symmetries` (`help(uncollapse.analyses.preparation.ProbeOptions)`):
    text: tokenizer, batches, sequences, max_tokens=128, batch_size=16, seed=0;
    model: layout, name, device, dtype, device_map, max_memory, trust_remote_code=False, max_parameters=2000000000000;
    run: command, progress, alone=False.

    The model is left unchanged: its hooks, its mode, every bit of its output.
    Raises `InputError` for input that cannot be used, `TypeError` for an unknown option, and `UnsupportedModel` where the
    anatomy cannot be proved.
    """
    lengths = None if context_lengths is None else require_context_lengths(context_lengths)
    prepared = prepare(diagnose, model, texts, probe, level=level, forecasts=True)
    with threads_kept():
        return Diagnosis(observe(prepared, context_lengths=lengths), prepared.is_first)


# Records ------------------------------------------------------------------------------------------------------------


def observe(prepared: Prepared, *, context_lengths: Sequence[int] | None = None) -> DiagnosisRecord:
    """One probe pass and one pass per context length, as one record with its findings."""
    model, batch = prepared.loaded.model, prepared.batches[0]
    bounds: LogitBounds
    pooling: OwnPooling
    weights: WeightEvidence

    def begin() -> None:
        nonlocal bounds, pooling, weights
        pooling = OwnPooling(prepared.seed)
        weights = WeightEvidence(model, prepared.anatomy)
        forecast = prepared.forecast
        bounds = LogitBounds(model, prepared.anatomy, batch, None if forecast is None else forecast.example)
        if not prepared.shares_a_reading:  # before the pass, so that whoever watches the model sees the text last
            bounds.make()

    def beside() -> list[Callable[[], object]]:
        return [*bounds.passes(), *pooling.passes(model, batch, prepared.anatomy)]

    def leaving(stage: nn.Module, observed: Observations) -> None:
        """Ask the weights that are held now what may be asked of them later, so that they need not be read again."""
        bounds.note(stage)
        inside = {id(module) for module in stage.modules()}
        for number, block in enumerate(prepared.anatomy.blocks):
            if id(model.get_submodule(block.module.name)) in inside:
                weights.note_sizes(number)
                if number in _doubtful_so_far(observed, number, prepared.level):
                    weights.note(number)

    observed = prepared.captured(
        level=prepared.level,
        digest=weights_reader(model),
        progress=prepared.progress,
        begin=begin,
        beside=beside,
        on_output=lambda batch, output: pooling.take(batch, output),
        leaving=leaving,
    )
    pooling.unite("diagnose")
    found = bounds.found()  # by all processes: they may have to gather weights for it
    return prepared.judged(lambda: _judged(prepared, observed, pooling, weights, found, context_lengths))


def _doubtful(found: Sequence[Finding]) -> list[int]:
    """The blocks where something looks as at the start of training. Only there the weights are asked whether it is the start."""
    return [f.block for f in found if f.block is not None and f.phenomenon in AS_AT_THE_START]


def _doubtful_so_far(observed: Observations, number: int, level: Level) -> list[int]:
    """The same, from what was seen until this block had run."""
    sites = [site for site in observed.sites if site.plain.count.any()]
    attention = [record for s in observed.attention if s.block == number for record in attention_records(s, level)]
    parts = [part for part in part_records(observed.parts) if part.block == number]
    return _doubtful(findings.findings(site_records(sites), attention, [], parts))


def _judged(
    prepared: Prepared,
    observed: Observations,
    pooling: OwnPooling,
    weights: WeightEvidence,
    bounds: Mapping[tuple[int, Point], LogitBound],
    context_lengths: Sequence[int] | None,
) -> DiagnosisRecord:
    progress = prepared.progress
    model, anatomy = prepared.loaded.model, prepared.anatomy
    scaling = []
    if context_lengths is not None:
        scaling = width_scaling(
            model, anatomy, prepared.batches, context_lengths, seed=prepared.seed, progress=progress
        )
    trajectory = site_records(observed.sites)
    own = pooling.statistics(model, prepared.batches[0], observed.sequences, prepared.anatomy)
    corpus = corpus_records([*observed.corpus, *own])
    attention = [
        record
        for s in observed.attention
        for record in attention_records(s, prepared.level, bounds.get((s.block, s.call.product)))
    ]
    head_records = heads_records(observed.attention, model)
    updates = update_records(observed.updates)
    parts, embeddings = part_records(observed.parts), embedding_records(observed.embeddings)
    seen = weights.of(_doubtful(findings.findings(trajectory, attention, head_records, parts, embeddings, corpus)))
    parts = [
        replace(part, initial=seen[part.block].initial, initial_evidence=seen[part.block].reason)
        if part.block in seen
        else part
        for part in parts
    ]
    described = probe_record(prepared, observed)
    described.options["context_lengths"] = None if context_lengths is None else list(context_lengths)
    return DiagnosisRecord(
        schema=DIAGNOSIS_SCHEMA,
        versions=versions(),
        model=model_info(prepared, observed),
        probe=described,
        trajectory=trajectory,
        attention=attention,
        heads=head_records,
        norms=norm_records(observed.norms),
        updates=updates,
        symmetries=symmetry_records(trajectory, attention, head_records, Components.of(model, anatomy), scaling),
        findings=findings.findings(trajectory, attention, head_records, parts, embeddings, corpus),
        anatomy=anatomy_record(anatomy, observed, updates),
        parts=parts,
        embeddings=embeddings,
        corpus=corpus,
        routers=router_records(observed.routers),
    )
