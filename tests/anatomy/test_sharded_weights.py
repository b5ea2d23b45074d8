"""Models whose weights are shared out over two processes: everything is as for the whole model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.several_processes import differences, hardly_trained, in_two, llama, padded_batches
from tests.helpers.tiny_models import text_batch
from uncollapse.anatomy.sharded_weights import gathered_weights

WRAPPED = ["fully_shard", "tensor parallel"]
OF_WEIGHTS = ("update_", "query_key_norm")  # which the monitor leaves out where weights are sharded


def _wrapped(kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = hardly_trained()
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        if kind == "fully_shard":
            fully_shard(layer)
            continue
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
        parallelize_module(
            layer, mesh, {**plan, "self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        )
    if kind == "fully_shard":
        fully_shard(model.lm_head)  # what is left to the whole model would stay gathered after a pass
        fully_shard(model)
    return model


def _output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**padded_batches(1)[0]).logits
    return logits


def _bits(model: Any) -> list[Tensor]:
    return [(v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for v in model.state_dict().values()]


def _open(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.gate.weight", "o_proj.gate.bias")):
                parameter.add_(0.3)


def _checks(rank: int, noted: dict[str, Any], kinds: Sequence[str] = WRAPPED, parts: Sequence[str] = ()) -> None:
    batches = padded_batches(2)
    for kind in kinds:
        whole, model = hardly_trained(), _wrapped(kind)
        before, bits = _output(model), _bits(model)
        found: dict[str, Any] = {"output": float((before - _output(whole)).abs().max())}

        def diagnoses(whole: Any = whole, model: Any = model, **options: Any) -> list[str]:
            one = uc.diagnose(whole, batches=batches, alone=True, **options).record
            return differences(one, uc.diagnose(model, batches=batches, **options).record, 1e-10)

        found["diagnose"] = diagnoses(level="full")
        one = uc.diagnose(whole, batches=batches, alone=True).record
        found["bounds"] = [each.logit_range_bound for each in one.attention]
        found["evidence"] = [each.initial_evidence for each in one.parts]
        try:
            uc.attribute(model, batches, lambda output: output.logits[:, -1, 3])
        except uc.UnsupportedModel as error:
            found["attribute"] = str(error)
        if parts:
            heads = uc.identify(whole, batches=batches, alone=True).record
            found["identify"] = differences(heads, uc.identify(model, batches=batches).record, 1e-10)
            runs = uc.ablate(whole, batches=batches, without=[("mlp",)], alone=True).record
            found["ablate"] = differences(runs, uc.ablate(model, batches=batches, without=[("mlp",)]).record, 1e-10)
        for part in parts:
            with uc.without(whole, part), uc.without(model, part):
                found[f"without {part}"] = float((_output(whole) - _output(model)).abs().max()), diagnoses()
        with uc.without(whole, "attention", heads={1: [2]}), uc.without(model, "attention", heads={1: [2]}):
            found["without a head"] = float((_output(whole) - _output(model)).abs().max())
            found["a head was away"] = float((_output(model) - before).abs().max())
        monitors = [uc.Monitor(each, batches, every=1) for each in (whole, model)]
        for monitor in monitors:
            monitor.step(0)
        if monitors[1].readings and monitors[0].readings:
            one_reading, other = (asdict(monitor.readings[0]) for monitor in monitors)
            lines = differences(one_reading, other, 1e-10)
            found["monitor"] = [line for line in lines if not any(name in line for name in OF_WEIGHTS)]
        uc.install_gates(whole)
        uc.install_gates(model)
        _open(whole)
        _open(model)
        gated = _output(model)
        gaps = (float((a - b).abs().max()) for a, b in ((_output(whole), gated), (gated, before)))
        found["gates"] = *gaps, diagnoses() if parts else []
        uc.remove_gates(whole)
        uc.remove_gates(model)
        found["as before"] = torch.equal(_output(model), before) and all(map(torch.equal, bits, _bits(model)))
        noted[kind] = found


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two(_checks, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_model_in_two_processes_is_the_whole_model(kind: str, noted: list[dict[str, Any]]) -> None:
    for own in noted:
        assert "failed" not in own, own["failed"]
        assert "attribute" in own[kind]
        _require_whole(own[kind])
    assert "monitor" in noted[0][kind]  # the whole model's monitor looks in the first process only


@pytest.mark.slow
def test_other_wrappers_and_parts_are_the_whole_model_too(tmp_path: Path) -> None:
    checks = functools.partial(
        _checks, kinds=[*WRAPPED, "DDP"], parts=["norm", "mask", "residual", "attention", "positions"]
    )
    for own in in_two(checks, tmp_path):
        assert "failed" not in own, own["failed"]
        for found in own.values():
            _require_whole(found)


def _require_whole(found: dict[str, Any]) -> None:
    assert found["output"] < 1e-12
    assert found["diagnose"] == []
    assert None not in found["bounds"]
    assert any("lm_head.weight is in directions that training gave it" in str(each) for each in found["evidence"])
    assert "weights are shared out" in found.get("attribute", "weights are shared out")
    assert found.get("identify", []) == []
    assert found.get("ablate", []) == []
    without = [each for name, each in found.items() if name.startswith("without ") and name != "without a head"]
    assert all(gap < 1e-12 and lines == [] for gap, lines in without)
    assert found["without a head"] < 1e-12
    assert found["a head was away"] > 1e-4
    assert found.get("monitor", []) == []
    gap, opened, lines = found["gates"]
    assert gap < 1e-12
    assert opened > 1e-4
    assert lines == []
    assert found["as before"]


class FullyShardedDataParallel(nn.Module):
    __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_weights_that_are_laid_out_anew_are_refused_by_name() -> None:
    with pytest.raises(uc.UnsupportedModel, match=r"FSDP1.*fully_shard instead"):
        uc.diagnose(FullyShardedDataParallel(llama()), batches=padded_batches(1))
    partitioned = llama()
    partitioned.lm_head.weight.ds_id = 0
    with pytest.raises(uc.UnsupportedModel, match="ZeRO"):
        uc.diagnose(partitioned, batches=padded_batches(1))


class _Part(nn.Parameter):
    """What a process holds of a weight, as a `DTensor` is asked for it."""

    def full_tensor(self) -> Tensor:
        return torch.cat([self.detach(), 2 * self.detach()])


def test_gathered_weights_are_let_go_also_after_an_exception() -> None:
    module = nn.Linear(3, 4)
    part = _Part(module.weight.detach()[:2])
    module._parameters["weight"] = part
    with torch.no_grad(), gathered_weights(module):
        assert module.weight is part
        assert module(torch.eye(3)).shape == (3, 4)
        assert module.weight is part
        with pytest.raises(RuntimeError):
            module(torch.eye(5))
        assert module.weight is part


def _doubling(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
    """What a tensor-parallel layer does to what one process gives."""
    return 2 * output


_doubling.__module__ = "torch.distributed.tensor.parallel.style"


def test_the_exchange_of_activations_rests_until_the_last_has_left_and_goes_on_in_a_copy() -> None:
    module, given = nn.Linear(3, 4), torch.eye(3)
    alone = module(given)
    module.register_forward_hook(_doubling)
    first, second = gathered_weights(module), gathered_weights(module)
    first.__enter__()
    second.__enter__()
    assert torch.equal(module(given), alone)
    assert torch.equal(copy.deepcopy(module)(given), 2 * alone)
    first.__exit__(None, None, None)
    assert torch.equal(module(given), alone)
    second.__exit__(None, None, None)
    assert torch.equal(module(given), 2 * alone)
    assert list(module._forward_hooks.values()) == [_doubling]


def test_a_probe_of_one_process_gathers_nothing() -> None:
    model = llama()
    weights = {name: id(p) for name, p in model.named_parameters()}
    uc.diagnose(model, batches=[text_batch()])
    assert {name: id(p) for name, p in model.named_parameters()} == weights
