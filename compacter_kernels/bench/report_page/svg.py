"""SVG and HTML as text: elements, scales, axes, and marks that carry their words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


def tag(name: str, *children: str, **attributes: object) -> str:
    """Return an element. An underscore in the name of an attribute is a hyphen, class_ is class."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    return f"<{' '.join(words)}>{''.join(children)}</{name}>"


def mark(name: str, words: str, **attributes: object) -> str:
    """Return an element that a pointer or the keyboard can select; `words` describe it."""
    return tag(name, role="img", aria_label=words, **{"data_mark": "", **attributes})


def label(text: str, x: float, y: float, **attributes: object) -> str:
    """Return a text at a point."""
    return tag("text", escape(text), x=x, y=y, **attributes)


class Log(NamedTuple):
    """A logarithmic scale from the values low..high to the positions start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return the powers of ten, with 2 and 5 times these where there are few."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1.0,) if math.log10(self.high / self.low) > 2.5 else (1.0, 2.0, 5.0)
        found = [step * 10.0**exponent for exponent in exponents for step in steps]
        return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]


class Linear(NamedTuple):
    """A linear scale from 0..high to the positions start..end."""

    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        return self.start + value / self.high * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return about four round values."""
        step = 10.0 ** math.floor(math.log10(self.high / 2))
        while self.high / step > 5:
            step *= 2.5 if step in (2 * 10.0**e for e in range(-9, 12)) else 2
        return [step * i for i in range(int(self.high / step + 1e-9) + 1)]


def around(values: Sequence[float], margin: float = 1.15) -> tuple[float, float]:
    """Return limits of a logarithmic scale around the values."""
    return min(values) / margin, max(values) * margin


def number(value: float) -> str:
    """Return a number with three digits at most, and thousands as k."""
    if value >= 1e4:
        return f"{value / 1e3:,.0f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count(tokens: int) -> str:
    """Return a number of tokens, multiples of 1024 as k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart until each has the gap, in their order, between low and high."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved, last = [0.0] * len(positions), low - gap
    for index in order:
        moved[index] = last = max(positions[index], last + gap)
    last = high + gap
    for index in reversed(order):
        moved[index] = last = min(moved[index], last - gap)
    return moved


def chart(title: str, width: float, height: float, *children: str) -> str:
    """Return an SVG that takes the focus, so that the arrow keys can move among its marks."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="group",
        aria_label=f"{title}. Arrow keys move among the marks.",
        tabindex=0,
    )
