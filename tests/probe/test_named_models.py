"""Models with a peculiarity each: windows, samples of sound, two towers, sequences laid end to end, labels in the place of a
decoder's tokens, a short prompt. Figures equal those of the weights and the streams that the models' own modules return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.helpers.observing import entropies, observe
from tests.reference.geometry import consensus_distance, effective_rank
from uncollapse.probe.attention import ATTENTION_MEASURES
from uncollapse.probe.sites import PLAIN_MEASURES

SPECIAL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@dataclass
class Named:
    """A model, a batch, the names of its blocks and of the modules that return attention weights, and which rows of the streams
    are real (None: all). `attentions` and `blocks` are in the order in which the blocks run."""

    model: Callable[[], nn.Module]
    batch: dict[str, Any]
    blocks: list[str]
    attentions: list[str]
    real: dict[str, Tensor] = field(default_factory=dict)  # by the beginning of a block's name


def draws(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(0))


MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def bigbird() -> Named:
    config = hf.BigBirdConfig(**SMALL, **SPECIAL, attention_type="original_full", max_position_embeddings=32)
    return Named(
        lambda: hf.BigBirdModel(config),
        {"input_ids": tokens(2, 9), "attention_mask": MASK},
        [f"encoder.layer.{i}" for i in range(2)],
        [f"encoder.layer.{i}.attention.self" for i in range(2)],
        {"": MASK},
    )


def swin() -> Named:
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    places = [f"encoder.layers.{stage}.blocks.{i}" for stage in range(2) for i in range(2)]
    return Named(
        lambda: hf.SwinModel(config),
        {"pixel_values": draws(2, 3, 32, 32)},
        places,
        [f"{p}.attention" for p in places],
    )


def wav2vec2() -> Named:
    config = hf.Wav2Vec2Config(
        **SMALL,
        vocab_size=32,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
    )
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 240:] = 0
    frames = [int(((int(n) - 8) // 4 + 1 - 4) // 4 + 1) for n in mask.sum(-1)]
    real = torch.arange(frames[0]) < torch.tensor(frames)[:, None]
    return Named(
        lambda: hf.Wav2Vec2Model(config),
        {"input_values": draws(2, 400), "attention_mask": mask},
        [f"encoder.layers.{i}" for i in range(2)],
        [f"encoder.layers.{i}.attention" for i in range(2)],
        {"": real},
    )


def clip() -> Named:
    config = hf.CLIPConfig(
        text_config={**SMALL, **SPECIAL, "max_position_embeddings": 16},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    towers = ["vision_model", "text_model"]
    return Named(
        lambda: hf.CLIPModel(config),
        {"input_ids": tokens(2, 9), "attention_mask": MASK, "pixel_values": draws(2, 3, 32, 32)},
        [f"{t}.encoder.layers.{i}" for t in towers for i in range(2)],
        [f"{t}.encoder.layers.{i}.self_attn" for t in towers for i in range(2)],
        {"text_model": MASK},
    )


def t5() -> Named:
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    decoder = [f"decoder.block.{i}" for i in range(2)]
    crossing = [f"{p}.layer.{k}" for p in decoder for k in ("0.SelfAttention", "1.EncDecAttention")]
    return Named(
        lambda: hf.T5ForConditionalGeneration(config),
        {"input_ids": tokens(2, 9), "attention_mask": MASK, "labels": tokens(2, 5)},
        [*(f"encoder.block.{i}" for i in range(2)), *decoder],
        [*(f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)), *crossing],
        {"encoder": MASK},
    )


def whisper() -> Named:
    config = hf.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    decoder = [f"decoder.layers.{i}" for i in range(2)]
    return Named(
        lambda: hf.WhisperModel(config),
        {"input_features": draws(2, 8, 40), "decoder_input_ids": tokens(2, 3)},
        [*(f"encoder.layers.{i}" for i in range(2)), *decoder],
        [
            *(f"encoder.layers.{i}.self_attn" for i in range(2)),
            *(f"{p}.{k}" for p in decoder for k in ("self_attn", "encoder_attn")),
        ],
    )


NAMED = {"bigbird": bigbird, "swin": swin, "wav2vec2": wav2vec2, "clip": clip, "t5": t5, "whisper": whisper}


def built(named: Named) -> nn.Module:
    """Every parameter drawn, so that no attention is uniform and no block does nothing."""
    torch.manual_seed(0)
    model = named.model().eval()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def returned(model: nn.Module, named: Named) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the blocks and the attentions return in a plain run: streams and weights, by name."""
    streams: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}

    def keep(found: dict[str, Tensor], name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs = [output] if isinstance(output, Tensor) else [o for o in output if isinstance(o, Tensor)]
            # T5 gives its position bias first
            found[name] = ([o for o in outputs if o.ndim == 4][-1] if found is weights else outputs[0]).detach().clone()

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(keep(streams, n)) for n in named.blocks]
    hooks += [model.get_submodule(n).register_forward_hook(keep(weights, n)) for n in named.attentions]
    with torch.no_grad():
        model(**named.batch)
    for hook in hooks:
        hook.remove()
    return streams, weights


