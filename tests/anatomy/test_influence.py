"""Axes, sequences, masks and ids by influence, against layouts that the tests know because they wrote the models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional

import uncollapse as uc
from tests.helpers.observing import observe, site_table
from uncollapse.anatomy.examples import example_batch
from uncollapse.anatomy.influence import stream_axes, without_zeros
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import StreamAxes
from uncollapse.probe.passes import Observations
from uncollapse.probe.sites import PLAIN_MEASURES, STREAM_MEASURES

WIDTH, HEADS = 24, 4
CONSENSUS = PLAIN_MEASURES.index("consensus_distance")
Order = Literal["batch token", "token batch", "width last grid", "width first", "width first grid", "end to end"]
AXES: dict[str, StreamAxes] = {
    "batch token": StreamAxes(0, (1,), 2),
    "token batch": StreamAxes(1, (0,), 2),
    "width last grid": StreamAxes(0, (1, 2), 3),
    "width first": StreamAxes(0, (2,), 1),
    "width first grid": StreamAxes(0, (2, 3), 1),
    "end to end": StreamAxes(None, (0,), 1),
}


class Sublayers(nn.Module):
    """A pre-norm block on [batch, token, width], whatever order the stream around it has."""

    def __init__(self, order: Order, zero: bool = False, is_causal: bool = False) -> None:
        super().__init__()
        self.order, self.is_causal = order, is_causal
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def attend(self, x: Tensor, hide: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        allowed = None if hide is None else ~hide.bool()[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, allowed, is_causal=self.is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, stream: Tensor, hide: Tensor | None = None) -> Tensor:
        shape = stream.shape
        stream = stream + self.give(self.attend(self.take(stream), hide), shape)
        return stream + self.give(self.down(functional.gelu(self.up(self.after(self.take(stream))))), shape)

    def take(self, stream: Tensor) -> Tensor:
        if self.order == "token batch":
            return stream.transpose(0, 1)
        if self.order == "width last grid":
            return stream.flatten(1, 2)
        if self.order in {"width first", "width first grid"}:
            return stream.flatten(2).transpose(1, 2)
        if self.order == "end to end":
            return stream.unsqueeze(0)
        return stream

    def give(self, x: Tensor, shape: torch.Size) -> Tensor:
        if self.order == "token batch":
            return x.transpose(0, 1)
        if self.order in {"width first", "width first grid"}:
            x = x.transpose(1, 2)
        return x.reshape(shape)


class Model(nn.Module):
    def __init__(self, order: Order = "batch token", **options: Any) -> None:
        super().__init__()
        self.order = order
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Sublayers(order, **options) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, token, 5]; the grid is 2 x token/2."""
        stream = self.embed(x)
        if self.order == "token batch":
            stream = stream.transpose(0, 1)
        elif self.order == "width last grid":
            stream = stream.unflatten(1, (2, -1))
        elif self.order == "width first":
            stream = stream.transpose(1, 2)
        elif self.order == "width first grid":
            stream = stream.transpose(1, 2).unflatten(2, (2, -1))
        elif self.order == "end to end":
            stream = stream.flatten(0, 1)
        for block in self.blocks:
            stream = block(stream)
        return stream


def seeded(build: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build().eval()


def consensus(clouds: Any) -> float:
    """The mean consensus distance of a list of clouds [token, width], in NumPy."""
    return float(np.mean([np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x) for x in (np.asarray(c) for c in clouds)]))


def column(observed: Observations, measure: str) -> list[float]:
    return [float(site.stream.summary(STREAM_MEASURES.index(measure))[0]) for site in observed.sites]


def test_a_poked_stream_lies_in_memory_as_the_stream_does() -> None:
    """A product in half precision is rounded otherwise where its operand lies otherwise, and every sequence then seems to move."""
    stream = torch.randn(3, 7, WIDTH).bfloat16().transpose(0, 1)
    weight, seen = torch.randn(WIDTH, WIDTH).bfloat16(), set[tuple[int, ...]]()

    def update(given: Tensor) -> Tensor:
        seen.add(given.stride())
        return functional.linear(given + given.cumsum(0), weight)

    assert stream_axes(update, stream, "it")[0] == AXES["token batch"]
    assert seen == {stream.stride()}


