"""What a training run leaves behind for people to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MAX_CURVE_POINTS = 200


@dataclass
class Curves:
    """Points are (step, value)."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    """Mean loss per token of each step."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """Mean cross-entropy per token on held-out rows."""
    metric: list[tuple[int, float]] = field(default_factory=list)
    """Share of held-out rows that are answered right, where that is asked for."""
    num_tokens: int = 0
    """Tokens that were not padding, over all steps."""
    seconds: float = 0.0
    """Time in training steps, over all resumed runs."""
    stopped_early: bool = False
    """Whether held-out rows got no better for so long that the rest was left out."""

    @property
    def best(self) -> tuple[int, float]:
        """The first of the lowest losses on held-out rows."""
        return min(self.validation, key=lambda point: point[1])

    @property
    def num_stale_validations(self) -> int:
        """How many validations there were since the best."""
        return sum(step > self.best[0] for step, _ in self.validation)

    def facts(self) -> dict[str, object]:
        """The curves thinned to what a plot can show, and their ends."""
        stride = math.ceil(len(self.loss) / MAX_CURVE_POINTS) or 1
        facts: dict[str, object] = {
            "loss_curve": _rounded(self.loss[::stride]),
            "validation_curve": _rounded(self.validation),
            "num_steps": len(self.loss),
            "num_tokens": self.num_tokens,
            "tokens_per_s": round(self.num_tokens / max(self.seconds, 1e-9), 1),
            "stopped_early": self.stopped_early,
        }
        if self.validation:  # of several processes, the first one measures it
            facts["validation_loss"] = round(self.validation[-1][1], 5)
        if self.loss:
            facts["final_loss"] = round(self.loss[-1][1], 5)
        if self.metric:
            facts |= {"metric_curve": _rounded(self.metric), "metric": round(self.metric[-1][1], 5)}
        return facts


def _rounded(points: list[tuple[int, float]]) -> list[list[float]]:
    return [[step, round(value, 5)] for step, value in points]
