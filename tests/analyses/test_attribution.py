"""Attribution beside effects written out by hand, on GPT-2, Llama and BERT, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.residual_structures import Attention, mlp
from tests.helpers.tiny_models import FAMILIES, VOCABULARY, text_batch
from uncollapse.analyses import attribution
from uncollapse.anatomy.probing import float64_kept
from uncollapse.anatomy.stacks import Padding
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.records.attribution import EffectRecord

WIDTH, HEADS, BLOCKS = 32, 4, 2
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": 64}
SMALL = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
BUILD: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=64, vocab_size=VOCABULARY)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL), add_pooling_layer=False),
}
TARGET, AGAINST = 5, 7


def made(name: str) -> nn.Module:
    """A model in float64 whose biases and gains are not those of the start of training."""
    torch.manual_seed(0)
    model = BUILD[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.double().eval()


def last(output: Any) -> Tensor:
    """One number for each sequence, affine in the output."""
    rows = getattr(output, "logits", None)
    rows = next(tensors_in(output)) if rows is None else rows
    return rows[:, -1, TARGET] - rows[:, -1, AGAINST]


def found(effects: list[EffectRecord], kind: str, block: int | None = None, head: int | None = None) -> float:
    (value,) = [e.value for e in effects if (e.kind, e.block, e.head) == (kind, block, head)]
    return value


# By hand ------------------------------------------------------------------------------------------------------------


class Seen:
    """What the modules of a model read and gave in one pass, by name."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.read: dict[str, Tensor] = {}
        self.gave: dict[str, Tensor] = {}
        hooks = []
        for name, module in model.named_modules():

            def note(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self.gave[name] = next(tensors_in(output))
                if args and isinstance(args[0], Tensor):
                    self.read[name] = args[0]

            hooks.append(module.register_forward_hook(note))
        with torch.no_grad(), float64_kept(model):
            model(**batch)
        for hook in hooks:
            hook.remove()


def frozen(norm: nn.Module, read: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A norm as a linear map at the size of what it read, and its shift."""
    if isinstance(norm, nn.LayerNorm):
        size = (read.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return (lambda u: norm.weight * (u - u.mean(-1, keepdim=True)) / size), norm.bias.expand(read.shape)
    size = (read.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return (lambda u: norm.weight * u / size), torch.zeros_like(read)


def each_head(mixed: Tensor, matrix: Tensor) -> list[Tensor]:
    """O_h W_h from what the output projection reads and W_O [mixed, width]."""
    parts = mixed.unflatten(-1, (HEADS, -1)).unbind(-2)
    return [part @ rows for part, rows in zip(parts, matrix.unflatten(0, (HEADS, -1)), strict=True)]


@torch.no_grad()
def by_hand(name: str, model: Any, batch: dict[str, Tensor]) -> dict[tuple[str, int | None, int | None], float]:
    """Every direct effect, from the architecture's own formula."""
    seen, vectors = Seen(model, batch), dict[tuple[str, int | None, int | None], Tensor]()
    if name == "bert":
        return _bert_by_hand(model, seen)
    if name == "gpt2":
        blocks, norm, head = model.transformer.h, model.transformer.ln_f, model.lm_head.weight
        place, output, last_map, final = "transformer.h.{}.", "attn.c_proj", "mlp.c_proj", "transformer.ln_f"
        vectors["embedding", None, None] = seen.read["transformer.h.0.ln_1"]
    else:
        blocks, norm, head = model.model.layers, model.model.norm, model.lm_head.weight
        place, output, last_map, final = "model.layers.{}.", "self_attn.o_proj", "mlp.down_proj", "model.norm"
        vectors["embedding", None, None] = seen.read["model.layers.0.input_layernorm"]
    for number, block in enumerate(blocks):
        projection, writes = block.get_submodule(output), block.get_submodule(last_map)
        matrix = projection.weight if name == "gpt2" else projection.weight.T
        mixed = seen.read[place.format(number) + output]
        for h, vector in enumerate(each_head(mixed, matrix)):
            vectors["head", number, h] = vector
        bias = 0 if writes.bias is None else writes.bias
        vectors["mlp", number, None] = seen.gave[place.format(number) + last_map] - bias
        if name == "gpt2":
            vectors["attention_bias", number, None] = projection.bias.expand(mixed.shape)
            vectors["mlp_bias", number, None] = writes.bias.expand(mixed.shape)
    linear, shift = frozen(norm, seen.read[final])
    direction = head[TARGET] - head[AGAINST]
    effects = {key: (linear(vector)[:, -1] @ direction).mean().item() for key, vector in vectors.items()}
    if name == "gpt2":
        effects["norm_bias", None, None] = (shift[:, -1] @ direction).mean().item()
    return effects


def _bert_by_hand(model: Any, seen: Seen) -> dict[tuple[str, int | None, int | None], float]:
    """A post-norm model: every vector passes all norms that come later, at the sizes they met."""
    alive: dict[tuple[str, int | None, int | None], Tensor] = {("embedding", None, None): seen.gave["embeddings"]}
    for number, layer in enumerate(model.encoder.layer):
        place = f"encoder.layer.{number}."
        dense = layer.attention.output.dense
        mixed = seen.read[place + "attention.output.dense"]
        for h, vector in enumerate(each_head(mixed, dense.weight.T)):
            alive["head", number, h] = vector
        alive["attention_bias", number, None] = dense.bias.expand(mixed.shape)
        alive = _past(alive, layer.attention.output.LayerNorm, seen, place + "attention.output.LayerNorm", number, 0)
        dense = layer.output.dense
        alive["mlp", number, None] = seen.gave[place + "output.dense"] - dense.bias
        alive["mlp_bias", number, None] = dense.bias.expand(mixed.shape)
        alive = _past(alive, layer.output.LayerNorm, seen, place + "output.LayerNorm", number, 1)
    return {key: (v[:, -1, TARGET] - v[:, -1, AGAINST]).mean().item() for key, v in alive.items()}


def _past(
    alive: dict[tuple[str, int | None, int | None], Tensor],
    norm: nn.Module,
    seen: Seen,
    name: str,
    block: int,
    which: int,
) -> dict[tuple[str, int | None, int | None], Tensor]:
    linear, shift = frozen(norm, seen.read[name])
    return {key: linear(vector) for key, vector in alive.items()} | {(f"norm_bias {which}", block, None): shift}


@pytest.mark.parametrize("name", BUILD)
def test_direct_effects_are_those_written_by_hand(name: str) -> None:
    model, batch = made(name), text_batch()
    result = uc.attribute(model, batch, last, ablated_as=None)
    expected = by_hand(name, model, batch)
    shifts = [e.value for e in result.direct if e.kind == "norm_bias" and e.block is not None]
    by_norm = sorted(v for (kind, _, _), v in expected.items() if kind.startswith("norm_bias "))
    assert sorted(shifts) == pytest.approx(by_norm, abs=1e-10)
    for (kind, block, head), value in expected.items():
        if not kind.startswith("norm_bias "):
            assert found(result.direct, kind, block, head) == pytest.approx(value, abs=1e-10), (kind, block, head)
    assert result.record.metric.is_affine
    assert sum(e.value for e in result.direct) == pytest.approx(result.record.metric.value.mean, abs=1e-10)
    heads = [e for e in result.direct if e.kind == "head"]
    assert len(heads) == BLOCKS * HEADS
    assert max(abs(e.value) for e in heads) > 1e-3  # there was something to find


@torch.no_grad()
def test_exact_and_total_effects_of_heads_and_mlps_are_those_of_a_model_without_them() -> None:
    model, batch = made("gpt2"), text_batch()
    result = uc.attribute(model, batch, last, exact=True)
    seen = Seen(model, batch)
    norm, direction = model.transformer.ln_f, model.lm_head.weight[TARGET] - model.lm_head.weight[AGAINST]
    stream = seen.read["transformer.ln_f"]
    whole = norm(stream)[:, -1] @ direction
    for number in range(BLOCKS):
        projection = model.transformer.h[number].attn.c_proj
        vectors = each_head(seen.read[f"transformer.h.{number}.attn.c_proj"], projection.weight)
        for h, vector in enumerate(vectors):
            (effect,) = [e for e in result.heads if (e.block, e.head) == (number, h)]
            exact = (whole - norm(stream - vector)[:, -1] @ direction).mean().item()
            assert effect.exact is not None
            assert effect.exact.mean == pytest.approx(exact, abs=1e-10)

            def without(_: nn.Module, args: tuple[Tensor, ...], h: int = h) -> tuple[Tensor]:
                mixed = args[0].unflatten(-1, (HEADS, -1)).clone()
                mixed[..., h, :] = 0
                return (mixed.flatten(-2),)

            hook = projection.register_forward_pre_hook(without)
            total = (whole - last(model(**batch))).mean().item()
            hook.remove()
            assert effect.total is not None
            assert effect.total.mean == pytest.approx(total, abs=1e-10)
        mlp = model.transformer.h[number].mlp
        (effect,) = [e for e in result.direct if (e.kind, e.block) == ("mlp", number)]
        hook = mlp.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        total = (whole - last(model(**batch))).mean().item()
        hook.remove()
        assert effect.total is not None
        assert effect.total.mean == pytest.approx(total, abs=1e-10)


def test_first_order_effects_are_derivatives() -> None:
    """Each head scaled by 1 + t: the metric's slope in t, by a difference of two passes."""
    model, batch = made("llama"), text_batch()
    result = uc.attribute(model, batch, last, ablated_as=None)
    step = 1e-5
    for number in range(BLOCKS):
        projection = model.model.layers[number].self_attn.o_proj
        for h in range(HEADS):
            values = []
            for t in (step, -step):

                def scaled(_: nn.Module, args: tuple[Tensor, ...], h: int = h, t: float = t) -> tuple[Tensor]:
                    mixed = args[0].unflatten(-1, (HEADS, -1)).clone()
                    mixed[..., h, :] *= 1 + t
                    return (mixed.flatten(-2),)

                hook = projection.register_forward_pre_hook(scaled)
                with torch.no_grad(), float64_kept(model):
                    values.append(last(model(**batch)).mean().item())
                hook.remove()
            (effect,) = [e for e in result.heads if (e.block, e.head) == (number, h)]
            assert effect.first_order is not None
            assert effect.first_order.mean == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in {"bert", "gpt2", "llama"}])
