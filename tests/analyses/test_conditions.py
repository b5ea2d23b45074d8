"""Diagnosing under the conditions people run models in: nothing changes, and the figures are those of the plain model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from tests.helpers.own_models import OwnGPT, tokens
from tests.helpers.tokenizers import WORDS, word_tokenizer
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.probe.passes import capture

names = pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "llama", "t5"])
FIGURES = ("entropy", "max_logit", "value_contraction")


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    model = FAMILIES[name].build().to(dtype)
    model.config.use_cache = False  # a probe keeps no cache, so the outputs compared here keep none either
    return model, inputs_for(FAMILIES[name])


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tensors_in(model(**batch))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def diagnosed(model: nn.Module, batch: dict[str, Tensor], level: Any = "core") -> uc.Diagnosis:
    """The diagnosis, after checking that the outputs before, during and after it are the same in every bit."""
    before = outputs(model, batch)
    seen: list[list[Tensor]] = []
    hook = model.register_forward_hook(lambda _m, _i, o: seen.append([t.clone() for t in tensors_in(o)]))
    try:
        diagnosis = uc.diagnose(model, batches=[batch], level=level)
    finally:
        hook.remove()
    assert any(same(each, before) for each in seen)  # the probe pass; others shake something to see what moves
    assert same(outputs(model, batch), before)
    return diagnosis


def attention_means(diagnosis: uc.Diagnosis, figure: str) -> list[float]:
    return [getattr(a, figure).mean for a in diagnosis.record.attention]


def agree(a: uc.Diagnosis, b: uc.Diagnosis, rel: float) -> None:
    """The same parts, the same projections, the same figures."""
    assert a.record.model.norm_placement == b.record.model.norm_placement
    for figure in FIGURES:
        assert attention_means(a, figure) == pytest.approx(attention_means(b, figure), rel=rel, abs=rel)
    for x, y in zip(a.trajectory, b.trajectory, strict=True):
        assert x.consensus_distance.mean == pytest.approx(y.consensus_distance.mean, rel=rel)
    for x, y in zip(a.record.heads, b.record.heads, strict=True):
        assert x.unavailable == y.unavailable
        assert (x.kernel_dimension, x.gauge_dimension, x.width) == (y.kernel_dimension, y.gauge_dimension, y.width)
        assert x.condition_number == pytest.approx(y.condition_number, rel=max(rel, 1e-3))
        assert np.array(x.write_space_overlap) == pytest.approx(np.array(y.write_space_overlap), abs=10 * rel)
        assert [s.mean for s in x.energy_share] == pytest.approx([s.mean for s in y.energy_share], rel=rel)


# Number formats and contexts -------------------------------------------------------------------------------------------


@names
def test_inference_mode(name: str) -> None:
    plain = diagnosed(*built(name))
    with torch.inference_mode():
        inside = diagnosed(*built(name))
    assert inside.to_json() == plain.to_json()


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "llama", "t5", "mixtral"])
def test_autocast(name: str) -> None:
    model, batch = built(name)
    with torch.autocast("cpu", torch.bfloat16):
        inside = diagnosed(model, batch, level="full")
    assert all(h.condition_number is not None for h in inside.record.heads)


def test_under_autocast_figures_are_computed_in_the_precision_they_are_written_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = built("bert")
    fused, met = nn.functional.scaled_dot_product_attention, []

    def noting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert options.get("attn_mask") is None
        met.append((q, k, options["scale"]))
        return fused(q, k, v, **options)

    with torch.autocast("cpu", torch.bfloat16):
        anatomy = proved_anatomy(model, batch)
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
        observed = capture(model, [batch], anatomy)
        diagnosis = uc.diagnose(model, batches=[batch])
    for (q, k, scale), attention in zip(met, observed.attention, strict=False):
        weights = (scale * q.double() @ k.double().mT).softmax(-1)
        entropy = -(weights * weights.log()).sum(-1).mean((0, 2))
        got = [attention.values.summary(0, h)[0] for h in range(4)]
        assert got == pytest.approx(entropy.tolist(), rel=1e-5)
    for number, head in enumerate(diagnosis.record.heads):
        W = model.encoder.layer[number].attention.output.dense.weight.detach().double().numpy().T
        shares = [np.linalg.svd(W[8 * h : 8 * h + 8], full_matrices=False)[2] for h in range(4)]
        expected = np.linalg.norm(shares[0] @ shares[1].T) ** 2 / 8
        assert head.write_space_overlap[0][1] == pytest.approx(expected, rel=1e-4)


@names
@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-4)])
def test_other_number_formats(name: str, dtype: torch.dtype, rel: float) -> None:
    plain, other = diagnosed(*built(name)), diagnosed(*built(name, dtype))
    assert other.record.model.dtype == str(dtype).removeprefix("torch.")
    assert attention_means(other, "entropy") == pytest.approx(attention_means(plain, "entropy"), rel=rel)


# Compiled models -------------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def compiled_outside(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    blocks = _blocks(model)
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    return model


def compiled_blocks_in_place(model: nn.Module) -> nn.Module:
    for block in _blocks(model):
        block.compile(backend="eager")
    return model


COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "outside": compiled_outside,
    "in place": compiled_in_place,
    "blocks": compiled_blocks,
    "blocks in place": compiled_blocks_in_place,
}
compilations = pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)


@compilations
def test_a_compiled_model_that_ran_before(compiled: Callable[[nn.Module], nn.Module]) -> None:
    plain = diagnosed(*built("gpt2"))
    model, batch = built("gpt2")
    model = compiled(model)
    first = outputs(model, batch)
    agree(diagnosed(model, batch), plain, 1e-6)
    assert same(outputs(model, batch), first)


# Training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing_in_training_mode(name: str) -> None:
    plain = diagnosed(*built(name))
    model, batch = built(name)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that gradients can be compared
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**batch)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    inside = uc.diagnose(model, batches=[batch])
    agree(inside, plain, 1e-6)
    assert all(m.training for m in model.modules())
    assert same(gradients(), before)
    with pytest.raises(uc.UnsupportedModel, match="checkpointing"), uc.without(model, "mlp"):
        pass


# Offloaded weights -----------------------------------------------------------------------------------------------------


def on_the_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def on_both(model: nn.Module, folder: Path) -> nn.Module:
    device_map = {name: "cpu" for name, _ in model.named_children()}
    (stack, blocks) = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    device_map.pop(stack.split(".")[0])
    device_map |= {f"{stack}.{i}": "disk" if i else "cpu" for i in range(len(blocks))}
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True, offload_buffers=True
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("placed", [on_the_cpu, on_disk, on_both])
def test_offloaded_weights_are_met_when_they_are_there(
    name: str, placed: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    plain = diagnosed(*built(name))
    model, batch = built(name)
    model = placed(model, tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters())
    agree(diagnosed(model, batch), plain, 1e-5)
    assert any(p.device.type == "meta" for p in model.parameters())
    with uc.without(model, "norm"):  # the norms are known although their weights are away
        assert not same(outputs(model, batch), outputs(built(name)[0], batch))


@pytest.mark.parametrize("placed", [on_the_cpu, on_disk, on_both])
def test_offloaded_weights_and_text_that_is_padded_on_the_left(
    placed: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    texts = [" ".join(WORDS[:length]) for length in (4, 7, 6)]
    tokenizer = word_tokenizer(padding_side="left", pad_token="<pad>")
    plain = uc.diagnose(built("gpt2")[0], texts, tokenizer=tokenizer)
    found = uc.diagnose(placed(built("gpt2")[0], tmp_path), texts, tokenizer=tokenizer)
    agree(found, plain, 1e-5)
    assert found.record.probe.device == plain.record.probe.device == "cpu"


# Adapters and quantised weights ----------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """base(x) + scaling B A dropout(x), as adapters are attached."""

    def __init__(self, base: nn.Module, read: int, written: int, nonlinear: bool = False) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.nonlinear = base, 0.5, nonlinear
        self.lora_A, self.lora_B = nn.Linear(read, 3, bias=False), nn.Linear(3, written, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A(self.dropout(x))
        return self.base_layer(x) + self.scaling * self.lora_B(low.tanh() if self.nonlinear else low)

    def merged(self) -> nn.Module:
        delta = self.scaling * self.lora_B.weight @ self.lora_A.weight
        with torch.no_grad():
            self.base_layer.weight += delta if isinstance(self.base_layer, nn.Linear) else delta.T
        return self.base_layer


class Int8(nn.Module):
    """A linear map whose weight is kept as whole numbers and a scale a row, expanded when it runs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    def expanded(self) -> nn.Linear:
        weight = self.weight.float() * self.scale
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None)
        linear.weight.data = weight
        if self.bias is not None:
            linear.bias.data = self.bias
        return linear


