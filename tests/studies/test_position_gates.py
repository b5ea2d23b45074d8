"""The comparison with and without position gates: arms that differ in one thing only, references for what is measured."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studies.language_models import CONTEXT, HEADS, corpus
from studies.position_gates import document, experiments, large, planted, recovery, training
from torch.nn import functional

import uncollapse as uc
from uncollapse.measures.student import mean_and_half


def few_windows() -> tuple[torch.Tensor, torch.Tensor]:
    text, held_out = corpus()
    return text, training.windows(held_out, most=8)


@functools.cache
def short(arm: str) -> tuple[dict[str, Any], Any]:
    """Two steps."""
    return training.record(training.model(arm, 0), arm, 0, *few_windows(), 2, every=1)


# The arms -------------------------------------------------------------------------------------------------------------


def test_arms_start_as_the_same_function() -> None:
    ids = few_windows()[1][:, :-1]
    plain, gated, perturbed, constant = (training.model(arm, 3)(ids).logits for arm in training.ARMS)
    assert torch.equal(plain, gated)
    assert torch.equal(plain, constant)
    assert not torch.allclose(plain, perturbed)
    assert not torch.equal(plain, training.model("plain", 4)(ids).logits)


def test_arms_have_the_parameters_they_should() -> None:
    plain, gated, perturbed, constant = (
        sum(p.numel() for p in training.model(arm, 0).parameters()) for arm in training.ARMS
    )
    assert plain < gated == perturbed == constant
    for block in training.model("gated", 0).blocks:
        projection = training.WIDTH * (training.WIDTH + 1)
        own = sum(p.numel() for p in block.projection.parameters()) - projection
        assert 0 < own < 0.016 * projection
        assert block.projection.overhead == pytest.approx(own / projection)


def test_arms_see_the_same_data_and_then_part() -> None:
    runs = {arm: short(arm)[0] for arm in training.ARMS}
    first, last = ({arm: run["curve"][i] for arm, run in runs.items()} for i in (1, 2))
    assert first["plain"]["training"] == first["gated"]["training"] == first["constant"]["training"]
    assert (
        runs["plain"]["curve"][1]["training"]
        != training.record(training.model("plain", 0), "plain", 1, *few_windows(), 1, every=1)[0]["curve"][1][
            "training"
        ]
    )  # other windows
    assert len({last[arm]["held_out"] for arm in training.ARMS}) == 4
    assert [point["step"] for point in runs["plain"]["curve"]] == [0, 1, 2]
    assert runs["plain"]["curve"][0]["held_out"] == runs["gated"]["curve"][0]["held_out"]


def test_only_gates_that_see_positions_break_the_symmetry() -> None:
    D = training.WIDTH
    gates = {arm: short(arm)[0]["curve"][-1]["gates"] for arm in training.ARMS}
    assert gates["plain"] == []
    for now in gates["constant"]:
        assert (now["rank"], now["condition"], now["surviving"]) == (1, None, D**2)
        assert now["smallest"] != 1
    for now in gates["gated"]:
        assert (now["rank"], now["surviving"], now["plain"]) == (HEADS, D**2 // HEADS, D**2)


def test_constant_gates_are_one_number_a_head() -> None:
    _, made = short("constant")
    x = torch.randn(1, CONTEXT, training.WIDTH)
    gate = made.blocks[0].projection
    g = gate.gates(torch.tensor([0]))[0].repeat_interleave(training.WIDTH // HEADS)
    assert torch.allclose(gate(x), gate.projection(x * g), atol=1e-6)


def test_judged_is_the_mean_over_all_windows() -> None:
    held_out = few_windows()[1].repeat(5, 1)[:37]  # no multiple of a batch
    made = training.model("plain", 0)
    with torch.no_grad():
        log = made(held_out[:, :-1]).logits.log_softmax(-1).double().numpy()
    rows, places = np.indices(log.shape[:2])
    assert training.judged(made, held_out) == pytest.approx(
        -log[rows, places, held_out[:, 1:].numpy()].mean(), rel=1e-5
    )


def test_windows_cover_the_text_once() -> None:
    found = training.windows(torch.arange(23), context=4)
    assert found.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert len(training.windows(torch.arange(1000), 4, most=7)) == 7


# Recovery -------------------------------------------------------------------------------------------------------------


def seen_as_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().double().numpy()


def relative(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """By head, of [content, head, channel]."""
    wrong, right = found - true, true
    wrong, right = wrong - wrong.mean(0), right - right.mean(0)
    return np.sqrt((wrong**2).sum((0, 2)) / (right**2).sum((0, 2)))


@pytest.mark.parametrize("m", [2, 3, 9])
def test_shared_channel_against_least_squares(m: int) -> None:
    draws = np.random.default_rng(0)
    contents, G = draws.normal(size=(40, 3, 5)), draws.uniform(0.5, 1.5, size=(m, 3))
    seen = seen_as_bfloat16(sum(G[None, :, h, None] * contents[:, None, h] for h in range(3)))  # [content, m, channel]
    expected = np.stack([np.linalg.lstsq(G, s, rcond=None)[0] for s in seen])
    found = recovery.shared_channel(torch.from_numpy(contents), torch.from_numpy(G))
    np.testing.assert_allclose(found["errors"], relative(expected, contents), rtol=1e-6)
    assert found["unresolved"] == max(0, 3 - m)


def test_noise_predicts_the_error_where_all_heads_are_resolved() -> None:
    draws = np.random.default_rng(1)
    contents, G = draws.normal(size=(400, 3, 5)), draws.uniform(0.5, 1.5, size=(8, 3))
    found = recovery.shared_channel(torch.from_numpy(contents), torch.from_numpy(G))
    np.testing.assert_allclose(found["errors"], found["from_noise"], rtol=0.1)
    assert max(found["errors"]) < 0.05


def test_without_gates_no_number_of_positions_helps() -> None:
    contents = torch.randn(200, 4, 6, dtype=torch.float64)
    few, many = (recovery.shared_channel(contents, torch.ones(m, 4, dtype=torch.float64)) for m in (1, 50))
    assert few["unresolved"] == many["unresolved"] == 3
    np.testing.assert_allclose(few["errors"], many["errors"], rtol=1e-6)
    assert (
        min(many["errors"]) > 0.8
    )  # the smallest-norm answer is a quarter of the sum: sqrt(3)/2 for independent heads


@pytest.mark.parametrize(("width", "m", "unresolved"), [(12, 1, 0), (6, 1, 6), (6, 2, 0)])
def test_stream_against_least_squares(width: int, m: int, unresolved: int) -> None:
    draws = np.random.default_rng(2)
    contents, G = draws.normal(size=(20, 3, 4)), draws.uniform(0.5, 1.5, size=(m, 3))
    W = draws.normal(size=(12, width))
    K = np.concatenate([np.diag(np.repeat(g, 4)) @ W for g in G], 1)
    seen = seen_as_bfloat16(contents.reshape(20, 12) @ K)
    expected = np.linalg.lstsq(K.T, seen.T, rcond=None)[0].T.reshape(20, 3, 4)
    found = recovery.stream(torch.from_numpy(contents), torch.from_numpy(G), torch.from_numpy(W))
    np.testing.assert_allclose(found["errors"], relative(expected, contents), rtol=1e-5)
    assert found["unresolved"] == unresolved


def test_head_outputs_are_what_the_projection_reads() -> None:
    made = training.model("perturbed", 0)
    ids = few_windows()[1][:2, :-1]
    block = made.blocks[0]
    with torch.no_grad():
        x = made.tokens(ids) + made.positions.weight
        q, k, v = block.joint(block.norm_1(x)).chunk(3, -1)
        for h, own in enumerate(torch.arange(training.WIDTH).chunk(HEADS)):
            scores = q[..., own] @ k[..., own].mT / len(own) ** 0.5
            hidden = torch.ones(CONTEXT, CONTEXT).triu(1).bool()
            expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., own]
            assert torch.allclose(recovery.head_outputs(made, ids)[0][:, :, h].float(), expected, atol=1e-5)


def test_recurring_passages_against_loops() -> None:
    made, held_out = training.model("perturbed", 0), corpus()[1]
    passages = held_out[: len(held_out) // 16 * 16].view(-1, 16)
    chosen = passages[np.linspace(0, len(passages) - 1, 64).astype(int)]
    x = recovery.head_outputs(made, chosen.repeat(1, 4))[0].numpy()  # [passage, token, head, channel]
    with torch.no_grad():
        G = made.blocks[0].projection.gates(torch.arange(64)).double().numpy()
    found, mean = np.empty((64, 16, HEADS, x.shape[-1])), np.empty((64, 16, HEADS, x.shape[-1]))
    for s in range(64):
        for place in range(16):
            copies = [place, place + 16, place + 32, place + 48]
            seen = np.stack([sum(G[i, h] * x[s, i, h] for h in range(HEADS)) for i in copies])
            found[s, place] = np.linalg.lstsq(G[copies], seen_as_bfloat16(seen), rcond=1e-15)[0]
            mean[s, place] = sum(x[s, i] for i in copies) / 4
    measured = recovery.recurring(made, "perturbed", held_out)[0]
    found, mean = found.reshape(-1, HEADS, x.shape[-1]), mean.reshape(-1, HEADS, x.shape[-1])
    np.testing.assert_allclose(measured["errors"], relative(found, mean), rtol=1e-6)
    apart = (x - np.tile(mean.reshape(64, 16, HEADS, -1), (1, 4, 1, 1))) ** 2
    signal = ((mean - mean.mean(0)) ** 2).sum((0, 2))
    np.testing.assert_allclose(measured["variation"], np.sqrt(apart.sum((0, 1, 3)) / 4 / signal), rtol=1e-6)


# Planted tasks --------------------------------------------------------------------------------------------------------


def test_targets_take_the_right_neighbour() -> None:
    x = torch.randn(2, 8, planted.HEAD_WIDTH)
    for task in planted.TASKS:
        got = planted.target(task, planted.head_outputs(x))
        for i in range(8):
            before, after = x[:, i - 1], x[:, (i + 1) % 8]
            both = (before + after) / 2**0.5
            first = {"halves": i < 4, "even and odd": i % 2 == 0}.get(task)
            assert torch.equal(got[:, i], both if first is None else before if first else after)


def test_no_ungated_projection_passes_the_floor() -> None:
    """The conditional covariance of both heads given their projected sum, by Schur complements: the proof in `planted`."""
    draws, k = np.random.default_rng(0), planted.HEAD_WIDTH
    for W in (
        draws.normal(size=(2 * k, k)),
        np.vstack([np.eye(k), np.eye(k)]),
        np.vstack([np.eye(k), np.zeros((k, k))]),
    ):
        left = [
            np.trace(np.eye(k) - W[part] @ np.linalg.inv(W.T @ W) @ W[part].T) for part in (slice(k), slice(k, None))
        ]
        assert np.mean(left) / k == pytest.approx(planted.FLOOR["halves"])


def test_gates_pass_the_floor_and_the_control_does_not() -> None:
    gated, control = (planted.run("even and odd", arm, 0, steps=120) for arm in planted.ARMS[1:])
    assert gated["parameters"] < control["parameters"]
    assert gated["loss"] < 0.1
    assert control["loss"] > 0.49
    assert [step for step, _ in gated["curve"]] == list(range(0, 121, planted.EVERY))


def test_the_control_behind_the_sum_sees_positions() -> None:
    x = torch.randn(1, 1, 2 * planted.HEAD_WIDTH).expand(1, planted.TOKENS, -1)
    y = planted.layer("no gates, MLP behind", 0)(x)
    assert not torch.allclose(y[:, 0], y[:, 1])


def test_attention_that_learns_can_switch_by_itself() -> None:
    short_, longer = (planted.run("halves", "no gates, MLP behind", 0, switching=True, steps=n) for n in (20, 250))
    assert short_["loss"] > 0.5
    assert longer["loss"] < 0.1  # far below the floor of fixed attention


# The larger model -----------------------------------------------------------------------------------------------------


def test_gpt2_goes_the_same_way() -> None:
    plain, gated = (large.run("tiny", arm, 0) for arm in ("plain", "gated"))
    assert plain["parameters"] < gated["parameters"]
    assert plain["curve"][0]["held_out"] == gated["curve"][0]["held_out"]
    assert plain["curve"][-1]["held_out"] != gated["curve"][-1]["held_out"] < gated["curve"][0]["held_out"]
    assert all(now["rank"] == 2 for now in gated["curve"][-1]["gates"])
    assert plain["where"] == "CPU"


def test_124m_is_gpt2_small() -> None:
    from transformers import GPT2Config

    assert large.SIZES["124m"].config == {}
    config = GPT2Config()
    d, layers = config.n_embd, config.n_layer
    assert (config.vocab_size + config.n_positions + 2) * d + layers * (12 * d * d + 13 * d) == 124_439_808
    assert large.SIZES["124m"].context == config.n_positions


def test_given_files_are_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 99)
    learned, held_out = large.text([str(tmp_path / "a.txt")])
    assert (len(learned), len(held_out), set(learned.tolist())) == (95, 4, {ord("x")})


# The document ---------------------------------------------------------------------------------------------------------


def test_interval_is_students() -> None:
    mean, half = mean_and_half([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.303 / 3**0.5), rel=1e-3)


def test_splice_touches_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n")
    document.splice(page, "new\n")
    assert page.read_text() == f"before\n{document.BEGIN}\n\nnew\n\n{document.END}\nafter\n"


def test_the_section_is_written_from_short_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "SAVED", tmp_path / "saved")
    monkeypatch.setattr(training, "windows", lambda text, context=CONTEXT, most=8: _few(text, context))
    for arm in training.ARMS:
        for seed in (0, 1):
            experiments.kept(f"model-{arm}-{seed}", experiments.language_model, (arm, seed, 2))
    for seed in (0, 1):
        experiments.kept(f"planted-{seed}", experiments.planted_tasks, (seed, 2))
    monkeypatch.setattr(training, "SEEDS", (0, 1))
    monkeypatch.setattr(training, "cost", lambda: {"ratio": 1.0, "low": 0.9, "high": 1.1, "pairs": 1})
    found = experiments.section(workers=1, resume=True)
    assert len(found["models"]) == 8
    section = document.text(found, tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"results-gates-{name}.svg" for name in ("training", "recovery", "planted")
    }
    plain = np.mean([m["curve"][-1]["held_out"] for m in found["models"] if m["arm"] == "plain"])
    assert f"{plain:.3f} ±" in section
    assert "**No CUDA GPU was available**, so the run at 124 million parameters was not done" in section
    found["large"] = [
        {"arm": arm, "parameters": 124_000_000, "where": "a card", "curve": [{"held_out": loss}]}
        for arm, loss in (("plain", 1.5), ("gated", 1.25))
    ]
    section = document.text(found, tmp_path)
    assert "| gated | 124,000,000 | a card | 1 | 1.2 |" in section
    assert "was not done" not in section


def test_measuring_anew_forgets_the_small_runs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "SAVED", tmp_path)
    monkeypatch.setattr(experiments, "small_runs", list)
    monkeypatch.setattr(training, "cost", dict)
    for name in ("model-plain-0", "planted-0", "large-124m-plain-0"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert experiments.section(workers=1, resume=True)["large"] == [{}]
    assert len(list(tmp_path.iterdir())) == 3
    experiments.section(workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["large-124m-plain-0.json"]


def _few(text: torch.Tensor, context: int) -> torch.Tensor:
    return text[: 8 * (context + 1)].view(8, context + 1)


def test_loss_of_the_planted_tasks_is_a_share_of_the_variance() -> None:
    x = torch.randn(4096, planted.TOKENS, planted.HEAD_WIDTH)
    for task in planted.TASKS:
        wanted = planted.target(task, planted.head_outputs(x))
        assert float(functional.mse_loss(torch.zeros_like(wanted), wanted)) == pytest.approx(1, abs=0.01)


def test_gates_of_the_plain_model_are_ones() -> None:
    plain, gated = (training.model(arm, 0).blocks[0].projection for arm in ("plain", "perturbed"))
    at = torch.arange(CONTEXT)
    assert torch.equal(recovery.gates_of(plain, at, "plain"), torch.ones(CONTEXT, HEADS, dtype=torch.float64))
    found = recovery.gates_of(gated, at, "perturbed")
    assert isinstance(gated, uc.PositionGatedProjection)
    assert found.std(0).min() > 0.01
    assert torch.equal(recovery.gates_of(gated, at, "constant"), found[:1].expand_as(found))
