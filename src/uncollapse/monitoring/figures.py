"""What is kept of a look: a list of figures for each measure, and the same as a flat dict for whoever draws curves.

The names of the flat dict are stable. `uncollapse/block.3/consensus_distance` is a figure of the stream behind block 3,
`uncollapse/block.3/rest_entropy` that of the block's worst head, `uncollapse/block.3/head.2/rest_entropy` that of head 2.
`uncollapse/worst/rest_entropy` is the worst of all, with `.../block` and `.../head` beside it. `uncollapse/margin/ENTROPY-FROZEN`
is the largest margin of a rule: ln(threshold / distance), above 0 where it fires.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from uncollapse.records.figures import WORST_IS_LARGEST
from uncollapse.records.trail import HeadPlace, SitePlace, TrailReading

PREFIX: Final = "uncollapse"


def flat(
    reading: TrailReading, sites: Sequence[SitePlace], heads: Sequence[HeadPlace], *, each_head: bool = True
) -> dict[str, float]:
    """A reading as a flat dict of floats; what was not measured is left out."""
    found: dict[str, float] = {}
    for measure, values in reading.sites.items():
        measured = [(v, s) for v, s in zip(values, sites, strict=True) if v is not None]
        found |= {f"{PREFIX}/{site.site}/{measure}": value for value, site in measured}
        blocks = [(v, s) for v, s in measured if s.block is not None]
        if blocks:
            value, site = _worst(measure)(blocks, key=lambda pair: pair[0])
            found[f"{PREFIX}/worst/{measure}"] = value
            found[f"{PREFIX}/worst/{measure}/block"] = float(site.block or 0)
    for measure, values in reading.heads.items():
        measured_heads = [(v, h) for v, h in zip(values, heads, strict=True) if v is not None]
        if not measured_heads:
            continue
        worst = _worst(measure)
        by_block: dict[str, list[tuple[float, HeadPlace]]] = {}
        for value, head in measured_heads:
            by_block.setdefault(_attention(head), []).append((value, head))
            if each_head:
                found[f"{_attention(head)}/head.{head.head}/{measure}"] = value
        for name, several in by_block.items():
            found[f"{name}/{measure}"] = worst(several, key=lambda pair: pair[0])[0]
        value, head = worst(measured_heads, key=lambda pair: pair[0])
        found[f"{PREFIX}/worst/{measure}"] = value
        found[f"{PREFIX}/worst/{measure}/block"] = float(head.block)
        found[f"{PREFIX}/worst/{measure}/head"] = float(head.head)
    for key, margin in reading.margins.items():
        name = f"{PREFIX}/margin/{key.partition('/')[0]}"
        found[name] = max(margin, found.get(name, margin))
    return found


def _attention(head: HeadPlace) -> str:
    return f"{PREFIX}/block.{head.block}" + ("/cross" if head.kind == "cross" else "")


def _worst(measure: str) -> Callable[..., Any]:
    return max if measure in WORST_IS_LARGEST else min
