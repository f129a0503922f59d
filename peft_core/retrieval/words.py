"""The words of code: identifiers as a whole, and their parts."""

from __future__ import annotations

import re

MAX_WORD = 100  # characters; longer ones are data, not names

_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_PART_BORDER = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: each identifier, and its snake_case and camelCase parts of two letters or more.

    `HTTPClient.send_all` gives httpclient, http, client, send_all, send, all.
    """
    found = []
    for identifier in _IDENTIFIER.findall(text):
        if len(identifier) > MAX_WORD:
            continue
        whole = identifier.strip("_").lower()
        parts = [part.lower() for part in _PART_BORDER.split(identifier) if len(part) > 1]
        found += [whole, *parts] if len(parts) > 1 else [whole]
    return [word for word in found if word]
