"""Several residual streams side by side, as people write them: each and all together, against what the model keeps itself."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.observing import entropies
from tests.helpers.residual_structures import (
    HYPER_CONNECTED,
    STREAMS,
    WIDTH,
    HyperConnected,
    HyperConnections,
    left_out,
)
from tests.reference.geometry import consensus_distance, effective_rank
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.records.diagnosis import DiagnosisRecord

EPS = 2.0**-23
written = pytest.mark.parametrize("name", HYPER_CONNECTED)


def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))


def diagnosed(model: nn.Module, **options: str) -> DiagnosisRecord:
    return uc.diagnose(model.eval(), batches=[{"idx": tokens()}], **options).record  # type: ignore[arg-type]


def kept(model: HyperConnected) -> list[np.ndarray]:
    """The model's own streams, [sequence, token, stream, width], at the embedding and behind each block."""
    model.seen.clear()
    with torch.no_grad():
        model(tokens())
    return [stream.double().numpy() for stream in model.seen]


@written
def test_each_stream_is_measured_and_all_together(name: str) -> None:
    model = HYPER_CONNECTED[name]()
    record, streams = diagnosed(model, level="full"), kept(model)
    assert len(record.trajectory) == len(streams)
    assert record.model.width == WIDTH
    for site, own in zip(record.trajectory, streams, strict=True):
        together = own.reshape(*own.shape[:2], -1)
        clouds = [(site, together), *((each, own[:, :, each.stream]) for each in site.streams)]
        assert len(clouds) == 1 + STREAMS
        for figures, cloud in clouds:
            for measure, reference in (("consensus_distance", consensus_distance), ("effective_rank", effective_rank)):
                expected = np.mean([reference(x, EPS) for x in cloud])
                assert getattr(figures, measure).mean == pytest.approx(expected, rel=1e-4), (site.site, measure)
    assert record.anatomy is not None
    assert not record.anatomy.not_measured
    assert record.model.norm_placement == "pre"  # the norm that mixing weights are made behind is none of a sublayer


@written
def test_attention_is_that_of_what_the_sublayer_read(name: str) -> None:
    model = HYPER_CONNECTED[name]().eval()
    weights: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)
        q, k, _ = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in module.get_submodule("qkv")(given[0]).chunk(3, -1))
        later = torch.ones(9, 9).triu(1).bool()
        weights.append((q @ k.mT / 8**0.5).masked_fill(later, -torch.inf).softmax(-1))

    hooks = [module.register_forward_hook(note) for n, module in model.named_modules() if n.endswith("attention")]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    record = diagnosed(model)
    for head in record.attention:
        assert head.entropy is not None
        assert head.entropy.mean == pytest.approx(entropies(weights[head.block], None)[0][head.head], abs=5e-6)
    for own, output in zip(uc.head_contributions(model, {"idx": tokens()}), outputs, strict=True):
        assert torch.allclose(own.contributions.sum(2) + own.bias, output, atol=1e-6)


@written
@pytest.mark.parametrize("gone", [("mlp",), ("attention",)], ids="+".join)
def test_a_sublayer_is_left_out_and_the_streams_are_mixed_as_before(name: str, gone: tuple[str, ...]) -> None:
    model, batch = HYPER_CONNECTED[name]().eval(), {"idx": tokens()}
    whole, expected = left_out(model, batch, gone)
    with torch.no_grad():
        with uc.without(model, *gone, batch=batch):
            got = model(**batch)
        assert torch.equal(model(**batch), whole)
    assert torch.equal(got, expected)
    assert not torch.equal(got, whole)


@written
def test_a_removed_norm_is_the_identity_and_the_mixing_weights_keep_theirs(name: str) -> None:
    model, batch = HYPER_CONNECTED[name]().eval(), {"idx": tokens()}
    with torch.no_grad(), uc.without(model, "norm", batch=batch):
        got = model(**batch)
    for block in model.blocks:
        block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    with torch.no_grad():
        assert torch.equal(got, model(**batch))


def test_without_the_residual_what_a_sublayer_writes_goes_on_alone() -> None:
    model, batch = HyperConnected().eval(), {"idx": tokens()}
    with torch.no_grad():
        with uc.without(model, "residual", batch=batch):
            got = model(**batch)
        for block in model.blocks:
            block.mix.zero_()
        assert torch.equal(got, model(**batch))


