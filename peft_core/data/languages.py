"""The table of languages: which files are code, how a comment is written, and by which names a language is called.

To add a language, add a row to `LANGUAGES`: its name, its one-line comment (which carries the path header), its extensions, and
optionally names of files without an extension, and other names by which data sets, notebooks and `#!` lines call it.
- Without a grammar the files are split at blank lines, and nothing else is needed.
- With a grammar they are split at the syntax tree. Add the tree-sitter package of the language to pyproject.toml and
  constraints.txt, and its node types to `GRAMMARS` in grammars.py.
- Test it: add a snippet to `SNIPPETS` in tests/unit/data/snippets.py and the units that a person would choose to `EXPECTED`.
  The tests in test_chunking.py run over all rows; one checks that every node type exists in its grammar.
An extension that several languages share belongs to one row; `_CONTENT_RULES` recognises the others by their text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peft_core.data.grammars import GRAMMARS, Grammar

NO_COMMENT = ("", "")  # of a language whose comments are not known


@dataclass(frozen=True, slots=True)
class Language:
    name: str
    comment: tuple[str, str]  # opening and closing mark of a one-line comment
    extensions: tuple[str, ...] = ()
    grammar: Grammar | None = None
    files: tuple[str, ...] = ()  # names of files; those in capitals must be written so
    aliases: tuple[str, ...] = ()


def _row(name: str, comment: tuple[str, str], extensions: str, *, files: str = "", aliases: str = "") -> Language:
    """Return a row from words separated by blanks."""
    words = (tuple(words.split()) for words in (extensions, files, aliases))
    return Language(name, comment, next(words), GRAMMARS.get(name), next(words), next(words))


_HASH, _SLASHES, _DASHES, _SEMICOLONS = ("# ", ""), ("// ", ""), ("-- ", ""), (";; ", "")
_PERCENT, _QUOTE, _BANG, _STARS = ("% ", ""), ("' ", ""), ("! ", ""), ("/* ", " */")
_MARKUP, _PARENS = ("<!-- ", " -->"), ("(* ", " *)")

_RUBY_FILES = "rakefile gemfile podfile vagrantfile fastfile brewfile guardfile capfile dangerfile berksfile"
_SQL_DIALECTS = "mysql postgresql postgres psql plsql plpgsql pgsql tsql sqlite sqlite3 hql bigquery"
# Configuration and data (JSON, YAML, TOML, XML) are not in the table: they are mostly lists of values, and secrets are among
# the values. Neither are prose and its markup (reStructuredText, LaTeX).
LANGUAGES = (
    # Languages that most programmers use.
    _row("python", _HASH, ".py .pyi .pyw", files="sconstruct sconscript wscript", aliases="py ipython pyspark sagemath"),
    _row("javascript", _SLASHES, ".js .jsx .mjs .cjs .es6", aliases="js jsx node nodejs ecmascript ijavascript"),
    _row("typescript", _SLASHES, ".ts .mts .cts", aliases="ts deno tslab ts-node bun"),
    _row("tsx", _SLASHES, ".tsx"),
    _row("go", _SLASHES, ".go", aliases="golang gophernotes gonb"),
    _row("rust", _SLASHES, ".rs", aliases="rs evcxr"),
    _row("java", _SLASHES, ".java .pde .jsh", aliases="ijava jshell processing"),
    _row("c", _SLASHES, ".c .idc", aliases="ansi-c xc"),
    _row(
        "cpp",
        _SLASHES,
        ".cpp .cc .cxx .c++ .h .hh .hpp .hxx .h++ .inl .ipp .ixx .cppm .tcc .tpp .txx .cu .cuh .ino",
        aliases="c++ cxx cc hpp h cuda arduino xcpp cling xeus-cling",
    ),
    _row("csharp", _SLASHES, ".cs .csx .cake", aliases="c# cs dotnet .net-csharp dotnet-csharp c-sharp"),
    _row("kotlin", _SLASHES, ".kt .kts", aliases="kt kts"),
    _row("swift", _SLASHES, ".swift"),
    _row("scala", _SLASHES, ".scala .sc .sbt", aliases="almond spark toree"),
    _row("dart", _SLASHES, ".dart", aliases="flutter"),
    _row("groovy", _SLASHES, ".groovy .gradle .gvy .jenkinsfile", files="jenkinsfile", aliases="gradle jenkinsfile"),
    _row("objective-c", _SLASHES, ".m .mm", aliases="objectivec objc objective-c++ objcpp obj-c"),
    _row("php", _SLASHES, ".php .phtml .php3 .php4 .php5 .php7 .phps", aliases="php-cli jupyter-php"),
    _row("ruby", _HASH, ".rb .rake .gemspec .podspec .ru .rbi .rbs .jbuilder .thor", files=_RUBY_FILES, aliases="rb jruby"),
    _row("shell", _HASH, ".sh .bash .zsh .ksh .bats .command .ebuild .eclass", aliases="bash sh zsh ksh dash ash bats"),
    _row("fish", _HASH, ".fish"),
    _row("csh", _HASH, ".csh .tcsh", aliases="tcsh"),
    _row("powershell", _HASH, ".ps1 .psm1 .psd1", aliases="pwsh ps1 ps .net-powershell dotnet-powershell posh"),
    _row("batch", ("REM ", ""), ".bat .cmd", aliases="bat cmd dosbatch"),
    _row("sql", _DASHES, ".sql .ddl .dml .pls .plsql .pkb .pks .pgsql .psql .tsql .hql .mysql", aliases=_SQL_DIALECTS),
    _row("html", _MARKUP, ".html .htm .xhtml", aliases="htm xhtml"),
    _row("vue", _MARKUP, ".vue"),
    _row("svelte", _MARKUP, ".svelte"),
    _row("astro", _MARKUP, ".astro"),
    _row("css", _STARS, ".css .pcss", aliases="postcss"),
    _row("scss", _STARS, ".scss"),
    _row("less", _STARS, ".less"),
    _row("sass", _SLASHES, ".sass .styl", aliases="stylus"),
    # Their fenced code blocks are used: prose is not code.
    _row("markdown", _MARKUP, ".md .mdx .rmd .qmd", aliases="md"),
    # Scripting and scientific languages.
    _row("perl", _HASH, ".pl .pm .t .psgi", aliases="pl perl5 iperl"),
    _row("raku", _HASH, ".raku .rakumod .p6 .pm6", aliases="perl6"),
    _row("lua", _DASHES, ".lua .rockspec .p8", aliases="luajit ilua xlua"),
    _row("luau", _DASHES, ".luau"),
    _row("r", _HASH, ".r .rprofile", files=".rprofile", aliases="rscript ir rlang xr"),
    _row("julia", _HASH, ".jl", aliases="jl ijulia"),
    _row("matlab", _PERCENT, ".matlab", aliases="octave xoctave jupyter-matlab"),
    _row("mathematica", _PARENS, ".wl .wls .mma", aliases="wolfram wolframlanguage"),
    _row("stata", _SLASHES, ".do .ado .mata", aliases="pystata"),
    _row("sas", _STARS, ".sas"),
    _row("stan", _SLASHES, ".stan"),
    _row("cython", _HASH, ".pyx .pxd .pxi", aliases="pyrex"),
    _row("fortran", _BANG, ".f90 .f95 .f03 .f08 .f .for .f77 .ftn .fpp", aliases="f90 f95 f77 lfortran gfortran"),
    _row("coffeescript", _HASH, ".coffee .cjsx", files="cakefile", aliases="coffee"),
    _row("tcl", _HASH, ".tcl .tk .sdc .xdc", aliases="tclsh wish expect"),
    _row("awk", _HASH, ".awk .gawk", aliases="gawk mawk nawk"),
    _row("vim", ('" ', ""), ".vim .vimrc", files=".vimrc", aliases="viml vimscript vimrc"),
    _row("gdscript", _HASH, ".gd"),
    _row("applescript", _DASHES, ".applescript", aliases="osascript"),
    _row("autohotkey", ("; ", ""), ".ahk", aliases="ahk"),
    _row("autoit", ("; ", ""), ".au3"),
    # Functional and logic languages.
    _row("haskell", _DASHES, ".hs .hsc", aliases="hs runhaskell runghc ihaskell"),
    _row("elixir", _HASH, ".ex .exs", aliases="ex exs iex ielixir"),
    _row("erlang", _PERCENT, ".erl .hrl .escript", aliases="erl escript"),
    _row("gleam", _SLASHES, ".gleam"),
    _row("elm", _DASHES, ".elm"),
    _row("purescript", _DASHES, ".purs"),
    _row("ocaml", _PARENS, ".ml .mli", aliases="ml ocaml-jupyter"),
    _row("rescript", _SLASHES, ".res .resi .re .rei", aliases="reason reasonml"),
    _row("fsharp", _SLASHES, ".fs .fsi .fsx .fsscript", aliases="f# fs .net-fsharp dotnet-fsharp f-sharp"),
    _row("clojure", _SEMICOLONS, ".clj .cljs .cljc", aliases="clj cljs clojurescript babashka"),
    _row("lisp", _SEMICOLONS, ".lisp .lsp .cl .asd", aliases="commonlisp common-lisp sbcl"),
    _row("emacs-lisp", _SEMICOLONS, ".el", files=".emacs", aliases="elisp emacs emacslisp"),
    _row("scheme", _SEMICOLONS, ".scm .ss .sls .sld", aliases="guile chicken"),
    _row("racket", _SEMICOLONS, ".rkt .rktl"),
    _row("fennel", _SEMICOLONS, ".fnl"),
    _row("prolog", _PERCENT, ".prolog .pro .plt", aliases="swipl"),
    _row("coq", _PARENS, ".coq .vernac", aliases="rocq"),
    _row("lean", _DASHES, ".lean", aliases="lean4"),
    _row("agda", _DASHES, ".agda"),
    _row("idris", _DASHES, ".idr"),
    _row("nix", _HASH, ".nix", aliases="nix-shell"),
    # System and compiled languages.
    _row("zig", _SLASHES, ".zig .zon"),
    _row("nim", _HASH, ".nim .nims .nimble"),
    _row("crystal", _HASH, ".cr", aliases="cr"),
    _row("d", _SLASHES, ".d .di", aliases="dlang"),
    _row("v", _SLASHES, ".vv", aliases="vlang"),
    _row("odin", _SLASHES, ".odin"),
    _row("vala", _SLASHES, ".vala .vapi"),
    _row("haxe", _SLASHES, ".hx"),
    _row("ada", _DASHES, ".adb .ads .ada", aliases="ada95"),
    _row("pascal", _SLASHES, ".pas .dpr .dpk .lpr .pascal", aliases="delphi objectpascal freepascal"),
    _row("cobol", ("      *> ", ""), ".cob .cbl .cpy .cobol"),
    _row("visualbasic", _QUOTE, ".vb .vbs .vba .bas .frm", aliases="vb vba vbnet vb.net vbscript"),
    _row("qbasic", _QUOTE, ".bi", aliases="basic freebasic"),
    _row("smalltalk", ('"', '"'), ".st", aliases="pharo"),
    _row("actionscript", _SLASHES, ".as"),
    _row("assembly", ("; ", ""), ".asm .s .nasm", aliases="asm nasm gas masm x86asm armasm"),
    _row("llvm", ("; ", ""), ".ll"),
    _row("webassembly", _SEMICOLONS, ".wat .wast", aliases="wasm"),
    _row("yacc", _SLASHES, ".y .yy .mly", aliases="bison"),
    _row("lex", _SLASHES, ".l .lex .mll", aliases="flex"),
    _row("antlr", _SLASHES, ".g4"),
    _row("swig", _SLASHES, ".i .swg"),
    # Hardware, shaders and games.
    _row("verilog", _SLASHES, ".v .vh .sv .svh", aliases="systemverilog sv"),
    _row("vhdl", _DASHES, ".vhd .vhdl"),
    _row("glsl", _SLASHES, ".glsl .vert .frag .geom .comp .tesc .tese .glslv .glslf .vsh .fsh"),
    _row("hlsl", _SLASHES, ".hlsl .hlsli .fx .fxh .cginc .shader .usf .ush .compute", aliases="shaderlab"),
    _row("wgsl", _SLASHES, ".wgsl"),
    _row("metal", _SLASHES, ".metal"),
    _row("opencl", _SLASHES, ".opencl .clh"),
    _row("openscad", _SLASHES, ".scad"),
    _row("qml", _SLASHES, ".qml"),
    # Contracts.
    _row("solidity", _SLASHES, ".sol", aliases="sol"),
    _row("vyper", _HASH, ".vy"),
    _row("move", _SLASHES, ".move"),
    _row("cairo", _SLASHES, ".cairo"),
    _row("clarity", _SEMICOLONS, ".clar"),
    _row("func", _SEMICOLONS, ".fc .func"),
    _row("tact", _SLASHES, ".tact"),
    # Business languages.
    _row("apex", _SLASHES, ".cls .trigger .apex"),
    _row("abap", ('" ', ""), ".abap"),
    _row("al", _SLASHES, ".al"),
    _row("bsl", _SLASHES, ".bsl .os"),
    # Interfaces, queries, builds and infrastructure.
    _row("protobuf", _SLASHES, ".proto", aliases="proto proto3 proto2"),
    _row("thrift", _HASH, ".thrift"),
    _row("flatbuffers", _SLASHES, ".fbs"),
    _row("capnproto", _HASH, ".capnp"),
    _row("graphql", _HASH, ".graphql .gql .graphqls", aliases="gql"),
    _row("prisma", _SLASHES, ".prisma"),
    _row("sparql", _HASH, ".rq .sparql"),
    _row("cypher", _SLASHES, ".cypher .cyp"),
    _row("rego", _HASH, ".rego"),
    _row("terraform", _HASH, ".tf .tfvars .hcl .nomad .tofu", aliases="tf hcl opentofu"),
    _row("bicep", _SLASHES, ".bicep"),
    _row("puppet", _HASH, ".pp"),
    _row("jsonnet", _SLASHES, ".jsonnet .libsonnet"),
    _row("cue", _SLASHES, ".cue"),
    _row("dhall", _DASHES, ".dhall"),
    _row("starlark", _HASH, ".bzl .star .bazel", files="BUILD WORKSPACE BUCK tiltfile", aliases="bazel bzl skylark"),
    _row("cmake", _HASH, ".cmake", files="cmakelists.txt"),
    _row("make", _HASH, ".mk .mak", files="makefile gnumakefile makefile.am kbuild", aliases="makefile"),
    _row("just", _HASH, ".just", files="justfile .justfile", aliases="justfile"),
    _row("meson", _HASH, "", files="meson.build meson_options.txt"),
    _row("docker", _HASH, ".dockerfile .containerfile", files="dockerfile containerfile", aliases="dockerfile containerfile"),
    _row("earthly", _HASH, ".earth", files="earthfile"),
    _row("snakemake", _HASH, ".smk", files="snakefile"),
    _row("nextflow", _SLASHES, ".nf"),
    _row("bitbake", _HASH, ".bb .bbclass .bbappend"),
    _row("gherkin", _HASH, ".feature", aliases="cucumber"),
    _row("robot", _HASH, ".robot"),
    # Templates.
    _row("erb", ("<%# ", " %>"), ".erb .rhtml", aliases="eruby"),
    _row("ejs", ("<%# ", " %>"), ".ejs .eta"),
    _row("heex", ("<%!-- ", " --%>"), ".eex .heex .leex", aliases="eex"),
    _row("jsp", ("<%-- ", " --%>"), ".jsp .jspx .tag", aliases="asp aspx"),
    _row("razor", ("@* ", " *@"), ".cshtml .razor", aliases="cshtml blazor"),
    _row("handlebars", ("{{!-- ", " --}}"), ".hbs .handlebars .mustache", aliases="mustache"),
    _row("jinja", ("{# ", " #}"), ".j2 .jinja .jinja2 .njk .twig .nunjucks", aliases="jinja2 nunjucks twig django"),
    _row("liquid", ("{% comment %} ", " {% endcomment %}"), ".liquid"),
    _row("freemarker", ("<#-- ", " -->"), ".ftl .ftlh"),
    _row("velocity", ("## ", ""), ".vm .vtl"),
    _row("haml", ("-# ", ""), ".haml"),
    _row("slim", ("/ ", ""), ".slim"),
    _row("pug", ("//- ", ""), ".pug .jade", aliases="jade"),
)  # fmt: skip
TEXT = Language("text", _HASH)

_BY_EXTENSION = {extension: language for language in LANGUAGES for extension in language.extensions}
_BY_FILE_NAME = {name: language for language in LANGUAGES for name in language.files}
_BY_NAME = {name: language for language in LANGUAGES for name in (*language.aliases, language.name)}
_VERSION = re.compile(r"[-_ ]?v?\d[\d.]*$")  # python3, julia-1.10
_INTERPRETER = re.compile(r"#!\s*(?:\S*/env\s+(?:-\S+\s+|\w+=\S*\s+)*)?(?:\S*/)?([^\s/]+)")


def language_of_file(name: str) -> Language | None:
    """Return the language of a file, or None if files of this name are not code."""
    lowered = name.lower()
    by_name = _BY_FILE_NAME.get(name) or _BY_FILE_NAME.get(lowered)
    if by_name is not None:
        return by_name
    dot = lowered.rfind(".")
    return _BY_EXTENSION.get(lowered[dot:]) if dot > 0 else None


def language_of_script(first_line: str) -> Language | None:
    """Return the language of a file that begins with `#!` and an interpreter of the table, such as `#!/usr/bin/env python3`."""
    match = _INTERPRETER.match(first_line)
    return None if match is None else _known(match[1])


# What a text holds although its extension belongs to another language: (extensions, its language, how a line begins that only
# this language has). The first match decides. No language: it is no code.
_CONTENT_RULES = tuple(
    (frozenset(extensions.split()), _BY_NAME[name] if name else None, re.compile(rf"^[ \t]*({pattern})", re.MULTILINE))
    for extensions, name, pattern in (
        (".m .h", "objective-c", r"@(interface|implementation|protocol|class|import)\b|#import\b"),
        (".m", "mathematica", r"\(\*"),
        (".m", "matlab", r"%|(function|classdef|clear|clc|close all|end)\b"),
        (".v", "coq", r"(Require|Theorem|Lemma|Inductive|Fixpoint|Definition|Proof|Qed)\b[^;\n]*$"),
        (".v .vsh", "v", r"(pub\s+)?fn\s+[\w(]|import [\w.]+$"),
        (".ts", "", r"<!DOCTYPE TS>|<TS version="),  # translations of Qt
        (".cls", "", r"\\(NeedsTeXFormat|ProvidesClass|ProvidesExplClass|LoadClass)\b"),  # LaTeX
        (".pro", "make", r"(QT|CONFIG|TEMPLATE|TARGET|SOURCES|HEADERS|SUBDIRS)\s*[+*-]?="),  # qmake
        (".pl .pro .t", "prolog", r":-\s|[a-z]\w*\(.*\)\s*:-|[a-z]\w*\([^()\n]*\)\.$"),
        (".pl .t", "raku", r"use v6"),
        (".cls", "visualbasic", r"VERSION \d|Attribute VB_"),
        (".fs", "glsl", r"#version\b|precision \w+ float;|void main\s*\("),
        (".cl", "opencl", r"(__)?kernel\s+void\b|#(define|include|pragma)\b"),
        (".pp", "pascal", r"(unit|program)\s+\w+\s*;|interface$"),
        (".d", "make", r"\S+\.o\s*:"),
    )
)
_HEAD = 20_000  # characters that are looked at


def language_of_text(name: str, text: str, language: Language) -> Language | None:
    """Return the language of a file from its text, where its extension is shared by several; otherwise the given one.

    None: the text is no code.
    """
    extension = name[name.rfind(".") :].lower()
    head = text[:_HEAD]
    rules = (rule for rule in _CONTENT_RULES if extension in rule[0])
    return next((other for _, other, pattern in rules if pattern.search(head)), language)


def language_named(name: str) -> Language:
    """Return the language that a data set calls by this name. An unknown language is treated as plain text under its name."""
    lowered = name.strip().lower()
    return _known(lowered) or Language(lowered or TEXT.name, TEXT.comment)


def is_known_label(label: str) -> bool:
    """Return whether a label, such as that of a Markdown fence, names a language of the table."""
    return _known(label) is not None


def _known(name: str) -> Language | None:
    """Return the language of a name, which may end with a version: python3, julia-1.10."""
    lowered = name.strip().lower()
    return _BY_NAME.get(lowered) or _BY_NAME.get(_VERSION.sub("", lowered))
