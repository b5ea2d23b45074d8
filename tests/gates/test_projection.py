"""PG-OP as a module of its own: the formula, its start, its gradients, its cost, and the symmetry it breaks."""

from __future__ import annotations

import copy
import doctest
import itertools
import math
import re
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import uncollapse as uc
from uncollapse.gates import position_features
from uncollapse.gates import projection as projection_module
from uncollapse.gates.broken import gate_report
from uncollapse.gates.position_features import sinusoids
from uncollapse.gates.projection import PositionGatedProjection
from uncollapse.measures.heads import gauge_of_gates

HEADS, HEAD_WIDTH, WIDTH, TOKENS = 3, 4, 10, 6
MIXED = HEADS * HEAD_WIDTH


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projection(kind: str = "linear") -> nn.Module:
    """A projection [mixed] -> [width] in float64, every weight drawn."""
    module = (nn.Linear(MIXED, WIDTH) if kind == "linear" else Conv1D(WIDTH, MIXED)).double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=10 + number))
    return module


def output_matrix(module: nn.Module) -> np.ndarray:
    """W_O as [mixed, width]."""
    weight = module.weight.detach().numpy()
    return weight if isinstance(module, Conv1D) else weight.T


def reference(x: np.ndarray, positions: np.ndarray, gated: PositionGatedProjection) -> np.ndarray:
    """Y_i = sum_h g_h(i) O_{h,i} W_h + b, token by token and head by head. `positions` as [batch, token]."""
    W_g, b_g = gated.gate.weight.detach().numpy(), gated.gate.bias.detach().numpy()
    W_O, b_O = output_matrix(gated.projection), gated.projection.bias.detach().numpy()
    y = np.zeros((*x.shape[:2], WIDTH))
    for b, i in itertools.product(*map(range, x.shape[:2])):
        phi = feature_row(int(positions[b, i]), gated)
        for h in range(HEADS):
            g = 2 / (1 + math.exp(-(W_g[h] @ phi + b_g[h])))
            channels = slice(h * HEAD_WIDTH, (h + 1) * HEAD_WIDTH)
            y[b, i] += g * x[b, i, channels] @ W_O[channels]
    return y + b_O


def feature_row(position: int, gated: PositionGatedProjection) -> np.ndarray:
    if gated.table is not None:
        return gated.table.detach().numpy()[position]
    width = gated.position_width
    angles = [position / 10000 ** (2 * (k // 2) / width) for k in range(width)]
    return np.array([math.cos(a) if k % 2 else math.sin(a) for k, a in enumerate(angles)])


def test_the_examples_run() -> None:
    assert doctest.testmod(projection_module, extraglobs={"torch": torch}).failed == 0
    assert doctest.testmod(position_features, extraglobs={"torch": torch}).failed == 0


# The formula ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("features", ["sinusoidal", "learned"])
@pytest.mark.parametrize("given", ["none", "token", "batch token"])
def test_the_output_is_the_formula(kind: str, features: str, given: str) -> None:
    gated = PositionGatedProjection(
        projection(kind), HEADS, positions=features, position_width=5, max_positions=40, perturbation=1.0
    )
    x = drawn(2, TOKENS, MIXED)
    positions = {
        "none": torch.arange(TOKENS).expand(2, -1),
        "token": torch.tensor([3, 0, 0, 39, 7, 2]).expand(2, -1),
        "batch token": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 39]]),
    }[given]
    told = {"none": None, "token": positions[0], "batch token": positions}[given]
    expected = reference(x.numpy(), positions.numpy(), gated)
    with torch.no_grad():
        np.testing.assert_allclose(gated(x, told).numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gated(x.requires_grad_(), told).detach().numpy(), expected, rtol=0, atol=1e-12)
    assert gated.gates(positions).shape == (2, TOKENS, HEADS)
    assert gated.gates(positions).std() > 0.1  # the gates matter


def test_further_axes_go_before_the_tokens() -> None:
    gated = PositionGatedProjection(projection(), HEADS, perturbation=1.0)
    x = drawn(2, 5, TOKENS, MIXED)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4]])
    torch.testing.assert_close(gated(x, positions)[:, 3], gated(x[:, 3], positions), rtol=0, atol=1e-12)
    torch.testing.assert_close(gated(x)[1, 2], gated(x[1, 2]), rtol=0, atol=1e-12)


