"""Malicious repositories: they run no program, give no access to files outside, and cannot block a reader or fill memory."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.data import git as product_git
from peft_core.data import walk as walk_module
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.git import head_state
from peft_core.data.read_text import decode, read_text
from peft_core.data.secrets import redact_secrets
from peft_core.data.summarise import summarise_source
from peft_core.data.walk import walk
from peft_core.errors import DataError, PeftMcpError

CODE = "\n\n".join(
    f"def work_{name}(total):\n"
    + "".join(f"    total = total * {n} + len('{name}{n}')\n" for n in range(40))
    + "    return total\n"
    for name in "abcd"
)


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, "-C", root, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one commit."""
    root = tmp_path / "repository"
    for number in range(4):
        path = root / "src" / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CODE.replace("work", f"work_{number}").replace("total", f"total_{number}"))
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "one")
    return root


def names(root: Path) -> set[str]:
    return {file.name for file in walk(root).files}


MODULES = {f"src/module_{number}.py" for number in range(4)}


def configured(*keys: str) -> Callable[[Path, str], None]:
    def spoil(root: Path, command: str) -> None:
        for key in keys:
            git(root, "config", key, command)

    return spoil


def filters(root: Path, command: str) -> None:
    for key in (
        "filter.evil.clean",
        "filter.evil.smudge",
        "filter.evil.process",
        "diff.evil.textconv",
        "merge.evil.driver",
    ):
        git(root, "config", key, command)
    git(root, "config", "filter.evil.required", "true")
    (root / ".gitattributes").write_text("* filter=evil diff=evil merge=evil\n")


def included(root: Path, command: str) -> None:
    (root / "more").write_text(f'[core]\n\tfsmonitor = "{command}"\n[filter "evil"]\n\tclean = "{command}"\n')
    (root / ".gitattributes").write_text("* filter=evil\n")
    git(root, "config", "include.path", str(root / "more"))


def hooks(root: Path, command: str) -> None:
    place = root / ".git" / "hooks"
    place.mkdir(exist_ok=True)
    for name in ("post-index-change", "fsmonitor-watchman", "pre-auto-gc", "post-checkout", "reference-transaction"):
        (place / name).write_text(f"#!/bin/sh\n{command}\n")
        (place / name).chmod(0o755)
    git(root, "config", "core.hooksPath", str(place))


def lazy_fetch(root: Path, command: str) -> None:
    """Objects that are missing, and a remote that promises them, through a program."""
    (root / "program").write_text(f"#!/bin/sh\n{command}\n")
    (root / "program").chmod(0o755)
    for key, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.url": f"ext::{root / 'program'}",
        "remote.origin.promisor": "true",
        "remote.origin.partialclonefilter": "blob:none",
        "protocol.ext.allow": "always",
        "protocol.allow": "always",
    }.items():
        git(root, "config", key, value)
    tree = git(root, "rev-parse", "HEAD^{tree}")
    (root / ".git" / "objects" / tree[:2] / tree[2:]).unlink()


def signatures(root: Path, command: str) -> None:
    """A signed commit, and a program that is to check it."""
    program = root / "program"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    for key in ("gpg.program", "gpg.openpgp.program", "gpg.ssh.program", "gpg.x509.program"):
        git(root, "config", key, str(program))
    git(root, "config", "log.showSignature", "true")
    text = git(root, "cat-file", "commit", "HEAD")
    head, _, message = text.partition("\n\n")
    signature = "gpgsig -----BEGIN PGP SIGNATURE-----\n \n iQ\n -----END PGP SIGNATURE-----"
    (root / "commit").write_text(f"{head}\n{signature}\n\n{message}\n")
    git(root, "update-ref", "HEAD", git(root, "hash-object", "-t", "commit", "-w", str(root / "commit")))


