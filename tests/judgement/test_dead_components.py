"""Parts that do nothing are named, with block and head; parts that do little are not.

Each plant changes the weights of one part of a random model. The healthy models of the same families raise nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, batch_for
from uncollapse.judgement import dead_components as dead
from uncollapse.judgement.dead_components import dead_components
from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import EmbeddingRecord, PartRecord

Plant = Callable[[Any], None]
WIDTH, HEADS, HEAD = 32, 4, 8


class Attention(nn.Module):
    """Grouped-query attention as people write it themselves: einsums and a softmax of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD))
        k, v = (t.unflatten(-1, (2, HEAD)).repeat_interleave(2, 2) for t in self.kv(x).chunk(2, -1))
        weights = (torch.einsum("bthd,bshd->bhts", q, k) / HEAD**0.5).softmax(-1)
        mixed: Tensor = self.o(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
        return mixed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale[0] * self.attention(self.n1(x))
        return x + self.scale[1] * self.down(nn.functional.gelu(self.up(self.n2(x))))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(64, WIDTH), nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def own() -> nn.Module:
    torch.manual_seed(0)
    return Own().eval()


@functools.cache
def batches(family: str) -> tuple[dict[str, Tensor], ...]:
    found = batch_for(FAMILIES[family], 3, 12) if family in FAMILIES else {"input_ids": torch.arange(48).view(4, 12)}
    return (found,)


def found(family: str, plant: Plant | None = None, *, dtype: torch.dtype = torch.float32) -> list[Finding]:
    """The findings about dead components."""
    model = (own() if family == "own" else FAMILIES[family].build()).eval().to(dtype)
    with torch.no_grad():
        if plant is not None:
            plant(model)
    given = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches(family)]
    return [f for f in uc.diagnose(model, batches=given).findings if f.phenomenon == "dead-component"]


def zero(*tensors: Tensor | None, rows: slice = slice(None)) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor[rows] = 0


def linear(module: Any, rows: slice = slice(None)) -> None:
    zero(module.weight, module.bias, rows=rows)


def rows_of_output(module: Any, head: int, width: int = HEAD) -> None:
    module.weight[:, head * width : (head + 1) * width] = 0


def constant(module: Any) -> None:
    module.weight.zero_()
    module.bias.normal_()


def rank_one(module: Any) -> None:
    """The output map of an MLP has one direction left."""
    module.weight.copy_(torch.outer(module.weight[:, 0], module.weight[0]))


def copied(*modules: Any, source: int = 0, target: int = 2) -> None:
    for module in modules:
        for tensor in (module.weight, module.bias):
            if tensor is not None:
                tensor[target * HEAD : (target + 1) * HEAD] = tensor[source * HEAD : (source + 1) * HEAD]


def equal_rows(module: Any) -> None:
    module.weight.copy_(module.weight[5].expand_as(module.weight).clone())


def several(*plants: Callable[[], None]) -> None:
    for plant in plants:
        plant()


