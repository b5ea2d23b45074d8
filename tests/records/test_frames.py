"""Records as tables: one row per record, one column per figure, whoever makes the frame."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import os
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import uncollapse as uc
from tests.helpers.command_line import refused
from tests.helpers.sweep_samples import swept
from uncollapse.analyses.stored import Trail
from uncollapse.cli import output
from uncollapse.records import frames
from uncollapse.records.common import Statistic
from uncollapse.records.trail import HeadPlace, SitePlace, TrailReading, TrailRecord

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Made:
    block: int
    value: Statistic | None
    others: list[int] = field(default_factory=list)
    is_known: bool | None = None
    angles: list[list[float]] | None = None
    unavailable: dict[str, str] = field(default_factory=dict)


ROWS = [
    Made(0, Statistic(1.0, 0.5, 1.5, 4), [2, 7], True, [[0.5]]),
    Made(1, None, [], None, None, {"value": "a reason"}),
]
EXPECTED = {
    "block": [0, 1],
    "value": [1.0, None],
    "value_min": [0.5, None],
    "value_max": [1.5, None],
    "value_n": [4, None],
    "others": ["2, 7", ""],
    "is_known": [True, None],
    "angles": ["[[0.5]]", None],
}


def test_a_figure_has_its_mean_under_its_own_name() -> None:
    assert frames.columns(ROWS, Made) == EXPECTED
    assert frames.columns([], Made) == {name: [] for name in EXPECTED}, "the columns depend on what was measured"


@pytest.mark.parametrize("backend", frames.BACKENDS)
def test_a_frame_holds_what_the_record_holds(backend: str) -> None:
    """Of each library that is installed; of the others it says so."""
    if importlib.util.find_spec(backend) is None:
        with pytest.raises(uc.InputError, match=f"to_frame: expected {backend} to be installed"):
            frames.frame(ROWS, Made, backend=backend)
        return
    import narwhals

    made = narwhals.from_native(frames.frame(ROWS, Made, backend=backend))
    cells = {name: [None if cell != cell else cell for cell in made[name].to_list()] for name in made.columns}
    assert cells == EXPECTED
    empty = narwhals.from_native(frames.frame([], Made, backend=backend))
    assert (empty.columns, len(empty)) == (list(EXPECTED), 0)


def test_the_first_that_is_installed_makes_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def from_dict(table: dict[str, list[Any]], *, schema: dict[str, Any], backend: str) -> Any:
        asked.append((table, [str(kind) for kind in schema.values()], backend))
        return types.SimpleNamespace(to_native=lambda: "native")

    import narwhals

    monkeypatch.setattr(narwhals, "from_dict", from_dict)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "polars" else None)
    assert frames.frame(ROWS, Made) == "native"
    kinds = ["Int64", "Float64", "Float64", "Float64", "Int64", "String", "Boolean", "String"]
    assert asked == [(EXPECTED, kinds, "polars")]


def test_without_any_of_them_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(uc.InputError, match="pandas or polars or pyarrow to be installed"):
        frames.frame(ROWS, Made)
    with pytest.raises(uc.InputError, match="a backend among"):
        frames.frame(ROWS, Made, backend="excel")
    with pytest.raises(uc.InputError, match="to_parquet: expected pyarrow to be installed"):
        uc.load(GOLDEN / "heads.json").to_parquet("nowhere")
    assert not os.path.exists("nowhere")


@pytest.mark.parametrize("name", ["ablation", "diagnosis", "heads", "ledger", "symmetries"])
def test_every_list_of_every_record_is_a_table(name: str) -> None:
    """Against the JSON itself: every list of objects, at the top or inside a row, has its rows in a table."""
    document = json.loads((GOLDEN / f"{name}.json").read_text())
    result = uc.load(GOLDEN / f"{name}.json")
    tables = frames.tables(result.record)
    listed = {
        key: rows for key, rows in document.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    }
    assert listed, "the sample is empty"
    for key, rows in listed.items():
        columns = tables[key].columns
        assert all(len(column) == len(rows) for column in columns.values())
        for index, row in enumerate(rows):
            for column, value in row.items():
                if isinstance(value, dict) and "mean" in value:
                    assert [columns[f"{column}_{one}" if one != "mean" else column][index] for one in value] == [
                        *value.values()
                    ]
                elif isinstance(value, str | int | float | bool):
                    assert columns[column][index] in (value, str(value)), (key, column)
    assert list(tables) == result.tables


def test_a_list_inside_a_row_carries_what_tells_the_row_from_others() -> None:
    document = json.loads((GOLDEN / "ablation.json").read_text())
    expected = [
        (", ".join(run["without"]), site["site"], site["rank"]["mean"])
        for run in document["runs"]
        for site in run["trajectory"]
    ]
    found = frames.tables(uc.load(GOLDEN / "ablation.json").record)["trajectory"].columns
    assert list(zip(found["without"], found["site"], found["rank"], strict=True)) == expected
    inside = frames.tables(uc.load(GOLDEN / "ledger.json").record)["evidence"].columns
    ledger = json.loads((GOLDEN / "ledger.json").read_text())
    assert inside["id"] == [claim["id"] for claim in ledger["claims"] for _ in claim["evidence"]]


def test_of_a_sweep_every_row_says_which_checkpoint_it_is_of() -> None:
    record = swept()
    tables = frames.tables(record)
    assert list(tables) == ["runs", "checkpoints", "figures", "findings"]
    several = [(run, checkpoint) for run in record.runs for checkpoint in run.checkpoints]
    found = tables["checkpoints"].columns
    assert list(zip(found["run"], found["name"], found["step"], found["failure_kind"], strict=True)) == [
        (run.name, each.name, each.step, None if each.failure is None else each.failure.kind) for run, each in several
    ]
    found = tables["findings"].columns
    assert list(zip(found["run"], found["checkpoint"], found["code"], found["block"], strict=True)) == [
        (run.name, each.name, finding.code, finding.block) for run, each in several for finding in each.findings
    ]
    found = tables["figures"].columns
    columns = ("run", "checkpoint", "measure", "worst", "block", "head")
    assert list(zip(*(found[column] for column in columns), strict=True)) == [
        (run.name, each.name, measure, figure.worst, figure.block, figure.head)
        for run, each in several
        for measure, figure in each.figures.items()
    ]
    assert frames.main_table(record).columns == tables["checkpoints"].columns


def test_a_table_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        uc.InputError, match=r"frame: expected one of trajectory, .*'atention'. The nearest is 'attention'"
    ):
        uc.load(GOLDEN / "diagnosis.json").frame("atention")


def test_of_a_trail_every_place_at_every_step_is_a_row() -> None:
    from tests.helpers.records_samples import encoder

    diagnosed = encoder()
    record = TrailRecord(
        schema="uncollapse/trail/1",
        versions={},
        model=diagnosed.model,
        probe=diagnosed.probe,
        options={},
        sites=[SitePlace("embedding", None, None), SitePlace("block.0", 0, None)],
        heads=[HeadPlace(0, 1, None, "self")],
        readings=[
            TrailReading(10, {"rank": [3.0, None]}, {"max_logit": [7.0]}, {"DEPTH-RANK": -1.5}, loss=2.0),
            TrailReading(20, {"rank": [4.0, 5.0]}, {}, {}, loss=None),
        ],
    )
    tables = frames.tables(record)
    sites = tables["sites"].columns
    assert list(zip(sites["step"], sites["site"], sites["rank"], strict=True)) == [
        (10, "embedding", 3.0),
        (10, "block.0", None),
        (20, "embedding", 4.0),
        (20, "block.0", 5.0),
    ]
    assert tables["heads"].columns == {
        "step": [10, 20],
        "block": [0, 0],
        "head": [1, 1],
        "stack": [None, None],
        "kind": ["self", "self"],
        "max_logit": [7.0, None],
    }
    assert tables["readings"].columns == {"step": [10, 20], "loss": [2.0, None]}
    assert tables["margins"].columns == {"step": [10], "key": ["DEPTH-RANK"], "margin": [-1.5]}
    assert Trail(record).tables == ["readings", "sites", "heads", "margins", "alarms"]


def test_csv_files_read_back_as_the_tables(tmp_path: Path) -> None:
    result = uc.load(GOLDEN / "diagnosis.json")
    result.to_csv(tmp_path / "tables")
    assert {file.name for file in (tmp_path / "tables").iterdir()} == {f"{name}.csv" for name in result.tables}
    for name, table in frames.tables(result.record).items():
        text = (tmp_path / "tables" / f"{name}.csv").read_bytes().decode()
        names, *rows = csv.reader(io.StringIO(text, newline=""))
        assert names == list(table.columns)
        assert rows == [["" if c is None else str(c) for c in row] for row in zip(*table.columns.values(), strict=True)]


def test_parquet_files_read_back_as_the_tables(tmp_path: Path) -> None:
    result = uc.load(GOLDEN / "diagnosis.json")
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(uc.InputError, match="to_parquet: expected pyarrow to be installed"):
            result.to_parquet(tmp_path / "tables")
        assert not (tmp_path / "tables").exists()
        return
    import pyarrow.parquet

    result.to_parquet(tmp_path / "tables")
    for name, table in frames.tables(result.record).items():
        assert pyarrow.parquet.read_table(tmp_path / "tables" / f"{name}.parquet").to_pydict() == table.columns


def test_only_the_first_of_several_processes_writes_tables(tmp_path: Path) -> None:
    other = dataclasses.replace(uc.load(GOLDEN / "heads.json"), is_first=False)
    other.to_csv(tmp_path / "tables")
    other.to_parquet(tmp_path / "tables")
    assert not (tmp_path / "tables").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(uc.InputError, match="to_csv: expected a folder that can be written"):
        uc.load(GOLDEN / "heads.json").to_csv(tmp_path / "file")
    with pytest.raises(uc.InputError, match="to_csv: expected a folder that can be written"):
        uc.load(GOLDEN / "heads.json").to_csv(tmp_path / "missing" / "folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_line_refuses_before_the_work_what_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "corpus.csv").write_text("a text")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "findings.csv").mkdir()
    for folder in ("file", "missing/folder", "file/folder", "there"):
        with pytest.raises(uc.InputError, match="--csv: expected a folder that can be written"):
            output.require_writable(output.Outputs(csv=str(tmp_path / folder)), quiet=True)
    reads = output.Reads([("--text", str(tmp_path / "here" / "corpus.csv"))])
    with pytest.raises(uc.InputError, match="--csv: expected a folder of its own"):
        output.require_writable(output.Outputs(csv=str(tmp_path / "here")), quiet=True, reads=reads)
    taken = output.Outputs(json=str(tmp_path / "here" / "heads.csv"), csv=str(tmp_path / "here"))
    with pytest.raises(uc.InputError, match="--csv: expected a folder of its own"):
        output.require_writable(taken, quiet=True)
    before = sorted(file.name for file in tmp_path.rglob("*"))
    output.require_writable(
        output.Outputs(csv=str(tmp_path / "here"), json=str(tmp_path / "here" / "r.json")), quiet=True
    )
    output.require_writable(output.Outputs(csv=str(tmp_path / "new")), quiet=True)
    assert sorted(file.name for file in tmp_path.rglob("*")) == before


def test_the_command_line_writes_the_tables(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from uncollapse.cli.commands import main

    with pytest.raises(SystemExit) as ended:
        main(["show", str(GOLDEN / "heads.json"), "--csv", str(tmp_path / "out"), "--quiet"])
    assert ended.value.code == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"heads.csv", "findings.csv"}
    if importlib.util.find_spec("pyarrow") is None:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["show", str(GOLDEN / "heads.json"), "--parquet", str(tmp_path / "other"), "--quiet"])
        assert isinstance(ended.value.code, int)
        refused((ended.value.code, *capfd.readouterr()), "--parquet: expected pyarrow to be installed")
        assert not (tmp_path / "other").exists()
