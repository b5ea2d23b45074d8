"""A sweep: what it measures is what `diagnose` measures, what is there is not measured again, and no death loses more than one."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import uncollapse as uc
from tests.helpers.checkpoints import BROKEN_FROM, TEXTS, run_of
from uncollapse import records
from uncollapse.analyses import sweep_workers
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.sweep import SweepRecord
from uncollapse.sources import weights_fingerprint

STEPS = [100, 5, 40, 0]
golden_record = functools.cache(
    lambda: records.load(Path(__file__).parents[1] / "records" / "golden" / "diagnosis.json")
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(STEPS, tmp_path_factory.mktemp("series") / "run")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the checkpoints that are measured, in order. What is measured is a stored record, for speed; checkpoints that
    cannot be read fail as they would."""
    names: list[str] = []

    def noted(task: Any, progress: Any = None) -> Any:
        names.append(os.path.basename(task.checkpoint.name))
        return stored(task)

    monkeypatch.setattr(sweep_workers, "measured", noted)
    return names


def stored(task: Any) -> DiagnosisRecord | SweepRecord:
    """A record in the place of a diagnosis."""
    if task.problem:
        return really_measured(task)
    golden = golden_record()
    assert isinstance(golden, DiagnosisRecord)
    return replace(golden, model=replace(golden.model, name=task.checkpoint.name))


really_measured = sweep_workers.measured


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_each_record_is_the_diagnosis_of_its_checkpoint_and_the_summary_its_worst(run: Path, tmp_path: Path) -> None:
    found = uc.sweep(run, TEXTS, out=tmp_path / "out")
    assert [checkpoint.step for checkpoint in found.record.checkpoints] == sorted(STEPS)
    assert len(files(tmp_path / "out")) == len(STEPS)
    for checkpoint in found.record.checkpoints[1:3]:
        alone = uc.diagnose(checkpoint.name, TEXTS).record
        assert checkpoint.file is not None
        kept = records.load(tmp_path / "out" / checkpoint.file)
        assert kept == alone
        blocks = [site for site in alone.trajectory if site.block is not None]
        lowest = min((s.consensus_after_norm.mean, s.block) for s in blocks if s.consensus_after_norm)
        figure = checkpoint.figures["consensus_after_norm"]
        assert (figure.worst, figure.block, figure.head) == (*lowest, None)
        logits = {(head.block, head.head): head.max_logit.mean for head in alone.attention if head.max_logit}
        sharpest = max(logits, key=logits.__getitem__)
        figure = checkpoint.figures["max_logit"]
        assert (figure.worst, figure.block, figure.head) == (logits[sharpest], *sharpest)
        assert figure.along == [max(logits[block, head] for head in range(2)) for block in range(2)]
        assert checkpoint.findings == alone.findings
    assert {
        c.step for c in found.record.checkpoints if any((f.code, f.block) == ("WIDTH-UNIFORM", 1) for f in c.findings)
    } == {step for step in STEPS if step >= BROKEN_FROM}
    found.to_json(tmp_path / "sweep.json.gz")
    assert uc.load(tmp_path / "sweep.json.gz").record == found.record
    schema = json.loads((Path(uc.__file__).parent / "schemas" / "sweep-1.json").read_text("utf-8"))
    jsonschema.validate(json.loads(gzip.decompress((tmp_path / "sweep.json.gz").read_bytes())), schema)


def test_what_is_there_and_valid_is_not_measured_again(run: Path, tmp_path: Path, measured: list[str]) -> None:
    out = tmp_path / "out"
    first = uc.sweep(run, TEXTS, out=out)
    assert measured == [f"checkpoint-{step}" for step in sorted(STEPS)]
    assert uc.sweep(run, TEXTS, out=out).record == first.record
    assert len(measured) == 4
    damaged, empty = (out / file for file in files(out)[:2])
    damaged.write_bytes(damaged.read_bytes()[:-20])
    empty.write_bytes(b"")
    assert uc.sweep(run, TEXTS, out=out).record == first.record
    assert len(measured) == 6
    uc.sweep(run, TEXTS[:-1], out=out)
    uc.sweep(run, TEXTS, out=out, max_tokens=5)
    uc.sweep(run, TEXTS, out=out, level="full")
    assert len(measured) == 6 + 3 * 4
    assert len(files(out)) == 4 * 4
    uc.sweep(run, TEXTS, out=out, device="cpu")  # where it runs decides no figure
    assert len(measured) == 6 + 3 * 4


