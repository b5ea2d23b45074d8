"""A refusal names the function that was called, not one of those that it is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from uncollapse.errors import InputError
from uncollapse.measures import exact, geometry, heads, mixing, normalization

WORDS = torch.ones(2, 3, dtype=torch.int64)  # token ids where numbers were expected
CLOUD, PADDED = torch.randn(2, 3, 8), torch.ones(2, 3)  # a cloud, and a mask that is no boolean one
BROKEN = CLOUD / 0
WEIGHTS, Q, K = torch.ones(2, 4, 3, 3) / 3, torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8)
W = torch.randn(4, 6)
CUT = torch.randn(5, 6)  # no multiple of two heads
NAN = float("nan")
Calls = dict[str, list[Callable[[], Any]]]


def every(functions: list[Callable[..., Any]], *arguments: tuple[Any, ...]) -> Calls:
    return {f.__name__: [lambda f=f, a=a: f(*a) for a in arguments] for f in functions}


GEOMETRY: Calls = {
    **every(
        [
            geometry.attainable_rank,
            geometry.effective_rank,
            geometry.stable_rank,
            geometry.participation_ratio,
            geometry.consensus_distance,
            geometry.consensus_after_norm,
            geometry.token_similarity,
            geometry.cloud_measures,
            geometry.cloud_ranks,
            geometry.rank_tolerance,
            geometry.rank_gap,
        ],
        (WORDS,),
        (CLOUD, PADDED),
    ),
    **every([geometry.rank, geometry.affine_rank, geometry.row_space], (WORDS,), (CLOUD, PADDED), (BROKEN,)),
    "stream_carried": [
        lambda: geometry.stream_carried(WORDS, CLOUD),
        lambda: geometry.stream_carried(CLOUD, WORDS),
        lambda: geometry.stream_carried(CLOUD, CLOUD, PADDED),
    ],
    "out_of_span_energy": [
        lambda: geometry.out_of_span_energy(WORDS, CLOUD),
        lambda: geometry.out_of_span_energy(CLOUD),
        lambda: geometry.out_of_span_energy(CLOUD, CLOUD.long()),
        lambda: geometry.out_of_span_energy(CLOUD, CLOUD, None, PADDED),
        lambda: geometry.out_of_span_energy(CLOUD, BROKEN),
    ],
    "null_out_of_span_energy": [
        lambda: geometry.null_out_of_span_energy(CLOUD, CLOUD),
        lambda: geometry.null_out_of_span_energy(torch.eye(8), CLOUD.long()),
        lambda: geometry.null_out_of_span_energy(torch.eye(8), CLOUD, PADDED),
        lambda: geometry.null_out_of_span_energy(torch.eye(8), BROKEN),
    ],
    "nonlinear_innovation": [
        lambda: geometry.nonlinear_innovation(WORDS, CLOUD),
        lambda: geometry.nonlinear_innovation(CLOUD, WORDS),
        lambda: geometry.nonlinear_innovation(CLOUD, CLOUD),
    ],
}
MIXING: Calls = {
    **every(
        [
            mixing.entropy,
            mixing.normalized_entropy,
            mixing.contraction,
            mixing.spectral_gap,
            mixing.leading_singular_values,
            mixing.dobrushin,
        ],
        (WORDS,),
        (WEIGHTS, PADDED),
    ),
    **{
        f.__name__: [
            lambda f=f: f(Q[..., :2], K),
            lambda f=f: f(Q, K, mask=PADDED),
            lambda f=f: f(Q[:, :, :2], K, causal=True),
        ]
        for f in (mixing.fused_entropy, mixing.susceptibility, mixing.entropy_floor)
    },
    **{
        f.__name__: [
            lambda f=f: f(Q[..., :2], K),
            lambda f=f: f(Q, K, key_mask=PADDED),
            lambda f=f: f(Q, K, allowed=WEIGHTS),
            lambda f=f: f(Q, K, bias=WEIGHTS > 0),
        ]
        for f in (mixing.row_statistics, mixing.attention_weights, mixing.leading_spectrum)
    },
    "dispersion_length": [
        lambda: mixing.dispersion_length(-1.0),
        lambda: mixing.dispersion_length(math.inf),
        lambda: mixing.dispersion_length(NAN),
        lambda: mixing.dispersion_length(1.0, weight=0.0),
    ],
    "leading_spectrum_from_weights": [
        lambda: mixing.leading_spectrum_from_weights(WORDS),
        lambda: mixing.leading_spectrum_from_weights(WEIGHTS, query_mask=PADDED),
        lambda: mixing.leading_spectrum_from_weights(WEIGHTS, key_mask=WEIGHTS),
    ],
    "row_statistics_from_weights": [
        lambda: mixing.row_statistics_from_weights(WORDS),
        lambda: mixing.row_statistics_from_weights(WEIGHTS, query_mask=PADDED),
        lambda: mixing.row_statistics_from_weights(WEIGHTS, allowed=WEIGHTS),
    ],
}
HEADS: Calls = {
    "kernel_dimension": [lambda: heads.kernel_dimension(W[0]), lambda: heads.kernel_dimension(W * NAN)],
    **every(
        [
            heads.WriteSpaces,
            heads.contribution_ambiguity,
            heads.write_space_overlap,
            heads.principal_angles,
            heads.smallest_principal_angle,
            heads.conditioning,
            heads.head_noise_gain,
            heads.absolute_noise_gain,
        ],
        (W[0], 2),
        (W * NAN, 2),
        (CUT, 2),
    ),
    "write_grams": [lambda: heads.write_grams(W[0], 2), lambda: heads.write_grams(CUT, 2)],
    **every(
        [heads.contribution_energy, heads.energy_share],
        (W, W[0], 2),
        (W, CUT, 2),
        (W, W, 2),
        (torch.ones(5, 4), W, 2, PADDED),
    ),
    **every([heads.gate_rank, heads.gate_conditioning], (WORDS,), (W * NAN,)),
    **every([heads.gauge_of_gates], (WORDS, 2), (W[0].exp(), 2), (-W.exp(), 2), (W * NAN, 2)),
}
EXACT: Calls = {
    **every(
        [
            exact.rational,
            exact.rank,
            exact.affine_rank,
            exact.null_dimension,
            exact.null_space,
            exact.text,
        ],
        ([[1], [1, 2]],),
        ([[NAN]],),
        (torch.ones(3),),
    ),
    **every([exact.in_column_space, exact.in_row_space], ([[NAN]], [[1]]), ([[1]], [[NAN]]), ([[1], [1, 2]], [[1]])),
    **every([exact.number, exact.square_root], (NAN,), ("half",)),
    "square_classes": [lambda: exact.square_classes([NAN])],
    "root_scaled": [lambda: exact.root_scaled(exact.identity(1), [math.inf])],
}
EXACT["rank"] += [lambda: exact.rank(CLOUD, PADDED[:1]), lambda: exact.rank(BROKEN)]
EXACT["affine_rank"] += [lambda: exact.affine_rank(CLOUD, PADDED[:1]), lambda: exact.affine_rank(BROKEN)]
NORMALIZATION: Calls = {
    "rank_change": [
        lambda: normalization.rank_change(WORDS),
        lambda: normalization.rank_change(CLOUD, eps=NAN),
        lambda: normalization.rank_change([[1], [1, 2]]),
        lambda: normalization.rank_change([[NAN, 1]]),
        lambda: normalization.rank_change([[1, 2]], gamma=[NAN, 1]),
        lambda: normalization.rank_change([[1, 2]], beta=[1]),
        lambda: normalization.rank_change([[1, 1]]),
        lambda: normalization.rank_change(BROKEN),
    ],
    "deviation_squares": [lambda: normalization.deviation_squares(exact.identity(2), NAN)],
}
MODULES = [(geometry, GEOMETRY, ""), (mixing, MIXING, ""), (heads, HEADS, "")]
MODULES += [(normalization, NORMALIZATION, ""), (exact, EXACT, "exact.")]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param(prefix + name, call, id=f"{module.__name__.rpartition('.')[2]}.{name} {number}")
        for module, calls, prefix in MODULES
        for name, every_call in calls.items()
        for number, call in enumerate(every_call)
    ],
)
def test_the_function_that_was_called_refuses(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).split(": expected ")[0] == name


@pytest.mark.parametrize(("module", "calls"), [(module, calls) for module, calls, _ in MODULES])
def test_every_function_that_says_it_refuses_is_tried(module: ModuleType, calls: Calls) -> None:
    refusing = {
        name
        for name, made in vars(module).items()
        if (inspect.isfunction(made) or inspect.isclass(made))
        and made.__module__ == module.__name__
        and not name.startswith("_")
        and "InputError" in (made.__doc__ or "")
    }
    assert refusing <= calls.keys()
