"""`verify`, the rule that reads verdicts off evidence, and the tools the checks share."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from flint import arb, ctx, fmpq

from uncollapse.claims import CLAIMS, verify
from uncollapse.claims import balls as ball_arithmetic
from uncollapse.claims.draws import Draws
from uncollapse.claims.ffn_width_four import RELU_INNOVATION, variances
from uncollapse.claims.intervals import Interval, interval
from uncollapse.claims.jacobian import between, generic, jacobian
from uncollapse.claims.ledger import bracketed, found, tally, verdict
from uncollapse.errors import InputError
from uncollapse.measures import exact
from uncollapse.records.ledger import LEDGER_SCHEMA, Evidence


def piece(passed, role="statement"):
    return Evidence("what", 0, None, passed, role)


@pytest.mark.parametrize(
    ("kind", "evidence", "hypotheses", "expected"),
    [
        ("universal", [piece(True)], False, "holds"),
        ("universal", [piece(True)], True, "holds under hypotheses"),
        ("generic", [piece(True)], False, "holds generically"),
        ("measured", [piece(True)], True, "measured"),
        ("universal", [piece(True), piece(False)], False, "refuted as stated"),
        ("measured", [piece(None), piece(False)], False, "refuted as stated"),
        ("universal", [piece(True), piece(None)], False, "undecided"),
        ("universal", [], False, "undecided"),
        ("universal", [piece(True, "context")], False, "undecided"),
        ("universal", [piece(True), piece(False, "boundary")], True, "undecided"),
        ("generic", [piece(True), piece(None, "boundary")], False, "undecided"),
        ("universal", [piece(True), piece(False, "context"), piece(None, "context")], False, "holds"),
    ],
)
def test_the_rule(kind, evidence, hypotheses, expected):
    assert verdict(kind, evidence, hypotheses) == expected


def test_evidence_is_three_valued():
    assert tally("", [True, True]).passed is True
    assert tally("", [True, False, None]).passed is False
    assert tally("", [True, None]).passed is None
    assert tally("", []).passed is None
    assert found("", [False, True, None]).passed is True
    assert found("", [False, False]).passed is False
    assert found("", [False, None]).passed is None
    assert found("", []).passed is None
    assert bracketed("", 3, 3, 3).passed is True
    assert bracketed("", 3, 5, 4).passed is None
    assert bracketed("", 3, 5, 2).passed is False
    assert bracketed("", 3, 5, 6).passed is False


def test_the_ledger_is_plain_json_and_complete():
    ledger = verify(trials=10)
    record = json.loads(json.dumps(dataclasses.asdict(ledger), allow_nan=False))
    assert record["schema"] == LEDGER_SCHEMA == "uncollapse/ledger/1"
    assert [claim["id"] for claim in record["claims"]] == list(CLAIMS)
    assert len(CLAIMS) == 38
    assert set(record) == {"schema", "versions", "trials", "seed", "claims"}
    keys = {
        "id",
        "title",
        "statement",
        "formula",
        "theory",
        "source",
        "verdict",
        "hypotheses",
        "evidence",
        "counterexample",
    }
    assert all(set(claim) == keys for claim in record["claims"])
    assert {"uncollapse", "torch", "python-flint", "python"} == set(record["versions"])


SCRIPT = "import sys; from uncollapse.claims import verify; sys.stdout.write(repr(verify(trials=4, seed=4).claims))"


def test_the_seed_fixes_every_figure_in_another_process_too():
    here = repr(verify(trials=4, seed=4).claims)
    there = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert here == there
    assert verify(["ffn-width-four"], trials=4, seed=4) != verify(["ffn-width-four"], trials=4, seed=5)


def test_a_claim_gives_the_same_alone_and_among_others():
    alone = verify(["width-collapse"], trials=25).claims[0]
    assert alone == verify(["entropy-floor", "width-collapse"], trials=25).claims[1]


def test_trials_scale_the_evidence():
    few, many = (verify(["token-permutation"], trials=n).claims[0].evidence[0].observed for n in (3, 31))
    assert (few, many) == ("0 exceptions in 12 cases", "0 exceptions in 31 cases")  # fewer than 12 leave verdicts open


def test_progress_names_what_runs():
    calls = []
    verify(["entropy-floor", "pgop-overhead"], trials=3, progress=lambda *call: calls.append(call))
    assert calls == [("entropy-floor", 0, 2), ("pgop-overhead", 1, 2), ("pgop-overhead", 2, 2)]


def test_global_settings_are_put_back():
    threads, precision = torch.get_num_threads(), ctx.prec
    verify(["entropy-floor", "ffn-width-four"], trials=3)
    assert (torch.get_num_threads(), ctx.prec) == (threads, precision)


def test_unknown_claims_and_no_trials_are_refused():
    with pytest.raises(InputError, match=r"got 'layernorm-affinerank'\. The nearest is 'layernorm-affine-rank'"):
        verify(["layernorm-affinerank"])
    with pytest.raises(InputError, match="expected trials as a whole number from 1 to 100000, got 0"):
        verify(trials=0)
    assert [claim.id for claim in verify("pgop-overhead", trials=1).claims] == ["pgop-overhead"]


def test_the_claims_load_no_transformers():
    code = "import sys, uncollapse.claims; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draws_have_what_they_promise():
    draws = Draws("test", 0)
    for _ in range(20):
        rotation = draws.rotation(3)
        assert rotation * rotation.transpose() == exact.identity(3)
        assert exact.rank(draws.of_rank(4, 3, 2)) == 2
        assert all(sum(row) == 1 for row in draws.pattern(4, causal=True).tolist())
        assert all(sum(row) < 1 for row in draws.pattern(4, sinks=True).tolist())
    assert Draws("test", 1).random() != Draws("test", 2).random() != Draws("other", 1).random()


def test_draws_come_from_the_whole_range_they_name():
    draws = Draws("test", 0)
    assert set(draws.matrix(40, 40).entries()) == set(range(-3, 4))
    assert set(draws.matrix(40, 40, 1).entries()) == {-1, 0, 1}
    shares = [row for _ in range(300) for row in draws.pattern(2).tolist()]
    assert {left / right for left, right in shares} == {fmpq(a, b) for a in range(1, 6) for b in range(1, 6)}
    # weights of 1 to 5 on two keys, beside a sink of 1 to 9
    kept = {sum(row) for _ in range(600) for row in draws.pattern(2, sinks=True).tolist()}
    assert kept == {fmpq(t, t + s) for t in range(2, 11) for s in range(1, 10)}
    causal = draws.pattern(4, causal=True).tolist()
    assert [[entry > 0 for entry in row] for row in causal] == [[j <= i for j in range(4)] for i in range(4)]
    # By Cayley's formula tan(angle/2) is the skew entry: -4 to 4, a difference of two entries of -2 to 2.
    turns = [draws.rotation(2) for _ in range(200)]
    assert {turn[1, 0] / (1 + turn[0, 0]) for turn in turns} == set(range(-4, 5))


def test_balls_decide_only_what_they_can():
    third, blurred = arb(fmpq(1, 3)), arb(0, 1)
    assert ball_arithmetic.at_most(third, arb(1)) is True
    assert ball_arithmetic.at_most(arb(1), third) is False
    assert ball_arithmetic.at_most(blurred, third) is None
    assert ball_arithmetic.at_most(arb(1), arb(1)) is True
    # [1, 2] and [0, 1]: below only where both are 1, and above unless they are.
    assert ball_arithmetic.at_most(arb(1.5, 0.5), arb(0.5, 0.5)) is None
    assert ball_arithmetic.certainly_full_rank([[arb(1), arb(2)], [arb(2), arb(4)]]) is None
    assert ball_arithmetic.certainly_full_rank([[arb(1), arb(2)], [arb(2), arb(5)]]) is True
    assert ball_arithmetic.certainly_full_rank([[blurred]]) is None


def test_attention_in_balls_is_attention():
    generator = torch.Generator().manual_seed(0)
    x, m, w = (torch.randint(-2, 3, (3, 3), generator=generator).double() / 2 for _ in range(3))
    for causal in (False, True):
        logits = x @ m @ x.T
        if causal:
            logits = logits.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
        expected = logits.softmax(-1) @ x @ w
        rows = [[[arb(entry) for entry in row] for row in matrix.tolist()] for matrix in (x, m, w)]
        seen = ball_arithmetic.attention(rows[0], [rows[1]], [rows[2]], causal=causal)
        assert torch.allclose(
            torch.tensor([[float(e.mid()) for e in row] for row in seen]).double(), expected, atol=1e-6
        )
    assert float(ball_arithmetic.squared_diameter(rows[0]).mid()) == pytest.approx(float(torch.cdist(x, x).max() ** 2))


def test_the_jacobian_of_a_product_of_numbers():
    assert exact.text(jacobian(lambda v: [v[0] * v[1], v[1]], [2, 3])) == [["3", "2"], ["0", "1"]]
    # x y is seen: one direction (2, -3) is open, and it is the scaling move.
    assert between(lambda v: [v[0] * v[1]], [2, 3], [[2, -3]]) == (1, 1)
    assert between(lambda v: [v[0] * v[1]], [2, 3], [[2, 3]]) == (0, 1)
    assert between(lambda v: [v[0] * v[1]], [2, 3], []) == (0, 1)
    assert generic([(0, 2), (1, 3)]) == (1, 2)


@pytest.mark.parametrize(("count", "quantile"), [(5, 8.610), (10, 4.781), (30, 3.659)])
def test_intervals_use_students_quantile(count, quantile):
    """Two-sided 99.9 % quantiles of Student's t from the tables; the expansion is good to some per cent at 4 degrees."""
    rng = random.Random(count)
    values = [rng.gauss(0, 1) for _ in range(count)]
    mean = sum(values) / count
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    seen = interval(values, 0.999)
    assert seen.mean == pytest.approx(mean)
    assert seen.half * math.sqrt(count) / deviation == pytest.approx(quantile, rel=0.1)
    assert (Interval(1.0, 0.1).below(1.2), Interval(1.0, 0.1).below(0.8), Interval(1.0, 0.1).below(1.05)) == (
        True,
        False,
        None,
    )


def test_the_closed_form_of_the_relu_variance_is_what_samples_show():
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    down = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    variance, unexplained = variances(up, down, "relu")
    x = torch.randn(400_000, 4, generator=generator, dtype=torch.float64)
    y = torch.relu(x @ up) @ down
    given = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    rest = y - given @ torch.linalg.lstsq(given, y).solution
    assert float(y.var(0).sum()) == pytest.approx(variance, rel=0.01)
    assert float(rest.var(0).sum()) == pytest.approx(unexplained, rel=0.01)
    single = variances(torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), "relu")
    assert single[1] / single[0] == pytest.approx(RELU_INNOVATION)
