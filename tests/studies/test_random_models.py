"""Random small Transformers: what they say of themselves is true, and what the package says of them is what they say.

The truths are checked by NumPy from the recorded values alone. The package is asked about 300 models; the long run is
`python -m studies.random_models --count 10000`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from studies.random_models import comparing, counting
from studies.random_models.comparing import Comparison, compared, site_reference, tolerance
from studies.random_models.describing import described, odd_pieces
from studies.random_models.drawing import CHOICES, Drawn, drawn, reconciled, specification, written_out
from studies.random_models.reducing import reduced
from studies.random_models.specification import Specification
from studies.random_models.truth import PARTS, AttentionTruth

import uncollapse as uc

# torch's remark on a norm that autocast gives half precision: no fault of the models, which are written like that.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

CHUNKS, SEEDS = 20, 15
VALIDATED = range(240)


def apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-9))


def plain(seed: int = 0, **pieces: object) -> Drawn:
    """A model with the plain choice of every piece but these."""
    ordinary = {name: next(iter(of)) for name, of in CHOICES.items()}
    drawn_first = next(s for s in map(specification, range(seed, seed + 999)) if s.attention == "matmul")
    sizes = {"heads": 3, "key_value_heads": 3, "head_width": 8, "width": 24, "batches": ((4, 9),)}
    return drawn(dataclasses.replace(drawn_first, **(ordinary | sizes | pieces)))


# The generator itself ----------------------------------------------------------------------------------------------------


def check_mixing(spec: Specification, one: AttentionTruth, real: np.ndarray) -> None:
    """A V is what the model's product gave; the softmax of the logits over the allowed pairs is A; W_O reads what it should."""
    near = tolerance(spec).output
    weights, allowed, values, mixed = one.found()
    rows = real[:, None, :, None]
    assert weights.shape[1] == spec.heads
    assert apart(np.where(rows, weights @ values, 0), np.where(rows, mixed, 0)) < near
    assert np.abs(np.where(rows & ~allowed, weights, 0)).max() < 1e-20  # a mask of -100 leaves that much
    if one.logits is not None:
        exponentials = np.exp(np.where(allowed, one.logits - one.logits.max(-1, keepdims=True), -np.inf))
        softmax = exponentials / exponentials.sum(-1, keepdims=True)
        over_allowed = np.where(allowed, weights, 0)
        scaled = over_allowed / np.where(rows, over_allowed.sum(-1, keepdims=True), 1)
        assert np.abs(np.where(rows, softmax - scaled, 0)).max() < near
    if spec.gate == "none":
        assert one.read is not None
        assert apart(one.read.transpose(0, 2, 1, 3), mixed) < near


@pytest.mark.parametrize("start", range(VALIDATED.start, VALIDATED.stop, 40))
def test_recorded_truths_reproduce_the_models_own_numbers(start: int) -> None:
    for seed in range(start, start + 40):
        subject = drawn(seed)
        for batch in subject.batches:
            truth = subject.truth(batch)
            assert len(truth.streams) == subject.spec.blocks + 1
            assert set(truth.attention) == set(range(subject.spec.blocks))
            for one in truth.attention.values():
                if one.kind != "channels":
                    check_mixing(subject.spec, one, truth.real)
                    assert one.projected is not None
                    assert one.bias is not None
                    written = one.contributions.sum(2) + one.bias
                    assert apart(written, one.projected) < tolerance(subject.spec).output or not one.projected.any()


@pytest.mark.parametrize("start", range(VALIDATED.start, VALIDATED.stop, 60))
def test_recording_and_switching_change_no_bit(start: int) -> None:
    for seed in range(start, start + 60):
        subject = drawn(seed)
        batch = subject.batches[0]
        before = subject.run(batch)
        assert bool(before.isfinite().all())
        subject.truth(batch)
        with subject.switches.recording():
            assert torch.equal(subject.run(batch), before)
        subject.without(batch, "attention", "norm")
        assert torch.equal(subject.run(batch), before)


