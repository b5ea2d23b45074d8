"""Every model type of transformers, built tiny from its config, read and proved: an unattended sweep that writes a table.

    make families                                  the whole sweep, about ten minutes on two cores
    python -m bench.families --only bert llama     a few types, with the whole message of a refusal

A type is built by shrinking its default config by rules on the attributes' names (`shrunk`), fed with what its forward
asks for (`inputs`), traced, and proved. Names serve here to *build* models to test with; the package itself uses none.
What cannot be built or fed says so in the table: it is no verdict on the anatomy.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import resource
import selectors
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

VOCABULARY = 128
SECONDS_A_TYPE = 40
WORKERS = 2
MEMORY = 7 * 2**30
PARAMETERS = 90_000_000  # a larger model is not built: its config was not understood

# Constraints that no rule on names can guess, a line a type: attributes set after shrinking (dots reach nested configs).
HINTS: dict[str, dict[str, Any]] = {}


# Shrinking ------------------------------------------------------------------------------------------------------------
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
    r"vision_output_dim|d_inner_|true_hidden_size|vit_dim|frequency_embedding_size|projection_hidden_dim)$"
)
_INNER = re.compile(
    r"^(.*intermediate_size|.*ffn_dim|d_ff|dff|n_inner|d_inner|mlp_dim|ffn_hidden_size|dim_ff|.*dim_feedforward|"
    r".*feedforward_dim|feed_forward_size|.*linear_units|.*intermediate_dim|shared_expert_intermediate_size|"
    r"expert_ffn_hidden_size|intermediate_size_mlp|.*feed_forward_hidden_size|share_expert_dim)$"
)
_HEADS = re.compile(
    r"^(num_attention_heads|num_heads|n_heads?|attention_heads|encoder_attention_heads|decoder_attention_heads|"
    r".*_num_attention_heads|.*_attention_heads|.*_num_heads|num_(encoder|decoder)_attention_heads|resampler_n?_?heads)$"
)
_KEY_VALUE_HEADS = re.compile(
    r"^(.*num_key_value_heads|num_kv_heads|kv_n_heads|num_key_value_attention_heads|num_query_groups)$"
)
_HEAD_WIDTHS = re.compile(r"^(head_dim|.*_head_dim|d_kv|d_head|attention_head_size|kv_channels|dim_head)$")
_SMALL = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "zero_expert_num": 2, "first_k_dense_replace": 1, "num_dense_layers": 1, "max_window_layers": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "v_head_dim": 8, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4,
    "sliding_window": 4, "sliding_window_size": 4, "attention_chunk_size": 4, "local_attention": 4,
    "attention_window_size": 4, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "n_ctx": 64,
    "max_target_positions": 64, "max_source_positions": 24, "max_2d_position_embeddings": 64, "max_2d_position": 64,
    "image_size": 32, "img_size": 32, "pretrain_image_size": 32, "num_kv_shared_layers": 0, "num_nextn_predict_layers": 0,
    "num_queries": 8, "codebook_size": 32, "num_mel_bins": 16, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_d_ssm": 64, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4,
    "linear_head_dim": 8, "conv_depthwise_kernel_size": 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "entity_vocab_size": 64, "entity_emb_size": 16, "vocab_size_per_layer_input": VOCABULARY, "rotary_dim": 4,
    "num_hash_buckets": 64, "encoder_hash_byte_group_vocab": 64, "query_pre_attn_scalar": 8, "num_query_tokens": 4,
    "rope_dim": 8, "num_latents": 8, "chunk_size_feed_forward": 0, "num_landmarks": 4, "segment_means_seq_len": 4,
    "patch_size": 8,
}  # fmt: skip


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A small copy of a config, as a dict. The same sizes everywhere keep what must agree in agreement."""
    ids: dict[int, int] = {}
    return _shrunk(config, ids)


