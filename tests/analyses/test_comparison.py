"""Two diagnoses beside each other: what changed, what is noise, and what cannot be compared."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console
from torch import nn

import uncollapse as uc
from tests.helpers.own_models import OwnGPT
from uncollapse import report
from uncollapse.cli.commands import main
from uncollapse.judgement.comparison import FALSE_ALARMS, has_moved, noise, standard_error
from uncollapse.records.common import Statistic


def batch(seed: int = 5, sequences: int = 12, tokens: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"idx": torch.randint(0, 64, (sequences, tokens), generator=generator)}]


def model(grown: float = 1.0) -> nn.Module:
    """Attention that chooses something; the queries of head 1 of block 1 are `grown` times as large."""
    built = OwnGPT()
    with torch.no_grad():
        for block in built.blocks:
            block.attention.qkv.weight[:64] *= 5
        built.blocks[1].attention.qkv.weight[8:16] *= grown
        built.blocks[1].attention.qkv.bias[8:16] *= grown
    return built


@pytest.fixture(scope="module")
def before() -> uc.Diagnosis:
    return uc.diagnose(model(), batches=batch(), name="before")


def test_a_head_whose_logits_grew_by_half_is_found_and_no_other(before: uc.Diagnosis) -> None:
    after = uc.diagnose(model(1.5001), batches=batch(), name="after")
    found = uc.compare(before, after)
    assert found.record.same_probe is True
    logits = [f for f in found.findings if f.code == "BASELINE-LOGITS"]
    assert [(f.block, f.head) for f in logits] == [(1, 1)]
    assert logits[0].value == pytest.approx(1.5, rel=1e-3)
    moved = {(c.block, c.head) for c in found.moved if c.measure == "max_logit"}
    assert {place for place in moved if place[0] <= 1} == {(1, 1)}  # nothing before it, and none beside it
    assert not [c for c in found.moved if c.block == 0]


def test_a_model_beside_itself_has_not_changed(before: uc.Diagnosis) -> None:
    found = uc.compare(before, uc.diagnose(model(), batches=batch()))
    assert found.moved == found.findings == []
    assert {c.noise for c in (*found.record.sites, *found.record.heads)} == {0.0}


def test_another_probe_is_said_to_be_one_and_single_heads_are_not_compared(before: uc.Diagnosis) -> None:
    found = uc.compare(before, uc.diagnose(model(), batches=batch(seed=6)))
    assert found.record.same_probe is False
    assert found.record.heads == []
    assert "different probes" in found.record.unavailable["heads"]
    assert found.record.smallest["consensus_after_norm"] > 0
    text = io.StringIO()
    found.show(Console(file=text, width=100))
    assert "Single heads were not compared" in text.getvalue()


def test_records_from_before_fingerprints_are_compared_as_different_probes(before: uc.Diagnosis) -> None:
    old = replace(before.record, probe=replace(before.record.probe, fingerprint=""))
    found = uc.compare(old, before.record)
    assert found.record.same_probe is None
    assert found.record.heads == []
    assert "too old" in found.record.unavailable["heads"]


@pytest.mark.parametrize("spread", ["normal", "even"])
def test_two_probes_of_one_model_are_called_different_in_at_most_one_of_a_hundred(spread: str) -> None:
    """The same figure on two probes of 16 sequences, drawn 4000 times."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn if spread == "normal" else torch.rand
    draws = 3 + draw(4000, 2, 16, generator=generator, dtype=torch.float64)
    called = 0
    for one, other in draws:
        a, b = (Statistic(float(x.mean()), float(x.min()), float(x.max()), 16) for x in (one, other))
        error = noise(a, b, same_probe=False)
        assert error is not None
        called += abs(a.mean - b.mean) > 2.5758 * error
    least, most = {"normal": (0.1, 1.0), "even": (0.4, 2.0)}[spread]
    assert least * FALSE_ALARMS < called / 4000 < most * FALSE_ALARMS


def test_one_sequence_does_not_tell_its_noise() -> None:
    assert standard_error(Statistic(1.0, 1.0, 1.0, 1)) is None
    assert has_moved(1.0, 9.0, None) is False


def test_a_finding_that_appeared_and_one_that_is_gone(before: uc.Diagnosis) -> None:
    frozen = uc.diagnose(model(40.0), batches=batch())
    found = uc.compare(before, frozen)
    assert ("ENTROPY-FROZEN", 1) in [(f.code, f.block) for f in found.record.appeared]
    back = uc.compare(frozen, before)
    assert ("ENTROPY-FROZEN", 1) in [(f.code, f.block) for f in back.record.gone]
    assert "ENTROPY-FROZEN" not in [f.code for f in back.findings]