def replaced(model: nn.Module, endings: tuple[str, ...], make: Callable[[Any], nn.Module]) -> nn.Module:
    """The model with every module whose name ends so replaced."""
    for name in [n for n, _ in model.named_modules() if n.endswith(endings)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))
    return model


ADAPTED = {
    "bert": ("query", "value", "attention.output.dense"),
    "albert": ("query", "value", "attention.dense"),
    "gpt2": ("c_attn", "attn.c_proj"),
    "llama": ("q_proj", "v_proj", "o_proj"),
}
adapted = pytest.mark.parametrize("name", ADAPTED)


def attach(module: Any) -> nn.Module:
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    generator = torch.Generator().manual_seed(weight.shape[0])
    adapter = LowRank(module, weight.shape[1], weight.shape[0])
    for parameter in (adapter.lora_A.weight, adapter.lora_B.weight):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapter


@adapted
def test_an_adapter_is_part_of_the_projection(name: str) -> None:
    model, batch = built(name)
    replaced(
        model, ADAPTED[name], attach
    ).double()  # ALBERT collapses within three blocks: float32 would show its rounding
    for module in model.modules():
        module.training = isinstance(module, (LowRank, nn.Dropout)) or module is model
    training = [m.training for m in model.modules()]
    with_adapter = uc.diagnose(model, batches=[batch])
    assert [m.training for m in model.modules()] == training
    diagnosed(model.eval(), batch)
    for call in (c for b in proved_anatomy(model, batch).blocks for p in b.parts for c in p.attention):
        assert isinstance(model.get_submodule(call.projection.name), LowRank)
    merged = replaced(model, ADAPTED[name], LowRank.merged)
    agree(with_adapter, diagnosed(merged, batch), 1e-4)


