"""The node types of each tree-sitter grammar, sorted by what they mean for chunking.

`GRAMMARS` has an entry for each language of `languages.py` that is split at its syntax tree. Its wheel is a dependency, or in
the extra `languages` where it is large; a wheel that is not installed is not an error: the language is then split at blank
lines. To see the node types of a file: `print(syntax.parse_syntax(text.encode(), grammar))`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Grammar:
    """Names of tree-sitter node types, sorted by their meaning for chunking.

    The meaning of the types in `keyed` depends on their first word: `call:def` is a `call` whose first child is `def`.
    """

    module: str  # the Python package of the grammar
    functions: frozenset[str]
    classes: frozenset[str]
    scopes: frozenset[str] = frozenset()  # contain definitions but are not definitions: namespaces, #ifdef
    wrappers: frozenset[str] = frozenset()  # have the meaning of what they wrap: export, decorators, template<...>
    leads: frozenset[str] = frozenset({"comment"})  # belong to the next sibling: comments, attributes
    methods: frozenset[str] = frozenset()  # methods outside of a class body
    transparent: frozenset[str] = frozenset()  # their children stand for them
    keyed: frozenset[str] = frozenset()
    equations: frozenset[str] = frozenset()  # neighbours of one of these types and one name are one definition
    embeds: frozenset[str] = frozenset()  # hold text of another language, such as a script in HTML
    function: str = "language"  # the function of the package that returns the grammar

    definitions: frozenset[str] = field(init=False)
    openable: frozenset[str] = field(init=False)  # may contain definitions
    unwrapped: frozenset[str] = field(init=False)  # what a wrapper may wrap

    def __post_init__(self) -> None:
        object.__setattr__(self, "definitions", self.functions | self.methods | self.classes)
        object.__setattr__(self, "openable", self.classes | self.scopes | self.embeds)
        object.__setattr__(self, "unwrapped", self.definitions | self.scopes | self.wrappers)

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def without_grammar(languages: Mapping[str, int]) -> dict[str, int]:
    """Return those languages, with their numbers of files, whose grammar exists and is not installed."""
    grammars = {name: GRAMMARS[name] for name in languages if name in GRAMMARS}
    return {name: languages[name] for name, grammar in grammars.items() if not grammar.is_installed}


def _grammar(
    module: str,
    functions: str = "",
    classes: str = "",
    *,
    leads: str = "comment",
    function: str = "language",
    **types: str,
) -> Grammar:
    """Return a grammar whose node types are given as words separated by blanks; `types`: the other fields of `Grammar`."""
    sets = {name: frozenset(words.split()) for name, words in types.items()}
    return Grammar(
        f"tree_sitter_{module}",
        frozenset(functions.split()),
        frozenset(classes.split()),
        leads=frozenset(leads.split()),
        function=function,
        **sets,
    )


_ECMA_FUNCTIONS = (
    "function_declaration generator_function_declaration function_expression generator_function arrow_function "
    "method_definition"
)
_ECMA_WRAPPERS = (
    "export_statement lexical_declaration variable_declaration variable_declarator expression_statement "
    "assignment_expression"
)
_TYPESCRIPT_CLASSES = "class_declaration class abstract_class_declaration interface_declaration enum_declaration"
_TYPESCRIPT_WRAPPERS = f"{_ECMA_WRAPPERS} public_field_definition ambient_declaration"
_C_CLASSES = "struct_specifier union_specifier enum_specifier"
_C_SCOPES = "linkage_specification preproc_if preproc_ifdef preproc_else preproc_elif"

_HTML = _grammar("html", scopes="element", embeds="script_element style_element")

GRAMMARS = {
    "python": _grammar(
        "python", "function_definition", "class_definition", wrappers="decorated_definition", leads="comment decorator"
    ),
    "javascript": _grammar(
        "javascript",
        _ECMA_FUNCTIONS,
        "class_declaration class",
        wrappers=f"{_ECMA_WRAPPERS} field_definition",
        leads="comment decorator",
    ),
    "typescript": _grammar(
        "typescript",
        _ECMA_FUNCTIONS,
        _TYPESCRIPT_CLASSES,
        scopes="internal_module module",
        wrappers=_TYPESCRIPT_WRAPPERS,
        leads="comment decorator",
        function="language_typescript",
    ),
    "tsx": _grammar(
        "typescript",
        _ECMA_FUNCTIONS,
        _TYPESCRIPT_CLASSES,
        scopes="internal_module module",
        wrappers=_TYPESCRIPT_WRAPPERS,
        leads="comment decorator",
        function="language_tsx",
    ),
    "go": _grammar("go", "function_declaration", "type_declaration", methods="method_declaration"),
    "rust": _grammar(
        "rust",
        "function_item macro_definition",
        "impl_item trait_item struct_item enum_item union_item",
        scopes="mod_item foreign_mod_item",
        leads="line_comment block_comment attribute_item",
    ),
    "java": _grammar(
        "java",
        "method_declaration constructor_declaration compact_constructor_declaration static_initializer",
        "class_declaration interface_declaration enum_declaration record_declaration annotation_type_declaration",
        scopes="enum_body_declarations",
        leads="line_comment block_comment",
    ),
    # Headers named .h use the grammar of C++, because they may be C++.
    "c": _grammar("c", "function_definition", _C_CLASSES, scopes=_C_SCOPES, wrappers="type_definition"),
    "cpp": _grammar(
        "cpp",
        "function_definition",
        f"{_C_CLASSES} class_specifier",
        scopes=f"{_C_SCOPES} namespace_definition",
        wrappers="type_definition template_declaration",
        leads="comment access_specifier",
    ),
    "csharp": _grammar(
        "c_sharp",
        "method_declaration constructor_declaration destructor_declaration operator_declaration "
        "conversion_operator_declaration indexer_declaration local_function_statement",
        "class_declaration interface_declaration struct_declaration record_declaration enum_declaration",
        scopes="namespace_declaration preproc_if preproc_else preproc_elif",
        wrappers="global_statement",
    ),
    "kotlin": _grammar(
        "kotlin",
        "function_declaration secondary_constructor",
        "class_declaration object_declaration companion_object",
        leads="line_comment block_comment",
    ),
    "swift": _grammar(
        "swift",
        "function_declaration init_declaration deinit_declaration subscript_declaration protocol_function_declaration "
        "macro_declaration",
        "class_declaration protocol_declaration",
        leads="comment multiline_comment",
    ),
    "scala": _grammar(
        "scala",
        "function_definition function_declaration",
        "class_definition object_definition trait_definition enum_definition given_definition package_object",
        scopes="package_clause extension_definition",
        leads="comment block_comment",
    ),
    "dart": _grammar(
        "dart",
        "function_signature method_signature getter_signature setter_signature",
        "class_definition mixin_declaration extension_declaration enum_declaration extension_type_declaration",
        leads="comment documentation_comment annotation",
    ),
    "groovy": _grammar(
        "groovy",
        "method_declaration constructor_declaration function_definition",
        "class_declaration interface_declaration enum_declaration",
        leads="line_comment block_comment",
    ),
    "objective-c": _grammar(
        "objc",
        "function_definition method_definition",
        f"{_C_CLASSES} class_interface class_implementation protocol_declaration",
        scopes=_C_SCOPES,
        wrappers="type_definition",
        transparent="implementation_definition",
    ),
    "php": _grammar(
        "php",
        "function_definition method_declaration",
        "class_declaration interface_declaration trait_declaration enum_declaration",
        scopes="namespace_definition",
        wrappers="expression_statement assignment_expression",
        function="language_php",
    ),
    "ruby": _grammar(
        "ruby",
        "method singleton_method",
        "class module singleton_class",
        scopes="call",  # with a block: describe ... do, namespace :db do
        transparent="body_statement",
    ),
    "shell": _grammar("bash", "function_definition"),
    "powershell": _grammar(
        "powershell",
        "function_statement class_method_definition",
        "class_statement enum_statement",
        transparent="statement_list",
    ),
    "lua": _grammar(
        "lua",
        "function_declaration function_definition",
        wrappers="assignment_statement variable_declaration expression_list",
    ),
    "julia": _grammar(
        "julia",
        "function_definition macro_definition",
        "struct_definition",
        scopes="module_definition",
        wrappers="macrocall_expression macro_argument_list",
        leads="line_comment block_comment string_literal",
    ),
    "haskell": _grammar(
        "haskell",
        "function bind",
        "data_type newtype class instance type_synonym",
        leads="comment haddock signature pragma",
        transparent="declarations imports class_declarations instance_declarations",
        equations="function bind",
    ),
    "ocaml": _grammar(
        "ocaml",
        "value_definition",
        "type_definition class_definition",
        scopes="module_binding",
        wrappers="module_definition",
        function="language_ocaml",
    ),
    "elixir": _grammar(
        "elixir",
        "call:def call:defp call:defmacro call:defmacrop call:defguard call:defguardp call:test",
        "call:defmodule call:defprotocol call:defimpl",
        scopes="call:describe",
        leads="comment unary_operator",  # @doc, @spec
        keyed="call",
    ),
    "zig": _grammar(
        "zig",
        "function_declaration test_declaration",
        "struct_declaration enum_declaration union_declaration error_set_declaration opaque_declaration",
        wrappers="variable_declaration",
    ),
    "fortran": _grammar(
        "fortran",
        "function subroutine program",
        "derived_type_definition",
        scopes="module submodule",
        transparent="internal_procedures",
    ),
    "solidity": _grammar(
        "solidity",
        "function_definition constructor_definition fallback_receive_definition modifier_definition",
        "contract_declaration interface_declaration library_declaration struct_declaration enum_declaration",
    ),
    "verilog": _grammar(
        "systemverilog",
        "function_declaration task_declaration class_constructor_declaration",
        "module_declaration interface_declaration class_declaration program_declaration",
        scopes="package_declaration generate_region",
        leads="one_line_comment block_comment",
        transparent="package_item class_item class_method module_item",
    ),
    "vhdl": _grammar(
        "vhdl",
        "subprogram_definition",
        "entity_declaration architecture_definition package_declaration package_definition",
        leads="line_comment block_comment",
        transparent="design_unit",
    ),
    "gdscript": _grammar(
        "gdscript", "function_definition constructor_definition", "class_definition", leads="comment annotation"
    ),
    "glsl": _grammar("glsl", "function_definition", "struct_specifier", scopes=_C_SCOPES, wrappers="declaration"),
    "sql": _grammar(
        "sql",
        "create_function create_procedure create_trigger",
        "create_table create_view create_materialized_view create_type",
        wrappers="statement",
        leads="comment marginalia",
    ),
    "terraform": _grammar("hcl", "", "block", transparent="body"),
    "css": _grammar("css", "", "rule_set keyframes_statement", scopes="media_statement supports_statement"),
    "scss": _grammar(
        "scss",
        "mixin_statement function_statement",
        "rule_set keyframes_statement",
        scopes="media_statement supports_statement",
        leads="comment js_comment",
    ),
    "html": _HTML,
    "vue": _HTML,
    "svelte": _HTML,
}

_SCSS_TAG = re.compile(rb"lang\s*=\s*[\"']?(scss|sass|less)")
_TYPESCRIPT_TAG = re.compile(rb"lang\s*=\s*[\"']?tsx?\b|type\s*=\s*[\"']?(text|application)/typescript")
_DATA_TAG = re.compile(rb"type\s*=\s*[\"']?(?!module|(text|application)/(java|ecma)script|text/babel)\w")


def embedded_grammar(element: str, tag: bytes) -> Grammar | None:
    """Return the grammar of what a script or style element holds; `tag` is its opening tag. None: it holds data."""
    if element == "style_element":
        return GRAMMARS["scss" if _SCSS_TAG.search(tag) else "css"]
    if _TYPESCRIPT_TAG.search(tag):
        return GRAMMARS["typescript"]
    return None if _DATA_TAG.search(tag) else GRAMMARS["javascript"]
