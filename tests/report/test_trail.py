"""A monitored run, shown in a terminal and as a page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import uncollapse as uc
from tests.helpers.own_models import OwnGPT
from tests.monitoring.test_bit_identical import probe
from uncollapse import report
from uncollapse.cli.commands import main
from uncollapse.records.trail import TrailRecord
from uncollapse.report.healthy import references
from uncollapse.report.trail import charts


@pytest.fixture(scope="module")
def trail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the attention of block 2 freezes at step 3 and is well again at step 7."""
    path = tmp_path_factory.mktemp("trail") / "run.jsonl"
    torch.manual_seed(0)
    model = OwnGPT()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[:64] *= 4  # attention that chooses something
    weight = model.blocks[2].attention.qkv.weight
    kept = weight.detach().clone()
    monitor = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1, trail=path)
    for step in range(12):
        with torch.no_grad():
            weight.copy_(kept)
            weight[:64] *= 20 if 3 <= step < 7 else 1
        monitor.step(step, loss=4.0 - step / 10)
    return path


def record(path: Path) -> TrailRecord:
    found = uc.load(path).record
    assert isinstance(found, TrailRecord)
    return found


def printed(of: TrailRecord, width: int = 100) -> str:
    text = io.StringIO()
    report.show(of, Console(file=text, width=width))
    return text.getvalue()


def test_the_printout_says_each_alarm_and_what_happened_next(trail: Path) -> None:
    words = " ".join(printed(record(trail)).split())
    assert "!! step 3 ENTROPY-FROZEN (block 2" in words
    assert "It was over at step 9." in words
    assert "The loss was 3.70 then and is 2.90 now." in words
    assert "Remedy:" in words
    assert re.search(r"1 alarm in 12 looks up to step 11; it is over\.", words)
    assert max(map(len, printed(record(trail), 60).splitlines())) <= 60


def test_the_page_has_curves_and_maps_with_the_alarms_marked(trail: Path) -> None:
    page = report.draw(record(trail))
    for title in (
        "Training loss",
        "How near each rule is",
        "Consensus distance after normalisation, blocks × steps",
        "Largest logit, heads × steps",
    ):
        assert title in page
    specs = {
        key: json.loads(spec)
        for key, spec in re.findall(r'<script type="application/json" data-chart="([^"]*)">(.*?)</script>', page, re.S)
    }
    heads, loss = specs["heads-rest-entropy"], specs["loss"]
    assert {(cell["step"], cell["row"]) for cell in _values(heads, 0)} == {(s, h) for s in range(12) for h in range(12)}
    assert [(cell["step"], cell["row"]) for cell in _values(heads, 1)] == [(3, 8 + record(trail).alarms[0].head)]
    assert len(_values(loss, -1)) == 12


def test_an_alarm_marks_the_attention_that_it_is_about(trail: Path) -> None:
    run = record(trail)
    both = replace(run, heads=[*run.heads, *(replace(head, kind="cross") for head in run.heads)])
    (chart,) = (chart for chart in charts.head_maps(both, references(both)) if chart.key == "heads-rest-entropy")
    assert [cell["row"] for cell in _values(chart.spec, 1)] == [8 + run.alarms[0].head]


def _values(spec: dict[str, Any], layer: int) -> list[dict[str, Any]]:
    data = spec["layer"][layer].get("data") or spec["data"]
    return list(data["values"] if "values" in data else spec["datasets"][data["name"]])


def test_a_run_without_alarms_or_without_readings_is_shown_too(trail: Path) -> None:
    calm = replace(record(trail), readings=[replace(r, alarms=[], cleared=[]) for r in record(trail).readings])
    assert "No alarm in 12 looks up to step 11." in printed(calm)
    assert "No alarm in 12 looks" in report.draw(calm)
    empty = replace(calm, readings=[])
    assert "Nothing has been read yet." in printed(empty)
    assert "Nothing has been read yet." in report.draw(empty)


def test_the_command_shows_a_trail_while_it_grows(
    trail: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    growing = tmp_path / "growing.jsonl"
    growing.write_bytes(trail.read_bytes()[:-30])  # the last line is in flight
    with pytest.raises(SystemExit) as ended:
        main(["show", str(growing), "--html", str(tmp_path / "run.html"), "--json", str(tmp_path / "run.json")])
    assert ended.value.code == 0
    assert "1 alarm in 11 looks" in " ".join(capfd.readouterr().out.split())
    assert len(json.loads((tmp_path / "run.json").read_text("utf-8"))["readings"]) == 11
    assert "ENTROPY-FROZEN" in (tmp_path / "run.html").read_text("utf-8")


def test_a_spoilt_line_is_named(trail: Path, tmp_path: Path) -> None:
    lines = trail.read_text("utf-8").splitlines(keepends=True)
    lines[4] = "not a reading\n"
    (tmp_path / "spoilt.jsonl").write_text("".join(lines), "utf-8")
    with pytest.raises(uc.InputError, match=r"line 5 of .*spoilt\.jsonl"):
        uc.load(tmp_path / "spoilt.jsonl")


@pytest.mark.parametrize("loss", ["NaN", "1e999"])
def test_a_number_that_is_not_finite_is_refused(loss: str, trail: Path, tmp_path: Path) -> None:
    spoilt = re.sub(r'"loss":[\d.]+', f'"loss":{loss}', trail.read_text("utf-8"))
    (tmp_path / "spoilt.jsonl").write_text(spoilt, "utf-8")
    with pytest.raises(uc.InputError, match=r"finite numbers, got line 2 of .*spoilt\.jsonl"):
        uc.load(tmp_path / "spoilt.jsonl")


def test_the_page_says_whether_a_probe_or_training_itself_was_read(trail: Path) -> None:
    run = record(trail)
    assert "a fixed probe went through the model" in report.draw(run)
    page = report.draw(replace(run, options={**run.options, "on": "train"}))
    assert "a fixed probe" not in page
    assert "a training batch in its own forward pass" in page