def test_every_part_that_there_is_can_be_switched_off() -> None:
    subject = plain()
    batch = subject.batches[0]
    before = subject.run(batch)
    for part in PARTS:
        after = subject.without(batch, part)
        assert not torch.equal(after, before), part
        one = subject.without(batch, part, blocks=[1])
        assert part == "positions" or not torch.equal(one, after), part
    assert torch.equal(
        subject.without(batch, "mlp", "attention"), subject.without(batch, "mlp", "attention", "residual")
    )


def test_switched_off_masks_let_the_last_token_reach_the_first() -> None:
    # Behind the softmax and without renormalisation a forbidden key still counts in the denominator: it is not among these.
    for masking in ("added", "masked_fill", "torch.where", "after the softmax, renormalised"):
        subject = plain(masking=masking)
        (batch,) = subject.batches
        other = {"input_ids": batch["input_ids"].clone()}
        other["input_ids"][:, -1] = (other["input_ids"][:, -1] + 1) % subject.spec.vocabulary
        torch.testing.assert_close(subject.run(batch)[:, 0], subject.run(other)[:, 0])
        moved = subject.without(batch, "mask")[:, 0] - subject.without(other, "mask")[:, 0]
        assert float(moved.abs().max()) > 1e-3, masking


WRITTEN_OTHERWISE: dict[str, tuple[str, ...]] = {
    "attention": (
        "einsum bhqk",
        "einsum bqhk",
        "einsum hbqk",
        "einsum bhkq",
        "SDPA",
        "bmm, heads behind the batch",
        "bmm, heads before the batch",
        "baddbmm, heads behind the batch",
        "baddbmm, heads before the batch",
        "loop over heads",
        "queries in chunks",
        "values first, weights transposed",
        "values first, softmax over the rows",
        "products summed",
    ),
    "softmax": tuple(CHOICES["softmax"]),
    "masking": ("masked_fill", "torch.where", "after the softmax, renormalised"),
    "forbidden": ("-1e9", "-1e4", "dtype minimum"),
    "addition": ("f + x", "torch.add(x, f, alpha=)", "torch.add(f, x, alpha=)", "x.add_(f)", "x += f"),
    "state": tuple(CHOICES["state"]),
    "residuals": ("in the model's loop",),
    "stream": ("token first",),
    "route": tuple(CHOICES["route"]),
    "norm_home": tuple(CHOICES["norm_home"]),
    "norm": ("F.layer_norm, with a gain", "layer norm by hand"),
    "signature": tuple(CHOICES["signature"]),
}


@pytest.mark.parametrize("piece", WRITTEN_OTHERWISE)
def test_the_same_block_written_otherwise_has_the_same_truth(piece: str) -> None:
    """Pieces that are only ways of writing leave everything as it is: outputs, truths, and what every removal leaves."""
    reference = plain(norm="nn.LayerNorm")
    (batch,) = reference.batches
    truth, parts = reference.truth(batch), [(), *((part,) for part in PARTS), ("mlp", "residual")]
    outputs = [reference.without(batch, *names) for names in parts]
    for choice in WRITTEN_OTHERWISE[piece]:
        subject = same_weights(plain(**{piece: choice}), reference)
        (own,) = subject.batches
        for names, want in zip(parts, outputs, strict=True):
            got = subject.without(own, *names)
            assert apart(got.numpy(), want.numpy()) < 1e-4, f"{piece} = {choice} without {names}"
        other = subject.truth(own)
        for block, one in truth.attention.items():
            for name in ("weights", "logits", "values", "mixed", "contributions", "projected"):
                got_array, want_array = getattr(other.attention[block], name), getattr(one, name)
                assert got_array.shape == want_array.shape
                assert apart(got_array, want_array) < 1e-4, f"{piece} = {choice}: {name}"
        for got_stream, want_stream in zip(other.streams, truth.streams, strict=True):
            assert apart(got_stream, want_stream) < 1e-4, f"{piece} = {choice}"


@pytest.mark.parametrize("scale", ["fixed", "learned", "buffered"])
def test_scaled_additions_written_otherwise_are_the_same_sum(scale: str) -> None:
    for operand in ("stream_scale", "update_scale"):
        reference = plain(**{operand: scale})
        (batch,) = reference.batches
        for way in WRITTEN_OTHERWISE["addition"]:
            subject = plain(**{operand: scale}, addition=way)
            for names in ((), ("attention",), ("residual",), ("mlp-residual",), ("mlp",)):
                want = reference.without(batch, *names)
                torch.testing.assert_close(subject.without(batch, *names), want, msg=f"{operand}, {way}, {names}")