def test_effects_add_up_on_every_layout(name: str) -> None:
    """Parallel, sandwich, post-norm with one layer for all blocks, relative positions, pictures."""
    model = FAMILIES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = text_batch() if not FAMILIES[name].vision else {"pixel_values": torch.randn(3, 3, 32, 32)}
    result = uc.attribute(model, batch, last, ablated_as=None)
    assert result.record.metric.is_affine, result.record.metric
    assert not result.record.metric.left
    assert len(result.heads) == FAMILIES[name].blocks * FAMILIES[name].heads
    size = sum(abs(e.value) for e in result.direct)
    assert abs(sum(e.value for e in result.direct) - result.record.metric.value.mean) < 1e-5 * size


def test_a_metric_that_is_not_affine_is_said_to_be_linearised() -> None:
    model, batch = made("gpt2"), text_batch()
    metric = uc.attribute(model, batch, uc.next_token_loss(), ablated_as=None).record.metric
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())
    assert metric.value.mean == pytest.approx(loss.item(), abs=1e-10)
    assert not metric.is_affine
    assert "linearisation" in metric.sum_of
    assert metric.sum.mean + metric.remainder.mean == pytest.approx(metric.value.mean)


def test_the_loss_and_the_last_place_leave_out_what_is_padded() -> None:
    model = made("gpt2")
    short, long = text_batch(1, 5, seed=3), text_batch(1, 9, seed=4)
    padding = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    both = {k: torch.cat([torch.cat([short[k], padding[k]], 1), long[k]]) for k in short}
    for metric in (uc.logit_difference(TARGET, AGAINST), uc.next_token_loss()):
        alone = [uc.attribute(model, each, metric, ablated_as=None) for each in (short, long)]
        together = uc.attribute(model, both, metric, ablated_as=None)
        for place, effect in enumerate(together.heads):
            assert effect.direct is not None
            apart = [each.heads[place].value for each in alone]
            assert (effect.direct.min, effect.direct.max) == pytest.approx((min(apart), max(apart)), abs=1e-9)


