"""What the study says of runs: when a loss shows a failure, which alarm counts, and that the page has them."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
import torch
from studies.early_warning import runs as studied
from studies.early_warning.document import BY_NAME, CHOSEN_ON, document, first_alarm, shown_by_the_loss
from studies.early_warning.models import LanguageModel, Shape
from studies.early_warning.runs import OTHERS, SCENARIOS, Alarm, NormRule, Run, SpikeRule, rounding, shrinking

FAILING, TWIN = "logits grow", "learning rate 2e-3"
SILENT: dict[str, int | None] = dict.fromkeys(OTHERS)
RIGHT: Alarm = (120, 100, "BASELINE-ENTROPY", "entropy-collapse", 1, "baseline")


def run(name: str, losses: list[float], alarms: list[Alarm] | None = None, seed: int = CHOSEN_ON + 1) -> Run:
    return Run(name, seed, losses, alarms or [], SILENT, [(0, 0.9), (5, 0.03)])


def test_the_loss_shows_it_once_it_stays_above_the_twins() -> None:
    twin = run(TWIN, [3.0] * 100)
    assert (
        shown_by_the_loss(run(FAILING, [3.0] * 50 + [4.0] * 50), twin) == 52
    )  # ten steps' mean is above 3.15 from there on
    assert shown_by_the_loss(run(FAILING, [3.0] * 20 + [9.0] * 20 + [3.0] * 60), twin) is None
    assert shown_by_the_loss(run(FAILING, [3.1] * 100), twin) is None


def test_an_alarm_counts_if_it_names_what_the_run_fails_of_after_the_fault_began() -> None:
    early = (40, 40, "ENTROPY-FROZEN", "entropy-collapse", 1, "threshold")
    other = (90, 90, "DEPTH-CONSENSUS", "rank-collapse-depth", 1, "threshold")
    assert first_alarm(run(FAILING, [], [early, other, RIGHT]), BY_NAME[FAILING]) == RIGHT
    assert first_alarm(run(FAILING, [], [early, other]), BY_NAME[FAILING]) is None


def test_the_page_counts_what_was_found_and_every_alarm_on_a_healthy_run() -> None:
    failing, twin = run(FAILING, [3.0] * 200 + [4.0] * 100, [RIGHT]), run(TWIN, [3.0] * 300, [RIGHT])
    page = document([failing, twin])
    assert "1 of 1 failing runs" in page
    assert "In 1 of them the first alarm of all names it" in page
    assert "1 of 1 runs whose loss shows it at all" in page
    assert "Lead: 82 steps" in page
    assert "**Alarms on healthy runs**: 1 of 1 runs" in page
    assert "| logits grow | 1 | 1 | 120 | baseline 1 | 202 | 82 | 1 of 1 |" in page
    assert "| this monitor | 1 of 1 | 1 of 1 | 82 | 1 of 1 |" in page


def test_a_run_that_the_loss_shows_first_is_named() -> None:
    late = run(FAILING, [3.0] * 100 + [4.0] * 200, [RIGHT])
    page = document([late, run(TWIN, [3.0] * 300)])
    assert "0 of 1 runs whose loss shows it at all" in page
    assert f"Found after the loss showed it: logits grow, seed {CHOSEN_ON + 1} (loss 102, alarm 120)." in page
    never = document([run(FAILING, [3.0] * 300), run(TWIN, [3.0] * 300)])
    assert f"Not found: logits grow, seed {CHOSEN_ON + 1}." in never
    assert "| not within the run |" in never
    assert "| no twin was run |" in document([late, run(FAILING, [4.0] * 300, [RIGHT])])  # its loss says nothing


def test_what_other_rules_say_counts_from_the_fault_on_and_on_every_healthy_run() -> None:
    failing = replace(run(FAILING, [3.0] * 200 + [4.0] * 100), others=SILENT | {"trainscope": 190, "arc-vigil": 210})
    twin = replace(run(TWIN, [3.0] * 300), others=SILENT | {"arc-vigil": 70})
    page = document([failing, twin])
    assert "| `trainscope` 1.8.1, CUSUM of the loss, upwards | 1 of 1 | 1 of 1 | 12 | 0 of 1 |" in page
    assert "| `arc-vigil` 1.0.0 | 1 of 1 | 0 of 1 | -8 | 1 of 1 |" in page


def test_where_other_rules_ran_on_other_seeds_their_rows_count_those() -> None:
    with_rules = replace(run(FAILING, [3.0] * 200 + [4.0] * 100, seed=7), others=SILENT | {"arc-vigil": 210})
    twin = replace(run(TWIN, [3.0] * 300, seed=7), others=SILENT | {"arc-vigil": 70})
    without = [
        replace(run(FAILING, [3.0] * 200 + [4.0] * 100, [RIGHT]), others={}),
        replace(run(TWIN, [3.0] * 300), others={}),
    ]
    page = document([with_rules, twin, *without])
    assert "The other rules ran on 1 failing run and 1 healthy ones (seeds 7)." in page
    assert "| this monitor | 1 of 1 | 1 of 1 | 82 | 0 of 1 |" in page
    assert "| `arc-vigil` 1.0.0 | 1 of 1 | 0 of 1 | -8 | 1 of 1 |" in page
    assert "The other rules ran on" not in document([with_rules, twin])


def test_queries_and_keys_that_shrink_are_those_of_one_block_from_step_600_on() -> None:
    model = LanguageModel(Shape())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        shrinking(model, 599)
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
        shrinking(model, 600)
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert changed == ["blocks.1.attention.read.weight"]
    weight, width = model.get_parameter(changed[0]), Shape().width
    assert torch.equal(weight[: 2 * width], 0.95 * before[changed[0]][: 2 * width])
    assert torch.equal(weight[2 * width :], before[changed[0]][2 * width :])


def test_seeds_on_which_the_constants_were_chosen_are_not_counted() -> None:
    chosen = [run(FAILING, [3.0] * 200 + [4.0] * 100, seed=0), run(TWIN, [3.0] * 300, [RIGHT], seed=0)]
    counted = [run(FAILING, [3.0] * 200 + [4.0] * 100, [RIGHT]), run(TWIN, [3.0] * 300)]
    page = document([*chosen, *counted])
    assert f"1 seed that had no part in it ({CHOSEN_ON + 1}): 1 failing and" in page
    assert "**Alarms on healthy runs**: 0 of 1 runs" in page
    assert "On the seeds that were looked at: 0 of 1 found, alarms on" in page


def test_every_failing_run_has_a_twin_of_its_shape_and_length() -> None:
    for scenario in SCENARIOS:
        if scenario.phenomenon or scenario.hurts:
            twin = BY_NAME[scenario.twin]
            assert not twin.phenomenon
            assert not twin.hurts
            assert twin.steps >= scenario.steps
            assert twin.shape == replace(scenario.shape, post=False, attention_only=False)


def test_rounding_away_from_zero_keeps_what_bfloat16_holds_and_never_shrinks() -> None:
    model = LanguageModel(Shape())
    weight = model.get_parameter("blocks.2.attention.read.weight")
    width = weight.shape[1]
    before = weight.detach().clone()
    with torch.no_grad():
        rounding(model, 0)
        once = weight.detach().clone()
        rounding(model, 1)
    assert torch.equal(once, weight)
    assert torch.equal(once[: 2 * width].bfloat16().float(), once[: 2 * width])
    assert bool((once[: 2 * width].abs() >= before[: 2 * width].abs()).all())
    assert torch.equal(once[2 * width :], before[2 * width :])
    assert doctest.testmod(studied).failed == 0


@pytest.mark.parametrize("rule", [SpikeRule(), NormRule()])
def test_the_other_rules_speak_of_a_jump_and_not_of_noise(rule: SpikeRule | NormRule) -> None:
    assert not any(rule.speaks(1.0 + 0.01 * (step % 3)) for step in range(60))
    assert rule.speaks(9.0)