def test_torchs_own_layer_written_out_is_that_layer() -> None:
    for placement in ("pre", "post"):
        for stream in ("batch first", "token first"):
            pieces = {
                "attention": "nn.MultiheadAttention",
                "placement": placement,
                "stream": stream,
                "masking": "boolean",
            }
            subject = plain(residuals="in nn.TransformerEncoderLayer", **pieces)
            (batch,) = subject.batches
            torch.testing.assert_close(subject.without(batch, "none of the parts"), subject.run(batch))


def same_weights(subject: Drawn, reference: Drawn) -> Drawn:
    """`subject` with the weights of `reference`, by their order: other ways of writing give them other names."""
    mine, theirs = (sorted((tuple(p.shape), n, p) for n, p in d.model.named_parameters()) for d in (subject, reference))
    assert [shape for shape, *_ in mine] == [shape for shape, *_ in theirs]
    with torch.no_grad():
        for (*_, p), (*_, q) in zip(mine, theirs, strict=True):
            p.copy_(q)
    return subject


def test_the_same_seed_is_the_same_model() -> None:
    first, again = drawn(7), drawn(7)
    assert first.spec == again.spec
    assert torch.equal(first.run(first.batches[0]), again.run(again.batches[0]))
    assert len({specification(seed).pieces["attention"] for seed in range(400)}) == len(CHOICES["attention"])


def test_any_piece_can_be_put_back() -> None:
    for seed in range(50):
        spec = specification(seed)
        for name, choice in odd_pieces(spec).items():
            plainer = reconciled(dataclasses.replace(spec, **{name: next(iter(CHOICES[name]))}))
            subject = drawn(plainer)
            assert bool(subject.run(subject.batches[0]).isfinite().all()), f"seed {seed}: {name} was {choice}"


def test_a_fault_is_reduced_to_the_piece_that_makes_it() -> None:
    spec = next(s for s in map(specification, range(999)) if s.gate == "per head" and len(odd_pieces(s)) > 6)
    smaller = reduced(spec, lambda s: s.gate == "per head")
    assert list(odd_pieces(smaller)) == ["gate"]


def test_references_know_what_is_known_by_hand() -> None:
    cloud = site_reference(np.diag([3.0, 3.0, 3.0, 0.0]))
    assert cloud["effective_rank"] == pytest.approx(3.0)
    assert cloud["participation_ratio"] == pytest.approx(3.0)
    assert site_reference(np.array([[2.0, 1.0], [2.0, -1.0]]))["consensus_distance"] ** 2 == pytest.approx(0.2)


def test_a_model_is_described_on_a_screen() -> None:
    text = described(specification(3))
    assert len(text.splitlines()) < 40
    assert "seed 3" in text


def test_counts_add_up_and_go_between_markers(tmp_path: Path) -> None:
    models = [Comparison(seed, specification(seed).pieces) for seed in range(3)]
    for model, verdict in zip(models, ("right", "unavailable", "wrong"), strict=True):
        model.add("attention.0.1.entropy", verdict, "a reason 0.5")
    lines = [counting.line_of(model) for model in models]
    assert "| all | 3 | 1 | 1 | 0 | 1 |" in counting.table(lines)
    assert "| attention.entropy | 1 | 0 | 1 | 0 |" in counting.by_item(lines)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{counting.BEGIN}\nold\n{counting.END}\nafter\n")
    counting.put_between_markers(page, counting.table(lines))
    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")


# The package ---------------------------------------------------------------------------------------------------------------


def test_a_plain_model_is_right_throughout() -> None:
    result = compared(plain().spec)
    assert result.verdict == "right", [item for item in result.items if item.verdict != "right"]
    assert len(result.items) > 60


def test_what_removes_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uc, "without", lambda *_, **__: contextlib.nullcontext())
    items = {item.name: item for item in compared(plain().spec).items}
    for part in PARTS:
        assert items[f"without.{part}"].verdict == "wrong", part
        assert "nothing was removed" in items[f"without.{part}"].detail


