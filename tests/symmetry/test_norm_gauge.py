"""What a layer norm hides of a live model's attention weights: counted, and compared with a numerical Jacobian of the model."""

import pytest
import torch
import transformers
from torch import nn

from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.measures import heads
from uncollapse.probe.norms_before import with_norms_before
from uncollapse.symmetry.acting import drawn, transformed
from uncollapse.symmetry.channels import channels_of
from uncollapse.symmetry.norm_gauge import NormGauge, hidden_channels
from uncollapse.symmetry.weight_groups import QueryKeyGauge, ValueOutputGauge

HEADS, GROUPS, HEAD_WIDTH, WIDTH = 2, 1, 2, 4


def falcon(beta, biases=False):
    """One key-value head, a layer norm, no rotation: the sizes of the exact counts in docs/theory.md."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        multi_query=True,
        alibi=True,
        parallel_attn=False,
        bias=biases,
    )
    model = transformers.FalconModel(config).double().eval()
    norm = model.h[0].input_layernorm
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_()
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        norm.bias.copy_(beta * torch.tensor([1.0, 1.0, 2.0, -1.0]))
    return model


def batch():
    return {"input_ids": torch.randint(0, 40, (12, 7), generator=torch.Generator().manual_seed(1))}


def kernel(model, parameters):
    """The dimension of what the attention's output does not show of these slices of parameters, by central differences."""
    seen = []
    hook = model.h[0].self_attention.register_forward_hook(lambda _, args, output: seen.append(output[0].flatten()))
    columns, step = [], 1e-4
    with torch.no_grad():
        for view in parameters:
            flat = view.view(-1) if view.is_contiguous() else view
            for index in range(flat.numel()):
                kept = flat[index].clone()
                sides = []
                for sign in (1, -1):
                    flat[index] = kept + sign * step
                    seen.clear()
                    model(**batch())
                    sides.append(seen[0])
                flat[index] = kept
                columns.append((sides[0] - sides[1]) / (2 * step))
    hook.remove()
    sigma = torch.linalg.svdvals(torch.stack(columns, 1))
    small = int((sigma < 1e-6 * sigma[0]).sum())
    assert small == 0 or sigma[-small] * 100 < sigma[-small - 1]  # a gap, not a slope
    return small


def counted(model):
    """The counts of query-key, value-output and norm gauge at the first block, the last role by role."""
    anatomy = proved_anatomy(model, batch())
    channels = with_norms_before(model, anatomy, channels_of(model, anatomy, batch()), batch())[0]
    free = hidden_channels(channels)
    return (
        QueryKeyGauge.surviving(channels).dimension,
        ValueOutputGauge.surviving(channels).dimension,
        {"queries": HEADS * len(free["queries"]), "keys": len(free["keys"]), "values": len(free["values"])},
    )


@pytest.mark.parametrize(("beta", "query_key", "value_output"), [(0, 10, 6), (1, 6, 4)])
def test_the_counts_are_those_of_a_numerical_jacobian(beta, query_key, value_output):
    model = falcon(beta)
    attention = model.h[0].self_attention
    fused, rows = attention.query_key_value.weight, HEADS * HEAD_WIDTH + HEAD_WIDTH
    plain_pairs, plain_values, hidden = counted(model)
    assert (plain_pairs, plain_values) == (4, 4)
    assert kernel(model, [fused[:rows]]) == plain_pairs + hidden["queries"] + hidden["keys"] == query_key
    found = kernel(model, [fused[rows:], attention.dense.weight])
    assert found == plain_values + hidden["values"] == value_output


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("biases", [False, True])
def test_the_counts_are_the_closed_forms(beta, biases):
    pairs, values, hidden = counted(falcon(beta, biases))
    norm = "shifted" if beta else "centred"
    expected = heads.query_key_gauge_dimension(HEADS, GROUPS, HEAD_WIDTH, bias=biases, layer_norm=norm)
    assert pairs + hidden["queries"] + hidden["keys"] == expected
    expected = heads.gauge_dimension(
        GROUPS, HEAD_WIDTH, value_bias=biases, output_bias=biases, width=WIDTH, layer_norm=norm
    )
    assert values + hidden["values"] == expected


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("biases", [False, True])
def test_the_moves_change_weights_and_no_output(beta, biases):
    model = falcon(beta, biases)
    anatomy = proved_anatomy(model, batch())
    channels = with_norms_before(model, anatomy, channels_of(model, anatomy, batch()), batch())
    elements = drawn(NormGauge, channels[:1], torch.Generator().manual_seed(0))
    weight, plain = model.h[0].self_attention.query_key_value.weight, model(**batch()).last_hidden_state
    before = weight.detach().clone()
    with transformed(model, elements):
        assert (weight - before).norm() > 0.1 * before.norm()
        assert torch.allclose(model(**batch()).last_hidden_state, plain, atol=1e-9)
    assert torch.equal(weight, before)
    (site, element) = elements[0]
    twice = element.compose(element).compose(element.inverse())
    assert all(torch.allclose(twice.steps[role], element.steps[role]) for role in element.steps)
    if beta and not biases:  # queries would show it
        wrong = NormGauge({"queries": torch.ones(HEADS, HEAD_WIDTH).double()}, {"queries": element.normals["keys"]})
        with transformed(model, [(site, wrong)]):
            assert not torch.allclose(model(**batch()).last_hidden_state, plain, atol=1e-3)


def test_an_rms_norm_hides_nothing_and_something_added_after_the_norm_is_seen():
    llama = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    assert _reason(transformers.LlamaModel(llama).double().eval()).endswith(
        "a norm that subtracts no mean, which hides nothing"
    )
    model = falcon(0)
    model.h[0].input_layernorm = nn.Sequential(model.h[0].input_layernorm, nn.Linear(WIDTH, WIDTH).double())
    assert _reason(model) == "the keys read something else than the output of a norm alone"


def test_gains_with_zeros_are_not_counted():
    model = falcon(0)
    with torch.no_grad():
        model.h[0].input_layernorm.weight[1] = 0
    assert _reason(model) == "the keys read a layer norm whose gains have zeros, which hides other directions"


def _reason(model):
    anatomy = proved_anatomy(model, batch())
    channels = with_norms_before(model, anatomy, channels_of(model, anatomy, batch()), batch())[0]
    assert not channels.norms_before
    assert not NormGauge.surviving(channels).survives
    return channels.reasons["norm before keys"]
