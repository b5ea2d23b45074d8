"""What the output projection says of its heads: may a result be attributed to a head at all?

The figures come from the weights of the model at hand, found through its anatomy, and are the same for every model that
computes the same function (the value-output gauge moves none of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse import heads
from uncollapse.capture import AttentionStatistics
from uncollapse.interception import Point, full_precision
from uncollapse.records import HeadsRecord, Statistic


def heads_records(attention: Sequence[AttentionStatistics]) -> list[HeadsRecord]:
    """One record for each attention call. A projection that several blocks share is decomposed once."""
    known: dict[str, dict[str, Any]] = {}
    records = []
    for statistics in attention:
        call = statistics.call
        unavailable: dict[str, str] = {}
        figures: dict[str, Any] = dict.fromkeys(
            [
                "width",
                "ambiguous_degrees_of_freedom",
                "kernel_dimension",
                "gauge_dimension",
                "output_projection_rank",
                "condition_number",
                "write_space_overlap",
                "verdict",
            ]
        )
        figures["width"] = 0
        figures["ambiguous_degrees_of_freedom"] = heads.ambiguous_degrees_of_freedom(call.heads, call.head_width)
        if call.projection is None or statistics.matrix is None:
            reason = "no output projection follows this attention"
            if call.projection is not None:
                reason = statistics.reasons.get("matrix", "the output projection did not run")
            unavailable |= {k: reason for k, v in figures.items() if v is None}
        else:
            place = call.projection.owner if isinstance(call.projection, Point) else call.projection.name
            if place not in known:
                with full_precision(statistics.matrix):
                    known[place] = _weight_figures(statistics, statistics.matrix)
            figures |= known[place]
            if figures["kernel_dimension"] is None:
                unavailable |= {k: "NaN or infinity in the output projection" for k, v in figures.items() if v is None}
            elif figures["condition_number"] is None:
                unavailable["condition_number"] = "the heads' write spaces are linearly dependent: infinite"
        shares = None
        if "energy_share" in statistics.reasons or not statistics.energy.count.any():
            unavailable["energy_share"] = statistics.reasons.get("energy_share", "the output projection did not run")
        else:
            shares = [Statistic.of(*statistics.energy.summary(h)) for h in range(call.heads)]
        records.append(
            HeadsRecord(
                block=statistics.block,
                stack=statistics.stack,
                kind=statistics.kind,
                heads=call.heads,
                head_width=call.head_width,
                energy_share=shares,
                unavailable=unavailable,
                **figures,
            )
        )
    return records


def _weight_figures(statistics: AttentionStatistics, matrix: Tensor) -> dict[str, Any]:
    call = statistics.call
    if not bool(matrix.isfinite().all()):
        return {"width": matrix.shape[1]}
    kernel = int(heads.kernel_dimension(matrix))
    conditioning = float(heads.conditioning(matrix, call.heads))
    overlap = heads.write_space_overlap(matrix, call.heads)
    return {
        "width": matrix.shape[1],
        "kernel_dimension": kernel,
        "gauge_dimension": int(
            heads.gauge_dimension(
                call.key_value_heads,
                call.head_width,
                value_bias=call.value_bias,
                output_bias=call.output_bias,
            )
        ),
        "output_projection_rank": matrix.shape[0] - kernel,
        "condition_number": conditioning if torch.isfinite(torch.tensor(conditioning)) else None,
        "write_space_overlap": _as_lists(overlap),
        "verdict": heads.attribution_verdict(kernel, conditioning),
    }


def _as_lists(matrix: Tensor) -> list[list[float]]:
    """Plain numbers; a head that writes nothing overlaps with nothing."""
    return [[float(v) for v in row] for row in matrix.nan_to_num(nan=0.0)]
