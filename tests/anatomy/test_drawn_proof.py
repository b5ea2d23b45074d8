"""Anatomies proved on drawn weights: what the model's own show, at one reading of these for the first diagnosis."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from accelerate.utils import offload
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from tests.helpers.kept_weights import counted_reads
from tests.helpers.several_processes import differences
from uncollapse.analyses import preparation
from uncollapse.anatomy.drawn_proof import drawn_proof
from uncollapse.anatomy.drawn_weights import LEAST, MOST, can_be_drawn, drawn_weights
from uncollapse.anatomy.proof import known_anatomy, proved_anatomy
from uncollapse.anatomy.vocabulary import Anatomy

CPU = torch.device("cpu")
TOKENS = 9
MEASURED = ("trajectory", "attention", "norms", "updates", "parts", "findings", "corpus", "embeddings", "anatomy")
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WITH_EXPERTS = hf.Qwen3MoeConfig(
    **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return counted_reads(monkeypatch)


def batch(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 60, (3, TOKENS), generator=torch.Generator().manual_seed(seed))}


def elsewhere(model: nn.Module) -> nn.Module:
    uc.forget(model)
    accelerate.cpu_offload(model, execution_device=CPU)
    return model


def on_drawn(model: nn.Module, given: dict[str, Tensor], reads: Counter[str]) -> Anatomy:
    reads.clear()
    found = drawn_proof(model, given)
    assert not reads
    assert found is not None
    return found.anatomy


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "albert",
        "distilbert",
        "modernbert",
        "gpt2",
        "gpt_neox",
        "opt",
        "phi",
        "bloom",
        "llama",
        "mixtral",
        "gemma3",
        "olmo2",
        "deepseek_v3",
        "gpt_oss",
        "t5",
        "bart",
        "vit",
    ],
)
def test_drawn_numbers_show_the_anatomy_that_the_weights_show(name: str, reads: Counter[str]) -> None:
    model, given = FAMILIES[name].build(), inputs_for(FAMILIES[name])
    real = proved_anatomy(model, given)
    assert on_drawn(elsewhere(model), given, reads) == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["experts", "hybrid"])
def test_experts_and_hybrids_too(kind: str, dtype: torch.dtype, reads: Counter[str]) -> None:
    torch.manual_seed(0)
    if kind == "experts":
        model: nn.Module = hf.Qwen3MoeModel(WITH_EXPERTS)
    else:
        model = hf.FalconH1Model(
            hf.FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
        )
    model = model.to(dtype).eval()
    real = proved_anatomy(model, batch())
    assert on_drawn(elsewhere(model), batch(), reads) == real


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            logits = logits + mask[: x.shape[1], : x.shape[1]]
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """gain: of what both sublayers add. mask: a causal one, kept as a parameter."""

    def __init__(self, width: int, *, gain: float | None = None, mask: float | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = (
            Attention(width, 4),
            nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)),
        )
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain))
        above = torch.full((64, 64), 0.0 if mask is None else mask).triu(1)
        self.mask = None if mask is None else nn.Parameter(above, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 if self.gain is None else self.gain
        x = x + gain * self.attention(self.first(x), self.mask)
        return x + gain * self.mlp(self.second(x))


class Model(nn.Module):
    def __init__(self, **kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(60, 32), nn.LayerNorm(32)
        self.blocks = nn.ModuleList(Block(32, **kind) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def compared(model: nn.Module, reads: Counter[str]) -> tuple[uc.Diagnosis, uc.Diagnosis, set[int]]:
    """The diagnosis in memory, that of the model elsewhere, and how often the latter read a weight."""
    given = [batch(seed) for seed in range(2)]
    inside = uc.diagnose(model.eval(), batches=given, name="one")
    elsewhere(model)
    reads.clear()
    outside = uc.diagnose(model, batches=given, name="one")
    return inside, outside, set(reads.values())


def require_same(inside: uc.Diagnosis, outside: uc.Diagnosis) -> None:
    for part in MEASURED:
        assert differences(getattr(inside.record, part), getattr(outside.record, part), 1e-6) == [], part


def test_sublayers_that_do_nothing_yet_are_read_as_they_will_be_and_measured_as_they_are(reads: Counter[str]) -> None:
    """A gain of 0: with drawn numbers every part does something. That it does nothing is a figure, and the pass shows it."""
    model = Model(gain=0.0)
    real = proved_anatomy(model, batch())
    assert on_drawn(elsewhere(model), batch(), reads) == real
    inside, outside, _ = compared(Model(gain=0.0), reads)
    require_same(inside, outside)
    assert [part.update_size for part in outside.record.parts] == [0.0] * 6


def test_matrices_of_zeros_are_measured_as_they_are(reads: Counter[str]) -> None:
    def made() -> nn.Module:
        model = Model()
        for block in model.blocks[:2]:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp[2].weight)
            nn.init.zeros_(block.mlp[2].bias)
        return model

    model = made()
    real = proved_anatomy(model, batch())
    assert on_drawn(elsewhere(model), batch(), reads) == real
    inside, outside, _ = compared(made(), reads)
    require_same(inside, outside)


@pytest.mark.parametrize("mask", [-math.inf, -1e4])
def test_a_mask_that_is_a_parameter_is_noticed_in_the_pass(mask: float, reads: Counter[str]) -> None:
    """Drawn, it hides nothing: the attention seems to see what comes later."""
    inside, outside, times = compared(Model(mask=mask), reads)
    require_same(inside, outside)
    assert min(times) > 1
    model = elsewhere(Model(mask=mask).eval())
    seen = [part.is_causal for b in on_drawn(model, batch(), reads).blocks for part in b.parts if part.attention]
    assert seen == [False] * 3  # so the mask has to be noticed
    real = [part.is_causal for b in proved_anatomy(model, batch()).blocks for part in b.parts if part.attention]
    assert real == [True] * 3


class Penalty(nn.Module):
    """What is added to the logits of padding: a weight, as far from 0 as no drawn one is."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(-1e9), requires_grad=False)

    def forward(self, attention_mask: Tensor) -> Tensor:
        return ((1 - attention_mask.float()) * self.size)[:, None, None, :]


