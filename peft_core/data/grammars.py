"""The node types of each tree-sitter grammar, sorted by what they mean for chunking.

`GRAMMARS` has an entry for each language of `languages.py` that is split at its syntax tree. Its wheel is a dependency, or in
the extra `languages` where it is large; a wheel that is not installed is not an error: the language is then split at blank
lines. To see the node types of a file: `print(chunking.parse_syntax(text.encode(), grammar))`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grammar:
    """Names of tree-sitter node types, sorted by their meaning for chunking."""

    module: str  # the Python package of the grammar
    functions: frozenset[str]
    classes: frozenset[str]
    scopes: frozenset[str] = frozenset()  # contain definitions but are not definitions: namespaces, #ifdef
    wrappers: frozenset[str] = frozenset()  # have the meaning of what they wrap: export, decorators, template<...>
    leads: frozenset[str] = frozenset({"comment"})  # belong to the next sibling: comments, attributes
    methods: frozenset[str] = frozenset()  # methods outside of a class body
    function: str = "language"  # the function of the package that returns the grammar


def _grammar(
    module: str,
    functions: str,
    classes: str,
    *,
    scopes: str = "",
    wrappers: str = "",
    leads: str = "comment",
    methods: str = "",
    function: str = "language",
) -> Grammar:
    """Return a grammar whose node types are given as words separated by blanks."""
    return Grammar(
        module=f"tree_sitter_{module}",
        functions=frozenset(functions.split()),
        classes=frozenset(classes.split()),
        scopes=frozenset(scopes.split()),
        wrappers=frozenset(wrappers.split()),
        leads=frozenset(leads.split()),
        methods=frozenset(methods.split()),
        function=function,
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
}
