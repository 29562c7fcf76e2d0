"""Where teacher and distilled student are not right on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

from slmops.compare.rows import OUTCOMES, Outcome, Rows
from slmops.compare.subjects import Role


@dataclass(frozen=True)
class Disagreements:
    """How many rows of each outcome, and whether the split of those that differ can be chance."""

    counts: dict[Outcome, int]
    p_value: float | None
    """Of the exact test of McNemar 1947, doi:10.1007/BF02295996, two-sided; None if no row differs."""

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Stratum:
    """The accuracy of each subject on the rows of one group."""

    name: str
    num_rows: int
    accuracy: dict[Role, float]

    @property
    def difference(self) -> float:
        """Of the distilled student from its teacher."""
        return self.accuracy["distilled"] - self.accuracy["teacher"]


def disagreements(rows: Rows) -> Disagreements:
    """Count who of teacher and distilled student was right."""
    from scipy.stats import binomtest

    teacher, distilled = rows.correct["teacher"], rows.correct["distilled"]
    found: dict[Outcome, int] = {
        "only_teacher": int((teacher & ~distilled).sum()),
        "only_distilled": int((distilled & ~teacher).sum()),
        "neither": int((~teacher & ~distilled).sum()),
        "both": int((teacher & distilled).sum()),
    }
    counts = {outcome: found[outcome] for outcome in OUTCOMES}
    num_different = counts["only_teacher"] + counts["only_distilled"]
    p_value = float(binomtest(counts["only_distilled"], num_different).pvalue) if num_different else None
    return Disagreements(counts, p_value)


def by_stratum(rows: Rows) -> list[Stratum]:
    """All strata, first those where teacher and distilled student differ most; none if there is only one."""
    import numpy as np

    names, members = np.unique(np.array(rows.strata, dtype=object), return_inverse=True)
    if len(names) < 2:
        return []
    num_rows = np.bincount(members)
    shares = {role: np.bincount(members, weights=correct) / num_rows for role, correct in rows.correct.items()}
    strata = [
        Stratum(str(name), int(num_rows[at]), {role: float(share[at]) for role, share in shares.items()})
        for at, name in enumerate(names)
    ]
    return sorted(strata, key=lambda stratum: (-abs(stratum.difference), -stratum.num_rows, stratum.name))
