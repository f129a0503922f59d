"""Base models: find one (`resolve`), read its headers, fingerprint it, convert it."""

from peft_core.bases.resolve import resolve

__all__ = ["resolve"]