class Padded(Model):
    def __init__(self) -> None:
        super().__init__()
        self.penalty = Penalty()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, penalty = self.embed(input_ids), self.penalty(attention_mask)
        for block in self.blocks:
            x = x + block.attention(block.first(x), penalty)
            x = x + block.mlp(block.second(x))
        return self.norm(x)


@pytest.mark.parametrize("padded", [[False, True], [True, True], [False]])
def test_padding_that_is_hidden_by_a_weight_is_no_token(padded: list[bool], reads: Counter[str]) -> None:
    """Drawn, that hides nothing, and no block by itself is another one for it. In a first batch without padding none is missed."""
    real = [7, 9, 4]
    given = []
    for seed, is_padded in enumerate(padded):
        mask = torch.ones(3, TOKENS, dtype=torch.int64)
        for row, tokens in enumerate(real if is_padded else ()):
            mask[row, tokens:] = 0
        given.append(batch(seed) | {"attention_mask": mask})
    inside = uc.diagnose(Padded().eval(), batches=given, name="one")
    model = elsewhere(Padded().eval())
    outside = uc.diagnose(model, batches=given, name="one")
    assert outside.record.probe.tokens == sum(sum(real) if is_padded else 3 * TOKENS for is_padded in padded)
    require_same(inside, outside)
    (stack,) = known_anatomy(model).stacks
    assert [mask.tensor for mask in stack.masks] == ["attention_mask"]


class Size(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(-1e9))

    def forward(self) -> Tensor:
        return self.size


class Penalised(Block):
    def forward(self, x: Tensor, penalty: Tensor) -> Tensor:  # type: ignore[override]  # a penalty besides
        x = x + self.attention(self.first(x), penalty)
        return x + self.mlp(self.second(x))


