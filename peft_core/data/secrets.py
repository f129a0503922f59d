"""Lines of text that hold a credential.

Named detectors of detect-secrets, verification off, and patterns of our own for what it misses. Its high-entropy and keyword
detectors are left out: in Python's standard library, tests aside, they flag 33 lines, all alphabets, digests and
placeholders; these detectors flag none.
A marker (a piece of text that every value of the kind holds) is looked for first, so that a clean file costs a few substring
searches; only lines with the marker meet a regular expression.
"""

from __future__ import annotations

import importlib
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

_PLUGINS: dict[tuple[str, str], tuple[str, ...]] = {
    ("aws", "AWSKeyDetector"): ("AKIA", "ASIA", "ABIA", "A3T", "aws", "AWS", "Aws"),
    ("azure_storage_key", "AzureStorageKeyDetector"): ("AccountKey=",),
    ("basic_auth", "BasicAuthDetector"): ("://",),
    ("github_token", "GitHubTokenDetector"): ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    ("gitlab_token", "GitLabTokenDetector"): ("glpat-", "gldt-", "glft-", "glsoat-", "glrt-", "GR1348941", "glcbt-",
                                              "glimt-", "glptt-", "glagent-", "gloas-"),
    ("jwt", "JwtTokenDetector"): ("eyJ",),
    ("mailchimp", "MailchimpDetector"): ("-us",),
    ("npm", "NpmDetector"): ("_authToken",),
    ("openai", "OpenAIDetector"): ("T3BlbkFJ",),
    ("pypi_token", "PypiTokenDetector"): ("pypi-Ag",),
    ("sendgrid", "SendGridDetector"): ("SG.",),
    ("slack", "SlackDetector"): ("xox", "XOX", "hooks.slack.com"),
    ("square_oauth", "SquareOAuthDetector"): ("sq0csp-",),
    ("stripe", "StripeDetector"): ("rk_live_", "sk_live_"),
    ("telegram_token", "TelegramBotTokenDetector"): (":AA",),
    ("twilio", "TwilioKeyDetector"): ("AC", "SK"),
}  # fmt: skip
_PATTERNS = (
    ("Hugging Face Token", ("hf_",), r"\bhf_[A-Za-z0-9]{30,}"),
    ("OpenAI Token", ("sk-",), r"\bsk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{20,}|\bsk-[A-Za-z0-9]{48}\b"),
    ("Anthropic Token", ("sk-ant-",), r"\bsk-ant-[A-Za-z0-9_-]{20,}"),
    ("Google API Key", ("AIza",), r"\bAIza[A-Za-z0-9_-]{35}"),
    ("Google OAuth Secret", ("GOCSPX-",), r"\bGOCSPX-[A-Za-z0-9_-]{20,}"),
    ("GitHub Token", ("github_pat_",), r"\bgithub_pat_[A-Za-z0-9_]{22,}"),
    ("Slack Token", ("xapp-", "xoxe"), r"\bxapp-\d-[A-Za-z0-9-]{20,}|\bxoxe[.-][A-Za-z0-9.-]{20,}"),
    ("npm Token", ("npm_",), r"\bnpm_[A-Za-z0-9]{36}"),
    ("DigitalOcean Token", ("dop_v1_", "doo_v1_"), r"\bdo[op]_v1_[a-f0-9]{64}"),
    ("Stripe Key", ("whsec_", "sk_test_"), r"\bwhsec_[A-Za-z0-9]{24,}|\bsk_test_[A-Za-z0-9]{24,}"),
)
_KEY_BEGINS = re.compile(r"BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY|PuTTY-User-Key-File-\d")
_KEY_ENDS = re.compile(r"END [A-Z0-9 ]{0,40}PRIVATE KEY|Private-MAC:")
# What may stand between the two: base64 (in a string, too), header lines, nothing. Code that only names the marker goes on.
_KEY_MATERIAL = re.compile(r"[A-Za-z0-9+/=]{16,}|^\W*[A-Za-z0-9+/=]*\W*$|^\W*[A-Za-z-]+: ")
_PIECE = 2_048  # characters; half of it is longer than what a detector needs to see of a value
_MOST_SEARCHED = 1_000  # values that are looked for elsewhere in their file
_KEY_ROWS = 200  # a key that never ends is as long as the longest that does

