"""Any transformers model made tiny from its default config, and a batch it runs on.

Rules on the attributes' names shrink what looks like a size: the same width, the same heads, the same vocabulary
everywhere keep what must agree in agreement. Where that fails, only layers and experts are cut (`reduced`). What neither
can guess is in `HINTS`, a line a type. Names serve here to *build* models to test with; the package itself uses none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from uncollapse.anatomy.probing import probing

VOCABULARY = 128
PARAMETERS = 90_000_000  # a larger model is not built: its config was not understood
Config = dict[str, Any]

# What no rule on names can guess: attributes set after shrinking (dots reach nested configs), a line a type.
_ROPE_OF_8 = {"rope_parameters.mrope_section": [2, 1, 1]}
_ROPE_OF_4 = {"rope_parameters.mrope_section": [1, 1, 0]}
_IN_TEXT_8 = {"text_config.rope_parameters.mrope_section": [2, 1, 1]}
_IN_TEXT_4 = {"text_config.rope_parameters.mrope_section": [1, 1, 0]}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_SAM = {
    "prompt_encoder_config.image_size": 32,
    "prompt_encoder_config.image_embedding_size": 4,
    "vision_config.output_channels": 32,
}
HINTS: dict[str, Config] = {
    "align": {"projection_dim": 640},
    "audio-spectrogram-transformer": {"max_length": 48, "frequency_stride": 8, "time_stride": 8},
    "autoformer": {"label_length": 2},
    "bamba": {"num_hidden_layers": 4, "layer_types": None, "layers_block_type": None, "attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": 2},
    "bridgetower": {"hidden_size": 128, "text_config.hidden_size": 128, "vision_config.hidden_size": 128},
    "bros": {"dim_bbox_projection": 8},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_hidden_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 16,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config.swa_head_dim": 16},
    "dots3_note_text": {"swa_head_dim": 16},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6}, "vq_config.base_channels": 32},
    "esm": {"vocab_size": 33},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "fun_asr_nano_encoder": {"num_stacked_frames": 1},
    "glm46v": _IN_TEXT_8,
    "glm4v": _IN_TEXT_8,
    "glm4v_moe": _IN_TEXT_4,
    "glm4v_moe_text": _ROPE_OF_4,
    "glm4v_text": _ROPE_OF_8,
    "glm5_next": {"text_config.index_topk": 16},
    "glm5_next_text": {"index_topk": 16},
    "glm_image": _IN_TEXT_8,
    "glm_image_text": _ROPE_OF_8,
    "glm_ocr": _IN_TEXT_8,
    "glm_ocr_text": _ROPE_OF_8,
    "glmga": _IN_TEXT_8,
    "granite_speech5_ctc": {"encoder_config.context_size": 8, "encoder_config.max_pos_emb": 16},
    "granite_speech5_encoder": {"context_size": 8, "max_pos_emb": 16},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_vl": _IN_TEXT_8 | _ROPE_OF_8,
    "hunyuan_vl_text": _ROPE_OF_8,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": None},
    "kosmos-2": {"latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral4": {"head_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "neomme": {"rope_parameters.full_attention.partial_rotary_factor": 0.5},
    "nemotron": {"num_key_value_heads": 2},
    "olmo_hybrid": {"num_hidden_layers": 4, "layer_types": _HYBRID},
    "paddleocr_vl": _IN_TEXT_8,
    "qwen2_5_vl": _IN_TEXT_8,
    "qwen2_5_vl_text": _ROPE_OF_8,
    "qwen2_vl": _IN_TEXT_8,
    "qwen2_vl_text": _ROPE_OF_8,
    "recurrent_gemma": {"num_hidden_layers": 4, "block_types": ["recurrent", "attention"], "layer_types": None},
    "sam": _SAM,
    "sam_hq": _SAM | {"mask_decoder_config.vit_dim": 32},
    "seggpt": {"image_size": [64, 32]},
    "siglip": {"text_config.projection_size": 32},
    "siglip2": {"text_config.projection_size": 32},
    "step3p7": {"text_config.sliding_window": 4},
    "tvp": {"max_img_size": 32, "num_frames": 2, "visual_prompt_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64, "mamba_headdim": 8, "n_mamba_heads": 8},
}

# Names that mean a size -------------------------------------------------------------------------------------------------
_LAYERS = re.compile(
    r"^(num_hidden_layers|num_layers|n_layers?|layers|depth|num_decoder_layers|num_encoder_layers|num_blocks|"
    r"(.*_)?(encoder|decoder)_layers|.*num_hidden_layers|[lxr]_layers|num_(spatial|temporal|auxiliary)_layers|"
    r"(memory_attention|decoder|text_encoder|perceiver_resampler|resampler)_(num_layers|depth)|resampler_depth|"
    r"num_attention_layers|mit_num_hidden_layers|num_self_attends_per_block|num_layers_per_stack)$"
)
_WIDTHS = re.compile(
    r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|hidden_dim|model_dim|d_latents|lru_width|"
    r"(out|text|audio|vision|encoder|decoder|backbone|projection|projector|output|attention|image_text|cross|fusion|"
    r"mit|pred|memory_attention|memory_encoder|pooler|cross_attention|merged|perceiver_resampler|fpn)_?hidden_size|"
    r"embedding_size|word_embed_proj_dim|projection_dim|output_dim|embedding_dim|classifier_proj_size|"
    r"input_embedding_size|output_embedding_size|hidden_size_per_layer_input|encoder_hidden_dim|decoder_hidden_dim|"
    r"pooler_output_size|project_dim|output_hidden_size|text_encoder_width|adapter_out_dim|output_proj_dims|"
    r"vision_output_dim|true_hidden_size|vit_dim|frequency_embedding_size|projection_hidden_dim)$"
)
_INNER = re.compile(
    r"^(.*intermediate_size|.*ffn_dim|d_ff|dff|n_inner|d_inner|mlp_dim|ffn_hidden_size|dim_ff|.*dim_feedforward|"
    r".*feedforward_dim|feed_forward_size|.*linear_units|.*intermediate_dim|expert_ffn_hidden_size|"
    r"intermediate_size_mlp|.*feed_forward_hidden_size|share_expert_dim)$"
)
_HEADS = re.compile(r"^(.*num_attention_heads|(.*_)?num_heads|n_heads?|(.*_)?attention_heads|resampler_n?_?heads)$")
_KEY_VALUE_HEADS = re.compile(
    r"^(.*num_key_value_heads|num_kv_heads|kv_n_heads|num_key_value_attention_heads|num_query_groups)$"
)
_HEAD_WIDTHS = re.compile(r"^((.*_)?head_dim|d_kv|d_head|attention_head_size|kv_channels|dim_head)$")
_BACKBONE = {"out_features", "out_indices", "stage_names", "_out_features", "_out_indices"}
_AT_MOST = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"], 2
    ),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "max_window_layers", "zero_expert_num"], 1),
    **dict.fromkeys(
        ["q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_head_dim", "index_head_dim", "entity_emb_size"], 16
    ),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rope_dim", "query_pre_attn_scalar"], 8),
    **dict.fromkeys(
        ["index_n_heads", "index_topk", "sliding_window", "sliding_window_size", "attention_chunk_size"], 4
    ),
    **dict.fromkeys(["local_attention", "attention_window_size", "rotary_dim", "num_query_tokens", "num_landmarks"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"], 64),
    **dict.fromkeys(["max_2d_position_embeddings", "entity_vocab_size", "num_hash_buckets", "mamba_d_ssm"], 64),
    **dict.fromkeys(["image_size", "img_size", "pretrain_image_size", "codebook_size"], 32),
    **dict.fromkeys(["num_kv_shared_layers", "num_nextn_predict_layers", "chunk_size_feed_forward"], 0),
    **dict.fromkeys(["mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim", "mamba_d_state"], 8),
    **dict.fromkeys(["ssm_state_size", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["num_queries", "num_conv_pos_embeddings", "num_latents", "patch_size"], 8),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads", "segment_means_seq_len"], 4),
    **dict.fromkeys(["linear_num_key_heads", "num_conv_pos_embedding_groups"], 2),
    **dict.fromkeys(["num_mel_bins", "encoder_hash_byte_group_vocab"], 16),
    "conv_depthwise_kernel_size": 7,
    "num_filters": 8,
    "upsample_groups": 32,
    "max_source_positions": 24,
    "vocab_size_per_layer_input": VOCABULARY,
}
_WHERE_NONE = {"head_dim": 8, "prediction_length": 4, "num_experts_per_tok": 2}


# Shrinking ------------------------------------------------------------------------------------------------------------
def shrunk(config: Config) -> Config:
    """A small copy: one width, one number of heads, one vocabulary, and as few layers as show every kind of layer."""
    return _shrunk(config, {})


def reduced(config: Config) -> Config:
    """Fewer layers and experts only: the widths stay as they are, so nothing can disagree."""
    small = _with_few_layers(config)
    for name, value in small.items():
        if isinstance(value, dict) and name not in {"id2label", "label2id", "rope_parameters"}:
            small[name] = reduced(value)
        elif isinstance(value, int) and name in {"num_experts", "num_local_experts", "n_routed_experts"}:
            small[name] = min(value, 8)
    return small


def _with_few_layers(config: Config) -> Config:
    """Two layers, or as many as name different kinds, in every list that has an entry a layer."""
    small = {k: v for k, v in config.items() if isinstance(k, str)}
    if len(small) < len(config):
        return dict(config)
    for name in [n for n, v in small.items() if _LAYERS.match(n) and type(v) is int and v > 1]:
        old = small[name]
        lists = [n for n, v in small.items() if isinstance(v, (list, tuple)) and len(v) == old]
        kinds = [small[n] for n in lists if all(isinstance(x, (str, int)) for x in small[n])]
        keep = _representatives(kinds, old)
        small[name] = len(keep)
        for listed in lists:
            small[listed] = [small[listed][i] for i in keep]
        special = small.get("per_layer_config")
        if isinstance(special, dict):
            small["per_layer_config"] = {n: v for n, i in enumerate(keep) for k, v in special.items() if int(k) == i}
        if len(keep) < old and any(len(small.get(n) or ()) == old + 1 for n in ("stage_names",)):
            small = {k: v for k, v in small.items() if k not in _BACKBONE}
    return small


def _representatives(lists: list[Any], length: int) -> list[int]:
    kinds = list(zip(*lists, strict=True)) if lists else [()] * length
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    if len(first) > 4:  # a number of its own for every layer says nothing of its kind
        return [0, length - 1]
    chosen = sorted(first.values())
    return chosen if len(chosen) > 1 else [0, 1][:length]


def _shrunk(config: Config, ids: dict[int, int]) -> Config:
    small = _with_few_layers(config)
    heads = max([v for n, v in small.items() if isinstance(n, str) and _HEADS.match(n) and type(v) is int], default=0)
    for name, value in small.items():
        if not isinstance(name, str) or name in {"id2label", "label2id"} or _LAYERS.match(name):
            continue
        if name in {"rope_parameters", "rope_scaling"} and isinstance(value, dict):
            small[name] = _rope(value)
        elif isinstance(value, dict):
            small[name] = _shrunk(value, ids)
        elif value is None and name in _WHERE_NONE:
            small[name] = _WHERE_NONE[name]
        elif type(value) is int:
            small[name] = _small_number(name, value, heads, ids)
        elif isinstance(value, (list, tuple)) and value:
            small[name] = _small_list(name, list(value), ids)
    return small


def _small_number(name: str, value: int, heads: int, ids: dict[int, int]) -> int:
    if name in _AT_MOST:
        return min(value, _AT_MOST[name])
    if _WIDTHS.match(name):
        return min(value, 32)
    if _INNER.match(name):
        return min(value, 64)
    if _KEY_VALUE_HEADS.match(name):
        return 4 if value == heads else min(value, 2)
    if _HEADS.match(name):
        return min(value, 4)
    if _HEAD_WIDTHS.match(name):
        return min(value, 8)
    if name.endswith(("vocab_size", "vocabulary_size")):
        return min(value, VOCABULARY)
    if re.search(r"(_id|_index|_token)$", name):
        return _small_id(value, ids)
    return value


def _small_id(value: int, ids: dict[int, int]) -> int:
    """A special token's number within the small vocabulary, the same wherever it was the same."""
    return ids.setdefault(value, VOCABULARY - 40 + len(ids) % 40) if value >= VOCABULARY - 40 else value