def test_what_a_noisy_observer_behind_the_projection_can_be_off_by() -> None:
    """No error in the layer's output of the stated size moves the effect, as reconstructed by least squares, by more than `behind`;
    and one in the worst direction moves it by a good part of that."""
    model, batch = made("gpt2"), text_batch(1)
    noise = 0.02
    result = uc.attribute(model, batch, last, ablated_as=None, noise=noise)
    seen = Seen(model, batch)
    norm = model.transformer.ln_f
    linear, _ = frozen(norm, seen.read["transformer.ln_f"])
    direction = model.lm_head.weight[TARGET] - model.lm_head.weight[AGAINST]
    place = "transformer.h.1.attn.c_proj"
    matrix = model.transformer.h[1].attn.c_proj.weight.detach()
    written = seen.gave[place][0, -1]
    unit = torch.eye(WIDTH, dtype=torch.float64)
    # The gradient where the layer writes: the linear map of the last token's norm, transposed.
    a = torch.stack([(linear(row.expand(1, 9, -1))[0, -1] @ direction) for row in unit]).detach()
    inverse = torch.linalg.pinv(matrix)
    for h, effect in enumerate(e for e in result.heads if e.block == 1):
        rows = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        take = inverse[:, rows] @ matrix[rows] @ a  # the effect that is read off Y is <take, Y>
        worst = float(noise * written.norm() * take.norm())
        assert effect.behind is not None
        assert 0 < worst <= effect.behind * (1 + 1e-6)
        assert effect.behind < 100 * worst