# password = "…" is taken for a secret only when the literal looks drawn by lot: most such literals in code are names of
# fields, prompts and test words.
_ASSIGNED = re.compile(
    r"""(?:passw(?:or)?d|passphrase|secret|token|api_?key|access_?key|auth_?key|private_?key|credential)s?\w{0,40}["']?\]?
        \s*(?:=|:|:=|=>|,)\s*[bruf]{0,2}["']([A-Za-z0-9+/=_.!@\#$%^&*~-]{16,200})["']""",
    re.IGNORECASE | re.VERBOSE,
)
_ASSIGNED_MARKERS = ("pass", "secret", "token", "key", "credential")
_MIN_ENTROPY = 3.6  # bits per character; sixteen random hexadecimal digits have about 3.4, English words below 3.3
_PLACEHOLDER = re.compile(r"example|sample|dummy|placeholder|change|your|test|xxx|abc|1234|fake|mock", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]?[a-z]{3,}|[A-Z]{5,}")
_BASIC_AUTH_PLACEHOLDER = re.compile(
    r"^(?:pass(?:word|wd)?|pw|pwd|secret|token|\*+|x+|\.+|[%$<{\[].*|.*[}>\])]|port|\d{1,5}.*|user.*)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Finding:
    row: int
    type: str


def redact_secrets(lines: Sequence[str]) -> tuple[list[str], list[Finding]]:
    """The lines with those that hold a secret blanked, and what was found where; never the value.

    Blank, not replaced by a mark: a mark would be learned, and a line less keeps the most of the code around it. Blanked
    before the text is cut, so that no unit, context or header can bring the value back.
    """
    text = "".join(lines)
    found: dict[int, str] = dict.fromkeys(_private_key_rows(lines, text), "Private Key")
    starts: list[int] = []  # of rows in the text
    searched: set[str] = set()
    for detector in _detectors():
        if detector.may_match(text):
            starts = starts or [0, *accumulate(map(len, lines))]
            for row, value in _values(detector, lines, text, starts):
                found.setdefault(row, detector.type)
                if value not in searched and len(searched) < _MOST_SEARCHED:
                    # The same value again, where nothing around it gives it away.
                    searched.add(value)
                    for other in _rows_with(value, lines, text):
                        found.setdefault(other, detector.type)
    clean = ["\n" if row in found else line for row, line in enumerate(lines)] if found else list(lines)
    return clean, [Finding(row, found[row]) for row in sorted(found)]


def _values(detector: _Detector, lines: Sequence[str], text: str, starts: Sequence[int]) -> Iterator[tuple[int, str]]:
    for row in sorted({row for marker in detector.markers for row in _rows_of(marker, text, starts)}):
        for piece in _pieces(lines[row]):
            for value in detector.values(piece):
                yield row, value


def _rows_of(marker: str, text: str, starts: Sequence[int]) -> Iterator[int]:
    """Rows that hold a marker, found in the text as a whole: many times as fast as row by row."""
    at = text.find(marker)
    while at >= 0:
        row = bisect_right(starts, at) - 1
        yield row
        at = text.find(marker, starts[row + 1])


def _pieces(line: str) -> Iterator[str]:
    """A line, a long one in pieces that overlap: some of the detectors take the square of its length."""
    if len(line) <= _PIECE:
        yield line
        return
    for start in range(0, len(line), _PIECE // 2):
        yield line[start : start + _PIECE]


def _rows_with(value: str, lines: Sequence[str], text: str) -> list[int]:
    if len(value) < 8 or text.count(value) < 2:
        return []
    return [row for row, line in enumerate(lines) if value in line]


@dataclass(frozen=True, slots=True)
class _Detector:
    type: str
    markers: tuple[str, ...]
    values: Callable[[str], Iterable[str]]

    def may_match(self, text: str) -> bool:
        return any(marker in text for marker in self.markers)


@cache
def _detectors() -> tuple[_Detector, ...]:
    detectors = []
    for (module, name), markers in _PLUGINS.items():
        plugin = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)()
        values = _basic_auth(plugin) if module == "basic_auth" else plugin.analyze_string
        detectors.append(_Detector(plugin.secret_type, markers, values))
    for kind, markers, pattern in _PATTERNS:
        detectors.append(_Detector(kind, markers, re.compile(pattern).findall))
    markers = tuple(form for marker in _ASSIGNED_MARKERS for form in (marker, marker.upper(), marker.capitalize()))
    detectors.append(_Detector("Secret in an assignment", markers, _assigned))
    return tuple(detectors)


def _basic_auth(plugin: Any) -> Callable[[str], list[str]]:
    """Its findings without the `user:password@host` of documentation."""
    return lambda line: [value for value in plugin.analyze_string(line) if not _BASIC_AUTH_PLACEHOLDER.match(value)]


def _assigned(line: str) -> Iterator[str]:
    for value in _ASSIGNED.findall(line):
        mixed = any(char.isdigit() for char in value) and any(char.isalpha() for char in value)
        if mixed and _entropy(value) >= _MIN_ENTROPY and not _PLACEHOLDER.search(value) and not _is_wordy(value):
            yield value


def _is_wordy(value: str) -> bool:
    """Names and paths are made of words; what is drawn by lot is not."""
    return sum(len(word) for word in _WORDS.findall(value)) > len(value) / 2


def _entropy(value: str) -> float:
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def _private_key_rows(lines: Sequence[str], text: str) -> Iterator[int]:
    """Every row of a private key, from its first line to its last."""
    if not _KEY_BEGINS.search(text):
        return
    inside = 0
    for row, line in enumerate(lines):
        if _KEY_BEGINS.search(line):
            inside = _KEY_ROWS
        elif inside and not (_KEY_MATERIAL.search(line) or _KEY_ENDS.search(line)):
            inside = 0
        if not inside:
            continue
        yield row
        inside = 0 if _KEY_ENDS.search(line) else inside - 1
