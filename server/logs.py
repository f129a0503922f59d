"""The server's log on standard error: one line per event, without the values that callers gave."""

from __future__ import annotations

import logging
import re
import sys

_CODE = re.compile(r"\[\w+\]\Z")  # at the end of an error's text


def configure_logging(level: str) -> None:
    """Set up logging before the SDK does it with rich, which breaks each message into lines of 80 columns."""
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(leave_out_values)


def leave_out_values(record: logging.LogRecord) -> bool:
    """Leave only the code of an error in the SDK's line about a failed call. Its text quotes arguments, such as a token."""
    if isinstance(record.msg, str) and record.msg.endswith(" failed: %r") and record.args:
        *what, text = record.args if isinstance(record.args, tuple) else (record.args,)
        code = _CODE.search(str(text))
        record.msg = record.msg.removesuffix("%r") + "%s"
        record.args = (*what, code[0] if code else "[error]")
    return True
