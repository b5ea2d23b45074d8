"""The first passes over a model that is to be proved: a piece of the batch that it runs on, what it gives on it, and the trace.

Where the weights are kept elsewhere, the plain pass and the traced one are made together, from one reading, and with them one over
the single sequence that masks and orders are seen on later. Where they cannot be, or the piece does not fit, all is as for any
other model: a pass after the other.

When not to use it: on a batch that the model was seen to go another way on. That one is traced as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.examples import Piece, example, example_batch, fitting_piece
from uncollapse.anatomy.module_states import left_as_found
from uncollapse.anatomy.probing import output_of, probing, seed_all
from uncollapse.anatomy.shared_readings import made_together
from uncollapse.anatomy.stages import can_be_shared, stages
from uncollapse.anatomy.tracing import Trace, trace


@dataclass(frozen=True)
class FirstPasses:
    """What the first passes showed. `recorded`: the trace on the piece, None where it is still to be made. `sequence`: what
    `example` makes of the batch, where the model was seen to run on it and to be the same model afterwards."""

    piece: Piece
    recorded: Trace | None = None
    sequence: Mapping[str, Any] | None = None

    def ran_on(self, piece: Mapping[str, Any]) -> bool:
        """Whether one of the first passes was over this very piece."""
        return self.sequence is not None and _are_equal(piece, self.sequence)


def first_passes(model: nn.Module, batch: Mapping[str, Any], real: Tensor | None = None) -> FirstPasses:
    """A piece of the batch that the model runs on, with what was seen of it. real: see `fitting_piece`."""
    held = stages(model, ())
    found = _from_one_reading(model, held, batch, real) if can_be_shared(model, held) else None
    return FirstPasses(fitting_piece(model, batch, real)) if found is None else found


def traced(model: nn.Module, batch: Mapping[str, Any]) -> Trace:
    """The trace of a pass from the seed 0. Within `probing` only."""
    seed_all(0)
    return trace(model, batch)


def _from_one_reading(
    model: nn.Module, held: list[nn.Module], batch: Mapping[str, Any], real: Tensor | None
) -> FirstPasses | None:
    piece, sequence = example_batch(batch, real=real), example(batch, real=real)
    found: list[Any] = []
    passes = [
        lambda: output_of(model, piece),
        lambda: traced(model, piece),
        lambda: output_of(model, sequence),
    ]
    with probing(model), left_as_found(model) as states:
        try:
            made_together(model, held, passes, lambda _, made: found.append(made))
        except Exception:  # the piece does not fit, the tracer does not get through, or one has to follow another
            return None
        if states.steered():
            return None
    return FirstPasses(Piece(piece, False, found[0]), found[1], sequence)


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_is_equal(value, other[name]) for name, value in one.items())


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is other