def _small_list(name: str, value: list[Any], ids: dict[int, int]) -> list[Any]:
    if not all(type(v) is int for v in value):
        return value
    if name.endswith(("token_id", "token_ids")):
        return [_small_id(v, ids) for v in value]
    if name in {"depths", "num_block_repeats", "stage_num_blocks", "blocks_per_stage", "layer_depths"}:
        return [min(v, 2) for v in value]
    if name == "image_size":
        return [min(v, 32) for v in value]
    if name in {"deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes", "vision_feature_layer"}:
        return [0, 1][: len(value)]
    return [32 for _ in value] if name == "conv_dim" else [2, 1, 1] if name == "mrope_section" else value


def _rope(parameters: Config) -> Config:
    """Rotary settings for heads of width 8: factors a frequency are cut, everything else stays."""
    small: Config = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            small[name] = _rope(value)
        elif name in {"short_factor", "long_factor"} and value:
            small[name] = list(value)[:4]
        elif name == "mrope_section" and value:
            small[name] = [2, 1, 1]
        elif name == "original_max_position_embeddings" and value:
            small[name] = min(value, 32)
        else:
            small[name] = value
    return small


# Building -------------------------------------------------------------------------------------------------------------
def built(kind: str) -> tuple[Any, dict[str, Any], str]:
    """A tiny model of this type, a batch it runs on, and the strategy that made it. `RuntimeError` says what failed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config_class = CONFIG_MAPPING[kind]
    model_class = MODEL_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    default = config_class().to_dict()
    trouble: list[str] = []
    strategies: tuple[Callable[[Config], Config], ...] = (shrunk, reduced)
    for strategy in strategies:
        try:
            small = strategy(default)
            for path, value in HINTS.get(kind, {}).items():
                _put(small, path, value)
            small.pop("transformers_version", None)
            config = config_class.from_dict(small)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class._from_config(config).parameters())
            if size > PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters: too large, its config was not understood")
            torch.manual_seed(0)
            model = model_class._from_config(config).eval()
            _draw(model)
            return model, runnable(model), strategy.__name__
        except Exception as error:  # whatever a model raises belongs in the table
            trouble.append(f"{strategy.__name__}: {one_line(error)}")
    raise RuntimeError("; ".join(dict.fromkeys(t if i == 0 else t[:100] for i, t in enumerate(trouble))))


def without_paths(text: str) -> str:
    """What an error says, without the folders of the machine that it was raised on."""
    return re.sub(r"/\S*/site-packages/", "", text)


def one_line(error: BaseException, length: int = 200) -> str:
    said = without_paths(" ".join(str(error).split()))
    return f"{type(error).__name__}: {said}"[:length]


def _put(config: Config, path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        config = config.setdefault(name, {})
    if value is None:
        config.pop(last, None)
    else:
        config[last] = value


def _draw(model: Any) -> None:
    """Every parameter drawn anew: no LayerScale tiny, no gate closed, no bias zero, no attention uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and 0 < parameter.numel() <= 20_000_000:
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim >= 2:
                    parameter.copy_(noise * min(0.2, 1.2 * parameter[0].numel() ** -0.5))
                else:
                    parameter.add_(0.1 * noise)