@pytest.mark.parametrize("order", [o for o in AXES if o != "end to end"])
@pytest.mark.parametrize(
    "sizes", [(3, 10), (WIDTH, 6), (2, WIDTH), (4, 4)], ids=["plain", "batch=width", "tokens=width", "equal"]
)
def test_every_order_of_the_axes_gives_the_figures_of_the_plain_one(order: Order, sizes: tuple[int, int]) -> None:
    model, plain = seeded(lambda: Model(order)), seeded(Model)
    batch = {"x": torch.randn(*sizes, 5)}
    assert {b.axes for b in proved_anatomy(model, batch).blocks} == {AXES[order]}
    got, expected = observe(model, [batch]), observe(plain, [batch])
    assert (got.sequences, got.tokens, got.max_tokens) == (sizes[0], sizes[0] * sizes[1], sizes[1])
    assert [s.width for s in got.sites] == [WIDTH] * 3
    assert site_table(got) == pytest.approx(site_table(expected), rel=1e-4, nan_ok=True)


def test_sequences_laid_end_to_end_are_told_apart_by_what_they_reach() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Linear(5, WIDTH), Sublayers("end to end")

        def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
            stream = self.embed(rows)
            sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
            self.block.hidden = sequence[:, None] != sequence
            return self.block(stream)

    def attend(self: Sublayers, x: Tensor, hide: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, ~self.hidden)
        return self.out(mixed.transpose(1, 2).flatten(2))

    model = seeded(Packed)
    model.block.attend = attend.__get__(model.block)
    lengths = [4, 9, 3]
    batch = {"rows": torch.randn(16, 5), "lengths": torch.tensor(lengths)}
    seen: list[Tensor] = []
    hook = model.block.register_forward_hook(lambda _m, _i, output: seen.append(output.detach().double()))
    model(**batch)
    hook.remove()
    observed = observe(model, [batch])
    assert (observed.sequences, observed.tokens, observed.max_tokens) == (3, 16, 9)
    assert site_table(observed)[1, CONSENSUS] == pytest.approx(consensus(seen[0].split(lengths)), rel=1e-5)


