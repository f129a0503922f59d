"""Files between this machine and the cluster: listed with their hashes, cut into pieces, checked when they arrive.

A listing says what is to come. Who receives it checks it as hostile: names stay below the directory, the total is bounded, and
each file must have the size and the SHA-256 of the listing. No file is unpickled or executed, and no link is followed or made.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from peft_core.errors import ClusterError
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.files import open_regular

PIECE_BYTES = 32 << 20  # one message; Ray holds a few of them at a time in memory
MAX_FILES = 2000
# Each part of a name begins neither with a dot, so that ".." is none, nor does it contain a backslash or control character.
_NAME = re.compile(r"[^/\\.\x00-\x1f][^/\\\x00-\x1f]{0,199}(?:/[^/\\.\x00-\x1f][^/\\\x00-\x1f]{0,199}){0,2}")

FetchPiece = Callable[[str, int], bytes]  # SHA-256 of the file, number of the piece


class File(FrozenModel):
    """A file of a listing. Its name is relative, with "/" between its parts."""

    name: str
    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def pieces(self) -> int:
        return -(-self.size // PIECE_BYTES)


class Listing(FrozenModel):
    files: Annotated[tuple[File, ...], Field(max_length=MAX_FILES)]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @model_validator(mode="after")
    def _names_are_safe(self) -> Listing:
        names = [file.name for file in self.files]
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} must be relative, without '..'")
        if len(set(names)) < len(names):
            raise ValueError("a name occurs twice")
        return self


def list_files(files: Iterable[tuple[str, Path]]) -> Listing:
    """Return the listing of these files, by the names under which they are to arrive.

    Raises:
        HeaderError: One of them is missing, or is not a regular file.
    """
    listed = []
    for name, path in files:
        with open_regular(path, follow_links=True) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            listed.append(File(name=name, size=os.fstat(descriptor).st_size, sha256=digest))
    return Listing(files=tuple(listed))


def files_below(directory: Path, prefix: str = "") -> list[tuple[str, Path]]:
    """Return the regular files of a directory, without those below it, by name; hidden ones are left out."""
    return [
        (prefix + path.name, path)
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    ]


def pieces_of(path: Path, file: File) -> Iterator[bytes]:
    """Read a file in pieces.

    Raises:
        ClusterError: It has become shorter since it was listed.
    """
    with open_regular(path, follow_links=True) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
        for number in range(file.pieces):
            piece = stream.read(min(PIECE_BYTES, file.size - number * PIECE_BYTES))
            if len(piece) != min(PIECE_BYTES, file.size - number * PIECE_BYTES):
                raise ClusterError(f"{path.name} has changed while it was sent.", code="cluster_transfer")
            yield piece


def parse_listing(text: object, *, max_bytes: int, what: str) -> Listing:
    """Check a listing that came from elsewhere.

    Raises:
        ClusterError: `cluster_transfer`: it is malformed, names a file outside its directory, or is larger than `max_bytes`.
    """
    try:
        listing = Listing.model_validate_json(text if isinstance(text, str) else "")
    except ValidationError as error:
        raise _refused(what, f"its listing is not valid ({error.errors()[0]['msg']})") from error
    if listing.size > max_bytes:
        raise _refused(what, f"it has {listing.size} bytes; must be at most {max_bytes}")
    return listing


def receive(listing: Listing, fetch: FetchPiece, directory: Path, *, what: str) -> None:
    """Write all files of a listing into a directory, which must not contain them yet.

    Raises:
        ClusterError: `cluster_transfer`: a file is not what the listing says.
    """
    for file in listing.files:
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("xb") as stream:
            for number in range(file.pieces):
                piece = fetch(file.sha256, number)
                if not isinstance(piece, bytes) or len(piece) != min(PIECE_BYTES, file.size - number * PIECE_BYTES):
                    raise _refused(what, f"{file.name} has another size than was announced")
                digest.update(piece)
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        if digest.hexdigest() != file.sha256:
            raise _refused(what, f"{file.name} has another content than was announced")


def _refused(what: str, problem: str) -> ClusterError:
    return ClusterError(
        f"{what} was refused: {problem}.",
        code="cluster_transfer",
        suggestions=["Resume the training; if it happens again, report it with the job's log"],
    )
