"""The figures of healthy models, which stand beside those of a page: `python -m studies.references`.

Each healthy model of `studies/validity` is diagnosed once, as it is and on its own text, and the lowest and highest value of each
figure over its places are written to `src/uncollapse/report/healthy.json`. That text has few sequences; the clouds of the corpus
are those of the larger texts of `studies.corpus_geometry`, for the models that have one there. What is measured already is not
measured again, unless a model is named (`python -m studies.references minilm`) or all are asked for (`--anew`).

A pooling of the model's own that was trained is in none of them: the poolers of MiniLM and of RXNMapper's ALBERT have the numbers
of an initialisation, with biases of 0. What stands for it is what sentence encoders take from such models: the mean of the output's
tokens, and its first token (the last, where the mask is causal, since the first sees nothing but itself there).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

import uncollapse as uc
from studies import corpus_geometry
from studies.validity.models import SUBJECTS, Subject
from uncollapse.analyses.recording import corpus_records
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.corpus import CorpusStatistics, Rows
from uncollapse.probe.passes import Watched, capture
from uncollapse.probe.sites import SiteStatistics
from uncollapse.records.diagnosis import Pooling
from uncollapse.report.healthy import HealthyModel, corpus_figures, figures, is_causal

PLACE = Path(__file__).resolve().parents[1] / "src/uncollapse/report/healthy.json"


def measured(name: str, subject: Subject) -> HealthyModel:
    """The ranges of one model."""
    model, batches = subject.open()
    record = uc.diagnose(model, batches=batches, level="full", name=name).record
    ranges = _ranges(figures(record))
    causal = is_causal(record)
    assert causal is not None, f"{name}: nothing says whether it is causal"
    return HealthyModel(name, subject.about, causal, record.model.norm_placement, ranges)


def clouds(name: str) -> dict[str, list[float]]:
    """The ranges of the clouds of the corpus in one model of `studies.corpus_geometry`."""
    model, batches = corpus_geometry.MODELS[name][1]()
    anatomy = proved_anatomy(model, batches[0])
    found: dict[str, list[float]] = {}
    watched: tuple[set[Watched], ...] = ({"corpus", "few tokens"}, {"all tokens"})
    for watch in watched:
        observed = capture(model, batches, anatomy, watch=watch)
        found |= corpus_figures(corpus_records(observed.corpus))
    return _ranges(found)


@torch.no_grad()
def pooled_outputs(name: str, *, causal: bool) -> dict[str, list[float]]:
    """The ranges of the same model's output with every sequence as a point: the mean of its states, and that of one token. They go
    by the name of a pooling of the model's own."""
    model, batches = corpus_geometry.MODELS[name][1]()
    poolings: tuple[Pooling, ...] = ("mean", "last" if causal else "first")
    clouds = [CorpusStatistics(SiteStatistics(pooling, None, None), "own", None) for pooling in poolings]
    for batch in batches:
        x = getattr(model, "base_model", model)(**batch).last_hidden_state
        rows = Rows.of(x, batch["attention_mask"].bool())
        for pooling, cloud in zip(poolings, clouds, strict=True):
            points = rows.pooled(x, pooling)
            cloud.take(points, torch.rand(len(points), dtype=torch.float64), torch.finfo(x.dtype).eps)
    return _ranges(corpus_figures(corpus_records(clouds)))


def _ranges(found: dict[str, list[float]]) -> dict[str, list[float]]:
    return {figure: [_rounded(min(values)), _rounded(max(values))] for figure, values in found.items()}


def _rounded(value: float) -> float:
    assert math.isfinite(value)
    return float(f"{value:.3g}")


def _has(model: HealthyModel, part: str) -> bool:
    return any(figure.startswith(part) for figure in model.ranges)


def write(models: list[HealthyModel], place: Path = PLACE) -> None:
    """One model on a few lines, so that a change can be read."""
    text = json.dumps([asdict(model) for model in models], indent=1, ensure_ascii=False)
    place.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    healthy = [name for name, subject in SUBJECTS.items() if subject.is_healthy]
    parser.add_argument("models", nargs="*", choices=[[], *healthy], help="measure these again")
    parser.add_argument("--anew", action="store_true", help="measure every model again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = {}
    if PLACE.exists():  # with --anew too: one that is broken off leaves the others as they were
        known = {each["name"]: HealthyModel(**each) for each in json.loads(PLACE.read_text(encoding="utf-8"))}
    for name, subject in SUBJECTS.items():
        if name in given.models or (subject.is_healthy and (given.anew or name not in known)):
            known[name] = measured(name, subject)
        elif name not in known or name not in corpus_geometry.MODELS or _has(known[name], "corpus.own."):
            continue
        if name in corpus_geometry.MODELS:
            found = {} if _has(known[name], "corpus.mean.") else clouds(name)
            found |= pooled_outputs(name, causal=known[name].causal)
            known[name] = replace(known[name], ranges=known[name].ranges | found)
        write([known[each] for each in SUBJECTS if each in known])
        print(f"{name}: {len(known[name].ranges)} figures", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
