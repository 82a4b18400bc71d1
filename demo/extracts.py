"""Replaces the summaries to learn from by the words of their sources that are nearest to them.

python demo/extracts.py DIRECTORY NEW

DIRECTORY holds train.jsonl, valid.jsonl and test.jsonl, lines of {"source", "target"}. In NEW the
targets of train and valid are successive words of their sources, of 3 to 12 among the first 22
those that have the highest F1 with the target in words; rows where that is below .3 are left out.
test.jsonl is copied. A model trained on NEW learns to choose and to copy, which takes far fewer
steps than to write, and is tested with the summaries as they were. Needs Python alone.
"""

import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

FIRST, SHORTEST, LONGEST = 22, 3, 12
LEAST = 0.3


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z0-9]+", text.lower()))


def f1(left: Counter[str], right: Counter[str]) -> float:
    return 2 * (left & right).total() / max(1, left.total() + right.total())


def extract(source: str, target: str) -> tuple[float, str]:
    """The words nearest to the target, the first ones and the fewest if several are; their F1."""
    found, wanted = source.split()[:FIRST], words(target)
    parts = (
        " ".join(found[begin : begin + count])
        for begin in range(len(found))
        for count in range(SHORTEST, min(LONGEST, len(found) - begin) + 1)
    )
    return max(
        ((f1(words(part), wanted), part.strip(" .,;:")) for part in parts),
        key=lambda scored: scored[0],
        default=(0.0, ""),
    )


def rows(path: Path) -> list[dict[str, str]]:
    """Those of a file that have an extract, with it as their target."""
    made = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                score, target = extract(row["source"], row["target"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SystemExit(
                    f'error: {path}:{number}: not a line of {{"source", "target"}}'
                ) from error
            if score >= LEAST:
                made.append({"source": row["source"], "target": target})
    return made


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    old, new = map(Path, sys.argv[1:])
    if new.exists():
        raise SystemExit(f"error: {new} is there already: delete it or name another directory")
    partial = new.with_name(f".{new.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill left
        partial.mkdir(parents=True)
        shutil.copy(old / "test.jsonl", partial)
        for name in ("train", "valid"):
            made = rows(old / f"{name}.jsonl")
            print(f"{name}: {len(made):,} rows")
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        os.rename(partial, new)
    except OSError as error:
        raise SystemExit(f"error: {error.filename}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
