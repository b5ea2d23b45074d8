"""Ask the package about thousands of random small Transformers, and count what it says.

    python -m studies.random_models --count 10000 --jobs 2                      resumable; a tenth of a second a model
    python -m studies.random_models --count 10000 --document docs/page.md       the table, between the markers of a page
    python -m studies.random_models --seed 17                                   one model, and every difference
    python -m studies.random_models --seed 17 --causes 1                        and which of its pieces are to blame
    python -m studies.random_models --count 300 --causes 20                     the same of the first 20 faulty ones

Every model is one line of JSON in .cache/random_models, in a file of its own for every state of the code: a run that was
interrupted goes on where it stopped, and a changed package begins anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.random_models import counting
from studies.random_models.comparing import VERDICTS, compared
from studies.random_models.describing import described, odd_pieces
from studies.random_models.drawing import specification
from studies.random_models.reducing import causes
from studies.random_models.running import ROOT, fingerprint, run


def explain(seed: int) -> None:
    """One model: its specification, its source and every item that is not right."""
    spec = specification(seed)
    print(described(spec))
    result = compared(spec)
    print(f"\n{result.verdict}, {result.seconds:.2f} s, {len(result.items)} items")
    for item in result.items:
        if item.verdict != "right":
            print(f"  {item.verdict:12} {item.name}: {item.detail}")


def explain_causes(seeds: list[int], verdict: str) -> None:
    """The fewest odd pieces with which each of these models is still read like that."""
    for seed in seeds:
        for kind, smaller in causes(specification(seed), verdict).items():
            pieces = ", ".join(f"{name}={choice}" for name, choice in odd_pieces(smaller).items())
            print(f"seed {seed}: {kind}: {pieces or 'nothing odd: the sizes'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="of models")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--seed", type=int, help="explain this one model instead")
    parser.add_argument(
        "--causes", type=int, default=0, help="of that many faulty models, the fewest pieces that are to blame"
    )
    parser.add_argument("--verdict", default="wrong", choices=VERDICTS[1:], help="what --causes calls a fault")
    parser.add_argument("--document", type=Path, help="write the table between the markers of this page")
    parser.add_argument("--out", type=Path, help="the file of lines (default: in .cache/random_models)")
    options = parser.parse_args()
    if options.seed is not None:
        explain(options.seed)
        if options.causes:
            explain_causes([options.seed], options.verdict)
        return
    path = options.out or ROOT / ".cache" / "random_models" / f"{fingerprint()}.jsonl"
    lines = run(list(range(options.start, options.start + options.count)), options.jobs, path)
    print(counting.by_piece(lines), counting.by_item(lines), sep="\n\n")
    for verdict in ("wrong", "refused", "unavailable"):
        print(f"\nThe commonest of what is {verdict}:\n{counting.reasons(lines, verdict)}")
    print("\n" + counting.table(lines))
    wrong = [line["seed"] for line in lines if line["verdict"] == "wrong"]
    if wrong:
        print(f"\nSilently wrong: seeds {', '.join(map(str, wrong[:30]))}{' …' if len(wrong) > 30 else ''}")
    faulty = [line["seed"] for line in lines if any(item[1] == options.verdict for item in line["items"])]
    explain_causes(faulty[: options.causes], options.verdict)
    if options.document is not None:
        counting.put_between_markers(options.document, counting.table(lines))


if __name__ == "__main__":
    main()
