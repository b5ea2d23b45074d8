"""Can a result be attributed to a single head of this model? Answered for each block, from its weights and one probe pass.

This is the part of a diagnosis that is about heads, with its rules. What an observer of the layer's output cannot know depends
on the weights only. The probe just says how much each head writes.

What this cannot say: whether a head *matters*. A head that can be told from the others may do nothing, and heads that cannot be
told apart may carry the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from torch import nn

from uncollapse.analyses.anatomy_recording import anatomy_record
from uncollapse.analyses.preparation import Prepared, ProbeOptions, prepare
from uncollapse.analyses.recording import model_info, probe_record, site_records, versions
from uncollapse.analyses.result import Recorded
from uncollapse.anatomy.probing import float64_kept
from uncollapse.judgement import findings
from uncollapse.judgement.identifiability import heads_records, weights_reader
from uncollapse.probe.passes import Observations
from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.records.heads import HEADS_SCHEMA, IdentifiabilityRecord
from uncollapse.restoring import leaves_no_trace

ABOUT_HEADS = ("head-channel-non-identifiability", "numerics")


@dataclass(frozen=True, repr=False)
class Identifiability(Recorded[IdentifiabilityRecord]):
    """What `identify` found. `record` has all of it, as data."""

    @property
    def heads(self) -> list[HeadsRecord]:
        """One record per attention call, in order of depth."""
        return self.record.heads

    @property
    def findings(self) -> list[Finding]:
        """The rules that fired, most severe first."""
        return self.record.findings


@leaves_no_trace
def identify(
    model: nn.Module | str | Path = "demo",
    texts: Iterable[str] | None = None,
    **probe: Unpack[ProbeOptions],
) -> Identifiability:
    """What an observer of a block's output can know about its heads, with a verdict for each block and each head.

    model: a loaded `nn.Module`, a hub id, a local directory, or `"demo"`. texts: one sequence each (default: English prose).

    Only `energy_share` and the number of tokens n depend on the text; everything else comes from the output projections. For
    the vectors that the heads write, see `uncollapse.head_contributions`.

    Options shared with `diagnose`, each described in `help(uncollapse.analyses.preparation.ProbeOptions)`:
    text: tokenizer, batches, sequences, max_tokens=128, batch_size=16, seed=0;
    model: layout, name, device, dtype, device_map, max_memory, trust_remote_code=False, max_parameters=2000000000000;
    run: command, progress, alone=False.

    Raises `InputError` for input that cannot be used, `TypeError` for an unknown option, and `UnsupportedModel` where the
    anatomy cannot be proved.
    """
    prepared = prepare(identify, model, texts, probe, forecasts=True)
    with float64_kept(prepared.loaded.model):
        observed = prepared.captured(
            watch={"attention", "projections"},
            digest=weights_reader(prepared.loaded.model),
            progress=prepared.progress,
        )
    return Identifiability(prepared.judged(lambda: _judged(prepared, observed)), prepared.is_first)


def _judged(prepared: Prepared, observed: Observations) -> IdentifiabilityRecord:
    heads = heads_records(observed.attention, prepared.loaded.model)
    fired = findings.findings(site_records(observed.sites), [], heads)
    return IdentifiabilityRecord(
        schema=HEADS_SCHEMA,
        versions=versions(),
        model=model_info(prepared, observed),
        probe=probe_record(prepared, observed),
        heads=heads,
        findings=[finding for finding in fired if finding.phenomenon in ABOUT_HEADS],
        anatomy=anatomy_record(prepared.anatomy, observed),
    )
