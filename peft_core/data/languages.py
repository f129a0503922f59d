"""The table of languages: which files are code, how a comment is written, and where the syntax may be split.

To add a language, add a row to `LANGUAGES`: its name, its one-line comment (which carries the path header), and its extensions.
- Without a grammar the files are split at blank lines, and nothing else is needed. File names without an extension go into
  `_FILE_NAMES`, and other names by which data sets call the language into `_ALIASES`.
- With a grammar they are split at the syntax tree. Add the tree-sitter package of the language to `dependencies` in
  pyproject.toml, and a `Grammar` that sorts the grammar's node types by their meaning for chunking. To see the node types of a
  file: `print(chunking.parse_syntax(text.encode(), grammar))`.
- Test it in tests/unit/data/test_chunking.py: add a snippet to `SNIPPETS` and the units that a person would choose to
  `EXPECTED`. The other tests there run over all rows; one checks that every node type exists in its grammar.
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


@dataclass(frozen=True, slots=True)
class Language:
    name: str
    comment: tuple[str, str]  # opening and closing mark of a one-line comment
    extensions: tuple[str, ...]
    grammar: Grammar | None = None


_HASH, _SLASHES, _DASHES, _MARKUP = ("# ", ""), ("// ", ""), ("-- ", ""), ("<!-- ", " -->")

_ECMA_FUNCTIONS = frozenset(
    {
        "function_declaration",
        "generator_function_declaration",
        "function_expression",
        "generator_function",
        "arrow_function",
        "method_definition",
    }
)
_ECMA_WRAPPERS = frozenset(
    {
        "export_statement",
        "lexical_declaration",
        "variable_declaration",
        "variable_declarator",
        "expression_statement",
        "assignment_expression",
    }
)
_PYTHON = Grammar(
    module="tree_sitter_python",
    functions=frozenset({"function_definition"}),
    classes=frozenset({"class_definition"}),
    wrappers=frozenset({"decorated_definition"}),
    leads=frozenset({"comment", "decorator"}),
)
_JAVASCRIPT = Grammar(
    module="tree_sitter_javascript",
    functions=_ECMA_FUNCTIONS,
    classes=frozenset({"class_declaration", "class"}),
    wrappers=_ECMA_WRAPPERS | {"field_definition"},
    leads=frozenset({"comment", "decorator"}),
)
_TYPESCRIPT_CLASSES = frozenset(
    {"class_declaration", "class", "abstract_class_declaration", "interface_declaration", "enum_declaration"}
)
_TYPESCRIPT = Grammar(
    module="tree_sitter_typescript",
    function="language_typescript",
    functions=_ECMA_FUNCTIONS,
    classes=_TYPESCRIPT_CLASSES,
    scopes=frozenset({"internal_module", "module"}),
    wrappers=_ECMA_WRAPPERS | {"public_field_definition", "ambient_declaration"},
    leads=frozenset({"comment", "decorator"}),
)
_TSX = Grammar(
    module="tree_sitter_typescript",
    function="language_tsx",
    functions=_TYPESCRIPT.functions,
    classes=_TYPESCRIPT.classes,
    scopes=_TYPESCRIPT.scopes,
    wrappers=_TYPESCRIPT.wrappers,
    leads=_TYPESCRIPT.leads,
)
_GO = Grammar(
    module="tree_sitter_go",
    functions=frozenset({"function_declaration"}),
    methods=frozenset({"method_declaration"}),
    classes=frozenset({"type_declaration"}),
)
_RUST = Grammar(
    module="tree_sitter_rust",
    functions=frozenset({"function_item", "macro_definition"}),
    classes=frozenset({"impl_item", "trait_item", "struct_item", "enum_item", "union_item"}),
    scopes=frozenset({"mod_item", "foreign_mod_item"}),
    leads=frozenset({"line_comment", "block_comment", "attribute_item"}),
)
_JAVA = Grammar(
    module="tree_sitter_java",
    functions=frozenset(
        {"method_declaration", "constructor_declaration", "compact_constructor_declaration", "static_initializer"}
    ),
    classes=frozenset(
        {
            "class_declaration",
            "interface_declaration",
            "enum_declaration",
            "record_declaration",
            "annotation_type_declaration",
        }
    ),
    scopes=frozenset({"enum_body_declarations"}),
    leads=frozenset({"line_comment", "block_comment"}),
)
_C_SCOPES = frozenset({"linkage_specification", "preproc_if", "preproc_ifdef", "preproc_else", "preproc_elif"})
_C = Grammar(
    module="tree_sitter_c",
    functions=frozenset({"function_definition"}),
    classes=frozenset({"struct_specifier", "union_specifier", "enum_specifier"}),
    # Headers named .h use the grammar of C++, because they may be C++.
    scopes=_C_SCOPES,
    wrappers=frozenset({"type_definition"}),
)
_CPP = Grammar(
    module="tree_sitter_cpp",
    functions=frozenset({"function_definition"}),
    classes=_C.classes | {"class_specifier"},
    scopes=_C_SCOPES | {"namespace_definition"},
    wrappers=frozenset({"type_definition", "template_declaration"}),
    leads=frozenset({"comment", "access_specifier"}),
)

LANGUAGES = (
    Language("python", _HASH, (".py", ".pyi", ".pyw"), _PYTHON),
    Language("javascript", _SLASHES, (".js", ".jsx", ".mjs", ".cjs"), _JAVASCRIPT),
    Language("typescript", _SLASHES, (".ts", ".mts", ".cts"), _TYPESCRIPT),
    Language("tsx", _SLASHES, (".tsx",), _TSX),
    Language("go", _SLASHES, (".go",), _GO),
    Language("rust", _SLASHES, (".rs",), _RUST),
    Language("java", _SLASHES, (".java",), _JAVA),
    Language("c", _SLASHES, (".c",), _C),
    Language("cpp", _SLASHES, (".cpp", ".cc", ".cxx", ".h", ".hh", ".hpp", ".hxx", ".inl", ".cu", ".cuh"), _CPP),
    Language("csharp", _SLASHES, (".cs",)),
    Language("kotlin", _SLASHES, (".kt", ".kts")),
    Language("swift", _SLASHES, (".swift",)),
    Language("scala", _SLASHES, (".scala", ".sc")),
    Language("dart", _SLASHES, (".dart",)),
    Language("groovy", _SLASHES, (".groovy", ".gradle")),
    Language("objective-c", _SLASHES, (".m", ".mm")),
    Language("php", _SLASHES, (".php",)),
    Language("zig", _SLASHES, (".zig",)),
    Language("protobuf", _SLASHES, (".proto",)),
    Language("ruby", _HASH, (".rb", ".rake")),
    Language("shell", _HASH, (".sh", ".bash", ".zsh", ".fish")),
    Language("powershell", _HASH, (".ps1", ".psm1")),
    Language("perl", _HASH, (".pl", ".pm")),
    Language("r", _HASH, (".r",)),
    Language("julia", _HASH, (".jl",)),
    Language("elixir", _HASH, (".ex", ".exs")),
    Language("nim", _HASH, (".nim",)),
    Language("terraform", _HASH, (".tf",)),
    Language("cmake", _HASH, (".cmake",)),
    Language("make", _HASH, (".mk",)),
    Language("docker", _HASH, (".dockerfile",)),
    Language("graphql", _HASH, (".graphql", ".gql")),
    Language("sql", _DASHES, (".sql",)),
    Language("lua", _DASHES, (".lua",)),
    Language("haskell", _DASHES, (".hs",)),
    Language("clojure", (";; ", ""), (".clj", ".cljs", ".cljc")),
    Language("erlang", ("% ", ""), (".erl", ".hrl")),
    Language("css", ("/* ", " */"), (".css", ".scss", ".less")),
    Language("html", _MARKUP, (".html", ".htm")),
    Language("vue", _MARKUP, (".vue",)),
    Language("svelte", _MARKUP, (".svelte",)),
    # Only its fenced code blocks are used: prose is not code.
    Language("markdown", _MARKUP, (".md", ".mdx")),
)
# Configuration and data (JSON, YAML, TOML, XML, notebooks) are not in the table: they are mostly lists of values, and secrets
# are among the values.
TEXT = Language("text", _HASH, ())

_BY_EXTENSION = {extension: language for language in LANGUAGES for extension in language.extensions}
_BY_NAME = {language.name: language for language in LANGUAGES}
_FILE_NAMES = {
    "makefile": "make",
    "gnumakefile": "make",
    "dockerfile": "docker",
    "containerfile": "docker",
    "cmakelists.txt": "cmake",
    "rakefile": "ruby",
    "gemfile": "ruby",
    "jenkinsfile": "groovy",
}
_ALIASES = {
    "py": "python",
    "js": "javascript",
    "jsx": "javascript",
    "ts": "typescript",
    "golang": "go",
    "rs": "rust",
    "c++": "cpp",
    "c#": "csharp",
    "bash": "shell",
    "sh": "shell",
}


def language_of_file(name: str) -> Language | None:
    """Return the language of a file, or None if files of this name are not code."""
    lowered = name.lower()
    if lowered in _FILE_NAMES:
        return _BY_NAME[_FILE_NAMES[lowered]]
    dot = lowered.rfind(".")
    return _BY_EXTENSION.get(lowered[dot:]) if dot > 0 else None


def language_named(name: str) -> Language:
    """Return the language that a data set calls by this name. An unknown language is treated as plain text under its name."""
    lowered = name.strip().lower()
    known = _BY_NAME.get(_ALIASES.get(lowered, lowered))
    return known or Language(lowered or TEXT.name, TEXT.comment, ())


def is_known_label(label: str) -> bool:
    """Return whether a label, such as that of a Markdown fence, names a language of the table."""
    lowered = label.lower()
    return _ALIASES.get(lowered, lowered) in _BY_NAME
