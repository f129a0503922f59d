"""Base models: find one, read its headers, fingerprint it. No torch."""
