"""Pure functions given what nobody expects: the right value, or the package's own refusal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import uncollapse as uc
from tests.helpers.hostile import CALLS, FORMATS, OTHERS, K, O, Q, W, X, called, public_functions, tensors_of
from uncollapse import geometry, heads, mixing
from uncollapse.errors import InputError
from uncollapse.measures import corpus
from uncollapse.measures.admission import at_size_one, is_ordinary, times_power_of_two

EVERY = [(name, argument) for name in CALLS for argument in tensors_of(name)]
SCALES = (1e-300, 1e-160, 1e-30, 1e30, 1e160, 1e300)
KEPT = 1e-9


def test_every_public_function_has_a_call_here() -> None:
    assert public_functions() <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_the_right_call_is_right(name: str) -> None:
    assert called(name) is not None


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)
@pytest.mark.parametrize(("name", "argument"), EVERY)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_holds_no_ordinary_numbers_is_refused(name: str, argument: str, kind: str) -> None:
    given = FORMATS[kind](CALLS[name][1][argument])
    accepts = name.startswith(("exact", "rank_change")) and kind in {"list", "array"}
    if accepts and argument != "mask":  # exact numbers come as rows
        with pytest.raises(uc.InputError):
            called(name, **{argument: given, "mask": torch.ones(1)})
        return
    with pytest.raises(uc.InputError, match=r"^(exact\.)?\w+: expected .*, got .*\. .*\. ?"):
        called(name, **{argument: given})


@pytest.mark.parametrize(("name", "argument"), EVERY)
def test_what_is_wrong_otherwise_is_refused_or_computed(name: str, argument: str) -> None:
    for change in OTHERS.values():
        refusal = None
        try:
            found = called(name, **{argument: change(CALLS[name][1][argument])})
        except uc.InputError as error:
            refusal = str(error)
        assert found is not None if refusal is None else ": expected " in refusal and "\n" not in refusal


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "name",
    [n for n in CALLS if n.startswith("geometry") and "tolerance" not in n and "attainable" not in n] + ["rank_change"],
)
def test_figures_of_a_cloud_do_not_depend_on_its_size(name: str, scale: float) -> None:
    argument = tensors_of(name)[0]
    extra: dict[str, Any] = {"eps": 0.0} if name == "rank_change" else {}
    expected = called(name, **extra)
    other = {"after": CALLS[name][1]["after"] * scale} if "after" in CALLS[name][1] else {}
    found = called(name, **{argument: CALLS[name][1][argument] * scale}, **other, **extra)
    _alike(found, expected)


def _alike(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.allclose(found.double(), expected.double(), rtol=KEPT, atol=KEPT, equal_nan=True)
    elif hasattr(expected, "__dict__"):
        for name, value in vars(expected).items():
            _alike(getattr(found, name), value)
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            _alike(one, other)
    else:
        assert found == pytest.approx(expected, rel=KEPT, nan_ok=True)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("heads") and n not in {"heads.write_grams"}])
def test_figures_of_heads_do_not_depend_on_the_size_of_weights(name: str, scale: float) -> None:
    if name == "heads.contribution_energy":
        return _energy_scales(scale)
    argument = next(a for a in tensors_of(name) if a in {"output_projection", "gates"})
    _alike(called(name, **{argument: CALLS[name][1][argument] * scale}), called(name))
    return None


def _energy_scales(scale: float) -> None:
    """In the square of the stream's unit, where that has a number."""
    if 1e-150 < scale < 1e150:
        expected = called("heads.contribution_energy") * scale**2
        assert torch.allclose(called("heads.contribution_energy", head_outputs=O * scale), expected, rtol=1e-9, atol=0)
    assert torch.allclose(
        called("heads.contribution_energy", head_outputs=O * scale, output_projection=W / scale),
        called("heads.contribution_energy"),
    )


