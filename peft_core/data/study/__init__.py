"""Study items: questions and answers about the API of a repository, which an assistant writes and the training checks.

- `definitions.py`: the functions, methods and classes of a file, with their names.
- `index.py`: what a whole repository defines, uses and imports.
- `answers.py`: the names in an answer that nothing defines. `items.py`: which items are used, and why the others are not.
- `builtins.py`: the names that a language has without an import.

Names are compared, not types: `client.fetch()` is accepted if the repository has anything that is called `fetch`. What this
finds is the typical mistake of a language model, a name that does not exist.
"""
