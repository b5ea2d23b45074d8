"""What a monitor reads, logs and keeps."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.mixtures import Mixture
from tests.helpers.mixtures import batch as experts_batch
from tests.helpers.own_models import OwnGPT
from tests.helpers.tiny_models import FAMILIES, text_batch
from tests.monitoring.test_bit_identical import gpt2, plain, probe
from uncollapse import records
from uncollapse.monitoring import monitor as monitor_module
from uncollapse.records import trail
from uncollapse.records.trail import TrailRecord, line


def test_the_figures_are_those_of_a_diagnosis() -> None:
    model = gpt2()
    logged: list[tuple[dict[str, float], int]] = []
    monitor = uc.Monitor(model, probe(), log=lambda figures, step: logged.append((figures, step)))
    monitor.step(0)
    record = uc.diagnose(model, batches=probe()).record
    [(figures, step)] = logged
    assert step == 0
    assert all(isinstance(value, float) for value in figures.values())
    for site in record.trajectory:
        assert site.consensus is not None
        assert figures[f"uncollapse/{site.site}/consensus_distance"] == site.consensus.mean
    for cloud in (cloud for cloud in record.corpus if cloud.pooling == "mean"):
        assert figures[f"uncollapse/{cloud.site}/corpus_effective_rank"] == cloud.centred_effective_rank
        assert figures[f"uncollapse/{cloud.site}/corpus_mean_cosine"] == cloud.mean_cosine
    for head in record.attention:
        assert head.max_logit is not None
        assert figures[f"uncollapse/block.{head.block}/head.{head.head}/max_logit"] == head.max_logit.mean
    largest = max(record.attention, key=lambda head: head.max_logit.mean)
    assert figures["uncollapse/worst/max_logit"] == largest.max_logit.mean
    assert figures["uncollapse/worst/max_logit/block"] == largest.block
    assert figures["uncollapse/worst/max_logit/head"] == largest.head
    assert figures[f"uncollapse/block.{largest.block}/max_logit"] == largest.max_logit.mean
    assert {"uncollapse/margin/DEPTH-CONSENSUS", "uncollapse/margin/ENTROPY-FROZEN"} <= set(figures)


def test_the_load_of_experts_is_watched_where_a_router_is_found() -> None:
    model, given = Mixture("one expert a token").eval(), [{"input_ids": experts_batch()["input_ids"]}]
    logged: list[dict[str, float]] = []
    uc.Monitor(model, given, watch=["experts"], log=lambda figures, _: logged.append(figures)).step(0)
    for router in uc.diagnose(model, batches=given).record.routers:
        assert router.dead is not None
        assert logged[0][f"uncollapse/block.{router.block}/expert_load_entropy"] == router.entropy
        assert logged[0][f"uncollapse/block.{router.block}/dead_experts"] == len(router.dead)
    assert not uc.Monitor(gpt2(), probe(), watch=["experts"]).look(0)


def test_it_looks_at_the_first_call_and_at_multiples_of_every() -> None:
    monitor = uc.Monitor(gpt2(), probe(), every=3)
    for step in range(1, 10):
        monitor.step(step)
    assert [r.step for r in monitor.readings] == [1, 3, 6, 9]


def test_only_what_is_watched_is_measured() -> None:
    monitor = uc.Monitor(gpt2(), probe(), watch=["tokens"])
    monitor.step(0)
    assert not monitor.readings[0].heads
    assert monitor.readings[0].sites
    monitor = uc.Monitor(gpt2(), probe(), watch=["attention"], each_head=False)
    monitor.step(0)
    assert monitor.readings[0].heads["rest_entropy"]
    assert "consensus_after_norm" not in monitor.readings[0].sites


def test_the_probe_stays_what_it_was() -> None:
    batch = probe()
    monitor = uc.Monitor(gpt2(), batch)
    monitor.step(0)
    batch[0]["input_ids"].zero_()
    monitor.look(1)
    first, second = monitor.readings
    assert second.sites["consensus_distance"] == first.sites["consensus_distance"]


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_a_fresh_model_raises_no_alarm(family: str) -> None:
    model = FAMILIES[family].build().train()
    monitor = uc.Monitor(model, [text_batch(4, 24)], every=1)
    for step in range(4):
        assert monitor.step(step) == []
    assert monitor.alarms == []


def test_a_head_whose_logits_grow_by_half_is_found_against_a_record(tmp_path: Path) -> None:
    model = OwnGPT()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(8)  # logits that choose something
    batch = [{"idx": probe()[0]["input_ids"]}]
    uc.diagnose(model, batches=batch).to_json(tmp_path / "before.json")
    monitor = uc.Monitor(model, batch, baseline=tmp_path / "before.json", every=1)
    assert [monitor.step(step) for step in range(3)] == [[], [], []]
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight[8:16].mul_(1.6)  # the queries of head 1
        model.blocks[1].attention.qkv.bias[8:16].mul_(1.6)
    for step in range(3, 6):
        monitor.step(step)
    found = [a for a in monitor.alarms if a.code == "BASELINE-LOGITS"]
    assert [(a.block, a.head, a.onset, a.step, a.against) for a in found] == [(1, 1, 3, 4, "baseline")]
    assert found[0].value == pytest.approx(1.6, rel=0.02)


def test_a_baseline_that_has_none_of_the_heads_is_refused() -> None:
    model, batch = OwnGPT(), [{"idx": probe()[0]["input_ids"]}]
    record = uc.diagnose(model, batches=batch).record
    strange = replace(record, attention=[replace(head, block=head.block + 10) for head in record.attention])
    with pytest.raises(uc.InputError, match=r"^Monitor: expected a baseline of this model"):
        uc.Monitor(model, batch, baseline=strange).step(0)


def test_logits_made_large_are_an_alarm_with_its_onset_and_then_over() -> None:
    model = OwnGPT()
    kept = model.blocks[2].attention.qkv.weight.detach().clone()
    monitor = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1)
    for step in range(3):
        monitor.step(step)
    with torch.no_grad():
        model.blocks[2].attention.qkv.weight[:64] *= 60
    for step in range(3, 6):
        monitor.step(step)
    frozen = [a for a in monitor.alarms if a.code == "ENTROPY-FROZEN"]
    assert [(a.block, a.onset, a.against) for a in frozen] == [(2, 3, "threshold")]
    assert frozen[0].remedy
    with torch.no_grad():
        model.blocks[2].attention.qkv.weight.copy_(kept)
    for step in range(6, 10):
        monitor.step(step)
    assert frozen[0].key in [key for r in monitor.readings for key in r.cleared]
    assert [a for a in monitor.alarms if a.code == "ENTROPY-FROZEN"] == frozen


def test_numbers_that_are_not_finite_are_an_alarm_at_once() -> None:
    model = OwnGPT()
    monitor = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1)
    monitor.step(0)
    with torch.no_grad():
        model.blocks[1].mlp[0].weight[0, 0] = float("nan")
    [alarm] = monitor.step(1)
    assert (alarm.code, alarm.block, alarm.severity) == ("NUMERICS-NOT-FINITE", 1, "critical")
    assert json.loads(line(monitor.readings[-1]))["alarms"]  # `line` refuses what is not finite


# Parts that die ------------------------------------------------------------------------------------------------------


def head_writes_nothing(model: nn.Module) -> None:
    model.blocks[1].attention.out.weight[:, 8:16] = 0


def head_reads_nothing(model: nn.Module) -> None:
    model.blocks[1].attention.qkv.weight[72:80] = 0
    model.blocks[1].attention.qkv.bias[72:80] = 0


def attention_writes_nothing(model: nn.Module) -> None:
    model.blocks[2].attention.out.weight.zero_()
    model.blocks[2].attention.out.bias.zero_()


def mlp_writes_nothing(model: nn.Module) -> None:
    model.blocks[2].mlp[2].weight.zero_()
    model.blocks[2].mlp[2].bias.zero_()


def mlp_writes_a_constant(model: nn.Module) -> None:
    model.blocks[0].mlp[2].weight.zero_()


def block_does_nothing(model: nn.Module) -> None:
    attention_writes_nothing(model)
    mlp_writes_nothing(model)


Plant = Callable[[nn.Module], None]


def dying(plants: dict[int, Plant], steps: int = 10, trail: Path | None = None) -> uc.Monitor:
    """A model looked at after each step; `plants` says what is done to it before which."""
    model = OwnGPT()
    monitor = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1, trail=trail)
    for step in range(steps):
        with torch.no_grad():
            plants.get(step, lambda _: None)(model)
        monitor.step(step)
    return monitor


def healed(model: nn.Module) -> None:
    model.load_state_dict(OwnGPT().state_dict())


@pytest.mark.parametrize(
    ("plant", "code", "block", "head"),
    [
        (head_writes_nothing, "DEAD-HEAD", 1, 1),
        (head_reads_nothing, "DEAD-HEAD", 1, 1),
        (attention_writes_nothing, "DEAD-ATTENTION", 2, None),
        (mlp_writes_nothing, "DEAD-MLP", 2, None),
        (mlp_writes_a_constant, "CONSTANT-UPDATE", 0, None),
        (block_does_nothing, "DEAD-BLOCK", 2, None),
    ],
)
def test_a_part_that_dies_is_one_alarm_and_one_that_never_lived_is_none(
    plant: Plant, code: str, block: int, head: int | None
) -> None:
    alarms = dying({4: plant}).alarms
    assert [(a.step, a.onset, a.code, a.phenomenon, a.block, a.head) for a in alarms] == [
        (5, 4, code, "dead-component", block, head)
    ]
    assert alarms[0].remedy
    assert dying({0: plant}).alarms == []


def test_a_part_that_lives_again_is_said_to_be_over_and_may_die_again() -> None:
    monitor = dying({0: mlp_writes_nothing, 1: healed, 8: mlp_writes_nothing, 10: healed, 16: mlp_writes_nothing}, 20)
    key = "DEAD-MLP/block.2/mlp"
    assert [(a.step, a.key) for a in monitor.alarms] == [(9, key), (17, key)]
    assert [r.step for r in monitor.readings if key in r.cleared] == [12]


def test_an_mlp_that_is_left_of_a_block_that_never_lived_is_no_alarm() -> None:
    def attention_lives(model: nn.Module) -> None:
        model.blocks[2].attention.load_state_dict(OwnGPT().blocks[2].attention.state_dict())

    monitor = dying({0: block_does_nothing, 3: attention_lives})
    assert monitor.readings[-1].margins.keys() >= {"DEAD-MLP/block.2/mlp"}
    assert monitor.alarms == []
    again = dying({0: block_does_nothing, 2: healed, 4: mlp_writes_nothing})  # it lived for two looks
    assert [(a.step, a.code) for a in again.alarms] == [(5, "DEAD-MLP")]


def test_an_attention_inside_a_dead_block_is_not_said_to_live_again() -> None:
    monitor = dying({4: attention_writes_nothing, 7: mlp_writes_nothing}, 14)
    assert [(a.step, a.code) for a in monitor.alarms] == [(5, "DEAD-ATTENTION"), (8, "DEAD-BLOCK")]
    assert not any(r.cleared for r in monitor.readings)


def test_two_heads_of_one_block_are_two_alarms() -> None:
    def second(model: nn.Module) -> None:
        model.blocks[1].attention.out.weight[:, 24:] = 0

    monitor = dying({3: head_writes_nothing, 6: second})
    assert [(a.step, a.head) for a in monitor.alarms] == [(4, 1), (7, 3)]
    assert monitor.readings[-1].sites["dead_parts"] == [0.0, 0.0, 2.0, 0.0]


def test_a_dead_part_is_remembered_across_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    dying({3: head_writes_nothing}, 4, path)  # dead for one look: no alarm yet
    model = OwnGPT()
    with torch.no_grad():
        head_writes_nothing(model)
    again = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1, trail=path)
    assert [(a.step, a.onset, a.code) for a in again.step(4)] == [(4, 3, "DEAD-HEAD")]
    third = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1, trail=path)
    assert "DEAD-HEAD" not in [a.code for a in third.step(5)]


def test_nothing_is_said_of_parts_that_are_not_watched() -> None:
    model = OwnGPT()
    monitor = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1, watch=["tokens", "attention"])
    for step in range(5):
        with torch.no_grad():
            mlp_writes_nothing(model)
        monitor.step(step)
    assert monitor.alarms == []
    assert "dead_parts" not in monitor.readings[0].sites


def test_the_model_is_freed_with_its_monitor() -> None:
    model = gpt2()
    monitor = uc.Monitor(model, probe(), every=1)
    plain(monitor, model)
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(model)
        alarms, readings = monitor.alarms, monitor.readings
        del model, monitor
        assert reference() is None
        assert readings
        assert alarms == []
    finally:
        gc.enable()


# The trail ------------------------------------------------------------------------------------------------------------


def watched(path: Path, steps: range, model: nn.Module | None = None) -> uc.Monitor:
    monitor = uc.Monitor(model or gpt2(), probe(), every=1, trail=path)
    for step in steps:
        monitor.step(step, loss=3.5 - step / 10)
    return monitor


def test_every_reading_is_a_line_that_can_be_read_while_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    monitor = uc.Monitor(gpt2(), probe(), every=1, trail=path)
    for step in range(3):
        monitor.step(step, loss=torch.tensor(2.5))
        lines = path.read_text("utf-8").splitlines()
        assert len(lines) == step + 2
        assert [r.step for r in uc.load(path).readings] == list(range(step + 1))
    assert all(json.loads(one) for one in lines)
    trail = records.load(path)
    assert isinstance(trail, TrailRecord)
    assert trail.readings[0].loss == 2.5
    schema = json.loads((Path(uc.__file__).parent / "schemas" / "trail-1.json").read_text("utf-8"))
    jsonschema.validate(json.loads(uc.load(path).to_json()), schema)
    again = tmp_path / "again.json"
    uc.load(path).to_json(again)
    assert uc.load(again) == uc.load(path)


def test_with_a_trail_only_the_last_readings_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "IN_MEMORY", 3)
    first = watched(tmp_path / "run.jsonl", range(5))
    again = watched(tmp_path / "run.jsonl", range(5, 9))
    for monitor, steps in ((first, 5), (again, 9)):
        assert monitor.record is not None
        assert len(monitor.record.readings) == 3
        assert [r.step for r in monitor.readings][:steps] == list(range(steps))
    assert again.readings[0].loss == 3.5
    alone = uc.Monitor(gpt2(), probe(), every=1)
    for step in range(5):
        alone.step(step)
    assert [r.step for r in alone.readings] == list(range(5))


def test_figures_survive_the_file_to_six_digits(tmp_path: Path) -> None:
    monitor = watched(tmp_path / "run.jsonl", range(2))
    for here, there in zip(monitor.readings, uc.load(tmp_path / "run.jsonl").readings, strict=True):
        assert here.margins == pytest.approx(there.margins, rel=1e-5)
        assert here.heads["max_logit"] == pytest.approx(there.heads["max_logit"], rel=1e-5)


def test_a_trail_that_cannot_be_written_or_is_spoilt_is_refused_at_every_look(tmp_path: Path) -> None:
    model, batch = OwnGPT(), [{"idx": probe()[0]["input_ids"]}]
    nowhere = uc.Monitor(model, batch, trail=tmp_path / "no folder" / "run.jsonl")
    for step in (0, 50):
        with pytest.raises(uc.InputError, match=r"^Monitor: expected a trail that can be written"):
            nowhere.step(step)
    uc.Monitor(model, batch, trail=tmp_path / "run.jsonl").step(0)
    with open(tmp_path / "run.jsonl", "a") as stream:
        stream.write("{}\n")
    with pytest.raises(uc.InputError, match=r"^Monitor: expected a TrailReading, got line 3 of"):
        uc.Monitor(model, batch, trail=tmp_path / "run.jsonl").step(0)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("uncollapse")]


def test_a_full_disk_ends_no_run_and_what_did_not_fit_is_written_once_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = uc.Monitor(gpt2(), probe(), every=1, trail=tmp_path / "run.jsonl")
    monitor.step(0)

    def full(stream: IO[bytes], text: str) -> None:
        stream.write(text.encode()[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trail, "_write", full)
        monitor.step(1)
        monitor.step(2)
        assert [r.step for r in uc.load(tmp_path / "run.jsonl").readings] == [0]  # nothing half-written
    assert [r.step for r in monitor.readings] == [0, 1, 2]
    (warning,) = warned(caplog)  # once, in one line
    assert warning.startswith("Monitor: expected a trail that takes more, got '")
    assert "No space left on device" in warning
    assert "\n" not in warning
    monitor.step(3)
    assert [r.step for r in uc.load(tmp_path / "run.jsonl").readings] == [0, 1, 2, 3]


def test_a_trail_that_was_taken_away_does_not_come_back_without_its_first_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    monitor = uc.Monitor(gpt2(), probe(), every=1, trail=path)
    monitor.step(0)
    path.rename(tmp_path / "kept.jsonl")
    monitor.step(1)
    assert not path.exists()
    (tmp_path / "kept.jsonl").rename(path)
    monitor.step(2)
    assert [r.step for r in uc.load(path).readings] == [0, 1, 2]
    assert len(warned(caplog)) == 1


def test_a_name_that_is_not_utf_8_can_be_kept_in_a_trail(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    uc.Monitor(gpt2(), probe(), trail=path, name="caf\udce9").step(0)
    assert uc.load(path).record.model.name == "caf\\xe9"


def test_a_torn_last_line_is_left_out_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    watched(path, range(3))
    whole = path.read_bytes()
    torn = whole[: whole.rindex(b"\n", 0, -1) + 40]
    path.write_bytes(torn)
    assert [r.step for r in uc.load(path).readings] == [0, 1]
    watched(path, range(2, 4))
    assert [r.step for r in uc.load(path).readings] == [0, 1, 2, 3]
    path.write_bytes(whole[:20])  # not even the first line came through
    watched(path, range(1))
    assert [r.step for r in uc.load(path).readings] == [0]


def test_a_run_that_begins_again_at_an_earlier_checkpoint_replaces_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    watched(path, range(5))
    again = watched(path, range(2, 4))
    assert [r.step for r in again.readings] == [0, 1, 2, 3]
    assert [r.step for r in uc.load(path).readings] == [0, 1, 2, 3]


def test_a_standing_alarm_is_not_raised_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = OwnGPT()
    batch = [{"idx": probe()[0]["input_ids"]}]
    first = uc.Monitor(model, batch, every=1, trail=path)
    first.step(0)
    with torch.no_grad():
        model.blocks[2].attention.qkv.weight[:64] *= 60
    first.step(1)
    first.step(2)
    raised = [a.key for a in first.alarms]
    assert "ENTROPY-FROZEN/block.2/self" in raised
    second = uc.Monitor(model, batch, every=1, trail=path)
    assert second.step(3) == []
    assert [a.key for a in second.alarms] == raised


@pytest.mark.parametrize("content", [b"my notes\n", b'{"schema": "uncollapse/diagnosis/1"}\n', b"\x00\x01"])
def test_another_file_is_not_spoilt(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(uc.InputError, match="another file"):
        watched(tmp_path / "notes", range(1))
    assert (tmp_path / "notes").read_bytes() == content


def test_another_probe_or_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    watched(path, range(1))
    other = uc.Monitor(gpt2(), [{"input_ids": probe()[0]["input_ids"]}], trail=path, every=1)
    other.step(1)  # the same batches
    changed: dict[str, Tensor] = {"input_ids": probe()[0]["input_ids"].flip(0)}
    with pytest.raises(uc.InputError, match="other batches"):
        uc.Monitor(gpt2(), [changed], trail=path).step(2)
    with pytest.raises(uc.InputError, match="blocks or heads"):
        uc.Monitor(OwnGPT(), [{"idx": probe()[0]["input_ids"]}], trail=path).step(2)


KILLED = """
import sys, time
from pathlib import Path
import uncollapse as uc
from tests.monitoring.test_bit_identical import gpt2, probe
monitor = uc.Monitor(gpt2(), probe(), every=1, trail=sys.argv[1])
for step in range(10_000):
    monitor.step(step)
"""


def test_what_was_read_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment, stderr=subprocess.DEVNULL)
    try:
        begun = time.monotonic()
        while (not path.exists() or path.read_bytes().count(b"\n") < 4) and time.monotonic() - begun < 120:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    steps = [r.step for r in uc.load(path).readings]
    assert len(steps) >= 3
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every=1 or more"),
        ({"patience": 0}, "patience=1 or more"),
        ({"false_alarms": 0}, "between 0 and 1"),
        ({"watch": ["tokns"]}, "tokens, corpus, experts, attention, heads, parts, weights"),
        ({"watch": "tokens"}, "tokens, corpus, experts"),
        ({"baseline": 3}, "a diagnosis or a trail"),
        ({"trail": "no/such/folder/run.jsonl"}, "a trail that can be written"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(uc.InputError, match=said):
        uc.Monitor(gpt2(), probe(), **options).step(0)


def test_a_name_is_no_model_in_training() -> None:
    with pytest.raises(uc.InputError, match=r"the nn\.Module that is trained"):
        uc.Monitor("gpt2", probe())  # type: ignore[arg-type]
