"""The eight runs of norm × residual × MLP, and Dong et al.'s four variants, on whole models."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import uncollapse as uc
from studies import weights
from uncollapse import sources
from uncollapse.anatomy.probing import float64_kept, probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.streams import met

MOLECULES = Path(__file__).with_name("molecules.txt")


@dataclass(frozen=True)
class Subject:
    """One model of the grid: how to open it, and what the document says of it and of its text."""

    title: str
    about: str
    command: str
    arguments: Callable[[], dict[str, Any]]


def _bert_base() -> dict[str, Any]:
    """`bert-base-uncased` as it starts its training; it shares its vocabulary with the demo, which lends its tokenizer."""
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).double().eval()
    tokenizer = sources.load_model("demo").tokenizer
    return {"model": model, "tokenizer": tokenizer, "sequences": 8, "name": "BERT-base, random initialisation"}


def _mpnet() -> dict[str, Any]:
    """12 passages of 96 tokens: long enough that every offset of the relative bias occurs."""
    texts = sources.default_texts(72, 0)
    passages = [" ".join(texts[i : i + 6]) for i in range(0, 72, 6)]
    return {
        "model": weights.mpnet(),
        "texts": passages,
        "max_tokens": 96,
        "dtype": "float64",
        "batch_size": 4,
        "name": "all-mpnet-base-v2",
    }


def _gemma3() -> dict[str, Any]:
    """With its vocabulary of 262,144 the logits of 4 sequences take half a gigabyte in float64."""
    return {
        "model": weights.gemma3(),
        "sequences": 12,
        "max_tokens": 64,
        "dtype": "float64",
        "batch_size": 4,
        "name": "Gemma-3-270M",
    }


SUBJECTS = {
    "mpnet": Subject(
        "all-mpnet-base-v2 (trained sentence encoder of BERT-base's size, post-norm, relative position bias, 12 blocks)",
        "12 passages of English prose, 96 tokens each.",
        "uncollapse ablate .cache/weights/mpnet --grid --dtype float64 --max-tokens 96",
        _mpnet,
    ),
    "minilm": Subject(
        "all-MiniLM-L6-v2 (trained sentence encoder, post-norm, 6 blocks)",
        "64 paragraphs of English prose.",
        "uncollapse ablate demo --grid --dtype float64",
        lambda: {"model": "demo", "dtype": "float64", "name": "all-MiniLM-L6-v2"},
    ),
    "albert": Subject(
        "RXNMapper's ALBERT (trained on chemical reactions, one shared layer run 12 times)",
        "24 molecules and reactions as SMILES (`studies/molecules.txt`), the kind of text it was trained on.",
        "uncollapse ablate .cache/weights/rxnmapper --grid --dtype float64 --text studies/molecules.txt",
        lambda: {
            "model": weights.rxnmapper(),
            "texts": sources.read_texts([MOLECULES]),
            "dtype": "float64",
            "name": "RXNMapper's ALBERT",
        },
    ),
    "smollm2": Subject(
        "SmolLM2-135M-Instruct (trained decoder, pre-norm, causal, 30 blocks)",
        "16 paragraphs of English prose. The weights are expanded from 4 bits and carry that noise.",
        "uncollapse ablate .cache/weights/smollm2 --grid --dtype float64 --sequences 16",
        lambda: {"model": weights.smollm2(), "sequences": 16, "dtype": "float64", "name": "SmolLM2-135M-Instruct"},
    ),
    "gemma3": Subject(
        "Gemma-3-270M (trained decoder, norms before and after each sublayer, norms on queries and keys, causal, 18 blocks)",
        "12 paragraphs of English prose. The weights are expanded from 4 bits and carry that noise.",
        "uncollapse ablate .cache/weights/gemma3 --grid --dtype float64 --sequences 12 --max-tokens 64",
        _gemma3,
    ),
    "bert-base": Subject(
        "BERT-base, random initialisation (seed 0, post-norm, 12 blocks)",
        "8 paragraphs of English prose.",
        "uncollapse ablate bert-base-uncased --grid --dtype float64",
        _bert_base,
    ),
}


def grid(key: str) -> dict[str, Any]:
    """The ablation record of one subject, as plain data."""
    found: dict[str, Any] = json.loads(uc.ablate(grid=True, **SUBJECTS[key].arguments()).to_json())
    return found


def noted(key: str) -> dict[str, Any] | None:
    """MiniLM once more on passages of exactly 100 tokens, the length that docs/theory.md notes its values for."""
    if key != "minilm":
        return None
    texts = sources.default_texts(60, 0)
    passages = [" ".join(texts[i : i + 6]) for i in range(0, 60, 6)]
    combinations = [("residual",), ("mlp",), ("residual", "mlp"), ("norm", "residual", "mlp")]
    ablation = uc.ablate("demo", passages, max_tokens=100, dtype="float64", without=combinations)
    found: dict[str, Any] = json.loads(ablation.to_json())
    return found


def each_alone(key: str) -> list[dict[str, float]] | None:
    """RXNMapper's ALBERT without norms, residuals and MLPs, one sequence at a time: a mean can hide that most are at the floor."""
    if key != "albert":
        return None
    loaded = sources.load_model(str(weights.rxnmapper()), dtype="float64")
    found = []
    for text in sources.read_texts([MOLECULES]):
        runs = uc.ablate(loaded.model, [text], tokenizer=loaded.tokenizer, without=[("norm", "residual", "mlp")]).runs
        last = runs[-1].trajectory[-1]
        assert last.consensus_distance is not None
        assert last.affine_rank is not None
        found.append({"consensus": last.consensus_distance.mean, "affine_rank": last.affine_rank.mean})
    return found


