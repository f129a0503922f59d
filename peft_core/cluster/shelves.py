"""Send files to an actor's shelf, and fetch them from one: the Ray side of `transfer.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray

from peft_core.cluster.transfer import Listing, list_files, parse_listing, pieces_of, receive


def send(
    actor: Any, shelf: str, files: Iterable[tuple[str, Path]], report: Callable[[int, int], None] | None = None
) -> Listing:
    """Put files on a shelf under these names; those that the actor has already are not sent again.

    `report` receives how many bytes of how many have been sent.

    Raises:
        ClusterError: A file has changed meanwhile.
    """
    paths = dict(files)
    listing = list_files(paths.items())
    text = listing.model_dump_json()
    missing = set(ray.get(actor.missing.remote(text)))
    sent, total = 0, sum(file.size for file in listing.files if file.sha256 in missing)
    for file in listing.files:
        if file.sha256 not in missing:
            continue
        missing.discard(file.sha256)  # two files may have the same content
        for number, piece in enumerate(pieces_of(paths[file.name], file)):
            ray.get(actor.put.remote(file.sha256, number, piece))
            sent += len(piece)
            if report is not None:
                report(sent, total)
    ray.get(actor.seal.remote(shelf, text))
    return listing


def fetch(actor: Any, shelf: str, directory: Path, *, max_bytes: int, what: str) -> Listing | None:
    """Write the files of a shelf into a new directory; return None if the shelf is empty.

    Raises:
        ClusterError: `cluster_transfer`: the files are not what their listing says, or are too large.
    """
    text = ray.get(actor.listing.remote(shelf))
    if text is None:
        return None
    listing = parse_listing(text, max_bytes=max_bytes, what=what)
    receive(
        listing, lambda sha256, number: ray.get(ray.get(actor.piece.remote(sha256, number))[0]), directory, what=what
    )
    return listing
