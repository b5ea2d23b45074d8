"""A model that does not fit into the memory it may take: the rest stays on disk, and the figures are the same."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from accelerate.utils import offload

import uncollapse as uc
from tests.helpers.kept_weights import counted_reads
from tests.helpers.several_processes import SIZES, differences, padded_batches
from uncollapse.anatomy import stages
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.tracing import trace
from uncollapse.sources import load_model

BUDGET = 1.5e9
WEIGHTS_OF_A_BLOCK = 9
BIG = """
import sys
import torch, transformers as hf
import uncollapse as uc
import uncollapse.analyses.diagnosis

def status(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

folder, budget = sys.argv[1:]
config = hf.LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
)
if budget == "make":
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(0, 0.02) if p.ndim > 1 else p.data.fill_(1)
    model.save_pretrained(folder, max_shard_size="300MB")
    sys.exit()
before = status("VmRSS")
torch.set_num_threads(1)
ids = torch.randint(0, 32000, (2, 64), generator=torch.Generator().manual_seed(0))
found = uc.diagnose(folder, batches=[{"input_ids": ids}] * 2, max_memory=budget)
assert len(found.record.heads) == 22 and not found.record.anatomy.not_measured
print(status("VmHWM") - before)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES | {"num_hidden_layers": 3}, tie_word_embeddings=False)
    hf.LlamaModel(config).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return counted_reads(monkeypatch)


def times_read(reads: Counter[str], part: str) -> set[int]:
    times = {n for key, n in reads.items() if part in key}
    assert len([key for key in reads if part in key]) == WEIGHTS_OF_A_BLOCK
    reads.clear()
    return times


@pytest.mark.parametrize("count", [1, 3])
def test_figures_from_disk_are_those_from_memory_and_each_weight_is_read_once(
    count: int, saved: Path, reads: Counter[str]
) -> None:
    batches = padded_batches(count)
    inside = uc.diagnose(str(saved), batches=batches, device="cpu", level="full").record
    assert not reads
    loaded = load_model(str(saved), max_memory="60KB").model
    assert any(p.is_meta for p in loaded.parameters())
    outside = uc.diagnose(loaded, batches=batches, level="full", name=str(saved)).record
    # For the batches. The proof draws numbers, and what is asked of a model that looks as it was made is asked meanwhile.
    assert set(reads.values()) == {1}
    assert reads.keys() >= {"embed_tokens.weight", "norm.weight", "layers.2.mlp.down_proj.weight"}
    reads.clear()
    for record in (inside, outside):
        record.probe.options.clear()
    assert differences(inside.trajectory, outside.trajectory, 1e-6) == []
    for part in ("attention", "heads", "norms", "updates", "parts", "findings", "corpus", "embeddings"):
        assert differences(getattr(inside, part), getattr(outside, part), 1e-6) == []
    uc.diagnose(loaded, batches=batches)
    assert times_read(reads, "layers.2") == {1}
    uc.identify(loaded, batches=batches)
    assert times_read(reads, "layers.2") == {1}


