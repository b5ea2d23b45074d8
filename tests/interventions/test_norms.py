"""Norms by what they do: module or not, found in every place, measured, and taken out exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody writes

import uncollapse as uc
from tests.helpers.norm_models import WRITTEN, Attention, Conditioned, D, Mlp, OwnForward, Stack, ids
from uncollapse.anatomy.norm_reading import kind_of, pieces_between
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.replaying import NotReplayable, replayed
from uncollapse.anatomy.tracing import trace
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.interventions import overlooked_norms
from uncollapse.interventions import without as interventions
from uncollapse.interventions.without import COMPONENTS, require_effect
from uncollapse.probe.sublayers import norm_records
from uncollapse.report.ablation import wording

PLACEMENTS = {"pre": 2, "post": 2, "sandwich": 4, "output": 2, "parallel": 1}  # and the norms of a block


def checked(model: Any, batch: dict[str, Tensor], blocks: Any = "all+outer") -> Anatomy:
    """The model without its norms is, in every bit, its own forward without them; and afterwards what it was."""
    model.eval()
    with torch.no_grad():
        plain = model(**batch)
        anatomy = proved_anatomy(model, batch)
        with uc.without(model, "norm", blocks=blocks):
            got = model(**batch)
        assert torch.equal(model(**batch), plain)
        model.off = True
        assert torch.equal(got, model(**batch))
        model.off = False
    return anatomy


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_norm_that_is_no_module_is_found_and_taken_out(placement: str, written: str) -> None:
    torch.manual_seed(0)
    kind, norm = WRITTEN[written]
    anatomy = checked(Stack(placement, norm, outer=True), {"input_ids": ids()})
    assert anatomy.norm_placement == ("pre, parallel" if placement == "parallel" else placement)
    for block in anatomy.blocks:
        assert [n.kind for n in block.norms] == [kind] * PLACEMENTS[placement]
    assert len(anatomy.outer_norms) == 2


def test_norms_applied_twice_are_two_norms() -> None:
    torch.manual_seed(0)
    anatomy = checked(
        Stack("pre", lambda x, p: F.rms_norm(F.layer_norm(x, (D,), p.scale, p.shift), (D,), p.scale)),
        {"input_ids": ids()},
    )
    assert [n.kind for n in anatomy.blocks[0].norms] == ["layer", "rms"] * 2


@pytest.mark.parametrize("style", ["module", "outside", "zero start", "film", "rms"])
def test_a_condition_s_scale_and_shift_belong_to_its_norm(style: str) -> None:
    torch.manual_seed(0)
    anatomy = checked(Conditioned(style), {"input_ids": ids(), "label": torch.tensor([1, 2, 3])})
    assert [(n.role, n.place) for n in anatomy.blocks[0].norms] == [("before", 0), ("before", 1)]
    assert [n.module.name for n in anatomy.blocks[0].norms] == (
        ["blocks.0.first", "blocks.0.second"] if style == "module" else ["blocks.0"] * 2
    )


def test_the_shift_of_a_conditioned_output_norm_goes_with_its_norm_and_with_its_sublayer() -> None:
    torch.manual_seed(0)
    model, batch = Conditioned("behind").eval(), {"input_ids": ids(), "label": torch.tensor([1, 2, 3])}
    anatomy = checked(model, batch)
    assert anatomy.norm_placement == "output"
    assert [len(r.additions) for b in anatomy.blocks for r in b.residuals] == [1, 1] * 2
    with torch.no_grad(), uc.without(model, "mlp", "attention"):
        expected = model.embedding(batch["input_ids"]) * (1 - 0.4) ** 2
        torch.testing.assert_close(model(**batch), model.head(expected))


class HeadsApart(nn.Module):
    """Many heads, each a module of its own with three products before the two that mix."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(D, 4) for _ in range(3)) for _ in range(8))
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        mixed = []
        for head in self.heads:
            q, k, v = (one(x) for one in head)
            mixed.append((q @ k.mT * 0.5).softmax(-1) @ v)
        return self.out(torch.cat(mixed, -1))


