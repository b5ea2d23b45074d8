"""Each inequality of a claim is as sharp as it is said to be: just beyond its limit the piece of evidence fails.

A piece that holds with room to spare would not show that its limit was moved. So the figures are replaced by such as lie on the
limit, or a little to either side of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
from flint import arb, ctx, fmpq

from uncollapse.claims import (
    CLAIMS,
    attention_never_gains_rank,
    attention_only_collapse,
    causal_collapse_is_geometric,
    last_token_collapse,
    layernorm_affine_rank,
    layernorm_rank_formula,
    leaders,
    mlp_leaves_the_reachable_space,
    pgop_overhead,
    relative_bias_collapse_is_geometric,
    residual_needs_no_mlp,
    residual_obstructs_collapse,
    scaling_fixed_points,
    width_collapse,
)
from uncollapse.claims.intervals import Interval
from uncollapse.measures import exact


def passed(claim: str, start: str, trials: int = 40, **variant: Any) -> bool | None:
    """Of the piece whose words begin so."""
    (piece,) = [p for p in CLAIMS[claim].run(trials, 0, **variant).evidence if p.what.startswith(start)]
    return piece.passed


@pytest.mark.parametrize(("more", "holds"), [(0, True), (1, False)])
def test_three_heads_reach_three_times_the_rank(more: int, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention_never_gains_rank.heads

    def reaching(x: Any, patterns: Any, weights: Any) -> Any:
        if len(patterns) < 3:
            return whole(x, patterns, weights)
        n, d = x.nrows(), x.ncols()
        rank = min(3 * exact.rank(x) + more, n, d)
        return exact.from_rows([[fmpq(int(i == j < rank)) for j in range(d)] for i in range(n)], d)

    monkeypatch.setattr(attention_never_gains_rank, "heads", reaching)
    assert passed("attention-never-gains-rank", "three heads", 300) is holds


@pytest.mark.parametrize(("lost", "holds"), [(0, False), (1, True), (2, True)])
def test_more_tokens_than_width_lose_one_direction_at_least(
    lost: int, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = layernorm_affine_rank.rank_change

    class Lost:
        affine_rank = -lost

        def __init__(self, after: Any) -> None:
            self.after = after

    def changed(x: Any, **options: Any) -> Any:
        told = whole(x, **options)
        return Lost(told.after) if x.nrows() > x.ncols() and options == {"eps": 1} else told

    monkeypatch.setattr(layernorm_affine_rank, "rank_change", changed)
    assert passed("layernorm-affine-rank", "instead, more tokens than width") is holds


@pytest.mark.parametrize(("factor", "holds"), [(fmpq(1), True), (1 + fmpq(1, 10**6), False)])
def test_near_the_identity_the_mean_grows_by_seven_quarters_at_least(
    factor: fmpq, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By just that where W = 1 - 11^T/4d and all channels of the mean are alike; the distance is then the bound itself."""
    module = residual_needs_no_mlp
    whole, seen, depths = module.approaching, [], set()

    def weakest(x: Any, weight: Any, layers: int) -> list[Any]:
        if weight == exact.identity(2):
            return whole(x, weight, layers)
        n, d = x.nrows(), x.ncols()
        depths.add(layers)
        seen.append(max(sum(abs(e) for e in row) for row in (weight - exact.identity(d)).tolist()))
        deviations, mean = (
            sum(e * e for e in part.entries()) for part in (exact.centring(n) * x, exact.ones(n, n) * x / n)
        )
        return [deviations / (deviations + mean * fmpq(7, 4) ** (2 * layers)) * factor]

    monkeypatch.setattr(module, "approaching", weakest)
    assert passed("residual-needs-no-mlp", "on a neighbourhood of W = I") is holds
    assert len(seen) == 4
    assert depths == {60}
    assert fmpq(1, 8) < max(seen) <= fmpq(1, 4)  # the whole neighbourhood, and no more