class Lazy(Model):
    """Makes its penalty where something is padded only; else it reads that weight behind its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.blocks = Size(), nn.ModuleList(Penalised(32) for _ in range(3))

    def forward(self, input_ids: Tensor, keep: Tensor) -> Tensor:
        x, is_full = self.embed(input_ids), bool(keep.all())
        size = 0.0 if is_full else self.size()
        penalty = ((1 - keep.float()) * size)[:, None, None, :]
        for block in self.blocks:
            x = block(x, penalty)
        return self.norm(x + 0 * self.size() if is_full else x)


def test_a_penalty_that_is_made_where_something_is_padded_is_noticed(reads: Counter[str]) -> None:
    """The pass with a padded token stands before another module than the one without."""
    padded = torch.ones(3, TOKENS, dtype=torch.int64)
    padded[1, 5:] = 0
    given = [batch() | {"keep": torch.ones_like(padded)}, batch(1) | {"keep": padded}]
    inside = uc.diagnose(Lazy().eval(), batches=given, name="one")
    model = elsewhere(Lazy().eval())
    outside = uc.diagnose(model, batches=given, name="one")
    assert outside.record.probe.tokens == 3 * TOKENS + 2 * TOKENS + 5
    require_same(inside, outside)


class TwoStacks(Padded):
    """Its padding is hidden from one stream by its code, from the other by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(60, 32)
        self.further = nn.ModuleList(Block(32) for _ in range(2))

    def forward(  # type: ignore[override]  # two outputs
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = torch.zeros(attention_mask.shape).masked_fill(attention_mask == 0, -math.inf)[:, None, None, :]
        x, y, penalty = self.embed(input_ids), self.other(input_ids), self.penalty(attention_mask)
        for block in self.blocks:
            x = x + block.attention(block.first(x), hidden)
            x = x + block.mlp(block.second(x))
        for block in self.further:
            y = y + block.attention(block.first(y), penalty)
            y = y + block.mlp(block.second(y))
        return self.norm(x), self.norm(y)


def test_padding_that_is_hidden_by_a_weight_from_one_of_two_streams_is_no_token(reads: Counter[str]) -> None:
    mask = torch.ones(3, TOKENS, dtype=torch.int64)
    mask[1, 5:] = 0
    given = [batch() | {"attention_mask": mask}]
    inside = uc.diagnose(TwoStacks().eval(), batches=given, name="one")
    model = elsewhere(TwoStacks().eval())
    seen = [[mask.tensor for mask in stack.masks] for stack in on_drawn(model, given[0], reads).stacks]
    assert seen == [["attention_mask"], []]  # so it has to be noticed
    outside = uc.diagnose(model, batches=given, name="one")
    require_same(inside, outside)
    known = known_anatomy(model)
    assert known is not None
    assert [[mask.tensor for mask in stack.masks] for stack in known.stacks] == [["attention_mask"]] * 2


@pytest.mark.parametrize("kind", ["bert", "albert", "t5"])
def test_what_might_be_a_mask_costs_no_reading(kind: str, reads: Counter[str]) -> None:
    """Zeros and ones that hide nothing, and a mask that only one of two stacks is given."""
    model, given = FAMILIES[kind].build(), [inputs_for(FAMILIES[kind], seed=seed) for seed in range(2)]
    for each in given:
        ids = each["input_ids"]
        if kind == "t5":
            each["decoder_attention_mask"] = torch.ones_like(each["decoder_input_ids"])
        else:
            each["token_type_ids"] = (torch.arange(ids.shape[1]) > 3).long().expand(ids.shape).contiguous()
    inside = uc.diagnose(model, batches=given, name="one")
    elsewhere(model)
    reads.clear()
    outside = uc.diagnose(model, batches=given, name="one")
    assert set(reads.values()) == {1}
    require_same(inside, outside)


class Particular(Model):
    """Takes one kind of sequence only."""

    def forward(self, input_ids: Tensor, kinds: Tensor) -> Tensor:
        if bool(kinds.any()):
            raise ValueError("sequences of another kind")
        return super().forward(input_ids)


def test_a_value_that_the_model_does_not_take_is_no_mask_and_costs_no_reading(reads: Counter[str]) -> None:
    given = [batch() | {"kinds": torch.zeros(3, TOKENS, dtype=torch.int64)}]
    inside, model = uc.diagnose(Particular().eval(), batches=given, name="one"), elsewhere(Particular().eval())
    reads.clear()
    outside = uc.diagnose(model, batches=given, name="one")
    assert set(reads.values()) == {1}
    require_same(inside, outside)


class Mixed(Attention):
    """Its heads are mixed behind the softmax by weights: rows sum to one if their columns do."""

    def __init__(self, width: int, heads: int, total: float) -> None:
        super().__init__(width, heads)
        self.talk = Talk(heads, total)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out((self.talk((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)) @ v).transpose(1, 2).flatten(2))


class Talk(nn.Module):
    def __init__(self, heads: int, total: float) -> None:
        super().__init__()
        self.shares = nn.Parameter(total * (torch.eye(heads) / 2 + torch.eye(heads).roll(1, 0) / 2))

    def forward(self, weights: Tensor) -> Tensor:
        return torch.einsum("bhqk,hg->bgqk", weights, self.shares)


@pytest.mark.parametrize("total", [1.0, 1.03125])
def test_rows_that_sum_to_one_by_the_models_own_weights_are_a_distribution(total: float, reads: Counter[str]) -> None:
    """In bfloat16 it is asked in the proof whether they do. Drawn weights that mix heads have no columns that sum to one."""

    def made() -> nn.Module:
        model = Model()
        for block in model.blocks:
            block.attention = Mixed(32, 4, total)
        return model.to(torch.bfloat16).eval()

    inside = uc.diagnose(made(), batches=[batch()])
    model = elsewhere(made())
    outside = uc.diagnose(model, batches=[batch()])
    calls = [c for b in known_anatomy(model).blocks for part in b.parts for c in part.attention]
    assert [call.sums_to_one for call in calls] == [total == 1.0] * 3
    for head in (*inside.record.attention, *outside.record.attention):
        assert (head.entropy is not None) == (total == 1.0)


class Patched(Model):
    """Takes its ids five at a time, and no other number of them. Its queries and keys have norms, which bound its logits."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.attention = Bounded(32, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids.view(len(input_ids), -1, 5)).sum(-2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Bounded(Attention):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.of_queries, self.of_keys = (nn.LayerNorm(width // heads) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        logits = self.of_queries(q) @ self.of_keys(k).mT / math.sqrt(q.shape[-1])
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_bounds_are_asked_on_the_piece_that_was_proved(reads: Counter[str]) -> None:
    given = [{"input_ids": torch.randint(1, 60, (3, 40))}]
    inside = uc.diagnose(Patched().eval(), batches=given, name="one")
    model = elsewhere(Patched().eval())
    reads.clear()
    outside = uc.diagnose(model, batches=given, name="one")
    assert set(reads.values()) == {1}
    require_same(inside, outside)
    assert all(head.bound_part == "query-key norm" for head in outside.record.attention)


class Deciding(Model):
    """Goes round once more where a weight is larger than any drawn one."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        if self.turn():
            x = self.blocks[0](x)
        return self.norm(x)


class Turn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(2.0))

    def forward(self) -> bool:
        return bool(self.size > MOST)