# What positions in the logits do to the rate ---------------------------------------------------------------------------------


def _t5() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """T5-small's encoder as it starts its training, but with a bias table as large as trained ones are (standard deviation 1)."""
    import transformers

    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(num_layers=8)).double().eval()
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        table.normal_()
    return model, [{"input_ids": torch.randint(2, 32000, (4, 96))}]


def _mpnet_and_text() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    given = _mpnet()
    loaded = sources.load_model(str(given["model"]), dtype="float64")
    return loaded.model, sources.tokenize(given["texts"], loaded.tokenizer, max_tokens=96, batch_size=4)


BIASED: dict[str, Callable[[], tuple[nn.Module, list[dict[str, Tensor]]]]] = {
    "all-mpnet-base-v2, trained": _mpnet_and_text,
    "T5-small's encoder, initialisation": _t5,
}


def positions() -> list[dict[str, Any]]:
    """Without residuals, with the relative bias as it is and with its table at zero: distances along depth, what attention keeps at
    consensus, and the second eigenvalue of each head's own pattern softmax(B)."""
    found = []
    for name, opened in BIASED.items():
        model, batches = opened()
        for table in ("as it is", "zero"):
            weights_of = [m.weight for path, m in model.named_modules() if path.endswith("relative_attention_bias")]
            if table == "zero":
                with torch.no_grad():
                    for weight in weights_of:
                        weight.zero_()
            record = uc.ablate(model, batches=batches, without=[("residual",)]).record
            run = json.loads(uc.Ablation(record).to_json())["runs"][1]
            found.append(
                {
                    "model": name,
                    "table": table,
                    "run": run,
                    "contraction_at_consensus": record.contraction_at_consensus,
                    "second_eigenvalues": _second_eigenvalues(model, batches[0]["input_ids"]),
                }
            )
    return found


def _second_eigenvalues(model: nn.Module, ids: Tensor) -> list[float]:
    """|lambda_2| of P = softmax(B) of each head, at the length of these sequences: the largest eigenvalue of CP."""
    encoder: Any = model.encoder
    if hasattr(encoder, "compute_position_bias"):
        bias = encoder.compute_position_bias(ids[..., None].double())[0]
    else:
        bias = encoder.block[0].layer[0].SelfAttention.compute_bias(ids.shape[1], ids.shape[1])[0]
    patterns = bias.double().softmax(-1).detach()
    centred = patterns - patterns.mean(-2, keepdim=True)
    alive = centred.norm(dim=(-2, -1)) > 1e-12  # else equal rows, and no eigenvalues to look for in rounding
    return [
        float(torch.linalg.eigvals(one).abs().max()) if some else 0.0 for one, some in zip(centred, alive, strict=True)
    ]


# Dong et al.'s four variants -------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, ...]] = {
    "attention only": ("attention-residual", "mlp"),
    "with MLP": ("attention-residual",),
    "with skip": ("mlp",),
    "whole": (),
}


def composite_norm(x: Tensor) -> Tensor:
    """sqrt(||X||_1 · ||X||_inf) of [..., token, width]: Dong et al.'s gauge. Largest column sum and largest row sum of |X|."""
    return (x.abs().sum(-2).amax(-1) * x.abs().sum(-1).amax(-1)).sqrt()


