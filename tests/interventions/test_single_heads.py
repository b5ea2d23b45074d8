"""Single heads taken out: the same numbers as written by hand on every layout, and only where a head can be told apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody writes it

import uncollapse as uc
from uncollapse.cli.commands import main
from uncollapse.interventions.single_heads import another_sequence

WIDTH, HEADS, GROUPS = 32, 4, 2
BATCH = {"idx": torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))}
Made = Callable[[Tensor], Tensor]  # what comes in the place of the mixed values [sequence, token, width] of a head


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


class Replacing:
    """By hand: the heads to replace, and with what. No head by default."""

    heads: Collection[int] = ()
    made: Made = staticmethod(torch.zeros_like)

    def replaced(self, mixed: Tensor) -> Tensor:
        """Mixed values [sequence, head, token, width] with the heads replaced."""
        rows = [self.made(row) if h in self.heads else row for h, row in enumerate(mixed.unbind(1))]
        return torch.stack(rows, 1)


class Fused(nn.Module, Replacing):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(merged(self.replaced(z) if self.heads else z))


class Separate(nn.Module, Replacing):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        z = (q @ k.mT / 3).softmax(-1) @ v
        return self.o(merged(self.replaced(z) if self.heads else z))


class Grouped(nn.Module, Replacing):
    """Two key-value heads; `tiled` takes them in turn instead of each for its neighbours."""

    def __init__(self, told: bool = False, tiled: bool = False) -> None:
        super().__init__()
        self.q, self.o, self.told, self.tiled = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), told, tiled
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // HEADS * GROUPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x), GROUPS), split(self.v(x), GROUPS)
        if self.told:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (t.repeat(1, 2, 1, 1) if self.tiled else t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(merged(self.replaced(z) if self.heads else z))


class Einsum(nn.Module, Replacing):
    """The tokens' axis stands before the heads' all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*x.shape[:2], HEADS, -1) for t in (self.q(x), self.k(x), self.v(x)))
        A = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        z = torch.einsum("bhij,bjhd->bihd", A, v)
        if self.heads:
            z = self.replaced(z.transpose(1, 2)).transpose(1, 2)
        return self.o(z.reshape(x.shape))


class Torchs(nn.Module):
    """torch's own, whose code nobody can write into: by hand, the projection's columns of a head are zero."""

    heads: Collection[int] = ()

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.a, self.weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        kept = self.a.out_proj.weight.data
        if self.heads:
            self.a.out_proj.weight.data = kept.clone()
            for head in self.heads:
                self.a.out_proj.weight.data[:, head * 8 : head * 8 + 8] = 0
        out: Tensor = self.a(x, x, x, need_weights=self.weights)[0]
        self.a.out_proj.weight.data = kept
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.n1, self.n2, self.a = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), attention
        self.m = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.n1(x))
        return x + self.m(self.n2(x))


class Model(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.blocks = nn.Embedding(64, WIDTH), nn.ModuleList(Block(attention()) for _ in range(3))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.e(idx)
        for block in self.blocks:
            x = block(x)
        return x


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "fused, one projection": Fused,
    "separate, eager": Separate,
    "grouped": Grouped,
    "grouped, told": lambda: Grouped(told=True),
    "einsum": Einsum,
    "torch's": Torchs,
    "torch's with weights": lambda: Torchs(weights=True),
}
layouts = pytest.mark.parametrize("attention", LAYOUTS.values(), ids=LAYOUTS)


def by_hand(model: Model, heads: dict[int, list[int]], made: Made = torch.zeros_like) -> Tensor:
    """The output with heads replaced in the model's own code, outside of any context."""
    for number, own in heads.items():
        model.blocks[number].a.heads = own
        model.blocks[number].a.made = made
    try:
        out: Tensor = model(**BATCH)
    finally:
        for block in model.blocks:
            block.a.heads = ()
    return out


