"""Several threads and one model: probes one after the other, and passes that give what they always give or are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.own_models import OwnGPT, tokens
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.interventions.without import removed
from uncollapse.symmetry.acting import drawn, transformed
from uncollapse.symmetry.channels import channels_of
from uncollapse.symmetry.weight_groups import HeadPermutation

SECONDS = 60  # no test waits for long; one that hangs shall fail


def llama(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
    )
    return hf.LlamaForCausalLM(config).eval()


def ids(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(seed))}


class Thread(threading.Thread):
    """A thread whose result or error can be asked for."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function, self.result, self.error = run, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error

    def done(self) -> Any:
        self.join(SECONDS)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.result


def test_a_second_probe_waits_for_the_first() -> None:
    model, batch = OwnGPT().eval(), {"idx": tokens()}
    alone = uc.diagnose(model, batches=[batch]).to_json()
    order: list[str] = []
    others: list[Thread] = []
    begun = threading.Event()

    def second() -> str:
        begun.set()
        return uc.diagnose(model, batches=[batch], progress=lambda *_: order.append("second")).to_json()

    def progress(what: str, done: int, total: int) -> None:
        order.append("first")
        if not others:
            others.append(Thread(second))
            assert begun.wait(SECONDS)

    assert uc.diagnose(model, batches=[batch], progress=progress).to_json() == alone
    assert others[0].done() == alone
    assert order == sorted(order)  # every step of the first before any of the second


def test_many_threads_diagnose_at_once_and_leave_the_process_as_it_was() -> None:
    model, batch = llama(), ids()
    alone = uc.diagnose(model, batches=[batch]).to_json()
    together = threading.Barrier(3)

    def run() -> str:
        together.wait(SECONDS)
        return uc.diagnose(model, batches=[batch]).to_json()

    threads = [Thread(run) for _ in range(3)]
    assert [thread.done() for thread in threads] == [alone] * 3
    assert model.config.use_cache is True
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("analysis", [uc.diagnose, uc.symmetries, uc.ablate])
def test_generate_in_another_thread_gives_what_it_always_gives(analysis: Callable[..., Any]) -> None:
    """Begun between two batches of the probe; the model keeps a cache of its own there, as it does elsewhere."""
    model, batch, other = llama(), ids(), ids(1)
    expected = model.generate(
        **other, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        plain = model(**other)
    found: list[bool] = []

    def run() -> bool:
        got = model.generate(
            **other, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with torch.no_grad():
            once = model(**other)
        cache = once.past_key_values is not None and once.past_key_values.get_seq_length() == 7
        return cache and torch.equal(once.logits, plain.logits) and all(map(torch.equal, got.logits, expected.logits))

    def progress(what: str, *_: Any) -> None:
        if what != "anatomy":
            found.append(Thread(run).done())

    analysis(model, batches=[batch] * 2, progress=progress)
    assert len(found) > 1
    assert all(found)


def test_what_an_ablation_takes_away_is_there_for_other_threads() -> None:
    model, batch = llama(), ids()
    proved_anatomy(model, batch)

    def run() -> Tensor:
        with torch.no_grad():
            return model(**batch).logits

    whole = run()
    with removed(model, "mlp", "norm"):
        assert not torch.equal(run(), whole)
        assert torch.equal(Thread(run).done(), whole)


def test_a_pass_in_another_thread_gives_what_it_always_gives_while_the_model_is_proved() -> None:
    model, batch, other = OwnGPT().eval(), {"idx": tokens()}, {"idx": tokens(2, 6)}
    with torch.no_grad():
        expected = model(**other)
    mine, found = threading.get_ident(), []

    def run() -> bool:
        with torch.no_grad():
            return torch.equal(model(**other), expected)

    def meanwhile(*_: Any) -> None:
        if threading.get_ident() == mine:
            thread = Thread(run)
            thread.join(0.2)  # it may have to wait until parameters that are zero are themselves again
            found.append(thread)

    hook = model.blocks[0].register_forward_hook(meanwhile)
    try:
        proved_anatomy(model, batch)
    finally:
        hook.remove()
    assert len(found) > 5
    assert all(thread.done() for thread in found)


def test_a_probe_of_a_model_that_another_thread_is_running_is_refused() -> None:
    model, batch = llama(), ids()
    proved_anatomy(model, batch)
    inside, leave = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        assert leave.wait(SECONDS)

    hook = model.model.layers[1].register_forward_hook(hold)
    thread = Thread(lambda: model(**batch))
    try:
        assert inside.wait(SECONDS)
        for refused in (
            lambda: uc.diagnose(model, batches=[batch]),
            lambda: uc.without(model, "mlp", batch=batch).__enter__(),
            lambda: uc.install_gates(model, batch=batch),
        ):
            with pytest.raises(uc.InputError, match="no other thread is running, got a call of LlamaForCausalLM"):
                refused()
    finally:
        hook.remove()
        leave.set()
    thread.done()
    assert uc.diagnose(model, batches=[batch]).findings is not None


def test_a_thread_that_trains_waits_until_the_model_is_in_training_mode_again() -> None:
    model, batch = llama(dropout=0.5).train(), ids()
    proved_anatomy(model, batch)
    inside = threading.Event()
    modes: list[bool] = []
    with probing(model):
        thread = Thread(lambda: (inside.set(), model(**batch), modes.append(model.model.layers[0].self_attn.training)))
        assert inside.wait(SECONDS)
        thread.join(0.3)
        assert thread.is_alive()
        assert not modes
    thread.done()
    assert modes == [True]


def test_a_pass_that_the_probe_itself_waits_for_is_refused_and_does_not_hang() -> None:
    model, batch = llama(dropout=0.5).train(), ids()
    with probing(model), pytest.raises(uc.InputError, match="expected a probe that does not wait for a pass"):
        Thread(lambda: model(**batch)).done()
    assert model.training


def test_a_pass_waits_until_transformed_weights_are_themselves_again() -> None:
    model, batch = llama(), ids()
    channels = channels_of(model, proved_anatomy(model, batch), batch)
    with torch.no_grad():
        expected = model(**batch).logits
    inside = threading.Event()

    def run() -> Tensor:
        inside.set()
        with torch.no_grad():
            return model(**batch).logits

    with probing(model):
        with transformed(model, drawn(HeadPermutation, channels, torch.Generator().manual_seed(2))):
            with torch.no_grad():
                assert not torch.equal(model(**batch).logits, expected)
            thread = Thread(run)
            assert inside.wait(SECONDS)
            thread.join(0.2)
            assert thread.is_alive()
        assert torch.equal(thread.done(), expected)


def test_padding_of_one_thread_is_not_that_of_another() -> None:
    """A removal acts in every thread: each has its own mask."""
    model, long, short = llama(), ids(), ids(1)
    long["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    short["attention_mask"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    between = threading.Barrier(2)

    def meet(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            between.wait(SECONDS)

    def run(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model(**batch).logits

    with uc.without(model, "mask", batch=long):
        alone = [run(long), run(short)]
        hook = model.model.embed_tokens.register_forward_hook(meet)  # both have told their mask, none has used it
        threads = [Thread(lambda b=b: run(b)) for b in (long, short)]
        got = [thread.done() for thread in threads]
        hook.remove()
    assert all(map(torch.equal, got, alone))
