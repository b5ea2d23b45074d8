"""How a claim is checked: how many cases, which sizes, how exactly. A verdict alone would not show that one of them went."""

import dataclasses
import math
import re
from fractions import Fraction

import pytest
import torch
from flint import arb, fmpq

from uncollapse.claims import (
    CLAIMS,
    attention_only_collapse,
    causal_collapse_is_geometric,
    dispersion,
    entropy_floor,
    intervals,
    layernorm_affine_rank,
    layernorm_and_distance,
    mlp_leaves_the_reachable_space,
    pgop_overhead,
    query_key_gauge,
    random_residuals_are_geometric,
    relative_bias_collapse_is_geometric,
    residual_needs_no_mlp,
    residual_obstructs_collapse,
    value_output_gauge,
)
from uncollapse.claims.draws import Draws
from uncollapse.measures import exact
from uncollapse.records.ledger import ClaimResult, Evidence

TRIALS = 41  # one more than a multiple of 20, of 10, of 5 and of 4


@pytest.fixture(scope="module")
def ledger() -> dict[str, ClaimResult]:
    """Every claim once."""
    return {name: claim.run(TRIALS, 5) for name, claim in CLAIMS.items()}


def starting(result: ClaimResult, start: str) -> Evidence:
    (piece,) = [piece for piece in result.evidence if piece.what.startswith(start)]
    return piece


def cases(piece: Evidence) -> int:
    """How many cases the piece met."""
    found = re.search(r"(\d+) cases", str(piece.observed))
    assert found
    return int(found[1])


