"""Residual streams as people write them: read, proved, measured and removed, against what each model records itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.observing import attention_table, entropies, observe
from tests.helpers.residual_structures import STRUCTURES, InPieces, ModdedNanoGPT, Owned, Stack, ViT, left_out
from tests.reference.geometry import consensus_distance, effective_rank
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.sites import PLAIN_MEASURES

EPS = 2.0**-23
structures = pytest.mark.parametrize("name", STRUCTURES)


def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))


def own_streams(model: Owned, batch: dict[str, Tensor]) -> tuple[list[np.ndarray], list[Tensor]]:
    """The streams that the model keeps, and the weights of every fused attention call that it makes, worked out here."""
    weights: list[Tensor] = []
    fused = nn.functional.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, enable_gqa: bool = False) -> Tensor:
        keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = q.double() @ keys.mT / q.shape[-1] ** 0.5
        later = torch.ones(logits.shape[-2:]).triu(1).bool() & is_causal
        weights.append(logits.masked_fill(later, -torch.inf).softmax(-1))
        return fused(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)

    model.seen.clear()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", noting)
        model(**batch)
    return [stream.double().numpy() for stream in model.seen], weights


@structures
def test_every_block_is_found_and_its_stream_measured_where_the_model_has_it(name: str) -> None:
    model, batch = STRUCTURES[name]().eval(), {"idx": tokens()}
    streams, weights = own_streams(model, batch)
    anatomy = proved_anatomy(model, batch)
    assert [[p.kind for p in b.parts] for b in anatomy.blocks] == [["attention", "mlp"]] * (len(streams) - 1)
    observed = observe(model, [batch])
    assert len(observed.sites) == len(streams)
    for site, stream in zip(observed.sites, streams, strict=True):
        for measure, reference in (("consensus_distance", consensus_distance), ("effective_rank", effective_rank)):
            got = site.plain.summary(PLAIN_MEASURES.index(measure))[0]
            assert got == pytest.approx(np.mean([reference(x, EPS) for x in stream]), rel=1e-4), (site.site, measure)
    expected = np.array([entropies(own, None)[0] for own in weights])
    assert attention_table(observed, "entropy") == pytest.approx(expected, abs=5e-6)


@structures
@pytest.mark.parametrize("gone", [("mlp",), ("attention",), ("attention", "mlp")], ids="+".join)
def test_what_is_taken_away_is_what_the_model_leaves_out_itself(name: str, gone: tuple[str, ...]) -> None:
    model, batch = STRUCTURES[name]().eval(), {"idx": tokens()}
    whole, expected = left_out(model, batch, gone)
    with torch.no_grad():
        with uc.without(model, *gone, batch=batch):
            got = model(**batch)
        assert torch.equal(model(**batch), whole)
    assert torch.equal(got, expected)
    assert not torch.equal(got, whole)


@structures
def test_a_full_diagnosis_runs(name: str) -> None:
    model, batch = STRUCTURES[name]().eval(), {"idx": tokens()}
    found = uc.diagnose(model, batches=[batch], level="full")
    assert all(u.relative_norm is not None for u in found.record.updates)
    assert all(a.entropy is not None for a in found.record.attention)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Stack(InPieces), "a sublayer of blocks.0 runs on some of the tokens at a time"),
    ],
    ids=["in pieces"],
)
def test_what_cannot_be_read_is_refused_with_its_reason(model: Owned, reason: str) -> None:
    with pytest.raises(uc.UnsupportedModel) as caught:
        proved_anatomy(model.eval(), {"idx": tokens()})
    assert reason in str(caught.value)
    assert reason in caught.value.identity


def test_a_chunked_feed_forward_gives_the_figures_of_the_whole_one() -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    whole = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    chunked = transformers.BertModel(transformers.BertConfig(**sizes, chunk_size_feed_forward=3)).eval()
    chunked.load_state_dict(whole.state_dict())
    batch = {"input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))}
    figures = [uc.diagnose(m, batches=[batch], level="full").record for m in (whole, chunked)]
    assert figures[0].trajectory == figures[1].trajectory
    assert figures[0].updates == figures[1].updates
    assert {m.chunk_size_feed_forward for m in chunked.modules() if hasattr(m, "chunk_size_feed_forward")} == {3}
    with torch.no_grad(), uc.without(chunked, "mlp"):
        left = chunked(**batch)[0]
    with torch.no_grad(), uc.without(whole, "mlp", batch=batch):
        assert torch.equal(whole(**batch)[0], left)


def test_flex_attention_is_measured_as_the_eager_attention_it_is() -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="eager")).eval()
    flex = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="flex_attention")).eval()
    flex.load_state_dict(eager.state_dict())
    batch = {"input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))}
    figures = [uc.diagnose(m, batches=[batch]).record for m in (eager, flex)]
    assert figures[0].attention == figures[1].attention
    assert flex.config._attn_implementation == "flex_attention"


def test_blocks_in_a_loop_are_named_after_their_attention() -> None:
    blocks = proved_anatomy(ViT().eval(), {"idx": tokens()}).blocks
    assert [b.name for b in blocks] == [f"transformer.layers.{i}" for i in range(3)]
    layout = uc.Layout(blocks=("transformer.layers.0", "transformer.layers.2"))
    assert [b.name for b in proved_anatomy(ViT().eval(), {"idx": tokens()}, layout).blocks] == list(layout.blocks)


def test_the_carry_of_a_mixed_stream_is_proved_up_to_rounding_and_not_assumed() -> None:
    proof = proved_anatomy(ModdedNanoGPT().eval(), {"idx": tokens()}).proof
    assert [i.where for i in proof if "element by element" in i.statement] == [f"blocks.{i}" for i in range(4)]
    plain = proved_anatomy(STRUCTURES["Block"]().eval(), {"idx": tokens()}).proof
    assert not any("element by element" in i.statement for i in plain)
