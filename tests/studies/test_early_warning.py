"""What the study says of runs: when a loss shows a failure, which alarm counts, and that the page has them."""

from __future__ import annotations

import pytest
from studies.early_warning.document import BY_NAME, document, first_alarm, shown_by_the_loss
from studies.early_warning.runs import NormRule, Run, SpikeRule

FAILING, TWIN = "logits grow", "learning rate 2e-3"
SILENT: dict[str, int | None] = {"loss spike": None, "gradient norm": None}


def run(name: str, losses: list[float], alarms: list[tuple[int, int, str, str, int | None, str]] | None = None) -> Run:
    return Run(name, 0, losses, alarms or [], SILENT, [(0, 0.9), (5, 0.03)])


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
    right = (120, 100, "BASELINE-ENTROPY", "entropy-collapse", 1, "baseline")
    assert first_alarm(run(FAILING, [], [early, other, right]), BY_NAME[FAILING]) == right
    assert first_alarm(run(FAILING, [], [early, other]), BY_NAME[FAILING]) is None


def test_the_page_counts_what_was_found_and_every_alarm_on_a_healthy_run() -> None:
    right = (120, 100, "BASELINE-ENTROPY", "entropy-collapse", 1, "baseline")
    failing = run(FAILING, [3.0] * 200 + [4.0] * 100, [right])
    page = document([failing, run(TWIN, [3.0] * 300, [right])])
    assert "1 of 1 failing runs" in page
    assert "constants of the alarms: 0 of 0" in page  # both runs have a seed on which they were chosen
    assert "1 of the 1 found runs whose loss shows it" in page
    never = document([run(FAILING, [3.0] * 300, [right]), run(TWIN, [3.0] * 300)])
    assert "0 of the 0 found runs whose loss shows it" in never
    assert "| not within the run |" in never
    assert "| no twin was run |" in document([failing, run(FAILING, [4.0] * 300, [right])])  # its loss says nothing
    assert "Median lead where the loss shows it within the run: 82 steps" in page
    assert "1 on 1 of 1 runs" in page
    assert "| logits grow | 0 | 120 | BASELINE-ENTROPY (baseline), block 1 | 202 | silent | silent |" in page


@pytest.mark.parametrize("rule", [SpikeRule(), NormRule()])
def test_the_other_rules_speak_of_a_jump_and_not_of_noise(rule: SpikeRule | NormRule) -> None:
    assert not any(rule.speaks(1.0 + 0.01 * (step % 3)) for step in range(60))
    assert rule.speaks(9.0)
