"""What the name of a file or directory says: code, or a reason to leave it out."""

# ruff: noqa: SIM905 - a row of words reads better than a column of quoted ones
from __future__ import annotations

import re
from enum import StrEnum

from peft_core.data.languages import Language, of_file


class Reason(StrEnum):
    """Why something was left out; stable names, they are shown and counted."""

    BINARY = "binary"
    CHANGED = "changed"  # or gone, while it was read
    DATA = "data"  # a table, not code
    DUPLICATE = "duplicate"
    EMPTY = "empty"
    GENERATED = "generated"
    HIDDEN = "hidden"
    IGNORED = "ignored"
    LICENCE = "licence"
    LOCK_FILE = "lock_file"
    MAYBE_TRAINED_ON = "maybe_trained_on"  # by the adapter that is measured; what is known of that is a sample
    MINIFIED = "minified"
    NEAR_DUPLICATE = "near_duplicate"
    OVER_FILE_SHARE = "over_file_share"  # of a file so large that it would drown the others
    NO_CODE = "no_code"
    NOT_NEEDED = "not_needed"  # the run ends before it would come to them
    NOT_TEXT = "not_text"
    SECRET = "secret"  # noqa: S105 - the name of a reason
    SEEN_IN_TRAINING = "seen_in_training"  # held out, and half of its lines are trained on elsewhere
    SENSITIVE = "sensitive"
    SPECIAL = "special"
    SYMLINK = "symlink"
    TINY = "tiny"
    TOO_LARGE = "too_large"
    TOO_LONG = "too_long"
    TRAINED_ON = "trained_on"  # by the adapter that is measured
    UNREADABLE = "unreadable"
    VENDORED = "vendored"


VENDORED = frozenset(
    "node_modules bower_components jspm_packages vendor vendored _vendor third_party thirdparty third-party "
    "site-packages dist-packages __pycache__ pods deriveddata".split()
)
# Where git keeps the list, what a build writes is ignored already, and a tracked `build/` holds code.
_BUILT = frozenset("dist build target out obj bazel-out htmlcov venv virtualenv".split())
_LOCK_FILES = frozenset("package-lock.json npm-shrinkwrap.json pnpm-lock.yaml go.sum gradle.lockfile".split())
_GENERATED = re.compile(
    r"(_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h)|_pb\.(js|ts|d\.ts)|\.g\.(dart|cs)|\.freezed\.dart|\.designer\.cs"
    r"|[._-]generated\.\w+|_generated\.\w+|\.gen\.\w+|^moc_.*\.cpp|^ui_.*\.h)$",
    re.IGNORECASE,
)
_MINIFIED = re.compile(r"[.-]min\.(js|css|mjs)$|\.bundle\.js$", re.IGNORECASE)
_SENSITIVE = re.compile(
    r"^(\.env(\..*)?|.*\.env|\.?netrc|_netrc|\.npmrc|\.pypirc|\.pgpass|\.git-credentials|\.htpasswd|\.boto|\.s3cfg"
    r"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?(\..*)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|ovpn)"
    r"|credentials(\..*)?|client_secrets?(\..*)?|secrets?\.\w+|authorized_keys|known_hosts|kubeconfig)$",
    re.IGNORECASE,
)
_SENSITIVE_DIRECTORIES = frozenset({".ssh", ".gnupg", ".aws", ".kube", ".docker", ".azure"})
_BINARY = frozenset(
    "png jpg jpeg gif bmp ico webp tiff pdf zip gz tgz bz2 xz zst 7z rar jar war whl egg so dylib dll exe a o lib obj "
    "class pyc pyo pyd wasm woff woff2 ttf otf eot mp3 mp4 mov avi mkv wav ogg flac webm sqlite db bin dat npy npz pt "
    "pth onnx gguf safetensors parquet arrow pkl pickle h5 doc docx xls xlsx ppt pptx psd ai".split()
)


def classify(name: str) -> Language | Reason:
    """Decide by a file's name alone."""
    if _SENSITIVE.match(name):
        # `secrets.py` is the name of code, `secrets.yaml` is not.
        language = of_file(name)
        if language is None or not name.lower().startswith(("secret", "credentials", "client_secret")):
            return Reason.SENSITIVE
    if name.lower() in _LOCK_FILES or name.lower().endswith(".lock"):
        return Reason.LOCK_FILE
    if _MINIFIED.search(name):
        return Reason.MINIFIED
    if _GENERATED.search(name):
        return Reason.GENERATED
    language = of_file(name)
    if language is not None:
        return language
    return Reason.BINARY if name.rpartition(".")[2].lower() in _BINARY else Reason.NO_CODE


def classify_directory(name: str, *, by_git: bool) -> Reason | None:
    lowered = name.lower()
    if lowered in _SENSITIVE_DIRECTORIES:
        return Reason.SENSITIVE
    if lowered in VENDORED or (not by_git and lowered in _BUILT):
        return Reason.VENDORED
    return Reason.HIDDEN if name.startswith(".") else None
