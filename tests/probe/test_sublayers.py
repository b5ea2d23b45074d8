"""What every sublayer adds and what every norm does, against slow references from activations hooked by name."""

from __future__ import annotations

import doctest
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES
from tests.helpers.observing import observe
from tests.helpers.tiny_models import VOCABULARY
from uncollapse import report, sources
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.measures import affine_fit, exact, geometry, normalization
from uncollapse.measures.affine_fit import AffineFit
from uncollapse.probe import norm_law, sublayers
from uncollapse.probe.passes import Observations, capture
from uncollapse.probe.sublayers import norm_records, update_records
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import NormRecord, UpdateRecord

LENGTHS = [9, 7, 9, 5, 8, 9, 6, 9]


def batches(tokens: int = 9, sizes: tuple[int, ...] = (8, 8), padded: bool = True) -> list[dict[str, Tensor]]:
    """Two batches of eight sequences of different lengths, padded on the right."""
    generator, made = torch.Generator().manual_seed(0), []
    for size in sizes:
        ids = torch.randint(3, VOCABULARY, (size, tokens), generator=generator)
        mask = torch.ones(size, tokens, dtype=torch.long)
        for row in range(size if padded else 0):
            mask[row, LENGTHS[row % len(LENGTHS)] :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def observed_records(model: nn.Module, given: list[dict[str, Tensor]]) -> tuple[list[UpdateRecord], list[NormRecord]]:
    found = observe(model, given, level="full")
    return update_records(found.updates), norm_records(found.norms)


# References: activations hooked by the names that the authors of these models gave -----------------------------------


class Place(NamedTuple):
    """The input or the output of a module."""

    module: str
    side: Literal["in", "out"]


class Update(NamedTuple):
    sublayer: str
    kind: str | None
    update: Place
    stream: Place
    embedding: Place
    reads: Place | None = None
    hidden: Place | None = None


def bert(layer: int) -> list[Update]:
    at, first = f"encoder.layer.{layer}", Place("encoder.layer.0", "in")
    return [
        Update("attention", "self", Place(f"{at}.attention.output.dense", "out"), Place(at, "in"), first),
        Update(
            "mlp",
            None,
            Place(f"{at}.output.dense", "out"),
            Place(f"{at}.attention.output.LayerNorm", "out"),
            first,
            Place(f"{at}.intermediate.dense", "in"),
            Place(f"{at}.output.dense", "in"),
        ),
    ]


def gpt2(layer: int) -> list[Update]:
    at, first = f"h.{layer}", Place("h.0", "in")
    mlp = Place(f"{at}.mlp.c_proj", "out"), Place(f"{at}.ln_2", "in"), first, Place(f"{at}.ln_2", "out")
    return [
        Update("attention", "self", Place(f"{at}.attn.c_proj", "out"), Place(at, "in"), first),
        Update("mlp", None, *mlp, Place(f"{at}.mlp.c_proj", "in")),
    ]


def gpt_neox(layer: int) -> list[Update]:
    at, first = f"layers.{layer}", Place("layers.0", "in")
    mlp = Place(f"{at}.mlp", "out"), Place(at, "in"), first, Place(f"{at}.post_attention_layernorm", "out")
    return [
        Update("attention", "self", Place(f"{at}.attention.dense", "out"), Place(at, "in"), first),
        Update("mlp", None, *mlp, Place(f"{at}.mlp.dense_4h_to_h", "in")),
    ]


def gemma3(layer: int) -> list[Update]:
    at, first = f"layers.{layer}", Place("layers.0", "in")
    before = f"{at}.pre_feedforward_layernorm"
    mlp = Place(f"{at}.post_feedforward_layernorm", "out"), Place(before, "in"), first, Place(before, "out")
    return [
        Update("attention", "self", Place(f"{at}.post_attention_layernorm", "out"), Place(at, "in"), first),
        Update("mlp", None, *mlp, Place(f"{at}.mlp.down_proj", "in")),
    ]


def bart(layer: int) -> list[Update]:
    """Three encoder layers, then two of the decoder."""
    at = f"encoder.layers.{layer}" if layer < 3 else f"decoder.layers.{layer - 3}"
    first = Place("encoder.layers.0" if layer < 3 else "decoder.layers.0", "in")
    own = Update("attention", "self", Place(f"{at}.self_attn.out_proj", "out"), Place(at, "in"), first)
    middle = Place(f"{at}.self_attn_layer_norm", "out")
    cross = [Update("attention", "cross", Place(f"{at}.encoder_attn.out_proj", "out"), middle, first)]
    stream = middle if layer < 3 else Place(f"{at}.encoder_attn_layer_norm", "out")
    mlp = Place(f"{at}.fc2", "out"), stream, first, Place(f"{at}.fc1", "in"), Place(f"{at}.fc2", "in")
    return [own, *(cross if layer >= 3 else []), Update("mlp", None, *mlp)]


NORMS: dict[str, list[str]] = {
    "bert": ["encoder.layer.{}.attention.output.LayerNorm", "encoder.layer.{}.output.LayerNorm"],
    "gpt2": ["h.{}.ln_1", "h.{}.ln_2"],
    "gpt_neox": ["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"],
    "gemma3": [
        "layers.{}.input_layernorm",
        "layers.{}.post_attention_layernorm",
        "layers.{}.pre_feedforward_layernorm",
        "layers.{}.post_feedforward_layernorm",
    ],
}
MODELS: dict[str, Callable[[int], list[Update]]] = {"bert": bert, "gpt2": gpt2, "gpt_neox": gpt_neox, "gemma3": gemma3}


def hooked(model: nn.Module, batch: dict[str, Tensor], names: set[str]) -> dict[Place, np.ndarray]:
    """Inputs and outputs of the named modules, as [sequence, token, width] in float64."""
    seen: dict[Place, np.ndarray] = {}

    def keep(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        given = args[0] if args else kwargs["hidden_states"]
        seen[Place(name, "in")], seen[Place(name, "out")] = (t.double().numpy().copy() for t in (given, output))

    hooks = [
        model.get_submodule(name).register_forward_hook(functools.partial(keep, name), with_kwargs=True)
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def span_projector(embedding: np.ndarray) -> np.ndarray:
    _, values, directions = np.linalg.svd(embedding, full_matrices=False)
    U = directions[values > 1e-5 * values[0]]
    return U.T @ U


def effective_rank(x: np.ndarray) -> float:
    p = np.linalg.svd(x, compute_uv=False)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def innovation(inputs: list[np.ndarray], outputs: list[np.ndarray]) -> float:
    """Every fourth sequence is held out; least squares on the others by NumPy."""
    held = [i for i in range(len(inputs)) if i % 4 == 3]
    kept = [i for i in range(len(inputs)) if i % 4 != 3]
    x, y = (np.concatenate([a[i] for i in kept]) for a in (inputs, outputs))
    slopes, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=1e-5)
    x2, y2 = (np.concatenate([a[i] for i in held]) for a in (inputs, outputs))
    rest = y2 - np.column_stack([x2, np.ones(len(x2))]) @ slopes
    return float((rest**2).sum() / ((y2 - y.mean(0)) ** 2).sum())


def reference(model: nn.Module, given: list[dict[str, Tensor]], update: Update) -> dict[str, Any]:
    values: dict[str, list[float]] = {"relative": [], "outside": [], "null": [], "hidden": []}
    inputs: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    for batch in given:
        seen = hooked(model, batch, {place.module for place in update[2:] if isinstance(place, Place)})
        decodes = update.embedding.module.startswith("decoder.")
        mask = batch["decoder_attention_mask" if decodes else "attention_mask"].bool().numpy()

        def rows(place: Place, i: int, seen: Any = seen, mask: Any = mask) -> np.ndarray:
            return seen[place][i][mask[i]]

        for i in range(len(mask)):
            D = rows(update.update, i)
            outside = np.eye(D.shape[1]) - span_projector(rows(update.embedding, i))
            others = [rows(update.update, (i + k) % len(mask)) for k in range(1, 5) if k < len(mask)]
            values["relative"].append(np.linalg.norm(D) / np.linalg.norm(rows(update.stream, i)))
            values["outside"].append(np.linalg.norm(D @ outside) ** 2 / np.linalg.norm(D) ** 2)
            energy = sum(np.linalg.norm(o) ** 2 for o in others)
            values["null"].append(sum(np.linalg.norm(o @ outside) ** 2 for o in others) / energy)
            if update.reads is not None and update.hidden is not None:
                values["hidden"].append(effective_rank(rows(update.hidden, i)))
                inputs.append(rows(update.reads, i))
                outputs.append(D)
    return values | {"innovation": innovation(inputs, outputs) if inputs else None}


def assert_statistic(found: Statistic | None, values: list[float], rel: float = 2e-4) -> None:
    assert found is not None
    expected = (np.mean(values), np.min(values), np.max(values), len(values))
    assert (found.mean, found.min, found.max, found.n) == pytest.approx(expected, rel=rel, abs=1e-9)


def assert_update(found: UpdateRecord, expected: Update, values: dict[str, Any], sequences: int) -> None:
    assert (found.sublayer, found.kind) == (expected.sublayer, expected.kind)
    assert_statistic(found.relative_norm, values["relative"])
    assert_statistic(found.out_of_span_energy, values["outside"])
    assert_statistic(found.null_out_of_span_energy, values["null"])
    if expected.sublayer == "attention":
        assert (found.nonlinear_innovation, found.hidden_effective_rank) == (None, None)
        assert "0 by construction" in found.unavailable["nonlinear_innovation"]
        assert "no hidden layer" in found.unavailable["hidden_effective_rank"]
    else:
        assert found.unavailable == {}
        assert_statistic(found.hidden_effective_rank, values["hidden"])
        assert found.nonlinear_innovation is not None
        assert found.nonlinear_innovation.mean == pytest.approx(values["innovation"], rel=1e-4)
        assert found.nonlinear_innovation.n == sequences // 4


@pytest.mark.parametrize("family", MODELS)
def test_updates_equal_those_of_independently_hooked_activations(family: str) -> None:
    model, given = FAMILIES[family].build(), batches()
    updates, _ = observed_records(model, given)
    expected = [update for layer in range(3) for update in MODELS[family](layer)]
    assert [u.block for u in updates] == [0, 0, 1, 1, 2, 2]
    for found, known in zip(updates, expected, strict=True):
        assert_update(found, known, reference(model, given, known), 16)


def test_each_stack_is_held_against_its_own_embedding() -> None:
    model, given = FAMILIES["bart"].build(), batches()
    for batch, shorter in zip(given, batches(7, padded=False), strict=True):
        batch["decoder_input_ids"], batch["decoder_attention_mask"] = shorter.values()
        batch["decoder_attention_mask"][1, 4:] = 0
    updates, _ = observed_records(model, given)
    expected = [update for layer in range(5) for update in bart(layer)]
    assert [u.stack for u in updates] == ["encoder"] * 6 + ["decoder"] * 6
    for found, known in zip(updates, expected, strict=True):
        assert_update(found, known, reference(model, given, known), 16)


def test_a_shared_block_is_told_apart_by_its_calls() -> None:
    model, given = FAMILIES["albert"].build(), batches()
    at = "encoder.albert_layer_groups.0.albert_layers.0"
    sizes: dict[str, list[np.ndarray]] = {"attention.dense": [], "ffn_output": [], "": [], "attention": []}

    def keep(name: str, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        value = (args[0] if args else kwargs["hidden_states"]) if not name else output
        sizes[name].append((value if isinstance(value, Tensor) else value[0]).double().numpy().copy())

    hooks = [
        model.get_submodule(f"{at}.{name}".rstrip(".")).register_forward_hook(
            functools.partial(keep, name), with_kwargs=True
        )
        for name in sizes
    ]
    with torch.no_grad():
        model(**given[0])
    for hook in hooks:
        hook.remove()
    updates, norms = observed_records(model, given[:1])
    mask = given[0]["attention_mask"].bool().numpy()
    for call in range(3):
        for found, names in zip(
            updates[2 * call : 2 * call + 2], (("attention.dense", ""), ("ffn_output", "attention")), strict=True
        ):
            update, stream = (
                [np.linalg.norm(x[m]) for x, m in zip(sizes[name][call], mask, strict=True)] for name in names
            )
            assert_statistic(found.relative_norm, list(np.divide(update, stream)))
    assert [n.block for n in norms] == [0, 0, 1, 1, 2, 2]
    assert [n.norm for n in norms] == [f"{at}.attention.LayerNorm", f"{at}.full_layer_layer_norm"] * 3


# Norms ----------------------------------------------------------------------------------------------------------------


def numerical_rank(x: np.ndarray) -> int:
    values = np.linalg.svd(x, compute_uv=False)
    return int((values > 1e-5 * values[0]).sum())


def brackets_by_definition(x: np.ndarray, gamma: np.ndarray, eps: float, kind: str) -> list[int]:
    """[1 in col X], [s in col X P Gamma], dim(row X meet ker Gamma P), each as a rank of stacked matrices."""
    tokens, width = x.shape
    P = np.eye(width) - np.ones((width, width)) / width if kind == "layer" else np.eye(width)
    product = x @ P @ np.diag(gamma)
    s = np.sqrt(((x @ P) ** 2).mean(1) + eps)[:, None]
    _, values, V = np.linalg.svd((P @ np.diag(gamma)).T)
    kernel = V[values < 1e-6 * values[0]]

    def contains(matrix: np.ndarray, column: np.ndarray) -> int:
        column = column / np.linalg.norm(column) * np.linalg.norm(matrix, 2)
        return int(numerical_rank(np.column_stack([matrix, column])) == numerical_rank(matrix))

    stacked = np.concatenate([x, kernel * np.linalg.norm(x, 2)])
    meet = numerical_rank(x) + len(kernel) - numerical_rank(stacked)
    return [contains(x, np.ones((tokens, 1))), contains(product, s), meet]


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("family", NORMS)
def test_norms_equal_the_definition_on_independently_hooked_tokens(family: str, tokens: int) -> None:
    model, given = FAMILIES[family].build(), batches(tokens, (3,))
    if tokens == 40:  # more tokens than the width of 32
        given[0]["attention_mask"][0] = 1
    _, norms = observed_records(model, given)
    names = [name.format(layer) for layer in range(3) for name in NORMS[family]]
    assert [n.norm for n in norms] == names
    seen = hooked(model, given[0], set(names))
    mask = given[0]["attention_mask"].bool().numpy()
    for found in norms:
        module = model.get_submodule(found.norm)
        gamma = (module.weight + (1 if family == "gemma3" else 0)).detach().double().numpy()
        kind, eps = ("rms", 1e-6) if family == "gemma3" else ("layer", getattr(module, "eps", None))
        assert eps is not None
        before, after = ([x[m] for x, m in zip(seen[Place(found.norm, s)], mask, strict=True)] for s in ("in", "out"))
        assert_statistic(found.affine_rank_before, [numerical_rank(x - x.mean(0)) for x in before])
        assert_statistic(found.affine_rank_after, [numerical_rank(x - x.mean(0)) for x in after])
        expected = np.array([brackets_by_definition(x, gamma, eps, kind) for x in before])
        assert found.brackets is not None
        for statistic, column in zip(found.brackets, expected.T, strict=True):
            assert_statistic(statistic, list(column))
        if tokens == 40 and family in {"bert", "gpt2"}:  # NeoX has no positions here, so equal tokens stay equal
            assert expected[0].tolist() == [0, 0, 1]  # LN takes a dimension where tokens outnumber features
            assert found.affine_rank_after is not None
            assert found.affine_rank_after.max == 31


@pytest.fixture(scope="module")
def minilm() -> uc.Diagnosis:
    loaded = sources.load_model("demo")
    return uc.diagnose(loaded.model, tokenizer=loaded.tokenizer, sequences=16, level="full")


def test_no_norm_of_minilm_changes_an_affine_rank_on_real_text(minilm: uc.Diagnosis) -> None:
    """The paper's case: fewer tokens than features, and every rank attained."""
    assert len(minilm.record.norms) == 12
    for norm in minilm.record.norms:
        assert norm.affine_rank_before == norm.affine_rank_after
        assert norm.affine_rank_before is not None
        assert norm.affine_rank_before.n == 16
        assert norm.brackets == [Statistic(v, v, v, 16) for v in (1.0, 1.0, 0.0)]


def test_minilm_at_full_says_something_of_every_update(minilm: uc.Diagnosis) -> None:
    assert [(u.block, u.sublayer) for u in minilm.record.updates] == [
        (b, s) for b in range(6) for s in ("attention", "mlp")
    ]
    for update in minilm.record.updates:
        missing = {"nonlinear_innovation", "hidden_effective_rank"} if update.sublayer == "attention" else set()
        if update.sublayer == "mlp" and "wants 770" in update.unavailable.get("nonlinear_innovation", ""):
            missing = {"nonlinear_innovation"}  # 16 sequences may be too few tokens for a width of 384
        assert set(update.unavailable) == missing


def test_the_page_of_one_stack_has_no_name_twice(minilm: uc.Diagnosis) -> None:
    """A chart that bears its section's name would be drawn over the section's heading and table."""
    names = re.findall(r'\sid="([^"]+)"', report.draw(minilm.record))
    assert "updates" in names
    assert len(names) == len(set(names))


# Laws of the layers ---------------------------------------------------------------------------------------------------


class LargestEntry(nn.Module):
    """Scale-free like a norm, and none of the two kinds."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True)


def drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "eps", "shift"),
    [("LayerNorm", 1e-5, 0.0), ("LayerNorm", 1e-12, 0.0), ("RMSNorm", 1e-3, 0.0), ("Gemma", 1e-6, 1.0)],
)
def test_the_law_of_a_layer_is_found_by_running_it(name: str, eps: float, shift: float, dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    layers = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm, "Gemma": Gemma3RMSNorm}
    layer = drawn(layers[name](24, eps=eps)).to(dtype)
    kind: Any = "layer" if name == "LayerNorm" else "rms"
    law = norm_law.norm_law(layer, kind, torch.Size((2, 5, 24)), dtype, torch.device("cpu"))
    assert law is not None
    rounding = 4 * torch.finfo(torch.float32 if dtype == torch.float64 and name == "Gemma" else dtype).eps
    gamma = layer.weight.detach().double() + shift
    assert (law.gamma - gamma).abs().max() < rounding * gamma.abs().max()
    beta = layer.bias.detach().double() if name == "LayerNorm" else torch.zeros(24)
    assert (law.beta - beta).abs().max() < rounding * 4
    if eps > 1e-9:
        assert law.eps == eps
    x = torch.randn(7, 24, dtype=dtype)
    assert law.holds(x, layer(x).detach(), dtype)
    assert not law.holds(x, layer(x).detach() * 1.5, dtype)


def test_a_gamma_with_zeros_is_found_exactly() -> None:
    layer = drawn(nn.LayerNorm(16))
    with torch.no_grad():
        layer.weight[3] = 0
    law = norm_law.norm_law(layer, "layer", torch.Size((1, 4, 16)), torch.float32, torch.device("cpu"))
    assert law is not None
    assert (law.gamma == 0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_brackets_equal_the_exact_ones_on_rational_tokens(kind: Any) -> None:
    """Full and deficient clouds, on a flat off the origin and through it, at consensus, with and without zeros in gamma."""
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for trial in range(120):
        tokens, width = (int(v) for v in torch.randint(1, 8, (2,), generator=generator) + torch.tensor([0, 2]))
        inner = int(torch.randint(1, width + 1, (1,), generator=generator))
        left = torch.randint(-3, 4, (tokens, inner), generator=generator)
        x = left @ torch.randint(-3, 4, (inner, width), generator=generator)
        if trial % 3 == 0:
            x = x + torch.randint(-3, 4, (1, width), generator=generator)
        gamma = torch.randint(0 if trial % 2 else 1, 4, (width,), generator=generator)
        law = norm_law.NormLaw(kind, gamma.double(), torch.zeros(width).double(), 2.0**-6)
        expected = normalization.rank_change(exact.rational(x.tolist()), gamma=gamma.tolist(), eps=1 / 64, kind=kind)
        got = law.brackets(x.double(), expected.before, torch.float64)
        assert got == expected.brackets, (x, gamma)
        seen.add(got)
    assert len(seen) > 3


def test_more_tokens_than_features_whose_scales_lie_in_the_image() -> None:
    """Right triangles: every token's size is a multiple of its third entry, so RMS normalisation makes that one constant."""
    x = [[3, 4, 5], [5, 12, 13], [8, 15, 17], [7, 24, 25], [20, 21, 29]]
    law = norm_law.NormLaw("rms", torch.ones(3).double(), torch.zeros(3).double(), 0.0)
    expected = normalization.rank_change(exact.rational(x), kind="rms")
    assert expected.brackets == (0, 1, 0)
    assert law.brackets(torch.tensor(x).double(), expected.before, torch.float64) == (0, 1, 0)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_rounding_to_half_precision_is_no_rank(kind: Any) -> None:
    law = norm_law.NormLaw(kind, torch.ones(24).double(), torch.zeros(24).double(), 1e-5)
    for rank in (1, 2, 5):
        x = (torch.randn(12, rank) @ torch.randn(rank, 24) + torch.randn(24)).bfloat16()
        expected = normalization.rank_change(x, eps=1e-5, kind=kind)
        assert expected.brackets == (1, 0, 0)  # a flat off the origin gains one
        assert law.brackets(x, expected.before, torch.bfloat16) == expected.brackets


def test_tokens_too_large_to_see_the_others_leave_nothing_to_compare() -> None:
    x = torch.randn(6, 24)
    x[0] *= 1e5
    ranks = normalization.Ranks(int(geometry.rank(x.bfloat16())), int(geometry.affine_rank(x.bfloat16())))
    assert ranks == (1, 1)
    law = norm_law.NormLaw("rms", torch.ones(24).double(), torch.zeros(24).double(), 1e-5)
    assert law.brackets(x.bfloat16(), ranks, torch.bfloat16) is None
    assert law.brackets(x.double(), normalization.Ranks(6, 5), torch.float64) == (1, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("tokens", "width"), [(12, 24), (60, 48), (200, 24), (900, 24)])
def test_what_is_certified_of_a_norm_is_what_decompositions_say(
    tokens: int, width: int, kind: Any, dtype: torch.dtype
) -> None:
    """Outputs, whose rounding along the kernel is sometimes above the tolerance and sometimes below, and the brackets."""
    known = 0
    for trial in range(6):
        layer = drawn(nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width))
        x = torch.randn(5, tokens, width, dtype=torch.float64) * torch.linspace(0.2, 5, width) + trial
        with torch.no_grad():
            if trial == 3:
                layer.weight[2] = 0
        if trial == 5:
            x = torch.randn(5, tokens, 4, dtype=torch.float64) @ torch.randn(4, width, dtype=torch.float64)
        layer, x = layer.to(dtype), x.to(dtype)
        y, real = layer(x).detach(), torch.ones(5, tokens, dtype=torch.bool)
        real[1, -5:] = real[2, :3] = False
        law = norm_law.norm_law(layer, kind, x.shape, dtype, x.device)
        assert law is not None
        images, before = law.images(x, y, real, dtype), geometry.cloud_measures(x, real)
        assert images.holds
        assert not law.images(x, y * 1.5, real, dtype).holds
        certain = ~images.given_affine.isnan()
        assert torch.equal(images.given_affine[certain], geometry.cloud_measures(y, real).affine_rank[certain])
        known += int(certain.sum())
        for i in images.full.nonzero().flatten().tolist():
            ranks = normalization.Ranks(int(before.rank[i]), int(before.affine_rank[i]))
            change = ranks.rank - ranks.affine_rank, int(images.rank[i] - images.affine_rank[i])
            expected = (*change, ranks.rank - int(images.rank[i]))
            assert law.brackets(x[i][real[i]], ranks, dtype) in (expected, None)
    # In double precision, and with hardly more tokens than features, rounding and tolerance are too near for certainty.
    assert known > 10 or dtype == torch.float64 or tokens == 60


# Models of one's own --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention in one head; `layout` says how the stream lies."""

    def __init__(self, width: int, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, sequences: int) -> Tensor:
        shape = x.shape
        if self.layout == "flat":
            x = x.reshape(sequences, -1, shape[-1])
        if self.layout == "token":
            x = x.transpose(0, 1)
        q, k, v = (f(x).unsqueeze(1) for f in (self.query, self.key, self.value))
        mixed = self.output(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return (mixed.transpose(0, 1) if self.layout == "token" else mixed).reshape(shape)


class OwnBlock(nn.Module):
    def __init__(self, width: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.attention = Attention(width, options["layout"])
        self.norms = nn.ModuleList(options["norm"](width) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), options["activation"](), nn.Linear(2 * width, width))
            for _ in range(options["mlps"])
        )

    def forward(self, x: Tensor, sequences: int) -> Tensor:
        if self.options["parallel"]:  # no norm: the MLP reads the very tensor that is written into
            mixed, added = self.attention(x, sequences), self.mlps[0](x)
            if not self.options["in_place"]:
                return x + mixed + added
            x += mixed
            x += added
            return x
        x = x + self.attention(self.norms[0](x), sequences)
        normed = self.norms[1](x)
        if self.options["in_place"]:
            for mlp in self.mlps:
                x += mlp(normed)
            return x
        for mlp in self.mlps:
            x = x + mlp(normed)
        return x


class Own(nn.Module):
    def __init__(self, width: int = 16, **chosen: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        usual = {"layout": "batch", "norm": nn.LayerNorm, "activation": nn.ReLU, "mlps": 1}
        self.options = usual | {"in_place": False, "parallel": False} | chosen
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(OwnBlock(width, self.options) for _ in range(2))
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.options["layout"] == "token":
            x = x.transpose(0, 1)
        if self.options["layout"] == "flat":
            x = x.reshape(-1, x.shape[-1])
        for block in self.blocks:
            x = block(x, len(ids))
        return x


def ids(sequences: int = 12, tokens: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"ids": torch.randint(0, VOCABULARY, (sequences, tokens), generator=generator)}]


def mlp_updates(model: nn.Module, given: list[dict[str, Tensor]] | None = None) -> list[UpdateRecord]:
    return [u for u in observed_records(model, given or ids())[0] if u.sublayer == "mlp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_relu_mlp_innovates_and_a_linear_one_does_not(dtype: torch.dtype) -> None:
    for update in mlp_updates(Own(activation=nn.ReLU).to(dtype)):
        assert update.nonlinear_innovation is not None
        assert update.nonlinear_innovation.mean > 0.05
    for update in mlp_updates(Own(activation=nn.Identity).to(dtype)):
        assert update.nonlinear_innovation is not None
        assert update.nonlinear_innovation.mean == pytest.approx(0, abs=1e-8)


def test_attention_that_scales_its_values_stays_in_the_span_of_the_embeddings() -> None:
    model = Own(norm=nn.Identity).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.value.weight.copy_(torch.eye(16))
            block.attention.output.weight.copy_(-0.7 * torch.eye(16))
            for linear in (block.attention.value, block.attention.output):
                linear.bias.zero_()
    updates, norms = observed_records(model, ids())
    assert norms == []
    first, mlp, second, _ = updates
    for energy in (first.out_of_span_energy, mlp.out_of_span_energy, second.out_of_span_energy):
        assert energy is not None
    assert first.out_of_span_energy is not None
    assert first.out_of_span_energy.max < 1e-25
    assert first.null_out_of_span_energy is not None
    assert first.null_out_of_span_energy.min > 0.1  # other sequences' updates do leave this one's span
    assert mlp.out_of_span_energy is not None
    assert mlp.out_of_span_energy.min > 0.1
    assert second.out_of_span_energy is not None
    assert second.out_of_span_energy.min > 0.01  # what the MLP added is mixed now


@pytest.mark.parametrize("layout", ["token", "flat"])
def test_the_way_the_stream_lies_changes_nothing(layout: str) -> None:
    plain, other = observed_records(Own(), ids()), observed_records(Own(layout=layout), ids())
    assert plain[1] == other[1]
    for a, b in zip(plain[0], other[0], strict=True):
        for measure in [*sublayers.UPDATE_MEASURES, "nonlinear_innovation"]:
            one, two = getattr(a, measure), getattr(b, measure)
            assert (one is None) == (two is None)
            if one is not None:
                assert (one.mean, one.n) == pytest.approx((two.mean, two.n), rel=1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_additions_in_place_are_met_before_they_overwrite_and_are_left_as_they_are(parallel: bool) -> None:
    plain, written = Own(parallel=parallel), Own(parallel=parallel, in_place=True)
    with torch.no_grad():
        before = written(**ids()[0])
    seen: list[Tensor] = []
    hook = written.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    anatomy = proved_anatomy(written, ids()[0])
    seen.clear()
    found = capture(written, ids(), anatomy, level="full")
    hook.remove()
    assert torch.equal(seen[0], before)
    assert update_records(found.updates) == observed_records(plain, ids())[0]


def test_an_update_in_two_summands_is_their_sum() -> None:
    model = Own(mlps=2)
    updates = mlp_updates(model)
    for block, found in enumerate(updates):
        at = f"blocks.{block}"
        seen = hooked(model, ids()[0], {f"{at}.mlps.0", f"{at}.mlps.1", f"{at}.norms.1"})
        D = seen[Place(f"{at}.mlps.0", "out")] + seen[Place(f"{at}.mlps.1", "out")]
        stream = seen[Place(f"{at}.norms.1", "in")]
        values = [np.linalg.norm(d) / np.linalg.norm(x) for d, x in zip(D, stream, strict=True)]
        assert_statistic(found.relative_norm, values)
        inputs = list(seen[Place(f"{at}.norms.1", "out")])
        assert found.nonlinear_innovation is not None
        assert found.nonlinear_innovation.mean == pytest.approx(innovation(inputs, list(D)), rel=1e-4)


def test_a_norm_of_another_law_keeps_its_ranks_and_says_why_it_has_no_brackets() -> None:
    _, norms = observed_records(Own(norm=lambda _: LargestEntry()), ids())
    assert len(norms) == 4
    for norm in norms:
        assert norm.affine_rank_before is not None
        assert norm.affine_rank_after is not None
        assert norm.brackets is None
        assert "gamma (x - mean) / deviation" in norm.unavailable["brackets"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norms_are_known_by_their_law_too(dtype: torch.dtype) -> None:
    _, norms = observed_records(Own(width=32).to(dtype), ids())
    assert all(norm.brackets is not None for norm in norms)


# What cannot be said --------------------------------------------------------------------------------------------------


def reasons(given: list[dict[str, Tensor]], model: nn.Module | None = None) -> dict[str, str]:
    (update, *_) = mlp_updates(model or Own(), given)
    for name, reason in update.unavailable.items():
        assert getattr(update, name) is None
        assert reason
    return update.unavailable


def test_reasons_are_given_for_what_the_text_cannot_say() -> None:
    assert reasons(ids()) == {}
    alone = [{"ids": row[None]} for row in ids()[0]["ids"]]
    assert "one sequence" in reasons(alone)["null_out_of_span_energy"]
    assert set(reasons(ids(12, 40))) == {"out_of_span_energy", "null_out_of_span_energy"}  # and a width of 16
    assert "whole width" in reasons(ids(12, 40))["out_of_span_energy"]
    assert "wants 34" in reasons(ids(4))["nonlinear_innovation"]  # 3 sequences of 7 tokens against 2 (16 + 1)
    assert "held out" in reasons(ids(3, 14))["nonlinear_innovation"]


def test_a_wide_mlp_is_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sublayers, "WIDEST_FIT", 15)
    assert "wider than 15" in reasons(ids())["nonlinear_innovation"]
    assert set(reasons(ids())) == {"nonlinear_innovation"}


def test_sequences_with_nan_are_left_out() -> None:
    model, given = Own(), ids()
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
    given[0]["ids"][given[0]["ids"] == 5] = 6
    clean = observed_records(model, [{"ids": given[0]["ids"][1:]}])
    given[0]["ids"][0, 2] = 5
    updates, norms = observed_records(model, given)
    for found, known in zip(updates, clean[0], strict=True):
        assert found.relative_norm is not None
        assert known.relative_norm is not None
        assert found.relative_norm.mean == pytest.approx(known.relative_norm.mean, rel=1e-5)
        assert all(getattr(found, m).n == 11 for m in sublayers.UPDATE_MEASURES[:3])
    for norm in norms:
        assert norm.brackets is not None
        assert [s.n for s in (norm.affine_rank_before, norm.affine_rank_after, *norm.brackets) if s] == [11] * 5


def test_core_leaves_both_lists_empty() -> None:
    found = observe(Own(), ids(), level="core")
    assert (found.updates, found.norms) == ([], [])


def test_while_a_component_is_taken_away_nothing_is_said_of_the_additions() -> None:
    model = Own()
    anatomy = proved_anatomy(model, ids()[0])
    with uc.without(model, "attention"):
        found = capture(model, ids(), anatomy, level="full")
    for record in (*update_records(found.updates), *norm_records(found.norms)):
        assert "while a component is removed" in next(iter(record.unavailable.values()))
        assert all(getattr(record, name) is None for name in record.unavailable)
    assert {len(update_records(found.updates)), len(norm_records(found.norms))} == {4}


def test_what_is_kept_does_not_grow_with_the_corpus() -> None:
    def kept(found: Observations) -> int:
        fits = [s for u in found.updates if u.fit for s in u.fit.sums if s]
        values = [u.values.total.numel() for u in found.updates] + [n.values.total.numel() for n in found.norms]
        return sum(t.numel() for s in fits for t in s[1:]) + sum(values)

    assert kept(observe(Own(), ids(), level="full")) == kept(observe(Own(), ids() * 4, level="full"))


# The streamed fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["full", "deficient", "far from the origin"])
def test_the_streamed_fit_is_the_pooled_one_where_the_split_is_the_same(case: str) -> None:
    x = torch.randn(240, 6, dtype=torch.float64)
    if case == "deficient":
        x[:, 5] = x[:, 0] - 2 * x[:, 1]
    y = torch.tanh(x @ torch.randn(6, 4, dtype=torch.float64)) + 3
    if case == "far from the origin":
        x, y = x + 1e6, y - 1e7
    held_out = torch.randperm(240, generator=torch.Generator().manual_seed(0))[:60]  # as geometry draws with seed 0
    scores = torch.zeros(240, dtype=torch.bool)
    scores[held_out] = True
    fit = AffineFit()
    for part in torch.arange(240).split(37):
        for held in (False, True):
            rows = part[scores[part] == held]
            fit.add(x[rows], y[rows], held_out=held)
    assert fit.missing() is None
    assert fit.share() == pytest.approx(geometry.nonlinear_innovation(x, y).item(), rel=1e-6)
    assert 0.01 < fit.share() < 1


def test_a_constant_output_has_no_share() -> None:
    fit, x = AffineFit(), torch.randn(40, 2)
    for held in (False, True):
        fit.add(x, torch.ones(40, 3), held_out=held)
    assert np.isnan(fit.share())


@pytest.mark.parametrize("module", [affine_fit, norm_law])
def test_the_examples_in_the_docstrings_are_true(module: Any) -> None:
    done = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert done.failed == 0
    assert done.attempted > 0