def test_the_models_own_table_is_used_from_the_row_of_position_0_on() -> None:
    table = nn.Embedding(9, 5, padding_idx=1).double()
    gated = PositionGatedProjection(projection(), HEADS, positions=table, perturbation=1.0)
    W, b = gated.gate.weight, gated.gate.bias
    expected = 2 * torch.sigmoid(table.weight[[2, 5]] @ W.T + b)
    torch.testing.assert_close(gated.gates(torch.tensor([0, 3])), expected, rtol=0, atol=1e-12)
    assert gated.max_positions == 7


def test_sinusoids_are_right_at_a_million() -> None:
    width, positions = 32, [0, 1, 511, 65_537, 1_000_000]
    got = sinusoids(torch.tensor(positions), width)
    with mpmath.workdps(50):
        for i, row in zip(positions, got, strict=True):
            for k, value in enumerate(row):
                angle = i / mpmath.mpf(10000) ** (mpmath.mpf(k - k % 2) / width)
                assert abs((mpmath.cos if k % 2 else mpmath.sin)(angle) - float(value)) < 1e-9


# The start -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", ["sinusoidal", "learned"])
def test_it_starts_as_the_plain_projection_bit_for_bit(dtype: torch.dtype, features: str) -> None:
    plain = projection().to(dtype)
    gated = PositionGatedProjection(plain, HEADS, positions=features)
    x = drawn(3, TOKENS, MIXED).to(dtype)
    x[0, 0, :3] = torch.tensor([-0.0, math.inf, math.nan])
    expected = plain(x)
    for got in (gated(x), gated(x, torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4], [7, 8, 9, 3, 2, 1]]))):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert bool((gated.gates(torch.arange(500)) == 1).all())