def test_changed_weights_are_another_checkpoint_whatever_the_file_says_of_its_age(
    run: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "uncollapse.sources.checkpoint_series._SETTLED", -1.0
    )  # remember digests of files that were just written, too
    own = shutil.copytree(run / "checkpoint-5", tmp_path / "other" / "checkpoint-5")
    first = uc.sweep([own], TEXTS, out=tmp_path / "out").record.checkpoints[0]
    weights = own / "model.safetensors"
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # the last number, by a little
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = uc.sweep([own], TEXTS, out=tmp_path / "out").record.checkpoints[0]
    assert first.fingerprint != second.fingerprint
    assert len(measured) == 2
    copy = shutil.copytree(run / "checkpoint-5", tmp_path / "elsewhere" / "other" / "checkpoint-5")
    again = uc.sweep([copy], TEXTS, out=tmp_path / "out").record.checkpoints[0]
    assert again.fingerprint == first.fingerprint  # the same weights under another path
    assert len(measured) == 2


def test_a_failure_is_a_record_and_ends_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def noted(task: Any, progress: Any = None) -> Any:
        measured.append(task.checkpoint.name)
        return stored(task) if task.checkpoint.step in (0, 100) else really_measured(task)

    monkeypatch.setattr(sweep_workers, "measured", noted)
    series = shutil.copytree(run, tmp_path / "run")
    weights = series / "checkpoint-5" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.rmtree(series / "checkpoint-40")
    (series / "checkpoint-40").mkdir()
    out = tmp_path / "out"
    found = uc.sweep(series, TEXTS, out=out)
    assert [(c.step, c.failure.kind) for c in found.failures if c.failure] == [(5, "refused"), (40, "refused")]
    assert "checkpoint-5" in (found.failures[0].failure.message if found.failures[0].failure else "")
    for checkpoint in found.failures:
        kept = records.load(out / str(checkpoint.file))
        assert isinstance(kept, SweepRecord)
        assert [(c.name, c.failure) for c in kept.checkpoints] == [(checkpoint.name, checkpoint.failure)]
    assert len(measured) == 4
    uc.sweep(series, TEXTS, out=out)
    assert len(measured) == 4
    uc.sweep(series, TEXTS, out=out, max_parameters=10**9)  # it may have been for want of these
    assert len(measured) == 6
    uc.sweep(series, TEXTS, out=out, max_parameters=10**9, retry=True)
    assert len(measured) == 8
    shutil.rmtree(series / "checkpoint-40")
    shutil.copytree(run / "checkpoint-40", series / "checkpoint-40")
    assert [c.step for c in uc.sweep(series, TEXTS, out=out, max_parameters=10**9).failures] == [5]

    monkeypatch.setattr(sweep_workers, "measured", really_measured)

    def crash(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("uncollapse.analyses.diagnosis.diagnose", crash)
    crashed = uc.sweep(series / "checkpoint-0", TEXTS, out=tmp_path / "crashed").failures[0].failure
    assert crashed is not None
    assert (crashed.kind, crashed.message) == ("crashed", "MemoryError: no room")
    assert "in crash" in crashed.traceback


def test_each_failure_is_told_its_own_reason(tmp_path: Path) -> None:
    missing = [str(tmp_path / each / "run" / "checkpoint-1") for each in ("one", "other")]
    for _ in range(2):
        failures = uc.sweep(missing, out=tmp_path / "out").failures
        assert [checkpoint.name for checkpoint in failures] == missing
        for checkpoint in failures:
            assert checkpoint.failure is not None
            assert repr(checkpoint.name) in checkpoint.failure.message


def test_shares_are_disjoint_and_make_the_whole(run: Path, tmp_path: Path, measured: list[str]) -> None:
    parts = [uc.sweep(run, TEXTS, out=tmp_path, shard=(number, 3)) for number in (1, 2, 3)]
    names = [checkpoint.name for part in parts for checkpoint in part.record.checkpoints]
    assert sorted(names) == sorted(str(run / f"checkpoint-{step}") for step in STEPS)
    assert len(measured) == 4
    uc.sweep(run, TEXTS, out=tmp_path)
    assert len(measured) == 4
    for shard in ((0, 3), (4, 3)):
        with pytest.raises(uc.InputError, match="counted from 1"):
            uc.sweep(run, TEXTS, out=tmp_path, shard=shard)


def test_an_adapter_is_known_by_its_base_too(run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(run / "checkpoint-0", tmp_path / "base")
    adapter = shutil.copytree(run / "checkpoint-5", tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = weights_fingerprint(str(adapter), remembered=tmp_path / "known")
    assert before == weights_fingerprint(str(adapter), remembered=tmp_path / "known")
    shutil.copy(run / "checkpoint-40" / "model.safetensors", base / "model.safetensors")
    assert before != weights_fingerprint(str(adapter), remembered=tmp_path / "known")


def test_processes_of_a_group_are_sent_their_own_ways(
    run: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(uc.InputError, match="expected one process, got 2"):
        uc.sweep(run, TEXTS, out=tmp_path)
    assert measured == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float31"}, "expected dtype"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"level": "half"}, "level"),
        ({"tokenizer": object()}, "tokenizer"),
        ({"texts": "one"}, "several texts"),
        ({"models": []}, "at least one model"),
        ({"ray": "nowhere:1"}, "Ray"),
    ],
)
def test_options_that_no_checkpoint_can_have_are_refused_before_anything_is_measured(
    options: dict[str, Any], said: str, run: Path, tmp_path: Path, measured: list[str]
) -> None:
    given: dict[str, Any] = {"models": run, "texts": TEXTS} | options
    with pytest.raises(uc.InputError, match=said):
        uc.sweep(given.pop("models"), given.pop("texts"), out=tmp_path / "out", **given)
    assert measured == []


def test_a_checkpoint_that_cannot_be_locked_is_refused_in_one_line(
    run: Path, tmp_path: Path, measured: list[str]
) -> None:
    uc.sweep(run / "checkpoint-0", TEXTS, out=tmp_path)
    for record in tmp_path.glob("*.json.gz"):
        record.unlink()
        lock = tmp_path / ".locks" / f"{record.name}.lock"
        lock.unlink()
        lock.mkdir()
    with pytest.raises(uc.InputError, match=r"can be locked, got .* directory") as refused:
        uc.sweep(run / "checkpoint-0", TEXTS, out=tmp_path)
    assert "\n" not in str(refused.value)
    assert len(measured) == 1


def test_a_revision_of_the_hub_is_one_commit(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what the hub's own client has stored: two revisions of one repository, out of reach of the hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--org--tiny"
    for step, commit in ((40, "b" * 40), (0, "a" * 40)):
        shutil.copytree(run / f"checkpoint-{step}", repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / f"step{step}").write_text(commit)
    found = uc.sweep(["org/tiny@step40", "org/tiny@step0", "org/tiny@step7"], TEXTS, out=tmp_path / "out").record
    (whole,) = found.runs
    assert whole.name == "org/tiny"
    assert [c.name for c in whole.checkpoints] == ["org/tiny@step0", "org/tiny@step7", "org/tiny@step40"]
    assert [c.failure is None for c in whole.checkpoints] == [True, False, True]
    kept = records.load(tmp_path / "out" / str(whole.checkpoints[2].file))
    assert isinstance(kept, DiagnosisRecord)
    assert (kept.model.name, kept.model.revision) == ("org/tiny@step40", "b" * 40)
    assert kept.trajectory == uc.diagnose(str(run / "checkpoint-40"), TEXTS).record.trajectory
    monkeypatch.setattr(sweep_workers, "measured", lambda task, _: stored(task))
    (repository / "refs" / "step0").write_text("b" * 40)  # the branch has moved on
    moved = uc.sweep("org/tiny@step0", TEXTS, out=tmp_path / "out").record.checkpoints[0]
    assert moved.fingerprint == whole.checkpoints[2].fingerprint != whole.checkpoints[0].fingerprint


# Several processes ----------------------------------------------------------------------------------------------------


def forked(work: Callable[[], object]) -> int:
    """A process that does the work and ends with 0, or else with 1."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # newer Pythons: this process has threads, which do nothing now
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def noting(log: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], object] = lambda task: None) -> None:
    """Every measurement that begins leaves a line in a file, from whichever process, and takes a little time."""

    def noted(task: Any, progress: Any = None) -> Any:
        with open(log, "ab", buffering=0) as stream:
            stream.write(f"{os.getpid()} {os.path.basename(task.checkpoint.name)}\n".encode())
        before(task)
        time.sleep(0.02)
        return stored(task)

    monkeypatch.setattr(sweep_workers, "measured", noted)


@pytest.mark.slow
def test_killed_at_twenty_moments_it_loses_one_each_time_at_most(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, out, draw = tmp_path / "log", tmp_path / "out", random.Random(0)
    golden_record()  # before the forks, which would each read it
    noting(log, monkeypatch)
    began = time.monotonic()
    os.waitpid(forked(lambda: uc.sweep(run, TEXTS, out=tmp_path / "undisturbed")), 0)
    whole = time.monotonic() - began
    log.write_bytes(b"")
    kept: dict[str, int] = {}
    survived = 0
    for number in range(20):
        tokens = 4 + number // 4  # other options now and then: four more records are to be made
        child = forked(lambda: uc.sweep(run, TEXTS, out=out, max_tokens=tokens))  # noqa: B023 - forked at once
        time.sleep(draw.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        survived += os.waitpid(child, 0)[1] == 0
        now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json.gz")} if out.exists() else {}
        assert kept.items() <= now.items()  # none is lost, none was measured again
        for name in now.keys() - kept.keys():
            assert records.load(out / name)
        kept = now
    begun = len(log.read_text().splitlines())
    assert begun <= len(kept) + 20 - survived
    assert kept
    assert begun > len(kept)  # some were killed in flight, so that something was tried
    for tokens in range(4, 9):
        uc.sweep(run, TEXTS, out=out, max_tokens=tokens)
    assert len(list(out.glob("*.json.gz"))) == 20
    assert len(log.read_text().splitlines()) == begun + 20 - len(kept)


def test_two_runs_on_one_folder_share_the_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noting(tmp_path / "log", monkeypatch, before=lambda task: time.sleep(0.2))
    children = [
        forked(lambda: uc.sweep(run, TEXTS, out=tmp_path / "out").to_json(tmp_path / f"{os.getpid()}.json"))
        for _ in range(2)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    begun = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(name for _, name in begun) == sorted(f"checkpoint-{step}" for step in STEPS)
    assert {int(process) for process, _ in begun} == set(children)
    one, two = (uc.load(tmp_path / f"{child}.json").record for child in children)
    assert one == two == uc.sweep(run, TEXTS, out=tmp_path / "out").record
    assert len(begun) == len((tmp_path / "log").read_text().splitlines())


def test_a_dead_process_keeps_no_lock(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run hangs in the second checkpoint: this one does all others, waits for it, and takes it over when it dies."""
    here = os.getpid()
    noting(
        tmp_path / "log",
        monkeypatch,
        before=lambda task: time.sleep(60 if os.getpid() != here and task.checkpoint.step == 5 else 0),
    )
    monkeypatch.setattr("uncollapse.analyses.sweep.PATIENCE", 0.05)
    child = forked(lambda: uc.sweep(run, TEXTS, out=tmp_path / "out"))
    try:
        while b"checkpoint-5" not in ((tmp_path / "log").read_bytes() if (tmp_path / "log").exists() else b""):
            time.sleep(0.02)
        waited: list[tuple[str, int, int]] = []

        def progress(what: str, done: int, total: int) -> None:
            waited.append((what, done, total))
            if what == "waiting for another run":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

        found = uc.sweep(run, TEXTS, out=tmp_path / "out", progress=progress)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not found.failures
    assert ("waiting for another run", 3, 4) in waited
    by_us = [
        name for process, name in map(str.split, (tmp_path / "log").read_text().splitlines()) if int(process) == here
    ]
    assert by_us == ["checkpoint-40", "checkpoint-100", "checkpoint-5"]


def test_a_checkpoint_that_somebody_died_of_comes_last(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting(
        tmp_path / "log",
        monkeypatch,
        before=lambda task: (
            os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != here and task.checkpoint.step == 0 else None
        ),
    )
    here = os.getpid()
    for expected in (["checkpoint-0"], ["checkpoint-5", "checkpoint-40", "checkpoint-100", "checkpoint-0"]):
        (tmp_path / "log").write_bytes(b"")
        os.waitpid(forked(lambda: uc.sweep(run, TEXTS, out=tmp_path / "out")), 0)
        assert [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()] == expected