class Unmixed(HyperConnections):
    """Written to and read together, and not mixed on their way: no grid of tokens."""

    def forward(self, h: Tensor) -> Tensor:
        for sublayer in (self.attend, self.think):
            h = h + self.write[:, None] * sublayer(h.sum(2))[:, :, None]
        return h


def test_streams_that_are_not_mixed_are_no_tokens() -> None:
    record = diagnosed(HyperConnected(Unmixed))
    assert record.anatomy is not None
    axes = record.anatomy.blocks[0].axes
    assert axes is not None
    assert (axes.sequence, axes.token, axes.streams, axes.width) == (0, [1], 2, 3)
    assert [len(site.streams) for site in record.trajectory] == 4 * [STREAMS]


# What is no mixture of streams ------------------------------------------------------------------------------------------


class Saturating(HyperConnections):
    def mixed(self, h: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("mn,btnd->btmd", self.mix, h))

    def forward(self, h: Tensor) -> Tensor:
        for sublayer in (self.attend, self.think):
            update = sublayer(torch.einsum("n,btnd->btd", self.read, h))
            h = self.mixed(h) + self.write[:, None] * update[:, :, None]
        return h


class OtherWeightsForEveryFeature(Saturating):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.rand(STREAMS, STREAMS, WIDTH))

    def mixed(self, h: Tensor) -> Tensor:
        return torch.einsum("mnd,btnd->btmd", self.own, h)


class AlmostTheSameWeights(OtherWeightsForEveryFeature):
    """Weights that differ by up to a third from feature to feature."""

    def mixed(self, h: Tensor) -> Tensor:
        return torch.einsum("mnd,btnd->btmd", self.mix[..., None] * (1 + 0.3 * self.own), h)


class FeaturesAmongEachOther(Saturating):
    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def mixed(self, h: Tensor) -> Tensor:
        return torch.einsum("mn,btnd->btmd", self.mix, torch.einsum("de,btne->btnd", self.turned, h))


class WeightsFromEarlierTokens(Saturating):
    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Parameter(torch.randn(WIDTH, STREAMS * STREAMS))

    def mixed(self, h: Tensor) -> Tensor:
        return torch.tanh(h.mean(2).cumsum(1) @ self.made).unflatten(-1, (STREAMS, STREAMS)) @ h


class TensorsOfTheirOwn(Saturating):
    def forward(self, h: Tensor) -> Tensor:
        several = list(h.unbind(2))
        for sublayer in (self.attend, self.think):
            update = sublayer(several[0] + several[1])
            several = [
                sum(self.mix[i, j] * x for j, x in enumerate(several)) + self.write[i] * update for i in range(STREAMS)
            ]
        return torch.stack(several, 2)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Saturating, "several streams side by side"),
        (OtherWeightsForEveryFeature, "by the same weights for every feature"),
        (FeaturesAmongEachOther, "by the same weights for every feature"),
        (WeightsFromEarlierTokens, "no token's streams reach those of another"),
        (TensorsOfTheirOwn, "several streams side by side"),
    ],
)
def test_anything_else_is_refused(block: type[HyperConnections], reason: str) -> None:
    with pytest.raises(uc.UnsupportedModel) as caught:
        proved_anatomy(HyperConnected(block).eval(), {"idx": tokens()})
    assert reason in caught.value.identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixing_is_told_from_almost_mixing_in_every_precision(dtype: torch.dtype) -> None:
    with pytest.raises(uc.UnsupportedModel, match="by the same weights for every feature"):
        proved_anatomy(HyperConnected(AlmostTheSameWeights).eval().to(dtype), {"idx": tokens()})
    for name in ("folded", "manifold-constrained"):
        assert proved_anatomy(HYPER_CONNECTED[name]().eval().to(dtype), {"idx": tokens()}).blocks


# Shown ------------------------------------------------------------------------------------------------------------------


def test_terminal_and_page_show_each_stream(tmp_path: Path) -> None:
    found = uc.diagnose(HYPER_CONNECTED["folded"]().eval(), batches=[{"idx": tokens()}])
    console = Console(file=io.StringIO(), width=120, color_system=None)
    found.show(console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "several streams side by side, sequence × stream × token × width" in " ".join(said.split())
    site = found.record.trajectory[2]
    second = site.streams[1].consensus_distance
    assert second is not None
    assert any("stream 2" in line for line in said.splitlines())
    assert f"{second.mean:.3g}"[:5] in said
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Each of the streams side by side" in page
    assert 'id="site-1-stream-2"' in page