@layouts
@pytest.mark.parametrize("heads", [{1: [3]}, {0: [0, 2], 2: [1]}], ids=["one", "several"])
def test_a_removed_head_is_the_model_without_it_as_written_by_hand(
    attention: Callable[[], nn.Module], heads: dict[int, list[int]]
) -> None:
    model = Model(attention).eval()
    with torch.no_grad():
        plain, expected = model(**BATCH), by_hand(model, heads)
        assert not torch.allclose(plain, expected, atol=1e-4)
        with uc.without(model, "attention", heads=heads, batch=BATCH):
            got = model(**BATCH)
        if isinstance(model.blocks[0].a, Torchs):  # by hand the weights are zero, not the values: another order of sums
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got, expected)
        assert torch.equal(model(**BATCH), plain)


@layouts
def test_what_leaves_the_projection_is_what_the_head_contributed(attention: Callable[[], nn.Module]) -> None:
    model = Model(attention).double().eval()
    found = next(c for c in uc.head_contributions(model, BATCH) if c.block == 1)
    with torch.no_grad(), uc.without(model, "attention", heads={1: [2]}):
        (left,) = uc.head_contributions(model, BATCH, blocks=[1])
    assert not left.contributions[:, :, 2].any()
    expected = found.contributions.clone()
    expected[:, :, 2] = 0
    torch.testing.assert_close(left.contributions, expected, rtol=1e-12, atol=1e-14)
    assert found.contributions[:, :, 2].norm() > 0.01


@pytest.mark.parametrize("told", [False, True])
def test_a_key_value_head_goes_with_all_heads_that_read_it(told: bool) -> None:
    model = Model(lambda: Grouped(told)).eval()
    with torch.no_grad(), uc.without(model, "attention", key_value_heads={1: [1]}, batch=BATCH):
        got = model(**BATCH)
    with torch.no_grad():
        assert torch.equal(got, by_hand(model, {1: [2, 3]}))


def test_which_heads_read_a_key_value_head_is_told_by_the_values_and_not_by_their_order() -> None:
    model = Model(lambda: Grouped(tiled=True)).eval()
    with torch.no_grad(), uc.without(model, "attention", key_value_heads={1: [1]}, batch=BATCH):
        got = model(**BATCH)
    with torch.no_grad():
        assert torch.equal(got, by_hand(model, {1: [1, 3]}))


@pytest.mark.parametrize("attention", [Fused, Separate, Grouped, Einsum])
def test_the_mean_is_that_of_all_tokens(attention: Callable[[], nn.Module]) -> None:
    model = Model(attention).eval()
    with torch.no_grad():
        with uc.without(model, "attention", heads={1: [3]}, heads_as="mean", batch=BATCH):
            got = model(**BATCH)
        expected = by_hand(model, {1: [3]}, lambda row: row.mean((0, 1), keepdim=True).expand(row.shape))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [Fused, Separate, Grouped, Einsum])
def test_resampled_values_are_those_of_another_sequence(attention: Callable[[], nn.Module]) -> None:
    model = Model(attention).eval()
    outputs = []
    with torch.no_grad():
        for seed in range(6):
            order = another_sequence(3, seed)
            assert sorted(order) == [0, 1, 2]
            assert all(i != other for i, other in enumerate(order))
            with uc.without(model, "attention", heads={1: [3]}, heads_as="resample", seed=seed, batch=BATCH):
                outputs.append(model(**BATCH))
            assert torch.equal(outputs[-1], by_hand(model, {1: [3]}, lambda row, order=order: row[order]))
    assert any(not torch.equal(outputs[0], other) for other in outputs)


# Models of transformers ---------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT |= {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BERT": (lambda: hf.BertModel(hf.BertConfig(**TEXT)), "encoder.layer.1.attention.output.dense"),
    "GPT-2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), "transformer.h.1.attn.c_proj"),
    "Llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)),
        "model.layers.1.self_attn.o_proj",
    ),
}
families = pytest.mark.parametrize("family", MODELS.values(), ids=MODELS)
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0  # padding on the left