def test_under_autocast_the_matrix_of_an_adapter_is_not_rounded() -> None:
    model, batch = built("llama")
    replaced(model, ("o_proj",), attach).eval()
    with torch.autocast("cpu", torch.bfloat16):
        inside = diagnosed(model, batch)
    plain = diagnosed(replaced(model, ("o_proj",), LowRank.merged), batch)
    for x, y in zip(inside.record.heads, plain.record.heads, strict=True):
        assert np.array(x.write_space_overlap) == pytest.approx(np.array(y.write_space_overlap), abs=1e-5)


def test_a_nonlinear_adapter_has_no_matrix_and_says_so() -> None:
    model, batch = built("llama")

    def bent(module: Any) -> nn.Module:
        adapter = attach(module)
        adapter.nonlinear = True
        return adapter

    found = diagnosed(replaced(model, ("o_proj",), bent).eval(), batch)
    for head in found.record.heads:
        assert head.kernel_dimension is None
        assert head.unavailable["kernel_dimension"] == "the output projection is not an affine map"
        assert head.unavailable["energy_share"] == "the output projection is not an affine map"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_quantised_projections_are_met_as_they_act(name: str, dtype: torch.dtype) -> None:
    model, batch = built(name)
    quantised = replaced(model, ("query", "value", "dense", "_proj"), Int8)
    for module in quantised.modules():
        if isinstance(module, Int8) and module.bias is not None:
            module.bias = module.bias.to(dtype)
    found = diagnosed(quantised.to(dtype), batch)
    own = [h.write_space_overlap for h in found.record.heads]
    plain = replaced(built(name)[0], ("query", "value", "dense", "_proj"), lambda m: Int8(m).expanded())
    expected = [h.write_space_overlap for h in diagnosed(plain, batch).record.heads]
    assert np.array(own) == pytest.approx(np.array(expected), abs=1e-4 if dtype == torch.float32 else 0.02)
    # In half precision a fresh model's heads may write what differs between tokens by no more than rounding. Then it says so.
    said = [h.unavailable.get("energy_share", "") for h in found.record.heads if h.energy_share is None]
    assert not said or (dtype == torch.bfloat16 and all("rounds off" in reason for reason in said))


# Several at once -------------------------------------------------------------------------------------------------------


def test_the_same_model_twice_in_a_row() -> None:
    model, batch = built("albert")
    assert diagnosed(model, batch).to_json() == diagnosed(model, batch).to_json()


class Twin(nn.Module):
    """Another model around modules of the first."""

    def __init__(self, model: OwnGPT) -> None:
        super().__init__()
        self.token, self.blocks = model.token, model.blocks

    def forward(self, idx: Tensor) -> Tensor:
        x = 3 * self.token(idx)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("share", [False, True])
def test_one_model_is_diagnosed_while_another_is(share: bool) -> None:
    first = OwnGPT().eval()
    second = Twin(first if share else OwnGPT(fused=False).eval()).eval()
    one, two = {"idx": tokens()}, {"idx": tokens(2, 6)}
    alone = [uc.diagnose(m, batches=[b]).to_json() for m, b in ((first, one), (second, two))]
    inner: list[str] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "probe":
            inner.append(uc.diagnose(second, batches=[two]).to_json())

    assert uc.diagnose(first, batches=[one], progress=meanwhile).to_json() == alone[0]
    assert inner == [alone[1]] * 2


