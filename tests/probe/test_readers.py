"""A stream is judged as the norms that read it give it on, with their own gains and shifts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, batch_for
from uncollapse.measures import geometry

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        mixed: Tensor = x + self.mlp(self.n2(x))
        return mixed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, WIDTH), nn.RMSNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed


def model() -> Any:
    torch.manual_seed(0)
    return Model().eval()


BATCH = {"input_ids": torch.randint(64, (4, 20), generator=torch.Generator().manual_seed(1))}


def norms(given: Any, block: int) -> list[nn.RMSNorm]:
    """The norms that read the stream from a block on."""
    behind = [n for b in list(given.blocks)[block:] for n in (b.n1, b.n2)]
    return [*behind, given.norm]


def depth(given: Any) -> list[tuple[str, int | None]]:
    return [(f.code, f.block) for f in uc.diagnose(given, batches=[BATCH]).findings if f.code == "DEPTH-CONSENSUS"]


def with_massive_feature(given: Any) -> Any:
    """One feature holds nearly all energy from block 1 on, the same for every token."""
    with torch.no_grad():
        given.blocks[1].mlp[2].bias[0] += 100
    return given


def test_a_massive_feature_that_the_next_norms_silence_is_healthy_and_one_that_they_read_is_not() -> None:
    given = with_massive_feature(model())
    assert depth(given) == [("DEPTH-CONSENSUS", 1)]
    with torch.no_grad():
        for norm in norms(given, 2):
            norm.weight[0] = 0
            norm.weight[1:] = 20  # what the massive feature took in size
    found = uc.diagnose(given, batches=[BATCH])
    assert min(s.consensus_after_norm.mean for s in found.trajectory if s.consensus_after_norm) < 0.1
    assert depth(given) == []


def test_it_hides_no_uniform_attention() -> None:
    """The block reads different tokens, so its attention is judged."""
    given = with_massive_feature(model())
    with torch.no_grad():
        for norm in norms(given, 2):
            norm.weight[0] = 0
            norm.weight[1:] = 20
        given.blocks[3].attention.in_proj_weight[: 2 * WIDTH] = 0
    found = [
        f for f in uc.diagnose(given, batches=[BATCH]).findings if f.code == "WIDTH-UNIFORM" and f.severity != "info"
    ]
    assert 3 in {f.block for f in found}


def test_gains_that_leave_only_what_all_tokens_share_are_a_collapse() -> None:
    given = model()
    with torch.no_grad():
        given.blocks[0].mlp[2].bias[5] += 10
        for norm in norms(given, 1):
            norm.weight.fill_(0.01)
            norm.weight[5] = 1
    found = uc.diagnose(given, batches=[BATCH])
    assert min(s.consensus_after_norm.mean for s in found.trajectory if s.consensus_after_norm) > 0.2
    (finding,) = [f for f in found.findings if f.code == "DEPTH-CONSENSUS"]
    assert "as blocks." in finding.message


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neox", "vit", "t5_encoder"])
def test_readers_are_the_norms_that_read_the_stream_and_nothing_else(family: str) -> None:
    """Against the norms' own inputs and outputs, caught with hooks: a norm reads a site if its input is that stream."""
    tiny = FAMILIES[family]
    given, batch = tiny.build().eval(), batch_for(tiny, 3, 12)
    with torch.no_grad():
        for parameter in given.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    caught: list[tuple[str, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(
            lambda m, args, out, name=name: caught.append((name, args[0].clone(), out.clone()))
        )
        for name, module in given.named_modules()
        if "norm" in type(module).__name__.lower()
    ]
    with torch.no_grad():
        streams = list(given(**batch, output_hidden_states=True).hidden_states)
    for hook in hooks:
        hook.remove()
    trajectory = uc.diagnose(given, batches=[batch]).trajectory
    assert len(trajectory) == tiny.blocks + 1
    for number, site in enumerate(trajectory[:-1]):  # transformers puts the last one behind its norm
        expected = {
            name: float(geometry.consensus_distance(out).mean())
            for name, read, out in caught
            if read.shape == streams[number].shape and torch.equal(read, streams[number])
        }
        assert expected
        got = {r.norm: r.consensus.mean for r in site.readers if r.consensus is not None}
        assert got == pytest.approx(expected, rel=1e-5)
    if family == "gpt_neox":
        assert [len(site.readers) for site in trajectory[:-1]] == [2, 2, 2]  # attention and MLP, each with its own
    assert len(trajectory[-1].readers) == 1
