"""What an operand that is added to the logits forbids: a mask whatever its number, and no bias however short the text."""

from __future__ import annotations

import math

import pytest
import torch

from uncollapse.anatomy.masking import forbidden_by_addition, result_shape, step_without, without_what_forbids


@pytest.mark.parametrize("number", [-math.inf, -1e9, -1e4, -100.0, torch.finfo(torch.float32).min])
def test_one_negative_number_beside_zero_forbids_whatever_it_is(number: float) -> None:
    later = torch.ones(5, 5).triu(1).bool()
    forbidden, shifts = forbidden_by_addition(torch.zeros(5, 5).masked_fill(later, number))
    assert forbidden is not None
    assert torch.equal(forbidden, later)
    assert not shifts


def test_masks_added_to_each_other_forbid_what_either_does() -> None:
    later, padded = torch.ones(5, 5).triu(1).bool(), torch.arange(5) > 3
    mask = torch.zeros(5, 5).masked_fill(later, -1e4) + torch.zeros(5).masked_fill(padded, -1e4)
    forbidden, shifts = forbidden_by_addition(mask)
    assert forbidden is not None
    assert torch.equal(forbidden, later | padded)
    assert not shifts


def test_the_distances_of_a_few_tokens_are_a_bias() -> None:
    """ALiBi over four tokens takes 0 and the multiples -1/2, -1, -3/2 of one number: it forbids nothing."""
    distance = (torch.arange(4) - torch.arange(4)[:, None]).abs()
    forbidden, shifts = forbidden_by_addition(-0.5 * distance)
    assert forbidden is None
    assert shifts


def test_keys_that_are_forbidden_by_their_numbers_stay_so_beside_padding() -> None:
    """What is written at places, not where something is true, is no mask; padding has another shape than the numbers of places."""
    logits, hidden = torch.zeros(4, 2, 7, 7), torch.zeros(4, 1, 1, 7, dtype=torch.bool)
    places = torch.tensor([1, 3, 5])
    step_without(torch.Tensor.__setitem__, (logits, (..., places), -math.inf), {}, 1, False, hidden)
    assert bool((logits[..., places] == -math.inf).all())
    assert int((logits != 0).sum()) == 4 * 2 * 7 * 3


def test_a_small_mask_that_stands_in_front_of_the_logits_does_not_give_the_shape() -> None:
    logits, mask = torch.zeros(4, 2, 7, 7), torch.zeros(1, 1, 7, 7)
    assert result_shape(torch.minimum, (mask, logits), {}) == (4, 2, 7, 7)


def test_a_mask_is_left_out_of_a_bias_however_the_call_is_written() -> None:
    bias, later = -torch.rand(5, 5), torch.ones(5, 5, dtype=torch.bool).triu(1)
    for function, args, kwargs in (
        (torch.where, (), {"condition": later, "input": torch.tensor(-1e9), "other": bias}),
        (torch.where, (~later, bias, torch.tensor(-1e9)), {}),
        (torch.add, (bias, later.float()), {"alpha": -1e9}),
        (torch.sub, (bias, later.float()), {"alpha": 1e9}),
        (torch.sub, (bias, 1e9 * later.float()), {}),
    ):
        is_opened, found = without_what_forbids(function, args, kwargs)
        assert is_opened
        assert torch.equal(found, bias)
