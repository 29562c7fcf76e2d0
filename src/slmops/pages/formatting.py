"""Numbers as people read them: three digits, a unit, and a dash for what was not measured."""

from __future__ import annotations

NOTHING = "–"
NBSP = "\u00a0"


def digits3(value: float) -> str:
    """Three significant digits without an exponent: 0.0412, 6.43, 158, 1,560."""
    if value == 0:
        return "0"
    size = abs(value)
    decimals = next((n for n, bound in enumerate((99.95, 9.995, 0.9995, 0.09995, 0.009995)) if size >= bound), 5)
    return f"{value:,.{decimals}f}"


def share(value: float | None) -> str:
    """0.898 → 89.8 %."""
    return NOTHING if value is None else f"{100 * value:.1f}{NBSP}%"


def less(saved: float | None) -> str:
    """0.898 → 89.8 % less; -0.2 → 20.0 % more."""
    return NOTHING if saved is None else f"{share(abs(saved))} {'less' if saved >= 0 else 'more'}"


def fraction(value: float | None) -> str:
    """0.94666 → 0.947."""
    return NOTHING if value is None else f"{value:.3f}"


def plain(value: float | None) -> str:
    return NOTHING if value is None else digits3(value)


def count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def many(value: float | None) -> str:
    """Parameters and tokens: 49,600,000 → 49.6 M."""
    if value is None:
        return NOTHING
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= bound:
            return f"{digits3(value / (1e3 if unit == 'k' else bound))}{NBSP}{unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 35,123,456 → 35.1 MB."""
    if value is None:
        return NOTHING
    for bound, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= bound:
            return f"{digits3(value / bound)}{NBSP}{unit}"
    return f"{value:,.0f}{NBSP}B"


def milliseconds(value: float | None) -> str:
    """158 → 158 ms; 1560 → 1.56 s."""
    if value is None:
        return NOTHING
    return f"{digits3(value)}{NBSP}ms" if value < 999.5 else f"{digits3(value / 1000)}{NBSP}s"


def tokens_per_s(value: float | None) -> str:
    return NOTHING if value is None else f"{digits3(value)}{NBSP}tok/s"


def seconds(value: float) -> str:
    """4.2 → 4.2 s; 200 → 3 min 20 s; 3900 → 1 h 05 min."""
    if value < 59.95:
        return f"{value:.1f}{NBSP}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min{NBSP}{rest:02d}{NBSP}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NBSP}h{NBSP}{minutes:02d}{NBSP}min"


def ratio(value: float | None, reference: float | None) -> str:
    """How `value` compares with `reference`: 9.8× less, 1.2× more, the same."""
    if not value or not reference or value < 0 or reference < 0:
        return ""
    times = max(value / reference, reference / value)
    if times < 1.005:
        return "the same"
    shown = f"{times:.2f}" if times < 9.995 else digits3(times)
    return f"{shown}×{NBSP}{'less' if value < reference else 'more'}"


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, with … where some are left out."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
