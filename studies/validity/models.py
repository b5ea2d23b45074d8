"""The healthy models of the validity benchmark: real ones, and small ones of seven kinds trained here on real text.

A model at its initialisation is no healthy model: its attention is nearly uniform, which is one of the collapses. So the
small ones are trained, byte by byte, on Python's own documentation, and kept under `.cache/validity`; between them they
have full, causal and windowed masks, layer and RMS norms before, after and beside the sublayers, learned and rotary
positions, shared key-value heads and query-key norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from studies import weights
from studies.language_models import corpus
from uncollapse import sources

CACHE = weights.CACHE / "validity"
BYTES, MASKED = 256, 256  # the byte values, and one token more for a masked byte
CONTEXT, BATCH, STEPS, RATE = 96, 16, 900, 3e-3
TOKENS = 64  # of a sequence, in the probes
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": BYTES + 1,
    "max_position_embeddings": 2 * CONTEXT,
}
DECODER = SHAPE | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """One healthy model. `open` gives it in evaluation mode with its batches; `about` says what it is, for the document."""

    about: str
    open: Callable[[], tuple[nn.Module, Batches]]
    is_real: bool = False
    is_healthy: bool = True
    scale: float = 1.0  # of the number of damaged places
    odd: dict[str, Callable[[], Batches]] = field(default_factory=dict)  # odd inputs, where the input is not text


def _trained(
    name: str, configuration: Callable[[], Any], *, is_causal: bool
) -> Callable[[], tuple[nn.Module, Batches]]:
    def opened() -> tuple[nn.Module, Batches]:
        import transformers

        torch.manual_seed(0)
        auto = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForMaskedLM
        model: nn.Module = auto.from_config(configuration())
        place = CACHE / "models" / f"{name}.safetensors"
        if not place.exists():
            loss = train(model, is_causal)
            print(f"{name}: trained, loss {loss:.2f} nats a byte", flush=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(model, str(place))
        safetensors.torch.load_model(model, str(place))
        base = model.base_model
        assert isinstance(base, nn.Module)
        return base.eval(), _windows(8, TOKENS)

    return opened


def _configured(kind: str, **settings: Any) -> Callable[[], Any]:
    def configuration() -> Any:
        import transformers

        return getattr(transformers, f"{kind}Config")(**settings)

    return configuration


def train(model: nn.Module, is_causal: bool, steps: int = STEPS) -> float:
    """Next bytes where the mask is causal, else bytes behind a mask; the loss of the last 50 steps."""
    training, _ = corpus()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(training) - CONTEXT - 1, (BATCH, 1), generator=generator)
        window = training[starts + torch.arange(CONTEXT + 1)]
        if is_causal:
            logits, targets = model(input_ids=window[:, :-1]).logits, window[:, 1:]
        else:
            hidden = torch.rand(BATCH, CONTEXT, generator=generator) < 0.15
            logits = model(input_ids=window[:, :-1].masked_fill(hidden, MASKED)).logits[hidden]
            targets = window[:, :-1][hidden]
        loss = functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return sum(losses[-50:]) / 50


@cache
def _held_out() -> Tensor:
    return corpus()[1]


def _windows(sequences: int, tokens: int) -> Batches:
    """Windows of text that the models never read, spread over all of it."""
    text = _held_out()
    starts = torch.arange(sequences)[:, None] * ((len(text) - tokens) // sequences)
    ids = text[starts + torch.arange(tokens)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def _real(place: Callable[[], str], sequences: int, texts: Callable[[], list[str] | None]) -> Callable[..., Any]:
    def opened() -> tuple[nn.Module, Batches]:
        loaded = sources.load_model(place(), dtype="float32")
        given = texts() or sources.default_texts(sequences, 0)
        batches = sources.tokenize(given[:sequences], loaded.tokenizer, max_tokens=TOKENS, batch_size=sequences)
        return loaded.model, batches

    return opened


def _untied_albert() -> tuple[nn.Module, Batches]:
    """RXNMapper's ALBERT with a copy of its one layer for each of its 12 runs: the same function, bit for bit, and a block
    of it can be damaged alone."""
    import transformers

    tied, batches = _real(lambda: str(weights.rxnmapper()), 8, _molecules)()
    configuration = transformers.AlbertConfig(**tied.config.to_dict() | {"num_hidden_groups": 12})
    model = transformers.AlbertModel(configuration, add_pooling_layer=tied.pooler is not None)
    shared = "encoder.albert_layer_groups."
    state = {k: v for k, v in tied.state_dict().items() if not k.startswith(shared)}
    for key, value in tied.state_dict().items():
        if key.startswith(f"{shared}0."):
            state |= {f"{shared}{i}.{key.removeprefix(f'{shared}0.')}": value.clone() for i in range(12)}
    model.load_state_dict(state)
    return model.eval(), batches


def _molecules() -> list[str]:
    from studies.pretrained import MOLECULES

    return list(sources.read_texts([MOLECULES]))


ANTIBODIES = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAKWGQGTLVTVSS",
    "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYGISWVRQAPGQGLEWMGWISAYNGNTNYAQKLQGRVTMTTDTSTSTAYMELRSLRSDDTAVYYCARDYWGQGTLVTVSS",
    "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCARGFDYWGQGTLVTVSS",
    "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYGMHWVRQAPGKGLEWVAVIWYDGSNKYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCARDLDYWGQGTLVTVSS",
)


def _antibodies(place: Callable[[], Path], first: Sequence[str], last: Sequence[str]) -> Callable[..., Any]:
    """On heavy chains of human germlines (IGHV3-23, 1-18, 4-59, 3-33, each with a short third loop), one token a residue, between
    the tokens that the model was trained with."""

    def opened() -> tuple[nn.Module, Batches]:
        import transformers

        folder = place()
        model = transformers.AutoModel.from_pretrained(folder).eval()
        words = {word: i for i, word in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").split())}
        texts = [[*first, *sequence, *last][:TOKENS] for sequence in ANTIBODIES]
        ids = torch.tensor([[words[word] for word in text] for text in texts])
        return model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    return opened


SECONDS, SAMPLES = 8, 16_000  # what Smart Turn hears at once, and its samples a second


def features(sound: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Whisper's features of sounds [sequence, sample], with the mask of the 400 frames that they become."""
    import transformers

    extractor = transformers.WhisperFeatureExtractor(chunk_length=SECONDS)
    found = extractor(
        list(sound().numpy()), sampling_rate=SAMPLES, return_tensors="pt", do_normalize=True
    ).input_features
    return {"input_features": found, "attention_mask": torch.ones(len(found), found.shape[-1] // 2, dtype=torch.long)}


def _speech() -> Tensor:
    """Two stretches of eight seconds of the one recording, of ten."""
    import wave

    import numpy

    with wave.open(str(weights.speech())) as file:
        samples = numpy.frombuffer(file.readframes(file.getnframes()), numpy.int16)
    sound = torch.from_numpy(samples.astype(numpy.float32)) / 2**15
    return torch.stack([sound[: SECONDS * SAMPLES], sound[-SECONDS * SAMPLES :]])


def _sounds(sound: Callable[[], Tensor]) -> Callable[[], Batches]:
    return lambda: [features(sound)]


OTHER_SOUNDS = {
    "silence": _sounds(lambda: torch.zeros(2, SECONDS * SAMPLES)),
    "white noise": _sounds(lambda: 0.1 * torch.randn(2, SECONDS * SAMPLES, generator=torch.Generator().manual_seed(0))),
    "half a second of speech over and over": _sounds(
        lambda: _speech()[:, SAMPLES : 3 * SAMPLES // 2].repeat(1, 2 * SECONDS)
    ),
}


def _smart_turn() -> tuple[nn.Module, Batches]:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder.from_pretrained(weights.smart_turn()).eval(), [features(_speech)]


PIXELS, PATCH = 224, 14  # the side of a picture that DINOv2 sees, and of a patch


def _seen(pictures: Tensor) -> Batches:
    """Pictures [picture, colour, height, width] from 0 to 1 as DINOv2 gets them: less ImageNet's mean, over its deviation.
    The mask is that of the patches and the class token."""
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    patches = (PIXELS // PATCH) ** 2
    mask = torch.ones(len(pictures), patches + 1, dtype=torch.long)
    return [{"pixel_values": (pictures - mean) / deviation, "attention_mask": mask}]


def _photographs() -> Tensor:
    bytes_ = [torch.tensor(weights.pixels(picture, PIXELS)) for picture in weights.pictures()]
    return torch.stack(bytes_).permute(0, 3, 1, 2).float() / 255


OTHER_PICTURES: dict[str, Callable[[], Batches]] = {
    "pictures of one colour": lambda: _seen(torch.tensor([0.2, 0.8])[:, None, None, None].expand(2, 3, PIXELS, PIXELS)),
    "one patch over and over": lambda: _seen(
        _photographs()[..., 96 : 96 + PATCH, 96 : 96 + PATCH].repeat(1, 1, PIXELS // PATCH, PIXELS // PATCH)
    ),
}


def dinov2_on_noise() -> tuple[nn.Module, dict[str, Tensor]]:
    """Noise in which every pixel is drawn alone, so that no patch shows anything that another does not."""
    noise = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    return _dinov2()[0], _seen(noise)[0]


def _dinov2() -> tuple[nn.Module, Batches]:
    import transformers

    return transformers.Dinov2Model.from_pretrained(weights.dinov2()).eval(), _seen(_photographs())


SUBJECTS: dict[str, Subject] = {
    "gemma3": Subject(
        "Gemma-3-270M: 18 blocks, RMS norms before and after each sublayer, query-key norms, causal, partly windowed, one "
        "key-value head, English",
        _real(lambda: str(weights.gemma3()), 2, lambda: None),
        is_real=True,
        scale=0.5,
    ),
    "iglm": Subject(
        "IgLM: 4 blocks of width 512, pre-norm, causal, learned positions, antibodies",
        _antibodies(lambda: weights.iglm("IgLM"), ("[HEAVY]", "[HUMAN]"), ()),
        is_real=True,
    ),
    "iglm-s": Subject(
        "IgLM-S: 3 blocks of width 192, pre-norm, causal, learned positions, antibodies",
        _antibodies(lambda: weights.iglm("IgLM-S"), ("[HEAVY]", "[HUMAN]"), ()),
        is_real=True,
    ),
    "antiberty": Subject(
        "AntiBERTy: a BERT of 8 blocks of width 512, post-norm, full mask, learned positions, antibodies",
        _antibodies(weights.antiberty, ("[CLS]",), ("[SEP]",)),
        is_real=True,
        scale=0.5,
    ),
    "sapiens": Subject(
        "Sapiens: a RoBERTa of 4 blocks of width 128, post-norm, full mask, learned positions, antibodies",
        _antibodies(weights.sapiens, ("<s>",), ("</s>",)),
        is_real=True,
    ),
    "smart-turn": Subject(
        "Smart Turn 3.2, speech: Whisper-tiny's encoder trained on, 4 blocks of width 384, pre-norm, full mask, sinusoids, 8 "
        "seconds in 400 frames",
        _smart_turn,
        is_real=True,
        scale=0.5,
        odd=OTHER_SOUNDS,
    ),
    "dinov2": Subject(
        "DINOv2-small, vision, trained on to find what a picture is about: 12 blocks of width 384, pre-norm with scaled updates, "
        "full mask, learned positions, 256 patches and a class token",
        _dinov2,
        is_real=True,
        scale=0.5,
        odd=OTHER_PICTURES,
    ),
    "mpnet": Subject(
        "all-mpnet-base-v2: 12 blocks, post-norm, full mask, relative position bias, English",
        _real(lambda: str(weights.mpnet()), 2, lambda: None),
        is_real=True,
        scale=0.5,
    ),
    "rxnfp": Subject(
        "rxnfp's BERT: 12 blocks of width 256, post-norm, full mask, chemical reactions",
        _real(lambda: str(weights.rxnfp()), 4, _molecules),
        is_real=True,
        scale=0.5,
    ),
    "albert": Subject(
        "RXNMapper's ALBERT: 12 blocks, post-norm, full mask, chemical reactions", _untied_albert, is_real=True
    ),
    "bert": Subject(
        "small BERT: post-norm, full mask, learned positions; its training never left the plateau",
        _trained("bert", _configured("Bert", **SHAPE), is_causal=False),
        is_healthy=False,
    ),
    "gpt2": Subject(
        "small GPT-2: pre-norm, causal, learned positions",
        _trained(
            "gpt2",
            _configured(
                "GPT2",
                n_embd=64,
                n_layer=4,
                n_head=4,
                n_inner=192,
                n_positions=2 * CONTEXT,
                vocab_size=BYTES + 1,
                bos_token_id=None,
                eos_token_id=None,
            ),
            is_causal=True,
        ),
    ),
    "llama": Subject(
        "small Llama: RMS pre-norm, causal, rotary, two heads per key-value head",
        _trained("llama", _configured("Llama", **DECODER, num_key_value_heads=2), is_causal=True),
    ),
    "minilm": Subject(
        "all-MiniLM-L6-v2, the demo: 6 blocks, post-norm, full mask, English",
        _real(lambda: "demo", 8, lambda: None),
        is_real=True,
    ),
    "mistral": Subject(
        "small Mistral: RMS pre-norm, a causal window of 16 tokens, rotary",
        _trained(
            "mistral", _configured("Mistral", **DECODER, num_key_value_heads=4, sliding_window=16), is_causal=True
        ),
    ),
    "modernbert": Subject(
        "small ModernBERT: pre-norm, full and windowed masks, rotary",
        _trained(
            "modernbert",
            _configured("ModernBert", **SHAPE, pad_token_id=0, global_attn_every_n_layers=2, local_attention=32),
            is_causal=False,
        ),
    ),
    "neox": Subject(
        "small GPT-NeoX: parallel attention and MLP, layer norms, causal, partly rotary",
        _trained("neox", _configured("GPTNeoX", **DECODER), is_causal=True),
    ),
    "qwen3": Subject(
        "small Qwen3: RMS pre-norm, causal, rotary, query-key norms",
        _trained("qwen3", _configured("Qwen3", **DECODER, num_key_value_heads=2, head_dim=16), is_causal=True),
    ),
    "smollm2": Subject(
        "SmolLM2-135M-Instruct: 30 blocks, RMS pre-norm, causal, rotary, three heads per key-value head, English",
        _real(lambda: str(weights.smollm2()), 2, lambda: None),
        is_real=True,
        scale=0.5,
    ),
}