def test_it_draws_nothing_from_the_global_generator_and_the_same_from_the_same_seed() -> None:
    plain = projection()
    before = torch.get_rng_state()
    one, two, other = (
        PositionGatedProjection(plain, HEADS, positions="learned", perturbation=0.5, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.gate.weight, two.gate.weight)
    assert torch.equal(one.table, two.table)
    assert not torch.equal(one.gate.weight, other.gate.weight)


def test_the_perturbation_is_a_standard_deviation() -> None:
    gated = PositionGatedProjection(nn.Linear(512, 512), 64, position_width=400, perturbation=0.25)
    assert float(gated.gate.weight.detach().std()) == pytest.approx(0.25, rel=0.02)


def test_it_stands_where_its_projection_stands() -> None:
    plain = nn.Linear(MIXED, WIDTH, dtype=torch.bfloat16).eval()
    gated = PositionGatedProjection(plain, HEADS, positions="learned")
    assert {p.dtype for p in gated.parameters()} == {torch.bfloat16}
    assert not gated.training
    assert gated.weight is plain.weight
    assert gated.bias is plain.bias


# Gradients -----------------------------------------------------------------------------------------------------------
def test_gradients_at_the_start_differ_by_head() -> None:
    """dL/dz_h = g (1 - g/2) sum_i <dO_h,i, O_h,i>, and g = 1."""
    gated = PositionGatedProjection(projection(), HEADS)
    x, dy = drawn(2, TOKENS, MIXED), drawn(2, TOKENS, WIDTH, seed=1)
    gated(x).backward(dy)
    contributions = x.numpy() * (dy.numpy() @ output_matrix(gated.projection).T)
    expected = contributions.reshape(2 * TOKENS, HEADS, HEAD_WIDTH).sum((0, 2)) / 2
    np.testing.assert_allclose(gated.gate.bias.grad.numpy(), expected, rtol=1e-10)
    assert len({round(float(v), 6) for v in gated.gate.bias.grad}) == HEADS
    assert not torch.allclose(gated.gate.weight.grad[0], gated.gate.weight.grad[1])


@pytest.mark.parametrize("shape", [(1, TOKENS, HEADS), (2, TOKENS, HEADS), (TOKENS, 1, HEADS)], ids=str)
def test_first_and_second_derivatives_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    x = drawn(TOKENS if shape[1] == 1 else 2, 2 if shape[1] == 1 else TOKENS, MIXED).requires_grad_()
    z = drawn(*shape, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(projection_module._Gated.apply, (x, z))
    assert torch.autograd.gradgradcheck(projection_module._Gated.apply, (x, z))


def test_a_closed_gate_gives_finite_gradients() -> None:
    z = torch.full((1, TOKENS, HEADS), -2000.0, dtype=torch.float64, requires_grad=True)
    x = drawn(2, TOKENS, MIXED).requires_grad_()
    y = projection_module._Gated.apply(x, z)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    assert not z.grad.any()


def test_functional_gradients_are_those_of_a_backward_pass() -> None:
    gated = PositionGatedProjection(projection(), HEADS, perturbation=1.0)
    x = drawn(2, TOKENS, MIXED)
    gated(x).square().sum().backward()
    parameters = {n: p.detach() for n, p in gated.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(gated, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters, x)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for name, parameter in gated.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-9, atol=1e-9)


def test_the_backward_pass_keeps_one_tensor_of_the_inputs_size() -> None:
    gated = PositionGatedProjection(projection(), HEADS, perturbation=1.0)
    x = drawn(2, TOKENS, MIXED).requires_grad_()
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel() == x.numel():
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        gated(x)
    assert len(kept) == 1
    assert x.data_ptr() not in kept


def test_under_autocast_gates_are_single_and_the_product_is_half() -> None:
    gated = PositionGatedProjection(projection().float(), HEADS, perturbation=1.0)
    positions = torch.arange(TOKENS)
    x = drawn(2, TOKENS, MIXED).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = gated.gates(positions)
        got = gated(x.bfloat16())
    assert torch.equal(gates, gated.gates(positions))
    assert got.dtype == torch.bfloat16
    expected = reference(x.numpy(), np.arange(TOKENS)[None].repeat(2, 0), gated)
    assert np.abs(got.detach().float().numpy() - expected).max() < 2**-6 * np.abs(expected).max()


# Cost ----------------------------------------------------------------------------------------------------------------
def test_the_overhead_is_one_over_the_head_width() -> None:
    gated = PositionGatedProjection(nn.Linear(768, 768), 12, position_width=768)
    assert gated.overhead == (768 + 1) * 12 / ((768 + 1) * 768) == 1 / 64


@pytest.mark.parametrize(
    ("mixed", "width", "heads"), [(768, 768, 12), (504, 504, 8), (384, 384, 12), (32, 32, 4), (4096, 1024, 64)]
)
@pytest.mark.parametrize("features", ["sinusoidal", "learned"])
def test_by_default_it_is_the_widest_below_the_bar(mixed: int, width: int, heads: int, features: str) -> None:
    plain = nn.Linear(mixed, width)
    gated = PositionGatedProjection(plain, heads, positions=features, max_positions=128)
    own = sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in plain.parameters())
    assert gated.overhead == own / (mixed * width + width)
    more = own + heads + (128 if features == "learned" else 0)
    too_wide = gated.position_width == width or more / (mixed * width + width) >= 0.016
    assert too_wide
    assert gated.overhead < 0.016 or gated.position_width == 1


# State ---------------------------------------------------------------------------------------------------------------
def test_the_projections_weights_keep_their_names(tmp_path: Path) -> None:
    plain = projection()
    gated = PositionGatedProjection(plain, HEADS, positions="learned", perturbation=1.0)
    assert set(gated.state_dict()) == {"weight", "bias", "gate.weight", "gate.bias", "table"}
    assert gated.state_dict()["weight"].data_ptr() == plain.weight.data_ptr()
    other = PositionGatedProjection(nn.Linear(MIXED, WIDTH).double(), HEADS, positions="learned")
    other.load_state_dict(gated.state_dict(), strict=True)
    x = drawn(2, TOKENS, MIXED)
    assert torch.equal(other(x), gated(x))
    with pytest.raises(RuntimeError, match="gate"):
        other.load_state_dict(plain.state_dict(), strict=True)

    around, again = (
        nn.Sequential(gated),
        nn.Sequential(PositionGatedProjection(projection(), HEADS, positions="learned")),
    )
    save_model(around, str(tmp_path / "m.safetensors"))
    load_model(again, str(tmp_path / "m.safetensors"), strict=True)
    assert torch.equal(again(x), gated(x))
    again = nn.Sequential(PositionGatedProjection(nn.Linear(MIXED, WIDTH, device="meta"), HEADS, positions="learned"))
    again.load_state_dict(around.state_dict(), strict=True, assign=True)
    assert torch.equal(again(x), gated(x))
    assert torch.equal(copy.deepcopy(gated)(x), gated(x))


def test_a_shared_table_is_no_part_of_it_but_is_trained() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(20, 6).double()})
    model["gated"] = PositionGatedProjection(projection(), HEADS, positions=model["table"], perturbation=1.0)
    assert sorted(model.state_dict()) == [
        "gated.bias",
        "gated.gate.bias",
        "gated.gate.weight",
        "gated.weight",
        "table.weight",
    ]
    assert model["gated"].overhead == (6 + 1) * HEADS / (MIXED * WIDTH + WIDTH)
    model["gated"](drawn(1, TOKENS, MIXED)).sum().backward()
    assert model["table"].weight.grad[:TOKENS].abs().sum(-1).min() > 0
    copied = copy.deepcopy(model)
    copied["table"].weight.data.zero_()
    assert torch.equal(copied["gated"].gates(torch.arange(5))[0], copied["gated"].gates(torch.arange(5))[4])


