"""Whole sublayers with something else in their place: the same numbers as written by hand, and everything back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, text_batch
from uncollapse.interventions.single_heads import another_sequence

BATCH = text_batch(3, 9)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return hf.GPT2LMHeadModel(config).eval()


def by_hand(model: Any, batch: dict[str, Tensor], modules: list[nn.Module], made: Callable[[Tensor], Tensor]) -> Tensor:
    """The output with what modules add replaced."""
    hooks = []
    for module in modules:

        def replaced(_: nn.Module, __: Any, output: Any) -> Any:
            return (made(output[0]), *output[1:]) if isinstance(output, tuple) else made(output)

        hooks.append(module.register_forward_hook(replaced))
    with torch.no_grad():
        found = model(**batch)[0]
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("component", "names"), [("mlp", ["mlp"]), ("attention", ["attn"]), ("block", ["attn", "mlp"])]
)
def test_the_mean_is_over_the_real_tokens_of_the_whole_model(component: str, names: list[str]) -> None:
    model = gpt2()
    batch = {**BATCH, "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 9])}
    real = batch["attention_mask"].bool()
    modules = [getattr(model.transformer.h[1], name) for name in names]
    means = {}
    for name, module in zip(names, modules, strict=True):

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            means[name] = (output[0] if isinstance(output, tuple) else output)[real].mean(0)

        hook = module.register_forward_hook(keep)
        with torch.no_grad():
            model(**batch)
        hook.remove()
    order = iter(names)
    expected = by_hand(model, batch, modules, lambda update: means[next(order)].expand(update.shape))
    with uc.without(model, component, blocks=[1], parts_as="mean", batch=batch), torch.no_grad():
        got = model(**batch)[0]
    assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.allclose(got, by_hand(model, batch, modules, torch.zeros_like), atol=1e-4)


def test_another_sequence_takes_its_place_and_all_is_restored() -> None:
    model = gpt2()
    with torch.no_grad():
        before = model(**BATCH)[0]
    order = another_sequence(3, 4)
    expected = by_hand(model, BATCH, [model.transformer.h[2].mlp], lambda update: update[order])
    with uc.without(model, "mlp", blocks=[2], parts_as="resample", seed=4), torch.no_grad():
        assert torch.allclose(model(**BATCH)[0], expected, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(**BATCH)[0], before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_the_norm_behind_the_sum_stays_in_a_post_norm_model() -> None:
    """Skipped with `zero`, together with its norm; with a mean in its place the sum is normalised."""
    model = FAMILIES["bert"].build().eval()
    layer, seen = model.encoder.layer[1], {}
    hook = layer.output.dense.register_forward_hook(lambda _, __, output: seen.update(mean=output.mean((0, 1))))
    with torch.no_grad():
        model(**BATCH)
    hook.remove()
    expected = by_hand(model, BATCH, [layer.output.dense], lambda update: seen["mean"].expand(update.shape))
    with uc.without(model, "mlp", blocks=[1], parts_as="mean", batch=BATCH), torch.no_grad():
        assert torch.allclose(model(**BATCH)[0], expected, atol=1e-6)


def test_with_a_cache_and_in_generate() -> None:
    model = gpt2()
    prompt = {"input_ids": BATCH["input_ids"][:, :4], "attention_mask": BATCH["attention_mask"][:, :4]}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with uc.without(model, "mlp", blocks=[0, 1], parts_as="mean", batch=BATCH):
        cached = model.generate(**prompt, use_cache=True, **options)
        plain = model.generate(**prompt, use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_refusals() -> None:
    model = gpt2()
    with pytest.raises(uc.InputError, match="whole sublayer"), uc.without(model, "norm", parts_as="mean", batch=BATCH):
        pass
    with pytest.raises(uc.InputError, match="take the mean over"), uc.without(model, "mlp", parts_as="mean"):
        pass
    with pytest.raises(uc.InputError, match="parts_as among"), uc.without(model, "mlp", parts_as="median"):  # type: ignore[arg-type]
        pass
    with uc.without(model, "mlp", blocks=[0], parts_as="resample"), pytest.raises(uc.InputError, match="2 sequences"):
        model(input_ids=BATCH["input_ids"][:1])