def test_a_stream_whose_axes_cannot_be_told_has_no_figures_but_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Frames(nn.Module):
        """Frames of a film, each attending within itself: neither axis of [film, frame, token, width] moves along the other."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Linear(5, WIDTH), Sublayers("batch token")
            self.block.take = lambda stream: stream.flatten(0, 1)  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.embed(x))

    batches, page = [{"x": torch.randn(3, 2, 7, 5)}], tmp_path / "page.html"
    found = uc.diagnose(seeded(Frames), batches=batches)
    for site in found.trajectory:
        assert site.consensus_distance is None
        assert "the attention reaches along none of the axes [0, 1]" in site.unavailable["consensus_distance"]
    probe = found.record.probe
    assert (probe.sequences, probe.tokens, probe.max_tokens) == (None, None, None)
    assert {"the attention reaches along none of the axes [0, 1]" in why for why in probe.unavailable.values()} == {
        True
    }
    assert probe.unavailable.keys() == {"sequences", "tokens", "max_tokens"}
    said = "sequences that could not be counted (the attention reaches along none of the axes [0, 1]"
    for result in (found, uc.compare(found, found), uc.ablate(seeded(Frames), batches=batches, without=[("mlp",)])):
        result.to_html(page)
        assert said in " ".join(page.read_text().split())
    capsys.readouterr()
    found.show()
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("write", ["add_", "+=", "copy_", "out="])
def test_what_a_product_reads_is_looked_at_before_it_is_written_to(write: str) -> None:
    """The stream itself is what the first product reads, and then the sum is put into its place. As many tokens as features."""
    torch.manual_seed(0)
    project, out = nn.Linear(6, 18), nn.Linear(6, 6)

    def update(stream: Tensor) -> Tensor:
        x = stream.clone()
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in project(x).chunk(3, -1))
        added = out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        if write == "add_":
            x.add_(added)
        elif write == "+=":
            x += added
        elif write == "copy_":
            x.copy_(x + added)
        else:
            torch.add(x, added, out=x)
        return added

    with torch.no_grad():
        assert stream_axes(update, torch.randn(4, 6, 6), "the block") == (StreamAxes(0, (1,), 2), "")


# Zeros ----------------------------------------------------------------------------------------------------------------


def test_nothing_is_decided_on_parameters_that_are_zero_at_the_start() -> None:
    batch = {"x": torch.randn(3, 8, 5)}
    for is_causal in (False, True):
        model = seeded(lambda causal=is_causal: Model(zero=True, is_causal=causal))
        anatomy = proved_anatomy(model, batch)
        assert {b.axes for b in anatomy.blocks} == {AXES["batch token"]}
        assert {p.is_causal for b in anatomy.blocks for p in b.parts if p.attention} == {is_causal}


def test_zero_parameters_are_replaced_by_copies_and_come_back() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    weight, bias = layer.weight, layer.bias
    with without_zeros(layer):
        assert layer.weight is not weight
        assert bool(layer.weight.any())
        assert layer.bias is bias
    assert layer.weight is weight
    with pytest.raises(KeyError), without_zeros(layer):
        raise KeyError
    assert layer.weight is weight
    assert not bool(weight.any())


# Masks ----------------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A mask that is true for padding, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList([Sublayers("batch token") for _ in range(2)])

    def forward(self, words: Tensor, hide: Tensor, flag: bool = False) -> Tensor:
        stream = self.embed(words)
        for block in self.blocks:
            stream = block(stream, hide)
        return stream


@pytest.mark.parametrize("form", ["dict", "tuple", "flagged"])
def test_a_mask_that_is_true_for_padding_is_understood_however_it_is_given(form: str) -> None:
    model, words = seeded(Masked), torch.randint(1, 50, (3, 9))
    hide = torch.zeros(3, 9, dtype=torch.bool)
    hide[0, 4:] = hide[2, 7:] = True
    batch: Any = {"words": words, "hide": hide}
    batch = {"dict": batch, "tuple": (words, hide), "flagged": {**batch, "flag": False}}[form]
    record = uc.diagnose(model, batches=[batch]).record
    with torch.no_grad():
        output = model(words, hide).double()
    clouds = [row[~gone] for row, gone in zip(output, hide, strict=True)]
    assert (record.probe.sequences, record.probe.tokens, record.probe.max_tokens) == (3, 20, 9)
    assert record.trajectory[-1].consensus_distance is not None
    assert record.trajectory[-1].consensus_distance.mean == pytest.approx(consensus(clouds), rel=1e-5)
    distinct = [len(set(row[~gone].tolist())) for row, gone in zip(words, hide, strict=True)]
    assert record.trajectory[0].distinct_tokens is not None
    assert record.trajectory[0].distinct_tokens.mean == pytest.approx(np.mean(distinct))


def test_a_mask_that_governs_nothing_hides_nothing() -> None:
    class Ignores(Masked):
        def forward(self, words: Tensor, hide: Tensor, flag: bool = False) -> Tensor:
            return super().forward(words, torch.zeros_like(hide))

    hide = torch.zeros(3, 9, dtype=torch.bool)
    hide[0, 4:] = True
    observed = observe(seeded(Ignores), [{"words": torch.randint(1, 50, (3, 9)), "hide": hide}])
    assert observed.tokens == 27


def test_padding_in_samples_is_found_in_frames() -> None:
    config = tf.Wav2Vec2Config(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, feat_extract_norm="layer",
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
    )  # fmt: skip
    model = seeded(lambda: tf.Wav2Vec2Model(config))
    mask = torch.ones(3, 400, dtype=torch.long)
    mask[0, 200:] = mask[2, 320:] = 0
    batch = {"input_values": torch.randn(3, 400) * mask, "attention_mask": mask}
    with torch.no_grad():
        output = model(**batch).last_hidden_state
    frames = model._get_feature_vector_attention_mask(output.shape[1], mask).bool()
    observed = observe(model, [batch])
    assert observed.tokens == int(frames.sum()) < frames.numel()
    seen: list[Tensor] = []
    hook = model.encoder.layers[-1].register_forward_hook(
        lambda _m, _i, output: seen.append(next(tensors_in(output)).double())
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    clouds = [row[real] for row, real in zip(seen[0], frames, strict=True)]
    assert site_table(observed)[-1, CONSENSUS] == pytest.approx(consensus(clouds), rel=1e-4)


def test_each_tower_has_its_own_embedding_mask_and_ids() -> None:
    words = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**words, "vocab_size": 100, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
    config = tf.CLIPConfig(
        text_config=text, vision_config={**words, "image_size": 24, "patch_size": 8}, projection_dim=16
    )
    model = seeded(lambda: tf.CLIPModel(config))
    ids = torch.randint(3, 100, (2, 10))  # as many words as patches and class token
    ids[0, -1] = ids[1, 5] = 2
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 24, 24)}
    anatomy = proved_anatomy(model, batch)
    of = {anatomy.blocks[s.blocks[0]].module.name.split("_")[0]: s for s in anatomy.stacks}
    assert ([m.tensor for m in of["text"].masks], of["text"].ids) == (["attention_mask"], "input_ids")
    assert (of["vision"].masks, of["vision"].ids) == ((), None)
    observed = observe(model, [batch])
    assert [s.site for s in observed.sites if s.block is None] == ["embedding", "embedding.2"]
    alone = model.text_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    clouds = [row[real].detach().double() for row, real in zip(alone[0], mask.bool(), strict=True)]
    first = next(i for i, s in enumerate(observed.sites) if s.block == of["text"].blocks[0]) - 1
    assert site_table(observed)[first, CONSENSUS] == pytest.approx(consensus(clouds), rel=1e-4)


@pytest.mark.parametrize("is_own", [False, True])
def test_a_stream_that_is_made_of_more_than_the_one_before_is_a_stack_of_its_own(is_own: bool) -> None:
    class Captions(nn.Module):
        """Patches run through a block; what a learned map makes of them stands before words, or is all that comes next."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.words, self.between = (
                nn.Linear(5, WIDTH),
                nn.Embedding(50, WIDTH),
                nn.Linear(WIDTH, WIDTH),
            )
            self.blocks = nn.ModuleList([Sublayers("batch token") for _ in range(2)])

        def forward(self, image: Tensor, words: Tensor) -> Tensor:
            seen = self.between(self.blocks[0](self.patches(image)))
            return self.blocks[1](torch.cat([seen, self.words(words)], 1) if is_own else seen)

    batch = {"image": torch.randn(3, 6, 5), "words": torch.randint(50, (3, 8))}
    anatomy = proved_anatomy(seeded(Captions), batch)
    assert [s.blocks for s in anatomy.stacks] == ([(0,), (1,)] if is_own else [(0, 1)])