TRAPS: dict[str, Callable[[Path, str], None]] = {
    "programs in the configuration": configured(
        "core.fsmonitor", "core.sshCommand", "core.pager", "core.editor", "core.askPass", "core.gitProxy",
        "core.alternateRefsCommand", "diff.external", "credential.helper", "gpg.program", "alias.ls-files", "alias.status",
        "uploadpack.packObjectsHook", "interactive.diffFilter", "sequence.editor", "trace2.eventTarget",
    ),
    "content filters": filters,
    "an included configuration": included,
    "hooks": hooks,
    "signatures that a program checks": signatures,
    "objects that would be fetched by a program": lazy_fetch,
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS.values(), ids=list(TRAPS))
def test_a_repository_cannot_make_git_run_anything(
    root: Path, tmp_path: Path, trap: Callable[[Path, str], None]
) -> None:
    marker = tmp_path / "it_ran"
    trap(root, f"touch {marker}; cat")
    (root / "src" / "module_0.py").write_text(CODE)  # changed: git has to look at it
    assert names(root) >= MODULES
    head_state(root)
    product_git.is_shallow(root)
    product_git.commit_times(root)
    summarise_source(str(root))
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config", "index", "HEAD", "info/exclude", "objects/info/alternates"])
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"[" * 4096, b"../../../..\n/etc\n/dev/zero\n", os.urandom(4096)]
)
def test_a_damaged_git_directory_does_no_harm(root: Path, file: str, content: bytes) -> None:
    path = root / ".git" / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    found = names(root)
    assert found in (MODULES, set())
    head_state(root)


@pytest.mark.parametrize("file", ["config", "info/exclude"])
def test_git_never_blocks_on_a_pipe(root: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_git, "TIMEOUT_S", 0.5)
    (root / ".git" / file).unlink(missing_ok=True)
    os.mkfifo(root / ".git" / file)
    started = time.monotonic()
    assert names(root) == MODULES  # the directory is walked instead
    assert time.monotonic() - started < 5


def test_an_endless_git_index_is_not_read_into_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_git, "MAX_OUTPUT_BYTES", 10)
    assert product_git.listed_files(root) is None
    assert names(root) == MODULES


