"""Energy of the processor's packages, where the machine counts it (RAPL, through the kernel's powercap)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
SOURCE = "rapl"


@dataclass(frozen=True)
class Reading:
    """Counters of the packages at one moment, in microjoules, and where each begins again from zero."""

    packages: tuple[tuple[str, int, int], ...]

    def joules_until(self, later: Reading) -> float:
        """What all packages took from this reading to a later one; a counter may have begun again once."""
        before = {name: value for name, value, _ in self.packages}
        spent = sum((value - before[name]) % (largest + 1) for name, value, largest in later.packages)
        return spent / 1e6


def read(powercap: Path = POWERCAP) -> Reading | None:
    """The counters; None where there are none, or this user may not read them."""
    packages = []
    try:
        for zone in sorted(powercap.iterdir()):
            # Zones below a package (intel-rapl:0:1) are parts of it; `psys` counts the packages once more.
            name = (zone / "name").read_text().strip() if re.fullmatch(r"intel-rapl:\d+", zone.name) else ""
            if name.startswith("package"):
                value, largest = (int((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj"))
                packages.append((zone.name, value, largest))
    except (OSError, ValueError):
        return None
    return Reading(tuple(packages)) if packages else None