GPT2_HEAD = slice(64 + 1 * HEAD, 64 + 2 * HEAD)  # of the values, in one matrix with queries and keys
HEAD_1, HEAD_2 = slice(HEAD, 2 * HEAD), slice(2 * HEAD, 3 * HEAD)
PLANTS: dict[str, tuple[str, Plant, tuple[str, int | None, int | None]]] = {
    "gpt2: values of a head": (
        "gpt2",
        lambda m: several(lambda: m.h[1].attn.c_attn.weight[:, GPT2_HEAD].zero_()),
        ("DEAD-HEAD", 1, 1),
    ),
    "gpt2: rows of W_O": ("gpt2", lambda m: zero(m.h[2].attn.c_proj.weight, rows=slice(24, 32)), ("DEAD-HEAD", 2, 3)),
    "gpt2: attention": ("gpt2", lambda m: linear(m.h[2].attn.c_proj), ("DEAD-ATTENTION", 2, None)),
    "gpt2: MLP": ("gpt2", lambda m: linear(m.h[0].mlp.c_proj), ("DEAD-MLP", 0, None)),
    "gpt2: constant MLP": ("gpt2", lambda m: constant(m.h[1].mlp.c_proj), ("CONSTANT-UPDATE", 1, None)),
    "gpt2: constant attention": ("gpt2", lambda m: constant(m.h[1].attn.c_proj), ("CONSTANT-UPDATE", 1, None)),
    "gpt2: bias dominates": (
        "gpt2",
        lambda m: m.h[1].mlp.c_proj.bias.normal_(0, 300),
        ("CONSTANT-UPDATE", 1, None),
    ),
    "gpt2: block": (
        "gpt2",
        lambda m: several(lambda: linear(m.h[1].mlp.c_proj), lambda: linear(m.h[1].attn.c_proj)),
        ("DEAD-BLOCK", 1, None),
    ),
    "gpt2: MLP of rank one": ("gpt2", lambda m: rank_one(m.h[1].mlp.c_proj), ("MLP-RANK-ONE", 1, None)),
    "gpt2: hidden units": (
        "gpt2",
        lambda m: several(lambda: m.h[1].mlp.c_fc.weight[:, :7].zero_(), lambda: m.h[1].mlp.c_fc.bias[:7].fill_(0.5)),
        ("DEAD-UNITS", 1, None),
    ),
    "gpt2: embeddings": ("gpt2", lambda m: equal_rows(m.wte), ("EMBEDDINGS-EQUAL", None, None)),
    "gpt2: queries": ("gpt2", lambda m: zero(m.h[1].attn.c_attn.weight.T, rows=HEAD_2), ("HEAD-BLIND", 1, 2)),
    "bert: values of a head": (
        "bert",
        lambda m: linear(m.encoder.layer[1].attention.self.value, HEAD_1),
        ("DEAD-HEAD", 1, 1),
    ),
    "bert: constant values": (
        "bert",
        lambda m: several(
            lambda: zero(m.encoder.layer[1].attention.self.value.weight, rows=HEAD_1),
            lambda: m.encoder.layer[1].attention.self.value.bias[HEAD_1].fill_(1.0),
        ),
        ("DEAD-HEAD", 1, 1),
    ),
    "bert: rows of W_O": (
        "bert",
        lambda m: rows_of_output(m.encoder.layer[2].attention.output.dense, 2),
        ("DEAD-HEAD", 2, 2),
    ),
    "bert: MLP": ("bert", lambda m: linear(m.encoder.layer[1].output.dense), ("DEAD-MLP", 1, None)),
    "bert: block": (
        "bert",
        lambda m: several(
            lambda: linear(m.encoder.layer[1].output.dense), lambda: linear(m.encoder.layer[1].attention.output.dense)
        ),
        ("DEAD-BLOCK", 1, None),
    ),
    "bert: head copied": (
        "bert",
        lambda m: copied(*(getattr(m.encoder.layer[1].attention.self, n) for n in ("query", "key", "value"))),
        ("HEAD-COPIED", 1, 2),
    ),
    "bert: keys": ("bert", lambda m: linear(m.encoder.layer[0].attention.self.key, HEAD_1), ("HEAD-BLIND", 0, 1)),
    "llama: key-value group": (
        "llama",
        lambda m: several(lambda: linear(m.layers[1].self_attn.v_proj, HEAD_1)),
        ("DEAD-KEY-VALUE-GROUP", 1, 2),
    ),
    "llama: queries": ("llama", lambda m: linear(m.layers[2].self_attn.q_proj, HEAD_1), ("HEAD-BLIND", 2, 1)),
    "llama: head copied within its group": (
        "llama",
        lambda m: copied(m.layers[1].self_attn.q_proj, source=2, target=3),
        ("HEAD-COPIED", 1, 3),
    ),
    "llama: MLP by its gate": ("llama", lambda m: linear(m.layers[0].mlp.gate_proj), ("DEAD-MLP", 0, None)),
    "llama: hidden units": (
        "llama",
        lambda m: linear(m.layers[1].mlp.gate_proj, slice(40)),
        ("DEAD-UNITS", 1, None),
    ),
    "llama: embeddings": ("llama", lambda m: equal_rows(m.embed_tokens), ("EMBEDDINGS-EQUAL", None, None)),
    "t5: attention": (
        "t5_encoder",
        lambda m: linear_t5(m.encoder.block[1].layer[0].SelfAttention.o),
        ("DEAD-ATTENTION", 1, None),
    ),
    "t5: rows of W_O": (
        "t5_encoder",
        lambda m: rows_of_output(m.encoder.block[1].layer[0].SelfAttention.o, 3),
        ("DEAD-HEAD", 1, 3),
    ),
    "t5: MLP": (
        "t5_encoder",
        lambda m: linear_t5(m.encoder.block[2].layer[1].DenseReluDense.wo),
        ("DEAD-MLP", 2, None),
    ),
    "vit: MLP": ("vit", lambda m: linear(vit_layer(m, 1)["down"]), ("DEAD-MLP", 1, None)),
    "vit: values of a head": ("vit", lambda m: linear(vit_layer(m, 1)["value"], HEAD_1), ("DEAD-HEAD", 1, 1)),
    "own: key-value group": (
        "own",
        lambda m: linear(m.blocks[1].attention.kv, slice(16, 24)),
        ("DEAD-KEY-VALUE-GROUP", 1, 0),
    ),
    "own: rows of W_O": ("own", lambda m: rows_of_output(m.blocks[1].attention.o, 2), ("DEAD-HEAD", 1, 2)),
    "own: queries": ("own", lambda m: linear(m.blocks[1].attention.q, HEAD_1), ("HEAD-BLIND", 1, 1)),
    "own: scale of a sublayer": (
        "own",
        lambda m: zero(m.blocks[1].scale, rows=slice(0, 1)),
        ("DEAD-ATTENTION", 1, None),
    ),
    "own: block": ("own", lambda m: zero(m.blocks[2].scale), ("DEAD-BLOCK", 2, None)),
    "own: MLP of rank one": ("own", lambda m: rank_one(m.blocks[1].down), ("MLP-RANK-ONE", 1, None)),
    "own: hidden units that nothing reads": (
        "own",
        lambda m: several(lambda: m.blocks[1].down.weight[:, :5].zero_()),
        ("DEAD-UNITS", 1, None),
    ),
}


