"""Scores of `evaluation.json` as a table to read."""

from collections.abc import Mapping
from typing import Any


def rows(scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(name, value with its spread, value of the real texts, protocol)."""
    return [
        (
            name.replace("_", " "),
            number(score["value"]) + (f" ± {number(score['spread'])}" if "spread" in score else ""),
            number(score["real"]) if "real" in score else "",
            score["protocol"],
        )
        for name, score in scores.items()
    ]


def lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table as text."""
    cells = [("", "generated", "real", "protocol"), *rows(scores)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {real:>{widths[2]}}  {protocol}".rstrip()
        for name, value, real, protocol in cells
    ]


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
