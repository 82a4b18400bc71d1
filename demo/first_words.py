"""A summary without a model: the first words of each source, as many as references have on average.

python demo/first_words.py SAMPLES > FILE.jsonl

SAMPLES is the `samples.jsonl` of a conditional run. The lines written are those of SAMPLES with
another `text`, for `python -m cosmos_jax.evaluate --texts=FILE.jsonl --protocol=rouge`.
"""

import json
import statistics
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("error: needs one argument, the samples.jsonl of a run")
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text("utf-8").splitlines()]
    if not rows or "source" not in rows[0]:
        sys.exit(f"error: {sys.argv[1]} holds no sources: the run is not conditional")
    count = round(statistics.mean(len(row["reference"].split()) for row in rows))
    for row in rows:
        print(json.dumps(row | {"text": " ".join(row["source"].split()[:count])}))


if __name__ == "__main__":
    main()
