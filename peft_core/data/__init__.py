"""Training data: source → units → examples → held-out split.

`inspect` and `write_records` run in the server, the rest in the training child. Importing this package is light: grammars,
pathspec, charset-normalizer and detect-secrets are loaded by the first file that needs them.
"""

from peft_core.data.codec import Codec
from peft_core.data.dataset import PreparedDataset
from peft_core.data.prepare import prepare
from peft_core.data.read import read_examples
from peft_core.data.records import write_records
from peft_core.data.source import inspect

__all__ = ["Codec", "PreparedDataset", "inspect", "prepare", "read_examples", "write_records"]
