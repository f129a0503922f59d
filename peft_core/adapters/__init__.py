"""Trained adapters: publish, list, describe, verify and delete them. `service.py` is the entry point."""
