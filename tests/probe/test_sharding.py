"""A corpus shared out over two processes gives the record of one, and refuses what cannot be shared out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import uncollapse as uc
from tests.helpers.several_processes import differences, experts, in_two, llama, padded_batches
from tests.helpers.tiny_models import FAMILIES, batch_for, text_batch
from uncollapse import processes
from uncollapse.anatomy.interception import ChangedPath
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.measures import running
from uncollapse.measures.affine_fit import AffineFit
from uncollapse.probe import corpus, sharding
from uncollapse.probe.passes import sequences_before
from uncollapse.probe.sharding import few_sequences

# How many batches in which precision, how close, and what is asked.
UNEVEN = (torch.float64, 3, 1e-10, {uc.diagnose: {"level": "full"}, uc.ablate: {"without": [("mlp",)]}})
FULL = (torch.float64, 3, 1e-10, {uc.diagnose: {"level": "full"}})
FEWER = (torch.float64, 1, 1e-10, {uc.identify: {}})
FURTHER = {
    "all": (
        torch.float64,
        5,
        1e-10,
        {uc.diagnose: {"level": "full", "context_lengths": [8, 16]}, uc.ablate: {"level": "full"}},
    ),
    "groups": (torch.float64, 3, 1e-10, {uc.symmetries: {}}),
    "single precision": (torch.float32, 3, 1e-6, {uc.diagnose: {"level": "full"}, uc.identify: {}, uc.ablate: {}}),
}


WIDEST = running.WIDEST


def _last_logit(output: Any) -> Any:
    return output.logits[:, -1, 3]


def _attributed(noted: dict[str, Any], model: Any, wrapped: Any, count: int, **options: Any) -> None:
    batches = padded_batches(count)
    one = uc.attribute(model, batches, _last_logit, alone=True, **options)
    two = uc.attribute(wrapped, batches, _last_logit, **options)
    took_part = two.record.probe.processes, one.record.probe.processes
    noted[f"{count}, attribute"] = took_part, differences(one.record, two.record, 1e-10)


def _compared(cases: Mapping[str, Any], noted: dict[str, Any], build: Any = llama) -> Any:
    for name, (dtype, count, tolerance, calls) in cases.items():
        model, batches = build(dtype), padded_batches(count)
        for function, options in calls.items():
            one = function(model, batches=batches, alone=True, **options)
            two = function(model, batches=batches, **options)
            took_part = two.record.probe.processes, one.record.probe.processes
            noted[f"{name}, {function.__name__}"] = took_part, differences(one.record, two.record, tolerance)
    return model, two


def _further(_: int, noted: dict[str, Any]) -> None:
    _compared(FURTHER, noted)


def _checks(rank: int, noted: dict[str, Any]) -> None:
    model, two = _compared({"uneven": UNEVEN, "fewer": FEWER}, noted)
    _, mixture = _compared({"experts": FULL}, noted, experts)
    noted["routers"] = len(mixture.record.routers)
    for widest in (40, 8):  # tokens: more than that, in a stream that is narrower and in one that is wider
        running.WIDEST = corpus.WIDEST = widest
        _, many = _compared({f"points beyond {widest}": FULL}, noted)
        noted[f"sampled beyond {widest}"] = {cloud.sampled for cloud in many.record.corpus if cloud.pooling == "tokens"}
    running.WIDEST = corpus.WIDEST = WIDEST
    _attributed(noted, model, model, 1, ablated_as=None)
    _attributed(noted, model, torch.nn.parallel.DistributedDataParallel(model), 3, ablated_as="mean")
    with tempfile.TemporaryDirectory() as folder:
        two.to_json(f"{folder}/{rank}")
        noted["written"] = two.is_first, Path(folder, f"{rank}").exists()
    for name, own in {
        "texts or batches": {"batches": padded_batches(2 + rank)},
        "options": {"batches": padded_batches(2), "seed": rank},
    }.items():
        noted[name] = _refusal(model, **own)
    noted["one cannot"] = _refusal(
        model, batches=padded_batches(2) if rank else [{"input_ids": torch.ones(1, 1).long()}]
    )
    with torch.no_grad():
        next(model.model.layers[0].mlp.parameters())[0, 0] *= 1 + 1e-9 * rank
    noted["weights"] = _refusal(model, batches=padded_batches(2))
    with torch.no_grad():
        next(model.model.layers[0].mlp.parameters())[0, 0] = 0.1
    noted["what is left out"] = _refusal(
        model, uc.ablate, batches=padded_batches(2), without=[("mlp",), ("norm",)][rank : rank + 1]
    )
    noted["starts"] = _apart_between_processes(model)
    processes.PATIENCE = 0.5
    noted["alone"] = _refusal(model, batches=padded_batches(2)) if rank == 0 else ""


def _apart_between_processes(model: Any) -> list[float]:
    """How far what enters a block varies, where the first batch is not finite and each process sees one token only."""
    tokens = torch.tensor([math.nan, 1.0, -1.0])[:, None, None, None].expand(3, 2, 4, 32).double()
    found = uc.diagnose(model, batches=[{"inputs_embeds": each} for each in tokens]).record
    return [each.stream_variation or 0.0 for each in found.parts if each.block == 0]


def _refusal(model: Any, function: Any = uc.diagnose, **options: Any) -> str:
    try:
        function(model, **options)
    except uc.UncollapseError as error:
        return str(error)
    return "no refusal"


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two(_checks, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(
    "case",
    [
        "uneven, diagnose",
        "uneven, ablate",
        "fewer, identify",
        "experts, diagnose",
        "points beyond 40, diagnose",
        "points beyond 8, diagnose",
        "1, attribute",
        "3, attribute",
    ],
)
def test_two_processes_say_what_one_says(case: str, noted: list[dict[str, Any]]) -> None:
    for own in noted:
        assert "failed" not in own, own["failed"]
        assert own[case] == ((2, 1), [])


def test_what_is_compared_has_routers_and_more_points_than_are_kept(noted: list[dict[str, Any]]) -> None:
    for own in noted:
        assert own["routers"] == 2
        # The second moment has all of them, the comparisons only those that are kept.
        assert own["sampled beyond 40"] == {None}
        assert own["sampled beyond 8"] == {8}


@pytest.mark.slow
def test_two_processes_say_what_one_says_of_everything(tmp_path: Path) -> None:
    for own in in_two(_further, tmp_path):
        assert len(own) == 6, own.get("failed")
        assert set(map(repr, own.values())) == {"((2, 1), [])"}


def test_only_the_first_writes(noted: list[dict[str, Any]]) -> None:
    assert [own["written"] for own in noted] == [(True, True), (False, False)]


@pytest.mark.parametrize("what", ["texts or batches", "options", "weights"])
def test_processes_that_were_given_different_things_are_all_refused(what: str, noted: list[dict[str, Any]]) -> None:
    for own in noted:
        assert own[what].startswith(f"diagnose: expected the same in every process, got other {what}")


def test_processes_that_leave_out_different_parts_are_refused(noted: list[dict[str, Any]]) -> None:
    for own in noted:
        assert own["what is left out"].startswith("ablate: expected the same in every process, got other options")


def test_what_varies_only_between_processes_varies(noted: list[dict[str, Any]]) -> None:
    for own in noted:
        assert own["starts"][0] == pytest.approx(2.0)


def test_what_one_process_cannot_use_ends_all(noted: list[dict[str, Any]]) -> None:
    assert noted[0]["one cannot"].startswith("check_batches: expected 2 or more tokens")
    assert noted[1]["one cannot"] == f"{noted[0]['one cannot']} This was in process 0."


def test_a_call_in_one_process_only_does_not_wait_for_ever(noted: list[dict[str, Any]]) -> None:
    assert "expected all 2 processes of the group to call it, got 1 of them" in noted[0]["alone"]


def test_fits_about_different_origins_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(5, 3, generator=generator, dtype=torch.float64) + torch.randn(
        60, 3, generator=generator, dtype=torch.float64
    )
    parts = [AffineFit(), AffineFit()]
    for fit, rows in zip(parts, (slice(0, 25), slice(25, 60)), strict=True):
        fit.add(x[rows][::2], y[rows][::2], held_out=False)
        fit.add(x[rows][1::2], y[rows][1::2], held_out=True)
    first, second = parts
    assert first.origins is not None
    second.move(first.origins)
    first.sums = [a.plus(b) for a, b in zip(first.sums, second.sums, strict=True) if a is not None and b is not None]
    kept = np.r_[0:25:2, 25:60:2]
    held = np.setdiff1d(np.arange(60), kept)
    design = np.c_[x.numpy() - 1000, np.ones(60)]
    slopes = np.linalg.lstsq(design[kept], y.numpy()[kept], rcond=None)[0]
    rest = np.square(y.numpy()[held] - design[held] @ slopes).sum()
    total = np.square(y.numpy()[held] - y.numpy()[kept].mean(0)).sum()
    assert first.share() == pytest.approx(rest / total, rel=1e-9)


def test_sequences_are_counted_over_the_whole_corpus() -> None:
    model, batches = FAMILIES["bert"].build().eval(), [text_batch(sequences) for sequences in (3, 1, 2)]
    assert sequences_before(batches, proved_anatomy(model, batches[0])) == [0, 3, 4]


def test_the_start_of_a_corpus_keeps_its_padding() -> None:
    model = llama()
    (batch,) = padded_batches(1)
    few = few_sequences(batch, proved_anatomy(model, batch))
    assert few["input_ids"].tolist() == batch["input_ids"][[0, 3]].tolist()
    vision = FAMILIES["vit"].build().eval()
    pixels = batch_for(FAMILIES["vit"])
    assert len(few_sequences(pixels, proved_anatomy(vision, pixels))["pixel_values"]) == 1


def test_a_mask_over_pairs_of_tokens_is_not_cut_into_sequences() -> None:
    """With as many sequences as tokens it looks like one for each sequence."""
    model, batch = llama(), text_batch(7, tokens=7)
    anatomy = proved_anatomy(model, padded_batches(1)[0])
    assert len(few_sequences(batch, anatomy)["input_ids"]) == 1
    given = batch | {"pairs": torch.ones(7, 7).tril()}
    assert few_sequences(given, anatomy) is given


def test_a_pass_that_is_made_again_gives_each_output_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = llama(), padded_batches(3)
    monkeypatch.setattr(sharding, "_same_start", lambda *_: False)
    given: list[Any] = []
    sharding.capture_shared(
        model,
        batches,
        proved_anatomy(model, batches[0]),
        caller="diagnose",
        on_output=lambda batch, _: given.append(batch["input_ids"].tolist()),
    )
    assert given == [batch["input_ids"].tolist() for batch in batches]


def test_where_the_start_of_the_corpus_goes_another_way_its_first_batch_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = llama(), padded_batches(2)
    anatomy = proved_anatomy(model, batches[0])

    def changing(*_: Any, **__: Any) -> Any:
        changed = ChangedPath("another way")
        changed.number = 0
        raise changed

    monkeypatch.setattr(processes, "number", lambda: 1)
    monkeypatch.setattr(sharding, "capture", changing)
    with pytest.raises(ChangedPath) as raised:
        sharding.capture_shared(model, batches, anatomy, caller="diagnose")
    assert raised.value.batch is not None
    assert torch.equal(raised.value.batch["input_ids"], batches[0]["input_ids"])
