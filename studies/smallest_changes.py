"""The table of docs/monitoring.md: how small a change `compare` can find at 1 % false alarms, by phenomenon.

    python -m studies.smallest_changes           the packaged MiniLM; some minutes

One model is diagnosed on many probes of disjoint texts. Whatever two of these differ by is noise. `needed`: the change by which 99
of 100 places of two probes differ less. `called`: how often `compare` says that something moved, though nothing did. `estimated`:
the smallest change that a comparison itself states, from the two probes alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
from collections import defaultdict
from pathlib import Path

import torch

import uncollapse as uc
from uncollapse import sources
from uncollapse.judgement.comparison import head_changes, site_changes, smallest
from uncollapse.records.comparison import Change
from uncollapse.records.diagnosis import DiagnosisRecord

PAGE = Path(__file__).resolve().parents[1] / "docs" / "monitoring.md"
BEGIN, END = "<!-- smallest changes -->", "<!-- end -->"
PROBES, SEQUENCES, TOKENS = 8, 32, 128
PHENOMENA = {
    "consensus_after_norm": "depth: consensus distance after a norm",
    "effective_rank": "depth: effective rank",
    "value_contraction": "width: spread that a head keeps",
    "key_share": "width: share of the keys that a head uses",
    "rest_entropy": "entropy: a head's, without the strongest key",
    "max_logit": "entropy: a head's largest logit",
}


def diagnosed() -> list[DiagnosisRecord]:
    """The model on every probe. Texts are dealt out, so that no two probes share one."""
    texts = sources.default_texts(PROBES * SEQUENCES, 0)
    random.Random(0).shuffle(texts)
    return [
        uc.diagnose("demo", texts[n * SEQUENCES : (n + 1) * SEQUENCES], max_tokens=TOKENS).record for n in range(PROBES)
    ]


def rows(records: list[DiagnosisRecord]) -> list[str]:
    """A line of the table for each measure."""
    noise: dict[str, list[float]] = defaultdict(list)
    called: dict[str, list[bool]] = defaultdict(list)
    estimated: dict[str, list[float]] = defaultdict(list)
    for one, other in itertools.combinations(records, 2):
        changes: list[Change] = [
            *site_changes(one.trajectory, other.trajectory, same_probe=False),
            *head_changes(one.attention, other.attention, same_probe=False),
        ]
        for change in changes:
            if change.before > 0 and change.after > 0:
                noise[change.measure].append(abs(math.log(change.after / change.before)))
                called[change.measure].append(change.moved)
        for measure, share in smallest(changes).items():
            estimated[measure].append(share)
    lines = []
    for measure, words in PHENOMENA.items():
        needed = math.exp(statistics.quantiles(noise[measure], n=100)[98]) - 1
        share = statistics.fmean(called[measure])
        lines.append(f"| {words} | {needed:.0%} | {statistics.median(estimated[measure]):.0%} | {share:.1%} |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    head = "| phenomenon and figure | needed | estimated by `compare` | called a move |\n|---|---|---|---|\n"
    table = head + "\n".join(rows(diagnosed()))
    print(table)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
