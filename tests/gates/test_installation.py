"""Position gates in live models: they see true positions wherever the model runs, and leave no trace when they go."""

from __future__ import annotations

import copy
import inspect
import io
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import uncollapse as uc
from tests.helpers.families import FAMILIES, Family, inputs_for
from tests.helpers.tiny_models import text_batch
from uncollapse.anatomy.proof import known_anatomy, known_example
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.gates.broken import gate_report
from uncollapse.gates.installation import install_gates, remove_gates
from uncollapse.gates.projection import PositionGatedProjection
from uncollapse.measures import heads

SPECIAL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
UNDROPPED: dict[str, Any] = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**GPT2, **SPECIAL),
    "gptj": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4, **SPECIAL),
    "llama": lambda: hf.LlamaConfig(**SMALL, **SPECIAL, num_key_value_heads=2),
    "mistral, sliding": lambda: hf.MistralConfig(**SMALL, **SPECIAL, num_key_value_heads=2, sliding_window=4),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SPECIAL),
    "falcon, alibi": lambda: hf.FalconConfig(**SMALL, **SPECIAL, alibi=True),
    "opt": lambda: hf.OPTConfig(**{**SMALL, "ffn_dim": 64}, **SPECIAL, word_embed_proj_dim=32),
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
decoders = pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)


def drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def language_model(config: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return drawn(hf.AutoModelForCausalLM.from_config(config, **options))


def padded(side: str, lengths: tuple[int, ...] = (7, 4, 6)) -> dict[str, Tensor]:
    batch = text_batch(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        gone = max(lengths) - length
        hidden = slice(0, gone) if side == "left" else slice(length, None)
        batch["attention_mask"][row, hidden] = 0
        batch["input_ids"][row, hidden] = 0
    return batch


def first(output: Any) -> Tensor:
    return next(t for t in tensors_in(output) if t.is_floating_point())


def told(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the positions that padding leaves, for a model that takes them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return batch
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def assert_gates(seen: Tensor, module: PositionGatedProjection, positions: Tensor, real: Tensor | None = None) -> None:
    """The gates that a pass used are those of the given positions, at the real tokens."""
    real = torch.ones_like(positions) if real is None else real
    torch.testing.assert_close(seen[real.bool()], module.gates(positions)[real.bool()], rtol=1e-3, atol=1e-4)


def seen_gates(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What each projection reads over what its gated module reads: the gates the pass used, [batch, token, head]."""
    seen: list[Tensor] = []
    given: list[Tensor] = []
    handles = []
    for module in model.modules():
        if isinstance(module, PositionGatedProjection):
            handles.append(module.register_forward_pre_hook(lambda _, args: given.append(args[0])))
            handles.append(
                module.projection.register_forward_pre_hook(
                    lambda m, args, h=module.heads: seen.append(
                        (args[0] / given[-1]).unflatten(-1, (h, -1)).detach().median(-1).values
                    )
                )
            )
    run()
    for handle in handles:
        handle.remove()
    return seen


# In and out ----------------------------------------------------------------------------------------------------------
@families
def test_in_changes_no_bit_then_every_token_sees_its_position_and_out_leaves_no_trace(family: Family) -> None:
    model, batch = family.build(), inputs_for(family)
    if "attention_mask" in batch:
        batch["attention_mask"][1, :2] = 0
    modules = dict(model.named_modules())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = first(model(**batch))
        gates = install_gates(model, batch=batch)
        assert torch.equal(first(model(**batch)), before)
        assert all(module.heads == family.heads and module.head_width == family.head_width for module in gates.values())
        assert len(gate_report(model)) == family.blocks + family.decoder_blocks

        for number, module in enumerate(gates.values()):
            for parameter in module.gate.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        seen = seen_gates(model, lambda: model(**batch))
        assert len(seen) == len(gate_report(model))
        for values, module in zip(seen, [*gates.values()] * (1 if len(gates) > 1 else len(seen)), strict=True):
            positions = torch.arange(values.shape[1]).repeat(values.shape[0], 1)
            real = torch.ones_like(positions)
            if "attention_mask" in batch and module.installed.stack != "decoder":
                real[1, :2] = 0
                positions[1] -= 2
            assert_gates(values, module, positions.clamp(min=0), real)
        assert not torch.allclose(first(model(**batch)), before)

        remove_gates(model)
        assert torch.equal(first(model(**batch)), before)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert list(weights) == list(model.state_dict())


def test_only_the_given_blocks_get_gates() -> None:
    model = FAMILIES["bert"].build()
    gates = install_gates(
        model, batch=text_batch(), blocks=[1], positions="learned", max_positions=20, position_width=3
    )
    assert list(gates) == ["encoder.layer.1.attention.output.dense"]
    assert gates["encoder.layer.1.attention.output.dense"].table.shape == (20, 3)
    with pytest.raises(uc.InputError, match="block numbers from 0 to 2"):
        install_gates(FAMILIES["bert"].build(), batch=text_batch(), blocks=[3])


def test_blocks_that_share_a_layer_share_its_gates() -> None:
    model = FAMILIES["albert"].build()
    assert len(install_gates(model, batch=text_batch())) == 1
    assert [entry.block for entry in gate_report(model)] == [0, 1, 2]


def test_the_models_own_position_table_gives_the_features() -> None:
    model = FAMILIES["roberta"].build()
    table = model.embeddings.position_embeddings
    names = set(model.state_dict())
    gates = install_gates(model, batch=text_batch(), positions=table, perturbation=0.5)
    assert set(model.state_dict()) - names == {f"{g}.gate.{p}" for g in gates for p in ("weight", "bias")}
    module = next(iter(gates.values()))
    expected = 2 * torch.sigmoid(module.gate(table.weight[1:4]))  # position 0 stands behind the padding index 0
    torch.testing.assert_close(module.gates(torch.arange(3)), expected)


# Positions -----------------------------------------------------------------------------------------------------------
@decoders
def test_generation_with_a_cache_is_the_full_forward(config: Callable[[], Any]) -> None:
    model = language_model(config())
    install_gates(model, batch=text_batch(), perturbation=1.0)
    for batch in (padded("left"), padded("left", (7, 7, 7))):
        asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        with torch.no_grad():
            made = model.generate(**batch, **asked, output_logits=True)
            uncached = model.generate(**batch, **asked, use_cache=False)
            mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
            whole = told(model, {"input_ids": made.sequences[:, :-1], "attention_mask": mask})
            logits = model(**whole, use_cache=False).logits[:, -6:]
            beams, plain = (model.generate(**batch, **asked, num_beams=3, use_cache=c).sequences for c in (True, False))
        assert torch.equal(made.sequences, uncached.sequences)
        torch.testing.assert_close(torch.stack(made.logits, 1), logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(beams, plain)


@decoders
def test_a_left_padded_sequence_gives_what_it_gives_alone(config: Callable[[], Any]) -> None:
    model = language_model(config())
    install_gates(model, batch=text_batch(), perturbation=1.0)
    batch = padded("left")
    with torch.no_grad():
        together = model(**told(model, batch)).logits[:, -1]
        for row, length in enumerate(batch["attention_mask"].sum(-1)):
            alone = model(input_ids=batch["input_ids"][row : row + 1, -length:]).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_right_padding_and_a_cache_go_together() -> None:
    """New tokens behind right padding: their position counts the real tokens."""
    model = language_model(DECODERS["bloom"]())
    install_gates(model, batch=text_batch(), perturbation=1.0)
    batch, new = padded("right"), torch.tensor([[5, 6], [7, 8], [9, 10]])
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 2, dtype=torch.long)], 1)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        cached = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
        whole = model(input_ids=torch.cat([batch["input_ids"], new], 1), attention_mask=mask).logits[:, -2:]
        seen = seen_gates(model, lambda: model(input_ids=torch.cat([batch["input_ids"], new], 1), attention_mask=mask))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)
    module = next(m for m in model.modules() if isinstance(m, PositionGatedProjection))
    assert_gates(seen[0][1, -2:], module, torch.tensor([4, 5]))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_run_by_itself_and_a_decoder_with_a_cache(kind: str, side: str) -> None:
    config: Any = hf.T5Config(**T5, num_decoder_layers=2, decoder_start_token_id=0, **SPECIAL)
    if kind == "bart":
        layers = {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in (("layers", 2), ("ffn_dim", 64))}
        counts = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
        config = hf.BartConfig(
            d_model=32, max_position_embeddings=64, forced_eos_token_id=None, **layers, **counts, **SPECIAL
        )
    torch.manual_seed(0)
    model = drawn(hf.AutoModelForSeq2SeqLM.from_config(config))
    batch = padded(side)
    start = torch.full((3, 4), 5)
    install_gates(model, batch={**batch, "decoder_input_ids": start}, perturbation=1.0)
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    with torch.no_grad():
        made = model.generate(**batch, **asked, output_logits=True)
        uncached = model.generate(**batch, **asked, use_cache=False)
        logits = model(**batch, decoder_input_ids=made.sequences[:, :-1]).logits
        beams, plain = (model.generate(**batch, **asked, num_beams=3, use_cache=c).sequences for c in (True, False))
        hidden = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
        seen = seen_gates(model, lambda: model(**batch, decoder_input_ids=start, decoder_attention_mask=hidden))
    assert torch.equal(made.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(made.logits, 1), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(beams, plain)
    decoder = [m for m in model.modules() if isinstance(m, PositionGatedProjection) and m.installed.stack == "decoder"]
    assert [m.installed.places[0][1] for m in decoder] == ["attention", "cross"] * 2
    for module, values in zip(decoder, seen[2:], strict=True):
        positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2]])
        assert_gates(values, module, positions, hidden)


@pytest.mark.parametrize("name", ["roberta", "mpnet", "opt", "llama", "bert"])
def test_the_models_own_numbering_of_positions_is_told_from_theirs(name: str) -> None:
    """RoBERTa and MPNet number from behind their padding index; the gates count from 0."""
    model = FAMILIES[name].build()
    batch = text_batch()
    install_gates(model, batch=batch, perturbation=1.0)
    begins = {"roberta": 1, "mpnet": 2}.get(name, 0)
    with torch.no_grad():
        given = model(**batch, position_ids=torch.arange(begins, begins + 9)[None])[0]
        assert torch.equal(given, model(**batch)[0])


def test_sequences_laid_end_to_end_are_told_by_their_position_ids() -> None:
    model = language_model(DECODERS["llama"]())
    gates = install_gates(model, batch=text_batch(), perturbation=1.0)
    ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        seen = seen_gates(model, lambda: model(input_ids=text_batch(1, 7)["input_ids"], position_ids=ids))
    for values, module in zip(seen, gates.values(), strict=True):
        assert_gates(values, module, ids)


def test_two_towers_do_not_hear_each_others_positions() -> None:
    text = {**SMALL, "hidden_size": 32, **SPECIAL}
    vision = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
    torch.manual_seed(0)
    pictures = {**vision, "image_size": 32, "patch_size": 8}
    model = drawn(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=pictures, projection_dim=16)))
    picture = torch.randn(3, 3, 32, 32)
    gates = install_gates(model, batch={**text_batch(3, 17), "pixel_values": picture}, perturbation=1.0)
    batch = padded("left", (17, 9, 12))  # as many tokens as the pictures have patches
    with torch.no_grad():
        seen = dict(zip(gates, seen_gates(model, lambda: model(**batch, pixel_values=picture)), strict=True))
        alone = seen_gates(model, lambda: model.get_text_features(**batch))
    real = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    towers = {True: 0, False: 0}
    for name, values in seen.items():
        is_text = name.startswith("text_model")
        positions = real if is_text else torch.arange(17).expand(3, -1)
        assert_gates(values, gates[name], positions, batch["attention_mask"] if is_text else None)
        towers[is_text] += 1
    assert towers == {True: 2, False: 2}
    for name, values in zip([n for n in gates if n.startswith("text_model")], alone, strict=True):
        assert_gates(values, gates[name], real, batch["attention_mask"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.zeros(3, 3, 9, dtype=torch.long)}, r"position_ids int64\[3, 3, 9\]"),
        ({"position_ids": torch.arange(8)[None]}, "for 3 sequences of 9 tokens"),
        ({"position_ids": torch.rand(3, 9)}, r"position_ids float32\[3, 9\]"),
        ({"attention_mask": torch.tensor([[1] * 4 + [2] * 5] * 3)}, "values other than 0 and 1"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 3)}, "padding on the left for 3 sequences of 9 tokens"),
        ({"attention_mask": torch.tensor([[0] + [1] * 8] * 2)}, r"attention_mask \[2, 9\]"),
    ],
)
def test_positions_that_cannot_be_known_are_refused(given: dict[str, Tensor], message: str) -> None:
    model = OwnModel()
    install_gates(model, batch={"idx": text_batch()["input_ids"]})
    with pytest.raises(uc.UnsupportedModel, match=message):
        model(text_batch()["input_ids"], **given)
    assert model(text_batch()["input_ids"]).shape == (3, 9, 16)  # and nothing of it stays


class OwnAttention(nn.Module):
    def __init__(self, windows: int = 1) -> None:
        super().__init__()
        self.windows = windows
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-2] // self.windows, 16)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).split(16, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)).reshape(shape)


class OwnBlock(nn.Module):
    def __init__(self, windows: int = 1) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), OwnAttention(windows)
        self.other, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.other(x))


class OwnModel(nn.Module):
    """A model of one's own that ignores what it is told, so that only the gates see positions."""

    def __init__(self, windows: int = 1, reentrant: bool | None = None, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.flat = reentrant, flat
        self.token = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(OwnBlock(windows) for _ in range(2))

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        x = self.token(idx)
        x = x.flatten(0, 1) if self.flat else x
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class TokensFirst(nn.Module):
    """Attention over [token, batch, width]; what the projection reads may have the axes the other way round."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).permute(1, 2, 0, 3) for t in self.qkv(x).split(16, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        if self.turned:
            return self.out(y.transpose(1, 2).flatten(2)).transpose(0, 1)
        return self.out(y.permute(2, 0, 1, 3).flatten(2))


@pytest.mark.parametrize("turned", [False, True])
def test_tokens_may_come_first(turned: bool) -> None:
    model = OwnModel()
    model.token = nn.Sequential(model.token, Turn())
    for block in model.blocks:
        block.attention = TokensFirst(turned)
    ids, mask = text_batch()["input_ids"], padded("left", (9, 5, 7))["attention_mask"]
    gates = install_gates(model, batch={"idx": ids}, perturbation=1.0)
    assert {module.installed.token_axis for module in gates.values()} == {int(turned)}
    with torch.no_grad():
        for hidden, positions in (
            (None, torch.arange(9).expand(3, -1)),
            (mask, (mask.cumsum(-1) - 1).clamp(min=0)),
        ):
            seen = seen_gates(model, lambda hidden=hidden: model(ids, attention_mask=hidden))
            for values, module in zip(seen, gates.values(), strict=True):
                assert_gates(values if turned else values.transpose(0, 1), module, positions)


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class WithMultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (WithMultiheadAttention, {"x": torch.randn(2, 5, 16)}, "a product in its own code"),
        (
            lambda: OwnModel(windows=2),
            {"idx": torch.randint(64, (1, 8))},
            r"got \[2, 4, 16\] where the stream is \[1, 8, 16\]",
        ),
        (lambda: OwnModel(flat=True), {"idx": torch.randint(64, (1, 8))}, "laid end to end"),
    ],
)
def test_models_that_hide_their_tokens_are_refused_and_left_alone(
    model: Callable[[], nn.Module], batch: dict[str, Tensor], message: str
) -> None:
    built = model().eval()
    names = [n for n, _ in built.named_modules()]
    with pytest.raises(uc.UnsupportedModel, match=message):
        install_gates(built, batch=batch)
    assert [n for n, _ in built.named_modules()] == names
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in built.modules())


def test_gates_are_not_put_in_twice_and_not_taken_out_of_nowhere() -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(uc.InputError, match="a model that install_gates was applied to"):
        remove_gates(model)
    install_gates(model)
    with pytest.raises(uc.InputError, match="without position gates"):
        install_gates(model)
    with pytest.raises(uc.InputError, match="Pass batch="):
        install_gates(OwnModel())


# Training ------------------------------------------------------------------------------------------------------------
def gradients(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one loss over several passes: a block repeated for the first must not see the positions of the last."""
    model.train()
    model.zero_grad()
    sum(((i + 1) * first(model(**b)).square().mean() for i, b in enumerate(batches)), torch.zeros(())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert set(expected) == set(got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*requires_grad.*:UserWarning", "ignore:.*use_cache.*")
def test_gradients_under_checkpointing_are_the_plain_ones(kind: str, reentrant: bool) -> None:
    config: Any = {
        "gpt2": lambda: hf.GPT2Config(**GPT2, **SPECIAL, **UNDROPPED),
        "llama": DECODERS["llama"],
        "t5": lambda: hf.T5Config(**T5, dropout_rate=0, **SPECIAL),
        "bert": lambda: hf.BertConfig(**SMALL, **SPECIAL, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
    }[kind]()
    torch.manual_seed(0)
    model = drawn(hf.AutoModel.from_config(config))
    batches = [padded("left"), padded("right"), padded("left", (5, 7, 6))]
    if kind == "t5":
        batches = [{**b, "decoder_input_ids": torch.full((3, 4), 5)} for b in batches]
    install_gates(model, batch=batches[0], perturbation=1.0)
    expected = gradients(model, *batches)
    assert min(float(g.abs().max()) for n, g in expected.items() if "gate" in n) > 1e-7
    old, new = "gradient_checkpointing", "activation_checkpointing"
    name = new if hasattr(model, f"{new}_enable") else old
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})
    assert_same(expected, gradients(model, *batches))
    remove_gates(model)
    assert not any("Carrying" in type(vars(m).get("_gradient_checkpointing_func")).__name__ for m in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_ones_own_is_right_or_refused(reentrant: bool) -> None:
    model = OwnModel()
    plain, masked = (
        {"idx": text_batch()["input_ids"]},
        {"idx": text_batch()["input_ids"], "attention_mask": torch.ones(3, 9)},
    )
    install_gates(model, batch=plain, perturbation=1.0)
    expected = gradients(model, plain, masked)
    model.reentrant = reentrant
    assert_same(expected, gradients(model, plain, masked))
    left = masked["attention_mask"].clone()
    left[0, :3] = 0
    with pytest.raises(uc.UnsupportedModel, match="whose positions it repeats"):
        gradients(model, {**masked, "attention_mask": left})


def test_a_checkpoint_around_the_whole_model_is_right() -> None:
    model, batch = (
        OwnModel(),
        {"idx": text_batch()["input_ids"], "attention_mask": padded("left", (9, 5, 7))["attention_mask"]},
    )
    install_gates(model, batch={"idx": batch["idx"]}, perturbation=1.0)
    expected = gradients(model, batch)
    model.zero_grad()
    checkpoint(model, **batch, use_reentrant=False).square().mean().backward()
    assert_same(expected, {name: p.grad for name, p in model.named_parameters()})


def test_training_moves_the_gates_apart() -> None:
    model = language_model(DECODERS["gpt2"]())
    gates = install_gates(model, batch=text_batch())
    start = gate_report(model, positions=9)
    assert [(e.rank, e.surviving_dimension, e.smallest, e.largest) for e in start] == [(1, 32**2, 1.0, 1.0)] * 2
    parameters = [p for module in gates.values() for p in module.gate.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    batch = text_batch(8, 9)
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    end = gate_report(model, positions=9)
    assert all(e.rank == 4 and e.surviving_dimension == 4 * 8**2 and math.isfinite(e.condition) for e in end)
    assert all(e.smallest < 0.9 and e.largest > 1.1 for e in end)


def test_autocast_changes_nothing_at_the_start_and_trains() -> None:
    model = language_model(DECODERS["gpt2"]())
    batch = padded("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(**batch).logits
        install_gates(model, batch=batch)
        after = model(**batch).logits
        after.float().square().mean().backward()
    assert before.dtype == torch.bfloat16
    assert torch.equal(before, after)
    module = model.transformer.h[0].attn.c_proj
    assert module.gate.weight.grad.dtype == torch.float32
    assert module.gate.weight.grad.abs().min() > 0


def test_every_thread_has_its_own_pass() -> None:
    model = language_model(DECODERS["bloom"]())
    install_gates(model, batch=text_batch(), perturbation=1.0)
    batches = [padded("left"), padded("right"), padded("left", (7, 2, 5)), padded("left", (7, 6, 3))]
    with torch.no_grad():
        expected = [model(**b).logits for b in batches]
    wrong: list[int] = []
    gate = threading.Barrier(len(batches))

    def run(number: int) -> None:
        gate.wait()
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(**batches[number]).logits, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_after_an_interrupt_the_model_starts_afresh() -> None:
    model, ids = language_model(DECODERS["llama"]()), text_batch()["input_ids"]
    install_gates(model, batch=text_batch(), perturbation=1.0)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids, position_ids=torch.arange(20, 29)[None])
        hook.remove()
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_the_gates_run_eagerly_and_right() -> None:
    model = language_model(hf.GPT2Config(**GPT2, **SPECIAL, **UNDROPPED))
    install_gates(model, batch=text_batch(), perturbation=1.0)
    compiled = torch.compile(model, backend="aot_eager")
    for batch in (padded("left"), padded("right"), padded("left", (4, 7, 5))):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
        expected, got = gradients(model, batch), gradients(compiled, batch)
        assert_same(expected, {name.removeprefix("_orig_mod."): g for name, g in got.items()})


# Copies and files ----------------------------------------------------------------------------------------------------
def test_a_copy_has_gates_and_hooks_of_its_own() -> None:
    model = language_model(DECODERS["bloom"]())
    install_gates(model, batch=text_batch(), perturbation=1.0)
    batch = padded("left")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = model(**batch).logits
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(**batch).logits, expected)
            remove_gates(other)
            assert not any(isinstance(m, PositionGatedProjection) for m in other.modules())
            assert not any(m._forward_pre_hooks for m in other.modules())
            assert not torch.allclose(other(**batch).logits, expected)
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, positions: Any) -> None:
    model = language_model(DECODERS["gpt2"]())
    plain_names = set(model.state_dict())
    batch = padded("left")
    install_gates(model, batch=batch, positions=positions, perturbation=1.0)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch).logits

    again = hf.AutoModelForCausalLM.from_config(model.config).eval()
    install_gates(again, batch=batch, positions=positions)
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)

    hf.logging.set_verbosity_error()
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path)  # the plain model, with the weights of the gated one
    assert set(plain.state_dict()) == plain_names
    assert torch.equal(plain.transformer.h[1].attn.c_proj.weight, model.transformer.h[1].attn.c_proj.weight)
    install_gates(plain, batch=batch, positions=positions)
    report = plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert report.missing_keys == ["lm_head.weight"]  # tied to the embedding: transformers stores it once
    assert report.unexpected_keys == []
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, expected)


# Folding -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gates_constant_in_position_are_folded_into_the_weights(kind: str) -> None:
    model = language_model(DECODERS[kind]()).double()
    batch = padded("left")
    gates = install_gates(model, batch=batch)
    originals = {name: module.projection for name, module in gates.items()}
    last = list(gates)[-1]
    with torch.no_grad():
        gates[last].gate.bias.copy_(torch.tensor([-1.0, 0.5, 2.0, 0.0]))
        expected = model(**batch).logits
        untouched = originals[next(iter(gates))].weight.clone()
        folded = originals[last].weight.clone()
    remove_gates(model, fold=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)  # these models norm in float32
    assert all(model.get_submodule(name) is module for name, module in originals.items())
    assert torch.equal(originals[next(iter(gates))].weight, untouched)
    scale = (2 / (1 + np.exp([1.0, -0.5, -2.0, 0.0]))).repeat(8)
    matrix = folded.numpy() * (scale[:, None] if kind == "gpt2" else scale)
    np.testing.assert_allclose(originals[last].weight.detach().numpy(), matrix, rtol=1e-12)


def test_gates_that_vary_are_not_folded_and_nothing_is_touched() -> None:
    model = language_model(DECODERS["gpt2"]())
    gates = install_gates(model)
    with torch.no_grad():
        next(iter(gates.values())).gate.bias.fill_(1.0)
        list(gates.values())[1].gate.weight[2, 0] = 1e-3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(uc.InputError, match=r"block 1 \(transformer.h.1.attn.c_proj\) that vary by 0.0"):
        remove_gates(model, fold=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(model.transformer.h[0].attn.c_proj, PositionGatedProjection)


def test_a_weight_that_is_used_twice_is_not_folded() -> None:
    model = OwnModel()
    model.blocks[1].attention.out.weight = model.blocks[0].attention.out.weight
    gates = install_gates(model, batch={"idx": text_batch()["input_ids"]})
    remove_gates(model, fold=True)  # by 1: nothing to change
    gates = install_gates(model, batch={"idx": text_batch()["input_ids"]})
    with torch.no_grad():
        next(iter(gates.values())).gate.bias.fill_(1.0)
    with pytest.raises(uc.InputError, match="a weight used only by"):
        remove_gates(model, fold=True)


# With the rest of the house ------------------------------------------------------------------------------------------
def test_a_gated_model_can_be_diagnosed_and_the_shares_are_those_of_the_gated_heads() -> None:
    model = language_model(DECODERS["llama"]())
    batch = text_batch(3, 8)
    gates = install_gates(model, batch=batch, perturbation=1.0)
    given: list[Tensor] = []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: given.append(args[0].clone())
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    record = uc.diagnose(model, batches=[batch]).record
    module = gates["model.layers.1.self_attn.o_proj"]
    gated = given[0] * module.gates(torch.arange(8)).repeat_interleave(8, -1)
    shares = heads.energy_share(gated, module.weight.T, 4).mean(0)
    got = [share.mean for share in record.heads[1].energy_share]
    np.testing.assert_allclose(got, shares.detach().numpy(), rtol=1e-4)
    ungated = heads.energy_share(given[0], module.weight.T, 4).mean(0)
    assert not np.allclose(got, ungated.detach().numpy(), rtol=1e-2)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_without_works_on_a_gated_model_and_takes_the_gates_positions_too(name: str) -> None:
    model = FAMILIES[name].build()
    batch = text_batch()
    install_gates(model, batch=batch, perturbation=1.0)
    assert known_anatomy(model) is not None
    assert known_example(model) is not None
    with torch.no_grad():
        before = model(**batch)[0]
        with uc.without(model, "mlp"):
            assert not torch.allclose(model(**batch)[0], before)
        with uc.without(model, "positions", "mask"):
            order = torch.arange(9).roll(4)
            shuffled = {name: tensor[:, order] for name, tensor in batch.items()}
            torch.testing.assert_close(model(**shuffled)[0], model(**batch)[0][:, order], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(**batch)[0], before)