def test_copies_of_a_head_are_named() -> None:
    model = made("gpt2")
    width = WIDTH // HEADS
    with torch.no_grad():
        matrix = model.transformer.h[0].attn.c_proj.weight
        matrix[2 * width : 3 * width] = 3 * matrix[:width]
        matrix[3 * width : 3 * width + width // 2] = matrix[
            width : width + width // 2
        ]  # half of what head 1 writes into
    result = uc.attribute(model, text_batch(), last, ablated_as=None)
    named = {e.head: e.indistinguishable_from for e in result.heads if e.block == 0}
    assert named == {0: [2], 1: [], 2: [0], 3: []}
    copy = next(e for e in result.heads if (e.block, e.head) == (0, 2))
    assert copy.behind is None
    assert "other heads can write" in copy.unavailable["behind"]
    assert copy.direct is not None  # before the projection it is known all the same


def test_several_batches_are_one_sample() -> None:
    model = made("gpt2")
    first, second = text_batch(2, seed=1), text_batch(3, 7, seed=2)
    apart = [uc.attribute(model, each, last, ablated_as=None).heads[0].direct for each in (first, second)]
    together = uc.attribute(model, [first, second], last, ablated_as=None).heads[0].direct
    assert together is not None
    assert together.n == 5
    assert together.mean == pytest.approx(sum(a.mean * a.n for a in apart if a is not None) / 5)
    assert together.half_width is not None