def loaded(make: Callable[[], nn.Module], attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation(attention)  # type: ignore[operator]
    return model.eval()


def zeroing(head: int) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = args[0].clone()
        given[..., head * 8 : head * 8 + 8] = 0
        return (given,)

    return hook


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_heads_of_transformers_models(family: tuple[Callable[[], nn.Module], str], attention: str) -> None:
    make, projection = family
    model, batch = loaded(make, attention), {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        plain = model(**batch)[0]
        hook = model.get_submodule(projection).register_forward_pre_hook(zeroing(2))
        expected = model(**batch)[0]
        hook.remove()
        with uc.without(model, "head:1.2", batch=batch):
            got = model(**batch)[0]
        assert torch.equal(got, expected)
        assert not torch.equal(got, plain)
        assert torch.equal(model(**batch)[0], plain)


@pytest.mark.parametrize("head", [0, 2])
@pytest.mark.parametrize("family", [MODELS["GPT-2"], MODELS["Llama"]], ids=["GPT-2", "Llama"])
def test_a_head_is_away_while_text_is_generated_with_a_cache(family: tuple[Callable[[], Any], str], head: int) -> None:
    make, projection = family
    model: Any = loaded(make)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the head matters to what is said
        given = {"input_ids": IDS, "attention_mask": MASK}
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_scores": True}
        options |= {"return_dict_in_generate": True}
        plain = model.generate(**given, **options)
        hook = model.get_submodule(projection).register_forward_pre_hook(zeroing(head))
        expected = model.generate(**given, **options)
        hook.remove()
        with uc.without(model, "attention", heads={1: [head]}, batch=given):
            got = model.generate(**given, **options)
        again = model.generate(**given, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))
    assert not torch.equal(got.scores[0], plain.scores[0])
    assert all(torch.equal(a, b) for a, b in zip(again.scores, plain.scores, strict=True))


def mixed_by(model: nn.Module, projection: str, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(projection).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


@families
def test_padding_is_left_out_of_the_mean(family: tuple[Callable[[], nn.Module], str]) -> None:
    make, projection = family
    model, batch = loaded(make), {"input_ids": IDS, "attention_mask": MASK}
    mixed = mixed_by(model, projection, batch)[..., 16:24]
    with uc.without(model, "attention", heads={1: [2]}, heads_as="mean", batch=batch):
        got = mixed_by(model, projection, batch)[..., 16:24]
    expected = mixed[MASK.bool()].mean(0)
    assert not torch.allclose(expected, mixed.flatten(0, 1).mean(0), atol=1e-5)
    torch.testing.assert_close(got, expected.expand(got.shape), rtol=1e-5, atol=1e-6)


@families
def test_no_real_token_is_given_the_values_of_padding(family: tuple[Callable[[], nn.Module], str]) -> None:
    make, projection = family
    model, batch = loaded(make), {"input_ids": IDS, "attention_mask": MASK}
    mixed = mixed_by(model, projection, batch)[..., 16:24]
    with uc.without(model, "attention", heads={1: [2]}, heads_as="resample", batch=batch):
        got = mixed_by(model, projection, batch)[..., 16:24]
    for sequence, other in enumerate(another_sequence(3, 0)):
        own, theirs = MASK[sequence].nonzero().flatten(), MASK[other].nonzero().flatten()
        expected = mixed[other, theirs[torch.arange(len(own)) % len(theirs)]]
        assert torch.equal(got[sequence, own], expected)


# What holds of every removal ----------------------------------------------------------------------------------------


def test_removals_nest_and_the_union_is_away() -> None:
    model = Model(Fused).eval()
    with torch.no_grad():
        plain = model(**BATCH)
        with uc.without(model, "head:1.3"):
            with uc.without(model, "head:1.0", "head:2.1"):
                assert torch.equal(model(**BATCH), by_hand(model, {1: [0, 3], 2: [1]}))
            assert torch.equal(model(**BATCH), by_hand(model, {1: [3]}))
        assert torch.equal(model(**BATCH), plain)


def test_the_model_is_whole_again_after_an_exception() -> None:
    model = Model(Fused).eval()
    with torch.no_grad():
        plain = model(**BATCH)
        with pytest.raises(RuntimeError, match="mine"), uc.without(model, "head:1.3"):
            raise RuntimeError("mine")
        assert torch.equal(model(**BATCH), plain)


def test_gradients_are_those_of_the_model_without_the_head() -> None:
    model = Model(Fused).eval()
    by_hand(model, {1: [3]}).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with uc.without(model, "head:1.3"):
        model(**BATCH).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    rows = model.blocks[1].a.qkv.weight.grad[2 * WIDTH + 24 :]
    assert not rows.any()


def test_head_alone_takes_all_heads_and_leaves_the_projections_bias() -> None:
    model = Model(Fused).eval()
    with torch.no_grad():
        with uc.without(model, "head", blocks=[1]):
            got = model(**BATCH)
        assert torch.equal(got, by_hand(model, {1: [0, 1, 2, 3]}))
        with uc.without(model, "attention", blocks=[1]):
            assert not torch.allclose(got, model(**BATCH), atol=1e-4)


def test_a_diagnosis_inside_still_has_the_attention_figures_of_the_removed_head() -> None:
    model = Model(Separate).eval()
    plain = uc.diagnose(model, batches=[BATCH])
    with uc.without(model, "head:0.3"):
        inside = uc.diagnose(model, batches=[BATCH])
    before, after = ([a for a in d.record.attention if a.block == 0] for d in (plain, inside))
    assert [a.entropy for a in after] == [a.entropy for a in before]
    assert all(a.entropy is not None for a in after)
    assert [a for a in plain.record.attention if a.block == 1] != [a for a in inside.record.attention if a.block == 1]


# What is refused -----------------------------------------------------------------------------------------------------


class Normed(Fused):
    """A norm over all heads stands before the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        return self.o(self.n(merged(F.scaled_dot_product_attention(q, k, v))))


class Talking(Fused):
    """Every head's result is a mixture of all heads' before the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v)
        return self.o(merged(((self.replaced(z) if self.heads else z).transpose(1, 3) @ self.t).transpose(1, 3)))


class Shifted(Fused):
    """Each head is normed by itself, with a bias: without its values, the bias is left."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(WIDTH // HEADS)
        nn.init.normal_(self.n.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        return self.o(merged(self.n(F.scaled_dot_product_attention(q, k, v))))


class Gated(Fused):
    """A gate made from the data multiplies each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v)
        return self.o(merged(self.replaced(z) if self.heads else z) * self.g(x).sigmoid())


