"""The best of several texts by minimum Bayes risk.

    (1) argmax over candidates y of the mean over the others y' of u(y, y'),  u the F1 of ROUGE-L

The text that the others agree with most (Kumar and Byrne 2004), as the diffusion papers choose
among their samples.
"""

from collections.abc import Sequence


def best(candidates: Sequence[str]) -> str:
    """Equation (1); the first of equals."""
    from rouge_score import rouge_scorer  # loads SciPy's statistics, which takes a second

    scorer = rouge_scorer.RougeScorer(["rougeL"])
    total = [0.0] * len(candidates)
    for i, one in enumerate(candidates):
        for j, other in enumerate(candidates[:i]):
            agreement = scorer.score(one, other)["rougeL"].fmeasure
            total[i] += agreement
            total[j] += agreement
    return candidates[max(range(len(candidates)), key=total.__getitem__)]
