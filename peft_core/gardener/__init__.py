"""Codebase Gardener's side: the project registry and the records that it shares with this package through the data directory.

- `documents.py`: its JSON files, read as files of unknown origin and changed under a lock.
- `registry.py`: its projects: where their code is, and what it shows about their training.
"""
