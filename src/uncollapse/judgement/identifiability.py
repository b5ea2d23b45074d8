"""What the output projection says about its heads: can a result be attributed to a single head at all?

The figures come from the weights of the given model, which are found through its anatomy. They are the same for every model
that computes the same function: the value-output gauge changes none of them. For the vectors that the heads write, see
`contributions`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.probing import full_precision
from uncollapse.anatomy.vocabulary import ModuleCall
from uncollapse.measures import heads
from uncollapse.measures.random_projections import random_noise_gain
from uncollapse.measures.weight_marks import are_alike, weight_marks
from uncollapse.measures.write_spaces import WriteSpaces
from uncollapse.probe.attention import AttentionStatistics
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import HeadsRecord

FROM_WEIGHTS = (
    "kernel_dimension",
    "output_projection_rank",
    "contribution_ambiguity",
    "condition_number",
    "write_space_overlap",
    "smallest_principal_angle",
    "head_noise_gain",
    "head_verdict",
    "verdict",
    "absolute_noise_gain",
    "random_noise_gain",
    "random_head_noise_gain",
)
_ROUNDED_SUM = 0.01  # weights in half precision sum to one so far
_DIGITS = 10  # single precision has 7


@dataclass(frozen=True)
class _Known:
    """What the weights of an output projection said, and by what they are known again."""

    heads: int
    marks: tuple[Tensor, Tensor]
    figures: dict[str, Any]

    def is_of(self, heads: int, marks: tuple[Tensor, Tensor]) -> bool:
        return self.heads == heads and are_alike(self.marks, marks)


_remembered: weakref.WeakKeyDictionary[nn.Module, dict[object, _Known]] = weakref.WeakKeyDictionary()


def heads_records(attention: Sequence[AttentionStatistics], model: nn.Module | None = None) -> list[HeadsRecord]:
    """One record for each attention call. A projection that several blocks share is decomposed once. What its weights say is
    remembered for `model` as long as it lives, and computed anew when they have changed."""
    known = {} if model is None else _remembered.setdefault(model, {})
    return [_heads_record(statistics, known) for statistics in attention]


def weights_reader(model: nn.Module | None = None) -> Callable[[AttentionStatistics], dict[str, Any]]:
    """What reads the figures off a matrix while it is there: the `digest` of a probe pass. They are remembered for `model`, as in
    `heads_records`."""
    known = {} if model is None else _remembered.setdefault(model, {})
    return lambda statistics: _from_weights(statistics, known)


def _from_weights(statistics: AttentionStatistics, known: dict[object, _Known]) -> dict[str, Any]:
    call, matrix = statistics.call, statistics.matrix
    assert matrix is not None
    projection = call.projection
    place: object = projection.name if isinstance(projection, ModuleCall) else (statistics.block, statistics.kind)
    if isinstance(projection, Point):
        place = replace(projection, call=None)
    with full_precision(matrix):
        marks, last = weight_marks(matrix), known.get(place)
        if last is None or not last.is_of(call.heads, marks):
            last = _Known(call.heads, marks, _weight_figures(matrix, call.heads))
            known[place] = last
    return {name: _own(value) for name, value in last.figures.items()}


def _heads_record(statistics: AttentionStatistics, known: dict[object, _Known]) -> HeadsRecord:
    call, reasons = statistics.call, statistics.reasons
    unavailable: dict[str, str] = {}
    figures: dict[str, Any] = dict.fromkeys(FROM_WEIGHTS) | {"width": 0, "gauge_dimension": None}
    if statistics.matrix is None and statistics.figures is None:
        reason = reasons.get("matrix", "the output projection did not run")
        unavailable |= dict.fromkeys([*FROM_WEIGHTS, "gauge_dimension"], reason)
    else:
        figures |= _from_weights(statistics, known) if statistics.figures is None else statistics.figures
        if figures["kernel_dimension"] is None:
            reason = "NaN or infinity in the output projection"
            unavailable |= dict.fromkeys([*FROM_WEIGHTS, "gauge_dimension"], reason)
        else:
            unavailable |= _infinities(figures)
            figures["gauge_dimension"] = _gauge_dimension(statistics)
            if figures["gauge_dimension"] is None:
                unavailable["gauge_dimension"] = reasons["gauge_dimension"]
    tokens, shares = None, None
    if "energy_share" in reasons or not statistics.energy.count.any():
        reason = reasons.get("energy_share", "the output projection did not run")
        unavailable |= dict.fromkeys(["energy_share", "tokens", "factorization_ambiguity"], reason)
    else:
        shares = [Statistic.of(*statistics.energy.summary(h)) for h in range(call.heads)]
        tokens = round(statistics.tokens.summary()[0])
        if figures["width"]:
            mixed = call.heads * call.head_width
            figures["factorization_ambiguity"] = heads.factorization_ambiguity(tokens, mixed, figures["width"])
    ambiguous = None
    if call.unreadable:  # then how many heads there are was never told
        unavailable["ambiguous_degrees_of_freedom"] = call.unreadable
    else:
        ambiguous = heads.ambiguous_degrees_of_freedom(call.heads, call.head_width)
    return HeadsRecord(
        block=statistics.block,
        stack=statistics.stack,
        kind=statistics.kind,
        heads=call.heads,
        head_width=call.head_width,
        ambiguous_degrees_of_freedom=ambiguous,
        energy_share=shares,
        tokens=tokens,
        unavailable=unavailable,
        **figures,
    )


def _own(figure: Any) -> Any:
    """A record's lists are its own."""
    return [_own(each) for each in figure] if isinstance(figure, list) else figure