def linear_t5(module: Any) -> None:
    module.weight.zero_()


def vit_layer(model: Any, number: int) -> dict[str, nn.Linear]:
    """The linear maps of a block, in the order in which they run: queries, keys, values, output, up, down."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    maps = [m for m in lists[0][number].modules() if isinstance(m, nn.Linear)]
    names = [n for n, m in lists[0][number].named_modules() if isinstance(m, nn.Linear)]
    by_name = dict(zip(names, maps, strict=True))
    return {"value": next(m for n, m in by_name.items() if "value" in n or n.endswith("v_proj")), "down": maps[-1]}


@pytest.mark.parametrize("family", [*FAMILIES, "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_healthy_model_has_no_dead_part(family: str, dtype: torch.dtype) -> None:
    assert found(family, dtype=dtype) == []


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_part_that_does_nothing_is_named_and_nothing_else_is(name: str) -> None:
    family, plant, expected = PLANTS[name]
    assert [(f.code, f.block, f.head) for f in found(family, plant)] == [expected]


@pytest.mark.parametrize(
    "name", ["gpt2: values of a head", "bert: rows of W_O", "bert: MLP", "llama: key-value group", "own: block"]
)
def test_half_precision_names_the_same(name: str) -> None:
    family, plant, expected = PLANTS[name]
    assert [(f.code, f.block, f.head) for f in found(family, plant, dtype=torch.bfloat16)] == [expected]


def test_how_far_embeddings_lie_apart_does_not_depend_on_their_sign() -> None:
    """A token of zeros beside one of negative numbers: what is between them is as large as the larger one."""
    model = Own().eval()
    with torch.no_grad():
        model.embed.weight.abs_().neg_()
        model.embed.weight[3] = 0
    ids = torch.tensor([[3, 5, 7, 9, 11, 13], [5, 3, 9, 7, 13, 11]])
    embedding = uc.diagnose(model, batches=[{"input_ids": ids}]).record.embeddings[0]
    assert embedding.apart == pytest.approx(1.0)


def part(**figures: Any) -> PartRecord:
    """A part whose tokens differ and that does something."""
    alive: dict[str, Any] = {"update_size": 1.0, "update_variation": 1.0, "stream_variation": 1.0, "epsilon": 1e-7}
    return PartRecord(**{"block": 0, "sublayer": "mlp", "stack": None, "kind": None, **alive, **figures})


@pytest.mark.parametrize(
    ("dead", "shown"), [(1, "(0)"), (8, "(0, 1, 2, 3, 4, 5, 6, 7)"), (9, "(0, 1, 2, 3, 4, 5, 6, 7, …)")]
)
def test_eight_dead_units_are_named(dead: int, shown: str) -> None:
    (finding,) = dead_components([part(hidden_units=20, dead_units=list(range(dead)))], [])
    assert (finding.code, finding.value, finding.threshold) == ("DEAD-UNITS", dead / 20, 0.5)
    assert shown in finding.message
    assert finding.severity == "info"


@pytest.mark.parametrize(("dead", "severity"), [(9, "info"), (10, "warning"), (20, "warning")])
def test_half_of_the_units_are_many(dead: int, severity: str) -> None:
    (finding,) = dead_components([part(hidden_units=20, dead_units=list(range(dead)))], [])
    assert finding.severity == severity


def test_a_part_is_dead_by_what_it_adds_and_the_finding_says_how_much() -> None:
    beside = part(sublayer="attention", kind="self")

    def found(**figures: Any) -> list[tuple[str, float]]:
        return [(f.code, f.value) for f in dead_components([beside, part(**figures)], [])]

    assert found(update_size=0.0) == [("DEAD-MLP", 0.0)]
    assert found(update_size=2.0**-23) == [("DEAD-MLP", 2.0**-23)]
    assert found(update_size=1.01 * 2.0**-23) == []
    assert found(update_size=2.0**-24, stream_variation=0.01) == []  # where all tokens are alike, rounding says nothing
    assert found(update_size=2.0**-24, stream_variation=0.0101) == [("DEAD-MLP", 2.0**-24)]
    assert found(update_size=0.0, stream_variation=0.0) == [("DEAD-MLP", 0.0)]
    assert found(update_size=None) == []
    assert found(update_variation=1e-3) == [("CONSTANT-UPDATE", 1e-3)]
    assert found(update_variation=1.01e-3) == []
    assert found(update_variation=0.02, epsilon=2.0**-7) == [("CONSTANT-UPDATE", 0.02)]  # four roundings of bfloat16
    assert found(update_variation=0.04, epsilon=2.0**-7) == []
    assert found(update_directions=1e-6, stream_directions=0.5) == [("MLP-RANK-ONE", 1e-6)]
    assert found(update_directions=2e-6, stream_directions=0.5) == []  # sixteen times epsilon
    assert found(update_directions=1e-6, stream_directions=1e-5) == []  # the stream itself has no more


def test_the_query_heads_of_a_dead_key_value_head_are_named() -> None:
    heads = part(sublayer="attention", kind="self", heads=6, key_value_heads=2, value_size=[1.0, 1.0])
    alive, dead = [1.0] * 6, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [f.code for f in dead_components([replace(heads, value_variation=alive)], [])] == []
    (finding,) = dead_components([replace(heads, value_variation=dead)], [])
    assert (finding.code, finding.head) == ("DEAD-KEY-VALUE-GROUP", 3)
    assert "(1): the query heads 3–5 that share it" in finding.message


EPSILON = 2.0**-23
JUST = 1 + 2.0**-10


def heads_of(**figures: Any) -> list[tuple[str, int | None]]:
    """What is said of an attention of four heads."""
    attention = part(sublayer="attention", kind="self", heads=4, epsilon=EPSILON, **figures)
    return [(f.code, f.head) for f in dead_components([attention], [])]


def test_heads_are_silent_up_to_four_roundings_of_their_values_or_a_sixteenth_of_one_of_the_stream() -> None:
    values = [1.0, 4 * EPSILON, 4 * EPSILON * JUST, 0.0]
    assert heads_of(value_variation=values) == [("DEAD-HEAD", 1), ("DEAD-HEAD", 3)]
    written = [2.0**-27, 2.0**-27 * JUST, 1.0, 0.0]
    assert heads_of(head_output=written) == [("DEAD-HEAD", 0), ("DEAD-HEAD", 3)]
    assert heads_of(head_output=written[:3]) == []  # of other heads than these
    assert heads_of(value_variation=[0.0, 1.0, 1.0]) == []  # nor can three values be shared by four
    assert heads_of(value_variation=[0.0, 1.0]) == [("DEAD-HEAD", 0), ("DEAD-HEAD", 1)]  # two share each


@pytest.mark.parametrize("figure", ["query_variation", "key_variation", "logit_range"])
def test_heads_are_blind_up_to_four_roundings_and_said_at_once_if_all_are(figure: str) -> None:
    assert heads_of(**{figure: [4 * EPSILON, 4 * EPSILON * JUST, 1.0, 0.0]}) == [("HEAD-BLIND", 0), ("HEAD-BLIND", 3)]
    assert heads_of(**{figure: [0.0] * 4}) == [("HEAD-BLIND", None)]
    assert heads_of(**{figure: [0.0, 1.0]}) == [("HEAD-BLIND", 0), ("HEAD-BLIND", 1)]
    assert heads_of(**{figure: [0.0] * 3}) == []
    alone = part(sublayer="attention", kind="self", heads=1, **{figure: [0.0]})
    assert [(f.code, f.head) for f in dead_components([alone], [])] == [("HEAD-BLIND", 0)]


def test_a_copy_is_named_unless_more_is_said_of_the_pair() -> None:
    assert heads_of(copied_heads=[(0, 2), (1, 3)]) == [("HEAD-COPIED", 2), ("HEAD-COPIED", 3)]
    assert heads_of(copied_heads=[(0, 2), (1, 3)], head_output=[1.0, 1.0, 0.0, 1.0]) == [
        ("DEAD-HEAD", 2),
        ("HEAD-COPIED", 3),
    ]
    blind = [("HEAD-BLIND", 0), ("HEAD-BLIND", 2), ("HEAD-COPIED", 3)]
    assert heads_of(copied_heads=[(0, 2), (1, 3)], key_variation=[0.0, 1.0, 0.0, 1.0]) == blind
    one_blind = [("HEAD-BLIND", 0), ("HEAD-COPIED", 2), ("HEAD-COPIED", 3)]
    assert heads_of(copied_heads=[(0, 2), (1, 3)], key_variation=[0.0, 1.0, 1.0, 1.0]) == one_blind


@pytest.mark.parametrize(
    ("update", "stream", "epsilon", "is_found"),
    [
        (0.03, 0.31, 2.0**-7, True),  # at most three hundredths in half precision
        (0.0301, 0.9, 2.0**-7, False),
        (0.01, 0.3, 2.0**-7, False),  # a tenth of what the stream has is not more than that
        (16 * 2.0**-10, 0.9, 2.0**-10, True),
        (16.1 * 2.0**-10, 0.9, 2.0**-10, False),
        (1.6e-7, 0.9, 2.0**-52, True),  # in double precision as good as in single
        (1.61e-7, 0.9, 2.0**-52, False),
    ],
)
def test_one_direction_is_one_up_to_sixteen_roundings(
    update: float, stream: float, epsilon: float, is_found: bool
) -> None:
    mlp = part(update_directions=update, stream_directions=stream, epsilon=epsilon)
    assert [f.code for f in dead_components([mlp], [])] == ["MLP-RANK-ONE"] * is_found
    assert list(dead_components([replace(mlp, stream_directions=None)], [])) == []


def test_tokens_differ_by_more_than_ten_roundings() -> None:
    mlp = part(update_size=2.0**-24, epsilon=2.0**-7, stream_variation=10 * 2.0**-7)
    beside = part(sublayer="attention", kind="self")
    assert list(dead_components([beside, mlp], [])) == []
    seen = dead_components([beside, replace(mlp, stream_variation=10 * 2.0**-7 * JUST)], [])
    assert [f.code for f in seen] == ["DEAD-MLP"]


@pytest.mark.parametrize(("roundings", "is_found"), [(4.0, True), (4 * JUST, False)])
def test_embeddings_are_equal_up_to_four_roundings(roundings: float, is_found: bool) -> None:
    embedding = EmbeddingRecord(stack=None, block=0, apart=roundings * EPSILON, pairs=7, epsilon=EPSILON)
    found = list(dead_components([], [embedding]))
    assert [f.code for f in found] == ["EMBEDDINGS-EQUAL"] * is_found
    for finding in found:
        assert (finding.block, finding.value, finding.threshold) == (None, 4 * EPSILON, 4 * EPSILON)
        assert "7 pairs" in finding.message


@pytest.mark.parametrize(("blocks", "severity"), [(1, "warning"), (2, "info")])
def test_a_state_is_an_initialisation_only_if_it_is_so_in_every_block(blocks: int, severity: str) -> None:
    """One sublayer alone is no pattern."""
    parts = [part(block=b, update_size=0.0, initial=True, initial_evidence="zero") for b in range(blocks)]
    beside = [part(block=b, sublayer="attention", kind="self") for b in range(blocks)]
    found = list(dead_components([*parts, *beside], []))
    assert [(f.code, f.severity, f.value) for f in found] == [("DEAD-MLP", severity, 0.0)] * blocks
    assert all(("This is how it was initialised: zero" in f.message) == (severity == "info") for f in found)
    broken = [replace(parts[0], update_size=1.0), *parts[1:]]
    assert all(f.severity == "warning" for f in dead_components([*broken, *beside], []))


def test_a_block_that_changes_nothing_is_one_finding() -> None:
    parts = [part(block_change=0.0), part(sublayer="attention", kind="self", block_change=0.0)]
    (finding,) = dead_components(parts, [])
    assert (finding.code, finding.value, finding.kind, finding.head) == ("DEAD-BLOCK", 0.0, None, None)
    assert finding.message.startswith("Block 0 changes nothing")
    (finding,) = dead_components([replace(each, block_change=0.25, update_size=0.0) for each in parts], [])
    assert (finding.code, finding.value) == ("DEAD-BLOCK", 0.25)
    assert list(dead_components([replace(each, block_change=0.25) for each in parts], [])) == []


def test_every_code_that_a_finding_can_have_is_in_the_list() -> None:
    """A monitor tells by it which of its alarms are about parts."""
    written = set(re.findall(r'"((?:DEAD|HEAD|MLP|CONSTANT|EMBEDDINGS)-[A-Z-]+)"', inspect.getsource(dead)))
    made = {f"DEAD-{name}" for name in ("ATTENTION", "MLP")}  # written as f"DEAD-{name.upper()}"
    assert written | made == set(dead.CODES)


@pytest.mark.parametrize("stack", [None, "decoder"])
def test_each_finding_says_of_what_it_is_and_by_how_much(stack: Any) -> None:
    """The place, the sublayer by its kind, and the figure: 0 where nothing is left."""
    at = "block 4" + (" (decoder)" if stack else "")
    attention = part(block=4, stack=stack, sublayer="attention", kind="cross", heads=4, key_value_heads=2)
    mlp = part(block=4, stack=stack)

    def said(*parts: PartRecord) -> list[tuple[str, float | None, str]]:
        found = dead_components(parts, [])
        return [(f.code, f.value, f.message.partition(f" of {at} ")[0]) for f in found if f.stack == stack]

    cross, plain = "The cross-attention", "The MLP"
    assert said(attention, replace(mlp, update_size=0.0)) == [("DEAD-MLP", 0.0, plain)]
    assert said(replace(attention, update_size=0.0), mlp) == [("DEAD-ATTENTION", 0.0, cross)]
    assert said(replace(attention, update_variation=1e-4), mlp) == [("CONSTANT-UPDATE", 1e-4, cross)]
    gone = replace(attention, value_variation=[0.0, 1.0])
    assert said(gone, mlp) == [("DEAD-KEY-VALUE-GROUP", 0.0, cross)]
    silent = replace(attention, key_value_heads=None, value_variation=[1.0, 0.0, 1.0, 1.0], head_output=[0.5] * 4)
    assert said(silent, mlp) == [("DEAD-HEAD", 0.5, cross)]
    assert said(replace(silent, head_output=None), mlp) == [("DEAD-HEAD", 0.0, cross)]
    assert said(replace(attention, query_variation=[0.0, 1, 1, 1]), mlp) == [("HEAD-BLIND", 0.0, cross)]
    assert said(replace(attention, copied_heads=[[0, 1]]), mlp) == [("HEAD-COPIED", 0.0, cross)]
    (whole,) = dead_components([replace(attention, update_size=0.0), replace(mlp, update_size=0.0)], [])
    assert whole.message.startswith(f"B{at[1:]} changes nothing")
    assert (whole.code, whole.value, whole.stack) == ("DEAD-BLOCK", 0.0, stack)


def test_each_finding_about_heads_names_them_in_words() -> None:
    attention = part(sublayer="attention", kind="self", heads=4, epsilon=EPSILON)

    def said(**figures: Any) -> list[str]:
        return [f.message.partition(" of block 0 ")[2] for f in dead_components([replace(attention, **figures)], [])]

    values = "has a head that does nothing (2): its values are zero, or the same for every token."
    output = "has a head that does nothing (1): what it writes is zero at every token, "
    output += "as if its rows of the output projection were."
    blind = "has a head (3) whose queries or keys do not vary: what it attends to does not depend on the tokens."
    every = "has queries or keys that do not vary in any head: what it attends to does not depend on the tokens."
    copied = "has two heads that are one: head 3 attends and mixes exactly as head 0 does, at every token."
    group = "has a key-value head whose values do not vary (1): the query heads 2–3 that share it add the same to every token."
    assert said(value_variation=[1.0, 1.0, 0.0, 1.0]) == [values]
    assert said(head_output=[1.0, 0.0, 1.0, 1.0]) == [output]
    assert said(key_variation=[1.0, 1.0, 1.0, 0.0]) == [blind]
    assert said(logit_range=[0.0] * 4) == [every]
    assert said(copied_heads=[[0, 3]]) == [copied]
    assert said(key_value_heads=2, value_variation=[1.0, 0.0]) == [group]
    assert said(key_value_heads=4, value_variation=[1.0, 1.0, 0.0, 1.0]) == [values]  # a group of one is a head


def test_a_part_that_was_not_measured_ends_no_block() -> None:
    """Each part by itself, and each block: what is said of one, or of none, leaves the others."""
    unknown = part(sublayer="attention", kind="self", update_size=None, stream_variation=None)
    blind = part(block=1, sublayer="attention", kind="self", heads=2, key_variation=[0.0, 1.0])
    gone, rank_one = part(update_size=0.0), part(block=1, update_directions=1e-9, stream_directions=0.5)
    found = dead_components([unknown, gone, blind, rank_one], [])
    assert [(f.code, f.block) for f in found] == [("DEAD-MLP", 0), ("HEAD-BLIND", 1), ("MLP-RANK-ONE", 1)]


def test_the_blocks_and_embeddings_that_were_measured() -> None:
    parts = [part(block=0), part(block=1, update_size=None), part(block=2, stream_variation=None), part(block=3)]
    apart = EmbeddingRecord(stack=None, block=0, apart=0.0, pairs=1, epsilon=EPSILON)
    assert dead.measured_blocks(parts, []) == {0, 3}
    assert dead.measured_blocks(parts, [apart]) == {0, 3, None}
    assert dead.measured_blocks([], [replace(apart, apart=None)]) == set()


def test_a_run_takes_nothing_that_half_precision_rounded_off_for_dead() -> None:
    """While a model is young its updates nearly agree; a part that is dead gives the same in every digit."""

    def codes(part: PartRecord, *, in_a_run: bool) -> list[str]:
        parts, _ = dead.exactly([part], []) if in_a_run else ([part], [])
        return [finding.code for finding in dead_components(parts, [])]

    young = PartRecord(
        0, "mlp", None, None, epsilon=2.0**-7, tokens=64, update_size=0.1, update_variation=0.02, stream_variation=0.5
    )
    assert codes(young, in_a_run=False) == ["CONSTANT-UPDATE"]
    assert codes(young, in_a_run=True) == []
    gone = replace(young, update_variation=0.0)
    assert codes(gone, in_a_run=False) == codes(gone, in_a_run=True) == ["CONSTANT-UPDATE"]
    collapsed = replace(gone, stream_variation=0.05)  # below what bfloat16 tells apart: nothing is said about the part
    assert codes(collapsed, in_a_run=False) == codes(collapsed, in_a_run=True) == []
    single = replace(young, epsilon=2.0**-23, update_variation=5e-4)
    assert dead.exactly([single], []) == ([single], [])
    apart = EmbeddingRecord(None, 0, apart=0.01, pairs=8, epsilon=2.0**-7)
    assert [f.code for f in dead_components([], [apart])] == ["EMBEDDINGS-EQUAL"]
    assert [*dead_components([], dead.exactly([], [apart])[1])] == []
