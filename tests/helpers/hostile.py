"""A right call of every pure function, and what can be wrong with a tensor in it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import uncollapse as uc
from uncollapse import exact, geometry, heads, mixing


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = _drawn(2, 7, 3), _drawn(2, 7, 3, seed=1)
MASK = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
Q, K = _drawn(2, 4, 5, 3), _drawn(2, 2, 5, 3, seed=1)
A = torch.softmax(_drawn(2, 4, 5, 5), -1)
KEYS = torch.tensor([[True] * 5, [True] * 4 + [False]])
W, O = _drawn(6, 4), _drawn(2, 7, 6)
GATES = _drawn(8, 3).exp()

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{
        f"geometry.{name}": (getattr(geometry, name), {"x": X, "mask": MASK})
        for name in (
            "rank",
            "affine_rank",
            "attainable_rank",
            "rank_tolerance",
            "rank_gap",
            "effective_rank",
            "stable_rank",
            "participation_ratio",
            "consensus_distance",
            "consensus_after_norm",
            "token_similarity",
            "row_space",
            "cloud_measures",
            "cloud_ranks",
        )
    },
    "geometry.stream_carried": (geometry.stream_carried, {"before": X, "after": Y, "mask": MASK}),
    "geometry.out_of_span_energy": (geometry.out_of_span_energy, {"update": X, "embeddings": Y[:, :2], "mask": MASK}),
    "geometry.null_out_of_span_energy": (
        geometry.null_out_of_span_energy,
        {"second_moment": X.mT @ X, "embeddings": Y[:, :2]},
    ),
    "geometry.nonlinear_innovation": (
        geometry.nonlinear_innovation,
        {"inputs": _drawn(2, 20, 2), "outputs": _drawn(2, 20, 3)},
    ),
    **{
        f"mixing.{name}": (getattr(mixing, name), {"weights": A, "mask": KEYS})
        for name in (
            "entropy",
            "normalized_entropy",
            "contraction",
            "spectral_gap",
            "leading_singular_values",
            "dobrushin",
        )
    },
    **{
        f"mixing.{name}": (getattr(mixing, name), {"q": Q, "k": K, "mask": KEYS})
        for name in ("fused_entropy", "susceptibility", "entropy_floor")
    },
    "mixing.row_statistics": (
        mixing.row_statistics,
        {"q": Q, "k": K, "bias": _drawn(1, 4, 5, 5), "key_mask": KEYS, "query_mask": KEYS},
    ),
    "mixing.row_statistics_from_weights": (
        mixing.row_statistics_from_weights,
        {"weights": A, "logits": A.log(), "key_mask": KEYS},
    ),
    "mixing.attention_weights": (mixing.attention_weights, {"q": Q, "k": K, "key_mask": KEYS}),
    "mixing.leading_spectrum": (
        mixing.leading_spectrum,
        {"q": Q, "k": K, "bias": _drawn(1, 4, 5, 5), "key_mask": KEYS, "query_mask": KEYS},
    ),
    "mixing.leading_spectrum_from_weights": (
        mixing.leading_spectrum_from_weights,
        {"weights": A, "key_mask": KEYS, "query_mask": KEYS},
    ),
    "heads.kernel_dimension": (heads.kernel_dimension, {"output_projection": W}),
    **{
        f"heads.{name}": (getattr(heads, name), {"output_projection": W, "heads": 2})
        for name in (
            "contribution_ambiguity",
            "write_space_overlap",
            "principal_angles",
            "smallest_principal_angle",
            "conditioning",
            "head_noise_gain",
            "absolute_noise_gain",
            "write_grams",
        )
    },
    **{
        f"heads.{name}": (
            getattr(heads, name),
            {"head_outputs": O, "output_projection": W, "heads": 2, "mask": MASK},
        )
        for name in ("contribution_energy", "energy_share")
    },
    "heads.gate_rank": (heads.gate_rank, {"gates": GATES}),
    "heads.gate_conditioning": (heads.gate_conditioning, {"gates": GATES}),
    "heads.gauge_of_gates": (heads.gauge_of_gates, {"gates": GATES, "head_width": 2}),
    "exact.rank": (exact.rank, {"matrix": X[:, :3], "mask": MASK[:, :3]}),
    "exact.affine_rank": (exact.affine_rank, {"matrix": X[:, :3], "mask": MASK[:, :3]}),
    "rank_change": (uc.rank_change, {"x": X, "mask": MASK, "gamma": _drawn(3), "beta": _drawn(3), "eps": 1e-5}),
}


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def changed(t: Tensor) -> Tensor:
        t = t.clone() if t.is_floating_point() else t.double()
        t.view(-1)[:1] = value
        return t

    return changed


FORMATS: dict[str, Callable[[Tensor], Any]] = {
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "float8 of powers": lambda t: t.float().abs().to(torch.float8_e8m0fnu),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.reshape(-1, t.shape[-1]).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t if t.ndim > 1 else t[None]), layout=torch.jagged),
    "no axes": lambda t: t.reshape(-1)[0],
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
}
"""What every function refuses."""

OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda t: t.long(),
    "bytes": lambda t: t.to(torch.uint8),
    "booleans": lambda t: t > 0,
    "floats": lambda t: t.float(),
    "half precision": lambda t: t.to(torch.bfloat16),
    "one axis": lambda t: t.reshape(-1),
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t[0],
    "no batch": lambda t: t[:0],
    "no second axis": lambda t: t[:, :0] if t.ndim > 1 else t[:0],
    "no last axis": lambda t: t[..., :0],
    "shorter": lambda t: t[..., :-1],
    "longer": lambda t: torch.cat([t, t], -1),
    "turned": lambda t: t.mT if t.ndim > 1 else t.flip(0),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "with NaN": _with(math.nan),
    "with infinity": _with(math.inf),
    "zeros": torch.zeros_like,
    "huge": lambda t: t * 1e300 if t.is_floating_point() else t,
    "tiny": lambda t: t * 1e-300 if t.is_floating_point() else t,
    "denormal": lambda t: t * 1e-320 if t.is_floating_point() else t,
    "learned": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "none": lambda t: None,
}
"""What a function may refuse or compute, but not end in an error of torch or Python."""


def called(name: str, **changed: Any) -> Any:
    """The right call with some arguments replaced."""
    function, given = CALLS[name]
    return function(**{**given, **changed})


def tensors_of(name: str) -> list[str]:
    return [key for key, value in CALLS[name][1].items() if isinstance(value, Tensor)]


def public_functions() -> set[str]:
    """Every function of the measures that is given tensors."""
    found = set()
    for module in (geometry, mixing, heads):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "Tensor" in str(list(inspect.signature(function).parameters.values())):
                found.add(f"{module.__name__.rpartition('.')[2]}.{name}")
    return found