def test_another_way_with_the_real_weights_is_proved_on_these(reads: Counter[str]) -> None:
    inside, outside, times = compared(Deciding(), reads)
    require_same(inside, outside)
    assert len(outside.record.trajectory) == 5
    assert min(times) > 1


class Hiding(Block):
    """Its MLP reads the token before, by as many places as no drawn weight makes other than 0."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.turn = Turn()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x), self.mask)
        return x + self.mlp(self.second(x).roll(int(self.turn()), 1))


def test_what_only_the_own_weights_show_of_a_block_is_met_in_the_pass(reads: Counter[str]) -> None:
    def made() -> nn.Module:
        model = Model()
        model.blocks[1] = Hiding(32)
        return model

    assert [part.kind for part in on_drawn(elsewhere(made().eval()), batch(), reads).blocks[1].parts][1] == "mlp"
    inside, outside, times = compared(made(), reads)
    require_same(inside, outside)
    assert min(times) > 1


class Refusing(Model):
    """Runs with its own weights only."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = super().forward(input_ids)
        if float(x.abs().mean()) < 1.5:
            raise ValueError("numbers that are none of mine")
        return x

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.norm.weight, 9.0)


def test_what_cannot_be_proved_on_drawn_numbers_is_proved_on_the_weights(
    reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside, _ = compared(Refusing(), reads)
    require_same(inside, outside)
    times = dict(reads)
    monkeypatch.setattr(preparation, "drawn_proof", lambda *given: None)
    compared(Refusing(), reads)
    assert dict(reads) == times  # no reading more
    assert min(times.values()) >= 4


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "t5", "bart", "bert", "gemma3"])
def test_the_first_diagnosis_reads_each_weight_once(kind: str, where: str, reads: Counter[str], tmp_path: Path) -> None:
    model, given = FAMILIES[kind].build(), [inputs_for(FAMILIES[kind], seed=seed) for seed in range(3)]
    inside = uc.diagnose(model, batches=given, name="one")
    uc.forget(model)
    if where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=CPU)
    else:
        accelerate.cpu_offload(model, execution_device=CPU)
    count = sum(p.is_meta for p in model.parameters())
    reads.clear()
    outside = uc.diagnose(model, batches=given, name="one")
    assert set(reads.values()) == {1}
    assert len(reads) >= count - 1 > 20  # the embedding that two stacks share does not run itself
    require_same(inside, outside)
    reads.clear()
    uc.diagnose(model, batches=given)
    assert set(reads.values()) == {1}


