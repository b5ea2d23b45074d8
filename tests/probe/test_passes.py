"""Capture: single figures against their definition, restoration, memory, and inputs that cannot be told apart.

That nothing changes and every figure is right on each family of models is tested in `test_families`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers import families
from tests.helpers.observing import attention_table, eager, entropies, observe, site_table
from tests.helpers.tiny_models import FAMILIES, text_batch
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.passes import NextPass, Observations, capture
from uncollapse.probe.sites import PLAIN_MEASURES, STREAM_MEASURES


@pytest.mark.parametrize("name", ["bert", "gpt_oss"])  # in the second a sink leaves each row short of one
def test_single_head_figures_are_those_of_the_definition(name: str) -> None:
    model, batch = families.FAMILIES[name].build(), text_batch(2)
    observed = observe(model, [batch], level="full")
    with torch.no_grad():
        weights = eager(model)(**batch, output_attentions=True).attentions
    assert (weights[0].sum(-1).mean() < 0.99) == (name == "gpt_oss")
    weights = [(w / w.sum(-1, keepdim=True)).double().numpy() for w in weights]
    contraction = np.array(
        [[np.mean([np.linalg.norm(w - w.mean(0), 2) for w in layer[:, h]]) for h in range(4)] for layer in weights]
    )
    assert attention_table(observed, "contraction") == pytest.approx(contraction, rel=1e-5)
    gaps = []
    for layer in weights:
        spectra = np.linalg.svd(layer, compute_uv=False)
        gaps.append((1 - spectra[..., 1] / spectra[..., 0]).mean(0))
    assert attention_table(observed, "spectral_gap") == pytest.approx(np.array(gaps), rel=1e-5)
    assert (attention_table(observed, "value_contraction") <= contraction + 1e-6).all()


def test_energy_shares_are_those_of_each_heads_own_contribution() -> None:
    model = FAMILIES["gpt2"].build().eval()
    batch = text_batch(2)
    seen: list[Tensor] = []
    hook = model.h[1].attn.c_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    observed = observe(model, [batch])
    weight = model.h[1].attn.c_proj.weight.detach().double().numpy()
    shares = []
    for mixed in seen[0].double().numpy():
        parts = [mixed[:, 8 * h : 8 * h + 8] @ weight[8 * h : 8 * h + 8] for h in range(4)]
        energy = np.array([((p - p.mean(0)) ** 2).sum() for p in parts])
        shares.append(energy / energy.sum())
    got = [observed.attention[1].energy.summary(h)[0] for h in range(4)]
    assert got == pytest.approx(np.mean(shares, 0), rel=1e-4)


@pytest.fixture
def interrupted() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = FAMILIES["llama"].build().eval()
    return model, [text_batch(seed=s) for s in range(3)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_everything_is_restored_after_an_interruption(
    interrupted: tuple[nn.Module, list[dict[str, Tensor]]], error: type[BaseException]
) -> None:
    model, batches = interrupted
    anatomy = proved_anatomy(model, batches[0])
    with torch.no_grad():
        before = model(**batches[0])[0]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise error

    with pytest.raises(error):
        capture(model, batches, anatomy, progress=stop)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any("forward" in vars(m) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batches[0])[0], before)


def test_a_training_pass_after_an_interrupted_one_is_not_taken_for_its_end() -> None:
    """torch calls no hook after Ctrl-C."""
    model = FAMILIES["llama"].build().train()
    batch, anatomy = text_batch(), proved_anatomy(model, text_batch())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    seen = NextPass(model, anatomy, {"sites", "attention"})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    stopping = model.get_submodule("layers.1.mlp").register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    stopping.remove()
    model(**batch)
    assert (seen.is_broken, seen.is_over) == (True, False)
    seen.close()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    again = NextPass(model, anatomy, {"sites", "attention"})
    model(**batch)
    assert again.observations is not None


def test_what_is_kept_does_not_grow_with_the_corpus() -> None:
    model = FAMILIES["bert"].build().eval()

    def kept(observed: Observations) -> int:
        tensors = [t for s in observed.sites for t in (s.plain.total, s.massive.total)]
        return sum(t.numel() for t in tensors) + sum(a.values.total.numel() for a in observed.attention)

    assert kept(observe(model, [text_batch()])) == kept(observe(model, [text_batch(seed=s) for s in range(5)]))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("hidden", [slice(-2, None), slice(-1, None), slice(None, 4)])
def test_a_mask_of_another_length_than_the_tokens_inside_hides_what_it_hides(family: str, hidden: slice) -> None:
    model = FAMILIES[family].build().eval()

    class Shortens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.inner(input_ids=input_ids[:, 1:], attention_mask=attention_mask[:, 1:])

    batch = text_batch(2)
    batch["attention_mask"][0, hidden] = 0
    inner = {name: value[:, 1:] for name, value in batch.items()}
    got, expected = observe(Shortens().eval(), [batch]), observe(model, [inner])
    assert (got.sequences, got.tokens, got.max_tokens) == (expected.sequences, expected.tokens, expected.max_tokens)
    assert site_table(got) == pytest.approx(site_table(expected), nan_ok=True)


def test_not_finite_sequences_are_counted_and_the_rest_is_measured() -> None:
    model = FAMILIES["gpt2"].build().eval()
    with torch.no_grad():
        model.wte.weight[5] = math.nan
    batch = text_batch()
    batch["input_ids"][batch["input_ids"] == 5] = 6
    batch["input_ids"][1, 3] = 5
    observed = observe(model, [batch])
    assert [s.not_finite for s in observed.sites] == [1] * 4
    assert all(s.plain.summary(PLAIN_MEASURES.index("rank"))[3] == 2 for s in observed.sites)


# What the stream looks like behind a norm, and what a block hands on -----------------------------------------------------


def stream_table(observed: Observations) -> np.ndarray:
    return np.array([[s.stream.summary(i)[0] for i in range(len(STREAM_MEASURES))] for s in observed.sites])


class InPlace(nn.Module):
    """A block that adds its update to the stream it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.projection = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(x).unflatten(-1, (4, 8)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        x += self.projection(mixed)
        return x


class InPlaceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(InPlace() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "in place"])
def test_the_stream_is_compared_across_each_block_as_the_next_norm_reads_it(name: str) -> None:
    model = (InPlaceModel() if name == "in place" else FAMILIES[name].build()).eval()
    batch = text_batch(2)
    if name == "in place":
        del batch["attention_mask"]
    with torch.no_grad():
        for i, parameter in enumerate(p for n, p in model.named_parameters() if "orm" in n and p.ndim == 1):
            parameter.mul_(
                1 + i % 5
            )  # gains of different size: what a norm hands on has another norm than what it read
    blocks = [model.get_submodule(b.module.name) for b in proved_anatomy(model, batch).blocks]
    clouds: list[tuple[np.ndarray, np.ndarray]] = []
    entered: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _m, args: entered.append(args[0].clone())) for b in blocks]
    hooks += [
        b.register_forward_hook(
            lambda _m, _i, out: clouds.append(
                (entered.pop().double().numpy(), (out if isinstance(out, Tensor) else out[0]).double().numpy())
            )
        )
        for b in blocks
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    table = stream_table(observe(model, [batch]))
    for row, (before, after) in zip(table[1:], clouds, strict=True):
        apart, carried = [], []
        for x, y in zip(before, after, strict=True):
            unit = y - (0 if name == "llama" else y.mean(-1, keepdims=True))  # an RMS norm takes no mean away
            unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
            apart.append(np.linalg.norm(unit - unit.mean(0)) / math.sqrt(len(unit)))
            size = np.linalg.norm(x, axis=-1) * np.linalg.norm(y if name == "bert" else x, axis=-1)
            carried.append(np.median((x * y).sum(-1) / size))
        assert row[0] == pytest.approx(np.mean(apart), rel=1e-5)
        assert row[1] == pytest.approx(np.mean(carried), rel=1e-4)
    assert math.isnan(table[0, 1])


def test_different_tokens_are_counted_without_padding() -> None:
    batch = text_batch(2, 7)
    batch["input_ids"] = torch.tensor([[5, 5, 6, 5, 9, 9, 0], [7, 7, 7, 7, 7, 7, 7]])
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    table = stream_table(observe(FAMILIES["bert"].build().eval(), [batch]))
    assert table[0, 2] == (3 + 1) / 2
    assert np.isnan(table[1:, 2]).all()
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    assert np.isnan(stream_table(observe(FAMILIES["vit"].build().eval(), [pixels]))[:, 2]).all()


class HeadByHead(nn.Module):
    """A block that makes its weights at once, and multiplies each head's with its values by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.maps, self.output = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.logits = self.weights = torch.empty(0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.maps(self.norm(x)).chunk(3, -1))
        tokens = x.shape[1]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask[:, None, None].bool()
        self.logits = (q @ k.mT / 8**0.5).masked_fill(~allowed, -math.inf)
        self.weights = self.logits.softmax(-1)
        mixed = [self.weights[:, head] @ v[:, head] for head in range(4)]
        return x + self.output(torch.cat(mixed, -1))


class HeadByHeadModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(HeadByHead() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        return x


def test_heads_that_share_a_mask_and_a_softmax_each_know_what_is_forbidden() -> None:
    torch.manual_seed(0)
    model = HeadByHeadModel().eval()
    batch = text_batch(4, 11)
    batch["attention_mask"][1, 8:] = 0
    observed = observe(model, [batch])
    with torch.no_grad():
        model(**batch)
    expected = [entropies(block.weights, batch["attention_mask"].bool()) for block in model.blocks]
    for measure, values in zip(("entropy", "normalized_entropy"), zip(*expected, strict=True), strict=True):
        assert attention_table(observed, measure) == pytest.approx(np.array(values), abs=1e-6)
    # Of each sequence and head the largest logit of all its real tokens, and the mean of these over the sequences.
    largest = [
        torch.stack(
            [
                logits[:, real].amax((1, 2))
                for logits, real in zip(b.logits, batch["attention_mask"].bool(), strict=True)
            ]
        )
        for b in model.blocks
    ]
    assert attention_table(observed, "max_logit") == pytest.approx(
        np.array([l.mean(0).numpy() for l in largest]), abs=1e-6
    )


def test_labels_that_were_cut_from_longer_ones_are_taken() -> None:
    """T5 calls `view` on its labels, and a slice along the tokens does not lie row after row."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=64, **shape, decoder_start_token_id=0, pad_token_id=0)
    model = hf.T5ForConditionalGeneration(config).eval()
    longer = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    ids, whole = text_batch()["input_ids"], longer[:, :7].contiguous()
    figures = [
        [site.consensus.mean for site in uc.diagnose(model, batches=[{"input_ids": ids, "labels": y}]).trajectory]
        for y in (whole, longer[:, :7])
    ]
    assert figures[0] == figures[1]


class TokenFirst(nn.Module):
    """Takes its token numbers as [token, sequence]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FAMILIES["bert"].build()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens.T).last_hidden_state


def test_sequences_are_counted_along_their_own_axis() -> None:
    """Every fourth of them is held out; in batches of 12 tokens none would be, were the tokens counted."""
    model = TokenFirst().eval()
    batches = [text_batch(2, tokens=12, seed=seed)["input_ids"] for seed in range(12)]
    turned, plain = (
        [update.nonlinear_innovation for update in uc.diagnose(each, batches=given, level="full").record.updates]
        for each, given in (
            (model, [{"tokens": ids.T.contiguous()} for ids in batches]),
            (model.inner, [{"input_ids": ids} for ids in batches]),
        )
    )
    expected = [one.mean for one in plain if one is not None]
    assert expected
    assert [one.mean for one in turned if one is not None] == pytest.approx(expected)
