"""`verify`: what was checked of the claims, as a result that can be shown, drawn and written like any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uncollapse import claims as checks
from uncollapse.analyses.result import Recorded
from uncollapse.records.ledger import ClaimResult, Ledger


@dataclass(frozen=True, repr=False)
class Verification(Recorded[Ledger]):
    """What `verify` checked. `record` has all of it, as data."""

    @property
    def claims(self) -> list[ClaimResult]:
        """Each claim with its statement, its verdict and the evidence."""
        return self.record.claims


def verify(
    claims: Sequence[str] | None = None,
    *,
    trials: int = 200,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Check the named claims (default: all). See `uncollapse.claims.verify`, which gives the bare ledger.

    `trials` scales how many random cases each check draws, and `seed` fixes them: the same seed gives the same ledger, bit for bit.
    `progress` is called with (claim id, claims done, total) before each claim and once after the last.

    >>> verify(["layernorm-affine-rank"], trials=20).claims[0].verdict
    'refuted as stated'

    Raises `InputError` for an unknown claim, for `trials` outside 1 to 100,000 and for a seed outside 0 to 2^32 - 1.
    """
    return Verification(checks.verify(claims, trials=trials, seed=seed, progress=progress))