def test_a_layer_that_runs_in_turn_is_read_once_for_all_its_runs(reads: Counter[str]) -> None:
    family = FAMILIES["albert"]
    model = elsewhere(family.build())
    given = [inputs_for(family, seed=seed) for seed in range(2)]
    uc.identify(model, batches=given)
    assert {n for key, n in reads.items() if "albert_layers" in key} == {1}


def test_an_anatomy_is_remembered_once_a_pass_has_borne_it_out(reads: Counter[str]) -> None:
    model, given = elsewhere(FAMILIES["llama"].build()), inputs_for(FAMILIES["llama"])
    found = on_drawn(model, given, reads)
    assert known_anatomy(model) is None
    uc.identify(model, batches=[given])
    assert set(reads.values()) == {1}
    assert known_anatomy(model) == found
    assert drawn_proof(model, given) is None
    uc.forget(model)
    proved_anatomy(model, given)  # for somebody who does not bear it out
    assert min(reads.values()) >= 3


def test_passes_of_other_threads_wait_while_weights_are_drawn() -> None:
    model, given = elsewhere(Model().eval()), batch()
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.append(model(**given))

    run()
    other = threading.Thread(target=run)
    with drawn_weights(model):
        other.start()
        time.sleep(0.3)
        assert not torch.equal(model(**given), found[0])
        assert len(found) == 1
    other.join(60)
    assert torch.equal(found[0], found[1])


def test_drawing_leaves_nothing_behind(reads: Counter[str]) -> None:
    class Noting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(32))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = super().forward(input_ids)
            self.get_buffer("last").copy_(x[0, 0])
            return x

    model = elsewhere(Noting().eval())
    maps = [m._hf_hook.weights_map for m in model.modules() if isinstance(m, nn.Linear)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with drawn_weights(model):
        model(**batch())
        assert bool(model.get_buffer("last").any())
    assert not reads
    assert torch.equal(torch.get_rng_state(), state)
    assert not bool(model.get_buffer("last").any())
    assert maps == [m._hf_hook.weights_map for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(type(each) is offload.PrefixedDataset for each in maps)


def test_numbers_are_the_same_at_every_reading_and_others_for_every_tensor() -> None:
    model = elsewhere(Model(gain=0.0).to(torch.bfloat16).eval())
    with drawn_weights(model):
        first, again = (
            {
                f"{name}.{key}": each._hf_hook.weights_map[key]
                for name, each in model.named_modules()
                for key in each._parameters
                if each._parameters[key] is not None
            }
            for _ in range(2)
        )
    assert first.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], again[name])
        assert (first[name].shape, first[name].dtype) == (parameter.shape, parameter.dtype)
        if parameter.ndim > 1:
            assert 0.5 < float(first[name].double().square().mean()) * parameter.shape[-1] < 2
        else:
            assert float(first[name].min()) >= LEAST
            assert float(first[name].max()) <= MOST
    matrices = [v.flatten()[:32] for v in first.values() if v.ndim > 1]
    assert len({tuple(v.tolist()) for v in matrices}) == len(matrices)


def test_formats_and_classes_of_their_own_are_not_drawn() -> None:
    class Own(nn.Parameter):
        pass

    assert not can_be_drawn(Model())
    assert can_be_drawn(elsewhere(Model()))
    model = elsewhere(Model())
    model.blocks[0].mlp[0]._parameters["weight"] = Own(torch.empty(48, 32, device="meta"))
    assert not can_be_drawn(model)
    model = Model()
    model.blocks[0].mlp[0].weight = nn.Parameter(model.blocks[0].mlp[0].weight.to(torch.float8_e4m3fn))
    assert not can_be_drawn(elsewhere(model))
