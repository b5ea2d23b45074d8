"""Several checkpoints in order: what stands for what, and what a fingerprint follows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from uncollapse.errors import InputError
from uncollapse.sources import series, weights_fingerprint


def folder(place: Path, *, model: bool = True) -> Path:
    place.mkdir(parents=True)
    if model:
        (place / "config.json").write_text("{}")
    return place


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run: three checkpoints, and a folder that is none."""
    place = folder(tmp_path / "run", model=False)
    for step in (1000, 500, 20):
        folder(place / f"checkpoint-{step}")
    folder(place / "logs", model=False)
    return place


def test_a_folder_of_checkpoints_stands_for_them_by_step(run: Path) -> None:
    found = series([run])
    assert [(each.step, each.run) for each in found] == [(step, str(run)) for step in (20, 500, 1000)]
    assert series([run, run / "checkpoint-500"]) == found, "each once"


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_the_finished_model_beside_its_checkpoints_comes_last(file: str, run: Path) -> None:
    (run / file).write_text("{}")
    found = series([run])
    assert [each.step for each in found] == [20, 500, 1000, None]
    assert (found[-1].name, found[-1].run) == (str(run), str(run))


def test_a_folder_that_is_no_run_is_the_model_itself(run: Path) -> None:
    alone = folder(run.parent / "alone")
    assert [each.name for each in series([alone])] == [str(alone)]
    inner = folder(run / "checkpoint-500" / "global_step500", model=False)
    assert [each.name for each in series([inner.parent])] == [str(inner.parent)]


def test_runs_stay_in_the_order_in_which_they_are_named(run: Path) -> None:
    names = ["org/b@step10", "org/a@step7", "org/b@step9", str(run / "checkpoint-20"), "org/b"]
    assert [each.name for each in series(names)] == [
        "org/b@step9",
        "org/b@step10",
        "org/b",
        "org/a@step7",
        str(run / "checkpoint-20"),
    ]
    with pytest.raises(InputError, match="at least one model"):
        series([])


def test_adapters_that_name_each_other_end(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    for place, base in ((one, other), (other, one)):
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": os.fspath(base)}))
    before = weights_fingerprint(str(one), remembered=tmp_path / "known")
    (other / "config.json").write_text("{ }")
    assert weights_fingerprint(str(one), remembered=tmp_path / "known") != before