def test_batches_passed_together_give_the_very_figures_that_they_give_one_after_the_other(
    saved: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, batches = load_model(str(saved), max_memory="60KB").model, padded_batches(3)
    loaded.train()  # so that passes of other threads would have to wait
    told: list[tuple[str, int, int]] = []
    found: list[uc.Diagnosis] = []
    uc.identify(loaded, batches=batches)
    for room in (2**30, 0):
        monkeypatch.setattr(stages, "AT_LEAST", room)
        reads.clear()
        told.clear()
        found.append(uc.diagnose(loaded, batches=batches, level="full", progress=lambda *step: told.append(step)))
        assert [step for step in told if step[0] == "probe"] == [("probe", n, 3) for n in range(4)]
        assert times_read(reads, "layers.2") == {1 if room else 3}
    assert found[0].to_json() == found[1].to_json()
    assert loaded.training


def test_double_precision_is_kept_in_passes_made_together() -> None:
    model = hf.LlamaModel(hf.LlamaConfig(**SIZES)).double().eval()
    inside = uc.identify(model, batches=padded_batches(3)).record
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert differences(inside.heads, uc.identify(model, batches=padded_batches(3)).record.heads, 1e-12) == []


def test_batches_of_a_model_that_draws_random_numbers_are_passed_one_after_the_other(
    saved: Path, reads: Counter[str]
) -> None:
    """In another order they would get other numbers."""
    loaded, batches = load_model(str(saved), max_memory="60KB").model, padded_batches(3)
    uc.identify(loaded, batches=batches)
    handle = loaded.norm.register_forward_pre_hook(lambda _, args: torch.rand(1))
    reads.clear()
    found = uc.identify(loaded, batches=batches)
    # Once in vain, until the end of the model shows it.
    assert times_read(reads, "layers.2") <= {3, 4}
    handle.remove()
    assert differences(found.record.heads, uc.identify(loaded, batches=batches).record.heads, 0) == []


def test_padding_is_told_where_the_weights_on_disk_are_zero() -> None:
    """A first attention that adds nothing yet: what hides tokens from it is told with other weights in their place."""
    model = hf.LlamaModel(hf.LlamaConfig(**SIZES)).eval()
    for p in model.layers[0].self_attn.o_proj.parameters():
        torch.nn.init.zeros_(p)
    inside = uc.diagnose(model, batches=padded_batches(2), name="zero").record
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.layers[0].parameters())
    outside = uc.diagnose(model, batches=padded_batches(2), name="zero").record
    assert differences(inside.trajectory, outside.trajectory, 1e-6) == []
    assert differences(inside.attention, outside.attention, 1e-6) == []
    assert outside.anatomy == inside.anatomy


def test_a_trace_holds_no_weight_behind_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wider = SIZES | {"hidden_size": 320, "intermediate_size": 320, "num_key_value_heads": 4}  # 400 kB a weight
    hf.LlamaModel(hf.LlamaConfig(**wider, tie_word_embeddings=False)).save_pretrained(tmp_path, max_shard_size="1MB")
    loaded = load_model(str(tmp_path), max_memory="200KB").model
    given: list[weakref.ref[torch.Tensor]] = []
    read = offload.OffloadedWeightsLoader.__getitem__

    def noted(self: Any, key: str) -> Any:
        tensor = read(self, key)
        if tensor.ndim > 1 and "embed" not in key:
            given.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(offload.OffloadedWeightsLoader, "__getitem__", noted)
    with probing(loaded):
        traced = trace(loaded, padded_batches(1)[0])
    assert len(given) == 14
    assert not [one for one in given if one() is not None]
    assert len({call.name for call in traced.calls if call.name.endswith("proj")}) == 14


@pytest.mark.parametrize("size", ["3", "GiB", "-1GiB", "0GB", "3 apples"])
def test_sizes_that_are_none_are_refused(size: str, saved: Path) -> None:
    with pytest.raises(uc.InputError, match="expected max_memory as a number of bytes"):
        uc.diagnose(str(saved), batches=padded_batches(1), max_memory=size)


def test_a_size_and_one_device_exclude_each_other(saved: Path) -> None:
    with pytest.raises(uc.InputError, match="got both"):
        uc.diagnose(str(saved), batches=padded_batches(1), max_memory="1GB", device="cpu")


@pytest.mark.slow
def test_a_billion_parameters_within_less_than_their_size(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(BIG)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for budget in ("make", f"{BUDGET / 1e9}GB"):
        command = [sys.executable, str(tmp_path / "big.py"), str(tmp_path / "model"), budget]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
    stored = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert stored > BUDGET
    # All that is resident at the highest, pages of the checkpoint that the system maps included.
    assert int(run.stdout.split()[-1]) <= 1.1 * BUDGET
