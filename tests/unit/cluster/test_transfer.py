"""Files that come from a cluster are checked as hostile."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from peft_core.cluster import transfer
from peft_core.cluster.transfer import Listing, files_below, list_files, parse_listing, pieces_of, receive
from peft_core.errors import ClusterError

CONTENT = b"0123456789"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4)


def listing_of(name: str = "file", content: bytes = CONTENT, **changes: Any) -> str:
    file = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **changes}
    return json.dumps({"files": [file]})


def parsed(text: object) -> Listing:
    return parse_listing(text, max_bytes=100, what="The adapter")


def piece(_sha256: str, number: int) -> bytes:
    return CONTENT[4 * number : 4 * number + 4]


def test_files_arrive_as_they_were_sent(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    contents = {"empty": b"", "small": b"abc", "exact": b"abcdefgh", "long": CONTENT}
    for name, content in contents.items():
        (source / name).write_bytes(content)
    (source / ".hidden").touch()
    (source / "link").symlink_to(source / "small")
    files = dict(files_below(source, "dataset/"))
    assert files.keys() == {f"dataset/{name}" for name in contents}
    listing = list_files(files.items())
    by_hash = {file.sha256: list(pieces_of(files[file.name], file)) for file in listing.files}
    receive(parsed(listing.model_dump_json()), lambda sha256, number: by_hash[sha256][number], target, what="It")
    assert {path.name: path.read_bytes() for path in (target / "dataset").iterdir()} == contents


@pytest.mark.parametrize(
    "name",
    ["../up", "a/../b", "/etc/passwd", ".hidden", "a/.b", "a//b", "a\\b", "a/b/c/d", "", "a\nb", "a" * 300, "a/"],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="listing is not valid"):
        parsed(listing_of(name))


@pytest.mark.parametrize("text", [None, 3, "", "[]", '{"files": [1]}', listing_of(size=-1), listing_of(sha256="../x")])
def test_a_malformed_listing_is_refused(text: object) -> None:
    with pytest.raises(ClusterError, match="listing is not valid"):
        parsed(text)


def test_a_name_that_occurs_twice_is_refused() -> None:
    files = json.loads(listing_of())["files"]
    with pytest.raises(ClusterError, match="twice"):
        parsed(json.dumps({"files": files * 2}))


def test_more_bytes_than_allowed_are_refused_before_they_are_fetched() -> None:
    with pytest.raises(ClusterError, match="has 101 bytes; must be at most 100"):
        parsed(listing_of(size=101))


@pytest.mark.parametrize("sent", [b"01234", b"012", b"", "0123", None])
def test_a_piece_of_another_size_or_type_is_refused(tmp_path: Path, sent: Any) -> None:
    with pytest.raises(ClusterError, match="file has another size"):
        receive(parsed(listing_of()), lambda _sha256, _number: sent, tmp_path, what="The adapter")


def test_another_content_is_refused(tmp_path: Path) -> None:
    text = listing_of(sha256=hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ClusterError, match="file has another content"):
        receive(parsed(text), piece, tmp_path, what="The adapter")


def test_no_existing_file_or_link_is_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "file").symlink_to(outside)
    with pytest.raises(FileExistsError):
        receive(parsed(listing_of()), piece, directory, what="The adapter")
    assert not outside.exists()


def test_a_file_that_is_cut_while_it_is_sent_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    (file,) = list_files([("file", path)]).files
    path.write_bytes(CONTENT[:5])
    with pytest.raises(ClusterError, match="has changed while it was sent"):
        list(pieces_of(path, file))
