"""How far apart the tokens of a stream are to whoever reads it: what the rules on depth, and the benchmark that plants damage in
depth, hold against the embedding.

When not to use it: for the stream itself. Its figures stand in the records of the sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.records.diagnosis import SiteRecord


@dataclass(frozen=True)
class Read:
    """How far apart the tokens of a site are to whoever reads them: the consensus distance, its share of that at the embedding, and
    the norm that was asked, as the end of a sentence."""

    site: SiteRecord
    distance: float
    share: float
    by: str = ""


def as_read(sites: Sequence[SiteRecord]) -> list[Read]:
    """The sites of a stack as their readers see them: after the norm that sees the tokens farthest apart, with its gain and shift,
    wherever norms were met. Elsewhere every token is scaled to unit length, as a norm without a gain would.

    Behind the last block of a stack that norms read otherwise there may be none. Then the tokens count as apart if they are in
    either way, scaled or as they stand: it is not known what comes after."""
    seen = [(s, s.clearest_reader) for s in sites]
    is_read = bool(seen) and seen[0][1] is not None
    found: list[Read] = []
    for site, reader in seen:
        scaled = None if site.consensus_after_norm is None else site.consensus_after_norm.mean
        if is_read and reader is not None and reader.consensus is not None:
            distance = reader.consensus.mean
            start = found[0].distance if found else distance
            found.append(Read(site, distance, distance / max(start, 1e-12), f", as {reader.norm} gives them on"))
        elif scaled is not None and not (is_read and reader is not None):
            first = sites[0].consensus_after_norm
            shares = [scaled / max(first.mean, 1e-12)] if first is not None else [1.0]
            if is_read and site.consensus is not None and sites[0].consensus is not None:
                shares.append(site.consensus.mean / max(sites[0].consensus.mean, 1e-12))
            found.append(Read(site, scaled, max(shares)))
    return found
