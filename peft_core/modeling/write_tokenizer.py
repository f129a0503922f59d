"""Write the tokenizer of a GGUF file as its conversion has it, in a process of its own: a TokenizerRequest (JSON) on standard
input, a TokenizerAnswer or an ErrorInfo on standard output. A process that prepares a dataset without torch starts it.
"""

from __future__ import annotations

import sys

from peft_core.modeling import convert
from peft_core.schemas.machine import TokenizerAnswer, TokenizerRequest
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="reading of the tokenizer",
    crash_code="inspection_failed",
    log="standard error",
    memory_advice=("Close other programs.",),
)


def answer(request: TokenizerRequest) -> TokenizerAnswer:
    """Write the files.

    Raises:
        BaseCheckpointError: The GGUF file cannot be used.
    """
    convert.write_tokenizer(request.gguf, request.directory)
    return TokenizerAnswer()


if __name__ == "__main__":
    sys.exit(answer_request(TokenizerRequest, answer, TASK))