@pytest.mark.parametrize(("far", "holds"), [(fmpq(98, 100), False), (fmpq(99, 100), False), (fmpq(995, 1000), True)])
def test_a_row_beside_two_keys_leaves_for_one(far: fmpq, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scaling_fixed_points.scaled
    monkeypatch.setattr(
        scaling_fixed_points,
        "scaled",
        lambda row, times: [far, 1 - far, fmpq(0)] if times == 128 else whole(row, times),
    )
    assert passed("scaling-fixed-points", "the uniform row on two of three keys") is holds


def test_a_row_that_stays_does_not_move_away(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scaling_fixed_points.scaled
    monkeypatch.setattr(
        scaling_fixed_points, "scaled", lambda row, times: list(row) if times == 2 else whole(row, times)
    )
    assert passed("scaling-fixed-points", "a row that is not uniform moves away") is False


@pytest.mark.parametrize("places", [(1, 1, 2), (1, 2, 2), (1, 2, 10), (3, 2, 5)])
def test_tokens_of_opposite_signs_approach_more_slowly_at_larger_logits(
    places: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tenths of the way from 0 to 1: they must rise and stay below 1."""
    told = iter(places)

    def instead(logits: Any, **_: Any) -> Any:
        place = fmpq(next(told), 10)
        return exact.rational([[(1 + place) / 2, (1 - place) / 2]] * 2)

    monkeypatch.setattr(leaders, "softmax", instead)
    assert leaders._at_finite_temperature()[1].passed is False


def test_the_overhead_is_below_the_limit_and_not_at_it() -> None:
    shapes = pgop_overhead.SIXTY_FOUR[:1]
    most = max(pgop_overhead.overhead(*shapes[0], bias=bias) for bias in (True, False))
    assert passed("pgop-overhead", "the gates have less than", shapes=shapes, limit=most) is False
    assert passed("pgop-overhead", "the gates have less than", shapes=shapes, limit=most + fmpq(1, 10**9)) is True
    few = pgop_overhead.overhead(384, 12, features=128)
    assert passed("pgop-overhead", "the same model with d_phi = 128", limit=few) is False
    assert passed("pgop-overhead", "the same model with d_phi = 128", limit=few + fmpq(1, 10**9)) is True
    thin = pgop_overhead.overhead(384, 12)
    assert passed("pgop-overhead", "d = 384", limit=thin) is False
    assert passed("pgop-overhead", "d = 384", limit=thin - fmpq(1, 10**9)) is True


STEEP, FLAT, SHORT = "slope of ln sigma_2", "slope for Gaussian", "sigma_2 sqrt(d_k) at n = 8"


@pytest.mark.parametrize(
    ("place", "mean", "start", "outcome"),
    [
        # The intervals in the order in which they are taken: of the slopes, of narrow heads, of short rows, and of two levels.
        (0, -0.26, STEEP, True),
        (0, -0.24, STEEP, False),
        (1, -0.24, FLAT, True),
        (1, -0.26, FLAT, False),
        (2, 0.99, SHORT, True),
        (2, 1.01, SHORT, False),
        (3, 0.99, "sigma_2 sqrt(d_k) between 1 and 2 at n = 256", False),
        (3, 1.01, "sigma_2 sqrt(d_k) between 1 and 2 at n = 256", True),
        (4, 1.99, "sigma_2 sqrt(d_k) between 1 and 2 at n = 512", True),
        (4, 2.01, "sigma_2 sqrt(d_k) between 1 and 2 at n = 512", False),
    ],
)
def test_slopes_and_levels_have_the_limits_that_are_said(
    place: int, mean: float, start: str, outcome: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = [-0.5, 0.0, 0.5, 1.5, 1.5]
    means[place] = mean
    told = iter(means)
    monkeypatch.setattr(width_collapse, "interval", lambda values: Interval(next(told), 1e-3))
    monkeypatch.setattr(width_collapse, "second_singular_value", lambda pattern: 1.0)
    monkeypatch.setattr(width_collapse, "independent", lambda *_: None)
    monkeypatch.setattr(width_collapse, "gaussian", lambda *_: None)
    assert passed("width-collapse", start) is outcome


def test_three_layers_start_where_the_condition_just_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta D^2 < 1 by the smallest whole factor, and three layers of attention are bounded by three."""
    module = attention_only_collapse
    starts: list[fmpq] = []
    asked: list[tuple[fmpq, fmpq, int, int]] = []
    layers: list[int] = []
    diameter, after, attention = module.squared_diameter, module.after, module.balls.attention
    monkeypatch.setattr(module, "squared_diameter", lambda x: (starts.append(found := diameter(x)), found)[1])

    def bound(factor: fmpq, squared: fmpq, exponent: int, depth: int) -> fmpq:
        asked.append((factor, squared, starts[-1], depth))
        return after(factor, squared, exponent, depth)

    monkeypatch.setattr(module, "after", bound)
    monkeypatch.setattr(module.balls, "attention", lambda *a, **o: (layers.append(len(starts)), attention(*a, **o))[1])
    monkeypatch.setattr(module, "_within_dongs_gauge", lambda *_: [])
    monkeypatch.setattr(module, "_expansion", lambda: ("", True))
    CLAIMS["attention-only-collapse"].run(60, 0)
    assert len(asked) == 12
    for factor, squared, start, depth in asked:
        assert depth == 3
        shrink = math.isqrt(int(start / squared))
        assert squared == start / shrink**2
        assert 4 * factor * squared < 1
        assert shrink == 1 or 4 * factor * start / (shrink - 1) ** 2 >= 1
    assert len(layers) == len(starts) + 3 * len(asked)


@pytest.mark.parametrize("module", [causal_collapse_is_geometric, relative_bias_collapse_is_geometric])
@pytest.mark.parametrize(("start", "layers"), [(150, 5), (140, 10), (139, 11), (100, 30)])
def test_distances_are_followed_down_to_rounding(
    module: Any, start: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halved in every layer, from a squared distance of 2^-start, until it is 2^-160 or less; the ratio is 1/4 throughout."""
    calls: list[int] = []
    attention = module.balls.attention
    monkeypatch.setattr(module.balls, "attention", lambda *a, **o: (calls.append(1), attention(*a, **o))[1])
    x = (
        exact.rational([[0], [1]]) / 2 ** (start // 2)
        if start % 2 == 0
        else exact.rational([[0, 0], [1, 1]]) / 2 ** ((start + 1) // 2)
    )
    form = exact.zeros(x.ncols(), x.ncols())
    with ctx.workprec(640):
        if module is causal_collapse_is_geometric:
            ratio = module.last_ratio(x, form, causal=True)
        else:
            ratio = module.last_ratio(x, form, exact.rational([[3, 1], [1, 3]]))
    assert float(ratio.mid()) == pytest.approx(0.25)
    assert len(calls) == layers


@pytest.mark.parametrize(
    ("module", "layers"), [(causal_collapse_is_geometric, 50), (relative_bias_collapse_is_geometric, 60)]
)
def test_tokens_that_stay_apart_are_followed_through_fifty_or_sixty_layers(
    module: Any, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a slow collapse costs at most: from a distance of one, halved in every layer, rounding is still far off."""
    calls: list[int] = []
    attention = module.balls.attention
    monkeypatch.setattr(module.balls, "attention", lambda *a, **o: (calls.append(1), attention(*a, **o))[1])
    x, form = exact.rational([[0], [1]]), exact.zeros(1, 1)
    with ctx.workprec(640):
        if module is causal_collapse_is_geometric:
            module.last_ratio(x, form, causal=True)
        else:
            module.last_ratio(x, form, exact.rational([[3, 1], [1, 3]]))
    assert len(calls) == layers


def test_rows_are_scaled_as_often_as_the_words_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()
    whole = scaling_fixed_points.scaled
    monkeypatch.setattr(scaling_fixed_points, "scaled", lambda row, times: (seen.update([times]), whole(row, times))[1])
    words = " ".join(piece.what for piece in CLAIMS["scaling-fixed-points"].run(12, 0).evidence)
    assert seen.keys() == {
        int(each) for each in re.findall(r"t = (\d+)|and (\d+) exactly", words) for each in each if each
    }
    assert seen.keys() == {2, 3, 32, 64, 128}
    assert seen[3] == 4**2 + 4**3 + 4**4 - 3  # every row once, but for rows of zeros


@pytest.mark.parametrize(("added", "exceptions"), [(fmpq(0), 0), (fmpq(1, 10**60), 40)])
def test_rows_come_as_near_to_their_limit_as_is_said(
    added: fmpq, exceptions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T (p_2/p_1)^32, where p_2 is the next smaller weight; no distance at all where there is none."""
    whole, rows = scaling_fixed_points.scaled, []
    monkeypatch.setattr(
        scaling_fixed_points, "scaled", lambda row, times: (rows.append((row, times)), whole(row, times))[1]
    )

    def furthest(*_: Any) -> fmpq:
        row, times = rows[-1]
        below = [entry for entry in row if entry < max(row)]
        return len(row) * (max(below) / max(row)) ** times + added if below else added

    monkeypatch.setattr(scaling_fixed_points, "distance", furthest)
    (piece,) = [p for p in CLAIMS["scaling-fixed-points"].run(40, 0).evidence if p.what.startswith("t = 32")]
    assert piece.observed == f"{exceptions} exceptions in 40 cases"


def test_clouds_of_one_leader_are_not_counted_among_those_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, expected in ((1, "0 of 20 cases"), (2, "20 of 20 cases")):
        seen: list[Any] = []

        def different(x: Any, *_: Any, count: int = count, seen: list[Any] = seen, **__: Any) -> set[int]:
            rows = leaders.rows_of(x)
            seen.append({rows.index(row) for row in dict.fromkeys(rows)})
            return set(sorted(seen[-1])[:count])

        monkeypatch.setattr(leaders, "leaders", different)
        (piece,) = [p for p in CLAIMS["leaders"].run(20, 0).evidence if p.what.startswith("there are clouds")]
        assert piece.passed is (count == 2)
        assert piece.observed == expected


def test_torchs_own_attention_is_asked_up_to_twice_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the length from which on the bits are the same comes after the last exception."""
    seen: list[int] = []
    monkeypatch.setattr(last_token_collapse, "in_torch", lambda n, dtype: (seen.append(n), n >= 700 or n == 600)[1])
    (piece,) = [p for p in CLAIMS["last-token-collapse"].run(12, 0).evidence if "attention of torch" in p.what]
    assert piece.observed == 700
    assert seen == list(range(2, 2 * 512))
    always = last_token_collapse._always
    assert [always(same) for same in ([True, True], [False, True], [True, False])] == [2, 3, 4]


@pytest.mark.parametrize(("beyond", "holds"), [(0, True), (1, False)])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_layer_norm_changes_an_affine_rank_by_no_more_than_is_said(
    side: int, beyond: int, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up by one, down by one more than the larger of one and the number of zeros of gamma."""

    def ranks(x: Any, gamma: Any, *_: Any) -> tuple[int, int]:
        change = 1 + beyond if side > 0 else -1 - max(1, sum(g == 0 for g in gamma)) - beyond
        after = exact.affine_rank(x) + change
        return after, after

    monkeypatch.setattr(layernorm_rank_formula, "output_ranks", ranks)
    assert passed("layernorm-rank-formula", "the change lies between") is holds


@pytest.mark.parametrize(("weight", "cases"), [(fmpq(2), 1), (fmpq(-2), 1), (fmpq(21, 10), 0), (fmpq(-21, 10), 0)])
def test_dongs_inequality_is_asked_of_logits_within_a_range_of_one(weight: fmpq, cases: int) -> None:
    """Tokens 1/2 and -1/2 with the form 2 have logits 1/2 and -1/2."""
    x, value = exact.rational([[1], [-1]]) / 2, exact.identity(1)
    with ctx.workprec(640):
        assert len(attention_only_collapse._within_dongs_gauge(x, exact.identity(1) * weight, value)) == cases


def test_the_widths_that_are_measured_are_those_of_the_statement() -> None:
    """d, 2d, 4d and 8d; of each the share, the same by least squares, and the effective rank."""
    claim = CLAIMS["ffn-width-four"]
    stated = [
        int(factor or 1)
        for factor in re.findall(r"(?<![a-z])(\d*)d\b", claim.statement.partition("d_ff = ")[2].partition("alike")[0])
    ]
    shown = [re.findall(r"d_ff = (\d+) d", piece.what) for piece in claim.run(12, 0).evidence]
    assert stated == [1, 2, 4, 8]
    assert shown == [[str(each)] for each in stated] + [[str(each)] for each in stated for _ in range(2)]


@pytest.mark.parametrize(("factor", "times"), [(fmpq(149, 100), 0), (fmpq(151, 100), 6)])
def test_tokens_above_the_condition_move_apart_by_three_halves(
    factor: fmpq, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        attention_only_collapse.balls, "attention", lambda x, *_: [[entry * arb(factor) for entry in row] for row in x]
    )
    assert attention_only_collapse._expansion() == (f"at least 3/2 in {times} of 6", times == 6)


def test_a_reachable_space_that_is_the_whole_width_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mlp_leaves_the_reachable_space, "reachable", lambda x, layers: exact.identity(layers[0][0].nrows())
    )
    assert passed("mlp-leaves-the-reachable-space", "the reachable space") is False


@pytest.mark.parametrize(
    ("added", "cases"),
    [
        ([[0, 0], [0, 0]], 0),
        ([[1, 1], [1, 1]], 0),
        ([[1, 0], [0, 0]], 40),  # another affine rank
        ([[3, 0], [0, 0]], 40),
    ],
    ids=str,
)
def test_a_value_bias_is_the_same_for_all_tokens(
    added: list[list[int]], cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are all 0, and something else than one row that is added to them."""
    module = attention_never_gains_rank
    monkeypatch.setattr(module, "heads", lambda x, *_: exact.zeros(x.nrows(), x.ncols()))

    def shifted(x: Any, bias: Any) -> Any:
        if any(x.entries()):
            return x
        n, d = x.nrows(), x.ncols()
        return exact.from_rows([[fmpq(added[min(i, 1)][min(j, 1)]) for j in range(d)] for i in range(n)], d)

    monkeypatch.setattr(module, "shifted", shifted)
    (piece,) = [p for p in CLAIMS[module.CLAIM.id].run(40, 0).evidence if p.what.startswith("a value bias")]
    assert piece.observed == f"{cases} exceptions in 40 cases"


def test_three_draws_are_tried_before_a_layer_is_said_to_lose_rank() -> None:
    class Zeros:
        """Draws no weights but 0, so that nothing is left without the residual."""

        def __init__(self) -> None:
            self.drawn = 0

        def matrix(self, rows: int, columns: int, size: int) -> Any:
            self.drawn += 1
            return exact.zeros(rows, columns)

    x, draws = exact.identity(2), Zeros()
    assert residual_obstructs_collapse.witness(draws, x, [x], False) is False
    assert draws.drawn == 3
    assert residual_obstructs_collapse.witness(draws, x, [x], True) is True
    assert draws.drawn == 4


@pytest.mark.parametrize(("moved", "exceptions"), [(0, False), (1, False), (-1, False), (2, True), (-2, True)])
def test_a_bias_behind_a_norm_moves_the_rank_by_one_at_most(
    moved: int, exceptions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never the affine rank."""

    def ranks(x: Any, gamma: Any, beta: list[int], eps: Any) -> tuple[int, int]:
        return (5 + moved if any(beta) else 5), 4

    monkeypatch.setattr(layernorm_rank_formula, "output_ranks", ranks)
    assert passed("layernorm-rank-formula", "a bias leaves the affine rank alone") is not exceptions
    monkeypatch.setattr(layernorm_rank_formula, "output_ranks", lambda x, gamma, beta, eps: (5, 4 + any(beta)))
    assert passed("layernorm-rank-formula", "a bias leaves the affine rank alone") is False


@pytest.mark.parametrize("tokens", [2, 4, 6])
def test_chains_of_leaders_are_followed_through_one_layer_less_than_tokens(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = leaders.hard_max
    monkeypatch.setattr(leaders, "hard_max", lambda x, *a, **o: (calls.append(x.nrows()), whole(x, *a, **o))[1])
    first = leaders.leaders
    clouds: list[int] = []
    monkeypatch.setattr(leaders, "leaders", lambda x, *a, **o: (clouds.append(x.nrows()), first(x, *a, **o))[1])
    monkeypatch.setattr(leaders, "is_tied", lambda *_, **__: True)  # so that nobody asks who leads at the end
    CLAIMS["leaders"].run(60, 0)
    drawn = clouds[:60].count(tokens)
    assert drawn > 0
    assert calls[:-1].count(tokens) == drawn * (tokens - 1)


def test_a_sum_as_large_as_its_parts_keeps_the_triangle_inequality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_only_collapse, "GAUGE", (((1,),), ((1,),)))
    assert passed("attention-only-collapse", "that gauge is not a norm") is False
