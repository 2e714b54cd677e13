"""The directory of a zip archive, judged before anything is taken from it."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass

from robustann.errors import DamagedError, RefusedError
from robustann.models.escaped import escaped

_MAX_ENTRIES = 100_000
_MAX_RATIO = 100
# Below it a high ratio is no bomb: a few hundred equal bytes shrink to a dozen.
_SMALL = 2**20
_ENTRY_MARK = b"PK\x01\x02"
_STORED_OR_DEFLATED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END = b"PK\x05\x06"
_END_SIZE = 22


UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError,
              LookupError, OverflowError, NotImplementedError, RuntimeError)  # fmt: skip
"""What Python's reader raises for archives that are damaged."""


@dataclass(frozen=True)
class Archive:
    """A zip archive in memory whose directory says one thing only.

    Attributes:
        file: opened in memory.
        entries: the directory, by name.

    >>> stream = io.BytesIO()
    >>> with zipfile.ZipFile(stream, "w") as file:
    ...     file.writestr("a/b", b"text")
    >>> Archive.of(stream.getvalue(), "'a.zip'", 1000).read("a/b")
    b'text'
    """

    file: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]

    @classmethod
    def of(cls, content: bytes, where: str, max_bytes: int) -> Archive:
        """Read the directory.

        Args:
            content: the whole file.
            where: what to call it in messages.
            max_bytes: of all entries together, unpacked.

        Raises:
            DamagedError: it is damaged.
            RefusedError: two readers could see two things in it (names twice, entries that
                overlap or are named otherwise in the directory), or it would unpack to more than
                is allowed, or outside its folder.
        """
        file = open_archive(content, where)
        entries = file.infolist()
        names: set[str] = set()
        for entry in entries:
            _check_entry(entry, names, where)
        total = sum(entry.file_size for entry in entries)
        if total > max_bytes:
            raise RefusedError(
                f"{where} is refused: it would unpack to {total} bytes, at most {max_bytes} are "
                "allowed; a zip bomb does so. Raise max_bytes if you trust it"
            )
        _check_places(entries, content, where)
        return cls(file, {entry.filename: entry for entry in entries})

    def read(self, name: str) -> bytes:
        """The unpacked bytes of an entry.

        Raises:
            DamagedError: they do not fit their checksum.
        """
        entry = self.entries[name]
        try:
            with self.file.open(entry) as stream:
                # Never more than the directory states, whatever the packed bytes hold.
                found = stream.read(entry.file_size + 1)
        except UNREADABLE as error:
            raise _damaged(f"the entry '{escaped(name)}'", f"{error!s:.200}") from error
        if len(found) != entry.file_size:
            raise _damaged(f"the entry '{escaped(name)}'", f"it has not {entry.file_size} bytes")
        return found

    def check_sums(self) -> None:
        """Compare every entry with its checksum.

        Raises:
            DamagedError: one does not fit.
        """
        for name in self.entries:
            self.read(name)


def open_archive(content: bytes, where: str) -> zipfile.ZipFile:
    """A zip archive in memory as it stands, nothing judged.

    Raises:
        DamagedError: its directory cannot be read.
        RefusedError: its directory would not fit into memory.

    >>> open_archive(b"PK", "'a.zip'")
    Traceback (most recent call last):
    robustann.errors.DamagedError: expected a whole zip archive (as torch.save writes) ...
    """
    # By chance the mark comes once in four billion bytes.
    if content.count(_ENTRY_MARK) > 2 * _MAX_ENTRIES:
        raise RefusedError(
            f"{where} is refused: it has more than {_MAX_ENTRIES} entries. Ask its maker for a "
            "safetensors file"
        )
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except UNREADABLE as error:
        raise _damaged(where, f"{error!s:.200}") from error


def _damaged(where: str, why: str) -> DamagedError:
    return DamagedError(
        f"expected a whole zip archive (as torch.save writes) in {where}, reading it failed: "
        f"{why}; it was cut off or damaged. Copy the file again"
    )


def _check_entry(entry: zipfile.ZipInfo, names: set[str], where: str) -> None:
    name = escaped(entry.orig_filename)
    why = None
    # PyTorch's reader looks names up without regard to case.
    if entry.filename.casefold() in names:
        why = f"the entry '{name}' is there twice, so that two readers may see two models"
    elif len(names) >= _MAX_ENTRIES:
        why = f"it has more than {_MAX_ENTRIES} entries"
    elif _escapes(entry.orig_filename):
        why = f"the entry '{name}' would lie outside the folder it is unpacked to"
    elif not entry.orig_filename.isprintable():
        why = f"the name of the entry '{name}' holds control characters"
    elif stat.S_ISLNK(entry.external_attr >> 16):
        why = f"the entry '{name}' is a symbolic link"
    elif entry.flag_bits & _ENCRYPTED:
        why = f"the entry '{name}' is encrypted"
    elif entry.compress_type not in _STORED_OR_DEFLATED:
        why = f"the entry '{name}' is packed in an unusual way ({entry.compress_type})"
    elif entry.file_size > max(_SMALL, _MAX_RATIO * entry.compress_size):
        why = (
            f"the entry '{name}' unpacks to {entry.file_size} bytes from {entry.compress_size}, "
            "as a zip bomb does"
        )
    if why is not None:
        raise RefusedError(f"{where} is refused: {why}. Ask its maker for a safetensors file")
    names.add(entry.filename.casefold())


def _escapes(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or ":" in parts[0]


def _check_places(entries: list[zipfile.ZipInfo], content: bytes, where: str) -> None:
    """The file is the archive and nothing else, and each entry lies where it is named."""
    end = len(content) - _END_SIZE
    if content[end : end + 4] != _END:
        raise RefusedError(
            f"{where} is refused: bytes follow its zip archive, so that it may be two files in "
            "one. Ask its maker for a safetensors file"
        )
    place = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        header = content[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise _damaged(
                where, f"the entry '{escaped(entry.filename)}' is not where it should be"
            )
        fields = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size
        name = content[start : start + fields[9]]
        if entry.header_offset < place or (place == 0 and entry.header_offset > 0):
            raise RefusedError(
                f"{where} is refused: its entries overlap or something lies before them, as in "
                "zip bombs and in two files made one. Ask its maker for a safetensors file"
            )
        if name != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437"):
            raise RefusedError(
                f"{where} is refused: the entry '{escaped(entry.orig_filename)}' has another name "
                "where its bytes lie, so that two readers may see two models. Ask its maker for a "
                "safetensors file"
            )
        place = start + fields[9] + fields[10] + entry.compress_size
    if place > end:
        raise _damaged(where, "an entry reaches into the directory")
