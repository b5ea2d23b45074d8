"""A sweep on a local Ray cluster: the same records, and a worker that dies is a failure of one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import uncollapse as uc
from tests.helpers.checkpoints import TEXTS, run_of
from uncollapse import records

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers, which find this checkout as this process does."""
    import ray

    here = os.pathsep.join([str(Path(uc.__file__).parents[1]), str(Path(__file__).parents[2])])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": here, "HF_HUB_OFFLINE": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of([0, 5, 40], tmp_path_factory.mktemp("series") / "run")


def test_the_records_are_those_of_this_process(cluster: None, run: Path, tmp_path: Path) -> None:
    there = uc.sweep(run, TEXTS, out=tmp_path / "there", ray="auto")
    here = uc.sweep(run, TEXTS, out=tmp_path / "here")
    assert there.record == here.record
    for checkpoint in here.record.checkpoints:
        one, other = (records.load(tmp_path / place / str(checkpoint.file)) for place in ("there", "here"))
        assert one == other
    assert uc.sweep(run, TEXTS, out=tmp_path / "there", ray="auto").record == here.record


def test_a_worker_that_dies_is_a_failure_of_its_checkpoint(
    cluster: None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uncollapse.analyses import sweep_workers

    really = sweep_workers.measured

    def dies(task: Any) -> Any:
        if task.checkpoint.step == 5:
            os._exit(9)
        return really(task)

    monkeypatch.setattr(sweep_workers, "measured", dies)
    found = uc.sweep(run, TEXTS, out=tmp_path / "out", ray="auto")
    assert [c.step for c in found.failures] == [5]
    assert found.failures[0].failure is not None
    assert "WorkerCrashedError" in found.failures[0].failure.message
    monkeypatch.setattr(sweep_workers, "measured", really)
    assert not uc.sweep(run, TEXTS, out=tmp_path / "out", ray="auto", retry=True).failures