def test_labels_govern_no_encoder_and_their_decoder_has_no_padding() -> None:
    config = tf.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = seeded(lambda: tf.T5ForConditionalGeneration(config))
    ids, labels = torch.randint(3, 100, (2, 12)), torch.randint(3, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], 1)
    told = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shifted}
    stacks = proved_anatomy(model, batch).stacks
    assert [(s.name, [m.tensor for m in s.masks]) for s in stacks] == [("encoder", ["attention_mask"]), ("decoder", [])]
    assert site_table(observe(model, [batch])) == pytest.approx(
        site_table(observe(model, [told])), rel=1e-5, nan_ok=True
    )


def test_token_types_and_positions_are_no_token_numbers() -> None:
    config = tf.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        type_vocab_size=4,
    )
    model = seeded(lambda: tf.BertModel(config))
    ids = torch.randint(1, 60, (3, 9))
    beside = {"token_type_ids": torch.randint(4, (3, 9)), "position_ids": torch.arange(9).expand(3, 9)}
    vectors = {"inputs_embeds": torch.randn(3, 9, 32), **beside}
    assert math.isnan(column(observe(model, [vectors]), "distinct_tokens")[0])
    expected = np.mean([len(set(row.tolist())) for row in ids])
    assert column(observe(model, [{**beside, "input_ids": ids}]), "distinct_tokens")[0] == pytest.approx(expected)


