"""What a score is: a value together with all that is needed to get it again."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Flag = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Score:
    """One score of a set of texts.

    Attributes:
      value: the score.
      flags: every choice that changes the value: models, versions, lengths, seeds.
      spread: standard deviation of the value over `spread_over`, such as "seeds" or "blocks";
        None where there was only one.
      real: the same score of the reference texts, where they can be scored the same way.
    """

    value: float
    flags: Mapping[str, Flag]
    spread: float | None = None
    spread_over: str = ""
    real: float | None = None

    def signature(self) -> str:
        """The flags in one line, for a table or a paper."""
        return "|".join(f"{name}:{_show(value)}" for name, value in self.flags.items())

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"value": self.value}
        if self.spread is not None:
            entry |= {"spread": self.spread, "spread_over": self.spread_over}
        if self.real is not None:
            entry["real"] = self.real
        return entry | {"flags": dict(self.flags), "signature": self.signature()}


# Parts of a set of texts of which each is left out in turn.
JACKKNIFE_GROUPS = 10
JACKKNIFE = f"standard error, jackknife of {JACKKNIFE_GROUPS} groups of texts"


def jackknife(statistic: Callable[[np.ndarray], float], count: int) -> float | None:
    """The standard error of a statistic of a whole set of texts, such as BLEU.

    `statistic` is given the indices of the texts to use. With G groups of every G-th text, of
    which each is left out once, it is sqrt((G - 1) / G sum (s_g - mean s)^2) (Efron, 1982). None
    for fewer texts than groups.
    """
    groups = JACKKNIFE_GROUPS
    if count < groups:
        return None
    indices = np.arange(count)
    values = [statistic(indices[indices % groups != g]) for g in range(groups)]
    return float(np.sqrt(groups - 1) * np.std(values))


def mean(values: Sequence[float], what: str = "texts") -> dict[str, Any]:
    """Value and spread of a mean over texts, as arguments of `Score`."""
    spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {
        "value": float(np.mean(values)),
        "spread": spread,
        "spread_over": f"standard error of the mean over {what}",
    }


def _show(value: Flag) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