@pytest.mark.parametrize("scale", SCALES)
def test_shares_do_not_depend_on_the_size_of_the_heads(scale: float) -> None:
    _alike(heads.energy_share(O * scale, W, 2), heads.energy_share(O, W, 2))
    small = 1e20 if scale > 1 else 1e-20
    found = heads.energy_share(O.float() * small, W.float(), 2)
    assert torch.allclose(found.double(), heads.energy_share(O, W, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_rank_tolerance_and_contraction_are_in_the_unit_of_what_is_given(scale: float) -> None:
    assert torch.allclose(geometry.rank_tolerance(X * scale), geometry.rank_tolerance(X) * scale, rtol=1e-12, atol=0)
    A = CALLS["mixing.contraction"][1]["weights"]
    assert torch.allclose(mixing.contraction(A * scale), mixing.contraction(A) * scale, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_common_to_a_row_of_weights_changes_nothing(scale: float) -> None:
    A = CALLS["mixing.entropy"][1]["weights"]
    for measure in (mixing.entropy, mixing.normalized_entropy, mixing.spectral_gap):
        _alike(measure(A * scale), measure(A))
    large = torch.full((1, 3), 3e38)
    assert mixing.entropy(large).item() == pytest.approx(math.log(3))
    assert mixing.entropy(torch.full((1, 3), 1e-45)).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("size", [1e20, 1e37, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_size_have_one_winner_or_a_tie(size: float, dtype: torch.dtype) -> None:
    q = torch.tensor([[1.0], [0.0]], dtype=dtype).view(1, 1, 2, 1) * size
    k = torch.tensor([1.0, 0.5, -1.0], dtype=dtype).view(1, 1, 3, 1) * size
    rows = mixing.row_statistics(q, k, scale=1.0)
    assert rows.entropy.flatten().tolist() == pytest.approx([0.0, math.log(3)])
    assert rows.max_logit is not None
    assert rows.max_logit.flatten().tolist() == pytest.approx([size**2, 0.0])
    assert mixing.fused_entropy(q, k, scale=1.0).flatten().tolist() == pytest.approx([0.0, math.log(3)])
    assert mixing.attention_weights(q, k, scale=1.0)[0, 0, 0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-300, 1e-30])
def test_logits_that_vanish_are_uniform(scale: float) -> None:
    found = mixing.fused_entropy(Q * scale, K * scale)
    assert torch.allclose(found, torch.full_like(found, math.log(5)))


@pytest.mark.parametrize("size", [5e-324, 1e-300, 0.7, 1e308])
def test_a_power_of_two_rounds_nothing(size: float) -> None:
    x = torch.tensor([[size, -size, 0.0]], dtype=torch.float64)
    scaled, exponent = at_size_one(x, (0, 1))
    assert 0.5 <= scaled.max() < 1
    assert torch.equal(times_power_of_two(scaled, exponent), x)


def test_where_arguments_do_not_fit_the_cause_and_every_tensor_are_said() -> None:
    with pytest.raises(InputError) as refusal:
        corpus.isoscore(torch.ones(2, 3), "wide")  # type: ignore[arg-type]
    cause = "'>' not supported between instances of 'str' and 'int'"
    assert str(refusal.value) == (
        f"isoscore: expected arguments that fit together, got values float32[2, 3]: {cause}. "
        "See help(uncollapse.measures.corpus.isoscore) for their axes."
    )


@pytest.mark.parametrize(
    ("largest", "exponent", "ordinary"),
    [
        (2.0**99, 100, True),
        (2.0**100, 100, False),
        (2.0**-99, 100, True),
        (2.0**-100, 100, False),
        (2.0**39, 40, True),
        (2.0**40, 40, False),
        (0.0, 100, True),
        (math.inf, 100, False),
        (math.nan, 100, False),
    ],
)
def test_numbers_are_ordinary_within_a_range_of_exponents(largest: float, exponent: float, ordinary: bool) -> None:
    for sign in (1, -1):
        x = torch.tensor([0.0, sign * largest], dtype=torch.float64)
        assert is_ordinary(x, exponent) is ordinary
    assert is_ordinary(torch.tensor([2.0**100], dtype=torch.float64)) is False
    assert is_ordinary(torch.zeros(0)) is True


@pytest.mark.parametrize("exponent", [-2000, -3, 0, 5, 1001, 2001])
def test_a_power_of_two_outside_of_the_range_is_taken_in_two_steps(exponent: int) -> None:
    x = torch.tensor([1.5], dtype=torch.float64) * 2.0 ** (
        -1000 if exponent > 1000 else 1000 if exponent < -1000 else 0
    )
    found = times_power_of_two(x, torch.tensor(exponent))
    assert float(found) == pytest.approx(math.ldexp(float(x), exponent), rel=0)
