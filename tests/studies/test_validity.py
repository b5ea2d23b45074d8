"""The validity benchmark itself: plants do what they say and nothing else, scores are what they are called, and a run of a few
cases goes through to a document."""

from __future__ import annotations

import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from studies.validity import cases, document, fresh, planting, saved, scoring
from studies.validity.models import SUBJECTS, Subject
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, text_batch
from uncollapse.analyses.recording import attention_records, site_records
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.judgement import findings
from uncollapse.measures import heads
from uncollapse.probe.passes import capture
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import ReaderRecord, SiteRecord

DOCUMENT = Path(__file__).parents[2] / "docs" / "validity.md"


def built(name: str, tokens: int = 20) -> tuple[nn.Module, list[dict[str, Tensor]], Any]:
    model = FAMILIES[name].build().eval()
    model.set_attn_implementation("sdpa")  # other tests leave these configurations at eager
    batches = [text_batch(2, tokens)]
    return model, batches, proved_anatomy(model, batches[0])


def output(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return model(**batches[0]).last_hidden_state


def observed(model: nn.Module, batches: Any, anatomy: Any) -> Any:
    seen = capture(model, batches, anatomy)
    return site_records(seen.sites), [r for s in seen.attention for r in attention_records(s, "core")]


# Plants ---------------------------------------------------------------------------------------------------------------


def test_logits_scaled_up_are_query_weights_scaled_up() -> None:
    model, batches, anatomy = built("bert")
    context = planting.at_attention(model, anatomy, [1], lambda g, _: planting.logits_scaled(g, [2], 7.0))
    with context:
        planted, attention = output(model, batches), observed(model, batches, anatomy)[1]
    query = model.encoder.layer[1].attention.self.query
    with torch.no_grad():
        query.weight[16:24] *= 7.0  # head 2, 8 wide
        query.bias[16:24] *= 7.0
    torch.testing.assert_close(output(model, batches), planted)
    weighted = observed(model, batches, anatomy)[1]
    for a, b in zip(attention, weighted, strict=True):
        assert a.normalized_entropy is not None
        assert b.normalized_entropy is not None
        assert a.normalized_entropy.mean == pytest.approx(b.normalized_entropy.mean, rel=1e-5)


def test_queries_made_alike_are_query_weights_at_zero_beside_the_bias_that_gives_their_mean() -> None:
    model, batches, anatomy = built("bert")
    with planting.at_attention(model, anatomy, [0], lambda g, _: planting.queries_alike(g, 1.0)):
        attention = observed(model, batches, anatomy)[1]
    assert all(a.value_contraction and a.value_contraction.mean < 1e-5 for a in attention if a.block == 0)
    assert all(a.value_contraction and a.value_contraction.mean > 1e-3 for a in attention if a.block == 1)


def test_a_common_part_added_is_one_vector_for_all_tokens_from_its_block_on() -> None:
    model, batches, anatomy = built("gpt2")
    entries: dict[int, Tensor] = {}

    def noting(block: int) -> Any:
        return model.h[block].register_forward_hook(lambda _, __, out, b=block: entries.update({b: out}))

    hooks = [noting(block) for block in range(len(model.h))]
    whole = output(model, batches)
    before = dict(entries)
    with planting.common_part_added(model, anatomy, 1, 4.0, seed=0):
        changed = output(model, batches)
    after = dict(entries)
    for hook in hooks:
        hook.remove()
    assert torch.equal(before[0], after[0])
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight.zero_()  # so that what was added is all that differs
        model.h[1].mlp.c_proj.bias.zero_()
        seen = []
        with model.h[1].register_forward_hook(lambda _, __, out: seen.append(out)):
            output(model, batches)
            for _ in range(2):
                with planting.common_part_added(model, anatomy, 1, 4.0, seed=0):
                    output(model, batches)
    added = seen[1] - seen[0]
    torch.testing.assert_close(added, added[:1, :1].expand_as(added))
    assert float(added[0, 0].norm() / seen[0].norm(dim=-1).median()) == pytest.approx(4, rel=1e-3)
    assert torch.equal(seen[1], seen[2])
    assert not torch.allclose(changed, whole)


def test_a_residual_scaled_to_nothing_is_a_residual_removed() -> None:
    model, batches, anatomy = built("gpt2")
    with planting.residual_scaled(model, anatomy, 1, 0.0):
        planted = output(model, batches)
    with uc.without(model, "residual", blocks=[1, 2], batch=batches[0]):
        torch.testing.assert_close(output(model, batches), planted)


def test_a_sink_takes_the_row_and_leaves_the_rest_of_it_alone() -> None:
    model, batches, anatomy = built("bert")
    before = observed(model, batches, anatomy)[1]
    with planting.at_attention(model, anatomy, [0], lambda g, _: planting.sink(g, [1], 20.0)):
        after = observed(model, batches, anatomy)[1]
    head, was = after[1], before[1]
    assert head.normalized_entropy
    assert head.normalized_entropy.mean < 1e-5
    assert head.rest_entropy
    assert was.rest_entropy
    assert head.rest_entropy.mean == pytest.approx(was.rest_entropy.mean, abs=0.01)
    other, unmoved = after[0], before[0]
    assert other.rest_entropy
    assert unmoved.rest_entropy
    assert other.rest_entropy.mean == pytest.approx(unmoved.rest_entropy.mean, rel=1e-6)  # float32, rounded elsewhere
    assert replace(other, rest_entropy=unmoved.rest_entropy) == unmoved


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3"])
def test_a_window_leaves_only_near_keys(name: str) -> None:
    model, batches, anatomy = built(name)
    changed = [dict(batches[0], input_ids=batches[0]["input_ids"].clone())]
    changed[0]["input_ids"][:, 0] = 5
    assert not torch.equal(output(model, changed)[:, -1], output(model, batches)[:, -1]) or name == "gemma3"
    with planting.at_attention(model, anatomy, range(3), lambda g, _: planting.windowed(g, 3)):
        far, near = output(model, changed), output(model, batches)
    assert torch.equal(far[:, -1], near[:, -1])  # three blocks reach six tokens back
    assert not torch.equal(far[:, 1], near[:, 1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_added_to_the_logits_leaves_the_mask_that_was_there(name: str) -> None:
    model, batches, anatomy = built(name)
    padded = {k: v.clone() for k, v in batches[0].items()}
    padded["attention_mask"][0, 15:] = 0
    other = padded | {"input_ids": padded["input_ids"].clone()}
    other["input_ids"][:, -1] = 5  # the last token, which is padding in the first sequence
    with planting.at_attention(model, anatomy, range(3), lambda g, _: planting.sink(g, [0, 2], 9.0)):
        assert torch.equal(output(model, [padded])[:, :-1], output(model, [other])[:, :-1])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_is_itself_again_after_every_plant(name: str) -> None:
    model, batches, anatomy = built(name)
    intact = output(model, batches)
    plants = [
        planting.residual_scaled(model, anatomy, 0, 0.5),
        planting.at_attention(model, anatomy, [0], lambda g, _: planting.logits_scaled(g, None, 9.0)),
        planting.at_attention(model, anatomy, [0], lambda g, _: planting.sink(g, [0, 1], 9.0)),
        planting.stream_changed(model, anatomy, 0, planting.first_token_massive),
        planting.stream_changed(model, anatomy, 0, planting.low_rank),
        planting.projection_changed(model, anatomy, 1, lambda W: planting.rank_reduced(W, 0.5)),
    ]
    for plant in plants:
        with plant:
            assert not torch.equal(output(model, batches), intact)
        assert torch.equal(output(model, batches), intact)


@pytest.mark.parametrize("name", ["bert", "gpt2"])  # a Linear and a Conv1D, which lie the other way round
def test_a_copied_head_writes_where_its_source_does(name: str) -> None:
    model, batches, anatomy = built(name)
    with planting.projection_changed(model, anatomy, 1, lambda W: planting.head_copied(W, 8, 3, 1, 1.0)):
        (matrix,) = [s.matrix for s in capture(model, batches, anatomy).attention if s.block == 1]
        assert matrix is not None
        matrix = matrix.clone()
    assert torch.equal(matrix[8:16], matrix[24:32])
    assert heads.write_space_overlap(matrix, 4)[1, 3] == pytest.approx(1)


def test_a_reduced_projection_has_lost_the_rank() -> None:
    matrix = planting.rank_reduced(torch.randn(32, 24), 0.25)
    assert int(torch.linalg.matrix_rank(matrix)) == 18


def test_keys_within_reach_leave_out_the_strongest_and_count_to_the_underflow() -> None:
    """One row over six keys behind four that are forbidden: logits 200 | 0, -80, -87, -89, -300."""
    query = torch.ones(1, 1, 1, 1)
    logits = torch.tensor([200.0, 0.0, -80.0, -87.0, -89.0, -300.0, 999.0, 999.0, 999.0, 999.0])
    mask = torch.arange(10) < 6
    given = {"query": query, "key": logits.view(1, 1, 10, 1), "scale": 1.0, "attn_mask": mask.view(1, 1, 1, 10)}
    found = planting.keys_within_reach(given, None, torch.ones(1, 1, dtype=torch.bool))
    assert found.tolist() == [3 / 5]


# Scores ---------------------------------------------------------------------------------------------------------------


def test_the_area_is_the_chance_to_score_higher() -> None:
    assert scoring.area([3.0, 2.0], [1.0, 2.0]) == 3.5 / 4
    assert scoring.area([1.0], [-float("inf")]) == 1


def case(**changes: Any) -> cases.Case:
    given = {"subject": "x", "number": 1, "plant": "p", "phenomenon": "entropy-collapse", "block": 2, "head": [1]}
    runs = [cases.Run({"o": o}, None, None, []) for o in (0.8, 0.6, 0.41, 0.4, 0.1)]
    return cases.Case(**(given | {"severities": [1, 2, 3, 4, 5], "runs": runs} | changes))


def test_moved_by_half_is_the_first_severity_at_half_of_the_own_healthy_value() -> None:
    assert scoring.moved_by_half(case(), "o") == 3
    assert scoring.moved_by_half(case(runs=case().runs[:3]), "o") is None


def test_a_resolution_is_the_coarsest_power_of_ten_that_healthy_values_stand_above() -> None:
    assert scoring.beside(0.5, None) == 0.5
    assert scoring.beside(1.0, 0.1) == 1
    assert scoring.beside(0.1, 0.1) == pytest.approx(0.55)
    assert scoring.resolution(0.4) == pytest.approx(0.1)  # 1.1 * 0.4 / 0.5 = 0.88, and 2 * 0.4 / 1.4 = 0.57
    assert scoring.resolution(0.2) == pytest.approx(0.01)  # 1.1 * 0.2 / 0.3 = 0.73
    assert scoring.moved_by_half(case(), "o", {"o": 0.2}) == 4  # 1.2 * 0.1 / 0.3 = 0.4 of 0.96, and 0.8 of 0.4


@pytest.mark.parametrize(
    ("planted", "found", "right"),
    [
        ({}, {"block": 2, "head": 1}, True),
        ({}, {"block": 2, "head": 0}, False),
        ({}, {"block": 1, "head": 1}, False),
        ({"head": None}, {"block": 2, "head": 0}, True),
        ({"head": [4, 1]}, {"block": 2, "head": 4, "message": "Heads 1 and 4 of block 2 write"}, True),
        ({"head": [4, 1]}, {"block": 2, "head": 4, "message": "Heads 0 and 4 of block 2 write"}, False),
    ],
)
def test_a_place_is_right_with_its_block_and_its_heads(planted: Any, found: Any, right: bool) -> None:
    given = {"code": "C", "phenomenon": "entropy-collapse", "severity": "warning", "value": 0.0, "threshold": 0.0}
    given |= {"message": "", "remedy": "", "reference": ""} | found
    assert scoring.is_located(case(**planted), findings.Reading(1.0, findings.Finding(**given))) == right


def stream(scaled: tuple[float, ...], read: tuple[float, ...], carried: tuple[float, ...] = ()) -> list[SiteRecord]:
    """The embedding and a site a block: the distance of tokens scaled to unit length, behind the norm that reads them, and what
    each block carries on."""
    one = Statistic(1.0, 1.0, 1.0, 8)
    nothing = dict.fromkeys(
        ["rank", "affine_rank", "effective_rank", "stable_rank", "participation_ratio", "token_similarity"]
    )
    return [
        SiteRecord(
            site="embedding" if i == 0 else f"block.{i - 1}",
            block=i - 1 if i else None,
            stack=None,
            attainable_rank=replace(one, mean=40.0, max=40.0),
            attainable_affine_rank=replace(one, mean=39.0, max=39.0),
            consensus_distance=one,
            consensus_after_norm=replace(one, mean=scaled[i]),
            readers=[ReaderRecord("norm", replace(one, mean=read[i]))],
            stream_carried=replace(one, mean=carried[i - 1]) if i and carried else None,
            **nothing,
        )
        for i in range(len(scaled))
    ]


def test_depth_is_graded_by_what_the_rule_reads() -> None:
    """Behind the norms that read the stream, not behind one without a gain: here those say the opposite."""
    sites = stream((0.9, 0.05, 0.04, 0.03), (0.8, 0.7, 0.2, 0.4))
    (reading,) = [r for r in findings.readings(sites, [], []) if r.finding.code == "DEPTH-CONSENSUS"]
    assert cases.consensus_as_read(sites, 0) == pytest.approx(reading.finding.value) == pytest.approx(0.25)
    assert cases.consensus_as_read(sites, 2) == pytest.approx(0.5)
    assert cases.consensus_as_read([replace(s, consensus_after_norm=None, readers=[]) for s in sites], 0) == 0


def fallen() -> dict[str, cases.Measured]:
    """A model of four blocks with one case of depth at block 2: healthy, half way without a warning, warned of."""
    apart, half, together = (1.0,) * 5, (1.0, 0.9, 0.8, 0.6, 0.4), (1.0, 0.8, 0.6, 0.4, 0.1)
    runs = [
        cases.Run({"consensus as read": read[-1]}, stream(read, read, carried), [], [])
        for read, carried in (
            (apart, (0.9, 1.0, 1.0, 1.0)),
            (half, (0.9, 1.0, 0.75, 0.75)),
            (together, (0.9, 0.55, 0.3, 0.3)),
        )
    ]
    planted = case(
        subject="gpt2",
        plant="residual scaled down",
        phenomenon="rank-collapse-depth",
        head=None,
        severities=[1.0, 0.8, 0.3],
        runs=runs,
    )
    return {"gpt2": cases.Measured("", "gpt2", 1000, runs[0], [planted])}


def test_where_a_fall_began_is_learnt_where_it_is_first_warned_of() -> None:
    """Half way, 0.8 and 0.9 find block 2. When it is warned of, those are too much: 0.4 and 0.5 find it."""
    measured = fallen()
    scores = scoring.Scores(measured)
    (planted,) = measured["gpt2"].cases
    for index, right in ((1, (0.8, 0.9)), (2, (0.4, 0.5))):
        placed = [c for c in scoring.CARRIED if document._is_placed(scores, planted, planted.runs[index], c)]
        assert tuple(placed) == right
    assert scores.beginning(["gpt2"]) == scores.derived.carried == 0.4
    assert scores.beginning([]) == findings.CARRIED


def test_a_half_is_every_second_model_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    (of,) = fallen().values()
    names = ["mpnet", "gpt2", "bert", "llama", "gemma3"]
    monkeypatch.setitem(SUBJECTS, "bert", SUBJECTS["gpt2"])  # as if it were healthy
    scores = scoring.Scores({name: replace(of, subject=name, parameters=i) for i, name in enumerate(names)})
    assert scores.halves() == (["gemma3", "bert", "mpnet"], ["llama", "gpt2"])


def test_beside_an_earlier_record_a_fall_begins_where_the_figures_first_moved() -> None:
    before = document._site_figures(cases.Run({}, stream((1.0,) * 4, (1.0,) * 4, (0.1, 0.9, 0.9)), None, []))
    for changed, expected in (((0.1, 0.9, 0.84), 2), ((0.1, 0.86, 0.9), None), ((0.2, 0.9, 0.1), 0)):
        after = document._site_figures(cases.Run({}, stream((1.0,) * 4, (1.0,) * 4, changed), None, []))
        assert document._first_that_differs(before, after) == expected
    after = document._site_figures(cases.Run({}, stream((1.0, 1.0, 0.9, 0.1), (1.0,) * 4, (0.1, 0.9, 0.9)), None, []))
    assert document._first_that_differs(before, after) == 1


def test_what_is_kept_of_an_output_is_its_differences_between_tokens() -> None:
    torch.manual_seed(0)
    output, other = torch.randn(2, 3, 40, 16, dtype=torch.float64)
    batch = {"attention_mask": torch.ones(3, 40)}
    batch["attention_mask"][1, 25:] = 0
    padded = output.clone()
    padded[1, 25:] = 1e6
    kept = planting.output_kept([output], [7 * padded + torch.randn(16, dtype=torch.float64)], [batch])
    assert kept == pytest.approx(1)
    assert abs(planting.output_kept([output], [other], [batch])) < 0.1
    assert planting.output_kept([output], [output + other], [batch]) == pytest.approx(0.5**0.5, abs=0.05)


def test_a_reader_tells_apart_what_lies_apart_and_not_what_came_together() -> None:
    """Twenty-four tokens with noise around eight places, 16 features. Shrunk to a hundredth they are lost to whoever reads in the
    old scale. Turned, or anywhere else, they are lost to whoever does not learn anew, and to nobody else: they only moved."""
    torch.manual_seed(0)
    batch = {"attention_mask": torch.ones(2, 24)}
    batch["attention_mask"][1, 20:] = 0
    healthy = torch.randn(8, 16, dtype=torch.float64).repeat(3, 1) + torch.randn(2, 24, 16, dtype=torch.float64)
    learnt = planting.reader([healthy], [batch])
    whole = learnt.told_apart([healthy], [batch])
    assert 0.7 * math.log(20) < whole < math.log(24)

    def anew(states: torch.Tensor) -> float:
        return planting.reader([states], [batch], learnt.scale).told_apart([states], [batch]) / whole

    assert anew(healthy.mean() + 0.01 * (healthy - healthy.mean())) < 0.1
    turned = healthy @ torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    elsewhere = healthy.std() * torch.randn_like(healthy)
    for moved in (turned, elsewhere, healthy + 7):
        assert anew(moved) > 0.9
    assert learnt.told_apart([elsewhere], [batch]) < 0.9 * whole
    padded = healthy.clone()
    padded[1, 20:] = 1e6
    assert anew(padded) == pytest.approx(1)
    equal = torch.ones_like(healthy)
    assert learnt.told_apart([equal], [batch]) == pytest.approx(0, abs=1e-12)
    assert planting.reader([equal / 0], [batch]).told_apart([equal / 0], [batch]) == 0


def test_a_reader_has_reached_the_optimum_of_its_regression() -> None:
    """Held against the gradient of the penalised loss, formed by hand."""
    torch.manual_seed(0)
    states = torch.randn(1, 12, 30, dtype=torch.float64)
    found = planting.reader([states], [{"attention_mask": torch.ones(1, 12)}])
    z = (states[0] - states[0].mean(0)) / states[0].std(0)
    p = (z @ found.weights[0]).softmax(-1)
    gradient = z.T @ (p - torch.eye(12)) / 12 + 2e-3 * found.weights[0]
    assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize(("kept", "is_harmed"), [(0.51, False), (0.49, True), (None, False)])
def test_a_change_that_takes_half_of_the_output_was_not_harmless(kept: float | None, is_harmed: bool) -> None:
    run = cases.Run({} if kept is None else {cases.OUTPUT_KEPT: kept}, None, None, [])
    assert scoring.Judged(case(phenomenon=None, runs=[run]), run, ()).is_harmed == is_harmed
    assert not scoring.Judged(case(runs=[run]), run, ()).is_harmed  # planted damage is meant to harm


# From the plants to the document ----------------------------------------------------------------------------------------


def test_a_few_cases_go_through_to_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(SUBJECTS):
        monkeypatch.delitem(SUBJECTS, name)
    measured = {}
    for name in ("gpt2", "bert", "llama"):
        model, batches, _ = built(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)  # at its initialisation attention is uniform, which is a collapse
        subject = Subject(f"a small {name}", lambda m=model, b=batches: (m, b), is_healthy=name != "llama")
        monkeypatch.setitem(SUBJECTS, name, subject)
        measured[name] = cases.measured(subject, name, "", 0.1)
    scores = scoring.Scores(measured)
    assert list(scores.measured) == ["gpt2", "bert"]
    for name, other in (("gpt2", "bert"), ("bert", "gpt2")):  # each judged by what the other gives
        nearest = min(
            d for j in scores.healthy(as_shipped=True) if j.case.subject == other and (d := j.distance("WIDTH-UNIFORM"))
        )
        assert scores.left_out[name].unused_keys == pytest.approx(nearest / 2)
    judged = {c.plant: runs for c, runs in scores.cases(lambda c: c.subject == "gpt2")}
    copied = judged["one head made a copy of another"]
    assert (
        copied[0].score("head-channel-non-identifiability") < 0 < copied[-1].score("head-channel-non-identifiability")
    )
    assert scoring.is_located(copied[-1].case, copied[-1].top("head-channel-non-identifiability"))
    uniform = judged["logits to zero"]
    assert uniform[-1].score("rank-collapse-width") > 10
    frozen = judged["logits scaled up in all blocks"]
    assert frozen[-1].score("entropy-collapse") > max(0, frozen[0].score("entropy-collapse"))
    for name in list(fresh.MODELS)[1:]:
        monkeypatch.delitem(fresh.MODELS, name)
    written: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda _, text, **__: written.append(text))
    document.write(measured)
    (text,) = written
    assert "## A head on the first token" in text
    assert "nan" not in text


# What is saved, and for how long it is good ------------------------------------------------------------------------------

ROOT = Path(saved.__file__).parents[2]


def test_a_changed_byte_of_any_module_that_measures_makes_saved_cases_worthless(tmp_path: Path) -> None:
    for folder in ("src/uncollapse", "studies"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = saved.fingerprint(tmp_path)
    unfelt = set()
    for file in [*(tmp_path / "src").rglob("*.py"), *(tmp_path / "studies" / "validity").rglob("*.py")]:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b" ")
        if saved.fingerprint(tmp_path) == before:
            unfelt.add(file.relative_to(tmp_path).as_posix())
        file.write_bytes(content)
    judging = {"src/uncollapse/" + name for name in ("__main__.py", "judgement/findings.py")}
    judging |= {"studies/validity/" + name for name in ("__main__.py", "document.py", "fresh.py", "scoring.py")}
    assert {
        name for name in unfelt if not name.startswith(("src/uncollapse/report/", "src/uncollapse/cli/"))
    } == judging
    (tmp_path / "src" / "uncollapse" / "a_new_module.py").touch()
    assert saved.fingerprint(tmp_path) != before


def test_whatever_runs_while_cases_are_measured_is_in_the_fingerprint() -> None:
    model, batches, _ = built("gpt2")
    ran = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            ran.add(frame.f_code.co_filename)

    subject = Subject("a small gpt2", lambda: (model, batches))
    sys.setprofile(note)
    try:
        cases.measured(subject, "gpt2", "", 0.1)
    finally:
        sys.setprofile(None)
    places = (Path(uc.__file__).parent, ROOT / "studies")
    own = {Path(name) for name in ran if any(Path(name).is_relative_to(place) for place in places)}
    assert ROOT / "studies/validity/planting.py" in own
    assert own - set(saved.deciding()) == set()
    assert all((ROOT / name).exists() for name in (*saved.JUDGING, *saved.SUBJECT_SOURCES))


def test_the_document_has_the_thresholds_that_are_in_force() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    in_force = {
        code: float(value) for code, value in re.findall(r"^\| `([A-Z-]+)` \| (?:[^|]*\|){3} ([0-9.]+) \|", text, re.M)
    }
    assert in_force.keys() == scoring.THRESHOLDS.keys()
    for code, value in scoring.THRESHOLDS.items():
        assert in_force[code] == pytest.approx(value, rel=0.01)
    assert "Not as derived" not in text