class ExpertsAddedUp(nn.Module):
    """Many experts, added up one by one: between the first of them and what comes behind the sublayer is a long way."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(Mlp() for _ in range(30)), nn.Linear(D, 30)

    def forward(self, x: Tensor) -> Tensor:
        weights, total = self.router(x).softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            total = total + weights[..., number, None] * expert(x)
        return total


@pytest.mark.parametrize("placement", ["sandwich", "output"])
def test_a_norm_behind_a_sublayer_of_many_products_is_found_and_taken_out(placement: str) -> None:
    torch.manual_seed(0)
    model = Stack(placement, WRITTEN["layer_norm"][1])
    model.blocks[0].attention, model.blocks[0].mlp = HeadsApart(), ExpertsAddedUp()
    anatomy = checked(model, {"input_ids": ids()})
    assert anatomy.norm_placement == placement
    assert [n.place for n in anatomy.blocks[0].norms if n.role == "after"] == [0, 1]


class MixedAgain(nn.Module):
    """Post-norm blocks in the model's own loop, each of which takes the embedding in again."""

    def __init__(self) -> None:
        super().__init__()
        self.off, self.without_mlp, self.left = False, False, list[Tensor]()
        self.embedding = nn.Embedding(50, D)
        self.layers = nn.ModuleList(nn.ModuleDict(_parts()) for _ in range(2))
        self.share = nn.Parameter(torch.tensor([0.9, 0.3]))

    def norm(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = embedded = self.embedding(input_ids)
        self.left.clear()
        for layer in self.layers:
            x = self.share[0] * x + self.share[1] * embedded
            x = self.norm(x + layer["attention"](x))
            if not self.without_mlp:
                x = self.norm(x + layer["mlp"](x))
            self.left.append(x.detach().clone())
        return x


def test_the_share_of_a_norm_s_result_in_a_later_sum_is_no_gain_of_it() -> None:
    torch.manual_seed(0)
    model, batch = MixedAgain(), {"input_ids": ids()}
    anatomy = checked(model, batch)
    assert anatomy.norm_placement == "post"
    with torch.no_grad(), uc.without(model, "mlp"):
        got = model(**batch)
    model.without_mlp = True
    assert torch.equal(got, model(**batch))


class MixedAgainConditioned(MixedAgain):
    """The same with norm modules whose scale and shift a condition makes in the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.made = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)

    def norm(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        gain, shift = self.made(self.embedding.weight[:1])[None].expand(len(x), -1, -1).chunk(2, -1)
        return self.bare(x) * (1 + gain * self.first) + shift * self.first

    def forward(self, input_ids: Tensor) -> Tensor:
        self.first = (input_ids[:, :1, None] + 1.0) / 50
        return super().forward(input_ids)


def test_a_block_ends_behind_the_scale_and_shift_that_a_condition_gives_its_norm() -> None:
    torch.manual_seed(0)
    anatomy = checked(MixedAgainConditioned(), {"input_ids": ids()})
    assert [norm.piece is not None for block in anatomy.blocks for norm in block.norms] == [True] * 4


def test_a_diagnosis_without_norms_sees_what_stands_in_their_place() -> None:
    """The blocks end with a norm of the model's own code: their last operation gives what the identity puts there."""
    torch.manual_seed(0)
    model, batch = MixedAgain().eval(), {"input_ids": ids()}
    with uc.without(model, "norm", batch=batch):
        found = uc.diagnose(model, batches=[batch]).record.trajectory
    model.off = True
    model(**batch)
    expected = [float(uc.geometry.effective_rank(x.double()).mean()) for x in model.left]
    got = [site.effective_rank.mean for site in found if site.effective_rank is not None][1:]
    assert got == pytest.approx(expected, rel=1e-4)


def _parts() -> dict[str, nn.Module]:
    return {"attention": Attention(), "mlp": Mlp()}


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (D,))


