"""Scores of `evaluation.json` as a table to read."""

from collections.abc import Mapping
from typing import Any


def rows(scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(name, value with its spread, value of the real texts, protocol)."""
    return [
        (
            name.replace("_", " "),
            value(score),
            number(score["real"]) if "real" in score else "",
            score["protocol"],
        )
        for name, score in scores.items()
    ]


def value(score: Mapping[str, Any]) -> str:
    """The value of a score, with its spread if it has one."""
    spread = f" ± {number(score['spread'])}" if "spread" in score else ""
    return number(score["value"]) + spread


def lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table as text."""
    cells = [("", "generated", "real", "protocol"), *rows(scores)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {ours:>{widths[1]}}  {real:>{widths[2]}}  {protocol}".rstrip()
        for name, ours, real, protocol in cells
    ]


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
