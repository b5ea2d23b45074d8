"""The sign patterns that are sent through an attention call to find out which row feeds which channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

PATTERNS = 29  # patterns a pass, one a sequence: a number that no other axis is likely to have
CODES = 128  # signs in the code of a feature: of 2^26 wrong ones, the nearest agrees with a code to .55

LOUD = 16.0


def unchanged(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The first sequence of a batch, `times` over."""
    size = next((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.ndim), 1)
    return {
        name: value[:1].repeat(times, *(1,) * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == size
        else value
        for name, value in batch.items()
    }


def sign_codes(features: int, known: dict[int, Tensor]) -> Tensor:
    """Random signs [pattern, feature], the same for every product with so many features."""
    if features not in known:
        generator = torch.Generator().manual_seed(features)
        known[features] = torch.randint(2, (CODES, features), generator=generator).double() * 2 - 1
    return known[features]


def stacked(codes: Tensor) -> Tensor:
    """The codes, then silence, then the first code aloud."""
    return torch.cat([codes, torch.zeros_like(codes[:1]), LOUD * codes[:1]])


def cut(table: Tensor, start: int, length: int) -> Tensor:
    """`length` patterns of a table from `start`, its last one again and again after its end."""
    return table[torch.arange(start, start + length).clamp(max=len(table) - 1)]


def by_pattern(given: Tensor, patterns: int) -> Tensor | None:
    """One token's features [pattern, feature] of a tensor in which all tokens are alike, whatever axes it has."""
    if patterns == 1:
        return given.reshape(-1, given.shape[-1])[:1]
    axes = [i for i, length in enumerate(given.shape[:-1]) if length == patterns]
    if len(axes) == 1:
        return given.movedim(axes[0], 0).reshape(patterns, -1, given.shape[-1])[:, 0]
    rows = given.reshape(-1, given.shape[-1])
    if len(rows) % patterns:
        return None
    for laid in (rows.view(patterns, -1, rows.shape[-1]), rows.view(-1, patterns, rows.shape[-1]).transpose(0, 1)):
        if torch.equal(laid, laid[:, :1].expand_as(laid)):
            return laid[:, 0]
    return None