def test_a_head_that_died_beside_a_dead_one_has_appeared(before: uc.Diagnosis) -> None:
    def dead(*heads: int) -> uc.Diagnosis:
        built = model()
        with torch.no_grad():
            for head in heads:
                built.blocks[1].attention.out.weight[:, 8 * head : 8 * head + 8] = 0
        return uc.diagnose(built, batches=batch())

    one, two = dead(2), dead(2, 3)
    appeared = uc.compare(one, two).record.appeared
    assert [(f.code, f.block, f.head) for f in appeared] == [("DEAD-HEAD", 1, 3)]


def test_models_of_another_shape_and_other_records_are_refused(before: uc.Diagnosis) -> None:
    with pytest.raises(uc.InputError, match="two models of the same shape"):
        uc.compare(before, uc.diagnose(OwnGPT(blocks=2), batches=batch()))
    with pytest.raises(uc.InputError, match="two diagnoses, got"):
        uc.compare(before, uc.compare(before, before))  # type: ignore[arg-type]
    with pytest.raises(uc.InputError, match="can be read"):
        uc.compare(before, "nothing.json")


def test_a_record_of_one_model_is_refused_where_it_is_shown(before: uc.Diagnosis) -> None:
    whole = uc.compare(before, before)
    edited = replace(whole, record=replace(whole.record, models=whole.record.models[:1]))
    with pytest.raises(uc.InputError, match=r"^show: expected a record whose parts belong together"):
        edited.show(Console(file=io.StringIO()))


def test_the_command_writes_the_record_and_the_page(
    before: uc.Diagnosis, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before.to_json(tmp_path / "a.json")
    uc.diagnose(model(2.0), batches=batch(), name="after").to_json(tmp_path / "b.json")

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *arguments])
        return int(ended.value.code or 0)

    assert run("--json", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "before → after" in printed
    assert "block 1, head 1" in printed
    assert "BASELINE-LOGITS" in printed
    record = json.loads((tmp_path / "c.json").read_text("utf-8"))
    schema = json.loads((Path(uc.__file__).parent / "schemas" / "comparison-1.json").read_text("utf-8"))
    jsonschema.validate(record, schema)
    page = (tmp_path / "c.html").read_text("utf-8")
    assert "Largest logit of every head, change: one row per block, one column per head." in page
    assert page == report.draw(uc.load(tmp_path / "c.json").record)
    assert run("--quiet", "--fail-on", "warning") == 1
    assert run("--quiet", "--fail-on", "critical") == 0


def test_several_are_each_compared_with_the_first(
    before: uc.Diagnosis, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = (uc.diagnose(model(grown), batches=batch(), name=f"x{grown}") for grown in (1.2, 2.0))
    other_probe = uc.diagnose(model(), batches=batch(seed=6), name="other")
    found = uc.compare(before, one, two, other_probe)
    for pair, alone in zip(found.pairs, (one, two, other_probe), strict=True):
        assert pair.record == uc.compare(before, alone).record
    assert found.findings == [f for pair in found.pairs for f in pair.findings]
    assert found.moved == [change for pair in found.pairs for change in pair.moved]
    logits = [pair.record.findings for pair in found.pairs]
    assert [any(f.code == "BASELINE-LOGITS" for f in findings) for findings in logits] == [False, True, False]
    assert [each.name for each in found.record.further] == ["x2.0", "other"]
    found.to_json(tmp_path / "c.json")
    assert uc.load(tmp_path / "c.json").record == found.record
    schema = json.loads((Path(uc.__file__).parent / "schemas" / "comparison-1.json").read_text("utf-8"))
    jsonschema.validate(json.loads(found.to_json()), schema)
    changes = found.frame("further_heads", backend="pyarrow").to_pydict()
    assert len(changes["after"]) == len(found.record.further[0].heads)
    assert set(changes["after"]) == {"x2.0"}

    for name, each in {"a": before, "b": one, "c": two}.items():
        each.to_json(tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in "abc"]
    for names, code in ((paths, 1), (paths[:2], 0)):
        with pytest.raises(SystemExit) as ended:
            main(["compare", *names, "--fail-on", "warning", "--html", str(tmp_path / "page.html")])
        assert ended.value.code == code, names
        printed = " ".join(capfd.readouterr().out.split())
        assert ("Something got worse in 1 of 2, compared with before." in printed) is (len(names) == 3)
        assert "before → x1.2" in printed


def test_models_of_one_name_are_numbered(before: uc.Diagnosis) -> None:
    found = uc.compare(before, before, before)
    assert [each.name for each in found.record.further] == ["before (3)"]
    text = io.StringIO()
    found.show(Console(file=text, width=100))
    assert "before → before (2)" in text.getvalue()
    assert "before → before (3)" in text.getvalue()
