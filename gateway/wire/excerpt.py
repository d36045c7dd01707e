"""Foreign text in our errors: short, on one line, printable. A message may hold a megabyte of it."""

from __future__ import annotations

EXCERPT_LENGTH_MAX = 120


def excerpt(value: object) -> str:
    """`repr` of a value that came from outside, shortened; lone surrogates and control signs escaped."""
    return _shortened(ascii(value[: EXCERPT_LENGTH_MAX + 1]) if isinstance(value, str) else ascii(value))


def reason(error: BaseException) -> str:
    """What a library says of foreign input, shortened: it may repeat the input."""
    text = str(error)[: EXCERPT_LENGTH_MAX * 2]
    return _shortened("".join(sign if sign.isprintable() else "?" for sign in text) or type(error).__name__)


def _shortened(text: str) -> str:
    return text if len(text) <= EXCERPT_LENGTH_MAX else f"{text[: EXCERPT_LENGTH_MAX - 1]}…"
