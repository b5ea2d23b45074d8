"""Whether the weights of an attention sum to one over the keys, where rounding would hide that they do not.

In half precision the rows of a softmax sum to one within some per cent, as it is written. So do, by chance, weights that are no
distribution: heads that are mixed behind the softmax, or weights that a mask has taken something from. In double precision the two
are told apart.

When not to use it: for what rows sum to on a user's batch. This is asked once, on the few tokens of the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.double_precision import in_double_precision
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.operands import arranged, product_operands
from uncollapse.anatomy.vocabulary import AttentionCall

CLOSE = 1e-5  # what an epsilon in a normalisation may leave; rounding leaves 1e-15

Run = Callable[[Tensor, Mapping[Point, Handler]], object]  # a stream, handlers at operations → the block has run


def sums_to_one(module: nn.Module, run: Run, stream: Tensor, call: AttentionCall, sequences: int) -> bool | None:
    """Whether each row of the call's weights over tokens that has any weight sums to one in double precision; None where the block
    does not run like that, or makes no weights."""
    if call.weight_operand is None:
        return None
    weights: list[Tensor] = []
    operand = call.weight_operand

    def note(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        found = product_operands(function, args, kwargs, output, operand, call.pair).weights
        if found is not None:
            weights.append(arranged(found, call.lead, sequences).detach())
        return output

    try:
        with in_double_precision(module):
            run(stream.double(), {call.product: note})
    except Exception:  # the model's own code, on a format it may not take
        return None
    if not weights or weights[-1].dtype != torch.float64:
        return None
    sums = weights[-1][..., call.before : weights[-1].shape[-1] - call.after].sum(-1)
    sums = sums[sums.isfinite() & (sums != 0)]
    return bool(((sums - 1).abs() <= CLOSE).all()) if sums.numel() else None