# What it refuses -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "a multiple of heads = 5"),
        ({"heads": 0}, "a multiple of heads = 0"),
        ({"positions": "sinusoid"}, "Check the spelling"),
        ({"positions": nn.Embedding(8, 6), "position_width": 5}, "the width of the table"),
        ({"position_width": 0}, "position_width and max_positions from 1"),
        ({"positions": "learned", "max_positions": 0}, "max_positions from 1"),
        ({"perturbation": -1.0}, "perturbation from 0"),
        ({"projection": nn.LayerNorm(4)}, "in_features and out_features"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(uc.InputError, match=message):
        PositionGatedProjection(**{"projection": projection(), "heads": HEADS, **arguments})


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((2, TOKENS, MIXED + 1), None, "3 heads x 4"),
        ((MIXED,), None, "3 heads x 4"),
        ((2, TOKENS, MIXED), torch.arange(TOKENS + 1), "integer positions from 0"),
        ((2, TOKENS, MIXED), torch.zeros(3, TOKENS, dtype=torch.long), "integer positions from 0"),
        ((2, TOKENS, MIXED), torch.arange(TOKENS) - 1, "integer positions from 0"),
        ((2, TOKENS, MIXED), torch.arange(TOKENS) * 1.0, "integer positions from 0"),
        ((2, TOKENS, MIXED), torch.full((TOKENS,), 8), "positions below 8, got position 8"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...], positions: Tensor | None, message: str) -> None:
    gated = PositionGatedProjection(projection(), HEADS, positions="learned", max_positions=8)
    with pytest.raises(uc.InputError, match=message):
        gated(drawn(*shape), positions)


# The symmetry --------------------------------------------------------------------------------------------------------
def mixed_by(module: nn.Module, M: Tensor) -> nn.Module:
    """The same projection for heads mixed by M: W_O -> M^-1 W_O."""
    moved = copy.deepcopy(module)
    inner = moved.projection if isinstance(moved, PositionGatedProjection) else moved
    with torch.no_grad():
        inner.weight.copy_((torch.linalg.inv(M) @ inner.weight.T).T)
    return moved


def mixing(blocks: list[list[int]]) -> Tensor:
    """An invertible M with free blocks between the heads of one class, zeros elsewhere."""
    free = torch.zeros(HEADS, HEADS, dtype=torch.float64)
    for members in blocks:
        for h, k in itertools.product(members, members):
            free[h, k] = 1
    whole = torch.kron(free, torch.ones(HEAD_WIDTH, HEAD_WIDTH))
    return torch.eye(MIXED, dtype=torch.float64) + 0.3 * drawn(MIXED, MIXED, seed=7) * whole


@pytest.mark.parametrize(
    ("profiles", "classes"),
    [([0, 1, 2], [[0], [1], [2]]), ([0, 1, 0], [[0, 2], [1]]), ([0, 0, 0], [[0, 1, 2]])],
)
def test_a_mixing_is_hidden_from_the_plain_projection_and_from_gates_it_commutes_with(
    profiles: list[int], classes: list[list[int]]
) -> None:
    plain = nn.Linear(MIXED, MIXED).double()  # full row rank
    gated = PositionGatedProjection(plain, HEADS, perturbation=1.0)
    with torch.no_grad():  # heads with one profile up to a factor would need other weights: here they share it
        for parameter in gated.gate.parameters():
            parameter.copy_(parameter[profiles])
    x = drawn(2, TOKENS, MIXED)

    def gap(module: nn.Module, M: Tensor) -> float:
        return float((mixed_by(module, M)(x @ M) - module(x)).detach().abs().max())

    any_mixing, commuting = mixing([[0, 1, 2]]), mixing(classes)
    assert gap(plain, any_mixing) < 1e-12
    assert gap(gated, commuting) < 1e-12
    assert (gap(gated, any_mixing) > 1e-2) == (len(classes) > 1)

    gates = gated.gates(torch.arange(TOKENS)).detach()
    assert (
        gauge_of_gates(gates, HEAD_WIDTH)
        == hidden_directions(gates.numpy())
        == sum((len(c) * HEAD_WIDTH) ** 2 for c in classes)
    )
    (entry,) = gate_report(gated, positions=TOKENS)
    assert entry.surviving_dimension == gauge_of_gates(gates, HEAD_WIDTH)
    assert entry.plain_dimension == MIXED**2
    assert entry.rank == np.linalg.matrix_rank(gates.numpy())
    assert entry.full_row_rank
    assert (entry.smallest, entry.largest) == (float(gates.min()), float(gates.max()))


