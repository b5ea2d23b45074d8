"""`sweep`: many checkpoints diagnosed, one record each, in a folder that can be gone on with at any time.

What is there is not measured again, a failure ends nothing, and several sweeps may work on one folder. `compare` takes any two of
the records.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from filelock import FileLock

from uncollapse import processes, sources
from uncollapse.analyses.preparation import DEFAULT_SEQUENCES, ProbeOptions, require_options
from uncollapse.analyses.recording import versions
from uncollapse.analyses.result import Recorded
from uncollapse.analyses.sweep_folder import SweepFolder
from uncollapse.analyses.sweep_task import Task
from uncollapse.analyses.sweep_workers import Here, OnRay, Workers
from uncollapse.errors import InputError
from uncollapse.probe.context_lengths import require_context_lengths
from uncollapse.probe.passes import Level, Progress
from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import AttentionRecord, DiagnosisRecord, SiteRecord
from uncollapse.records.figures import WORST_IS_LARGEST, head_figures, site_figures
from uncollapse.records.sweep import SWEEP_SCHEMA, SweepRecord, SweptCheckpoint, SweptFigure, SweptRun
from uncollapse.sources import Checkpoint

# Those that say where a model runs and how much of it there may be. The figures are the same up to rounding.
MACHINE = ("device", "device_map", "max_memory", "max_parameters")
NOT_OF_A_SWEEP = ("tokenizer", "name")
PATIENCE = 1.0  # seconds between two looks at what another run is at


@dataclass(frozen=True, repr=False)
class Sweep(Recorded[SweepRecord]):
    """What `sweep` found. `record` has a summary of each checkpoint; the whole records are in the folder."""

    @property
    def findings(self) -> list[Finding]:
        """Those of all checkpoints."""
        return self.record.findings

    @property
    def failures(self) -> list[SweptCheckpoint]:
        """The checkpoints that could not be measured, each with the reason in `failure`."""
        return [checkpoint for checkpoint in self.record.checkpoints if checkpoint.failure is not None]


def sweep(
    models: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    texts: Iterable[str] | None = None,
    *,
    out: str | os.PathLike[str],
    level: Level = "core",
    context_lengths: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
    ray: str | None = None,
    retry: bool = False,
    **probe: Unpack[ProbeOptions],
) -> Sweep:
    """Diagnose many checkpoints on the same text, into a folder of records.

    models: hub ids (`org/model@step1000`), folders, and folders of checkpoints (`checkpoint-500`, …), which are sorted by step.
    out: the folder. Each record is written whole, under a name made of a fingerprint of the weights, the options that decide the
    figures, and the version. A record that is there and can be read is not measured again, so a sweep that was killed goes on
    where it was; several on one folder share the work, and each waits for what the others are still at.
    shard: (2, 8) takes the second of eight shares and looks at no other.
    ray: the address of a Ray cluster that does the work ("auto", "local", "ray://host:10001"); needs `uncollapse[ray]`.
    retry: measure again what failed before. A failure is a record, too, and counts for the options that it was met with.

    The other options are those of `diagnose`, but for `tokenizer` and `name`: each checkpoint has its own.

    Raises `InputError` for options that cannot be used and for a folder that cannot be written to; what is wrong with a single
    checkpoint is in its record.
    """
    chosen = require_options(sweep, probe, level=level)
    if processes.count() > 1:
        raise InputError(
            f"sweep: expected one process, got {processes.count()} of a process group. Each checkpoint is "
            "measured by one. Start several sweeps on one folder instead, or pass shard (--shard)."
        )
    own = [option for option in NOT_OF_A_SWEEP if probe.get(option) is not None]
    if own:
        raise InputError(
            f"sweep: expected no {own[0]}, got one. Each checkpoint has its own. Leave it out, or call `diagnose` in a loop."
        )
    named = [models] if isinstance(models, str | os.PathLike) else list(models)
    mine = _share(sources.series(named), shard)
    if chosen["dtype"] not in (None, *sources.DTYPES):
        raise InputError(
            f"sweep: expected dtype to be one of {', '.join(sources.DTYPES)}, got {chosen['dtype']!r}. "
            "Weights in other types cannot be measured. Pass one of these names."
        )
    described = _Described.of(texts, level, context_lengths, chosen)
    folder = SweepFolder(out)
    progress = chosen["progress"]
    with _workers(ray, described, progress) as workers:
        done = _carried_out(mine, described, folder, workers, retry, progress)
    return Sweep(_summary(mine, done, described))


def _share(checkpoints: list[Checkpoint], shard: tuple[int, int] | None) -> list[Checkpoint]:
    if shard is None:
        return checkpoints
    number, of = shard
    if not 1 <= number <= of:
        raise InputError(
            f"sweep: expected a shard I/N with I from 1 to N, got {number}/{of}. Shards are counted from 1. "
            f"Pass for example {min(max(number, 1), max(of, 1))}/{max(of, 1)}."
        )
    return checkpoints[number - 1 :: of]


@dataclass(frozen=True)
class _Described:
    """The options of a sweep: those of `Task`, the same for all of its checkpoints."""

    deciding: dict[str, Any]
    machine: dict[str, Any]
    arguments: dict[str, Any]

    @staticmethod
    def of(
        texts: Iterable[str] | None, level: Level, context_lengths: Sequence[int] | None, chosen: ProbeOptions
    ) -> _Described:
        if texts is not None and chosen["batches"] is not None:
            raise InputError(
                "sweep: expected texts or batches, got both. They are two ways to give the same input. Pass one of them."
            )
        if isinstance(texts, str):
            raise InputError("sweep: expected several texts, got one string. Pass a list of texts, one sequence each.")
        lengths = None if context_lengths is None else require_context_lengths(context_lengths)
        read = None if texts is None else list(itertools.islice(texts, chosen["sequences"]))
        batches = None if chosen["batches"] is None else list(chosen["batches"])
        if batches is not None:
            text = sources.fingerprint(batches)
        else:
            used = (
                sources.default_texts(chosen["sequences"] or DEFAULT_SEQUENCES, chosen["seed"])
                if read is None
                else read
            )
            text = hashlib.sha256("\0".join(used).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        layout = chosen["layout"]
        dtype = None if chosen["dtype"] == "auto" else chosen["dtype"]
        deciding = {
            "level": level,
            "context_lengths": lengths,
            "text": text,
            **{key: chosen[key] for key in ("sequences", "max_tokens", "batch_size", "seed")},
            "dtype": dtype,
            "trust_remote_code": chosen["trust_remote_code"],
            "layout": None if layout is None else repr(layout),
        }
        machine = {key: _plain(chosen.get(key)) for key in MACHINE}
        passed_on = {key: value for key, value in chosen.items() if key not in ("progress", "batches")}
        arguments = {**passed_on, "texts": read, "batches": batches, "level": level, "context_lengths": lengths}
        return _Described(deciding, machine, arguments)

    def task(self, checkpoint: Checkpoint, folder: SweepFolder) -> Task:
        """What is known of a checkpoint once its weights have been looked at."""
        weights, problem = None, ""
        try:
            weights = sources.weights_fingerprint(checkpoint.name, remembered=folder.remembered)
        except InputError as error:
            problem = " ".join(str(error).split())
        return Task(checkpoint, weights, self.deciding, self.machine, self.arguments, problem)


def _plain(option: Any) -> Any:
    """An option as JSON holds it: a `torch.device` is a text there."""
    return option if option is None or isinstance(option, str | int) else str(option)


@contextlib.contextmanager
def _workers(ray: str | None, described: _Described, progress: Progress | None) -> Iterator[Workers]:
    if ray is None:
        yield Here(progress)
    else:
        with contextlib.closing(OnRay(ray, described.machine)) as cluster:
            yield cluster


def _carried_out(
    mine: Sequence[Checkpoint],
    described: _Described,
    folder: SweepFolder,
    workers: Workers,
    retry: bool,
    progress: Progress | None,
) -> dict[Checkpoint, _Looked]:
    """Have all of them measured that are not there yet, by this run or by another one."""
    queue, elsewhere = deque(mine), deque[Checkpoint]()
    done: dict[Checkpoint, _Looked] = {}
    locks: dict[str, FileLock] = {}
    put_off: set[Checkpoint] = set()
    try:
        while len(done) < len(mine):
            if progress is not None:
                progress("checkpoints", len(done), len(mine))
            if queue and workers.free:
                checkpoint = queue.popleft()
                task = described.task(checkpoint, folder)
                found = folder.read(task)
                if found is not None and not (retry and isinstance(found, SweepRecord) and checkpoint not in put_off):
                    done[checkpoint] = _Looked.at(task, found)
                    continue
                if found is None and checkpoint not in put_off and folder.was_begun(task):
                    # Somebody is at it, or died of it. All others come first.
                    put_off.add(checkpoint)
                    queue.append(checkpoint)
                    continue
                put_off.add(checkpoint)
                lock = None if task.file in locks else folder.locked(task)  # two names may lead to the same weights
                if lock is None:
                    elsewhere.append(checkpoint)
                    continue
                if found is None and (found := folder.read(task)) is not None:  # written while the lock was being had
                    lock.release()
                    done[checkpoint] = _Looked.at(task, found)
                    continue
                locks[task.file] = lock
                workers.submit(task)
            elif workers.busy:
                for task, record in workers.finished():
                    folder.write(task, record)
                    locks.pop(task.file).release()
                    done[task.checkpoint] = _Looked.at(task, record)
            else:
                if progress is not None:
                    progress("waiting for another run", len(mine) - len(elsewhere), len(mine))
                time.sleep(PATIENCE)
                queue, elsewhere = elsewhere, queue
    finally:
        for lock in locks.values():
            lock.release()
    if progress is not None:
        progress("checkpoints", len(done), len(mine))
    return done


# The summary ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Looked:
    """What a sweep keeps of a record: its figures, and what they belong to."""

    checkpoint: SweptCheckpoint
    run: SweptRun | None

    @staticmethod
    def at(task: Task, record: DiagnosisRecord | SweepRecord) -> _Looked:
        known = SweptCheckpoint(task.checkpoint.name, task.checkpoint.step, task.fingerprint, task.file)
        if isinstance(record, SweepRecord):
            (failed,) = record.checkpoints
            return _Looked(replace(known, failure=failed.failure), None)
        figures = {**_of_sites(record.trajectory), **_of_heads(record.attention)}
        run = SweptRun(
            task.checkpoint.run,
            [],
            record.model,
            record.probe,
            [f"{site.stack} {site.site}" if site.stack else site.site for site in record.trajectory],
            [_attention(place) for place in _attentions(record.attention)],
            None if record.anatomy is None else record.anatomy.is_causal,
        )
        return _Looked(replace(known, figures=figures, findings=record.findings), run)


def _summary(mine: Sequence[Checkpoint], done: dict[Checkpoint, _Looked], described: _Described) -> SweepRecord:
    runs: list[SweptRun] = []
    for name, several in itertools.groupby(mine, key=lambda checkpoint: checkpoint.run):
        looked = [done[checkpoint] for checkpoint in several]
        shapes: dict[tuple[tuple[str, ...], tuple[str, ...]], SweptRun] = {}
        for each in looked:
            if each.run is not None:
                shapes.setdefault(_shape(each.run), each.run)
        first = next(iter(shapes), None)
        for shape, run in shapes.items() or [(None, SweptRun(name, []))]:
            belong = [e.checkpoint for e in looked if (first if e.run is None else _shape(e.run)) == shape]
            runs.append(replace(run, checkpoints=belong))
    return SweepRecord(SWEEP_SCHEMA, versions(), {**described.deciding, **described.machine}, runs)


def _shape(run: SweptRun) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(run.sites), tuple(run.attentions)


def _of_sites(trajectory: Sequence[SiteRecord]) -> dict[str, SweptFigure]:
    found = {}
    for measure, along in site_figures(trajectory).items():
        seen = [(value, site) for value, site in zip(along, trajectory, strict=True) if value is not None]
        inside = [(value, site) for value, site in seen if site.block is not None] or seen
        worst, site = _worst(measure)(inside, key=lambda pair: pair[0])
        found[measure] = SweptFigure(worst, site.block, None, site.stack, None, along)
    return found


def _of_heads(attention: Sequence[AttentionRecord]) -> dict[str, SweptFigure]:
    found = {}
    for measure, values in head_figures(attention).items():
        seen = [(value, head) for value, head in zip(values, attention, strict=True) if value is not None]
        worst, head = _worst(measure)(seen, key=lambda pair: pair[0])
        along: dict[tuple[Any, ...], list[float]] = {place: [] for place in _attentions(attention)}
        for value, each in seen:
            along[each.stack, each.kind, each.block].append(value)
        each_block = [_worst(measure)(block) if block else None for block in along.values()]
        found[measure] = SweptFigure(worst, head.block, head.head, head.stack, head.kind, each_block)
    return found


def _worst(measure: str) -> Any:
    return max if measure in WORST_IS_LARGEST else min


def _attentions(attention: Sequence[AttentionRecord]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys((head.stack, head.kind, head.block) for head in attention))


def _attention(place: tuple[Any, ...]) -> str:
    stack, kind, block = place
    return " ".join(filter(None, (stack, f"block.{block}", "cross" if kind == "cross" else "")))
