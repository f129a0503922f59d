"""Which files are code, how each language writes a comment, and where its syntax may be cut.

A new language is one row here: with a tree-sitter grammar it is cut at its syntax, without one at its blank lines.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grammar:
    """Names of tree-sitter node types, sorted by what they mean for cutting."""

    module: str  # the Python package of the grammar
    functions: frozenset[str]
    classes: frozenset[str]
    scopes: frozenset[str] = frozenset()  # hold definitions, are none themselves: namespaces, #ifdef
    wrappers: frozenset[str] = frozenset()  # mean what they wrap: export, decorators, template<...>
    leads: frozenset[str] = frozenset({"comment"})  # belong to the sibling that follows: comments, attributes
    methods: frozenset[str] = frozenset()  # methods outside of a class body
    function: str = "language"  # of the package, gives the grammar


@dataclass(frozen=True, slots=True)
class Language:
    name: str
    comment: tuple[str, str]  # what opens and closes a one-line comment
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
    },
)
_ECMA_WRAPPERS = frozenset(
    {
        "export_statement",
        "lexical_declaration",
        "variable_declaration",
        "variable_declarator",
        "expression_statement",
        "assignment_expression",
    },
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
    {"class_declaration", "class", "abstract_class_declaration", "interface_declaration", "enum_declaration"},
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
        {"method_declaration", "constructor_declaration", "compact_constructor_declaration", "static_initializer"},
    ),
    classes=frozenset(
        {
            "class_declaration",
            "interface_declaration",
            "enum_declaration",
            "record_declaration",
            "annotation_type_declaration",
        },
    ),
    scopes=frozenset({"enum_body_declarations"}),
    leads=frozenset({"line_comment", "block_comment"}),
)
_C_SCOPES = frozenset({"linkage_specification", "preproc_if", "preproc_ifdef", "preproc_else", "preproc_elif"})
_C = Grammar(
    module="tree_sitter_c",
    functions=frozenset({"function_definition"}),
    classes=frozenset({"struct_specifier", "union_specifier", "enum_specifier"}),
    # C++ in a header named .h is read with the grammar of C++, so only real C comes here.
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
    # Only its fenced code blocks are code; prose teaches another language.
    Language("markdown", _MARKUP, (".md", ".mdx")),
)
# Configuration and data (JSON, YAML, TOML, XML, notebooks) is left out: most of it is lists of values, and values are
# where secrets live.
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
    """The language of a file name, None where it is not one that carries code."""
    lowered = name.lower()
    if lowered in _FILE_NAMES:
        return _BY_NAME[_FILE_NAMES[lowered]]
    dot = lowered.rfind(".")
    return _BY_EXTENSION.get(lowered[dot:]) if dot > 0 else None


def language_named(name: str) -> Language:
    """The language that somebody else's data calls by this name; plain text where it is not known here."""
    lowered = name.strip().lower()
    known = _BY_NAME.get(_ALIASES.get(lowered, lowered))
    return known or Language(lowered or TEXT.name, TEXT.comment, ())


def is_known_label(label: str) -> bool:
    """Whether a label, as on a Markdown fence, names a language with a row here."""
    lowered = label.lower()
    return _ALIASES.get(lowered, lowered) in _BY_NAME
