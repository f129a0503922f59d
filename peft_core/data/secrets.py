"""Find lines that hold a credential, and blank them.

In: the lines of a file. Out: the lines without secrets, and a `Finding` (row and type, never the value) for each.

This wraps single detectors of detect-secrets, without its verification over the network, and adds patterns for tokens that it
misses. Its own scanner is not used: it reads whole files from disk, and its high-entropy and keyword detectors flag 33 lines of
Python's standard library (without tests), all of them alphabets, digests and placeholders; the detectors here flag none.

Each detector has markers, substrings that every value of its kind contains. They are searched first, so that a clean file costs
a few substring searches and regular expressions only run on lines with a marker.
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
    ("OpenRouter Token", ("sk-or-v1-",), r"\bsk-or-v1-[a-f0-9]{64}"),
    ("DeepSeek Token", ("sk-",), r"\bsk-[a-f0-9]{32}\b"),
    ("Groq Token", ("gsk_",), r"\bgsk_[A-Za-z0-9]{40,}"),
    ("xAI Token", ("xai-",), r"\bxai-[A-Za-z0-9]{60,}"),
    ("Perplexity Token", ("pplx-",), r"\bpplx-[A-Za-z0-9]{40,}"),
    ("NVIDIA Token", ("nvapi-",), r"\bnvapi-[\w-]{50,}"),
    ("Replicate Token", ("r8_",), r"\br8_[A-Za-z0-9]{37}"),
    ("LangSmith Token", ("lsv2_",), r"\blsv2_[a-z]{2}_[a-f0-9]{32}_[a-f0-9]{10}"),
    ("Shopify Token", ("shpat_", "shpca_", "shppa_", "shpss_"), r"\bshp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}"),
    ("Vault Token", ("hvs.",), r"\bhvs\.[\w-]{24,}"),
    ("Doppler Token", ("dp.",), r"\bdp\.(?:pt|st|ct)\.[\w.-]{40,}"),
    ("Databricks Token", ("dapi",), r"\bdapi[a-f0-9]{32}"),
    ("Linear Token", ("lin_api_",), r"\blin_api_[A-Za-z0-9]{40}"),
    ("Notion Token", ("ntn_", "secret_"), r"\bntn_[A-Za-z0-9]{40,}|\bsecret_[A-Za-z0-9]{43}\b"),
    ("Mailgun Key", ("key-",), r"\bkey-[a-f0-9]{32}\b"),
    ("Django Secret Key", ("django-insecure-",), r"django-insecure-[^\s\"']{30,}"),
    ("Postman Token", ("PMAK-",), r"\bPMAK-[a-f0-9]{24}-[a-f0-9]{34}"),
    ("New Relic Key", ("NRAK-",), r"\bNRAK-[A-Z0-9]{27}"),
    ("Supabase Token", ("sbp_",), r"\bsbp_[a-f0-9]{40}"),
    ("PlanetScale Secret", ("pscale_",), r"\bpscale_(?:pw|tkn)_[\w.-]{32,}"),
    ("Figma Token", ("figd_",), r"\bfigd_[\w-]{40,}"),
    ("Grafana Token", ("glsa_",), r"\bglsa_[A-Za-z0-9]{32}_[a-f0-9]{8}"),
    ("Pulumi Token", ("pul-",), r"\bpul-[a-f0-9]{40}"),
    ("Terraform Token", (".atlasv1.",), r"\b[A-Za-z0-9]{14}\.atlasv1\.[\w-]{60,}"),
    ("age Key", ("AGE-SECRET-KEY-",), r"\bAGE-SECRET-KEY-1[A-Z0-9]{58}"),
    ("Webhook", ("/api/webhooks/", "/webhookb2/"), r"/api/webhooks/\d+/[\w-]{60,}|/webhookb2/[\w@/-]{60,}"),
    ("Signed URL", ("sig=",), r"[?&]sig=[A-Za-z0-9%+/]{43,}"),
    ("Password in a URL", ("://",), r"://:[^\s:/@\"'`{}<>$*]{8,}(?=@)|://[a-f0-9]{32}(?=@)"),
)
_KEY_BEGINS = re.compile(r"BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY|PuTTY-User-Key-File-\d")
_KEY_ENDS = re.compile(r"END [A-Z0-9 ]{0,40}PRIVATE KEY|Private-MAC:")
# What may be between the two: base64 (also in a string), header lines, or nothing. Code that only names the marker is no key.
_KEY_MATERIAL = re.compile(r"[A-Za-z0-9+/=]{16,}|^\W*[A-Za-z0-9+/=]*\W*$|^\W*[A-Za-z-]+: ")
_WINDOW = 2_048  # characters; half a window is longer than any value that a detector must see
_MAX_SEARCHED_VALUES = 1_000  # values whose other occurrences in the file are searched
_MAX_KEY_ROWS = 200  # where a key without an end is cut off; the longest keys have this many rows

# password = "…" counts as a secret only if the literal looks random: most such literals in code are field names, prompts and
# test values. Without quotes, as in shell scripts, YAML, URLs and comments, a name or an expression may follow, so the value
# must have upper- and lower-case letters, or be hexadecimal. Of a longer value the first 200 characters are enough.
_NAME = (
    r"(?:passw(?:or)?d|passphrase|passcode|pass(?![a-z])|pwd|secret|token|credential|"
    r"(?:api|access|account|auth|encryption|master|private|shared|signing|subscription)[_-]?key)s?[\w-]{0,40}"
)
_VALUE = r"[A-Za-z0-9+/=_.!@\#$%^&*()|<>?~-]"
_QUOTED = re.compile(
    _NAME
    + rf"""\\?["']?[\])]{{0,2}}
        (?:\s*:\s*[\w.|\[\] ]{{1,30}}=|\s*(?:(?:\|\||\?\?|[:?!])?={{1,3}}>?|[:,{{]|or|\|\||\?\?|\?:)|\s+value=)
        \s*[bruf]{{0,2}}\\?["'`]({_VALUE}{{16,199}}(?=\\?["'`])|{_VALUE}{{200}})""",
    re.IGNORECASE | re.VERBOSE,
)
_UNQUOTED = re.compile(
    rf"(?:{_NAME}(?:\s*[=:]\s*|\s+(?:is\s+)?|>)|\b(?:Bearer|Basic)\s+)"
    r"([A-Za-z0-9+/=_-]{16,199}(?![\w.(\[])|[A-Za-z0-9+/=_-]{200})",
    re.IGNORECASE,
)
_ASSIGNED_MARKERS = ("pass", "pwd", "secret", "token", "key", "credential", "bearer", "basic")
_MIN_ENTROPY = 3.6  # bits per character; sixteen random hexadecimal digits have about 3.4, English words below 3.3
_PLACEHOLDER = re.compile(r"example|sample|dummy|placeholder|change|your|test|xxx|abc|1234|fake|mock", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]?[a-z]{4,}|[A-Z]{5,}|(?<![A-Za-z0-9])[A-Za-z]{2,3}(?![A-Za-z0-9])")
# Consonants as no English word has them. Without this, 1 of 40 random values of 20 letters and digits counts as words; with it,
# 1 of 500.
_NO_WORD = re.compile(
    r"[bcdfghjklmnpqrstvwxz]{4}|[jqvxz][bcdfghjklmnpqrstvwxz]|[bcdfghjkmpqtvwxz]q|q[^u]", re.IGNORECASE
)
_HEX = re.compile(r"[a-f0-9]{32,}|[A-F0-9]{32,}")
_SHORT_HEX = re.compile(r"[a-f0-9]{16,31}|[A-F0-9]{16,31}")  # has less entropy than other random values of its length
_MIN_HEX_DIGITS = 8  # distinct ones; of sixteen random digits, 98 % have as many
_PLACEHOLDER_WITHIN = 64  # characters; a long random value may contain a short word by chance
# Documentation also has addresses with a port before markup with an @. A `%` begins a placeholder, or an escaped character.
_BASIC_AUTH_PLACEHOLDER = re.compile(
    r"(?:pass(?:word|wd)?|pw|pwd|secret|token|port|user\w{0,4}|x+|\.+"
    r"|[<{].*|.*[}>]|%(?![0-9a-f]{2}).*|\d{1,5}(?:[\"<>\\`|].*)?)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Finding:
    row: int
    type: str


def redact_secrets(lines: Sequence[str]) -> tuple[list[str], list[Finding]]:
    """Return the lines with those that hold a secret blanked, and the findings.

    Lines are blanked, not replaced by a mark, because the model would learn the mark. It happens before the text is split,
    so that no unit, context or header can contain the value.
    """
    text = "".join(lines)
    type_of_row: dict[int, str] = dict.fromkeys(_private_key_rows(lines, text), "Private Key")
    starts: list[int] = []  # offset of each row in the text
    searched: set[str] = set()
    for detector in _detectors():
        if detector.may_match(text):
            starts = starts or [0, *accumulate(map(len, lines))]
            for row, value in _values(detector, lines, text, starts):
                type_of_row.setdefault(row, detector.type)
                if value not in searched and len(searched) < _MAX_SEARCHED_VALUES:
                    # The same value may occur elsewhere without a marker.
                    searched.add(value)
                    for other in _rows_with(value, lines, text):
                        type_of_row.setdefault(other, detector.type)
    clean = ["\n" if row in type_of_row else line for row, line in enumerate(lines)] if type_of_row else list(lines)
    return clean, [Finding(row, type_of_row[row]) for row in sorted(type_of_row)]


def _values(detector: _Detector, lines: Sequence[str], text: str, starts: Sequence[int]) -> Iterator[tuple[int, str]]:
    for row in sorted({row for marker in detector.markers for row in _rows_of(marker, text, starts)}):
        for window in _windows(lines[row]):
            for value in detector.values(window):
                yield row, value


def _rows_of(marker: str, text: str, starts: Sequence[int]) -> Iterator[int]:
    """Yield the rows that hold a marker. Searching the text as a whole is many times as fast as searching row by row."""
    at = text.find(marker)
    while at >= 0:
        row = bisect_right(starts, at) - 1
        yield row
        at = text.find(marker, starts[row + 1])


def _windows(line: str) -> Iterator[str]:
    """Yield a line, or overlapping windows of a long one: some detectors take time quadratic in its length."""
    if len(line) <= _WINDOW:
        yield line
        return
    for start in range(0, len(line), _WINDOW // 2):
        yield line[start : start + _WINDOW]


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
    """Return a function that finds `user:password@host`, without the placeholders of documentation."""
    return lambda line: [value for value in plugin.analyze_string(line) if not _BASIC_AUTH_PLACEHOLDER.fullmatch(value)]


def _assigned(line: str) -> Iterator[str]:
    yield from filter(_is_random, _QUOTED.findall(line))
    for value in _UNQUOTED.findall(line):
        both_cases = any(char.isupper() for char in value) and any(char.islower() for char in value)
        if (both_cases or _HEX.fullmatch(value)) and _is_random(value):
            yield value


def _is_random(value: str) -> bool:
    if _HEX.fullmatch(value):
        return len(set(value)) >= _MIN_HEX_DIGITS
    mixed = any(char.isdigit() for char in value) and any(char.isalpha() for char in value)
    if not mixed or _PLACEHOLDER.search(value, 0, _PLACEHOLDER_WITHIN):
        return False
    if _SHORT_HEX.fullmatch(value):
        return len(set(value)) >= _MIN_HEX_DIGITS
    return _entropy(value) >= _MIN_ENTROPY and not _is_wordy(value)


def _is_wordy(value: str) -> bool:
    """Return whether most letters of a value belong to words, as in names and paths but not in random values."""
    words = (word for word in _WORDS.findall(value) if not _NO_WORD.search(word))
    return sum(map(len, words)) > sum(map(str.isalpha, value)) / 2


def _entropy(value: str) -> float:
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def _private_key_rows(lines: Sequence[str], text: str) -> Iterator[int]:
    """Yield every row of each private key, from its first line to its last."""
    if not _KEY_BEGINS.search(text):
        return
    rows_left = 0
    for row, line in enumerate(lines):
        if _KEY_BEGINS.search(line):
            rows_left = _MAX_KEY_ROWS
        elif rows_left and not (_KEY_MATERIAL.search(line) or _KEY_ENDS.search(line)):
            rows_left = 0
        if not rows_left:
            continue
        yield row
        rows_left = 0 if _KEY_ENDS.search(line) else rows_left - 1
