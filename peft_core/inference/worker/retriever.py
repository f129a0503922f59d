"""Code from the training, put before a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_core.base_models.families import FIM_TOKENS
from peft_core.errors import InvalidArgument
from peft_core.inference.worker.models import LoadedModel, encode
from peft_core.retrieval.context import CANDIDATES, MAX_CONTEXT_TOKENS, Context, compose, last_lines
from peft_core.retrieval.units import read_units
from peft_core.schemas.generation import GenerationRequest
from peft_core.schemas.retrieval import Retrieved, RetrievedUnit, UnitSource

if TYPE_CHECKING:
    from peft_core.retrieval.worker.index import UnitIndex


class Retriever:
    """Keeps the index of the adapter that was used last: building one takes a second or two."""

    def __init__(self) -> None:
        self._source: UnitSource | None = None
        self._index: UnitIndex | None = None

    def add_context(
        self, request: GenerationRequest, source: UnitSource, model: LoadedModel
    ) -> tuple[GenerationRequest, Retrieved]:
        """Return the request with the best units before its prompt, and which ones they are.

        Raises:
            InvalidArgument: 'prompt_too_long_to_retrieve', or as for `encode`; 'no_code_to_retrieve'; the prompt is a template.
            DataError: the dataset is damaged.
        """
        index = self._index_of(source)
        if not index.units:
            raise InvalidArgument(
                "retrieve",
                request.retrieve,
                "the adapter was trained on records only, and only code is searched",
                code="no_code_to_retrieve",
                suggestions=["Omit retrieve"],
            )
        if request.prompt is not None and not model.tokenizer.written_prompt(request.prompt).literal:
            raise InvalidArgument(
                "retrieve",
                request.retrieve,
                "the prompt begins with a special token, so it is a template, and it is not known where in it code belongs",
                suggestions=["Give messages, or prefix and suffix, instead of the template", "Or omit retrieve"],
            )
        prompt = _searched_text(request)
        taken = len(encode(request, model).ids)
        free = model.context_length - taken - request.max_new_tokens
        best = index.best(last_lines(prompt), CANDIDATES)
        context = compose(
            best,
            prompt=prompt,
            count=lambda text: model.tokenizer.count([text], literal=True)[0],
            budget=min(free, MAX_CONTEXT_TOKENS),
        )
        if context.too_long and not context.units:
            raise InvalidArgument(
                "retrieve",
                request.retrieve,
                f"no matching unit fits ({context.too_long} tried): the prompt takes {taken} and the answer up to "
                f"{request.max_new_tokens} of the {model.context_length} tokens that {model.base.name} has in "
                f"{model.engine}, and units may take {MAX_CONTEXT_TOKENS}",
                code="prompt_too_long_to_retrieve",
                suggestions=["Shorten the prompt or lower max_new_tokens", "Or omit retrieve"],
            )
        return _with_context(request, context), _describe(source, context, len(index.units))

    def _index_of(self, source: UnitSource) -> UnitIndex:
        from peft_core.retrieval.worker.index import UnitIndex  # noqa: PLC0415 -- few requests need it

        known = self._source is not None and self._source.examples == source.examples
        if self._index is None or not known:
            self._index = UnitIndex(read_units(source.examples, FIM_TOKENS))
            self._source = source
        return self._index


def _searched_text(request: GenerationRequest) -> str:
    if request.messages is not None:
        return next((message.content for message in reversed(request.messages) if message.role == "user"), "")
    return (request.prompt if request.prompt is not None else request.prefix) or ""


def _with_context(request: GenerationRequest, context: Context) -> GenerationRequest:
    """Put the context before the code; in a conversation, before the last question."""
    if not context.text:
        return request
    if request.messages is None:
        field = "prompt" if request.prompt is not None else "prefix"
        return request.model_copy(update={field: context.text + (getattr(request, field) or "")})
    messages = list(request.messages)
    last = max(position for position, message in enumerate(messages) if message.role == "user")
    content = f"Code of this project:\n\n{context.text}\n{messages[last].content}"
    messages[last] = messages[last].model_copy(update={"content": content})
    return request.model_copy(update={"messages": messages})


def _describe(source: UnitSource, context: Context, searched: int) -> Retrieved:
    notes = [source.note]
    if not context.units:
        notes.append(
            "No unit that is not in the prompt already shares a word with its last lines, so nothing was added."
        )
    if context.too_long:
        notes.append(f"{context.too_long} more matching units did not fit.")
    return Retrieved(
        adapter_path=str(source.adapter_path),
        units=tuple(
            RetrievedUnit(path=unit.path, start_line=unit.start_line, end_line=unit.end_line, tokens=tokens)
            for unit, tokens in context.units
        ),
        tokens=context.tokens,
        searched_units=searched,
        note=" ".join(filter(None, notes)),
    )