def test_what_removes_another_part_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    own = uc.without
    monkeypatch.setattr(uc, "without", lambda model, *_, **given: own(model, "residual", **given))
    items = {item.name: item.verdict for item in compared(plain().spec).items}
    assert items["without.residual"] == "right"
    assert all(items[f"without.{part}"] == "wrong" for part in PARTS if part not in {"residual", "positions"})


@pytest.mark.parametrize("figure", ["entropy", "key_share", "max_logit", "value_contraction"])
def test_a_figure_that_is_off_or_silently_missing_is_wrong(figure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = uc.diagnose

    def spoilt(*given: object, **named: object) -> object:
        found = own(*given, **named)  # type: ignore[arg-type]
        first, second, third, *rest = found.record.attention
        statistic = getattr(first, figure)
        off = dataclasses.replace(statistic, mean=statistic.mean + 1e-3)
        missing = {figure: None, "unavailable": {}}
        explained = {figure: None, "unavailable": {figure: "a reason"}}
        heads = [dataclasses.replace(first, **{figure: off}), dataclasses.replace(second, **missing)]
        heads += [dataclasses.replace(third, **explained), *rest]
        return dataclasses.replace(found, record=dataclasses.replace(found.record, attention=heads))

    monkeypatch.setattr(uc, "diagnose", spoilt)
    items = {item.name: item.verdict for item in compared(plain().spec).items}
    assert [items[f"attention.0.{head}.{figure}"] for head in range(3)] == ["wrong", "wrong", "unavailable"]


def test_an_exception_that_is_no_refusal_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(uc, "diagnose", broken)
    assert compared(plain().spec).verdict == "wrong"


@pytest.mark.parametrize(  # under autocast and in half precision roundings grow most
    ("seed", "dtype"), [(0, "float32"), (30, "float32"), (110, "bfloat16"), (110, "float16")]
)
def test_a_removal_that_removed_nothing_is_found_however_wide_the_tolerance(
    seed: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truths = comparing._truths_twice
    monkeypatch.setattr(comparing, "_truths_twice", lambda subject, _: truths(subject, ()))
    spec = dataclasses.replace(specification(seed), dtype=dtype)
    inside = [item for item in compared(spec).items if item.name.startswith(("inside without", "ablate"))]
    assert sum(item.verdict == "wrong" for item in inside) > len(inside) / 4


def test_an_embedding_that_is_mixed_with_itself_may_begin_before_or_behind_that() -> None:
    """In the model's own loop nobody can say which: a·x + b·x is the cloud of x but for its roundings, which bfloat16 shows."""
    spec = dataclasses.replace(specification(4700), dtype="bfloat16")
    wrong = [item for item in compared(spec).items if item.verdict == "wrong"]
    assert not wrong
    subject = drawn(spec)
    (batch,) = subject.batches
    truth = subject.truth(batch)
    assert truth.begun is not None
    assert 0 < apart(truth.begun / 1.2, truth.streams[0]) < 2**-7


# Faults that are known, each with its cause; they would be listed in docs/what-is-proved.md too. None may be added.
KNOWN_FAULTS: dict[int, str] = {}
MOST_NOT_READ = 5  # of the 9 to 15 models in a chunk that should be read: one more than any chunk has; the aim is one


# Half of them run by default, the others with the slow tests.
@pytest.mark.parametrize(
    "chunk", [c if c < CHUNKS // 2 else pytest.param(c, marks=pytest.mark.slow) for c in range(CHUNKS)]
)
def test_no_figure_and_no_removal_is_silently_wrong(chunk: int) -> None:
    results = [compared(seed) for seed in range(chunk * SEEDS, (chunk + 1) * SEEDS)]
    known = [r for r in results if r.seed in KNOWN_FAULTS]
    assert [r.seed for r in known if r.verdict != "wrong"] == [], "mended: take it off the list of known faults"
    others = [r for r in results if r.seed not in KNOWN_FAULTS]
    wrong = [f"seed {r.seed}: {i.name}: {i.detail}" for r in others for i in r.items if i.verdict == "wrong"]
    assert not wrong, "\n".join(wrong[:20])
    to_be_read = [r for r in results if specification(r.seed).is_to_be_read]
    not_read = [r.seed for r in to_be_read if r.verdict != "right"]
    assert len(not_read) <= MOST_NOT_READ, f"refused, or not wholly measured: seeds {not_read}"


@pytest.mark.parametrize(
    ("seed", "dtype", "class_of_fault"),
    [
        (
            4315,
            "float32",
            "a square mask that comes first was taken for the sequences, so that one sequence hid which axis holds them",
        ),
        (4941, "float32", "a gate that hardly varies was one matrix to the rounding of autocast"),
        (4947, "bfloat16", "the same in half precision, with a sink and an adapter"),
        (4599, "float32", "a mask of -100 leaves pairs some share of a row that a sink takes"),
        (10042, "float32", "the same without a sink, in some rows and heads only"),
        (
            10082,
            "float32",
            "the model's own roundings, without its norms, are more than the tolerance: the study's fault",
        ),
        (10027, "float32", "queries in chunks, more of them than on the example"),
        (
            10071,
            "float32",
            "a beginning of the model's own is no token, and stays where it is when tokens are permuted",
        ),
        (10148, "float32", "a mask says nothing of a beginning of the model's own"),
        (10305, "float32", "a fused call's key of zeros is never padding"),
        (30602, "float64", "a mask that forbids nothing was replaced by one that lies otherwise: other last digits"),
        (
            36653,
            "float32",
            "token numbers and a float mask with other axes: some sequences of the example were all padding",
        ),
        (31115, "bfloat16", "behind a renormalisation a hidden key still moves last digits, in half precision many"),
        (37344, "float32", "the same under autocast, where the stream is float32"),
        (
            70643,
            "float64",
            "a softmax in single precision moves last digits of a model in double behind a renormalisation",
        ),
        (72427, "float64", "the same with heads mixed before the softmax"),
        (105726, "float16", "the same where a projection spreads the digits that are lost over small features"),
        (105668, "float16", "a poked stream lay otherwise in memory, and all sequences moved by a rounding"),
        (30055, "float32", "a square mask was cut to a few rows, as if it held one for each sequence"),
        (
            35779,
            "float32",
            "heads mixed behind the softmax: where all logits are equal they seemed to explain the weights",
        ),
        (40478, "float32", "a fused call's mask and bias, joined in the attention's own code: refused"),
        (63019, "float32", "the same of what baddbmm adds to its product"),
        (37272, "float64", "weights beside a sink that a fused call never makes underflow only in the study's truth"),
        (120241, "float32", "behind a renormalisation a hidden key moved last digits, in single precision too"),
        (120319, "float64", "of two factors behind a norm and before a sum both were taken for the sum's"),
        (123704, "float32", "a largest logit near 0 is rounded beside large ones: the study's fault"),
        (157833, "float32", "rows whose weights are NaN had a rest entropy, from their logits"),
        (156419, "bfloat16", "weights of mixed heads that sum to 1.03 by chance were taken for a distribution"),
        (149758, "float16", "digits that a hidden key had cost the weights were taken for hearing it"),
        (127012, "float16", "weights that have all underflowed have no rest entropy: the study's fault"),
    ],
)
def test_what_was_wrong_or_refused_once_is_right(seed: int, dtype: str, class_of_fault: str) -> None:
    result = compared(dataclasses.replace(specification(seed), dtype=dtype))
    assert result.verdict == "right", class_of_fault


def test_a_square_mask_beside_one_sequence_that_comes_second_is_cut_along_both_axes() -> None:
    """Cut to one column it forbade nothing, and the model was called bidirectional."""
    assert compared(147771).verdict == "unavailable"  # the second batch has more sequences than the proof saw


def test_a_row_without_any_weight_has_no_susceptibility_and_the_others_have() -> None:
    """Behind the softmax a causal mask takes all that a row had in float16. Only the study was wrong."""
    assert compared(dataclasses.replace(specification(129550), dtype="float16")).verdict == "unavailable"


def test_a_model_that_gives_no_number_by_itself_is_asked_in_single_precision() -> None:
    assert not bool(drawn(specification(124654)).run(drawn(specification(124654)).batches[0]).isfinite().all())
    assert compared(124654).verdict == "right"


def test_an_operation_that_is_another_one_in_a_longer_text_is_no_traceback() -> None:
    """Queries in chunks behind a gate: in the second batch there are more, and the gate's place holds another product."""
    assert compared(dataclasses.replace(specification(40463), dtype="float32")).verdict == "unavailable"


def test_rows_whose_weights_underflow_are_not_counted_and_say_why() -> None:
    """Once they counted in the floor of the entropy. Logits this steep hide pairs as thoroughly as a mask that was overlooked."""
    result = compared(dataclasses.replace(specification(37503), dtype="float32"))
    assert result.verdict == "unavailable"
    assert all("nothing was seen to forbid" in item.detail for item in result.items if item.verdict != "right")


def test_a_batch_is_run_as_it_lies_in_memory() -> None:
    """A copy in another order is rounded otherwise in half precision, and is not the user's own pass."""
    assert compared(dataclasses.replace(specification(43099), dtype="bfloat16")).verdict == "right"


def test_a_removal_is_compared_with_the_meaning_that_it_has_also_where_that_overflows() -> None:
    """The factor right behind an output norm is its gain here, and without the two the weights of some rows are all 0."""
    subject = drawn(dataclasses.replace(specification(73595), dtype="float32"))
    truths, result = [subject.truth(batch) for batch in subject.batches], Comparison(73595, {})
    with_scale, without_scale = (
        [subject.without(batch, *names) for batch in subject.batches] for names in (("norm",), ("norm", "update-scale"))
    )
    assert all(bool(t.isfinite().all()) for t in with_scale)
    assert not any(bool(t.isfinite().all()) for t in without_scale)
    comparing._compare_without(subject, truths, ("norm",), None, result)
    assert [item.verdict for item in result.items] == ["right"]


def test_what_overflows_in_one_of_two_outputs_is_no_agreement() -> None:
    whole, real = np.ones((2, 3, 4)), np.ones((2, 3), bool)
    some = whole.copy()
    some[0, 1, 2] = np.nan
    assert comparing._apart(some, some, real) == 0
    assert comparing._apart(1.5 * some, some, real) == pytest.approx(0.5)
    assert comparing._apart(some, whole, real) == comparing._apart(whole, some, real) == math.inf
    real[0, 1] = False
    assert comparing._apart(some, whole, real) == 0


def test_torchs_own_attention_is_compared_as_it_is_measured() -> None:
    """In evaluation mode it is one fused call, into which nobody can look: bfloat16 shows the other order of roundings."""
    subject = drawn(dataclasses.replace(specification(71774), dtype="bfloat16"))
    truths = [subject.truth(batch) for batch in subject.batches]
    record = uc.diagnose(subject.model, batches=[dict(batch) for batch in subject.batches]).record
    result = Comparison(71774, {})
    comparing._compare_sites(subject.spec, truths, record, result)
    comparing._compare_written_out(subject, truths, result)
    assert [item.name for item in result.items[-2:]] == ["written out"] * 2
    assert {item.verdict for item in result.items} == {"right"}


def test_a_run_that_is_written_out_more_coarsely_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = drawn(dataclasses.replace(specification(71774), dtype="bfloat16"))

    @contextlib.contextmanager
    def coarse() -> Iterator[None]:
        hook = subject.model.register_forward_hook(lambda _, __, output: output * (1 + 2**-4))
        with written_out():
            yield
        hook.remove()

    monkeypatch.setattr(comparing, "written_out", coarse)
    result = Comparison(71774, {})
    comparing._compare_written_out(subject, [subject.truth(batch) for batch in subject.batches], result)
    assert [item.verdict for item in result.items] == ["wrong", "wrong"]


@pytest.mark.parametrize(
    ("seed", "dtype", "class_of_fault"),
    [
        (60021, "float32", "padded tokens counted in the mean, where the mask was not called attention_mask"),
        (60026, "float64", "the mean was taken over the sequences, where tokens come first"),
    ],
)
def test_how_far_an_output_turns_is_asked_of_its_real_tokens(seed: int, dtype: str, class_of_fault: str) -> None:
    result = Comparison(seed, {})
    comparing._compare_ablation(drawn(dataclasses.replace(specification(seed), dtype=dtype)), result)
    found = {item.name.rpartition(" ")[2]: item.verdict for item in result.items}
    assert found["output_shift"] == "right", class_of_fault
