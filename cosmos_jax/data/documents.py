"""Long documents cut into pieces that a model can take."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from pathlib import Path

from cosmos_jax.data import files, jsonl
from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError

SUFFIXES = (".txt", ".txt.gz", *jsonl.SUFFIXES)
_PARAGRAPHS = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"""[.!?\u2026]["')\]\u2019\u201d]*$""")
_TITLE = re.compile(r"(?:Mr|Mrs|Messrs|Dr|St|Capt|Col|Rev|Sir|[A-Z])\.$")
_SENTENCE = re.compile(r"[A-Z][^\d_*\[\]]*[.!?]$")
_QUOTATION_MARKS = re.compile('["\u201c\u201d]')


def documents(path: Path) -> Iterator[Row]:
    """The documents of a shard: its rows if it is JSON lines, else the whole file is one."""
    if path.name.endswith(jsonl.SUFFIXES):
        for row in jsonl.rows(path):
            if row.source is not None:
                raise UserError(f"{path}: documents need 'text', not 'source' and 'target'")
            yield row
        return
    text = "".join(line for _, line in files.lines(path))
    if not files.has_text(text):
        raise UserError(f"{path}: has no text")
    yield Row(text)


def pieces(text: str, max_words: int) -> Iterator[str]:
    """Cuts a text into pieces of at most `max_words` words, with single spaces between them.

    A piece is as long as it can be and ends with a sentence or a paragraph; only a sentence
    longer than the limit is cut between words.
    """
    words: list[str] = []
    ends: list[int] = []  # numbers of words after which a piece may end
    for paragraph in _PARAGRAPHS.split(text):
        for word in paragraph.split():
            words.append(word)
            if _SENTENCE_END.search(word):
                ends.append(len(words))
        ends.append(len(words))
    start = 0
    while start < len(words):
        limit = start + max_words
        last = ends[max(bisect.bisect_right(ends, limit) - 1, 0)]
        end = last if start < last <= limit else limit
        yield " ".join(words[start:end])
        start = end


def sentences(text: str, min_words: int = 4, max_words: int = 12) -> Iterator[str]:
    """The sentences of that many words, without quotation marks: one often has half a pair.

    Left out is what begins in the middle of a sentence or has digits, as headings have.
    """
    words: list[str] = []
    for word in _QUOTATION_MARKS.sub("", text).split():
        words.append(word)
        if _SENTENCE_END.search(word) and not _TITLE.match(word):
            sentence = " ".join(words)
            if min_words <= len(words) <= max_words and _SENTENCE.match(sentence):
                yield sentence
            words = []
