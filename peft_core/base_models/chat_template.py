"""Render a base model's chat template. Planning, preview, training and inference all use this module.

The template is code that the publisher of the base model wrote. It runs in jinja2's sandbox, with the filters and globals that
transformers gives it, so that it renders what the base model was trained with. The sandbox bounds neither time nor memory:
the server never renders; a child process that it can stop does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from peft_core.base_models.checkpoint_info import TemplateSources
from peft_core.errors import sanitize

MAX_TEMPLATE_CHARACTERS = 500_000  # the longest published ones have 40 thousand
MAX_RENDERED_CHARACTERS = 64_000_000
# `strftime_now` returns this day: a data set must not depend on the day on which it is made, nor an answer on the day on which
# it is asked for. Llama 3.2's template has the same day for programs without a clock.
TODAY = datetime(2024, 7, 26)  # noqa: DTZ001 - templates format a local date
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError),
)


class TemplateRefusal(Exception):
    """The chat template refuses a conversation, or does not write it completely. The message is the reason, after "it"."""

    def __init__(self, reason: str, *, is_the_templates: bool = False) -> None:
        super().__init__(reason)
        self.is_the_templates = is_the_templates  # the template itself raised it


@dataclass(frozen=True)
class ChatTemplate:
    """A base model's chat template with the tokens that it may refer to."""

    sources: TemplateSources
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token": "<s>"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render messages; with `add_generation_prompt`, up to the point at which the model continues.

        Raises:
            TemplateRefusal: The template is broken, refuses these messages, or writes more than any conversation has.
        """
        variables = {
            **self.special_tokens,
            "messages": [_with_reasoning_aliases(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._compiled(has_tools=bool(tools)).generate(variables):
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    raise TemplateRefusal(f"writes more than {MAX_RENDERED_CHARACTERS} characters")
                pieces.append(piece)
        except _TEMPLATE_ERRORS as error:
            raise TemplateRefusal(
                f"says: {sanitize(str(error) or type(error).__name__, limit=200)}", is_the_templates=True
            ) from error
        return "".join(pieces)

    def _compiled(self, *, has_tools: bool) -> jinja2.Template:
        if has_tools and self._tool_use_template is not None:
            return self._tool_use_template
        if self._default_template is None:
            raise TemplateRefusal(self.sources.why_none)
        return self._default_template

    @cached_property
    def _default_template(self) -> jinja2.Template | None:
        return None if self.sources.default is None else _compile(self.sources.default)

    @cached_property
    def _tool_use_template(self) -> jinja2.Template | None:
        return None if self.sources.tool_use is None else _compile(self.sources.tool_use)


def _with_reasoning_aliases(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under the names that templates read, as transformers does."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateRefusal(f"has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARACTERS}")
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": TODAY.strftime,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    try:
        return environment.from_string(source)
    except _TEMPLATE_ERRORS as error:
        raise TemplateRefusal(f"is not a valid template: {sanitize(str(error), limit=200)}") from error


_DICT_ATTRIBUTES = frozenset(dir(dict))
_LOOP_ATTRIBUTES = frozenset(
    ("index", "index0", "first", "last", "length", "previtem", "nextitem", "revindex", "revindex0")
)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with short cuts for harmless look-ups, which take most of the time: `message.role`, `loop.first`."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is jinja2.runtime.LoopContext and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        if kind is _TemplateNamespace and not attribute.startswith("_"):
            return getattr(obj, attribute, None) if hasattr(obj, attribute) else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


# What transformers puts into a template's environment (`_cached_compile_jinja_template` in chat_template_utils.py).


class _GenerationTag(jinja2.ext.Extension):
    """The tag {% generation %}…{% endgeneration %} marks what the model writes; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - as in jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


class _TemplateDict:
    """`dict` without access to the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _require_public(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")
