"""How TFDS keeps the rows of a data set: in ArrayRecord files, under a fingerprint.

`TextBuilder` keeps rows; `FileBuilder` takes them from the user's files and `DerivedBuilder`
from a data set that TFDS can obtain. The directory of prepared data is named after the content
it was made from, so changed files are another data set.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import itertools
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tqdm import tqdm

from cosmos_jax.data import files
from cosmos_jax.data.holding_out import HoldOut
from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError

logger = logging.getLogger(__name__)

# TFDS holds one shard in memory while writing it.
_ROWS_PER_SHARD = 2**15

Shards = Mapping[str, Sequence[Callable[[], Iterable[Row]]]]


class StoredRows:
    """Rows of one split, read from its ArrayRecord files when asked for."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int, /) -> Row:
        return _stored(self._source[range(len(self))[i]])

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [_stored(example) for example in self._source.__getitems__(list(indices))]


def _stored(example: Mapping[str, bytes]) -> Row:
    return Row(decoded(example["text"]), decoded(example["source"]) or None)


def decoded(value: bytes | str) -> str:
    """A string of TFDS, which hands out bytes."""
    return value.decode() if isinstance(value, bytes) else value


class TextBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Rows under a name and a fingerprint; a row without source has an empty one.

    Shard-based because TFDS's shuffling writer cannot take a split above 1 GB without
    TensorFlow; the order of rows is that of the batches anyway.
    """

    name: str  # of the class, then with the fingerprint
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where TFDS looks for checksums of downloads; there are none

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(skip_registration=True, **kwargs)

    def __init__(self, fingerprint: str, directory: str):
        self.fingerprint = fingerprint
        self.name = f"{self.name}_{fingerprint[:16]}"
        super().__init__(data_dir=os.path.expanduser(directory) or None)

    def shards(self) -> Shards:
        """Functions that give the rows of each shard of each split, called once in order.

        Raises:
          UserError: something is wrong with any row of any shard.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Writes the data set, all of it or nothing, unless another process has just done so.

        Raises:
          UserError: before anything is written, something is wrong with a row; the directory
            cannot be written.
        """
        self._shards = self.shards()
        path = Path(self.data_dir)
        try:
            with _lock(path.parent):
                if self.is_there():  # by another process, meanwhile
                    return
                for remains in path.parent.glob("*/"):  # of a run that was killed
                    shutil.rmtree(remains)
                logger.info("Preparing %s in %s", self.name, path)
                # TFDS prints to where results belong.
                with contextlib.redirect_stdout(io.StringIO()):
                    self.download_and_prepare(file_format="array_record")
        except OSError as error:
            raise UserError(
                f"{path}: cannot write prepared data ({error.strerror or error}):"
                " config.data.directory names another place"
            ) from error

    def is_there(self) -> bool:
        return Path(self.data_dir).exists() and self.is_prepared()  # warns where nothing is

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"text": text, "source": text})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable]]:
        del dl_manager
        progress = tqdm(desc=f"preparing {self.name}", unit=" rows", delay=5, leave=False)

        def examples(shard: Callable[[], Iterable[Row]]) -> Iterator[tuple[int, dict[str, str]]]:
            for key, row in enumerate(shard()):
                progress.update()
                yield key, {"text": row.text, "source": row.source or ""}

        return {
            split: [lambda shard=shard: examples(shard) for shard in shards]
            for split, shards in self._shards.items()
        }


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Holds back other processes that want to write into `directory`, which is created."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class FileBuilder(TextBuilder):
    """Rows of the files at a path.

    Where there is only "train", "valid" and "test" are held out of it. Where only "valid" is
    missing, it is held out; where only "test" is, it stays missing.
    """

    held_out: ClassVar[float] = 0.02  # share of "train" for each split that is held out

    def __init__(self, path: str, directory: str):
        self.path = files.existing(path)
        self.files = self.find(self.path)
        labels = (self.name, str(self.VERSION))
        super().__init__(files.fingerprint(labels, self._listed()), directory)

    def find(self, path: Path) -> dict[str, list[Path]]:
        """The files of each split."""
        raise NotImplementedError

    def read(self, file: Path) -> Iterator[Row]:
        """The rows of a file, at least one; raises UserError where something is wrong."""
        raise NotImplementedError

    def pieces(self, row: Row) -> Iterable[Row]:
        """What becomes of a row; all its pieces are in one split."""
        return (row,)

    def shards(self) -> Shards:
        missing: tuple[str, ...] = ()
        if "valid" not in self.files:
            missing = ("valid",) if "test" in self.files else ("valid", "test")
        hold_out = HoldOut(missing, self.held_out)
        counts = dict.fromkeys(self.files, 0)
        kind = None
        for split, file in self._listed():
            for row in self.read(file):
                counts[split] += 1
                if split == "train" and missing:
                    hold_out.add(row)
                if kind is None:
                    kind = row.source is None
                elif kind != (row.source is None):
                    raise UserError(
                        f"{file}: its rows have {'no' * (row.source is None) or 'a'} source, unlike"
                        " those of the files before"
                    )
        if missing:
            counts |= hold_out.decide(str(self.path))

        def rows(split: str) -> Iterator[Row]:
            whole = split in self.files and not (split == "train" and missing)
            for file in self.files[split if whole else "train"]:
                yield from (row for row in self.read(file) if whole or hold_out.split(row) == split)

        def shard(source: Iterator[Row]) -> Iterator[Row]:
            for row in itertools.islice(source, _ROWS_PER_SHARD):
                yield from self.pieces(row)

        return {
            split: [functools.partial(shard, source)] * math.ceil(count / _ROWS_PER_SHARD)
            for split, count in counts.items()
            for source in [rows(split)]
        }

    def _listed(self) -> list[tuple[str, Path]]:
        return [(split, file) for split, found in self.files.items() for file in found]


class DerivedBuilder(TextBuilder):
    """Rows made from the examples of a data set that TFDS has a builder for."""

    splits: ClassVar[Mapping[str, str]]  # ours: TFDS's, in its notation for parts of a split
    needs: ClassVar[str]  # what helps where TFDS cannot prepare the data set

    def __init__(self, path: str, directory: str):
        del path  # TFDS knows where it gets the data
        self.original = self.tfds_builder(os.path.expanduser(directory) or None)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.original.download_and_prepare(file_format="array_record")
            self._sources = {
                split: self.original.as_data_source(part) for split, part in self.splits.items()
            }
        except Exception as error:  # of any kind: network, packages, files put by hand
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"TFDS cannot prepare {self.original.info.full_name} in {self.original.data_dir}:"
                f" {reason} ({self.needs})"
            ) from error
        sizes = {name: split.num_examples for name, split in self.original.info.splits.items()}
        labels = (
            self.name,
            self.VERSION,
            self.original.info.full_name,
            sorted(sizes.items()),
        )
        super().__init__(files.fingerprint(map(str, labels)), directory)

    def tfds_builder(self, data_dir: str | None) -> tfds.core.DatasetBuilder:
        raise NotImplementedError

    def rows(self, example: Mapping[str, Any]) -> Iterable[Row]:
        """What becomes of an example; rows without text are dropped."""
        raise NotImplementedError

    def shards(self) -> Shards:
        def shard(source: Any, start: int) -> Iterator[Row]:
            for i in range(start, min(start + _ROWS_PER_SHARD, len(source))):
                for row in self.rows(source[i]):
                    if files.has_text(row.text) and row.source != "":
                        yield row

        return {
            split: [
                functools.partial(shard, source, start)
                for start in range(0, len(source), _ROWS_PER_SHARD)
            ]
            for split, source in self._sources.items()
        }
