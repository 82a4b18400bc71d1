"""The data sets as TFDS builders: a class of a few lines each, and a name in `sources.SOURCES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from cosmos_jax.data import documents, files, jsonl, tables
from cosmos_jax.data.sources import Dataset, Row
from cosmos_jax.data.text_builder import (
    DerivedBuilder,
    FileBuilder,
    StoredRows,
    TextBuilder,
    decoded,
)

CORPUS = Path(__file__).parent / "corpus"


class Jsonl(FileBuilder):
    name = "cosmos_jsonl"

    def find(self, path: Path) -> dict[str, list[Path]]:
        return files.split_files(path, jsonl.SUFFIXES)

    def read(self, file: Path) -> Iterator[Row]:
        return jsonl.rows(file)


class Embedded(Jsonl):
    """The corpus in this package; `corpus/README.md` says what it is."""

    name = "cosmos_embedded"

    def __init__(self, path: str, directory: str):
        super().__init__(str(CORPUS), directory)


class Sentences(Embedded):
    """Short sentences of the embedded corpus, whole ones, from 4 to 12 words."""

    name = "cosmos_sentences"

    def pieces(self, row: Row) -> Iterator[Row]:
        return map(Row, documents.sentences(row.text))


class RocStories(FileBuilder):
    """The publisher's tables, one or a directory of them; 5% + 5% is the paper's held-out part."""

    name = "cosmos_rocstories"
    held_out = 0.05

    def find(self, path: Path) -> dict[str, list[Path]]:
        return {"train": files.found_files(path, (".csv", ".csv.gz"))}

    def read(self, file: Path) -> Iterator[Row]:
        return tables.rocstories(file)


class ParaDetox(FileBuilder):
    name = "cosmos_paradetox"

    def find(self, path: Path) -> dict[str, list[Path]]:
        return files.split_files(path, (".tsv", ".tsv.gz"))

    def read(self, file: Path) -> Iterator[Row]:
        return tables.paradetox(file)


class OpenWebText(FileBuilder):
    """Documents in pieces of up to 380 words, which are about 512 tokens."""

    name = "cosmos_openwebtext"

    def find(self, path: Path) -> dict[str, list[Path]]:
        return {"train": files.found_files(path, documents.SUFFIXES)}

    def read(self, file: Path) -> Iterator[Row]:
        return documents.documents(file)

    def pieces(self, row: Row) -> Iterator[Row]:
        return _pieces(row.text, 380)


def _pieces(text: str, max_words: int) -> Iterator[Row]:
    return (Row(piece) for piece in documents.pieces(text, max_words) if files.has_text(piece))


class Squad(DerivedBuilder):
    """Questions of SQuAD 2.0 that have an answer, asked for by answer and context.

    The answer comes first, so that it stays when a long context is cut.
    """

    name = "cosmos_squad"
    splits: ClassVar = {"train": "train[:98%]", "valid": "train[98%:]", "test": "validation"}
    needs = "it is downloaded once, which needs the network"

    def tfds_builder(self, data_dir: str | None) -> tfds.core.DatasetBuilder:
        return tfds.builder("squad/v2.0", data_dir=data_dir)

    def rows(self, example: Mapping[str, Any]) -> Iterator[Row]:
        if not example["is_impossible"]:
            answer = decoded(example["answers"]["text"][0])
            yield Row(
                decoded(example["question"]).strip(),
                f"{answer} [SEP] {decoded(example['context'])}",
            )


class Xsum(DerivedBuilder):
    name = "cosmos_xsum"
    splits: ClassVar = {"train": "train", "valid": "validation", "test": "test"}
    needs = (
        "it takes the network, the package tensorflow, and xsum-extracts-from-downloads.tar.gz in"
        " downloads/manual of TFDS's directory: https://github.com/EdinburghNLP/XSum says how to"
        " make that file"
    )

    def tfds_builder(self, data_dir: str | None) -> tfds.core.DatasetBuilder:
        # Not among the names `tfds.builder` knows where there is no TensorFlow.
        from tensorflow_datasets.summarization import xsum

        return xsum.Xsum(data_dir=data_dir)

    def rows(self, example: Mapping[str, Any]) -> Iterator[Row]:
        yield Row(decoded(example["summary"]).strip(), decoded(example["document"]).strip())


class Wikipedia(DerivedBuilder):
    """English articles in pieces of up to 128 words."""

    name = "cosmos_wikipedia"
    splits: ClassVar = {"train": "train[:98%]", "valid": "train[98%:99%]", "test": "train[99%:]"}
    needs = "it takes the network and the packages apache-beam, mwparserfromhell and mwxml"

    def tfds_builder(self, data_dir: str | None) -> tfds.core.DatasetBuilder:
        from tensorflow_datasets.text import wikipedia

        configs = [c for c in wikipedia.Wikipedia.BUILDER_CONFIGS if c.language == "en"]
        newest = max(configs, key=lambda config: config.date)
        return wikipedia.Wikipedia(data_dir=data_dir, config=newest)

    def rows(self, example: Mapping[str, Any]) -> Iterator[Row]:
        return _pieces(decoded(example["text"]), 128)


BUILDERS: Mapping[str, Callable[[str, str], TextBuilder]] = {
    "embedded": Embedded,
    "sentences": Sentences,
    "jsonl": Jsonl,
    "rocstories": RocStories,
    "paradetox": ParaDetox,
    "openwebtext": OpenWebText,
    "squad": Squad,
    "xsum": Xsum,
    "wikipedia": Wikipedia,
}


def load(name: str, path: str, directory: str) -> Dataset:
    """Prepares the data set if need be and opens it; see `sources.load`."""
    builder = BUILDERS[name](path, directory)
    if not builder.is_there():
        builder.prepare()
        builder = BUILDERS[name](path, directory)  # reads what was written, by whomever
    splits = {split: StoredRows(builder.as_data_source(split)) for split in builder.info.splits}
    return Dataset(
        name=name,
        conditional=splits["train"][0].source is not None,
        train=splits["train"],
        valid=splits["valid"],
        test=splits.get("test", splits["valid"]),
        fingerprint=builder.fingerprint,
    )