# Inputs ---------------------------------------------------------------------------------------------------------------
def runnable(model: Any) -> dict[str, Any]:
    """The first batch, of those that the signature suggests, on which the model runs."""
    failures: list[str] = []
    for batch in batches(model):
        try:
            with probing(model):
                model(**batch)
            return batch
        except Exception as error:  # the next guess
            failures.append(f"{'+'.join(batch)}: {one_line(error, 120)}")
    raise RuntimeError("no input found; " + " | ".join(list(dict.fromkeys(failures))[:2]))


def _find(config: Any, names: str, default: Any) -> Any:
    """The first of these attributes on the config or on a nested one."""
    for name in names.split():
        value = getattr(config, name, None)
        if value is not None:
            return value
    for nested in vars(config).values():
        if hasattr(nested, "to_dict"):
            value = _find(nested, names, None)
            if value is not None:
                return value
    return default


class _Draws:
    """Random inputs of a fixed seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, *shape: int) -> torch.Tensor:
        return torch.randint(3, 50, shape, generator=self.generator)


def batches(model: Any) -> Iterator[dict[str, Any]]:
    """Batches to try, the likeliest first: those that give every argument without a default, then the others."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {n: p for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds}
    required = {n for n, p in parameters.items() if p.default is p.empty}
    found = [b for b in _candidates(model, set(parameters), required) if b]
    yield from (b for b in found if required <= set(b))
    yield from (b for b in found if not required <= set(b))