def hidden_directions(gates: np.ndarray) -> int:
    """The dimension of {M : M commutes with every diag(g(i)/g(0))}, by the rank of the linear equations."""
    full = np.repeat(gates / gates[0], HEAD_WIDTH, 1)
    equations = [np.kron(np.diag(d), np.eye(MIXED)) - np.kron(np.eye(MIXED), np.diag(d)) for d in full]
    return MIXED**2 - np.linalg.matrix_rank(np.concatenate(equations))


def test_the_report_says_where_the_count_is_only_a_bound() -> None:
    entries = gate_report(
        nn.Sequential(PositionGatedProjection(nn.Linear(8, 6), 2), PositionGatedProjection(nn.Linear(6, 6), 2))
    )
    assert [(e.full_row_rank, e.rank, e.surviving_dimension) for e in entries] == [(False, 1, 64), (True, 1, 36)]
    assert all(math.isinf(e.condition) for e in entries)
    with pytest.raises(uc.InputError, match="a model with position gates"):
        gate_report(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("gates", "count"),
    [
        ([[1.0, 1.0, 1.0]], 9),  # one position
        ([[1.0, 2.0, 0.5], [1.0, 2.0, 0.5]], 9),  # constant in position
        ([[1.0, 1.0, 1.0], [0.5, 1.0, 1.5]], 3),
        ([[1.0, 2.0, 1.0], [0.5, 1.0, 1.5]], 5),
    ],
)
def test_surviving_directions_in_closed_form(gates: list[list[float]], count: int) -> None:
    G = torch.tensor(gates)
    assert gauge_of_gates(G, 1) == count
    assert gauge_of_gates(G, 8) == 64 * count
    assert gauge_of_gates(3 * G[:, [2, 0, 1]] * torch.tensor([1.0, 5.0, 0.1]), 1) == count
    assert gauge_of_gates(G.flip(0) * 0.1, 1) == count


def test_classes_are_chains_of_pairs_within_the_tolerance() -> None:
    angles = torch.linspace(0.3, 0.9, 7, dtype=torch.float64)  # neighbours 0.1 apart
    G = torch.stack([angles.cos(), angles.sin()])
    assert gauge_of_gates(G, 1, tol=0.11) == 49
    assert gauge_of_gates(G, 1, tol=0.09) == 7


@pytest.mark.parametrize("gates", [torch.zeros(2, 3), torch.tensor([[1.0, math.nan]]), torch.ones(3)])
def test_gates_that_are_none_are_refused(gates: Tensor) -> None:
    with pytest.raises(uc.InputError, match=r"positive gates\[position, head\]"):
        gauge_of_gates(gates, 2)


def test_the_page_runs_top_to_bottom() -> None:
    page = Path(__file__).parents[2] / "docs" / "pg-op.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize(
    "options",
    [
        {"position_width": 1.5},
        {"seed": 2**70},
        {"seed": 0.5},
        {"max_positions": 2.0, "positions": "learned"},
        {"heads": 2.0},
    ],
)
def test_numbers_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(uc.InputError, match=r"^PositionGatedProjection: expected"):
        uc.PositionGatedProjection(nn.Linear(4, 3), **{"heads": 2, **options})


def test_another_number_format_than_the_projection_s_is_refused_outside_autocast() -> None:
    gated = uc.PositionGatedProjection(nn.Linear(4, 3), 2)
    with pytest.raises(uc.InputError, match="expected x in float32, as the projection, got float64"):
        gated(torch.randn(1, 2, 4).double())
    with torch.autocast("cpu"):
        assert gated(torch.randn(1, 2, 4).bfloat16()).dtype == torch.bfloat16
