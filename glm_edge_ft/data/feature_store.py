"""What a frozen vision part makes of each image, kept in one file: computed once, read in every later epoch.

A record has a fixed size, so that the place of an image's record follows from its number. A second file says which
records are whole, by their checksums: a process that is killed, or a disk that fills up, leaves records that count as
absent. Several processes may write the same file, since all of them would write the same bytes. Records are read and
written, not mapped, so that they do not count as the process's memory.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_edge_ft.data.cache import ABANDONED_AFTER_SECONDS, cache_key

RECORDS_FILE, WHOLE_FILE = "records.bin", "whole.bin"
_WHOLE = 1 << 32  # set in the entry of a record that was written; the checksum lies below


class FeatureStore:
    """Records of equal size for a list of images.

    Attributes:
        folder: where the two files lie.
        images: the images, by the number of their record.
        numbers: the other way round.
        record_bytes: size of a record.
    """

    def __init__(self, folder: Path, images: Sequence[str], record_bytes: int) -> None:
        """Open the folder, and make it where there is none. Raises OSError when it cannot be made or written to."""
        self.folder = folder
        self.images = list(images)
        self.numbers = {path: number for number, path in enumerate(images)}
        self.record_bytes = record_bytes
        self.is_full = False
        folder.mkdir(parents=True, exist_ok=True)
        self._records = os.open(folder / RECORDS_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        whole = os.open(folder / WHOLE_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(whole, max(len(images), 1) * 8)  # several processes may do so: it stays what it is
        finally:
            os.close(whole)
        self._whole: NDArray[np.uint64] = np.memmap(folder / WHOLE_FILE, np.uint64, "r+")

    def holds(self, number: int) -> bool:
        """Return whether a record of this number was written; none has the number -1."""
        return number >= 0 and int(self._whole[number]) >= _WHOLE

    def read(self, number: int) -> bytearray | None:
        """Return the record of this number; None where there is none or it is damaged."""
        if not self.holds(number):
            return None
        record = bytearray(self.record_bytes)
        try:
            count = os.preadv(self._records, [record], number * self.record_bytes)
        except OSError:
            return None
        is_whole = count == self.record_bytes and int(self._whole[number]) == _WHOLE | zlib.crc32(record)
        return record if is_whole else None

    def write(self, number: int, record: bytes) -> None:
        """Keep a record; once the disk was full, and for the number -1, do nothing.

        Raises:
            OSError: the disk is full, or fails. From then on nothing is written any more.
        """
        if number < 0 or self.is_full:
            return
        try:
            if os.pwrite(self._records, record, number * self.record_bytes) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.is_full = True
            raise
        self._whole[number] = _WHOLE | zlib.crc32(record)

    def remove(self) -> None:
        """Remove the files. A process that has them open goes on with what it has."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __getstate__(self) -> dict[str, Any]:
        # The loader's processes, where they do not begin as copies of this one, open the files anew.
        return {"folder": self.folder, "images": self.images, "record_bytes": self.record_bytes}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def store_key(images: Sequence[str], facts: Mapping[str, Any]) -> str:
    """Return the folder name for what determines the records: the image files, and `facts`, JSON-able."""
    files = []
    for path in images:
        status = Path(path).stat()
        files.append([path, status.st_size, status.st_mtime_ns])
    return cache_key({"files": files, **facts})


def remove_abandoned(folder: Path) -> None:
    """Remove the stores in a folder that nothing was written to for two days: runs that were killed left them."""
    for store in folder.iterdir() if folder.is_dir() else ():
        try:
            if time.time() - (store / RECORDS_FILE).stat().st_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(store, ignore_errors=True)
        except OSError:
            continue
