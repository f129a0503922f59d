"""MCP prompts: what a person asks for most, as instructions that name the tools, their order, and what to report."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver.prompts import Prompt
from pydantic import Field

from peft_core.schemas.training import MAX_PROJECT_ID

MAX_ARGUMENT = 4096  # characters; no path is longer

Text = Annotated[str, Field(min_length=1, max_length=MAX_ARGUMENT)]


def train_and_evaluate(
    path: Annotated[Text, Field(description="Absolute path of a repository or of a file of records.")],
    project_id: Annotated[
        str, Field(max_length=MAX_PROJECT_ID, description="Omit to use the name of the directory.")
    ] = "",
) -> str:
    """Train an adapter on a code base, and report whether it helps on files that it was not trained on."""
    project = repr(project_id) if project_id else "the name of the directory, in letters, digits, '-' and '_'"
    return f"""\
Train a LoRA adapter with the tools of peft-mcp, and find out whether it helps.
Data: {path!r}. Project id: {project}.

1. Call inspect_training_data(training_data=...) with the data. If it is refused, or most files are left out, report why and
   what the answer suggests, and stop. Otherwise say in one sentence how many examples there are, and how much time and memory
   the training takes. Ask me before a training of more than an hour.
2. Call train_adapter(project_id=..., training_data=...) without config, except for what step 1 suggested.
3. Call get_training_status(project_id=...) until the job has ended. Each answer says in `next` when to ask again.
4. Report the verdict first (helps, no_difference or harms), then the held-out perplexity of the base model and of the adapter,
   every caveat, and the path of the report. If it does not help, say so plainly, with what `next` suggests.
   If the job failed, quote its error and its suggestion. If it was interrupted, offer resume_training(job_id=...).
5. If it helps, offer to try it: load_adapter(adapter_path=...) with the project id, then
   generate(prompt=..., compare_with_base=true).
"""


def complete_with_adapter(
    project_id: Annotated[Text, Field(description="Whose adapter; list_adapters shows the ids.")],
    file: Annotated[Text, Field(description="The file to continue, optionally with a line: src/app.py:120.")],
) -> str:
    """Continue the code in a file with a project's adapter, beside what the base model alone would write."""
    return f"""\
Complete the code in {file!r} with the adapter of project {project_id!r}, with the tools of peft-mcp.

1. Call list_adapters(project_id={project_id!r}). If there is none, say so, offer to train one, and stop. If the verdict of the
   current adapter is not 'helps', say so and continue.
2. Call load_adapter(adapter_path={project_id!r}). If status is 'fallback', report the reason and stop.
3. Read the file. The text to continue is the code before the line that I gave, or the whole file: at most the last 80 lines,
   from the beginning of a definition.
4. Call generate(prompt=..., file_path=..., max_new_tokens=128, compare_with_base=true), where file_path is the file's path in
   the repository.
5. Show the adapter's completion as code. Say in one sentence how the base model's differs, and whether the completion names
   anything that the repository does not have. Do not change the file before I agree.
"""


def clean_up() -> str:
    """Find what is no longer needed on disk, ask, delete it, and report how much space is free again."""
    return """\
Free disk space with the tools of peft-mcp. Delete nothing that I have not agreed to.

1. Call disk_usage() and list_adapters(). Show a table of what takes most space: name, size in MB, what would be lost with it,
   and for an adapter also its verdict, its age, and whether it is the project's current one.
2. Propose what to delete, in this order: what is made again when it is needed, jobs that have ended, adapters that are not
   current and do not help. Never propose a project's only adapter that helps. If nothing is worth deleting, say so.
3. Ask me what to delete, and wait for the answer. First unload each of these adapters that is in memory:
   unload_adapter(adapter_path=...).
4. Call disk_usage(free=...) with the names that I agreed to.
5. Report what was deleted, what was kept and why, and how much space is free again.
"""


PROMPTS = [
    Prompt.from_function(train_and_evaluate, title="Train an adapter and measure whether it helps"),
    Prompt.from_function(complete_with_adapter, title="Complete code with an adapter"),
    Prompt.from_function(clean_up, title="Free disk space"),
]