def test_another_thread_runs_the_model_while_it_is_probed() -> None:
    """Its outputs are right, and no figure counts them."""
    model, batch, other = OwnGPT().eval(), {"idx": tokens()}, {"idx": tokens(2, 6)}
    alone = uc.diagnose(model, batches=[batch] * 3).to_json()
    expected = outputs(model, other)
    got: list[bool] = []

    def elsewhere() -> None:
        got.append(same(outputs(model, other), expected))

    def run(*_: Any) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    # In the middle of the probe's own pass, between its second and its third block, and between its passes.
    anatomy = proved_anatomy(model, batch)
    observed = threading.get_ident()

    def inside(*_: Any) -> None:
        if threading.get_ident() == observed:
            run()

    hook = model.blocks[1].register_forward_hook(inside)
    try:
        assert proved_anatomy(model, batch) is anatomy
        assert uc.diagnose(model, batches=[batch] * 3, progress=run).to_json() == alone
    finally:
        hook.remove()
    assert len(got) >= 6
    assert all(got)


def test_a_removal_acts_in_every_thread_and_each_counts_its_own_runs() -> None:
    model, batch = built("albert")  # one module runs three times a pass, so a shared count would act at the wrong one
    intact = outputs(model, batch)
    with uc.without(model, "mlp", blocks=[1], batch=batch):
        ablated = outputs(model, batch)
        assert not same(ablated, intact)
        together = threading.Barrier(4)
        results: list[list[Tensor]] = []

        def elsewhere() -> None:
            together.wait()
            results.extend(outputs(model, batch) for _ in range(5))

        threads = [threading.Thread(target=elsewhere) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 20
        assert all(same(r, ablated) for r in results)
    assert same(outputs(model, batch), intact)


# Inside `without` ------------------------------------------------------------------------------------------------------


@names
def test_a_diagnosis_inside_without_sees_what_is_left(name: str) -> None:
    model, batch = built(name)
    before = outputs(model, batch)
    whole = diagnosed(model, batch)
    with uc.without(model, "attention", "mlp"):
        left = diagnosed(model, batch)
        if "post" not in whole.record.model.norm_placement and name != "t5":
            stream = [s.consensus_distance.mean for s in left.trajectory]
            assert stream == [stream[0]] * len(stream)  # the stream passes untouched
        with uc.without(model, "norm"):
            assert not same(outputs(model, batch), before)
        assert diagnosed(model, batch).to_json() == left.to_json()
    assert same(outputs(model, batch), before)
    assert diagnosed(model, batch).to_json() == whole.to_json()


@names
def test_nested_removals_are_their_union_and_an_exception_inside_restores_everything(name: str) -> None:
    model, batch = built(name)
    before = outputs(model, batch)
    uc.diagnose(model, batches=[batch])
    with uc.without(model, "mlp", "attention"):
        both = outputs(model, batch)
    with uc.without(model, "mlp"):
        mlp = outputs(model, batch)
        with contextlib.suppress(LookupError), uc.without(model, "attention"):
            assert same(outputs(model, batch), both)
            raise LookupError("inside")
        assert same(outputs(model, batch), mlp)
        assert not same(mlp, both)
        with pytest.raises((IndexError, RuntimeError, TypeError)):
            model(input_ids=torch.full((1, 3), 10**6))  # the model itself fails
        assert same(outputs(model, batch), mlp)
    assert same(outputs(model, batch), before)
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@contextlib.contextmanager
def acting(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[None]:
    uc.diagnose(model, batches=[batch])
    with uc.without(model, "mlp"):
        yield


def test_a_removal_acts_each_time_a_part_of_the_model_is_run_by_itself() -> None:
    """`generate` runs an encoder alone, `get_text_features` one tower, and people call `model.model`."""
    model, batch = built("t5")
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    intact = outputs(model.encoder, text)
    with acting(model, batch):
        first = outputs(model.encoder, text)
        assert not same(first, intact)
        assert same(outputs(model.encoder, text), first)
        outputs(model, batch)
        assert same(outputs(model.encoder, text), first)
    assert same(outputs(model.encoder, text), intact)


def test_a_removed_norm_is_gone_each_time_a_part_of_the_model_is_run_by_itself() -> None:
    model, batch = built("bert")
    uc.diagnose(model, batches=[batch])
    stream = {"hidden_states": model.embeddings(batch["input_ids"]).detach()}
    with uc.without(model, "norm"):
        first = outputs(model.encoder, stream)
        assert same(outputs(model.encoder, stream), first)
    assert not same(outputs(model.encoder, stream), first)


@compilations
def test_a_removal_acts_on_a_compiled_model_that_ran_before(compiled: Callable[[nn.Module], nn.Module]) -> None:
    plain, batch = built("gpt2")
    with acting(plain, batch):
        expected = outputs(plain, batch)
    model = compiled(built("gpt2")[0])
    intact = outputs(model, batch)
    with acting(model, batch):
        assert same(outputs(model, batch), expected)
    assert same(outputs(model, batch), intact)
