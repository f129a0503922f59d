"""Addresses of servers that run beside peft-mcp."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit


def local_address(address: str) -> str:
    """Return the address of a server as a client uses it: 0.0.0.0, which a server listens on, becomes 127.0.0.1."""
    return re.sub(r"^((?:https?://)?)(?:0\.0\.0\.0|\[::\])(?=[:/]|$)", r"\g<1>127.0.0.1", address.strip().rstrip("/"))


def is_on_this_machine(address: str) -> bool:
    """Return whether an address is a loopback one."""
    try:
        host = urlsplit(address if "://" in address else f"http://{address}").hostname or "127.0.0.1"
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
