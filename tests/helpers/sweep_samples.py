"""The record of a sweep, made up: a run that collapses at its fourth checkpoint, one checkpoint that failed, and another model."""

from __future__ import annotations

from tests.helpers.records_samples import encoder, model_info
from uncollapse.records.common import Finding, Severity
from uncollapse.records.sweep import SWEEP_SCHEMA, Failure, SweepRecord, SweptCheckpoint, SweptFigure, SweptRun

STEPS = (0, 1, 512, 1000, 2000)


def finding(code: str, severity: Severity, block: int) -> Finding:
    return Finding(
        code,
        "rank-collapse-depth",
        severity,
        block,
        None,
        0.01,
        0.1,
        f"{code} in block {block}.",
        "Stop.",
        "a paper",
    )


def figure(along: list[float | None], blocks: slice, *, largest: bool = False, head: int | None = None) -> SweptFigure:
    known = [(value, i) for i, value in enumerate(along) if value is not None and i in range(99)[blocks]]
    worst, at = (max if largest else min)(known)
    return SweptFigure(worst, at - (blocks.start or 0), head, None, None if head is None else "self", along)


def checkpoint(run: str, step: int, index: int) -> SweptCheckpoint:
    """Block 1 loses its tokens as the steps go on, block 2 has the largest logits."""
    consensus: list[float | None] = [0.9, 0.8, 0.8 / (1 + index**2), 0.7]
    logits: list[float | None] = [3.0, 4.0, 10.0 + index]
    findings = []
    if index >= 3:
        findings.append(finding("DEPTH-CLOSE", "warning", 1))
    if index == 4:
        findings += [finding("DEPTH-COLLAPSED", "critical", 1), finding("DEPTH-COLLAPSED", "critical", 2)]
    return SweptCheckpoint(
        f"{run}@step{step}",
        step,
        f"{index:016x}",
        f"tiny-step{step}-{index:016x}.json.gz",
        {
            "consensus_after_norm": figure(consensus, slice(1, None)),
            "max_logit": figure(logits, slice(0, None), largest=True, head=7),
            "not_finite": figure([0.0] * 4, slice(1, None), largest=True),
        },
        findings,
    )


def swept(name: str = "org/tiny") -> SweepRecord:
    """Two runs; the checkpoint at step 512 of the first one failed."""
    sites, attentions = ["embedding", "block.0", "block.1", "block.2"], ["block.0", "block.1", "block.2"]
    checkpoints = [checkpoint(name, step, index) for index, step in enumerate(STEPS)]
    checkpoints[2] = SweptCheckpoint(
        f"{name}@step512",
        512,
        None,
        "tiny-step512-unidentified.json.gz",
        failure=Failure("crashed", "OSError: gone", "a traceback"),
    )
    other = SweptRun(
        "org/other", [checkpoint("org/other", 7, 0)], model_info("org/other"), encoder().probe, sites, attentions
    )
    first = SweptRun(name, checkpoints, model_info(name), encoder().probe, sites, attentions)
    options = {"level": "core", "max_tokens": 128, "context_lengths": None}
    return SweepRecord(SWEEP_SCHEMA, {"uncollapse": "0.1.0"}, options, [first, other])