def _weight_figures(matrix: Tensor, count: int) -> dict[str, Any]:
    """What W_O [mixed, width] alone says about its `count` heads."""
    if not bool(matrix.isfinite().all()):
        return {"width": matrix.shape[1]}
    spaces = WriteSpaces(matrix, count)
    kernel = matrix.shape[0] - spaces.rank
    conditioning = heads.conditioning(spaces, count)
    gains = [float(gain) for gain in heads.head_noise_gain(spaces, count)]
    random = random_noise_gain(count, matrix.shape[0] // count, matrix.shape[1])
    together, single = ([*points] if math.isfinite(points[0]) else None for points in random)
    overlap = heads.write_space_overlap(spaces, count).nan_to_num(nan=0.0)  # a silent head overlaps with nothing
    return {
        "width": matrix.shape[1],
        "kernel_dimension": kernel,
        "output_projection_rank": matrix.shape[0] - kernel,
        "contribution_ambiguity": heads.contribution_ambiguity(spaces, count),
        "condition_number": _finite(conditioning),
        "write_space_overlap": _of_pairs(overlap, matrix.dtype),
        "smallest_principal_angle": _of_pairs(heads.smallest_principal_angle(spaces, count), matrix.dtype),
        "head_noise_gain": [_finite(gain) for gain in gains],
        "head_verdict": [heads.attribution_verdict(0, gain, single) for gain in gains],
        "verdict": heads.attribution_verdict(kernel, conditioning, together),
        "absolute_noise_gain": _finite(heads.absolute_noise_gain(spaces, count)),
        "random_noise_gain": together,
        "random_head_noise_gain": single,
    }


def _of_pairs(figures: Tensor, weights: torch.dtype) -> list[list[float | None]]:
    """A figure of every pair of heads, null where it is undefined. These are most of a large record's numbers, so they have
    `_DIGITS` digits where the weights themselves have fewer."""
    rows = [[_finite(figure) for figure in row] for row in figures.tolist()]
    if torch.finfo(weights).eps < torch.finfo(torch.float32).eps:
        return rows
    return [[None if figure is None else float(f"{figure:.{_DIGITS}g}") for figure in row] for row in rows]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _infinities(figures: Mapping[str, Any]) -> dict[str, str]:
    """Why a figure is null although it was computed."""
    unavailable: dict[str, str] = {}
    if figures["condition_number"] is None:
        dependent = "the heads' write spaces are linearly dependent: infinite"
        unavailable |= dict.fromkeys(["condition_number", "absolute_noise_gain"], dependent)
    if figures["random_noise_gain"] is None:
        wider = "the heads are together wider than the stream: infinite for any weights"
        unavailable |= dict.fromkeys(["random_noise_gain", "random_head_noise_gain"], wider)
    if None in figures["head_noise_gain"]:
        unavailable["head_noise_gain"] = "infinite: other heads can write part of what this head writes"
    if any(None in row for row in figures["smallest_principal_angle"]):
        unavailable["smallest_principal_angle"] = "a head writes nothing"
    return unavailable


def _gauge_dimension(statistics: AttentionStatistics) -> int | None:
    """The dimension of the value-output gauge, if nothing but attention lies between the values and the output projection."""
    call = statistics.call
    if "gauge_dimension" in statistics.reasons:
        return None
    lost = any(abs(total - 1) > _ROUNDED_SUM for total in statistics.row_sums if math.isfinite(total))
    return heads.gauge_dimension(
        call.key_value_heads,
        call.head_width,
        value_bias=call.value_bias and not (statistics.sinks or lost),  # a row's weights do not sum to one there
        output_bias=call.output_bias,
    )