def real_of(named: Named, name: str) -> Tensor | None:
    return next((real for start, real in named.real.items() if name.startswith(start)), None)


@pytest.mark.parametrize("name", NAMED)
def test_figures_are_those_of_what_the_models_modules_return(name: str) -> None:
    named = NAMED[name]()
    model = built(named)
    streams, weights = returned(model, named)
    observed = observe(model, [named.batch])
    clouds = [streams[n].double().numpy() for n in named.blocks]
    sites = [s for s in observed.sites if s.block is not None]
    assert len(sites) == len(clouds)
    for site, block, cloud in zip(sites, named.blocks, clouds, strict=True):
        real = real_of(named, block)
        rows = [x if real is None else x[real[i].bool().numpy()] for i, x in enumerate(cloud)]
        for measure, reference in (("consensus_distance", consensus_distance), ("effective_rank", effective_rank)):
            got = site.plain.summary(PLAIN_MEASURES.index(measure))[0]
            assert got == pytest.approx(np.mean([reference(x, 2.0**-23) for x in rows]), rel=1e-4), (block, measure)
    assert len(observed.attention) == len(named.attentions)
    for statistics, attention in zip(observed.attention, named.attentions, strict=True):
        own = weights[attention]
        real = real_of(named, attention) if statistics.kind == "self" else None
        expected, _ = entropies(own, real if real is not None and own.shape[0] == len(real) else None)
        row = ATTENTION_MEASURES.index("entropy")
        got = [statistics.values.summary(row, head)[0] for head in range(statistics.call.heads)]
        assert got == pytest.approx(expected, abs=1e-5), attention