def test_nothing_is_left_behind() -> None:
    model, batch = made("gpt2"), text_batch()
    model.train()
    with torch.no_grad():
        before = [p.clone() for p in model.parameters()]
    uc.attribute(model, batch, last, exact=True)
    assert model.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_refusals_say_what_to_do() -> None:
    model, batch = made("gpt2"), text_batch()
    with pytest.raises(uc.InputError, match="one number for each of 3 sequences"):
        uc.attribute(model, batch, lambda output: output.logits)
    with pytest.raises(uc.InputError, match="finite"):
        uc.attribute(model, batch, lambda output: output.logits[:, -1, 0] / 0)
    with pytest.raises(uc.InputError, match="called with the model's output"):
        uc.attribute(model, batch, 3)  # type: ignore[arg-type]
    with pytest.raises(uc.InputError, match="tokenizer to look"):
        uc.attribute(model, batch, uc.logit_difference(" a", " b"))
    with pytest.raises(uc.InputError, match="one target for all"):
        uc.attribute(model, batch, uc.logit_difference([1, 2], 3))
    with pytest.raises(uc.InputError, match="share between 0 and 1"):
        uc.attribute(model, batch, last, noise=2)
    with pytest.raises(uc.InputError, match="attribute: expected at least 2 sequences"):
        uc.attribute(model, text_batch(1), last, ablated_as="resample")
    with pytest.raises(uc.InputError, match="without a gradient"):
        uc.attribute(model, batch, lambda output: output.logits[:, -1, 5].detach())
    with pytest.raises(uc.InputError, match="size mismatch"):
        uc.attribute(model, batch, lambda output: output.logits[:, -1] @ torch.ones(7).double())
    with pytest.raises(uc.InputError, match="hold these tokens"):
        uc.attribute(model, batch, uc.logit_difference(-1, 2))
    with pytest.raises(uc.InputError, match="a position among the 9 tokens of each sequence, got 9"):
        uc.attribute(model, batch, uc.logit_difference(1, 2, position=9))


# Several sublayers of a kind in one block -------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Tokens before it are mixed without an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.conv(x.transpose(1, 2))[..., :-2].transpose(1, 2)))


