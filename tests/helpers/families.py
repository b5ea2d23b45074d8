"""Every family of the contract as a tiny random model, built from its config: no downloads, milliseconds each.

What is expected of each (placement, heads, head width, stacks) is written from the architecture's paper or code, never
from what the anatomy said. All parameters are drawn anew, so that no norm is neutral, no LayerScale tiny, no bias zero and
no attention uniform: a part that is removed must show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn

from tests.helpers.tiny_models import VOCABULARY, Tiny

Inputs = Literal["text", "text pair", "image", "waveform", "spectrogram"]


@dataclass(frozen=True)
class Family(Tiny):
    """`blocks` counts both stacks; `decoder_blocks` of them form the decoder, whose parts are attention, cross, mlp."""

    inputs: Inputs = "text"
    decoder_blocks: int = 0
    causal: bool = False

    @property
    def parts(self) -> list[list[str]]:
        """The kinds of the parts of each block, in the order they run."""
        encoder = [["attention", "mlp"]] * (self.blocks - self.decoder_blocks)
        return encoder + [["attention", "cross", "mlp"]] * self.decoder_blocks


def _drawn(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The model with every parameter drawn: matrices of gain about one, vectors near what they were initialised to."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = make()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim >= 2:
                    parameter.copy_(0.2 * noise)
                else:
                    parameter.add_(0.2 * noise)
        return model.eval()

    return build


def _auto(config: Any) -> Callable[[], nn.Module]:
    return _drawn(lambda: hf.AutoModel.from_config(copy.deepcopy(config)))


_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT: dict[str, Any] = {**_SMALL, **_SPECIAL, "max_position_embeddings": 64}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}
_CLIP: dict[str, Any] = {**_SMALL, "projection_dim": 32}
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}

FAMILIES: dict[str, Family] = {
    # Encoders ---------------------------------------------------------------------------------------------------------
    "bert": Family(_auto(hf.BertConfig(**_TEXT)), "post"),
    "roberta": Family(_auto(hf.RobertaConfig(**_TEXT)), "post"),
    "electra": Family(_auto(hf.ElectraConfig(**_TEXT, embedding_size=16)), "post"),
    "distilbert": Family(
        _auto(
            hf.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=64, **_SPECIAL)
        ),
        "post",
    ),
    "albert": Family(_auto(hf.AlbertConfig(**_TEXT, embedding_size=16)), "post"),
    "mpnet": Family(_auto(hf.MPNetConfig(**_TEXT)), "post"),
    "deberta_v2": Family(
        _auto(
            hf.DebertaV2Config(
                **_TEXT,
                relative_attention=True,
                position_buckets=8,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                position_biased_input=False,
            )
        ),
        "post",
    ),
    "modernbert": Family(
        _auto(
            hf.ModernBertConfig(
                **_TEXT, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
            )
        ),
        "pre",
    ),
    # Decoders ---------------------------------------------------------------------------------------------------------
    "gpt2": Family(
        _auto(hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **_SPECIAL)), "pre", causal=True
    ),
    "gpt_neox": Family(_auto(hf.GPTNeoXConfig(**_TEXT)), "pre, parallel", causal=True),
    "gptj": Family(
        _auto(hf.GPTJConfig(n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, **_SPECIAL)),
        "pre, parallel",
        causal=True,
    ),
    "opt": Family(
        _auto(hf.OPTConfig(**{**_TEXT, "ffn_dim": 64}, word_embed_proj_dim=32)),
        "pre",
        causal=True,
    ),
    "bloom": Family(_auto(hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **_SPECIAL)), "pre", causal=True),
    "falcon": Family(_auto(hf.FalconConfig(**_TEXT)), "pre, parallel", key_value_heads=1, causal=True),
    "phi": Family(_auto(hf.PhiConfig(**_TEXT)), "pre, parallel", causal=True),
    "llama": Family(_auto(hf.LlamaConfig(**_GROUPED)), "pre", key_value_heads=2, causal=True),
    "mistral": Family(_auto(hf.MistralConfig(**_GROUPED, sliding_window=4)), "pre", key_value_heads=2, causal=True),
    "mixtral": Family(
        _auto(hf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)),
        "pre",
        key_value_heads=2,
        causal=True,
    ),
    "qwen2": Family(_auto(hf.Qwen2Config(**_GROUPED)), "pre", key_value_heads=2, causal=True),
    "qwen3": Family(
        _auto(hf.Qwen3Config(**_GROUPED, head_dim=16)), "pre", key_value_heads=2, head_width=16, causal=True
    ),
    "gemma2": Family(
        # eager: transformers 5.0 ran this family by default without the soft cap that its eager attention has
        _auto(hf.Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, attn_implementation="eager")),
        "sandwich",
        key_value_heads=2,
        head_width=16,
        causal=True,
    ),
    "gemma3": Family(_auto(hf.Gemma3TextConfig(**_GEMMA)), "sandwich", key_value_heads=2, head_width=16, causal=True),
    "olmo2": Family(_auto(hf.Olmo2Config(**_GROUPED)), "output", key_value_heads=2, causal=True),
    "cohere": Family(
        _auto(hf.CohereConfig(**_GROUPED, use_qk_norm=True)), "pre, parallel", key_value_heads=2, causal=True
    ),
    "granite": Family(
        _auto(
            hf.GraniteConfig(**_GROUPED, residual_multiplier=0.5, attention_multiplier=0.25, embedding_multiplier=3.0)
        ),
        "pre",
        key_value_heads=2,
        causal=True,
    ),
    "deepseek_v3": Family(
        _auto(
            hf.DeepseekV3Config(
                **_TEXT,
                num_key_value_heads=4,
                moe_intermediate_size=16,
                n_routed_experts=4,
                n_shared_experts=1,
                num_experts_per_tok=2,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=6,
            )
        ),
        "pre",
        head_width=6,
        causal=True,
    ),
    "gpt_oss": Family(
        _auto(hf.GptOssConfig(**_GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)),
        "pre",
        key_value_heads=2,
        causal=True,
    ),
    # Encoder and decoder ----------------------------------------------------------------------------------------------
    "t5": Family(
        _auto(
            hf.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=3,
                num_decoder_layers=2,
                num_heads=4,
                vocab_size=VOCABULARY,
                relative_attention_num_buckets=8,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
            )
        ),
        "pre",
        blocks=5,
        decoder_blocks=2,
        inputs="text pair",
    ),
    "bart": Family(
        _auto(
            hf.BartConfig(
                d_model=32,
                encoder_layers=3,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
                **_SPECIAL,
            )
        ),
        "post",
        blocks=5,
        decoder_blocks=2,
        inputs="text pair",
    ),
    # Images -----------------------------------------------------------------------------------------------------------
    "vit": Family(_auto(hf.ViTConfig(**_SMALL, **_IMAGE)), "pre", vision=True, inputs="image"),
    "dinov2": Family(
        _auto(hf.Dinov2Config(**{**_SMALL, **_IMAGE, "mlp_ratio": 2})), "pre", vision=True, inputs="image"
    ),
    "clip_vision": Family(_auto(hf.CLIPVisionConfig(**_CLIP, **_IMAGE)), "pre", vision=True, inputs="image"),
    "clip_text": Family(_auto(hf.CLIPTextConfig(**_CLIP, **_SPECIAL, max_position_embeddings=64)), "pre", causal=True),
    # Sound ------------------------------------------------------------------------------------------------------------
    "whisper_encoder": Family(
        _drawn(
            lambda: (
                hf.WhisperModel(
                    hf.WhisperConfig(
                        **_SPECIAL,
                        d_model=32,
                        encoder_layers=3,
                        decoder_layers=1,
                        encoder_attention_heads=4,
                        decoder_attention_heads=4,
                        encoder_ffn_dim=64,
                        decoder_ffn_dim=64,
                        num_mel_bins=8,
                        max_source_positions=12,
                        max_target_positions=16,
                        decoder_start_token_id=1,
                        suppress_tokens=None,
                        begin_suppress_tokens=None,
                    )
                ).encoder
            )
        ),
        "pre",
        inputs="spectrogram",
    ),
    "wav2vec2": Family(
        _auto(
            hf.Wav2Vec2Config(
                **_SMALL,
                vocab_size=VOCABULARY,
                conv_dim=(32, 32),
                conv_kernel=(10, 3),
                conv_stride=(5, 2),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                apply_spec_augment=False,
            )
        ),
        "post",
        inputs="waveform",
    ),
}


def inputs_for(family: Family, sequences: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """A batch the family takes: `tokens` is the number of text tokens; images have 16 patches, sounds a dozen frames."""
    generator = torch.Generator().manual_seed(seed)
    if family.inputs == "image":
        return {"pixel_values": torch.randn(sequences, 3, 32, 32, generator=generator)}
    if family.inputs == "waveform":
        return {"input_values": torch.randn(sequences, 120, generator=generator)}
    if family.inputs == "spectrogram":
        return {"input_features": torch.randn(sequences, 8, 24, generator=generator)}
    batch = {
        "input_ids": torch.randint(3, VOCABULARY, (sequences, tokens), generator=generator),
        "attention_mask": torch.ones(sequences, tokens, dtype=torch.long),
    }
    if family.inputs == "text pair":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (sequences, tokens - 2), generator=generator)
        batch["decoder_attention_mask"] = torch.ones(sequences, tokens - 2, dtype=torch.long)
    return batch