def residual_ratio(x: Tensor) -> Tensor:
    """||X − 1·mean(X)ᵀ|| / ||X|| in that gauge, the mean over tokens."""
    return composite_norm(x - x.mean(-2, keepdim=True)) / composite_norm(x)


def ratios(model: nn.Module, batches: list[dict[str, Tensor]], removed: tuple[str, ...]) -> list[float]:
    """The mean ratio after each block. Batches hold sequences of equal length, so that no padding is in the way."""
    anatomy = proved_anatomy(model, batches[0])
    sums = [0.0] * len(anatomy.blocks)

    with contextlib.ExitStack() as stack:
        if removed:
            stack.enter_context(uc.without(model, *removed))

        def add(number: int, stream: Tensor) -> None:
            axes = anatomy.blocks[number].axes
            cloud = stream if axes is None else axes.cloud(stream)
            sums[number] += float(residual_ratio(cloud.double()).sum())

        places = [(block.exit, functools.partial(add, number)) for number, block in enumerate(anatomy.blocks)]
        stack.enter_context(met(model, places))
        stack.enter_context(float64_kept(model))
        stack.enter_context(probing(model))
        for batch in batches:
            model(**batch)
    sequences = sum(len(b["input_ids"]) for b in batches)
    return [s / sequences for s in sums]


def equal_lengths(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same sequences grouped by length, without padding and without a mask."""
    by_length: dict[int, list[Tensor]] = {}
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            by_length.setdefault(int(mask.sum()), []).append(ids[mask])
    return [{"input_ids": torch.stack(rows)} for rows in by_length.values()]


def _passages(count: int) -> list[dict[str, Tensor]]:
    """`count` passages of 128 tokens of English prose, in the vocabulary of BERT."""
    texts = sources.default_texts(count * 5, 0)
    joined = [" ".join(texts[i : i + 5]) for i in range(0, len(texts), 5)]
    batches = equal_lengths(sources.tokenize(joined, sources.load_model("demo").tokenizer, max_tokens=128))
    return [{"input_ids": part} for batch in batches for part in batch["input_ids"].split(8)]


def _molecules() -> list[dict[str, Tensor]]:
    tokenizer = sources.load_model(str(weights.rxnmapper())).tokenizer
    return equal_lengths(sources.tokenize(sources.read_texts([MOLECULES]), tokenizer, max_tokens=128))


def _at_initialisation(kind: str, seed: int) -> nn.Module:
    """The base size of each family as it starts its training. ALBERT and XLNet get BERT's vocabulary, which lends its text."""
    import transformers

    torch.manual_seed(seed)
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    xlnet = {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072}
    configuration = {
        "bert": lambda: transformers.BertConfig(),
        "albert": lambda: transformers.AlbertConfig(vocab_size=30522, **base),
        "xlnet": lambda: transformers.XLNetConfig(vocab_size=30522, **xlnet),
    }[kind]()
    model: nn.Module = transformers.AutoModel.from_config(configuration).eval()
    return model


@dataclass(frozen=True)
class Compared:
    """A model beside one that was published: how to make it from a seed, from which seeds, and the text."""

    counterpart: str
    model: Callable[[int], nn.Module]
    text: Callable[[], list[dict[str, Tensor]]]
    seeds: tuple[int, ...] = (0,)


DONG = {
    "MiniLM, trained": Compared("BERT, trained", lambda _: sources.load_model("demo").model, lambda: _passages(32)),
    "RXNMapper's ALBERT, trained": Compared(
        "ALBERT, trained", lambda _: sources.load_model(str(weights.rxnmapper())).model, _molecules
    ),
    **{
        f"{name}-base, initialisation": Compared(
            f"{name}, initialisation",
            functools.partial(_at_initialisation, name.lower()),
            lambda: _passages(4),
            (0, 1, 2),
        )
        for name in ("BERT", "ALBERT", "XLNet")
    },
}


def dong() -> dict[str, Any]:
    """The ratio after each block of each model, without what each variant is without: one list a seed."""
    found: dict[str, Any] = {}
    for name, compared in DONG.items():
        text = compared.text()
        by_variant: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
        for seed in compared.seeds:
            model = compared.model(seed)
            for variant, removed in VARIANTS.items():
                by_variant[variant].append(ratios(model, text, removed))
        sequences = sum(len(b["input_ids"]) for b in text)
        found[name] = {"counterpart": compared.counterpart, "sequences": sequences, "ratios": by_variant}
    return found
