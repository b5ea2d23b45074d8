"""Run what docs/with-other-tools.md says, and the same on TransformerLens' normalisations, its bridge and its switches.

    make other-tools

Needs transformer-lens and nnsight, which are no part of the environment: the bridge where transformer-lens is 3 or newer, the rest
as long as it has a `HookedTransformer`.
"""

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import torch

import uncollapse as uc

PAGE = Path(__file__).resolve().parents[1] / "docs" / "with-other-tools.md"
CLOSE = 1e-6


def page() -> None:
    """The examples of the page, top to bottom."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "page.py")  # nnsight reads the source of what it traces
        script.write_text("\n".join(blocks), encoding="utf-8")
        runpy.run_path(str(script))


def hooked(lens: Any, normalization: str | None, **options: Any) -> float:
    """The largest difference of a head's direct effect from TransformerLens' own, switched on and off in between."""
    torch.manual_seed(0)
    shape = {"n_layers": 2, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": 4, "d_mlp": 64, "d_vocab": 64}
    config = lens.HookedTransformerConfig(**shape, act_fn="gelu", normalization_type=normalization, seed=0, **options)
    model = lens.HookedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    tokens = torch.randint(64, (3, 9))
    found = []
    for use_attn_result in (False, True, False):
        model.set_use_attn_result(use_attn_result)
        result = uc.attribute(model, {"input": tokens}, uc.logit_difference(5, 7), ablated_as=None)
        assert result.record.metric.is_affine
        found.append(torch.tensor([head.value for head in result.heads]))
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens)
    results = cache.stack_head_results(layer=-1, pos_slice=-1)
    if normalization is not None:
        results = cache.apply_ln_to_stack(results, layer=-1, pos_slice=-1)
        results = results * getattr(model.ln_final, "w", 1.0)
    theirs = (results @ (model.W_U[:, 5] - model.W_U[:, 7])).mean(-1).detach()
    return max(float((ours - theirs).abs().max()) for ours in found)


def bridged() -> float:
    """The largest difference of a head's direct effect between a model and a bridge around it, `use_attn_result` on and off."""
    import transformers
    from transformer_lens.model_bridge.bridge import TransformerBridge

    shape = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    tokens, worst = torch.randint(64, (3, 9)), 0.0
    plain = uc.attribute(model, {"input_ids": tokens}, uc.logit_difference(5, 7)).heads
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model)
    for use_attn_result in (False, True, False):
        bridge.set_use_attn_result(use_attn_result)
        found = uc.attribute(bridge, {"input": tokens}, uc.logit_difference(5, 7)).heads
        worst = max(worst, *(abs(a.value - b.value) for a, b in zip(plain, found, strict=True)))
    return worst


def main() -> None:
    import transformer_lens as lens

    figures: dict[str, float] = {}
    if hasattr(lens, "HookedTransformer"):
        page()
        for normalization in ("LN", "LNPre", "RMS", "RMSPre", None):
            figures[f"HookedTransformer, {normalization}"] = hooked(lens, normalization)
        figures["HookedTransformer, parallel"] = hooked(lens, "LN", parallel_attn_mlp=True)
        rotary = {"positional_embedding_type": "rotary", "rotary_dim": 8, "gated_mlp": True}
        figures["HookedTransformer, rotary, gated MLP"] = hooked(lens, "RMS", **rotary)
    try:
        import transformer_lens.model_bridge.bridge  # noqa: F401
    except ImportError:
        print("no bridge in this version of transformer-lens")
    else:
        figures["TransformerBridge"] = bridged()
    for name, figure in figures.items():
        print(f"{name}: largest difference {figure:.1e}")
    if max(figures.values()) > CLOSE:
        raise SystemExit("a difference is larger than rounding")


if __name__ == "__main__":
    main()
