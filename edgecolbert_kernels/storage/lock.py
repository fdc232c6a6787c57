"""One writer a folder. The system drops the lock with the process that holds it, however that ends.

The lock belongs to the open file, which forked children share: they drop it last where their parent dies without `release`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

NAME = "lock"


class PackedLocked(RuntimeError):
    """Another writer has the folder open."""


class Lock:
    """Held from construction to `release` by the process that took it; a forked child has only inherited it. The file
    stays: removing it would let two writers lock two files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, os.getpid()
        path = folder / NAME
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _take(self._file)
        except OSError:
            owner = os.pread(self._file, 32, 0).decode("ascii", "replace").strip() if hasattr(os, "pread") else ""
            os.close(self._file)
            process = f" (process {owner})" if owner.isdecimal() else ""
            raise PackedLocked(f"{folder} is being written by another writer{process}; there can be one") from None
        # For messages alone: a full disk has no room for it, and is still to be opened, to remove something.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.write(self._file, b"%d\n" % self._process)

    @property
    def owned(self) -> bool:
        """Whether this process took it."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Raise unless this process may write.

        Raises:
            PackedLocked: it is a fork of the one that took it.
            ValueError: it was released.
        """
        if not self.owned:
            raise PackedLocked(f"{self._folder} is being written by process {self._process}; this is a fork of it")
        if self._file < 0:
            raise ValueError(f"the writer of {self._folder} is closed")

    def release(self) -> None:
        """A forked child lets go of the file alone, and the lock stays with its parent."""
        if self._file >= 0:
            if self.owned:
                _drop(self._file)
            os.close(self._file)
            self._file = -1


if sys.platform == "win32":
    import msvcrt

    def _take(file: int) -> None:
        # A byte far behind the content, which others then can still read.
        os.lseek(file, 1 << 20, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)

    def _drop(file: int) -> None:
        """Goes with the file: nothing forks here."""

else:
    import fcntl

    def _take(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _drop(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
