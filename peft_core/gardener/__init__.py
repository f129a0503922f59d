"""Codebase Gardener's side: what it shares with this package through the data directory, the environment and Python.

- `registry.py`: its projects: where their code is, and what it shows about their training.
- `documents.py`: its JSON files, read as files of unknown origin and changed under a lock.
- `chunks.py`: its code chunks as records. `names.py`: its names for settings.
"""