@pytest.mark.parametrize("attention", [Normed, Shifted])
def test_heads_that_something_joins_before_the_projection_are_refused(attention: Callable[[], nn.Module]) -> None:
    model = Model(attention).eval()
    with torch.no_grad():
        plain = model(**BATCH)
        with (
            pytest.raises(
                uc.UnsupportedModel, match=r"told apart in block 1 .*acts between|told apart in block 1 .*heads"
            ),
            uc.without(model, "head:1.3", batch=BATCH),
        ):
            pass
        assert torch.equal(model(**BATCH), plain)


@pytest.mark.parametrize("attention", [Gated, Talking])
def test_a_gate_or_one_more_linear_map_of_the_heads_is_no_obstacle(attention: Callable[[], nn.Module]) -> None:
    model = Model(attention).eval()
    with torch.no_grad(), uc.without(model, "head:1.3", batch=BATCH):
        got = model(**BATCH)
    with torch.no_grad():
        assert torch.equal(got, by_hand(model, {1: [3]}))


@pytest.mark.parametrize("heads_as", ["mean", "resample"])
def test_behind_a_gate_only_zeros_are_known_to_be_what_the_projection_would_read(heads_as: str) -> None:
    model = Model(Gated).eval()
    with (
        pytest.raises(uc.UnsupportedModel, match="such as a gate"),
        uc.without(model, "head:1.3", heads_as=heads_as, batch=BATCH),
    ):
        pass


