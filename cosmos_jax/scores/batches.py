"""Token sequences of any lengths in batches of few shapes, as every shape is compiled."""

from collections.abc import Iterator, Sequence

import numpy as np

# Of a whole batch. The logits of GPT-2 are 0.2 MB a token.
TOKENS = 4096
SHORTEST = 16


def padded_batches(
    sequences: Sequence[Sequence[int]], longest: int, pad_id: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (indices_T, ids_BxL, lengths_B) until every sequence had its turn, short ones first.

    L is the first of 16, 32, 64, ... and `longest` that a sequence fits, whatever the others
    are; B, a power of 2, is the same for all batches of one L. Rows from T on are of one
    padding token. No sequence may be empty or longer than `longest`.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    assert lengths.min() > 0
    assert lengths.max() <= longest
    widths = np.minimum(longest, np.maximum(SHORTEST, 2 ** np.ceil(np.log2(lengths)).astype(int)))
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        members = members[np.argsort(lengths[members], kind="stable")]
        rows = 2 ** int(np.log2(max(1, TOKENS // width)))
        rows = min(rows, 2 ** int(np.ceil(np.log2(len(members)))))
        for start in range(0, len(members), rows):
            indices_T = members[start : start + rows]
            ids_BxL = np.full((rows, width), pad_id, np.int32)
            lengths_B = np.ones(rows, np.int32)
            for row, i in enumerate(indices_T):
                ids_BxL[row, : lengths[i]] = sequences[i]
                lengths_B[row] = lengths[i]
            yield indices_T, ids_BxL, lengths_B