def test_other_inputs_than_those_of_the_proof_are_looked_at_again() -> None:
    model, words = seeded(Masked), torch.randint(1, 50, (3, 9))

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, words: Tensor, hide: Tensor | None = None) -> Tensor:
            return self.inner(words, torch.zeros_like(words) if hide is None else hide)

    outer = Optional().eval()
    assert observe(outer, [{"words": words}]).tokens == 27
    hide = torch.zeros(3, 9, dtype=torch.long)
    hide[1, 5:] = 1
    assert observe(outer, [{"words": words, "hide": hide}]).tokens == 23


# The example ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_example_has_sizes_of_its_own_and_real_tokens_only(side: str) -> None:
    ids = torch.arange(16 * 12).reshape(16, 12) + 1
    mask = torch.ones_like(ids)
    for row in range(16):
        gone = 1 + row % 5
        mask[row, slice(None, gone) if side == "left" else slice(12 - gone, None)] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask, "features": torch.randn(16, 3, 12), "flag": True}
    cut = example_batch(batch)
    assert cut["input_ids"].shape == cut["attention_mask"].shape == (3, 7)
    assert bool((cut["input_ids"] > 0).all())
    assert cut["features"].shape[0] == 3
    assert cut["flag"] is True
    single = example_batch({"input_ids": ids[:1]})
    assert single["input_ids"].shape == (2, 7)
    assert not torch.equal(single["input_ids"][0], single["input_ids"][1])


def test_token_first_numbers_and_their_mask_are_cut_to_the_same_places() -> None:
    ids = torch.arange(12 * 5).reshape(12, 5)
    mask = torch.arange(5 * 12).reshape(5, 12)
    cut = example_batch({"src": ids, "mask": mask})
    assert cut["src"].shape == cut["mask"].shape[::-1]


def test_what_half_precision_rounds_off_in_other_sequences_is_no_influence() -> None:
    """Autocast: a product of bfloat16, its result in float32, is rounded in another way when another sequence changes."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def update(stream: Tensor) -> Tensor:
        made = (stream.bfloat16() @ weight).float()
        return made.cumsum(1) * (1 + 2.0**-8 * torch.sin(1e4 * stream.sum()))

    stream = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    axes, _ = stream_axes(update, stream, "a block")
    assert axes == StreamAxes(0, (1,), 2)


class Torchs(nn.Module):
    """torch's own layers behind a mask that the caller gives, as in torch's documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        layer = nn.TransformerEncoderLayer(24, 3, 48, 0.0, batch_first=True)
        self.layers = nn.ModuleList(type(layer)(24, 3, 48, 0.0, batch_first=True) for _ in range(2))

    def forward(self, src_mask: Tensor, src: Tensor) -> Tensor:
        x = self.embed(src)
        for layer in self.layers:
            x = layer(x, src_mask=src_mask)
        return x


def test_a_square_mask_that_comes_first_is_not_taken_for_the_sequences() -> None:
    torch.manual_seed(0)
    model = Torchs().eval()
    one, five = (
        {"src_mask": torch.ones(n, n).triu(1).bool(), "src": torch.randint(30, (sequences, n))}
        for sequences, n in ((1, 13), (5, 8))
    )
    assert {name: tuple(value.shape) for name, value in example_batch(one).items()} == {
        "src_mask": (7, 7),
        "src": (2, 7),
    }
    together = uc.diagnose(model, batches=[one, five]).record.heads
    fresh = Torchs().eval()
    fresh.load_state_dict(model.state_dict())
    apart = [uc.diagnose(fresh, batches=[five]).record.heads, uc.diagnose(model, batches=[one]).record.heads]
    for both, (first, second) in zip(together, zip(*apart, strict=True), strict=True):
        assert both.energy_share is not None
        assert first.energy_share is not None
        assert second.energy_share is not None
        for share, of_five, of_one in zip(
            both.energy_share, first.energy_share or [], second.energy_share or [], strict=True
        ):
            assert share.mean == pytest.approx((5 * of_five.mean + of_one.mean) / 6, rel=1e-5)