class Interleaved(Fused):
    """The heads' features lie in turn in what the projection reads: feature i belongs to head i % 4."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v)
        z = self.replaced(z) if self.heads else z
        return self.o(z.permute(0, 2, 3, 1).reshape(x.shape))


@pytest.mark.parametrize("heads_as", ["zero", "mean"])
def test_features_that_lie_in_turn_are_each_their_own_heads(heads_as: str) -> None:
    model = Model(Interleaved).eval()
    with torch.no_grad():
        with uc.without(model, "head:1.3", "head:1.1", heads_as=heads_as, batch=BATCH):
            got = model(**BATCH)
        mean: Made = lambda row: row.mean((0, 1), keepdim=True).expand(row.shape)  # noqa: E731
        expected = by_hand(model, {1: [1, 3]}, torch.zeros_like if heads_as == "zero" else mean)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_model_of_token_numbers_needs_no_batch_and_one_of_vectors_does() -> None:
    class Vectors(Model):
        def forward(self, idx: Tensor) -> Tensor:
            x = idx
            for block in self.blocks:
                x = block(x)
            return x

    with uc.without(Model(Fused).eval(), "head:1.3"):
        pass
    with pytest.raises(uc.InputError, match="Pass batch="), uc.without(Vectors(Fused).eval(), "head:1.3"):
        pass


@pytest.mark.parametrize(
    ("components", "options", "message"),
    [
        (["attention"], {"heads": {1: [4]}}, r"from 0 to 3 in block 1, got \[4\]"),
        (["attention"], {"heads": {1: [-1]}}, r"from 0 to 3 in block 1, got \[-1\]"),
        (["attention"], {"heads": {3: [0]}}, r"blocks with attention: 0 to 2, got block 3"),
        (["head:1.4"], {}, r"from 0 to 3 in block 1, got \[4\]"),
        (["head:x"], {}, r"or a head such as head:5\.3"),
        (["attention"], {"heads": {}}, r"names no head"),
        (["attention"], {"heads": {1: []}}, r"names no head"),
        (["attention"], {"heads": {1: 3}}, r"names no head"),
        (["mlp"], {"heads": {1: [3]}}, r"'attention' beside heads"),
        (["head:1.3"], {"blocks": [0]}, r"heads of the given blocks \[0\], got block 1"),
        (["head:1.3"], {"heads_as": "mean"}, r"expected a batch to take the mean"),
        (["head:1.3"], {"heads_as": "mode"}, r"heads_as among zero, mean, resample"),
        (["mlp"], {"heads_as": "resample"}, r"expected heads to put"),
        (["attention"], {"key_value_heads": {1: [7]}}, r"key_value_heads from 0 to 3 in block 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(components: list[str], options: dict[str, Any], message: str) -> None:
    model = Model(Fused).eval()
    with pytest.raises(uc.InputError, match=message), uc.without(model, *components, **options):
        pass


def test_a_block_without_attention_is_named_with_those_that_have_it() -> None:
    class Mixed(Model):
        def __init__(self) -> None:
            super().__init__(Fused)
            self.blocks[1].a = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    model = Mixed().eval()
    anatomy_names = "blocks with attention"
    layout = uc.Layout(blocks=("blocks.0", "blocks.1", "blocks.2"))
    uc.diagnose(model, batches=[BATCH], layout=layout)
    with pytest.raises(uc.InputError, match=f"{anatomy_names}: 0, 2, got block 1"), uc.without(model, "head:1.3"):
        pass


def test_one_sequence_has_no_other_to_resample_from() -> None:
    model = Model(Fused).eval()
    with (
        uc.without(model, "head:1.3", heads_as="resample"),
        pytest.raises(uc.InputError, match="at least 2 sequences"),
    ):
        model(BATCH["idx"][:1])


# In an ablation ------------------------------------------------------------------------------------------------------


def test_the_command_line_removes_single_heads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record, page = tmp_path / "record.json", tmp_path / "page.html"
    arguments = ["ablate", "demo", "--without", "head:5.3", "--without", "head:5.3,head:5.4,mlp"]
    arguments += ["--sequences", "2", "--max-tokens", "16", "--json", str(record), "--html", str(page)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    runs = json.loads(record.read_text())["runs"]
    assert [run["without"] for run in runs] == [[], ["head:5.3"], ["head:5.3", "head:5.4", "mlp"]]
    assert runs[1]["output_shift"]["mean"] > 0
    for before, after in zip(runs[0]["attention_contraction"], runs[1]["attention_contraction"], strict=True):
        assert after == pytest.approx(before, rel=1e-6)
    assert "head:5.3" in capfd.readouterr().out
    assert "head:5.3" in page.read_text()
