"""Small causal language models trained on the CPU without one of their components, to stand beside a trained model that has
lost it. They read Python's own documentation byte by byte.

    python -m studies.language_models      one training, with its loss as it goes

Everything is pre-norm; `without` names what the model never has: "mlp" (the sublayer with its norm and residual),
"residual" (each sublayer's output goes on alone), "norm" (inside the blocks; the last one stays).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

import uncollapse as uc
from uncollapse.measures import geometry

BYTES = 256
CONTEXT = 64
HEADS = 4
BATCH = 32
RATE = 2e-3
STEPS = 300
SEEDS = (0, 1, 2)
WIDTH, DEPTH = 68, 4
WITHOUT: tuple[tuple[str, ...], ...] = ((), ("mlp",), ("residual",), ("norm",))
SHAPES = ((2, 96), (4, 68), (8, 48))  # 12·width² parameters a block, 221 to 222 thousand in all


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual, unless the block is without them."""

    def __init__(self, width: int, without: Collection[str]) -> None:
        super().__init__()
        self.without = frozenset(without)
        self.norm_1, self.norm_2 = (nn.Identity() if "norm" in without else nn.LayerNorm(width) for _ in range(2))
        self.joint = nn.Linear(width, 3 * width)
        self.projection: nn.Module = nn.Linear(width, width)  # gates may be put around it
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if "mlp" in without:
            del self.wide, self.narrow, self.norm_2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.joint(self.norm_1(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        update = self.projection(mixed.transpose(1, 2).flatten(2))
        x = update if "residual" in self.without else x + update
        if "mlp" in self.without:
            return x
        update = self.narrow(functional.gelu(self.wide(self.norm_2(x))))
        return update if "residual" in self.without else x + update


class LanguageModel(nn.Module):
    """A byte-level decoder with learned positions and tied embeddings."""

    blocks: Sequence[Block]

    def __init__(self, depth: int, width: int, without: Collection[str] = ()) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, without) for _ in range(depth))  # type: ignore[assignment] # of modules, says torch
        self.norm = nn.LayerNorm(width)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # GPT-2's start: what writes into the stream is smaller the deeper the model is.
                writes = name.endswith(("projection.weight", "narrow.weight")) and "residual" not in without
                nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)
        if "residual" in without:
            # Without a stream beside it a sublayer has to carry the whole signal: unit gain instead.
            for block in self.blocks:
                for layer in block.modules():
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.norm(x) @ self.tokens.weight.T)


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes of other topics to be judged on: every tenth topic."""
    from pydoc_data.topics import topics

    texts = [topics[name].encode() for name in sorted(topics)]
    held_out = b"".join(texts[::10])
    training = b"".join(text for i, text in enumerate(texts) if i % 10)
    return torch.tensor(list(training)), torch.tensor(list(held_out))


def trained(
    training: Tensor, depth: int, width: int, without: Collection[str], seed: int, steps: int = STEPS
) -> LanguageModel:
    """One model, trained with the same recipe whatever it is without."""
    torch.manual_seed(seed)
    model = LanguageModel(depth, width, without)
    fit(model, training, seed, steps)
    return model.eval()


def fit(
    model: nn.Module,
    training: Tensor,
    seed: int,
    steps: int = STEPS,
    watch: Callable[[int, float], None] | None = None,
    *,
    batch: int = BATCH,
    context: int = CONTEXT,
    rate: float = RATE,
) -> None:
    """The recipe of every training here; the seed decides on the windows. `watch` is told the steps done and the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for step in range(steps):
        starts = torch.randint(len(training) - context - 1, (batch, 1), generator=draws)
        window = training[starts + torch.arange(context + 1)].to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model(window[:, :-1]).logits, window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if watch is not None:
            watch(step + 1, float(loss.detach()))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def judged(model: LanguageModel, held_out: Tensor, removed: Sequence[str] = (), sequences: int = 64) -> dict[str, Any]:
    """Loss on text it never saw, and the token cloud along depth; with `removed` taken from the trained model."""
    model = model.double()
    every = (len(held_out) - CONTEXT - 1) // sequences
    windows = held_out[torch.arange(sequences)[:, None] * every + torch.arange(CONTEXT + 1)]
    ids = windows[:, :-1]
    clouds: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if removed:
            stack.enter_context(uc.without(model, *removed, batch={"input_ids": ids[:2]}))
        entry = model.blocks[0].register_forward_pre_hook(lambda _, given: clouds.append(given[0]))
        hooks = [b.register_forward_hook(lambda _m, _i, output: clouds.append(output)) for b in model.blocks]
        for hook in (entry, *hooks):
            stack.callback(hook.remove)
        logits = model(ids).logits
    attainable = min(CONTEXT - 1, clouds[0].shape[-1])
    return {
        "loss": float(loss_of(logits, windows[:, 1:])),
        "consensus": [float(geometry.consensus_distance(x).mean()) for x in clouds],
        "rank_share": [float(geometry.affine_rank(x).double().mean()) / attainable for x in clouds],
    }


def without_context(training: Tensor, held_out: Tensor) -> float:
    """The loss of knowing only how frequent each byte is: what a model scores that sees no context."""
    counts = torch.bincount(training, minlength=BYTES).double() + 1
    return float(-(counts / counts.sum()).log()[held_out].mean())


def section() -> dict[str, Any]:
    """Every training and every removal of the document."""
    training, held_out = corpus()
    found: list[dict[str, Any]] = []
    for depth, width in SHAPES:
        variants = WITHOUT if (depth, width) == (DEPTH, WIDTH) else ((),)
        for without in variants:
            for seed in SEEDS:
                model = trained(training, depth, width, without, seed)
                parameters = sum(p.numel() for p in model.parameters())
                common = {"depth": depth, "width": width, "seed": seed, "parameters": parameters}
                found.append({**common, "trained_without": without, "removed": (), **judged(model, held_out)})
                if len(variants) > 1 and not without:
                    found += [
                        {**common, "trained_without": (), "removed": removed, **judged(model, held_out, removed)}
                        for removed in WITHOUT[1:]
                    ]
    return {"models": found, "without_context": without_context(training, held_out)}


if __name__ == "__main__":
    text, other = corpus()
    for without in WITHOUT:
        print(without, judged(trained(text, DEPTH, WIDTH, without, 0), other))
