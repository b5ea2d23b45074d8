"""Figures of an output projection: counts against ranks of the maps they count, values against closed forms."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import heads as reference
from uncollapse.errors import InputError
from uncollapse.measures import heads, random_projections

HEADS, HEAD_WIDTH, WIDTH = 4, 3, 16
MIXED = HEADS * HEAD_WIDTH


def projection(mixed=MIXED, width=WIDTH, dtype=torch.float64):
    return torch.randn(mixed, width, dtype=torch.float64).to(dtype)


def gauge(W, outputs, head_count=HEADS):
    """The same function with every head's channels in another basis."""
    blocks = W.view(head_count, -1, W.shape[1])
    size = blocks.shape[1]
    M = torch.randn(head_count, size, size, dtype=W.dtype) + 2 * torch.eye(size, dtype=W.dtype)
    moved = outputs.unflatten(-1, (head_count, size)).transpose(-2, -3) @ M
    return torch.linalg.solve(M, blocks).flatten(0, 1), moved.transpose(-2, -3).flatten(-2)


def close(found, expected, tolerance):
    found = found.double().numpy() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("module", [heads, random_projections])
def test_documented_examples(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


# Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_count", "head_width", "tokens"), [(1, 3, 2), (3, 2, 4), (4, 1, 1)])
def test_the_sum_of_the_heads_has_the_kernel_of_the_papers_count(head_count, head_width, tokens):
    one_head = np.eye(tokens * head_width)
    sum_of_heads = np.hstack([one_head] * head_count)
    kernel = sum_of_heads.shape[1] - np.linalg.matrix_rank(sum_of_heads)
    assert heads.ambiguous_degrees_of_freedom(head_count, head_width, tokens) == kernel


@pytest.mark.parametrize(("mixed", "width", "rank"), [(6, 8, 6), (6, 6, 4), (8, 5, 5), (8, 5, 3), (6, 6, 0)])
def test_the_kernel_of_the_projection_acting_on_head_outputs(mixed, width, rank):
    W = projection(mixed, rank) @ projection(rank, width) if rank else torch.zeros(mixed, width)
    tokens = 3
    acting = np.kron(np.eye(tokens), W.T.numpy())  # on the head outputs, row by row
    kernel = acting.shape[1] - np.linalg.matrix_rank(acting)
    assert heads.kernel_dimension(W, tokens) == kernel == tokens * (mixed - rank)


def test_contributions_are_ambiguous_only_between_heads():
    W = projection(6, 8)
    assert heads.contribution_ambiguity(W, 3, tokens=5) == 0
    W[2:4] = W[2:3]  # a head of rank one: its output is ambiguous, its contribution is not
    assert (heads.kernel_dimension(W), heads.contribution_ambiguity(W, 3)) == (1, 0)
    W[4] = W[0] + W[1]  # one direction shared by two heads
    assert (heads.kernel_dimension(W), heads.contribution_ambiguity(W, 3, tokens=5)) == (2, 5)


@pytest.mark.parametrize(("tokens", "mixed", "width"), [(5, 3, 4), (2, 4, 3), (4, 3, 2), (2, 3, 5)])
def test_the_fibre_of_the_product_of_head_outputs_and_projection(tokens, mixed, width):
    O, W = projection(tokens, mixed), projection(mixed, width)
    by_O, by_W = np.kron(np.eye(tokens), W.T.numpy()), np.kron(O.numpy(), np.eye(width))
    jacobian = np.hstack([by_O, by_W])
    expected = jacobian.shape[1] - np.linalg.matrix_rank(jacobian)
    assert heads.factorization_ambiguity(tokens, mixed, width) == expected


def layer(head_count, groups, head_width, width=5, **also):
    shapes = {
        "W_Q": (head_count, width, head_width),
        "W_K": (groups, width, head_width),
        "W_V": (groups, width, head_width),
        "W_O": (head_count, head_width, width),
        "b_Q": (head_count, head_width),
        "b_K": (groups, head_width),
        "b_V": (groups, head_width),
        "b_O": (width,),
        "gain_Q": (head_width,),
        "gain_K": (head_width,),
    }
    wanted = ["W_Q", "W_K", "W_V", "W_O", *(name for name, on in also.items() if on)]
    return {name: torch.randn(shapes[name], dtype=torch.float64) for name in wanted}


@pytest.mark.parametrize(("head_count", "groups"), [(2, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize(("value_bias", "output_bias"), [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("query_key_bias", [False, True])
def test_nothing_but_the_gauge_leaves_a_layers_function_alone(
    head_count, groups, value_bias, output_bias, query_key_bias
):
    p = layer(head_count, groups, 2, b_V=value_bias, b_O=output_bias, b_Q=query_key_bias, b_K=query_key_bias)
    sequences = torch.randn(8, 6, 5, dtype=torch.float64)

    def function(p):
        return torch.stack([reference.attention(p, x, head_count, groups) for x in sequences])

    expected = heads.gauge_dimension(groups, 2, value_bias=value_bias, output_bias=output_bias)
    expected += heads.query_key_gauge_dimension(head_count, groups, 2, bias=query_key_bias)
    assert reference.nullity(function, p) == expected


@pytest.mark.parametrize(("head_count", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("rotary_width", [0, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_query_key_gauge_is_the_kernel_of_the_logits_derivative(head_count, groups, rotary_width, bias, norm):
    p = layer(head_count, groups, 4, b_Q=bias, b_K=bias, gain_Q=norm, gain_K=norm)
    p = {name: p[name] for name in p if name not in {"W_V", "W_O"}}
    sequences = torch.randn(4, 7, 5, dtype=torch.float64)

    def function(p):  # what a softmax sees: logits up to a constant of the row
        scores = torch.stack([reference.logits(p, x, head_count, groups, rotary_width) for x in sequences])
        return scores - scores.mean(-1, keepdim=True)

    expected = heads.query_key_gauge_dimension(head_count, groups, 4, bias=bias, rotary_width=rotary_width, norm=norm)
    assert reference.nullity(function, p) == expected


def test_the_counts_of_the_theory():
    assert heads.query_key_gauge_dimension(8, 4, 16) == 4 * 16**2
    assert heads.query_key_gauge_dimension(8, 4, 16, bias=True) == 4 * 16**2 + 4 * 16
    assert heads.query_key_gauge_dimension(8, 4, 16, bias=True, rotary_width=16) == 4 * 16
    assert heads.query_key_gauge_dimension(8, 4, 16, norm=True) == 8 + 4 + 16
    assert heads.query_key_gauge_dimension(8, 4, 16, norm=True, rotary_width=16) == 8 + 4 + 8


# Write spaces ---------------------------------------------------------------------------------------------------------


def test_overlap_and_angles_of_spaces_with_known_angles():
    angles = torch.tensor([1e-9, 0.3, math.pi / 2 - 1e-9], dtype=torch.float64)
    first = torch.eye(3, 8, dtype=torch.float64)
    second = torch.zeros(3, 8, dtype=torch.float64)
    for i, angle in enumerate(angles):
        second[i, i], second[i, i + 3] = angle.cos(), angle.sin()
    turn, _ = torch.linalg.qr(projection(8, 8))
    mix = projection(3, 3)
    W = torch.cat([5 * first, mix @ second]) @ turn
    found = heads.principal_angles(W, 2)
    np.testing.assert_allclose(found[0, 1].numpy(), angles.numpy(), rtol=1e-6)  # the small one too, relatively
    assert math.pi / 2 - float(found[0, 1, 2]) == pytest.approx(1e-9, rel=1e-5)
    assert torch.equal(found[0, 1], found[1, 0])
    close(found[0, 0], np.zeros(3), 1e-14)
    share = float(angles.cos().square().mean())
    close(heads.write_space_overlap(W, 2), [[1, share], [share, 1]], 1e-12)


def test_overlap_is_the_mean_squared_cosine_for_every_pair():
    W = projection()
    W[3:6, :] = W[0:3] + 0.1 * W[3:6]
    blocks = [np.linalg.qr(b.T)[0] for b in W.view(HEADS, HEAD_WIDTH, WIDTH).numpy()]
    expected = [[np.mean(np.linalg.svd(a.T @ b, compute_uv=False) ** 2) for b in blocks] for a in blocks]
    close(heads.write_space_overlap(W, HEADS), expected, 1e-12)
    close(heads.principal_angles(W, HEADS).cos().square().mean(-1), expected, 1e-12)


def test_a_contained_space_overlaps_fully_and_an_empty_one_with_nothing():
    W = projection(6, 8)
    W[2:4] = W[0:1]  # a line inside the first head's plane
    W[4:6] = 0
    overlap, angles = heads.write_space_overlap(W, 3), heads.principal_angles(W, 3)
    close(overlap[:2, :2], [[1, 1], [1, 1]], 1e-12)
    assert overlap[2].isnan().all()
    assert overlap[:, 2].isnan().all()
    close(angles[0, 1], [0, math.nan], 1e-7)
    assert angles[2].isnan().all()


@pytest.mark.parametrize("angle", [0.01, 0.5, 1.2])
def test_conditioning_of_two_lines(angle):
    W = torch.tensor([[3.0, 0.0, 0.0], [math.cos(angle), 0.0, math.sin(angle)]], dtype=torch.float64)
    expected = math.sqrt((1 + math.cos(angle)) / (1 - math.cos(angle)))
    assert heads.conditioning(W, 2) == pytest.approx(expected, rel=1e-9)


def test_conditioning_at_its_extremes():
    turn, _ = torch.linalg.qr(projection(WIDTH, WIDTH))
    scaled = torch.cat([projection(3, 3) @ turn[3 * h : 3 * h + 3] for h in range(4)])
    assert heads.conditioning(scaled, 4) == pytest.approx(1)  # whatever each head does inside its own space
    assert heads.conditioning(projection(20, 16), 4) == math.inf  # more directions than the stream has
    assert heads.conditioning(torch.zeros(4, 4), 2) == math.inf
    # a head that writes nothing leaves the others as they are
    scaled[:3] = 0
    assert heads.conditioning(scaled, 4) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_hides_is_not_counted_as_rank(dtype):
    W = projection(24, 64)
    W[6:12] = W[0:6]
    W[12:15] = W[0:3] + W[18:21]
    W[15:18] = 0.3 * W[12:15]
    W = (W / 3).to(dtype)  # rank 6 + 6, noisy where sums were rounded
    assert heads.kernel_dimension(W) == 24 - 12
    assert heads.contribution_ambiguity(W, 4) == 6 + 6 + 3 + 6 - 12
    assert heads.conditioning(W, 4) == math.inf
    assert heads.write_space_overlap(W, 4)[0, 1] == pytest.approx(1)
    assert heads.principal_angles(W, 4)[2].isfinite().sum(-1).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_the_same_numbers_have_the_same_figures_in_every_format(stored):
    """A sum rounded to half precision is full rank: these numbers are what the model computes with, in any format."""
    W = projection(24, 64)
    W[6:12] = W[0:6]
    W[12:15] = W[0:3] + W[18:21]
    W = (W / 3).to(stored)
    figures = [heads.kernel_dimension, lambda w: heads.contribution_ambiguity(w, 4), lambda w: heads.conditioning(w, 4)]
    for other in (torch.float32, torch.float64):
        assert [figure(W) for figure in figures] == [figure(W.to(other)) for figure in figures]
        assert heads.head_noise_gain(W, 4).tolist() == heads.head_noise_gain(W.to(other), 4).tolist()
    assert heads.kernel_dimension(W) == (6 if stored != torch.float32 else 9)  # copies are exact, the sums are not


def test_numbers_that_need_float64_are_judged_by_its_rounding():
    W = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0**-34], dtype=torch.float64))
    assert heads.kernel_dimension(W) == heads.kernel_dimension(W.float()) == 1
    W[0, 0] += 2.0**-40  # no float32 holds this
    assert heads.kernel_dimension(W) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), head_count=st.sampled_from([1, 2, 4]), head_width=st.integers(1, 4))
def test_figures_do_not_depend_on_the_models_own_gauge(seed, head_count, head_width):
    torch.manual_seed(seed)
    mixed = head_count * head_width
    W, O = projection(mixed, mixed + 1), torch.randn(2, 7, mixed, dtype=torch.float64)
    if seed % 2 and head_count > 1:
        W[-1] = W[0]  # a shared direction
    moved, outputs = gauge(W, O, head_count)
    close(outputs @ moved, (O @ W).numpy(), 1e-8)  # it is a gauge
    assert heads.kernel_dimension(moved) == heads.kernel_dimension(W)
    assert heads.contribution_ambiguity(moved, head_count) == heads.contribution_ambiguity(W, head_count)
    close(heads.write_space_overlap(moved, head_count), heads.write_space_overlap(W, head_count).numpy(), 1e-8)
    close(heads.principal_angles(moved, head_count), heads.principal_angles(W, head_count).numpy(), 1e-6)
    conditioning = heads.conditioning(W, head_count)
    assert heads.conditioning(moved, head_count) == pytest.approx(conditioning, rel=1e-4) or conditioning > 1e8
    gains = heads.head_noise_gain(W, head_count)
    assert conditioning > 1e8 or torch.allclose(heads.head_noise_gain(moved, head_count), gains, rtol=1e-4)
    close(
        heads.contribution_energy(outputs, moved, head_count),
        heads.contribution_energy(O, W, head_count).numpy(),
        1e-8,
    )
    # the condition number of the projection itself would move
    order = torch.randperm(head_count)
    permuted = W.view(head_count, head_width, -1)[order].flatten(0, 1)
    close(
        heads.write_space_overlap(permuted, head_count),
        heads.write_space_overlap(W, head_count)[order][:, order].numpy(),
        1e-9,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_angle_is_the_first_of_all(dtype):
    for mixed, width in ((12, 16), (12, 6), (12, 40)):
        W = projection(mixed, width).to(dtype)
        W[3:6] = W[0:3] + 1e-5 * W[3:6]
        W[9:12] = 0
        found = heads.smallest_principal_angle(W, 4)
        close(found, heads.principal_angles(W, 4)[..., 0].numpy(), 1e-14)
        assert found[3].isnan().all()
        assert found[0, 1] < 1e-4


def test_a_small_angle_keeps_its_digits():
    W = torch.tensor([[1.0, 0.0], [math.cos(1e-9), math.sin(1e-9)]], dtype=torch.float64)
    assert heads.smallest_principal_angle(W, 2)[0, 1] == pytest.approx(1e-9, rel=1e-6)


def test_a_heads_noise_gain_is_the_norm_of_the_map_that_reads_it_off():
    W = projection(12, 16)
    W[3:6] = W[0:3] + 0.05 * W[3:6]
    blocks = W.view(4, 3, 16).numpy()
    bases = [np.linalg.qr(block.T)[0].T for block in blocks]
    reading = np.linalg.pinv(np.vstack(bases))  # from the output to the coordinates of all heads
    expected = [np.linalg.norm(reading[:, 3 * h : 3 * h + 3], 2) for h in range(4)]
    close(heads.head_noise_gain(W, 4), expected, 1e-9)
    assert expected[1] > 4 * expected[3]
    assert max(expected) <= heads.conditioning(W, 4)
    # it really is what noise along the worst direction becomes
    worst = np.linalg.svd(reading[:, 3:6])[0][:, 0]
    assert np.linalg.norm(worst @ reading[:, 3:6]) == pytest.approx(expected[1])


@pytest.mark.parametrize("angle", [1e-3, 0.5, math.pi / 2])
def test_noise_gain_of_two_lines_and_a_bystander(angle):
    W = torch.tensor([[3.0, 0.0, 0.0], [math.cos(angle), math.sin(angle), 0.0], [0.0, 0.0, 0.2]], dtype=torch.float64)
    close(heads.head_noise_gain(W, 3), [1 / math.sin(angle), 1 / math.sin(angle), 1], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_that_cannot_be_told_apart_leave_the_others_their_gain(dtype):
    W = projection(16, 64)
    W[4:8] = projection(4, 4) @ W[0:4]
    found = heads.head_noise_gain((W / 3).to(dtype), 4)
    assert found[:2].tolist() == [math.inf, math.inf]
    close(found[2:], heads.head_noise_gain(W[4:], 3)[1:].numpy(), 0.05)
    assert heads.head_noise_gain(projection(20, 16).to(dtype), 4).tolist() == [math.inf] * 4  # wider than the stream
    W[8:12] = 0
    assert heads.head_noise_gain(W.to(dtype), 4)[2] == 0
    assert heads.head_noise_gain(torch.zeros(4, 4, dtype=dtype), 2).tolist() == [0, 0]


# Energies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_energies_are_those_of_the_contributions_written_out(dtype, side):
    W, O = projection(dtype=dtype), torch.randn(2, 3, 7, MIXED, dtype=torch.float64).to(dtype) + 3
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    if side != "none":
        mask[1, 2, : 3 if side == "left" else 7] = False
        mask[1, 2, 2 if side == "right" else 6] = True
        mask[0, 1, -2 if side == "right" else 0] = False
    dirty = O.masked_fill(~mask[..., None], math.nan)
    found = heads.contribution_energy(dirty, W, HEADS, mask)
    shares = heads.energy_share(dirty, W, HEADS, mask)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b, c in np.ndindex(2, 3):
        real = O[b, c][mask[b, c]].double().numpy()
        expected = reference.contribution_energy(real, W.double().numpy(), HEADS)
        close(found[b, c], expected, tolerance)
        if sum(expected) > 1e-9:
            close(shares[b, c], np.array(expected) / sum(expected), tolerance)
        else:
            assert shares[b, c].isnan().all()
    if side == "none":
        close(heads.contribution_energy(O, W, HEADS), found.numpy(), tolerance)
        grams = 4 * heads.write_grams(W, HEADS)  # what is passed is used
        close(heads.contribution_energy(O, W, HEADS, grams=grams), 4 * found.numpy(), tolerance)


@pytest.mark.parametrize("axes", [(), (2,), (2, 3)])
def test_energies_of_real_tokens_have_any_leading_axes(axes):
    W, O = projection(), torch.randn(*axes, 7, MIXED, dtype=torch.float64) + 3
    mask = torch.rand(*axes, 7) < 0.7
    mask[..., :2] = True
    found = heads.contribution_energy(O, W, HEADS, mask)
    for place in np.ndindex(axes):
        expected = reference.contribution_energy(O[place][mask[place]].numpy(), W.numpy(), HEADS)
        close(found[place], expected, 1e-12)


def test_energies_do_not_see_a_value_bias_nor_round_under_autocast():
    W, O = projection(dtype=torch.float32), torch.randn(7, MIXED)
    expected = heads.contribution_energy(O, W, HEADS)
    close(heads.contribution_energy(O + 10 * torch.randn(MIXED), W, HEADS), expected.numpy(), 1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads.contribution_energy(O.requires_grad_(), W.requires_grad_(), HEADS)
    close(found, expected.numpy(), 0)
    assert not found.requires_grad


def test_energies_are_never_negative():
    W = torch.randn(2, 1) * torch.randn(1, 5)  # one head that writes along a line
    along = torch.tensor([[float(W[1, 0]), -float(W[0, 0])]])  # channels whose contributions cancel
    energy = heads.contribution_energy(torch.randn(200, 7, 1) * along, W, 1)
    assert (energy >= 0).all()
    assert (energy < 1e-4).all()  # rounding of terms around 50


def test_diverged_weights_give_nan_energies():
    W = projection()
    W[0, 0] = math.nan
    found = heads.contribution_energy(torch.randn(7, MIXED), W, HEADS)
    assert found.isnan().tolist() == [True, False, False, False]


# Gates and verdict ----------------------------------------------------------------------------------------------------


def test_gates_separate_as_many_heads_as_they_have_profiles():
    generator = torch.Generator().manual_seed(1)
    profiles = torch.rand(9, 3, generator=generator, dtype=torch.float64)
    gates = profiles[:, [0, 1, 1, 2]] * torch.tensor([1.0, 1.0, 2.0, 1.0])  # the middle two are proportional
    assert heads.gate_rank(gates) == 3
    assert heads.gate_conditioning(gates) == math.inf
    assert heads.gate_rank(torch.ones(9, 4)) == 1
    assert heads.gate_rank(torch.zeros(9, 4)) == 0
    assert heads.gate_rank(profiles[:2]) == 2
    assert heads.gate_conditioning(profiles[:2]) == math.inf
    sigma = np.linalg.svd(profiles.numpy(), compute_uv=False)
    assert heads.gate_conditioning(profiles) == pytest.approx(sigma[0] / sigma[-1])
    assert heads.gate_rank(profiles, tol=float(sigma[:2].mean())) == 1
    assert heads.gate_conditioning(profiles, tol=float(sigma[1:].mean())) == math.inf


@pytest.mark.parametrize(("part", "rank"), [(0.8, 1), (1.2, 2)])
def test_gates_count_above_their_rounding_and_that_of_the_decomposition(part, rank):
    """eps ||G|| (1/sqrt m + 1/sqrt H) of the format, and max(m, H) roundings of sigma_1. Two profiles at right angles."""
    m, eps = 64, 2.0**-52
    G = torch.ones(m, 2, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(m // 2)
    first = math.sqrt(2 * m)
    cut = eps * first * (m**-0.5 + 2**-0.5) + m * eps * first
    small = part * cut / first
    G[:, 0] += small * sign
    G[:, 1] -= small * sign
    assert heads.gate_rank(G) == rank


@pytest.mark.parametrize(
    ("kernel", "gain", "verdict"),
    [
        (0, 1.0, "attributable"),
        (0, 10.0, "attributable"),
        (0, 10.1, "attributable with care (noise gain 10.1)"),
        (0, 999.4, "attributable with care (noise gain 999)"),
        (0, 1000.0, "attributable with care (noise gain 1,000)"),  # and not 1e+03
        (0, 12345.6, "attributable with care (noise gain 12,346)"),
        (0, math.inf, "not attributable (write spaces dependent to within rounding)"),
        (3, 2.0, "not attributable (kernel 3)"),
        (3, math.inf, "not attributable (kernel 3)"),
    ],
)
def test_the_verdict_in_words(kernel, gain, verdict):
    assert heads.attribution_verdict(kernel, gain) == verdict


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.kernel_dimension(torch.ones(3)), r"kernel_dimension: expected .*matrix .*, got float32\[3\]"),
        (lambda: heads.gate_rank(torch.ones(3, 2).int()), r"gate_rank: expected a floating-point .*got int32\[3, 2\]"),
        (lambda: heads.conditioning(torch.full((4, 4), math.nan), 2), r"conditioning: .*got NaN or infinity"),
        (
            lambda: heads.write_space_overlap(torch.ones(4, 6), 3),
            r"write_space_overlap: expected .*multiple of heads = 3, got float32\[4, 6\]\. .*linear\.weight\.T",
        ),
        (lambda: heads.principal_angles(torch.ones(4, 6), 0), "principal_angles: .*heads = 0"),
        (
            lambda: heads.contribution_energy(torch.ones(5, 6), torch.ones(4, 6), 2),
            r"contribution_energy: expected .*mixed = 4 .*heads = 2, got float32\[5, 6\]",
        ),
        (
            lambda: heads.contribution_energy(torch.ones(5, 4), torch.ones(4, 6), 2, torch.ones(5)),
            r"contribution_energy: expected boolean mask\[\.\.\., token\] = \[5\], got float32\[5\]",
        ),
    ],
)
def test_unusable_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


O, W, FITS = torch.ones(3, 5, 4), torch.ones(4, 6), torch.ones(2, 2, 2)
OUTPUTS = r"expected head_outputs\[\.\.\., token, mixed\] with mixed = 4"


@pytest.mark.parametrize(
    ("outputs", "heads_", "more", "message"),
    [
        (O[0, 0], 2, {}, OUTPUTS),  # one token without an axis of its own
        (O[..., :3], 2, {}, OUTPUTS),
        (O, 2, {"grams": torch.ones(2, 3, 3)}, OUTPUTS),
        (O, 2, {"grams": torch.ones(1, 4, 4)}, OUTPUTS),
        (O, 4, {"grams": FITS}, OUTPUTS),
        (O, 2, {"mask": torch.ones(3, 5)}, "expected boolean mask"),
        (O, 2, {"mask": torch.ones(5, dtype=torch.bool)}, "expected boolean mask"),
        (O.long(), 2, {}, "expected floating-point head_outputs"),
    ],
)
def test_each_single_thing_that_does_not_fit_is_refused(outputs, heads_, more, message):
    for function in (heads.contribution_energy, heads.energy_share):
        with pytest.raises(InputError, match=f"{function.__name__}: {message}"):
            function(outputs, W, heads_, **more)
        assert function(O, W, 2, grams=FITS).shape == (3, 2)


# Beside random weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size", "width"), [(8, 8, 64), (2, 32, 64), (4, 40, 160), (6, 8, 80), (3, 100, 400)])
def test_random_projections_have_the_gains_that_are_said_of_them(count, size, width):
    expected = random_projections.random_noise_gain(count, size, width)
    drawn = [heads.WriteSpaces(projection(count * size, width), count) for _ in range(100)]
    together = np.array([heads.conditioning(spaces, count) for spaces in drawn])
    single = np.array([heads.head_noise_gain(spaces, count).numpy() for spaces in drawn]).ravel()
    for gains, (low, middle, high), slack in ((together, expected.together, 0.06), (single, expected.single, 0.06)):
        assert np.mean(gains < low) <= 0.05 + slack
        assert np.mean(gains > high) <= 0.05 + slack
        if size < 100:  # the draws of the last are smaller than it
            assert abs(np.mean(gains < middle) - 0.5) < 0.2
    absolute = [heads.absolute_noise_gain(spaces, count) for spaces in drawn]
    assert all(a >= g.max() * (1 - 1e-9) for a, g in zip(absolute, single.reshape(100, -1), strict=True))


def test_where_nothing_is_drawn():
    assert random_projections.random_noise_gain(1, 8, 32) == ((1, 1, 1), (1, 1, 1))
    assert random_projections.random_noise_gain(4, 16, 32) == ((math.inf,) * 3,) * 2
    first = random_projections.random_noise_gain(4, 80, 640)
    random_projections.random_noise_gain.cache_clear()
    assert random_projections.random_noise_gain(4, 80, 640) == first  # the seed is fixed
    with pytest.raises(InputError, match=r"^random_noise_gain: expected sizes of at least 1, got heads=0"):
        random_projections.random_noise_gain(0, 8, 32)


def test_a_verdict_tells_a_gain_from_that_of_random_weights():
    random = random_projections.random_noise_gain(12, 32, 384).together
    said = [heads.attribution_verdict(0, gain, random) for gain in (44.0, 1000.0, 692799.0)]
    assert [words.split(", ")[1] for words in said] == ["better than random)", "as random)", "worse than random)"]
    assert heads.attribution_verdict(0, 2.0, random) == "attributable"


@pytest.mark.parametrize(
    "gates", [torch.ones(2, 3, dtype=torch.long), torch.ones(3), torch.ones(0, 3), torch.ones(2, 0)]
)
def test_gates_that_are_none_are_refused(gates):
    with pytest.raises(InputError, match=r"expected positive gates\[position, head\] in floating point"):
        heads.gauge_of_gates(gates, head_width=2)


def test_a_kernel_of_one_dimension_already_hides_something():
    assert heads.attribution_verdict(1, math.inf) == "not attributable (kernel 1)"
    assert heads.attribution_verdict(0, math.inf).startswith("not attributable (write spaces")
    assert heads.attribution_verdict(0, heads.CARE_GAIN) == "attributable"
    assert heads.attribution_verdict(0, heads.CARE_GAIN * 1.01).startswith("attributable with care")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("roundings", "alike"), [(30, True), (34, False)])
def test_profiles_are_proportional_up_to_sixteen_roundings(dtype, roundings, alike):
    """(1, 1) and (1 + s, 1) differ by s/2 in direction."""
    eps = torch.finfo(dtype).eps
    gates = torch.tensor([[1.0, 1 + roundings * eps], [1.0, 1.0]], dtype=dtype)
    assert heads.gauge_of_gates(gates, head_width=3) == (36 if alike else 18)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_profiles_are_alike_through_all_between_them(count):
    """Neighbours differ by 1e-3 or so in direction, the first and the last by that for each step."""
    angles = torch.linspace(0.5, 0.5 + 1e-3 * (count - 1), count, dtype=torch.float64)
    gates = torch.stack([angles.cos(), angles.sin()])
    assert heads.gauge_of_gates(gates, head_width=2, tol=1.1e-3) == (2 * count) ** 2
    assert heads.gauge_of_gates(gates, head_width=2, tol=0.9e-3) == 4 * count
    gap = torch.cat([gates[:, :1] * 0 + torch.tensor([[1.0], [9.0]]), gates], 1).double()
    assert heads.gauge_of_gates(gap, head_width=2, tol=1.1e-3) == (2 * count) ** 2 + 4


@pytest.mark.parametrize(
    ("of_outputs", "of_weights"),
    [
        (0, 0),
        (49, 0),
        (50, 0),
        (-50, 0),
        (400, 0),
        (-400, -90),
        (0, 9),
        (0, 10),
        (0, 11),
        (0, 300),
        (-400, 300),
        (90, -300),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_energies_of_any_size_are_those_of_size_one(of_outputs, of_weights, given):
    """Powers of two of outputs and weights come out squared, with and without a mask, and with the weights' own products."""
    O, W = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for real in (None, mask):
        plain = heads.contribution_energy(O, W, 3, mask=real)
        sized, weights = O * 2.0**of_outputs, W * 2.0**of_weights
        grams = heads.write_grams(weights, 3) if given else None
        found = heads.contribution_energy(sized, weights, 3, mask=real, grams=grams)
        np.testing.assert_allclose(found / 2.0 ** (2 * of_outputs) / 2.0 ** (2 * of_weights), plain, rtol=1e-12)
        shares = heads.energy_share(sized, weights, 3, mask=real, grams=grams)
        np.testing.assert_allclose(shares, plain / plain.sum(-1, keepdim=True), rtol=1e-12)


def test_nothing_is_biased_unless_it_is_said():
    """A value bias alone would be free in the directions that a narrow stream leaves over."""
    assert heads.gauge_dimension(2, 64, width=100) == heads.gauge_dimension(2, 64) == 2 * 64**2
    assert heads.gauge_dimension(2, 64, width=100, value_bias=True) == 2 * 64**2 + 28
    assert heads.query_key_gauge_dimension(4, 2, 64) == 2 * 64**2


@pytest.mark.parametrize(("cosine", "asked"), [(0.0, 0), (0.69, 0), (0.71, 1), (1.0, 1)])
def test_an_angle_is_taken_from_its_sine_only_where_its_cosine_has_lost_digits(cosine, asked, monkeypatch):
    """From a cosine of 0.7 on, about 45 degrees; beyond that nothing is decomposed but the products of the bases."""
    W = torch.tensor([[1.0, 0.0, 0.0], [cosine, (1 - cosine**2) ** 0.5, 0.0]], dtype=torch.float64)
    spaces, seen, whole = heads.WriteSpaces(W, 2), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **o: (seen.append(1), whole(*a, **o))[1])
    found = heads.smallest_principal_angle(spaces, 2)
    assert len(seen) == asked
    assert found[0, 1].item() == found[1, 0].item() == pytest.approx(math.acos(cosine), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("epsilons", "dimension"), [(15.5, 4**2), (16.5, 2**2 + 2**2)])
def test_profiles_of_gates_are_alike_up_to_sixteen_epsilons(dtype, epsilons, dimension, monkeypatch):
    """Two heads of width 2 whose directions lie so far apart: one class of two heads, or two classes of one."""
    angles = torch.tensor([0.0, 2 * math.asin(epsilons * torch.finfo(dtype).eps / 2)], dtype=torch.float64)
    monkeypatch.setattr(heads, "normalize", lambda *_, **__: torch.stack([angles.cos(), angles.sin()]))
    assert heads.gauge_of_gates(torch.ones(2, 2, dtype=dtype), 2) == dimension
