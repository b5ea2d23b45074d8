"""`Monitor`: while a model trains, look at it every few steps, and say early that it collapses and how.

    monitor = uc.Monitor(model, batches, every=50, log=writer, trail="run.jsonl")
    for step, batch in enumerate(loader):
        ...                       # forward, backward, optimizer.step()
        monitor.step(step)
    monitor.alarms

A look runs a fixed probe through the model, in evaluation mode and without gradients. Parameters, random state, modes, gradients,
autocast's kept casts and compiled code are as they were, so training goes on bit for bit as without a monitor.

When not to use it: for one look. `diagnose` measures more.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal, TypedDict, Unpack, cast

from torch import Tensor, nn

from uncollapse import processes
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
from uncollapse.anatomy.sharded_weights import is_sharded
from uncollapse.anatomy.vocabulary import Layout
from uncollapse.errors import InputError
from uncollapse.judgement import findings
from uncollapse.judgement.dead_components import exactly, measured_blocks
from uncollapse.judgement.identifiability import heads_records, weights_reader
from uncollapse.monitoring import figures
from uncollapse.monitoring.alarms import ThresholdAlarms, judged, margins_of
from uncollapse.monitoring.baselines import BaselineAlarms
from uncollapse.monitoring.falls import StreamHistory
from uncollapse.monitoring.trends import TrendAlarms
from uncollapse.monitoring.weights import Figures, Weights
from uncollapse.probe.activity import embedding_records, part_records
from uncollapse.probe.passes import NextPass, Observations
from uncollapse.probe.routing import router_records
from uncollapse.records import load
from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.figures import (
    DEAD_PARTS,
    corpus_figures,
    dead_parts,
    expert_figures,
    head_figures,
    head_places,
    places,
    site_figures,
)
from uncollapse.records.trail import TRAIL_SCHEMA, Alarm, TrailFile, TrailReading, TrailRecord

Log = Callable[[dict[str, float], int], object]
Watched = Literal["tokens", "corpus", "experts", "attention", "heads", "parts", "weights"]
WATCHED: Final[tuple[Watched, ...]] = ("tokens", "corpus", "experts", "attention", "heads", "parts", "weights")
_logger = logging.getLogger(__name__)  # a warning of `warnings` would end a run for which warnings are errors
IN_MEMORY = 256  # looks whose readings stay in memory where a trail has all of them
DECOMPOSED_EVERY = 10  # looks: output projections and updates are decomposed, which takes longer


class TextOptions(TypedDict, total=False):
    """Of the options of `diagnose` those that a model in training still leaves open."""

    tokenizer: Any
    sequences: int | None
    max_tokens: int
    batch_size: int
    seed: int
    layout: Layout | None
    name: str | None


class Monitor:
    """Looks at a model in training every `every` steps. `alarms` holds what was found, `readings` what was measured.

    model: the model that is trained, in whatever wrapper. batches: the fixed probe, as dicts of tensors; a few sequences of data
    that is not trained on are enough. Instead of it `texts` with a `tokenizer`.
    on: `"probe"` runs that probe at each look. `"train"` runs nothing: it reads the training batch in its own forward pass, before
    every `every`-th call of `step`. `batches` then only shows what a batch looks like, for the proof. The figures of two looks
    differ by the batch, too, and by dropout; attention whose weights are dropped out is not measured. Not for compiled or sharded
    models.
    every: look when the step is a multiple of it; the first call of `step` always looks.
    watch: any of `"tokens"` (the stream between blocks), `"corpus"` (all sequences together, a point each), `"experts"` (how many
    tokens each gets, where a router is found), `"attention"` (its heads), `"heads"` (the output projections, at every tenth
    look), `"parts"` (whether a head, an MLP or a block has died), `"weights"` (how far each head's matrices moved since the last
    look; keeps one copy of them).
    log: called with a flat dict of floats and the step; see `monitoring.figures` for the names. each_head: whether that dict has
    every head, or only each block's worst.
    trail: a file that gets one line a look; if it is there, the run goes on in it. A path that cannot be written is refused at the
    first look. If the disk fills up later, the monitor warns once and goes on, and writes what is missing as soon as it can.
    `record` then holds only the last 256 readings; `readings`, or `load` of the file, gives all of them.
    baseline: a diagnosis or a trail to compare every head with, as a result, a record or a path. Without it each head is compared
    with its own history.
    patience: for how many looks a warning must stand before it is an alarm. false_alarms: the chance of one false alarm about a
    trend in a thousand looks, if nothing but noise moves the figures.
    Further options are those of `diagnose`: texts, tokenizer, sequences, max_tokens, batch_size, seed, layout, name.

    The model's parts are proved once, here. With several processes only the first looks, unless the parameters are sharded: then
    all must, and the first writes.

    Raises `InputError` for input that cannot be used, and `UnsupportedModel` where the anatomy cannot be proved.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]] | None = None,
        *,
        texts: Iterable[str] | None = None,
        every: int = 50,
        on: Literal["probe", "train"] = "probe",
        watch: Collection[Watched] = WATCHED,
        log: Log | None = None,
        each_head: bool = True,
        trail: str | os.PathLike[str] | None = None,
        baseline: DiagnosisRecord | TrailRecord | Recorded[Any] | str | os.PathLike[str] | None = None,
        patience: int = 2,
        false_alarms: float = 0.01,
        **probe: Unpack[TextOptions],
    ) -> None:
        _require_options(model, every, on, watch, patience, false_alarms)
        self.every, self.on, self.watch, self.patience = every, on, frozenset(watch), patience
        self.alarms: list[Alarm] = []
        self.record: TrailRecord | None = None
        self._log, self._each_head, self._path = log, each_head, trail
        self._baseline = _baseline(baseline)
        self._threshold, self._trend = ThresholdAlarms(patience), TrendAlarms(false_alarms, patience)
        self._beside, self._stream = BaselineAlarms([]), StreamHistory()  # until heads and sites are known
        self._looks = 0
        self._file: TrailFile | None = None
        self._let_go = False  # whether readings of the trail have left memory
        self._unwritten: list[TrailReading] = []
        self._warned: set[str] = set()
        self._is_first = processes.number() == 0
        self._is_sharded = is_sharded(model)
        if on == "train":
            _require_whole_and_open(model, is_sharded=self._is_sharded)
        self._looks_here = self._is_first or self._is_sharded
        self._weights: Weights | None = None
        self._prepared: Prepared | None = None
        if self._looks_here:
            options = cast(ProbeOptions, {**probe, "batches": batches, "alone": not self._is_sharded})
            # DDP's own forward exchanges buffers among the processes, and only one of them is here.
            self._prepared = prepare(Monitor, _inside_ddp(model), texts, options)
            own = [{k: _kept(v) for k, v in batch.items()} for batch in self._prepared.batches]
            self._prepared.batches = own
        self._next: NextPass | None = None
        self._last_step: int | None = None
        self._is_closed = False
        if on == "train" and self._prepared is not None:
            self._prepared.source = "training batches"
            self._wait()

    @property
    def readings(self) -> list[TrailReading]:
        """What was read at each look, also before a restart if there is a trail. Without one all stay in memory. With one only the
        last do, and the others are read from the file."""
        if self.record is None:
            return []
        here = self.record.readings
        if self._file is None or not self._let_go:
            return here
        return [r for r in self._file.readings() if r.step < here[0].step] + here

    def step(self, step: int, *, loss: float | Tensor | None = None) -> list[Alarm]:
        """Say that training has done step number `step`; look if it is time to. Returns the alarms that this look raised.

        loss: that of the training step, to be drawn beside the figures. It is read only if there is a look."""
        if self._prepared is None:
            return []
        if self.on == "train":
            return [] if self._is_closed else self._step_of_training(step, loss)
        return [] if self._looks and step % self.every else self.look(step, loss=loss)

    def look(self, step: int, *, loss: float | Tensor | None = None) -> list[Alarm]:
        """Look now, whatever the step. Raises `InputError` with `on="train"`: then only training itself makes passes."""
        if self._prepared is None:
            return []
        if self.on == "train":
            raise InputError(
                "Monitor: expected a monitor with a probe, got one with on='train'. It reads the next training pass and makes none "
                "of its own. Call `step`, or leave out on='train'."
            )
        digest = weights_reader() if self._has_projections else _nothing
        observed = self._prepared.captured(level="core", watch=self._watched(), digest=digest)
        return self._read(step, observed, loss)

    def close(self) -> None:
        """Take off what waits for the next training pass. The monitor reads nothing more with `on="train"`."""
        self._is_closed = True
        if self._next is not None:
            self._next.close()
            self._next = None

    def __del__(self) -> None:
        if getattr(self, "_next", None) is not None and not sys.is_finalizing():
            self.close()

    def _wait(self) -> None:
        """Read the next training pass."""
        assert self._prepared is not None
        self._next = NextPass(self._prepared.loaded.model, self._prepared.anatomy, self._watched())

    def _step_of_training(self, step: int, loss: float | Tensor | None) -> list[Alarm]:
        raised: list[Alarm] = []
        seen = self._next
        if seen is not None and seen.is_broken:  # half of a pass says nothing: the next one is read
            seen.close()
            self._wait()
        elif seen is not None and seen.is_over:
            self._next = None
            if seen.observations is not None:
                raised = self._read(step, seen.observations, loss)
            elif seen.problem is not None and not self._looks:
                raise seen.problem
            else:
                self._warn(
                    "Monitor: expected a training pass like the first, got another before step %d: %s",
                    step,
                    seen.problem,
                )
        # The pass before the next call is the one to read: that call comes as many steps later as this one did.
        next_step = step + 1 if self._last_step is None else step + max(step - self._last_step, 1)
        self._last_step = step
        if self._next is None and next_step % self.every == 0:
            self._wait()
        return raised

    def _read(self, step: int, observed: Observations, loss: float | Tensor | None) -> list[Alarm]:
        """Make a reading of what a pass showed, and judge it."""
        assert self._prepared is not None
        trajectory = site_records(observed.sites)
        attention = [record for s in observed.attention for record in attention_records(s, "core")]
        projections = heads_records(observed.attention) if self._has_projections else []
        corpus = corpus_records(observed.corpus, between=False)
        parts, embeddings = exactly(part_records(observed.parts), embedding_records(observed.embeddings))
        heads = attention if "attention" in self.watch else []
        read = judged(findings.readings(trajectory, heads, projections, parts, embeddings, corpus=corpus))
        if self.record is None:
            self._begin(
                step,
                TrailRecord(
                    schema=TRAIL_SCHEMA,
                    versions=versions(),
                    model=model_info(self._prepared, observed),
                    probe=probe_record(self._prepared, observed),
                    options={
                        "every": self.every,
                        "on": self.on,
                        "watch": sorted(self.watch),
                        "patience": self.patience,
                    },
                    sites=places(trajectory),
                    heads=head_places(attention),
                    is_causal=_is_causal(self._prepared),
                ),
            )
        assert self.record is not None
        of_heads, of_sites = self._weight_figures(self.record, spectra=self._decomposes)
        reading = TrailReading(
            step=step,
            sites=(site_figures(trajectory) if "tokens" in self.watch else {})
            | corpus_figures(trajectory, corpus)
            | expert_figures(trajectory, router_records(observed.routers))
            | dead_parts(trajectory, measured_blocks(parts, embeddings), [r.finding for r in read.values()])
            | of_sites,
            heads=(head_figures(attention) if "attention" in self.watch else {}) | of_heads,
            margins=margins_of(read),
            loss=_number(loss),
        )
        self._judge(reading, {key: r.finding for key, r in read.items()})
        self._looks += 1
        self._keep(reading)
        return reading.alarms

    @property
    def _decomposes(self) -> bool:
        """Whether the look that comes next decomposes matrices."""
        return self._looks % DECOMPOSED_EVERY == 0

    @property
    def _has_projections(self) -> bool:
        return "heads" in self.watch and self._decomposes

    def _weight_figures(self, record: TrailRecord, *, spectra: bool) -> tuple[Figures, Figures]:
        """What the weights say of the heads and of the sites."""
        if "weights" not in self.watch or self._is_sharded or self._prepared is None:
            return {}, {}
        model = self._prepared.loaded.model
        if self._weights is None:
            self._weights = Weights.of(model, self._prepared.anatomy, self._prepared.batches[0])
        return self._weights.look(model, record.heads, record.sites, spectra=spectra)

    def _judge(self, reading: TrailReading, found: dict[str, Finding]) -> None:
        """Put the alarms of this reading, and what is over, into it."""
        dead, sites = reading.sites.get(DEAD_PARTS, []), [] if self.record is None else self.record.sites
        measured = {site.block for site, count in zip(sites, dead, strict=False) if count is not None}
        crossed, left = self._threshold.look(reading.step, reading.margins, found, measured)
        for raised, cleared in (
            (self._stream.placed(crossed, reading.sites), left),
            self._trend.look(
                reading.step, reading.margins, {key: f for key, f in found.items() if self._threshold.is_settled(key)}
            ),
            self._beside.look(reading.step, reading.heads),
        ):
            reading.alarms.extend(raised)
            reading.cleared.extend(cleared)

    def _watched(self) -> set[Any]:
        """What the pass that comes next has to look at."""
        parts: dict[str, set[str]] = {
            "tokens": {"sites"},
            "corpus": {"corpus"},
            "experts": {"routers"},
            "attention": {"attention", "rows"},
            "heads": {"projections"} if self._has_projections else set(),
            "parts": {"parts", "attention", "projections"},
        }
        return set().union(*(parts.get(each, set()) for each in self.watch))

    def _begin(self, step: int, record: TrailRecord) -> None:
        """Before the first reading: the record, and what an earlier part of the run left in the trail."""
        beside = BaselineAlarms(record.heads, self._baseline, self.patience)
        if self._path is not None and self._is_first:
            self._file = TrailFile(self._path, record)
        self.record, self._beside, self._stream = record, beside, StreamHistory(record.sites)
        if self._file is None:
            return
        standing: dict[str, Alarm] = {}
        for earlier in (r for r in self._file.earlier if r.step < step):
            record.readings.append(earlier)
            self.alarms.extend(earlier.alarms)
            self._judge(replace(earlier, alarms=[], cleared=[]), {})
            standing |= {alarm.key: alarm for alarm in earlier.alarms}
            for key in earlier.cleared:
                standing.pop(key, None)
        self._file.earlier.clear()
        for alarm in standing.values():
            match alarm.against:
                case "threshold":
                    self._threshold.standing(alarm.key, alarm.severity)
                case "trend":
                    self._trend.standing(alarm.key)
                case "baseline":
                    self._beside.standing(alarm.key)

    def _keep(self, reading: TrailReading) -> None:
        assert self.record is not None
        self.record.readings.append(reading)
        self.alarms.extend(reading.alarms)
        if not self._is_first:
            return
        if self._file is not None:
            self._write_trail(self._file, reading)
            if len(self.record.readings) > max(IN_MEMORY, len(self._unwritten)):
                self.record.readings[:] = self.record.readings[-max(IN_MEMORY, len(self._unwritten)) :]
                self._let_go = True
        if self._log is not None:
            named = figures.flat(reading, self.record.sites, self.record.heads, each_head=self._each_head)
            standing = float(len(self.alarms))
            self._log({**named, f"{figures.PREFIX}/alarms": standing}, reading.step)

    def _write_trail(self, file: TrailFile, reading: TrailReading) -> None:
        """Add a reading to the trail, after those that could not be written before. A full disk does not end a training run."""
        self._unwritten.append(reading)
        try:
            while self._unwritten:
                file.append(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            self._warn(
                "Monitor: expected a trail that takes more, got %r (%s). The disk may be full, or the file gone. Looks go on, "
                "and what is missing from step %d is written once it can be.",
                str(file.path),
                error.strerror or error,
                reading.step,
            )

    def _warn(self, message: str, *details: object) -> None:
        """Say it, each kind of message once in a run."""
        if message not in self._warned:
            self._warned.add(message)
            _logger.warning(message, *details)


def _baseline(
    given: DiagnosisRecord | TrailRecord | Recorded[Any] | str | os.PathLike[str] | None,
) -> DiagnosisRecord | TrailRecord | None:
    """The record to compare with."""
    record: object = load(given) if isinstance(given, str | os.PathLike) else given
    record = record.record if isinstance(record, Recorded) else record
    if record is None or isinstance(record, DiagnosisRecord | TrailRecord):
        return record
    raise InputError(
        f"Monitor: expected a diagnosis or a trail as the baseline, got {type(record).__name__}. Other records do not hold every "
        "head's figures. Pass what `diagnose` returned, or a path that it was written to."
    )


def _require_options(
    model: object, every: int, on: str, watch: Collection[str], patience: int, false_alarms: float
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"Monitor: expected the nn.Module that is trained, got {type(model).__name__}. A name or a path is not "
            "a model in training. Pass the model itself."
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"Monitor: expected every=1 or more steps, got {every!r}. Pass for example every=50.")
    if on not in ("probe", "train"):
        raise InputError(f"Monitor: expected on='probe' or on='train', got {on!r}. Check the spelling.")
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise InputError(f"Monitor: expected patience=1 or more looks, got {patience!r}. Pass for example patience=2.")
    if not 0 < false_alarms < 1:
        raise InputError(
            f"Monitor: expected false_alarms between 0 and 1, got {false_alarms!r}. It is a probability. Pass for example 0.01."
        )
    unknown = [watch] if isinstance(watch, str) else sorted(set(watch) - set(WATCHED))
    if unknown or not watch:
        raise InputError(
            f"Monitor: expected watch to be some of {', '.join(WATCHED)}, got {unknown or watch!r}. It may be misspelt. "
            'Pass for example watch=["tokens", "attention"].'
        )


def _require_whole_and_open(model: nn.Module, *, is_sharded: bool) -> None:
    """Whether somebody else's passes can be looked into."""
    is_compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())
    if is_sharded or is_compiled:
        raise InputError(
            f"Monitor: expected a model whose own passes can be read, got a {'sharded' if is_sharded else 'compiled'} one. Its "
            "parameters, or its operations, are not there to be looked at in the middle of training. Leave out on='train'."
        )


def _inside_ddp(model: nn.Module) -> nn.Module:
    inner: Any = model
    while isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner.module
    return inner


def _kept(value: Any) -> Any:
    """A copy: the probe stays what it is, whatever the caller does to its tensors."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _nothing(_: object) -> dict[str, Any]:
    """What is kept of a projection that does not stay, at a look that decomposes none."""
    return {}


def _is_causal(prepared: Prepared) -> bool | None:
    parts = [part for block in prepared.anatomy.blocks for part in block.parts if part.kind == "attention"]
    found = {part.is_causal for part in parts}
    return found.pop() if len(found) == 1 else None


def _number(loss: float | Tensor | None) -> float | None:
    """The loss as a finite number."""
    if loss is None:
        return None
    value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
    return value if value - value == 0 else None
