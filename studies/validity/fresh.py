"""Models that no threshold can be derived from, and that must not be accused all the same: as initialised, after the first steps
of an optimiser, and two towers of which one is given pictures of one colour. Beside them models that were trained while their
attention stayed uniform, which must be accused, and a healthy one that is shown nothing but noise. Diagnosed whole, through the
public function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import uncollapse as uc
from studies.validity.models import dinov2_on_noise

WIDTH, HEADS, VOCABULARY = 64, 4, 64


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.joint(x).chunk(3, -1))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), _Attention()
        self.second = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.second(x))


class _Collapsing(nn.Module):
    """Nearly no residual: the tokens are averaged in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), _Attention()

    def forward(self, x: Tensor) -> Tensor:
        return 1e-3 * x + self.attention(self.norm(x))


class _Towers(nn.Module):
    """A tower for patches of pictures beside one for text; each has the other's tokens only in the product of their means."""

    def __init__(self, text: type[nn.Module]) -> None:
        super().__init__()
        self.patches, self.words = nn.Linear(8, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.seeing = nn.ModuleList(_Block() for _ in range(3))
        self.reading = nn.ModuleList(text() for _ in range(4))

    def forward(self, picture: Tensor, ids: Tensor) -> Tensor:
        x, y = self.patches(picture), self.words(ids)
        for block in self.seeing:
            x = block(x)
        for block in self.reading:
            y = block(y)
        return x.mean(1) @ y.mean(1).T


def _configured(kind: str, **settings: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def made() -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        model: nn.Module = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
        return model, {"input_ids": torch.randint(500, (4, 48))}

    return made


def _trained(kind: str, rate: float, steps: int, *, reset: bool = False, frozen: bool = False) -> Callable[..., Any]:
    """A small language model after some steps of AdamW on Python's documentation, byte by byte. `reset` sets gains and biases back
    afterwards, `frozen` trains all but the queries and keys."""

    def made() -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        from studies.language_models import corpus

        own = {
            "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
            "Llama": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192},
        }[kind]
        configuration = getattr(transformers, f"{kind}Config")(vocab_size=256, **own)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(configuration)
        moving = [p for path, p in model.named_parameters() if not (frozen and ("q_proj" in path or "k_proj" in path))]
        optimizer, (training, _) = torch.optim.AdamW(moving, rate), corpus()
        for _ in range(steps):
            ids = training[torch.randint(len(training) - 64, (8, 1)) + torch.arange(64)]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if reset:
            with torch.no_grad():
                for path, parameter in model.named_parameters():
                    if parameter.ndim == 1:
                        parameter.fill_(0.0 if path.endswith("bias") else 1.0)
        return model, {"input_ids": training[torch.arange(4)[:, None] * 1000 + torch.arange(48)]}

    return made


def _towers(text: type[nn.Module]) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    return lambda: (_Towers(text), {"picture": torch.ones(4, 9, 8), "ids": torch.randint(VOCABULARY, (4, 24))})


_SIZES = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "GPT-2 as initialised": _configured("GPT2", vocab_size=500, n_embd=128, n_layer=6, n_head=4),
    "BERT as initialised": _configured("Bert", **_SIZES, intermediate_size=256),
    "Llama as initialised": _configured("Llama", **_SIZES, intermediate_size=256),
    **{
        f"{kind}, {'one step' if steps == 1 else 'five steps'} of AdamW at {rate:g}": _trained(kind, rate, steps)
        for kind in ("GPT2", "Llama")
        for steps in (1, 5)
        for rate in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2)
    },
    "GPT2, five steps of AdamW at 0.003, then gains and biases reset": _trained("GPT2", 3e-3, 5, reset=True),
    "Llama, 200 steps at 0.001, queries and keys as they were": _trained("Llama", 1e-3, 200, frozen=True),
    "the same, then gains reset": _trained("Llama", 1e-3, 200, frozen=True, reset=True),
    "two towers as initialised, pictures of one colour": _towers(_Block),
    "the same, and the text tower collapses": _towers(_Collapsing),
    "DINOv2-small on noise instead of pictures": dinov2_on_noise,
}


def diagnosed() -> list[dict[str, Any]]:
    """The warnings on each, and what is only said as information: codes, each once."""
    found = []
    for name, made in MODELS.items():
        torch.manual_seed(0)
        model, batch = made()
        findings = uc.diagnose(model.eval(), batches=[batch]).findings
        warned = sorted({f.code for f in findings if f.severity != "info"})
        told = sorted({f.code for f in findings if f.severity == "info"})
        found.append({"model": name, "warned": warned, "told": told})
    return found
