"""A removal on another batch than the example: other experts run there, another branch, a loop that goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody writes

import uncollapse as uc
from uncollapse.anatomy.interception import ChangedPath
from uncollapse.anatomy.proof import proved_anatomy

D, EXPERTS = 16, 12


class Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class Expert(nn.Module):
    """`way` says where its norm stands: in a module of its own, or in its own code, behind its products or before them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.up, self.down, self.norm = way, nn.Linear(D, 2 * D), nn.Linear(2 * D, D), Rms()
        self.off = False

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "none" or self.off:
            return self.down(F.gelu(self.up(x)))
        if self.way == "before":
            return self.down(F.gelu(self.up(self.norm(x))))
        if self.way == "within":
            hidden = F.gelu(self.up(x))
            return self.down(hidden / hidden.norm(dim=-1, keepdim=True))
        y = self.down(F.gelu(self.up(x)))
        return self.norm(y) if self.way == "behind" else F.rms_norm(y, (D,))


class Experts(nn.Module):
    """Each token to two experts, chosen by a router, or by the sign of its features, which no router is seen in."""

    def __init__(self, way: str, *, is_routed: bool = True, is_shared: bool = False) -> None:
        super().__init__()
        self.router, self.is_routed = nn.Linear(D, EXPERTS), is_routed
        self.experts = nn.ModuleList(Expert(way) for _ in range(EXPERTS))
        self.shared = Rms() if is_shared else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        if self.is_routed:
            weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        else:
            bits = (rows[:, :4] > 0).long() @ torch.tensor([8, 4, 2, 1])
            chosen, weights = (bits % EXPERTS)[:, None], rows.new_ones(len(rows), 1)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at, place = (chosen == number).nonzero(as_tuple=True)
            if len(at):
                y = expert(rows[at])
                if self.shared is not None and not expert.off:
                    y = self.shared(y)
                total = total.index_add(0, at, y * weights[at, place, None])
        return total.view(x.shape)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        weights = (q @ k.mT / 2).masked_fill(later, -math.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module], way: str = "") -> None:
        super().__init__()
        self.attention, self.long, self.mlp, self.norm, self.way = Attention(), Attention(), mlp(), Rms(), way

    def forward(self, x: Tensor) -> Tensor:
        is_long = x.shape[1] > 12
        x = x + (self.long if self.way == "attention" and is_long else self.attention)(self.norm(x))
        for _ in range(x.shape[1] // 4 if self.way == "loop" else 1):
            x = x + self.mlp(x)
        return x


class Model(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module], way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, D)
        self.blocks = nn.ModuleList(Block(mlp, way) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def ids(tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(64, (3, tokens), generator=torch.Generator().manual_seed(seed))


def without_norms(model: Model) -> Model:
    bare: Any = copy.deepcopy(model)
    for block in bare.blocks:
        block.norm = nn.Identity()
        for expert in block.mlp.experts:
            expert.off = True
    return bare


@pytest.mark.parametrize("way", ["behind", "before", "in its own code", "shared"])
def test_the_norms_of_experts_go_that_did_not_run_on_the_example(way: str) -> None:
    model = Model(lambda: Experts("none" if way == "shared" else way, is_shared=way == "shared")).eval()
    anatomy = proved_anatomy(model, {"input_ids": ids(9)})
    ran = {name for name, _ in anatomy.paths}
    assert any(f"blocks.0.mlp.experts.{i}" not in ran for i in range(EXPERTS))  # else nothing is asked here
    with torch.no_grad():
        whole = model(ids(40))
        expected = without_norms(model)(ids(40))
        with uc.without(model, "norm"):
            torch.testing.assert_close(model(ids(40)), expected)
        assert torch.equal(model(ids(40)), whole)


@pytest.mark.parametrize("way", ["behind", "before", "in its own code"])
def test_an_unseen_expert_whose_norm_would_stay_is_named(way: str) -> None:
    """No router is found, so that nothing can be asked of the experts before they run."""
    model = Model(lambda: Experts(way, is_routed=False)).eval()
    batch = {"input_ids": ids(9)[:, :1].repeat(1, 9)}
    proved_anatomy(model, batch)
    with (
        torch.no_grad(),
        uc.without(model, "norm"),
        pytest.raises(uc.UnsupportedModel, match=r"mlp\.experts\.\d+: it did not run .* and holds a norm"),
    ):
        model(ids(40))
    plain = model(ids(40))
    with torch.no_grad(), uc.without(model, "attention"):
        assert not torch.equal(model(ids(40)), plain)


@pytest.mark.parametrize("way", ["none", "within"])
def test_an_unseen_expert_without_a_norm_of_the_kind_may_run(way: str) -> None:
    model = Model(lambda: Experts(way, is_routed=False)).eval()
    batch = {"input_ids": ids(9)[:, :1].repeat(1, 9)}
    proved_anatomy(model, batch)
    bare: Any = copy.deepcopy(model)
    for block in bare.blocks:
        block.norm = nn.Identity()
    torch.manual_seed(3)
    with torch.no_grad(), uc.without(model, "norm"):
        before = torch.get_rng_state()
        torch.testing.assert_close(model(ids(40)), bare(ids(40)))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("component", ["mask", "head:0.1"])
def test_an_attention_that_runs_in_the_place_of_the_one_that_was_read_is_named(component: str) -> None:
    model = Model(lambda: Expert("none"), "attention").eval()
    with torch.no_grad():
        whole = model(ids(20))
        with uc.without(model, component, batch={"input_ids": ids(9)}):
            model(ids(9))
            with pytest.raises(uc.UnsupportedModel, match=r"blocks\.0\.long: it did not run .* and holds an attention"):
                model(ids(20))
        with uc.without(model, "mlp"):
            assert not torch.equal(model(ids(20)), whole)
        assert torch.equal(model(ids(20)), whole)


@pytest.mark.parametrize("tokens", [7, 12])
def test_a_loop_that_adds_more_or_less_often_is_not_taken_for_the_one_that_was_read(tokens: int) -> None:
    model = Model(lambda: Expert("none"), "loop").eval()
    batch = {"input_ids": ids(9)}
    assert len(proved_anatomy(model, batch).blocks[0].residuals) == 2  # proved on seven of its tokens
    with torch.no_grad(), uc.without(model, "mlp"):
        if tokens == 7:
            model(ids(tokens))
        else:
            with pytest.raises(ChangedPath, match="add of 3 axes in blocks"):
                model(ids(tokens))