def qwen2_vl(attention: str = "sdpa") -> hf.Qwen2VLModel:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32}
    config = hf.Qwen2VLConfig(
        text_config={**SMALL, **SPECIAL, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "temporal_patch_size": 1},
        image_token_id=60, vision_start_token_id=61, vision_end_token_id=62, video_token_id=63,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.Qwen2VLModel(config)


def seen_weights(visual: nn.Module, batch: dict[str, Tensor]) -> list[list[Tensor]]:
    """The attention weights of each block of the vision tower [head, query, key], image by image: NumPy, from what its attentions
    are given and their weights."""
    given: list[tuple[np.ndarray, list[np.ndarray]]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        turns = [t.double().numpy()[:, None] for t in kwargs["position_embeddings"]]
        given.append((states.double().numpy(), turns))

    hooks = [b.attn.register_forward_pre_hook(keep, with_kwargs=True) for b in visual.blocks]
    with torch.no_grad():
        visual(**batch)
    for hook in hooks:
        hook.remove()
    ends = np.cumsum(batch["grid_thw"].prod(1).numpy())[:-1]
    found = []
    for (states, (cos, sin)), block in zip(given, visual.blocks, strict=True):
        weight, bias = (p.detach().double().numpy() for p in (block.attn.qkv.weight, block.attn.qkv.bias))
        q, k, _ = (states @ weight.T + bias).reshape(len(states), 3, 4, 8).transpose(1, 0, 2, 3)
        q, k = (x * cos + np.concatenate([-x[..., 4:], x[..., :4]], -1) * sin for x in (q, k))
        images = []
        for own_q, own_k in zip(np.split(q, ends), np.split(k, ends), strict=True):
            logits = np.einsum("qhd,khd->hqk", own_q, own_k) / 8**0.5
            raised = np.exp(logits - logits.max(-1, keepdims=True))
            images.append(torch.from_numpy(raised / raised.sum(-1, keepdims=True)))
        found.append(images)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_to_images_laid_end_to_end_is_that_of_each_image(attention: str) -> None:
    """The vision tower of Qwen2-VL: a call for each image, in a loop over them; other numbers of images in every batch."""
    visual = built(Named(lambda: qwen2_vl(attention), {}, [], [])).visual
    grids = [[[1, 2, 4], [1, 4, 6]], [[1, 4, 4]], [[1, 2, 2], [1, 4, 4], [1, 2, 6], [1, 4, 4]]]
    batches = []
    for seed, grid in enumerate(map(torch.tensor, grids)):
        drawn = torch.randn(int(grid.prod(1).sum()), 48, generator=torch.Generator().manual_seed(seed))
        batches.append({"hidden_states": drawn, "grid_thw": grid})
    observed = observe(visual, batches, level="full")
    alone = []
    for given in batches:
        ends = given["grid_thw"].prod(1).tolist()
        for patches, grid in zip(given["hidden_states"].split(ends), given["grid_thw"], strict=True):
            alone.append({"hidden_states": patches, "grid_thw": grid[None]})
    one_by_one = observe(visual, alone, level="full")
    images = [
        [image for images in per_batch for image in images]
        for per_batch in zip(*(seen_weights(visual, b) for b in batches), strict=True)
    ]
    for statistics, single, own in zip(observed.attention, one_by_one.attention, images, strict=True):
        assert statistics.reasons == {}
        assert statistics.values.count.eq(7).all(-1).any()
        entropy, normalised = (np.mean(e, 0) for e in zip(*(entropies(A[None], None) for A in own), strict=True))
        for measure, expected in (("entropy", entropy), ("normalized_entropy", normalised)):
            row = ATTENTION_MEASURES.index(measure)
            assert [statistics.values.summary(row, h)[0] for h in range(4)] == pytest.approx(expected, abs=1e-5)
        for figures in ("values", "energy", "tokens"):
            for field_name in ("total", "low", "high", "count"):
                got, wanted = (getattr(getattr(s, figures), field_name).double() for s in (statistics, single))
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_images_laid_end_to_end_are_told_apart() -> None:
    """Qwen2-VL: the patches of all images of a batch in one row, each image attended to by a call of its own."""
    ids = tokens(2, 9).clamp(max=55)
    ids[:, 1], ids[:, 2:6] = 61, 60
    named = Named(
        qwen2_vl,
        {
            "input_ids": ids,
            "pixel_values": draws(32, 48),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
            "mm_token_type_ids": (ids == 60).int(),
        },
        [*(f"visual.blocks.{i}" for i in range(2)), *(f"language_model.layers.{i}" for i in range(2))],
        [f"language_model.layers.{i}.self_attn" for i in range(2)],
    )
    model = built(named)
    streams, weights = returned(model, named)
    observed = observe(model, [named.batch])
    sites = [s for s in observed.sites if s.block is not None]
    for site, block in zip(sites, named.blocks, strict=True):
        cloud = streams[block].double().numpy()
        rows = np.split(cloud, 2) if block.startswith("visual") else list(cloud)
        got = site.plain.summary(PLAIN_MEASURES.index("consensus_distance"))[0]
        assert got == pytest.approx(np.mean([consensus_distance(x, 2.0**-23) for x in rows]), rel=1e-4), block
    row = ATTENTION_MEASURES.index("entropy")
    seeing, reading = observed.attention[:2], observed.attention[2:]
    assert [a.values.summary(row, 0)[3] for a in seeing] == [2, 2]
    for statistics, own in zip(reading, weights.values(), strict=True):
        got = [statistics.values.summary(row, head)[0] for head in range(4)]
        assert got == pytest.approx(entropies(own, None)[0], abs=1e-5)
