"""Figures out of timings, and how far they can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from slmops.measuring.energy import SOURCE

MEDIANS = ("latency_ms_p50", "time_to_first_token_ms_p50", "tokens_per_s")
"""Figures of the requests whose spread between repeats is looked at."""


def summarize(requests: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Percentiles in milliseconds, and tokens per second of decoding (from the first token to the last)."""
    first = [request["first_s"] * 1000 for request in requests]
    total = [request["total_s"] * 1000 for request in requests]
    decoded = sum(max(request["num_tokens"] - 1, 0) for request in requests)
    decoding_s = sum(request["total_s"] - request["first_s"] for request in requests)
    percentiles = {
        f"{name}_ms_p{percent}": round(percentile(values, percent), 2)
        for name, values in (("time_to_first_token", first), ("latency", total))
        for percent in (50, 95, 99)
    }
    return percentiles | {
        "tokens_per_s": round(decoded / decoding_s, 1) if decoding_s > 0 else 0.0,
        "output_tokens_mean": round(sum(request["num_tokens"] for request in requests) / len(requests), 1),
    }


def summarize_repeats(repeats: Sequence[Mapping[str, Any]], noise_threshold: float) -> dict[str, Any]:
    """The facts of a measurement out of what the process reported each time.

    Percentiles are over the requests of all repeats. The spread of a figure is the coefficient of variation of the
    repeats' own: their standard deviation over their mean. One that is above `noise_threshold` makes the whole noisy.

    Args:
        repeats: what `slmops.measuring.worker` printed, with `cold_start_s`.
        noise_threshold: the largest spread of a quiet measurement.
    """
    each = [summarize(repeat["requests"]) for repeat in repeats]
    cold_starts = [repeat["cold_start_s"] * 1000 for repeat in repeats]
    spreads = {name: spread([figures[name] for figures in each]) for name in MEDIANS}
    spreads["cold_start_ms"] = spread(cold_starts)
    by_prompt, by_streams = _by_prompt(repeats), _by_streams(repeats)
    facts: dict[str, Any] = summarize([request for repeat in repeats for request in repeat["requests"]])
    facts |= {
        "num_requests": len(repeats[0]["requests"]),
        "num_repeats": len(repeats),
        "cold_start_ms": round(statistics.median(cold_starts), 1),
        "load_s": round(statistics.median(repeat["load_s"] for repeat in repeats), 3),
        "peak_rss_bytes": max(repeat["peak_rss_bytes"] for repeat in repeats),
        "peak_rss_bytes_max": max(repeat["peak_rss_bytes_max"] for repeat in repeats),
    }
    if by_prompt:
        facts["time_to_first_token_by_prompt"] = by_prompt
    if by_streams:
        facts["decode_by_streams"] = by_streams
    facts |= _energy(repeats)
    if len(repeats) > 1:
        spreads |= {f"time_to_first_token_ms at {e['prompt_tokens']} tokens": e["spread"] for e in by_prompt}
        spreads |= {f"tokens_per_s of {e['streams']} streams": e["spread"] for e in by_streams}
        noisy = [name for name, value in spreads.items() if value > noise_threshold]
        facts["spread"] = {name: spreads[name] for name in (*MEDIANS, "cold_start_ms")}
        facts |= {"noisy": bool(noisy), "noisy_figures": noisy}
    return facts


def spread(values: Sequence[float]) -> float:
    """Standard deviation (with n - 1) over the mean; 0 for a single value."""
    if len(values) < 2 or not (mean := statistics.fmean(values)):
        return 0.0
    return round(statistics.stdev(values) / mean, 4)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default (Hyndman and Fan 1996, type 7)."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _by_prompt(repeats: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    found = []
    for entries in zip(*(repeat["prompts"] for repeat in repeats), strict=True):
        times = [seconds * 1000 for entry in entries for seconds in entry["first_s"]]
        medians = [statistics.median(entry["first_s"]) for entry in entries]
        found.append(
            {
                "prompt_tokens": entries[0]["prompt_tokens"],
                "ms_p50": round(percentile(times, 50), 2),
                "ms_p95": round(percentile(times, 95), 2),
                "ms_p99": round(percentile(times, 99), 2),
                "spread": spread(medians),
            }
        )
    return found


def _by_streams(repeats: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    found = []
    for entries in zip(*(repeat["streams"] for repeat in repeats), strict=True):
        speeds = [entry["num_tokens"] / entry["seconds"] for entry in entries]
        found.append(
            {
                "streams": entries[0]["streams"],
                "tokens_per_s": round(statistics.median(speeds), 1),
                "spread": spread(speeds),
                "peak_rss_bytes": max(entry["peak_rss_bytes"] for entry in entries),
            }
        )
    return found


def _energy(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the whole processor, its idle power and what else runs included; nothing where it is not counted."""
    if any("energy_j" not in repeat for repeat in repeats):
        return {}
    num_tokens = sum(request["num_tokens"] for repeat in repeats for request in repeat["requests"])
    joules = sum(repeat["energy_j"] for repeat in repeats)
    return {"energy_j_per_token": round(joules / num_tokens, 4), "energy_source": SOURCE} if num_tokens else {}