class SeveralParts(nn.Module):
    """A model whose blocks add what `kinds` say, one after the other."""

    def __init__(self, *kinds: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Parts(*kinds) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Parts(nn.Module):
    def __init__(self, *kinds: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(kind() for kind in kinds)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return x


class OtherHeads(Attention):
    """The same with half as many heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS // 2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.mlp = Attention(), OtherHeads(), mlp()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.near(self.norms[0](x))
        x = x + self.far(self.norms[1](x))
        return x + self.mlp(self.norms[2](x))


@pytest.mark.parametrize("first", [mlp, Mixer])
@torch.no_grad()
def test_two_sublayers_of_one_block_have_each_their_own_effects(first: Callable[[], nn.Module]) -> None:
    model = SeveralParts(first, Attention, mlp).double().eval()
    batch = {"input_ids": text_batch()["input_ids"]}
    result = uc.attribute(model, batch, last, exact=True)
    seen = Seen(model, batch)
    stream, direction = seen.read["norm"], model.head.weight[TARGET] - model.head.weight[AGAINST]
    for number in range(BLOCKS):
        name = "mlp" if first is mlp else "mixer"
        own = [e for e in result.direct if e.block == number and e.kind in {name, "mlp"}]
        biases = [e for e in result.direct if e.block == number and e.kind == "mlp_bias"]
        for place, effect, of_bias in zip((0, 2), own, biases, strict=True):
            part = model.blocks[number].parts[place]
            bias = part.out.bias if isinstance(part, Mixer) else part[-1].bias
            update = seen.gave[f"blocks.{number}.parts.{place}"] - bias
            for vector, found_there in ((update, effect), (bias, of_bias)):
                exact = ((model.norm(stream) - model.norm(stream - vector))[:, -1] @ direction).mean().item()
                assert found_there.exact is not None
                assert found_there.exact.mean == pytest.approx(exact, abs=1e-10)
            assert effect.total is None  # there is no way to take one of them away alone
            assert "together only" in effect.unavailable["total"]


@torch.no_grad()
def test_two_attentions_of_one_block_have_each_their_own_noise_gains() -> None:
    model = SeveralParts()
    model.blocks = nn.ModuleList(TwoAttentions() for _ in range(BLOCKS))
    model.double().eval()
    result = uc.attribute(model, {"input_ids": text_batch()["input_ids"]}, last, ablated_as=None)
    for number in range(BLOCKS):
        gains = [e.noise_gain for e in result.heads if e.block == number]
        expected = []
        for part, count in ((model.blocks[number].near, HEADS), (model.blocks[number].far, HEADS // 2)):
            matrix = part.out.weight.T
            inverse, width = torch.linalg.pinv(matrix), WIDTH // count
            for rows in torch.arange(WIDTH).split(width):  # this head's share of what is read off the sum
                expected.append(float(torch.linalg.matrix_norm(inverse[:, rows] @ matrix[rows], 2)))
        assert gains == pytest.approx(expected, rel=1e-8)


# Half precision, batches and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_pass_a_loss_for_affine(dtype: torch.dtype) -> None:
    model = made("gpt2").to(dtype)
    for metric in (uc.next_token_loss(), uc.logit_difference(TARGET, AGAINST)):
        found_there = uc.attribute(model, text_batch(), metric, ablated_as=None)
        record = found_there.record.metric
        assert not record.is_affine
        assert "half precision" in record.sum_of
        assert sum(e.value for e in found_there.direct) == pytest.approx(record.sum.mean, abs=1e-9)
        assert record.sum.mean + record.remainder.mean == pytest.approx(record.value.mean, abs=1e-9)


def test_a_constant_that_one_batch_alone_has_is_counted_there() -> None:
    model = made("gpt2")

    def metric(output: Any) -> Tensor:
        found_there = last(output)
        return found_there + 1 if output.logits.shape[1] == 9 else found_there**2

    result = uc.attribute(model, [text_batch(2, 9), text_batch(3, 7)], metric, ablated_as=None)
    assert found(result.direct, "output_bias") == pytest.approx(2 / 5)
    assert not result.record.metric.is_affine
    assert sum(e.value for e in result.direct) == pytest.approx(result.record.metric.sum.mean, abs=1e-10)


def test_a_difference_is_named_by_two_tokens_only_where_it_is_of_two() -> None:
    assert uc.logit_difference(1, 2).name == "logit of token 1 − logit of token 2"
    assert uc.logit_difference(" a", [2, 2]).name == "logit of ' a' − logit of token 2"
    assert uc.logit_difference(1, [2, 3]).name == "target logit − other logit"


def test_no_token_is_taken_for_the_last_where_padding_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "paddings", lambda *_: [Padding(reason="padding in another unit than tokens")])
    model, batch = made("gpt2"), text_batch()
    for metric in (uc.logit_difference(TARGET, AGAINST), uc.next_token_loss()):
        with pytest.raises(uc.InputError, match="another unit than tokens"):
            uc.attribute(model, batch, metric, ablated_as=None)
    assert uc.attribute(model, batch, last, ablated_as=None).heads  # which does not ask


def test_no_row_is_taken_for_the_last_where_the_mask_cannot_tell() -> None:
    """A model with a token of its own gives one row of logits more than its mask has tokens."""
    logits, mask = torch.randn(2, 5, 9), torch.tensor([[True, True, False, False], [True, True, True, True]])
    with pytest.raises(uc.InputError, match="a row of logits for each token"):
        uc.logit_difference(1, 2).of(2, mask, None)(logits)
    whole = uc.logit_difference(1, 2).of(2, torch.ones_like(mask), None)(logits)
    assert torch.equal(whole, logits[:, -1, 1] - logits[:, -1, 2])
