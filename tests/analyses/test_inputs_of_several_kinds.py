"""Batches of which a later one is of another kind than the first: a mask, a block or a cache that the first did not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import uncollapse as uc
from tests.helpers.several_processes import SIZES
from uncollapse.anatomy.interception import ChangedPath

IDS = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(4, 9, dtype=torch.long)
MASK[1, :3] = MASK[2, :5] = 0
UNPADDED, PADDED = {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": MASK}


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"vocab_size": 64}, initializer_range=0.3)).eval()


def distances(model: Any, batch: dict[str, Tensor]) -> list[list[float]]:
    """By site the consensus distance of each sequence's real tokens, from hooks of this test's own."""
    clouds: list[Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: clouds.append(args[0].double()))]
    hooks += [layer.register_forward_hook(lambda _, __, output: clouds.append(output.double())) for layer in layers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    rows = [[x[own] for x, own in zip(cloud, real, strict=True)] for cloud in clouds]
    return [[float((x - x.mean(0)).norm() / x.norm()) for x in site] for site in rows]


def test_a_mask_that_only_a_later_batch_has_hides_its_tokens() -> None:
    """Once what it hides counted as tokens."""
    found = [uc.diagnose(llama(), batches=order) for order in ([UNPADDED, PADDED], [PADDED, UNPADDED])]
    own = [distances(llama(), each) for each in (UNPADDED, PADDED)]
    for one in found:
        assert one.record.probe.tokens == 36 + int(MASK.sum())
        for site, unpadded, padded in zip(one.trajectory, *own, strict=True):
            assert site.consensus_distance is not None
            assert site.consensus_distance.mean == pytest.approx(sum(unpadded + padded) / 8, rel=1e-5)


def test_a_mask_that_the_model_was_read_without_is_refused_where_something_is_away() -> None:
    """Inside a `without` the model is not read again: begin with a batch of that kind."""
    for component in ("mask", "mlp"):
        model = llama()
        with uc.without(model, component), pytest.raises(ChangedPath, match="'attention_mask' besides"):
            uc.diagnose(model, batches=[PADDED])
    model = llama()
    with uc.without(model, "mask"), pytest.raises(ChangedPath, match="'attention_mask' besides"):
        model(**PADDED)
    with uc.without(model, "mlp", batch=PADDED):
        assert uc.diagnose(model, batches=[PADDED]).record.probe.tokens == int(MASK.sum())


def test_a_training_batch_with_a_mask_that_the_probe_has_not_is_said_at_the_first_step() -> None:
    """And nothing is raised in the middle of the pass."""
    model = llama().train()
    monitor = uc.Monitor(model, [UNPADDED], every=1, on="train", log=lambda *_: None)
    model(**PADDED, labels=IDS).loss.backward()
    with pytest.raises(ChangedPath, match="'attention_mask' besides"):
        monitor.step(0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))


class LeavingEarly(nn.Module):
    """The last block runs on longer texts only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(64, 16), nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            if number == 2 and input_ids.shape[1] < 6:
                break
            x = layer(x)
        return x


def test_a_block_that_only_some_texts_run_is_neither_left_out_nor_kept_in_silence() -> None:
    """Once the record had two blocks, and an ablation kept the third one's parts."""
    torch.manual_seed(0)
    model, short = LeavingEarly().eval(), {"input_ids": IDS[:, :5]}
    assert uc.diagnose(model, batches=[UNPADDED]).record.model.blocks == 3
    for order in ([UNPADDED, short], [short, UNPADDED]):
        with pytest.raises(ChangedPath, match="Diagnose it on inputs of one kind"):
            uc.diagnose(model, batches=order)
    uc.forget(model)
    with uc.without(model, "mlp", batch=short), pytest.raises(uc.UnsupportedModel, match=r"layers\.2: it did not run"):
        model(**UNPADDED)
    with uc.without(model, "mlp", blocks=[0], batch=short):
        model(**UNPADDED)  # one block is named, and the others stay


def test_packed_sequences_that_a_cache_would_join_are_measured_where_it_is_said_what_is_meant() -> None:
    """With `config.use_cache` the model's own call lets them see each other; a probe keeps no cache."""
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    model = llama()
    with torch.no_grad():
        assert not torch.allclose(model(**packed).logits, model(**packed, use_cache=False).logits, atol=1e-2)
    with pytest.raises(uc.InputError, match="start again"):
        uc.diagnose(model, batches=[packed])
    apart = packed | {"use_cache": False}
    found = uc.diagnose(model, batches=[apart]).trajectory
    for site, expected in zip(found, distances(model, apart), strict=True):
        assert site.consensus_distance is not None
        assert site.consensus_distance.mean == pytest.approx(expected[0], rel=1e-5)
    in_order = packed | {"position_ids": torch.arange(9)[None]}
    assert uc.diagnose(model, batches=[in_order]).record.probe.tokens == 9


class Packed(nn.Module):
    """One row of sequences laid end to end, [token, width] in its block, whose borders a tensor gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, borders: Tensor) -> Tensor:
        x: Tensor = self.embed(input_ids[0])
        own = torch.bucketize(torch.arange(len(x)), borders[1:], right=True)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(0, 1) for t in self.qkv(self.norm(x)).chunk(3, -1))
        logits = (q @ k.mT).masked_fill(own[:, None] != own[None], -torch.inf)
        return x + self.out((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))


def test_how_many_numbers_are_ambiguous_is_not_said_of_heads_that_were_not_told_apart() -> None:
    """An attention over all sequences at once is not read. How many heads it has was guessed, and what follows from that given."""
    torch.manual_seed(0)
    record = uc.diagnose(
        Packed().eval(), batches=[{"input_ids": IDS.reshape(1, -1)[:, :11], "borders": torch.tensor([0, 4, 11])}]
    ).record
    (heads,) = record.heads
    assert heads.ambiguous_degrees_of_freedom is None
    assert heads.unavailable["ambiguous_degrees_of_freedom"] == heads.unavailable["kernel_dimension"]
