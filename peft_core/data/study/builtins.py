"""The names that a language has without an import, and the methods of its own types: no repository defines them."""

from __future__ import annotations

import builtins
import io
import pathlib
import re
import sys
from datetime import datetime
from functools import cache

_PYTHON_TYPES = (
    str,
    bytes,
    list,
    dict,
    set,
    tuple,
    int,
    float,
    complex,
    frozenset,
    bytearray,
    object,
    type,
    BaseException,
    # Of the library: their methods are called everywhere, so that `path.exists()` says nothing about an `exists` of the code.
    pathlib.Path,
    io.TextIOWrapper,
    re.Pattern,
    re.Match,
    datetime,
)
_ECMA = (
    "console log warn error Promise then catch finally all race resolve reject Object keys values entries assign "
    "freeze fromEntries create Array isArray from of map filter reduce forEach find findIndex some every includes "
    "indexOf push pop shift unshift slice splice concat join reverse sort flat flatMap length at fill String "
    "split trim trimStart trimEnd replace replaceAll match matchAll test exec startsWith endsWith padStart padEnd "
    "toUpperCase toLowerCase charAt charCodeAt substring repeat toString toFixed toISOString getTime valueOf "
    "Number isInteger isNaN parseInt parseFloat Boolean Symbol BigInt Math floor ceil round max min abs random "
    "pow sqrt Date now JSON parse stringify Map Set WeakMap WeakSet get set has add delete clear size next call "
    "apply bind Error TypeError RangeError SyntaxError RegExp Function Proxy Reflect Uint8Array ArrayBuffer "
    "TextEncoder TextDecoder encode decode setTimeout clearTimeout setInterval clearInterval queueMicrotask "
    "structuredClone fetch json text ok URL URLSearchParams Headers Request Response FormData Blob "
    "AbortController signal abort EventTarget addEventListener removeEventListener dispatchEvent require module "
    "exports process env argv exit import super this globalThis undefined message stack name prototype "
    "constructor hasOwnProperty describe it expect toBe toEqual toThrow beforeEach afterEach"
)
_C = (
    "printf fprintf sprintf snprintf scanf puts putchar malloc calloc realloc free memcpy memset memmove memcmp "
    "strlen strcmp strncmp strcpy strncpy strcat strchr strstr strdup fopen fclose fread fwrite fgets fputs exit "
    "abort assert sizeof isdigit isalpha isspace toupper tolower atoi atof strtol strtod qsort main NULL"
)
_NODE = "node fs path os http https url util crypto events stream buffer child_process assert process readline zlib"
_WORDS = {
    "javascript": _ECMA,
    "typescript": _ECMA,
    "tsx": _ECMA,
    "vue": _ECMA,
    "svelte": _ECMA,
    "go": "append cap clear close complex copy delete imag len make max min new panic print println real recover Error "
    "string int int8 int16 int32 int64 uint uint8 uint16 uint32 uint64 float32 float64 byte rune bool error any "
    "main init",
    "rust": "println print eprintln eprint format panic assert assert_eq assert_ne vec write writeln todo unimplemented "
    "unreachable matches dbg include_str env Some None Ok Err Box new Vec String from into to_string to_owned "
    "clone unwrap expect unwrap_or unwrap_or_default unwrap_or_else unwrap_err is_some is_none is_ok is_err ok "
    "err map map_err and_then or_else filter iter iter_mut into_iter collect push push_str pop insert remove get "
    "get_mut contains contains_key len is_empty as_str as_bytes as_ref as_mut take replace next enumerate zip rev "
    "fold any all find position sum count max min chars bytes lines split trim starts_with ends_with parse "
    "default drop main Self self super crate with_capacity extend entry or_insert sort cloned copied borrow "
    "borrow_mut lock await",
    "java": "String valueOf equals hashCode toString length charAt substring split trim isEmpty contains indexOf "
    "startsWith endsWith replace format System out err println printf print add get set put remove size "
    "containsKey keySet values entrySet getKey getValue stream map filter collect forEach of Object Integer "
    "parseInt Long Double Boolean Math max min abs getMessage printStackTrace getClass getName main super this "
    "iterator hasNext next append List ArrayList Map HashMap Optional orElse",
    "kotlin": "println print listOf mutableListOf mapOf mutableMapOf setOf arrayOf emptyList map filter forEach first "
    "firstOrNull last joinToString let apply also run with require check error size isEmpty isNotEmpty contains "
    "get set add put remove toString toInt toList trim split lazy launch main to",
    "swift": "print append count isEmpty map filter reduce forEach compactMap first last contains insert remove joined "
    "split init self fatalError precondition assert String Int Double Array Dictionary Set Optional description "
    "sorted min max enumerated",
    "csharp": "Console WriteLine Write ReadLine ToString Equals GetHashCode GetType Length Count Add Remove Contains "
    "ContainsKey Any All Where Select First FirstOrDefault ToList ToArray OrderBy string Format Join Split Trim "
    "IsNullOrEmpty Parse TryParse nameof typeof Main Task Run List Dictionary Exception Message",
    "php": "echo print count strlen substr strpos str_replace sprintf printf implode explode in_array array_map "
    "array_filter array_keys array_values array_merge array_push isset empty json_encode json_decode var_dump "
    "is_array is_string is_null trim date time __construct this self parent static",
    "ruby": "puts print p require require_relative raise new to_s to_i to_a to_h to_sym each map select reject reduce "
    "inject find any? all? include? empty? nil? first last push pop shift join split strip gsub sub size length "
    "keys values merge attr_accessor attr_reader attr_writer lambda proc loop freeze dup is_a? respond_to? send "
    "call self super include extend initialize",
    "lua": "print pairs ipairs require type tostring tonumber error assert pcall setmetatable getmetatable select next "
    "insert remove concat sort format gsub match find sub len unpack self",
    "c": _C,
    "cpp": f"{_C} "
    "std string vector map set pair make_pair make_unique make_shared move push_back emplace_back size empty "
    "begin end at find insert erase clear c_str str cout cerr endl get reset first second what",
    "shell": "echo printf cd test exit return export local read set shift source eval trap",
}
_MODULES = {
    "rust": "std core alloc",
    "java": "java javax",
    "kotlin": "java javax kotlin kotlinx",
    "scala": "java javax scala",
    "csharp": "System Microsoft",
    "swift": "Foundation XCTest Swift UIKit SwiftUI Combine",
    "javascript": _NODE,
    "typescript": _NODE,
    "tsx": _NODE,
}


@cache
def builtin_names(language: str) -> frozenset[str]:
    """Return the plain names of a language, and the members of its own types."""
    if language == "python":
        return frozenset(dir(builtins)).union(*(dir(kind) for kind in _PYTHON_TYPES), ("self", "cls", "add_note"))
    return frozenset(_WORDS.get(language, "").split())


@cache
def standard_modules(language: str) -> frozenset[str]:
    """Return what imports of the language's own library begin with."""
    if language == "python":
        return frozenset(sys.stdlib_module_names)
    return frozenset(_MODULES.get(language, "").split())