@pytest.mark.parametrize("by_git", [True, False])
def test_symbolic_links_are_never_followed(root: Path, tmp_path: Path, by_git: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private.py").write_text(CODE)
    (root / "link.py").symlink_to(outside / "private.py")
    (root / "directory").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    if by_git:
        # The index is the repository's word: files behind a link, and names that no honest git would list.
        blob = git(root, "hash-object", "-w", "src/module_0.py")
        for name in ("trap/private.py", "src/deep/private.py"):
            git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
        (root / "trap").symlink_to(outside)
        (root / "src" / "deep").symlink_to("../../outside")
    else:
        (root / ".git").rename(tmp_path / "git")
    assert names(root) == MODULES


@pytest.mark.parametrize("name", ["/etc/passwd.py", "../outside/private.py", "a/../../outside/private.py", "//x.py"])
def test_names_that_lead_outside_the_root_are_not_followed(
    root: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "private.py").write_text(CODE)
    monkeypatch.setattr(product_git, "listed_files", lambda _: [name, "src/module_0.py"])
    assert names(root) == {"src/module_0.py"}


@pytest.mark.parametrize("by_git", [True, False])
def test_special_files_are_counted_and_never_opened(root: Path, by_git: bool, tmp_path: Path) -> None:
    if not by_git:
        (root / ".git").rename(tmp_path / "git")
    os.mkfifo(root / "pipe.py")
    os.chdir(root)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket.py")
    listening.close()
    try:
        os.mknod(root / "device.py", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        (root / "device.py").symlink_to("/dev/zero")
    assert names(root) == MODULES
    for name in ("pipe.py", "socket.py", "device.py"):
        assert isinstance(read_text(root / name), ExclusionReason)


HARD_NAMES = ["new\nline.py", "tab\t.py", "\x1b[2J.py", "\u202eyp.py", "quote'\".py", "-rf.py", os.fsdecode(b"\xff\xfe.py"),
              "%s%n.py", "x" * 240 + ".py", ":(glob)**.py", "con.py", " .py"]  # fmt: skip


@pytest.mark.parametrize("by_git", [True, False])
def test_file_names_with_any_characters_are_only_names(root: Path, tmp_path: Path, by_git: bool) -> None:
    if not by_git:
        (root / ".git").rename(tmp_path / "git")
    for name in HARD_NAMES:
        (root / name).write_text(CODE)
    assert names(root) == MODULES | set(HARD_NAMES)
    assert summarise_source(str(root)).files == len(MODULES) + len(HARD_NAMES)


def test_directories_deeper_than_the_path_limit_do_no_harm(root: Path, tmp_path: Path) -> None:
    here = Path.cwd()
    (root / ".git").rename(tmp_path / "git")
    os.chdir(root)
    try:
        for _ in range(60):  # 6 000 characters; a path may have 4 096
            Path("d" * 100).mkdir()
            os.chdir("d" * 100)
        Path("deep.py").write_text(CODE)
    finally:
        os.chdir(here)
    found = walk(root)
    assert {file.name for file in found.files} == MODULES
    assert found.left_out == {"unreadable": 1}
    subprocess.run(["rm", "-rf", root], check=True)


def test_more_files_than_a_code_base_has_are_refused_with_a_message(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "MAX_ENTRIES", 3)
    for _ in range(2):
        with pytest.raises(DataError, match="contains more than 3 files"):
            walk(root)
        if (root / ".git").exists():
            (root / ".git").rename(root.parent / "git")


@pytest.mark.skipif(not os.environ.get("ATTACK_LONG"), reason="minutes to create and remove; ATTACK_LONG=1")
@pytest.mark.parametrize("by_git", [True, False])
def test_a_million_files_are_refused_within_bounds(tmp_path: Path, by_git: bool) -> None:
    place = tmp_path / "million"
    place.mkdir()
    for directory in range(20):
        (place / str(directory)).mkdir()
        (first := place / str(directory) / "first.py").write_text("x = 1\n")
        for number in range(50_000):
            os.link(first, place / str(directory) / f"{number}.py")
    if by_git:
        git(place, "init")
    program = (
        "import resource, sys\nfrom peft_core.data.summarise import summarise_source\nfrom peft_core.errors import DataError\n"
        "try:\n    summarise_source(sys.argv[1])\nexcept DataError as error:\n"
        "    print(error.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, place], capture_output=True, text=True, check=True)
    code, kilobytes = done.stdout.split()
    assert code == "too_many_files"
    assert int(kilobytes) < 512 << 10
    assert time.monotonic() - started < 60


def test_a_file_that_changes_while_it_is_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstat
    changes: dict[str, Callable[[Path], object]] = {
        "truncated": lambda path: os.truncate(path, 10),
        "longer": lambda path: path.write_text(CODE + "x = 1\n"),
        "other": lambda path: path.write_text(CODE[::-1]),
    }
    for name, change in changes.items():
        path = tmp_path / f"{name}.py"
        path.write_text(CODE)
        os.utime(path, ns=(1, 1))
        waiting = [change]

        def looked_at(descriptor: int, *, path: Path = path, waiting: list[Any] = waiting) -> os.stat_result:
            status = real(descriptor)
            if waiting:
                waiting.pop()(path)
            return status

        monkeypatch.setattr(os, "fstat", looked_at)
        assert read_text(path) is ExclusionReason.CHANGED


@settings(max_examples=300, deadline=5000)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_of_any_encoding_become_text_or_a_reason(content: bytes) -> None:
    text = decode(content)
    if not isinstance(text, ExclusionReason):
        text.encode()


@pytest.mark.parametrize(
    "piece",
    ["eyJ", "password_a", "password=", "://a", "AKIA", "xoxb-", "aws secret key ", "BEGIN ", "sk-", "a1", ":AA"],
)
def test_the_search_for_secrets_takes_linear_time(piece: str) -> None:
    line = piece * (400_000 // len(piece)) + "\n"
    started = time.process_time()
    redact_secrets([line])
    assert time.process_time() - started < 15


def test_a_secret_in_a_line_of_any_length_is_found() -> None:
    for before in (0, 1000, 2040, 2048, 5000, 100_000):
        secret = "ghp_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0dF3gH6"
        lines, found = redact_secrets(["x" * before + f" {secret} " + "y" * before + "\n"])
        assert [finding.row for finding in found] == [0]
        assert secret not in lines[0]


def test_a_giant_record_line_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "' + "x" * 17_000_000)
    with pytest.raises(PeftMcpError, match="longer than"):
        summarise_source(str(tmp_path / "x.jsonl"))