def _shrunk(config: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    small = dict(config)
    for name in [n for n in small if _LAYERS.match(n) and isinstance(small[n], int) and not isinstance(small[n], bool)]:
        old = small[name]
        if old <= 1:
            continue
        lists = [
            n for n, v in small.items() if isinstance(v, (list, tuple)) and len(v) == old and not n.startswith("id2")
        ]
        keep = _representatives(
            [small[n] for n in lists if all(isinstance(x, (str, int, bool)) for x in small[n])], old
        )
        small[name] = len(keep)
        for listed in lists:
            small[listed] = [small[listed][i] for i in keep]
    heads = max([v for n, v in small.items() if _HEADS.match(n) and isinstance(v, int)], default=0)
    for name, value in small.items():
        if name in {"id2label", "label2id"} or _LAYERS.match(name):
            continue
        if isinstance(value, dict):
            small[name] = _rope(value, 8) if name == "rope_parameters" else _shrunk(value, ids)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            small[name] = _small_number(name, value, heads, ids)
        elif isinstance(value, (list, tuple)) and value:
            small[name] = _small_list(name, list(value), ids)
    if "vocab_size" in small and isinstance(small["vocab_size"], int):
        small["vocab_size"] = min(small["vocab_size"], VOCABULARY)
    return small


def _representatives(lists: list[Any], length: int) -> list[int]:
    """Two layers, or as many as it takes to have every kind of layer that the lists name."""
    kinds = list(zip(*lists, strict=True)) if lists else [()] * length
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    if len(first) > 4:  # a number of its own for every layer
        first = {kind: i for kind, i in first.items() if i in (0, length - 1)}
    chosen = sorted(first.values())
    return chosen if len(chosen) > 1 else [0, 1][:length]


def _small_number(name: str, value: int, heads: int, ids: dict[int, int]) -> int:
    if name in _SMALL:
        return min(value, _SMALL[name]) if name != "head_dim" else 8
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
    if re.search(r"(_id|_index|_token)$", name) and value >= VOCABULARY - 40:
        return ids.setdefault(value, VOCABULARY - 40 + len(ids) % 40)
    return value


def _small_list(name: str, value: list[Any], ids: dict[int, int]) -> list[Any]:
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        if name.endswith(("token_id", "token_ids")):
            return [ids.setdefault(v, VOCABULARY - 40 + len(ids) % 40) if v >= VOCABULARY - 40 else v for v in value]
        if name in {"depths", "num_block_repeats", "stage_num_blocks", "blocks_per_stage", "layer_depths"}:
            return [min(v, 2) for v in value]
        if name == "image_size":
            return [min(v, 32) for v in value]
        if name == "mrope_section":
            return [2, 1, 1]
        if name in {"deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes"}:
            return [0, 1][: len(value)]
        if name == "conv_dim":
            return [32 for _ in value]
    return value


def _rope(parameters: dict[str, Any], head_width: int) -> dict[str, Any]:
    """Rotary settings for a small head: factors a frequency are cut, everything else stays."""
    small: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            small[name] = _rope(value, head_width)
        elif name in {"short_factor", "long_factor"}:
            small[name] = list(value)[: head_width // 2]
        elif name == "mrope_section":
            small[name] = [2, 1, 1]
        elif name == "original_max_position_embeddings":
            small[name] = min(value, 32)
        else:
            small[name] = value
    return small


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """Only fewer layers and a smaller vocabulary: the widths stay as they are, so nothing can disagree."""
    small = dict(config)
    for name in [n for n in small if _LAYERS.match(n) and isinstance(small[n], int) and not isinstance(small[n], bool)]:
        old = small[name]
        if old <= 1:
            continue
        lists = [
            n for n, v in small.items() if isinstance(v, (list, tuple)) and len(v) == old and not n.startswith("id2")
        ]
        keep = _representatives(
            [small[n] for n in lists if all(isinstance(x, (str, int, bool)) for x in small[n])], old
        )
        small[name] = len(keep)
        for listed in lists:
            small[listed] = [small[listed][i] for i in keep]
    for name, value in small.items():
        if isinstance(value, dict) and name not in {"id2label", "label2id", "rope_parameters"}:
            small[name] = reduced(value)
        elif isinstance(value, int) and name in {"num_experts", "num_local_experts", "n_routed_experts"}:
            small[name] = min(value, 8)
    return small


# Building -------------------------------------------------------------------------------------------------------------
def built(kind: str) -> tuple[Any, list[str]]:
    """A tiny model of this type, and what went wrong on the way. The first strategy that builds *and runs* wins."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config_class = CONFIG_MAPPING[kind]
    model_class = MODEL_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    default = config_class().to_dict()
    trouble: list[str] = []
    for name, strategy in (("shrunk", shrunk), ("reduced", reduced)):
        try:
            small = strategy(default)
            for path, value in HINTS.get(kind, {}).items():
                _put(small, path, value)
            small.pop("transformers_version", None)
            config = config_class.from_dict(small)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class._from_config(config).parameters())
            if size > PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters: the config was not understood")
            torch.manual_seed(0)
            model = model_class._from_config(config).eval()
            _draw(model)
            batch = runnable(model)
            return (model, batch, name, size), trouble
        except Exception as error:  # whatever a model raises belongs in the table
            trouble.append(f"{name}: {_line(error)}")
    del transformers
    return None, trouble


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        config = config[name]
    config[last] = value


def _draw(model: Any) -> None:
    """Parameters that hide a part are drawn anew: constants (LayerScale, zero gates, biases) and tiny matrices."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() > 20_000_000:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * min(0.2, parameter[0].numel() ** -0.5 * 1.2))
            else:
                parameter.add_(0.1 * noise)


# Inputs ---------------------------------------------------------------------------------------------------------------
def runnable(model: Any) -> dict[str, Any]:
    """The first batch, of those that the signature suggests, on which the model runs."""
    import torch

    failures: list[str] = []
    for batch in inputs(model):
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                model(**batch)
            return batch
        except Exception as error:  # the next guess
            failures.append(f"{'+'.join(batch)}: {_line(error)}")
    raise RuntimeError("no input found; " + " | ".join(dict.fromkeys(failures[:2])))


def _find(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these attributes on the config or a nested one."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for nested in vars(config).values():
        if hasattr(nested, "to_dict"):
            value = _find(nested, names, None)
            if value is not None:
                return value
    return default


def inputs(model: Any) -> Any:
    """Batches to try, the likeliest first."""
    import torch

    generator = torch.Generator().manual_seed(0)
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    main = getattr(model, "main_input_name", "input_ids")
    vision = getattr(config, "vision_config", None) or config
    size = _find(vision, ("image_size", "img_size"), 32)
    height, width = (
        (size, size) if isinstance(size, int) else tuple(size)[:2] if isinstance(size, (list, tuple)) else (32, 32)
    )
    channels = _find(vision, ("num_channels", "in_channels", "in_chans"), 3)
    channels = channels if isinstance(channels, int) else 3
    frames = _find(vision, ("num_frames", "frames_per_clip"), 8)
    mel = _find(config, ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_feat_size", "n_mels"), 16)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    def tokens(*shape: int) -> Any:
        return torch.randint(3, 50, shape, generator=generator)

    text = {"input_ids": tokens(2, 8)}
    masked = {**text, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    decoder = {"decoder_input_ids": tokens(2, 6)}
    image = {"pixel_values": normal(2, channels, height, width)}
    video = {"pixel_values": normal(1, frames, channels, height, width)}
    source = _find(config, ("max_source_positions",), 24)
    candidates: list[dict[str, Any]] = []
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if "input_ids" in names and main in {"input_ids", "pixel_values", "inputs_embeds"}:
        if "decoder_input_ids" in names:
            candidates.append({**masked, **decoder})
        if main == "input_ids":
            candidates.append(masked if "attention_mask" in names else text)
        if "pixel_values" in names:
            candidates += [{**masked, **image}, {**masked, **video}]
            candidates += [{**masked, "pixel_values": normal(2, 1, channels, height, width)}]
        candidates += [masked, text]
    audio = [n for n in ("input_features", "input_values", "audio_values", "input_audio") if n in names]
    for name in audio:
        shapes = {
            "input_features": [
                (2, mel, 2 * source),
                (2, 48, mel),
                (2, mel, 48),
                (2, 64, mel),
                (2, 160, mel),
                (2, mel, 3000),
            ],
            "input_values": [(2, 400), (2, 1, 1600), (2, 1600), (2, 64, mel), (2, 16000), (2, mel, 64)],
        }.get(name, [(2, 400), (2, 1, 1600)])
        for shape in shapes:
            with_text = {**masked} if "input_ids" in required else {}
            with_decoder = decoder if "decoder_input_ids" in names else {}
            candidates.append({name: normal(*shape), **with_text, **with_decoder})
    if "pixel_values" in names:
        candidates += [image, video, {"pixel_values": normal(1, channels, frames, height, width)}]
        candidates += [{"pixel_values": normal(1, 3, side, side)} for side in (64, 224, 384, 512)]
    if "pixel_values_videos" in names:
        candidates += [{"pixel_values_videos": normal(1, frames, channels, height, width)}]
    if "past_values" in names:
        length = _find(config, ("context_length",), 32)
        candidates += [{"past_values": normal(2, length, _find(config, ("num_input_channels",), 1))}]
        candidates += [{"past_values": normal(2, length)}]
    if "hidden_states" in names and "grid_thw" in names:
        patch = _find(config, ("patch_size",), 8)
        temporal = _find(config, ("temporal_patch_size",), 1)
        pixels = channels * temporal * patch * patch
        candidates.append({"hidden_states": normal(16, pixels), "grid_thw": torch.tensor([[1, 4, 4]])})
    if "inputs_embeds" in names:
        candidates.append({"inputs_embeds": normal(2, 8, _find(config, ("hidden_size", "d_model"), 32))})
    candidates.append(dict(getattr(model, "dummy_inputs", {}) or {}))
    for batch in candidates:
        if batch and all(n in batch for n in required if n not in {"kwargs"}):
            yield batch
    for batch in candidates:
        if batch and not all(n in batch for n in required):
            yield batch


# One type -------------------------------------------------------------------------------------------------------------
def swept(kind: str) -> dict[str, Any]:
    """Everything the table says of one type."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from uncollapse import reading
    from uncollapse.errors import UnsupportedModel
    from uncollapse.interception import probing
    from uncollapse.proof import example, proved_anatomy
    from uncollapse.tracing import trace

    name = MODEL_MAPPING_NAMES[kind]
    row: dict[str, Any] = {"type": kind, "class": name if isinstance(name, str) else name[0], "built": False}
    made, trouble = built(kind)
    if made is None:
        return row | {"reason": " || ".join(trouble)}
    model, batch, strategy, size = made
    row |= {"built": True, "strategy": strategy, "parameters": size, "inputs": "+".join(batch)}
    try:
        with probing(model):
            recorded = trace(model, example(batch))
        reader = reading._Reader(model, recorded)
        scores = reader.attention_of
        called = {type(model.get_submodule(c.name)).__name__ for c in recorded.calls if c.name}
        row["attention_calls"] = len(scores)
        row["named_attention"] = sorted(c for c in called if re.search(r"Att(ention|n)", c))
    except Exception as error:
        row |= {"proved": False, "crash": True, "reason": f"trace: {_line(error)}"}
        return row
    try:
        anatomy = proved_anatomy(model, batch)
    except UnsupportedModel as error:
        return row | {
            "proved": False,
            "reason": error.identity or _line(error),
            "message": str(error),
            "found": error.found,
        }
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)
        own = [f for f in where if "uncollapse" in f.filename]
        return row | {
            "proved": False,
            "crash": True,
            "reason": f"{_line(error)} (in {own[-1].name})" if own else _line(error),
            "message": "".join(traceback.format_exception(error)[-6:]),
        }
    row |= {
        "proved": True,
        "blocks": len(anatomy.blocks),
        "placement": anatomy.norm_placement,
        "parts": ", ".join(dict.fromkeys("+".join(p.kind for p in b.parts) for b in anatomy.blocks)),
        "covered": sum(len(p.attention) for b in anatomy.blocks for p in b.parts),
        "stacks": dict(Counter(str(b.stack) for b in anatomy.blocks)),
        "one_call_a_part": all(len(p.attention) <= 1 for b in anatomy.blocks for p in b.parts),
        "projections": sum(c.projection is not None for b in anatomy.blocks for p in b.parts for c in p.attention),
        "described": anatomy.describe(),
    }
    return row | _captured(model, batch, anatomy)


def _captured(model: Any, batch: dict[str, Any], anatomy: Any) -> dict[str, Any]:
    """Whether the output under capture is the output without, bit for bit."""
    import torch

    from uncollapse.interception import probing
    from uncollapse.tracing import tensors_in

    try:
        from uncollapse.capture import capture
    except ImportError as error:
        return {"capture": None, "capture_reason": _line(error)}
    with probing(model):
        plain = [t.clone() for t in tensors_in(model(**batch))]
    seen: list[Any] = []
    hook = model.register_forward_hook(lambda _m, _a, output: seen.extend(t.clone() for t in tensors_in(output)))
    try:
        capture(model, [batch], anatomy)
    except Exception as error:
        return {"capture": False, "capture_reason": _line(error)}
    finally:
        hook.remove()
    same = len(plain) == len(seen) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(plain, seen, strict=True)
    )
    del torch
    return {"capture": same, "capture_reason": "" if same else "the output differs"}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:240]


# The pool -------------------------------------------------------------------------------------------------------------
def work() -> None:
    """A worker: types in on stdin, one JSON line each out. Models print; their prints must not meet the protocol."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                row = swept(line.strip())
            except Exception as error:
                row = {"type": line.strip(), "built": False, "reason": _line(error)}
        row["seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps(row), file=out, flush=True)


class _Worker:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.families", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.kind = ""
        self.since = time.monotonic()

    def give(self, kind: str) -> None:
        self.kind, self.since = kind, time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def sweep(kinds: list[str]) -> list[dict[str, Any]]:
    """All types over a few workers; a type that hangs or takes its worker down costs that worker, not the sweep."""
    waiting = list(reversed(kinds))
    rows: list[dict[str, Any]] = []
    selector = selectors.DefaultSelector()

    def start() -> None:
        worker = _Worker()
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

    def replace(worker: _Worker, reason: str) -> None:
        selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        worker.end()
        if worker.kind:
            rows.append({"type": worker.kind, "built": False, "crash": True, "reason": reason})
        if waiting:
            start()

    for _ in range(min(WORKERS, len(kinds))):
        start()
    while selector.get_map():
        for key, _ in selector.select(timeout=1):
            worker: _Worker = key.data
            line = worker.process.stdout.readline()  # type: ignore[union-attr]
            if not line:
                replace(worker, "the process died (out of memory, or a crash in native code)")
                continue
            if line.strip() != "ready":
                rows.append(json.loads(line))
                _progress(rows[-1], len(rows), len(kinds))
            if waiting:
                worker.give(waiting.pop())
            else:
                worker.kind = ""
                selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
                worker.end()
        for key in list(selector.get_map().values()):
            worker = key.data
            if time.monotonic() - worker.since > SECONDS_A_TYPE:
                replace(worker, f"more than {SECONDS_A_TYPE} seconds")
    return sorted(rows, key=lambda row: row["type"])


def _progress(row: dict[str, Any], done: int, of: int) -> None:
    if sys.stderr.isatty() or done % 25 == 0 or done == of:
        print(f"{done}/{of} {row['type']}", file=sys.stderr)


# The table ------------------------------------------------------------------------------------------------------------
def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    attending = [r for r in rows if r.get("attention_calls")]
    return {
        "types": len(rows),
        "built and run": sum(r["built"] for r in rows),
        "with attention": len(attending),
        "proved": sum(bool(r.get("proved")) for r in attending),
        "capture bit-identical": sum(r.get("capture") is True for r in attending),
    }


def table(rows: list[dict[str, Any]]) -> str:
    import torch
    import transformers

    counts = summary(rows)
    lines = [
        "# Which model types are read and proved",
        "",
        f"Written by `make families` with transformers {transformers.__version__} and torch {torch.__version__}; not by hand.",
        "",
        "| " + " | ".join(counts) + " |",
        "|" + "---|" * len(counts),
        "| " + " | ".join(str(v) for v in counts.values()) + " |",
        "",
        "| type | class | built | attention calls | blocks | placement | parts | proved | capture |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        calls = r.get("attention_calls")
        attention = "" if calls is None else str(calls) if not r.get("proved") else f"{r['covered']} of {calls}"
        proved = "" if not r["built"] else "yes" if r.get("proved") else f"no: {r['reason']}" if calls else "–"
        capture = {True: "bit-identical", False: f"no: {r.get('capture_reason')}", None: ""}[r.get("capture")]
        cells = [
            r["type"],
            r.get("class", ""),
            "yes" if r["built"] else f"no: {r['reason']}",
            attention,
            str(r.get("blocks", "")),
            r.get("placement", ""),
            r.get("parts", ""),
            proved,
            capture,
        ]
        lines.append("| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="TYPE", help="sweep these types in this process, and say everything"
    )
    parser.add_argument("--out", type=Path, help="where to write the table (Markdown)")
    parser.add_argument("--json", type=Path, help="where to write the raw rows")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.only:
        for kind in options.only:
            print(json.dumps(swept(kind), indent=1).replace("\\n", "\n"))
        return
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    rows = sweep(list(MODEL_MAPPING_NAMES))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.out:
        options.out.write_text(table(rows), encoding="utf-8")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