# Of each claim: how its pieces begin, and how many of 41 trials each met.
EACH, FIFTH, TWENTIETH = TRIALS, TRIALS // 5, TRIALS // 20
FIRST_AND_TWENTIETH = len(range(0, TRIALS, 20))
COUNTED = {
    "attention-only-collapse": {
        "one layer": EACH,
        "three layers: diam <= (1/4 beta)^((p-1)/2) diam(X)^p, p = 3^3": len(range(1, TRIALS, 5)),
    },
    # n = 2 to 6
    "causal-collapse-is-geometric": {"the pattern": 5, "X <- A(X) X": TWENTIETH, "with a full mask": TWENTIETH},
    "relative-bias-collapse-is-geometric": {
        "at consensus": EACH,
        "b on the diagonal": FIRST_AND_TWENTIETH,
        "logits from the bias": FIRST_AND_TWENTIETH,
        "logits from tokens": FIRST_AND_TWENTIETH,
        "with the bias at zero": FIRST_AND_TWENTIETH,
    },
    "leaders": {"M positive": EACH, "as many groups": EACH, "there are clouds": EACH, "without positive": EACH},
    "attention-never-gains-rank": dict.fromkeys(("rank of", "affine rank", "a value bias", "three heads"), EACH),
    "consensus-is-invariant": dict.fromkeys(("n equal", "they are equal after l", "they are equal after a"), EACH),
    "layernorm-affine-rank": {"affine rank unchanged on random": EACH, "instead, consensus": FIFTH},
    "layernorm-rank-formula": dict.fromkeys(("affine rank", "the rank", "a bias", "dim ker", "the change"), EACH),
    "layernorm-matrix-rank": {"rank LN X": EACH, "instead": EACH},
    "rmsnorm-rank": {"rank RMSNorm": EACH, "the affine": EACH},
    "layernorm-and-distance": dict.fromkeys(("12 layers", "from (1", "with eps", "from (0"), 2),
    "residual-obstructs-collapse": {
        "some W": EACH,
        "the same": EACH,
        "two layers of": FIRST_AND_TWENTIETH,
        "post-norm, uniform": FIRST_AND_TWENTIETH,
        "two softmax": FIRST_AND_TWENTIETH,
        "true softmax": EACH,
    },
    "residual-needs-no-mlp": {"rank after 4": EACH, "on a neigh": len(range(0, TRIALS, 10))},
    "random-residuals-are-geometric": {
        "X + U X W": TRIALS // 4,
        "the expected": TRIALS // 4,
        "and by its square": 2,
        "the energy": TRIALS // 4,
        "attention to oneself": 2,
    },
    "mlp-leaves-the-span": {"two attention": EACH},
    "mlp-leaves-the-reachable-space": dict.fromkeys(("the reachable", "two attention", "a linear"), EACH)
    | {"some token-wise relu": EACH + 1},  # and an example
    "attention-is-affine-given-patterns": {"vec f": EACH, "f((X": EACH},
    "head-channel-ambiguity": {"the observer": FIFTH, "of a single": FIFTH},
    "head-observers": dict.fromkeys(("Y and W_O known, head", "nothing", "Y and W_O known, con", "Y alone"), FIFTH),
    "attention-weights-unidentifiable": {"steps": EACH},
    "mlp-cannot-unmix": dict.fromkeys(("the MLP", "W_O with", "W_O unknown"), EACH),
    "pgop-overhead": {
        "the gates": 2 * 9,
        "with output": 9,
        "without output": 9,
    },  # nine models, with and without a bias
    "pgop-gauge": {"the mixings": FIFTH, "no gates": FIFTH},
    "pgop-recovery": dict.fromkeys(("recurring", "at one", "rank G", "contents"), TRIALS // 3),
    "channel-gates": {"gates of channels": FIFTH, "gates of heads": FIFTH},
    "dispersion": dict.fromkeys(("one key", "H >=", "beyond"), EACH),
    # (4^2 - 1) + (4^3 - 1) + (4^4 - 1) rows
    "scaling-fixed-points": {"a row is fixed": 333, "t = 32": EACH, "rows near": EACH},
    "sinks-against-overmixing": dict.fromkeys(("a softmax", "a change", "shares that"), EACH),
    "token-permutation": {"A(PX)": EACH, "a block": EACH},
    "head-permutation": dict.fromkeys(("H=2, G=1", "H=2, G=2", "H=3, G=3", "H=4, G=2", "H=4, G=1"), 2)
    | {"permutations": 2 * (2 + 2 + 6 + 8 + 24)},
    "value-output-gauge": {"a finite": 2 * 5},
    "query-key-gauge": {"a finite": 2 * 8},
    "gauge-with-norms": {"W_h + a": TWENTIETH},
    "four-symmetries": dict.fromkeys(
        ("depth", "width", "heads", "entropy", "exact instead: (", "exact instead: a", "an M that"), EACH
    ),
}


@pytest.mark.parametrize("claim", COUNTED)
def test_every_trial_is_met_and_costly_ones_as_often_as_meant(claim: str, ledger: dict[str, ClaimResult]) -> None:
    for start, count in COUNTED[claim].items():
        assert cases(starting(ledger[claim], start)) == count, start


def test_each_piece_is_decided_or_open(ledger: dict[str, ClaimResult]) -> None:
    """`passed` has three values; a word in its place would count as passed."""
    assert {type(piece.passed) for result in ledger.values() for piece in result.evidence} == {bool, type(None)}


def test_only_rows_that_attain_a_bound_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Balls cannot order equal numbers. Of the weights: one key above all others, which are at the bottom; of the entropy: one
    key above others that are equal."""
    rows: list[list[fmpq]] = []
    softmax, entropy = dispersion.softmax, entropy_floor.entropy
    monkeypatch.setattr(dispersion, "softmax", lambda m: (rows.append(m.entries()), softmax(m))[1])
    piece = starting(CLAIMS["dispersion"].run(60, 0), "the largest weight")
    others = sum(sum(entry > 0 for entry in row) > 1 for row in rows)
    assert cases(piece) == others > 30
    rows.clear()
    monkeypatch.setattr(entropy_floor, "entropy", lambda logits: (rows.append(logits), entropy(logits))[1])
    result = CLAIMS["entropy-floor"].run(60, 0)
    others = sum(len(set(row)) > 2 or (len(set(row)) == 2 and row.count(max(row)) > 1) for row in rows)
    for start in ("H is at least the floor", "the floor falls"):
        assert cases(starting(result, start)) == others > 30


def test_the_extremal_pair_lies_on_both_sides_of_the_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """x and -x, of width one, with M = W = 1; and each head that is drawn is held against Dong's form, too."""
    module = attention_only_collapse
    pairs, asked, drawn = [], [], []
    layer, within, diameter = module.layer, module._within_dongs_gauge, module.squared_diameter
    monkeypatch.setattr(module, "layer", lambda *a: (drawn.append(found := layer(*a)), found)[1])
    monkeypatch.setattr(module, "squared_diameter", lambda x: (pairs.append(x), diameter(x))[1])
    monkeypatch.setattr(module, "_within_dongs_gauge", lambda *a: (asked.append(a), within(*a))[1])
    CLAIMS["attention-only-collapse"].run(41, 0)
    one = exact.identity(1)
    expected = []
    for trial, (x, (forms, values, _)) in enumerate(zip(pairs, drawn, strict=True)):
        if trial % 4 == 0:
            assert x.ncols() == 1
            assert x[0, 0] == -x[1, 0] > 0
        expected += [(x, one, one)] if trial % 4 == 0 else [(x, m, w) for m, w in zip(forms, values, strict=True)]
    assert asked == expected


def test_the_singular_values_of_a_drawn_form_are_quarters_of_the_largest() -> None:
    draws, shares = Draws("test", 0), set()
    for _ in range(60):
        m = attention_only_collapse.sized(draws, 2, fmpq(3))
        # Those of a 2 x 2 matrix: the largest is 3, their product the determinant.
        shares.add(abs(m.det()) / 9)
    assert shares == {fmpq(k, 4) for k in range(5)}


def test_what_is_measured_says_so(ledger: dict[str, ClaimResult]) -> None:
    """All else is exact: rationals, finite fields, or balls that contain the truth."""
    measured = {(name, piece.what) for name, result in ledger.items() for piece in result.evidence if not piece.exact}
    by_claim = {name: [what for each, what in measured if each == name] for name, _ in measured}
    assert {name: len(what) for name, what in by_claim.items()} == {
        "random-residuals-are-geometric": 2,
        "ffn-width-four": 12,
        "width-collapse": 5,
        "last-token-collapse": 1,
    }
    assert all(what.startswith("dev = 15 n m, L = 24") for what in by_claim["random-residuals-are-geometric"])
    assert by_claim["last-token-collapse"][0].startswith("the same prompts in the bfloat16 attention of torch")


# Counted by hand from docs/theory.md, section 7: G d_k^2 and G d_k for the biases; a complex number a rotated pair.
VALUE_OUTPUT = {
    "H=2 G=2 d_k=1 d=2 biases=False": 2,
    "H=2 G=2 d_k=2 d=3 biases=True": 8 + 4,
    "H=4 G=2 d_k=1 d=2 biases=True": 2 + 2,
    "H=4 G=2 d_k=2 d=3 biases=False": 8,
    "H=3 G=1 d_k=2 d=3 biases=True": 4 + 2,
}
QUERY_KEY = {
    "at H=2 G=2 d_k=1 biases=False rotary=0": 2,
    "at H=2 G=1 d_k=2 biases=False rotary=0": 4,
    "at H=4 G=2 d_k=2 biases=False rotary=0": 8,
    "at H=2 G=1 d_k=2 biases=True rotary=0": 4 + 2,
    "at H=2 G=1 d_k=2 biases=False rotary=2": 2,
    "at H=2 G=1 d_k=4 biases=False rotary=4": 4,
    "at H=2 G=1 d_k=2 biases=True rotary=2": 2,
    "at H=2 G=1 d_k=3 biases=True rotary=2": 2 + 1 + 1,
    "under QK-RMSNorm with shared gamma, H=2 G=1 d_k=3 RoPE=False": 2 + 1 + 3,
    "under QK-RMSNorm with shared gamma, H=2 G=2 d_k=2 RoPE=False": 2 + 2 + 2,
    "under QK-RMSNorm with shared gamma, H=2 G=1 d_k=4 RoPE=True": 2 + 1 + 2,
    "under QK-RMSNorm with shared gamma, H=4 G=2 d_k=2 RoPE=True": 4 + 2 + 1,
}
# (query-key, value-output) for beta = 0 and for beta not 0: one group or two, and one group with biases.
AFTER_A_NORM = {
    "H=2 G=1 d_k=2 d=4 biases=False": ((4 + 2 + 4, 4 + 2), (4 + 2, 4)),
    "H=2 G=2 d_k=1 d=3 biases=False": ((2 + 2 + 2, 2 + 2), (2 + 2, 2)),
    "H=2 G=1 d_k=2 d=4 biases=True": ((6 + 2 + 4, 6 + 2), (6 + 2 + 4, 6 + 2)),
}


def dimensions(result: ClaimResult, start: str) -> dict[str, tuple[str, str]]:
    told = [piece for piece in result.evidence if piece.what.startswith(start)]
    return {piece.what.removeprefix(start).strip(): (str(piece.observed), str(piece.expected)) for piece in told}


def test_the_gauges_have_the_dimensions_of_the_theory_at_every_size(ledger: dict[str, ClaimResult]) -> None:
    expected = {size: (str(count),) * 2 for size, count in VALUE_OUTPUT.items()}
    assert dimensions(ledger["value-output-gauge"], "dimension of the gauge at") == expected
    expected = {size: (str(count),) * 2 for size, count in QUERY_KEY.items()}
    assert dimensions(ledger["query-key-gauge"], "dimension") == {
        size.replace("at H", "of the gauge at H"): told for size, told in expected.items()
    }
    for place, kind in enumerate(("query-key", "value-output")):
        expected = {
            f"{size}, beta {beta}": (str(counts[where][place]),) * 2
            for size, counts in AFTER_A_NORM.items()
            for where, beta in enumerate(("= 0", "not 0"))
        }
        assert dimensions(ledger["gauge-with-norms"], f"{kind} gauge after a layer norm,") == expected
    exception = starting(ledger["query-key-gauge"], "exception")
    assert (exception.observed, exception.expected) == ("9", 2 + 1 + 3 + 3)  # the rotations of three channels
    alone = starting(ledger["gauge-with-norms"], "a value bias without")
    assert (alone.observed, alone.expected) == (9, 2 * 2**2 + 4 - 3)


@pytest.mark.parametrize("module", [causal_collapse_is_geometric, relative_bias_collapse_is_geometric])
@pytest.mark.parametrize(("error", "passed"), [(fmpq(8, 10**7), True), (fmpq(12, 10**7), False)])
def test_a_ratio_is_off_from_a_millionth_on(
    module: object, error: fmpq, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claims say "within 1e-6" and "below 1e-6"."""
    last, turned = module.last_ratio, causal_collapse_is_geometric.rotated_ratio
    monkeypatch.setattr(module, "last_ratio", lambda *args, **options: last(*args, **options) + arb(error))
    if module is causal_collapse_is_geometric:
        monkeypatch.setattr(module, "rotated_ratio", lambda x: (turned(x)[0] + arb(error), turned(x)[1]))
    result = CLAIMS[module.CLAIM.id].run(12, 0)
    told = [p for p in result.evidence if re.search("ratio|falls below 1e-6", p.what)]
    assert len(told) == (4 if module is causal_collapse_is_geometric else 3)
    assert {p.passed for p in told} == {passed}


def test_the_epsilons_are_none_the_usual_and_a_large_one() -> None:
    usual = Fraction(str(torch.nn.LayerNorm(1).eps))
    assert (0, fmpq(usual.numerator, usual.denominator), 1) == layernorm_affine_rank.EPSILONS
    assert fmpq(usual.numerator, usual.denominator) == layernorm_and_distance.USUAL


def test_the_models_that_gates_are_counted_for_have_heads_of_the_width_that_is_said() -> None:
    assert {Fraction(d, h) for d, h in pgop_overhead.SIXTY_FOUR} == {64}
    assert {Fraction(d, h) for d, h in pgop_overhead.WIDER} == {128}
    assert [Fraction(d, h) for d, h in pgop_overhead.NARROWER] == [32, 32, 26]
    for shape in pgop_overhead.NARROWER:
        assert CLAIMS["pgop-overhead"].run(1, 0, shapes=(shape,)).verdict == "refuted as stated"
    # By hand: (d_phi + 1) H over d^2 + d, and over d^2.
    assert pgop_overhead.overhead(width=4, heads=2) == fmpq(5 * 2, 16 + 4)
    assert pgop_overhead.overhead(width=4, heads=2, features=3, bias=False) == fmpq(4 * 2, 16)


@pytest.mark.parametrize(
    "kept",
    [
        intervals.Interval(0.0, 1.0),
        query_key_gauge.Layout(2, 1, 2, 3),
        value_output_gauge.Layout(2, 1, 2, 3, False),
        CLAIMS["dispersion"],
    ],
    ids=lambda each: type(each).__module__,
)
def test_what_was_found_cannot_be_changed(kept: object) -> None:
    query_key_gauge.dimension(query_key_gauge.Layout(2, 1, 2, 3))
    intervals.Interval(0.0, 1.0).below(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kept, dataclasses.fields(kept)[0].name, None)


def test_the_bias_of_each_group_of_keys_is_free_and_no_other() -> None:
    """q b_k is the same for all keys of a row, which the softmax does not see; q differs between rows and is seen."""
    layout = query_key_gauge.Layout(4, 2, 2, 1, biases=True)
    values = [fmpq(i + 1) for i in range(sum(rows * columns for rows, columns in layout.shapes))]
    alone = [move for move in query_key_gauge.moves(layout, values) if sum(entry != 0 for entry in move) == 1]
    weights, key_biases = (
        6 * 1 * 2,
        range(4 * 2, 6 * 2),
    )  # six maps of width 1 to 2, and biases of four queries before two keys
    assert sorted(move.index(1) for move in alone) == [weights + i for i in key_biases]


def test_two_layers_are_two_of_two_small_heads_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logit forms of at most 1/4 and weights of at most 1, three times at most, from a cloud whose leading minor is not 0."""
    seen = []

    def never(x: object, layers: object) -> object:
        seen.append((x, layers))
        return [[arb(0)] * 4] * 4

    monkeypatch.setattr(residual_obstructs_collapse, "stacked", never)
    assert residual_obstructs_collapse.two_layers(Draws("test", 0), 3, 4) is None
    assert len(seen) == 3
    x = seen[0][0]
    assert exact.rank(exact.part(x, range(3), range(3))) == 3
    for _, layers in seen:
        assert [[len(part) for part in layer] for layer in layers] == [[2, 2], [2, 2]]
        forms = [abs(e) for forms, _ in layers for m in forms for e in m.entries()]
        weights = [abs(e) for _, values in layers for w in values for e in w.entries()]
        assert fmpq(1, 8) < max(forms) <= fmpq(1, 4)
        assert fmpq(1, 2) < max(weights) <= 1


def test_a_large_drawn_weight_vanishes_on_no_minor() -> None:
    """degree/(2 size + 1), with degrees of at most 20, is below a hundred-thousandth."""
    for module in (residual_obstructs_collapse, residual_needs_no_mlp):
        assert 20 / (2 * module._SIZE + 1) < 1.01e-5


def test_the_norm_of_a_drawn_matrix_is_the_one_wanted() -> None:
    draws = Draws("test", 0)
    for size in (fmpq(1, 2), fmpq(2)):
        matrix = attention_only_collapse.sized(draws, 3, size)
        singular = torch.linalg.svdvals(
            torch.tensor([[float(e) for e in row] for row in matrix.tolist()], dtype=torch.float64)
        )
        assert float(singular[0]) == pytest.approx(float(size))
    forms, values, beta = attention_only_collapse.layer(draws, 2, 2)
    norms = [
        [
            torch.linalg.matrix_norm(torch.tensor([[float(e) for e in r] for r in m.tolist()], dtype=torch.float64), 2)
            for m in part
        ]
        for part in (forms, values)
    ]
    assert float(sum(a * b for a, b in zip(*norms, strict=True))) == pytest.approx(float(beta))


def test_the_floors_of_the_entropy_are_tried_on_small_and_on_large_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, entropy = [], entropy_floor.entropy
    monkeypatch.setattr(entropy_floor, "entropy", lambda logits: (seen.append(logits), entropy(logits))[1])
    CLAIMS["entropy-floor"].run(60, 0)
    ranges = [max(logits) - min(logits) for logits in seen]
    assert min(ranges) < 1
    assert max(ranges) > 12
    assert {len(logits) for logits in seen} == set(range(2, 7))
    assert {(8 * entry).q for logits in seen for entry in logits} == {1}


def test_one_row_in_eight_has_two_high_keys_and_one_a_single_low_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rivals of the extremal row: the norm's floor is nearest to them. Every trial has an extremal row of its own as well."""
    seen, entropy = [], entropy_floor.entropy
    monkeypatch.setattr(entropy_floor, "entropy", lambda logits: (seen.append(logits), entropy(logits))[1])
    CLAIMS["entropy-floor"].run(64, 0)
    levels = [(logits[0], logits[1], set(logits[2:])) for logits in seen]
    low = [each for each in levels if each[0] < 0 == each[1] and each[2] <= {0}]
    high = [each for each in levels if each[0] == each[1] > 0 and each[2] == {0}]
    extremal = [each for each in levels if each[0] > 0 == each[1] and each[2] <= {0}]
    assert len(low) == 8
    assert 5 <= len(high) <= 8  # of two keys, both high, nothing is left to say
    assert len(extremal) >= len(seen) / 2


def test_a_full_mask_starts_from_tokens_that_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of at most 2 are scaled below 1/4, so that (beta/4) D^2 < 1 by far: the logits of the unscaled are at most 1."""
    seen, last = [], causal_collapse_is_geometric.last_ratio

    def watched(x: object, form: object, *, causal: bool) -> object:
        if not causal:
            seen.append(x)
        return last(x, form, causal=causal)

    monkeypatch.setattr(causal_collapse_is_geometric, "last_ratio", watched)
    CLAIMS["causal-collapse-is-geometric"].run(200, 0)
    assert len(seen) == 10
    assert fmpq(1, 5) < max(abs(e) for x in seen for e in x.entries()) < fmpq(1, 4)


@pytest.mark.parametrize("claim", ["entropy-floor", "dispersion"])
@pytest.mark.parametrize(("error", "passed"), [(-1, False), (1, True)])
def test_a_bound_is_attained_to_60_digits(
    claim: str, error: int, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off by a little less or a little more than 1e-60."""
    off = arb(10) ** -60 * (1 - fmpq(error, 20))
    if claim == "dispersion":
        sharpest = dispersion.sharpest
        exactly = fmpq(1, 10**60) * (1 - fmpq(error, 20))
        monkeypatch.setattr(dispersion, "sharpest", lambda bits, keys: sharpest(bits, keys) + exactly)
    else:
        floor = entropy_floor.floor
        monkeypatch.setattr(entropy_floor, "floor", lambda norm, keys: floor(norm, keys) - off)
    start = {"dispersion": "one key at the top", "entropy-floor": "equality (to 1e-60)"}[claim]
    piece = starting(CLAIMS[claim].run(12, 0), start)
    assert piece.passed is passed
    assert cases(piece) > 0


def test_intervals_are_of_one_in_ten_thousand() -> None:
    """Student's two-sided quantile at 99.99 % and nine degrees of freedom is 6.594."""
    values = [float(v) for v in range(10)]
    told = intervals.interval(values)
    assert told.mean == 4.5
    assert told.half == pytest.approx(6.594 * (sum((v - 4.5) ** 2 for v in values) / 9) ** 0.5 / 10**0.5, rel=0.02)
    assert (intervals.Interval(1.0, 0.25).below(1.25), intervals.Interval(1.0, 0.25).below(0.75)) == (None, None)


def test_forms_and_values_have_norms_of_a_quarter_to_two(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sized = [], attention_only_collapse.sized
    monkeypatch.setattr(
        attention_only_collapse, "sized", lambda draws, width, size: (seen.append(size), sized(draws, width, size))[1]
    )
    draws = Draws("test", 0)
    for _ in range(40):
        attention_only_collapse.layer(draws, 2, 2)
    assert set(seen[::4]) | set(seen[1::4]) == set(seen[2::4]) | set(seen[3::4]) == {fmpq(k, 4) for k in range(1, 9)}
    assert set(attention_only_collapse.EXPANDING[0]) == {(1,), (-1,)}


def test_the_rotations_of_two_pairs_never_come_back() -> None:
    """Cosines and sines of Pythagorean triples; a rational cosine of a rational turn would be 0, 1/2 or 1."""
    for cosine, sine in query_key_gauge.ANGLES:
        assert cosine**2 + sine**2 == 1
        assert cosine not in {0, fmpq(1, 2), 1}
    layout = query_key_gauge.Layout(1, 1, 5, 5, rotary=4)
    turn = query_key_gauge.rotation(3, layout)
    one = query_key_gauge.rotation(1, layout)
    assert turn == one * one * one
    assert query_key_gauge.rotation(0, layout) == exact.identity(5)
    angle = [complex(float(c), float(s)) ** 3 for c, s in query_key_gauge.ANGLES]
    entries = [[float(e) for e in row] for row in turn.tolist()]
    for pair, z in enumerate(angle):
        i = 2 * pair
        assert [entries[i][i], entries[i][i + 1]] == pytest.approx([z.real, z.imag])
        assert [entries[i + 1][i], entries[i + 1][i + 1]] == pytest.approx([-z.imag, z.real])
    assert entries[4] == [0, 0, 0, 0, 1]


def test_logits_are_those_of_numpy() -> None:
    """Two heads of one group, width three, biases, two rotated channels of three; each row less its first."""
    layout = query_key_gauge.Layout(2, 1, 3, 3, biases=True, rotary=2)
    draws = Draws("test", 1)
    x, parts = draws.matrix(4, 3), [draws.matrix(rows, columns) for rows, columns in layout.shapes]
    values = [entry for part in parts for entry in part.entries()]

    def numbers(matrix: object) -> torch.Tensor:
        return torch.tensor([[float(e) for e in row] for row in matrix.tolist()], dtype=torch.float64)

    turns = [numbers(query_key_gauge.rotation(i, layout)) for i in range(4)]
    sides = []
    for weight, bias in zip(parts[:3], parts[3:], strict=True):
        rows = numbers(x) @ numbers(weight) + numbers(bias)
        sides.append(torch.stack([row @ turn for row, turn in zip(rows, turns, strict=True)]))
    scores = torch.cat([side @ sides[2].T for side in sides[:2]])
    found = query_key_gauge.logits(layout, [x], values)
    assert [float(e) for e in found] == pytest.approx((scores - scores[:, :1]).flatten().tolist())
    kept = query_key_gauge.logits(layout, [x], values, shift=False)
    assert [float(e) for e in kept] == pytest.approx(scores.flatten().tolist())


def test_the_output_is_that_of_numpy() -> None:
    """Four heads of two groups, with biases of values and output."""
    layout, draws = value_output_gauge.Layout(4, 2, 2, 3, True), Draws("test", 2)
    x, patterns = draws.matrix(3, 3), [draws.pattern(3) for _ in range(4)]
    parts = [draws.matrix(rows, columns) for rows, columns in layout.shapes]
    assert layout.shapes == [(3, 2)] * 2 + [(1, 2)] * 2 + [(2, 3)] * 4 + [(1, 3)]
    a, p = (
        [torch.tensor([[float(e) for e in row] for row in m.tolist()], dtype=torch.float64) for m in some]
        for some in (patterns, parts)
    )
    tokens = torch.tensor([[float(e) for e in row] for row in x.tolist()], dtype=torch.float64)
    y = sum(a[h] @ (tokens @ p[h // 2] + p[2 + h // 2]) @ p[4 + h] for h in range(4)) + p[8]
    found = value_output_gauge.output(layout, [(x, patterns)], [entry for part in parts for entry in part.entries()])
    assert [float(e) for e in found] == pytest.approx(y.flatten().tolist())


def test_without_the_residual_nothing_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """With patterns of rank one put in the place of the softmax, only a residual keeps a rank of two or more."""
    monkeypatch.setattr(
        residual_obstructs_collapse, "softmax", lambda logits: exact.ones(*[logits.nrows()] * 2) / logits.nrows()
    )
    result = CLAIMS["residual-obstructs-collapse"].run(40, 0)
    assert starting(result, "the same with the softmax patterns").passed is True
    kept = int(str(starting(result, "true softmax attention without").observed).partition(" ")[0])
    assert 0 < kept < 40  # clouds of rank one


def test_the_entropy_is_held_against_the_range_of_its_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """H >= ln n - delta for ranges delta of 1/2 to 3."""
    seen, entropy = [], dispersion.entropy
    monkeypatch.setattr(dispersion, "entropy", lambda logits: (seen.append(logits), entropy(logits))[1])
    CLAIMS["dispersion"].run(60, 0)
    assert {max(logits) - min(logits) for logits in seen} == {fmpq(k, 2) for k in range(1, 7)}
    assert {len(logits) for logits in seen} == set(range(2, 13))


def test_every_third_trial_has_causal_patterns_and_the_others_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, pattern = [], Draws.pattern

    def watched(self: Draws, tokens: int, *, causal: bool = False, sinks: bool = False) -> object:
        seen.append(causal)
        return pattern(self, tokens, causal=causal, sinks=sinks)

    monkeypatch.setattr(Draws, "pattern", watched)
    CLAIMS["attention-never-gains-rank"].run(12, 0)
    assert seen == [causal for trial in range(12) for causal in [trial % 3 == 0] * 3]


def test_one_layer_is_held_against_the_bound_of_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """diam(Y)^2 <= (beta/4)^2 diam(X)^6, and three layers against the same three times; the extremal pair all but reaches it."""
    betas, starts, pairs = [], [], []
    layer, diameter, at_most = (
        attention_only_collapse.layer,
        attention_only_collapse.squared_diameter,
        attention_only_collapse.balls.at_most,
    )
    monkeypatch.setattr(attention_only_collapse, "layer", lambda *a: (betas.append(found := layer(*a)), found)[1])
    monkeypatch.setattr(
        attention_only_collapse, "squared_diameter", lambda x: (starts.append(found := diameter(x)), found)[1]
    )
    monkeypatch.setattr(attention_only_collapse.balls, "at_most", lambda a, b: (pairs.append((a, b)), at_most(a, b))[1])
    monkeypatch.setattr(attention_only_collapse, "_within_dongs_gauge", lambda *_: [])
    monkeypatch.setattr(attention_only_collapse, "_expansion", lambda: ("", True))
    CLAIMS["attention-only-collapse"].run(41, 3)
    bounds = [float(right.mid()) for _, right in pairs]
    expected = []
    for (_, _, beta), start in zip(betas, starts, strict=True):
        expected += [{(float(beta) / 4) ** 2 * float(start) ** 3, (1 / 4) ** 2 * float(start) ** 3}]
    singles = [bound for bound in bounds if any(bound == pytest.approx(e, rel=1e-9) for each in expected for e in each)]
    assert len(singles) == len(expected)
    shares = [float((left / right).mid()) for left, right in pairs]
    assert sum(share > 0.999 for share in shares) >= 5
    # Three layers: where the condition (beta/4) D^2 < 1 holds, tokens scaled no further than by 1 + sqrt(beta D^2 + 1).
    several = len(pairs) - len(expected)
    assert several == len(range(1, 41, 5))


def test_the_weights_that_no_key_may_have_are_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each share w of 1/10 to 9/10 is met, at the first length beyond 1 + e^delta (1 - w)/w and the last up to it."""
    seen, sharpest = [], dispersion.sharpest
    monkeypatch.setattr(dispersion, "sharpest", lambda bits, keys: (seen.append((bits, keys)), sharpest(bits, keys))[1])
    CLAIMS["dispersion"].run(120, 0)
    shares = set()
    for (_, beyond), (bits, within) in zip(seen[1::3], seen[2::3], strict=True):
        assert beyond == within + 1
        shares |= {k for k in range(1, 10) if 1 + 2**bits * (10 - k) // k == within}
    assert shares == set(range(1, 10))


@pytest.mark.parametrize(
    ("error", "passed"),
    [
        # The distance of START without norms and with norms at the usual eps, that of MERGES without; at eps = 0 what is added.
        ({"bare": "0.9991"}, {"the same relative distance": True}),
        ({"bare": "0.9989"}, {"the same relative distance": False}),
        ({"bare": "0.0099"}, {"its square falls": True}),
        ({"bare": "0.0101"}, {"its square falls": False}),
        ({"exact": "1e-61"}, {"with norms it stays 1": True}),
        ({"exact": "2e-60"}, {"with norms it stays 1": False}),
        ({"usual": "0.9901"}, {"stays above .99": True}),
        ({"usual": "0.9899"}, {"stays above .99": False}),
        ({"merging": "2e-12"}, {"they are not": True}),
        ({"merging": "0.5e-12"}, {"they are not": False}),
    ],
    ids=str,
)
def test_distances_with_and_without_norms_have_the_limits_that_are_said(
    error: dict[str, str], passed: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, relative = layernorm_and_distance.stack, layernorm_and_distance.relative
    start = exact.rational(layernorm_and_distance.START)
    (kind, value), (what, expected) = *error.items(), *passed.items()

    def watched(x: object, form: object, eps: object) -> object:
        if x != start:
            name = "merging" if eps is None else "together"
        else:
            name = "bare" if eps is None else "exact" if eps == 0 else "usual"
        found = stack(x, form, eps)
        kinds[id(found)] = name, found
        return found

    def changed(cloud: object) -> object:
        name, _ = kinds[id(cloud)]
        if name != kind:
            return relative(cloud)
        return relative(cloud) + arb(value) if kind == "exact" else arb(value)

    kinds: dict[int, tuple[str, object]] = {}
    monkeypatch.setattr(layernorm_and_distance, "stack", watched)
    monkeypatch.setattr(layernorm_and_distance, "relative", changed)
    (piece,) = [p for p in CLAIMS["layernorm-and-distance"].run(12, 0).evidence if what in p.what]
    assert piece.passed is expected


def test_weights_that_keep_a_space_are_free_beyond_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the basis of the space they are block-triangular: 0 where a direction inside would lead outside, and nowhere else."""
    module, spaces, seen = mlp_leaves_the_reachable_space, [], []
    part, layer = exact.part, module.with_residual

    def first_rows(matrix: object, rows: object, columns: object) -> object:
        if matrix.nrows() == matrix.ncols() == len(columns):
            spaces.append((matrix, len(rows)))
        return part(matrix, rows, columns)

    monkeypatch.setattr(module.exact, "part", first_rows)
    monkeypatch.setattr(module, "with_residual", lambda x, a, w: (seen.append((*spaces[-1], w)), layer(x, a, w))[1])
    CLAIMS["mlp-leaves-the-reachable-space"].run(80, 0)
    inside: dict[tuple[int, int, int, int], bool] = {}
    for basis, k, weights in seen:
        for weight in weights:
            for i, row in enumerate((basis * weight * basis.inv()).tolist()):
                for j, entry in enumerate(row):
                    inside[len(row), k, i, j] = inside.get((len(row), k, i, j), False) or entry != 0
    assert {(d, k) for d, k, _, _ in inside} == {(d, k) for d in (3, 4, 5) for k in range(1, d - 1)}
    for (d, k, i, j), free in inside.items():
        assert free == (not i < k <= j), (d, k, i, j)


@pytest.mark.parametrize(("factor", "passed"), [(0.66, False), (0.68, True), (1.48, True), (1.52, False)])
def test_a_median_is_within_a_factor_of_three_halves(
    factor: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = random_residuals_are_geometric
    for alpha in (1.0, 24**-0.5):
        exactly = math.sqrt(15 / (15 + (1 + alpha**2) ** 24))
        monkeypatch.setattr(
            module,
            "drawn",
            lambda a, *_, alpha=alpha, exactly=exactly: [exactly * factor if a == pytest.approx(alpha) else 9.0],
        )
        told = {p.what.split("alpha = ")[1].split(":")[0]: p.passed for p in module._at_depth(1, 0)}
        assert told == ({"1": passed, "1/sqrt(24)": False} if alpha == 1 else {"1": False, "1/sqrt(24)": passed})


def test_logits_are_small_enough_for_so_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1 on the tokens under a causal mask, at most 1/4 with a bias; and no smaller than that takes."""
    for module, limit in ((causal_collapse_is_geometric, fmpq(1)), (relative_bias_collapse_is_geometric, fmpq(1, 4))):
        seen, last = [], module.last_ratio

        def watched(
            x: object, form: object, *args: object, seen: list = seen, last: object = last, **options: object
        ) -> object:
            seen.append(max(abs(e) for e in (x * form * x.transpose()).entries()))
            return last(x, form, *args, **options)

        monkeypatch.setattr(module, "last_ratio", watched)
        CLAIMS[module.CLAIM.id].run(200, 0)
        assert max(seen[:-1]) == limit


def test_the_weights_of_stacks_with_and_without_norms_are_eighths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, stack = [], layernorm_and_distance.stack
    monkeypatch.setattr(
        layernorm_and_distance, "stack", lambda x, form, eps: (seen.append(form), stack(x, form, eps))[1]
    )
    CLAIMS["layernorm-and-distance"].run(400, 0)
    assert {form[0, 0] for form in seen} == {fmpq(k, 8) for k in range(1, 7)}
    assert not any(entry for form in seen for entry in form.entries()[1:])