def _normed_stream(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    x = norm(x + block.gain * (norm(block.attention(x)) - x))
    return norm(x + block.gain * (norm(block.mlp(x)) - x))


def _positions_behind(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + block.attention(norm(x) + block.table[: x.shape[1]])
    return x + block.mlp(norm(x))


def _rolled(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + block.attention(norm(x).roll(-2, 1)).roll(2, 1)
    return x + block.mlp(norm(x))


def _squashed(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + block.attention(norm(x))
    return x + block.mlp(0.7 * torch.tanh(norm(0.5 * x)))


def _averaged_before(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + block.attention(norm(x))
    return x + block.mlp(norm(torch.stack([x, x.roll(1, 1)]).mean(0)))


def _normed_weights(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + block.attention(norm(x))
    return x + F.gelu(F.linear(norm(x), F.normalize(block.weight, dim=-1))) @ F.normalize(block.weight, dim=0)


def _branched(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + block.attention(norm(x))
    normed = norm(x)
    return x + block.mlp(normed * block.gain + normed.roll(1, 1) * (1 - block.gain))


@pytest.mark.parametrize(
    ("forward", "roles"),
    [
        (_normed_stream, ["after", "post"] * 2),
        (_positions_behind, ["before"] * 2),
        (_rolled, ["before"] * 2),
        (_squashed, ["before"] * 2),
        (_averaged_before, ["before"] * 2),
        (_normed_weights, ["before"] * 2),
        (_branched, ["before"] * 2),
    ],
)
def test_what_stands_around_a_norm_is_none_of_it(forward: Any, roles: list[str]) -> None:
    torch.manual_seed(0)
    anatomy = checked(OwnForward(forward, _rms, _parts), {"input_ids": ids()})
    assert [n.role for n in anatomy.blocks[0].norms] == roles


def test_query_key_norms_that_are_functions_are_inner_and_stay() -> None:
    torch.manual_seed(0)
    model = Stack("pre", WRITTEN["rms_norm"][1], inner=lambda q: 4 * F.normalize(q, dim=-1))
    anatomy = checked(model, {"input_ids": ids()})
    assert [n.role for n in anatomy.blocks[0].norms] == ["before", "inner", "inner", "before"]


def test_norms_of_the_models_own_loop_are_outer_norms() -> None:
    torch.manual_seed(0)
    model = Stack("none", WRITTEN["rms_norm"][1], between=True)
    model.blocks = nn.ModuleList(
        OwnForward(lambda b, x, _: x + b.mlp(x + b.attention(x)), _rms, _parts).blocks[0] for _ in range(2)
    )
    for block in model.blocks:
        block.forward = _plain(block)  # type: ignore[method-assign]
    batch = {"input_ids": ids()}
    anatomy = checked(model, batch)
    assert [str(n) for n in anatomy.outer_norms] == [
        "rms_norm #0 in the model itself",
        "rms_norm #1 in the model itself",
    ]
    with pytest.raises(uc.UnsupportedModel, match=r"nothing of the kind.*all\+outer"), uc.without(model, "norm"):
        pass


def _plain(block: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        x = x + block.attention(x)
        return x + block.mlp(x)

    return forward


@pytest.mark.parametrize("written", ["layer by hand", "layer_norm"])
def test_a_gain_of_zero_is_taken_for_what_training_will_make_of_it(written: str) -> None:
    torch.manual_seed(0)
    model = Stack("pre", WRITTEN[written][1])
    with torch.no_grad():
        for gains in model.gains:
            gains.scale.zero_()
            gains.shift.zero_()
    anatomy = checked(model, {"input_ids": ids()})
    assert [n.kind for n in anatomy.blocks[0].norms] == ["layer"] * 2


def test_a_norm_that_changes_is_read_anew() -> None:
    torch.manual_seed(0)
    model: Any = Stack("pre", lambda x, p: p.module(x))
    model.eval()
    batch = {"input_ids": ids()}
    assert {n.kind for b in proved_anatomy(model, batch).blocks for n in b.norms} == {"layer"}
    for gains in model.gains:
        gains.module = nn.RMSNorm(D)
    assert {n.kind for b in proved_anatomy(model, batch).blocks for n in b.norms} == {"rms"}


# Measured ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_a_functional_norm_is_measured_as_its_module_would_be(placement: str) -> None:
    torch.manual_seed(0)
    functional = Stack(placement, lambda x, p: F.layer_norm(x, (D,), p.module.weight, p.module.bias)).eval()
    torch.manual_seed(0)
    modular = Stack(placement, lambda x, p: p.module(x)).eval()
    batches = [{"input_ids": ids()}]
    found, expected = (uc.diagnose(m, batches=batches, level="full").record.norms for m in (functional, modular))
    assert len(found) == len(expected) == 2 * PLACEMENTS[placement]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.brackets is not None
        assert (ours.affine_rank_before, ours.affine_rank_after, ours.brackets) == (
            theirs.affine_rank_before,
            theirs.affine_rank_after,
            theirs.brackets,
        )


def test_a_norm_written_out_has_its_ranks_and_says_why_it_has_no_brackets() -> None:
    torch.manual_seed(0)
    record = uc.diagnose(
        Stack("pre", WRITTEN["layer by hand, in place"][1]).eval(), batches=[{"input_ids": ids()}], level="full"
    ).record
    for norm in record.norms:
        assert norm.affine_rank_before is not None
        assert norm.affine_rank_after is not None
        assert norm.affine_rank_after.max <= norm.affine_rank_before.max + 1
        assert norm.brackets is None
        assert "written out" in norm.unavailable["brackets"]
    assert norm_records([]) == []


def _scaled_twice(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Both parts read one norm, each with a scale of its own, which goes with the norm."""
    normed = norm(x)
    first, second = (normed, normed) if normed is x else (normed * block.gain, normed * block.table[0])
    return x + block.attention(first) + block.mlp(second)


def test_norms_that_begin_at_one_operation_are_each_taken_out_and_each_measured() -> None:
    torch.manual_seed(0)
    model = OwnForward(_scaled_twice, _rms, _parts)
    anatomy = checked(model, {"input_ids": ids()})
    assert len({norm.where for norm in anatomy.blocks[0].norms}) == 2
    for norm in uc.diagnose(model, batches=[{"input_ids": ids()}], level="full").record.norms:
        assert norm.affine_rank_before is not None
        assert norm.affine_rank_after is not None
        assert set(norm.unavailable) == {"brackets"}


# Nothing in silence -----------------------------------------------------------------------------------------------------


def attention_only(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    return x + block.attention(x)


@pytest.mark.parametrize("component", ["mlp", "mlp-residual", "norm"])
def test_what_is_not_there_cannot_be_taken_away(component: str) -> None:
    torch.manual_seed(0)
    model = OwnForward(attention_only, _rms, lambda: {"attention": Attention()}).eval()
    batch = {"input_ids": ids()}
    proved_anatomy(model, batch)
    with pytest.raises(uc.UnsupportedModel, match=f"'{component}'.*nothing of the kind"), uc.without(model, component):
        pass
    with pytest.raises(uc.UnsupportedModel, match="nothing of the kind"):
        uc.ablate(model, batches=[batch], without=[(component,)])


def bidirectional(block: Any, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in block.attention.qkv(x).chunk(3, -1))
    x = x + block.attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.mlp(x)


def test_a_mask_that_masks_nothing_cannot_be_taken_away() -> None:
    torch.manual_seed(0)
    model = OwnForward(bidirectional, _rms, _parts).eval()
    proved_anatomy(model, {"input_ids": ids()})
    before = model(ids())
    with pytest.raises(uc.UnsupportedModel, match=r"'mask'.*same in every bit"), uc.without(model, "mask"):
        pass
    assert torch.equal(model(ids()), before)


def test_parts_that_start_at_zero_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh model's updates are zero: removing them changes nothing today, and is no reason to refuse."""
    torch.manual_seed(0)
    model = Stack("pre", WRITTEN["rms_norm"][1]).eval()
    batch = {"input_ids": ids()}
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attention.out, block.mlp.down):
                layer.weight.zero_()
                layer.bias.zero_()
        before = model(**batch)
        proved_anatomy(model, batch)
        weights = {n: id(p) for n, p in model.named_parameters()}
        for component in ("norm", "mlp", "attention"):
            with uc.without(model, component):
                assert torch.equal(model(**batch), before)
        require_effect(model, ("mlp",), None)
        monkeypatch.setattr(interventions, "without_zeros", lambda _: contextlib.nullcontext())
        with pytest.raises(uc.UnsupportedModel, match="same in every bit"):
            require_effect(model, ("mlp",), None)
        assert weights == {n: id(p) for n, p in model.named_parameters()}


def test_the_grid_leaves_out_what_cannot_be_taken_away_and_says_so() -> None:
    torch.manual_seed(0)
    model = OwnForward(bidirectional, _rms, _parts).eval()
    found = uc.ablate(model, batches=[{"input_ids": ids()}], grid=True).record
    assert [r.without for r in found.runs] == [[], ["residual"], ["mlp"], ["residual", "mlp"]]
    left_out = found.probe.options["left_out"]
    assert set(left_out) == {"norm", "norm, residual", "norm, mlp", "norm, residual, mlp"}
    assert all("nothing of the kind" in reason for reason in left_out.values())
    assert not any("norm" in v.without for v in found.verdicts)
    assert "Not run: without norm (" in wording.scope(found)
    assert set(COMPONENTS) >= {"norm", "mlp"}


# The tape ---------------------------------------------------------------------------------------------------------------


def test_the_tape_is_gone_after_the_proof_and_keeps_no_model_alive() -> None:
    model: Any = Stack("post", WRITTEN["layer by hand"][1]).eval()
    proved_anatomy(model, {"input_ids": ids()})
    alive = weakref.ref(model.gains[0].scale)
    del model
    gc.collect()
    assert alive() is None


class Written(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)


def test_a_replay_is_the_pass_with_the_source_replaced() -> None:
    x, other = torch.randn(2, 5), torch.randn(2, 5)

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        first, second = y.chunk(2, 0)
        return torch.cat([second, first]).square()

    recorded = trace(Written(forward), {"x": x})
    assert torch.equal(replayed(recorded, 0, recorded.results[0], other), forward(other))


def test_a_view_of_what_was_written_is_refused() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y[:1].add_(1)
        return y.square()

    recorded = trace(Written(forward), {"x": torch.randn(2, 5)})
    with pytest.raises(NotReplayable, match="in place"):
        replayed(recorded, 0, recorded.results[0], torch.randn(2, 5))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 3 + 1,
        lambda x: x.softmax(-1),
        torch.sigmoid,
        torch.sign,
        lambda x: torch.tanh(x) * 2 + 1,
        lambda x: F.gelu(F.layer_norm(x, (6,))).abs(),
        lambda x: x / x.sum(-1, keepdim=True),
        lambda x: torch.zeros_like(x) + x * 0,
        lambda x: 1 / x,
    ],
)
def test_what_is_no_norm_is_not_taken_for_one(function: Callable[[Tensor], Tensor]) -> None:
    recorded = trace(Written(function), {"x": torch.randn(2, 5, 6)})
    pieces = pieces_between(recorded, 0, [recorded.results[0]])
    assert [p.bare for p in pieces] == [n.index for n in recorded.nodes if n.operation == "layer_norm"]


def test_oddness_tells_a_norm_from_a_softmax() -> None:
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 6)

    def seen(f: Callable[[Tensor], Tensor]) -> str | None:
        return kind_of(f(16 * x), f(-16 * x), f(16 * y), f(-16 * y), f(16 * x + 16))

    assert seen(lambda v: F.layer_norm(v, (6,))) == "layer"
    assert seen(lambda v: F.rms_norm(v, (6,))) == "rms"
    assert seen(lambda v: v.softmax(-1)) is None
    assert seen(torch.sign) is None


@pytest.mark.parametrize(
    ("placement", "overlooked"),
    [
        ("pre", 0),
        ("pre", 1),
        ("post", 0),
        ("post", 1),
        *(("sandwich", i) for i in range(4)),
        ("output", 0),
        ("output", 1),
    ],
)
def test_a_norm_that_was_overlooked_is_not_left_in_silence(
    placement: str, overlooked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    written = "over its length" if placement == "output" else "rms by hand"
    model, batch = Stack(placement, WRITTEN[written][1]).eval(), {"input_ids": ids()}
    anatomy = proved_anatomy(model, batch)
    first, second = anatomy.blocks
    left = tuple(norm for i, norm in enumerate(second.norms) if i != overlooked)
    wrong = dataclasses.replace(anatomy, blocks=(first, dataclasses.replace(second, norms=left)))
    monkeypatch.setattr(interventions, "anatomy_for", lambda *_: wrong)
    with pytest.raises(uc.UnsupportedModel, match="a norm that was overlooked"), uc.without(model, "norm"):
        pass
    is_behind = placement == "output" or (placement == "sandwich" and overlooked % 2 == 1)
    read, added, asked, asked_behind = overlooked_norms._read, overlooked_norms._added, [], []
    monkeypatch.setattr(overlooked_norms, "_read", lambda *given: asked.append(given) or read(*given))
    monkeypatch.setattr(overlooked_norms, "_added", lambda *given: asked_behind.append(given) or added(*given))
    with overlooked_norms.asked_once():
        for _ in range(2):
            with uc.without(model, "norm", blocks=[0]):
                pass
            with pytest.raises(uc.UnsupportedModel, match="a norm that was overlooked"), uc.without(model, "norm"):
                pass
    # A refusal is found out anew.
    assert (len(asked), len(asked_behind)) == ((2 * 3, 3 + 2 * 10) if is_behind else (3 + 2 * 3, 3))
    with uc.without(model, "norm", blocks=[0]):
        pass
    assert (len(asked), len(asked_behind)) == ((3 * 3, 6 + 2 * 10) if is_behind else (4 * 3, 6))