def _candidates(model: Any, names: set[str], required: set[str]) -> Iterator[dict[str, Any]]:
    draws = _Draws()
    main = getattr(model, "main_input_name", "input_ids")
    text: dict[str, Any] = {"input_ids": draws.tokens(2, 8)}
    masked = {**text, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    if "qformer_input_ids" in names:
        masked["qformer_input_ids"] = draws.tokens(2, 8)
    decoder = {"decoder_input_ids": draws.tokens(2, 6)} if "decoder_input_ids" in names else {}
    images = list(_images(model.config, names, draws))
    yield from _odd_ones(model.config, names, draws, masked)
    if "input_ids" in names and main in {"input_ids", "pixel_values", "pixel_values_videos", "inputs_embeds"}:
        if decoder:
            yield {**masked, **decoder}
        if main == "input_ids":
            yield masked if "attention_mask" in names else text
        yield from ({**masked, **decoder, **image} for image in images)
        yield masked
        yield text
    for sound in _sounds(model.config, names, draws):
        yield {**sound, **(masked if "input_ids" in required else {}), **decoder}
        yield {**sound, **masked}
    yield from images
    if "inputs_embeds" in names:
        yield {"inputs_embeds": draws.normal(2, 8, _find(model.config, "hidden_size d_model", 32))}
    yield dict(getattr(model, "dummy_inputs", {}) or {})


def _images(config: Any, names: set[str], draws: _Draws) -> Iterator[dict[str, Any]]:
    vision = getattr(config, "vision_config", None) or config
    size = _find(vision, "image_size img_size", 32)
    height, width = (
        (size, size) if isinstance(size, int) else tuple(size)[:2] if isinstance(size, (list, tuple)) else (32, 32)
    )
    channels = _find(vision, "num_channels in_channels in_chans", 3)
    channels = channels if isinstance(channels, int) else 3
    frames = _find(vision, "num_frames frames_per_clip", 8)
    patch = _find(vision, "patch_size", 8)
    patch = patch if isinstance(patch, int) else 8
    flat = channels * patch * patch
    deep = flat * _find(vision, "temporal_patch_size patch_temporal", 1)
    grid = next((n for n in ("grid_thw", "image_grid_thw", "grid_hws") if n in names), None)
    pixels = next((n for n in ("pixel_values", "hidden_states") if n in names), None)
    if grid and pixels:
        for shape in ((16, deep), (16, flat), (16, channels, patch, patch), (1, 16, flat)):
            extra = {"merge_sizes": torch.tensor([2])} if "merge_sizes" in names else {}
            yield {pixels: draws.normal(*shape), grid: torch.tensor([[1, 4, 4]]), **extra}
        yield {pixels: draws.normal(16, deep), grid: torch.tensor([[4, 4]])}
    if "spatial_shapes" in names:
        mask = {
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
        yield {"pixel_values": draws.normal(2, 16, flat), **mask}
    if "pixel_position_ids" in names:
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
        yield {"pixel_values": draws.normal(1, 16, flat), "pixel_position_ids": places}
    if "target_sizes" in names:
        yield {"pixel_values": draws.normal(1, channels, patch, 16 * patch), "target_sizes": torch.tensor([[4, 4]])}
    if "pixel_values" in names:
        yield {"pixel_values": draws.normal(2, channels, height, width)}
        yield {"pixel_values": draws.normal(1, frames, channels, height, width)}
        yield {"pixel_values": draws.normal(1, 2, channels, height, width)}
        yield {"pixel_values": draws.normal(2, 1, channels, height, width)}
        yield {"pixel_values": draws.normal(1, channels, frames, height, width)}
        yield from ({"pixel_values": draws.normal(1, 3, side, side)} for side in (64, 224))
    if "pixel_values_videos" in names:
        yield {"pixel_values_videos": draws.normal(1, frames, channels, height, width)}


def _sounds(config: Any, names: set[str], draws: _Draws) -> Iterator[dict[str, Any]]:
    mel = _find(
        config, "feature_projection_input_dim num_mel_bins feature_size input_feat_per_channel input_feat_size", 16
    )
    source = _find(config, "max_source_positions", 24)
    length = _find(config, "max_length", 48)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "input_features": [
            (2, mel, 2 * source),
            (2, 48, mel),
            (2, 64, mel),
            (2, mel, 64),
            (2, 64, 128),
            (2, mel, 3000),
        ],
        "input_values": [(2, 400), (2, 1, 1600), (2, length, mel), (2, 1600), (2, 64, mel), (2, 16000), (2, 1, 16000)],
    }
    for name in ("input_features", "input_values", "audio_values", "input_audio"):
        for shape in shapes.get(name, [(2, 1, 1600), (2, 400)]) if name in names else []:
            sound = {name: draws.normal(*shape)}
            if "input_features_mask" in names and len(shape) == 3:
                yield {**sound, "input_features_mask": torch.ones(2, shape[1] if shape[2] == mel else shape[2]).long()}
            yield sound


def _odd_ones(config: Any, names: set[str], draws: _Draws, masked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs of which one or two types only have the like."""
    if "bbox" in names:
        corners = torch.tensor([1, 2, 5, 7])
        yield {**masked, "bbox": corners.expand(2, 8, 4).clone()}
        pair = {**masked, "bbox": corners.expand(2, 8, 4) / 10}
        yield {**pair, "decoder_input_ids": draws.tokens(2, 6)} if "decoder_input_ids" in names else pair
    if "visual_feats" in names:
        features = draws.normal(2, 4, _find(config, "visual_feat_dim", 32))
        yield {**masked, "visual_feats": features, "visual_pos": torch.rand(2, 4, 4, generator=draws.generator)}
    if "returns_to_go" in names:
        states, actions = _find(config, "state_dim", 4), _find(config, "act_dim", 4)
        yield {
            "states": draws.normal(1, 4, states),
            "actions": draws.normal(1, 4, actions),
            "rewards": draws.normal(1, 4, 1),
            "returns_to_go": draws.normal(1, 4, 1),
            "timesteps": torch.arange(4)[None],
            "attention_mask": torch.ones(1, 4, dtype=torch.long),
        }
    if "query_embeds" in names:
        seen = draws.normal(2, 4, _find(config, "encoder_hidden_size", 32))
        yield {"query_embeds": draws.normal(2, 4, 32), "encoder_hidden_states": seen}
    if "decoder_input_values" in names:
        yield {"input_values": draws.normal(2, 8, 32), "decoder_input_values": draws.normal(2, 6, 32)}
    if "audio_mel" in names:
        yield {"audio_mel": draws.normal(1, 48, 128), "audio_mel_mask": torch.zeros(1, 48, dtype=torch.bool)}
    if "task_inputs" in names:
        yield {"pixel_values": draws.normal(1, 3, 32, 32), "task_inputs": draws.tokens(1, 77)}
    if "prompt_masks" in names:
        yield {n: draws.normal(1, 3, 64, 32) for n in ("pixel_values", "prompt_pixel_values", "prompt_masks")}
        yield {n: draws.normal(1, 3, 32, 32) for n in ("pixel_values", "prompt_pixel_values", "prompt_masks")}
    if "inputs" in names:
        yield {"inputs": draws.normal(2, 8, _find(config, "d_model", 32))}
    if "image_embeds_position_mask" in names:
        images = {"pixel_values": draws.normal(2, 3, 32, 32)}
        yield {**masked, **images, "image_embeds_position_mask": torch.tensor([[1] * 4 + [0] * 4] * 2)}
    if "image_attention_mask" in names:
        images = {"pixel_values": draws.normal(2, 1, 3, 32, 32)}
        yield {**masked, **images, "image_attention_mask": torch.ones(2, 8, 1, dtype=torch.long)}
    if "past_values" in names:
        context = _find(config, "context_length", 32)
        length = context + max(_find(config, "lags_sequence", [0]))
        future, times = _find(config, "prediction_length", 4), _find(config, "num_time_features", 0)
        if "past_time_features" in names:
            yield {
                "past_values": draws.normal(2, length),
                "past_time_features": draws.normal(2, length, times),
                "past_observed_mask": torch.ones(2, length),
                "future_values": draws.normal(2, future),
                "future_time_features": draws.normal(2, future, times),
            }
        if "past_values_padding" in names:
            yield {
                "past_values": draws.normal(2, context),
                "past_values_padding": torch.zeros(2, context, dtype=torch.long),
                "freq": torch.zeros(2, 1, dtype=torch.long),
            }
        yield {"past_values": draws.normal(2, context, _find(config, "num_input_channels", 1))}
        yield {"past_values": draws.normal(2, context)}
