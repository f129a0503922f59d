"""Decide by the name of a file or directory whether it may hold code, and for names that say nothing by its first bytes.

1. A name in the table of languages (`languages.py`) is code.
2. Names of binary files, of values (JSON, YAML, XML and the like), of prose, and of what a program wrote are excluded.
3. Anything else is opened: a script says in its first line by which program it is run; other text is code if it looks like
   it (`looks_like_code`). Its language is then called by the extension. It is split at blank lines, and its examples get no
   path header, because it is not known how the language writes a comment.
"""

# ruff: noqa: SIM905 - a string of words is easier to read than a column of quoted words

from __future__ import annotations

import re
from functools import cache, lru_cache

from peft_core.data.exclusions import ExclusionReason, extension_of
from peft_core.data.languages import NO_COMMENT, TEXT, Language, language_named, language_of_file, language_of_script

NOTEBOOK = Language("notebook", ("# ", ""), (".ipynb",))  # its cells have languages of their own, see `notebook.py`
SNIFFED_BYTES = 4_000

VENDORED = frozenset(
    "node_modules bower_components jspm_packages vendor vendored _vendor third_party thirdparty third-party "
    "site-packages dist-packages __pycache__ pods deriveddata".split()
)
# Only without git: git ignores build output already, and a tracked `build/` holds code.
_BUILD_DIRECTORIES = frozenset("dist build target out obj bazel-out htmlcov venv virtualenv".split())
_LOCK_FILES = frozenset("package-lock.json npm-shrinkwrap.json pnpm-lock.yaml go.sum gradle.lockfile".split())
_GENERATED_NAME = re.compile(
    r"(_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h)|_pb\.(js|ts|d\.ts)|\.g\.(dart|cs)|\.freezed\.dart|\.designer\.cs"
    r"|[._-]generated\.\w+|_generated\.\w+|\.gen\.\w+|^moc_.*\.cpp|^ui_.*\.h)$",
    re.IGNORECASE,
)
_MINIFIED_NAME = re.compile(r"[.-]min\.(js|css|mjs)$|\.bundle\.js$", re.IGNORECASE)
_SENSITIVE_NAME = re.compile(
    r"^(\.env(\..*)?|.*\.env|\.?netrc|_netrc|\.npmrc|\.pypirc|\.pgpass|\.git-credentials|\.htpasswd|\.boto|\.s3cfg"
    r"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?(\..*)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|ovpn)"
    r"|credentials(\..*)?|client_secrets?(\..*)?|secrets?\.\w+|authorized_keys|known_hosts|kubeconfig)$",
    re.IGNORECASE,
)
_SENSITIVE_DIRECTORIES = frozenset({".ssh", ".gnupg", ".aws", ".kube", ".docker", ".azure"})
_BINARY_EXTENSIONS = frozenset(
    "png jpg jpeg gif bmp ico webp tiff tif heic avif icns cur tga dds pdf zip gz tgz bz2 xz zst lz4 7z rar jar war "
    "ear aar whl egg gem nupkg vsix crx apk ipa deb rpm dmg iso img so dylib dll exe msi a o lib obj class pyc pyo "
    "pyd pyz wasm node woff woff2 ttf otf eot mp3 mp4 m4a m4v mov avi mkv wav ogg oga flac aac webm sqlite sqlite3 db "
    "db3 mdb bin dat npy npz pt pth ckpt onnx tflite pb gguf ggml safetensors parquet arrow feather orc avro pickle "
    "joblib h5 hdf5 nc mat rds rdata rda sav dta doc docx xls xlsx xlsm ppt pptx odt ods odp epub psd ai sketch fig "
    "xcf blend fbx glb 3ds max pcap pcapng swf fla pdb ilk exp pch gch suo qm ser dex beam hi ko elc rom nes gba "
    "sfc uasset umap pak".split()
)
# Values, configuration, markup of data, prose, and output of programs: mostly lists of values, and secrets are among them.
_NO_CODE_EXTENSIONS = frozenset(
    "json json5 jsonc jsonl ndjson geojson topojson webmanifest yaml yml toml xml xsd wsdl dtd rng plist ini cfg conf "
    "config cnf properties props csv tsv psv ssv log lst out err svg drawio map lock sum po pot strings stringsdict "
    "xliff xlf resx arb srt vtt ics vcf ldif eml mbox diff patch rej orig bak swp snap har cast crt cer csr pub sig "
    "md5 sha1 sha256 sha512 csproj vbproj fsproj vcxproj shproj sln slnx targets nuspec filters pbxproj xcconfig "
    "storyboard xib xcscheme xcworkspacedata entitlements iml classpath project prefs editorconfig env unity prefab "
    "asset meta anim controller tscn tres import godot uid mtl dae gltf stl ply off dxf step stp iges igs gcode "
    "kicad_pcb kicad_sch kicad_sym kicad_mod brd graphml gexf net kml gpx fasta fa fastq fq gff gff3 gtf vcd sdf mol "
    "mol2 xyz cif bib bst ris nfo pgn sgf mps inp nb golden txt text rst adoc asciidoc org tex ltx rtf textile "
    "wiki mediawiki creole pod texi texinfo info me 1 2 3 4 5 6 7 8 9".split()
)
_PROSE_NAMES = frozenset(
    "readme license licence copying copyright notice authors contributors changelog changes history news todo install version "
    "go.mod go.work codeowners maintainers thanks credits patents owners unlicense".split()
)
# A template is in the language that is named before these: `config.h.in`, `main.tf.tmpl`.
_TEMPLATE_EXTENSIONS = frozenset("in tmpl tpl template mako epp dist sample example".split())
_DOT_FILES = frozenset(
    ".bashrc .bash_profile .bash_login .bash_logout .bash_aliases .profile .zshrc .zshenv .zprofile .zlogin".split()
)


def classify(name: str) -> Language | ExclusionReason | None:
    """Return the language of a file or the reason why it is excluded, by its name; None if its name does not tell."""
    lowered = name.lower()
    if _SENSITIVE_NAME.match(name):
        # `secrets.py` is code, `secrets.yaml` is not.
        language = language_of_file(name)
        if language is None or not lowered.startswith(("secret", "credentials", "client_secret")):
            return ExclusionReason.SENSITIVE
    if lowered in _LOCK_FILES or lowered.endswith(".lock"):
        return ExclusionReason.LOCK_FILE
    if _MINIFIED_NAME.search(name):
        return ExclusionReason.MINIFIED
    if _GENERATED_NAME.search(name):
        return ExclusionReason.GENERATED
    return language_of_file(name) or _classify_unlisted(lowered)


def _classify_unlisted(lowered: str) -> Language | ExclusionReason | None:
    """Classify a file whose name is not in the table of languages."""
    stem, _, extension = lowered.rpartition(".")
    if lowered in _PROSE_NAMES:
        return ExclusionReason.NO_CODE
    if not stem:  # `.gitignore`, or a name that says nothing
        if lowered in _DOT_FILES:
            return language_named("shell")
        return ExclusionReason.NO_CODE if lowered.startswith(".") else None
    if extension in _TEMPLATE_EXTENSIONS and "." in stem:
        return classify(stem)
    if f".{extension}" in NOTEBOOK.extensions:
        return NOTEBOOK
    excluded = ExclusionReason.BINARY if extension in _BINARY_EXTENSIONS else None
    if extension in _NO_CODE_EXTENSIONS or extension.isdigit():
        excluded = ExclusionReason.NO_CODE
    return excluded or language_of_file(stem.partition(".")[0])  # `Dockerfile.release`, `Makefile.common`


@cache
def other_language(name: str) -> Language:
    """Return a language without a row, such as one that is called by its extension."""
    return Language(name, NO_COMMENT)


@lru_cache(maxsize=10_000)
def classify_directory(name: str, *, by_git: bool) -> ExclusionReason | None:
    """Return the reason why a directory is not entered, by its name, or None."""
    lowered = name.lower()
    if lowered in _SENSITIVE_DIRECTORIES:
        return ExclusionReason.SENSITIVE
    if lowered in VENDORED or (not by_git and lowered in _BUILD_DIRECTORIES):
        return ExclusionReason.VENDORED
    return ExclusionReason.HIDDEN if name.startswith(".") else None


# Names that do not tell: the contents decide.


def sniffed_language(name: str, text: str) -> Language | None:
    """Return the language of a text whose name does not tell, from its beginning; None if it is not code."""
    if text.startswith("#!"):
        return language_of_script(text.partition("\n")[0]) or other_language(TEXT.name)
    return language_without_row(name) if looks_like_code(text) else None


def language_without_row(name: str) -> Language:
    """Return the language of a file that the table does not know: it is called by its extension."""
    extension = extension_of(name).lstrip(".")
    return other_language(extension if extension.isalnum() else TEXT.name)


# Lines are matched with single spaces.
_CODE_LINE = re.compile(
    r"[\])}] ?[,:]?$|^[})\]]|[\w\])]\([^)]*\)|:=|::|->|=>|==|\s[-+*/]?=\s|\+\+|&&|\|\|"
    r"|^(# ?(include|define|if|endif)|@\w+|if|elif|elseif|else|for|foreach|while|do|loop|case|switch|match|def|defun|define"
    r"|fn|func|fun|function|proc|procedure|sub|subroutine|class|struct|enum|union|interface|trait|impl|module|namespace|package"
    r"|import|include|require|use|using|open|let|var|val|const|return|begin|end|endif|fi|done|type|public|private|protected"
    r"|static|void|int|begin|then|try|catch|print|call|set|global|local)\b"
)
_VALUE_LINE = re.compile(r"(- )?[\"']?[\w./ -]+[\"']? ?[:=] ?[^;{(]*$|\[[^\]]*\]$|- \S[^;{(]*$|[#;]")
_LETTERS, _DIGITS = re.compile(r"[^\W\d_]"), re.compile(r"\d")
_LOG_LINE = re.compile(r"\[?(\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|[A-Z][a-z]{2} \d{1,2} \d\d:\d\d)")
_MARKUP_OF_DATA = ("<?xml", "<!doctype", "%yaml", "{\\rtf", "%pdf", "%!ps", "begin:v", "solid ", "-----begin")
_MIN_LINES, _MAX_LINES = 3, 40
_MIN_CODE_SHARE = 0.4
_MAX_VALUE_SHARE = 0.8


def looks_like_code(text: str) -> bool:
    """Return whether the beginning of a text looks like code, and neither like values, a log, nor prose."""
    start = text.lstrip("\ufeff \t\r\n")[:20].lower()
    lines = [" ".join(words) for line in text.split("\n")[: 2 * _MAX_LINES] if (words := line[:200].split())][
        :_MAX_LINES
    ]
    if len(lines) < _MIN_LINES or start.startswith(_MARKUP_OF_DATA):
        return False
    characters = "".join(lines).replace(" ", "")
    letters, digits = len(_LETTERS.findall(characters)), len(_DIGITS.findall(characters))
    if letters < 0.3 * len(characters) or digits > 0.35 * len(characters):
        return False
    if start.startswith(("{", "[")) and '":' in text.replace('" :', '":'):  # JSON, also if it is cut off
        return False

    code = sum(1 for line in lines if line[-1] in "{};" or _CODE_LINE.search(line))
    values = sum(1 for line in lines if _VALUE_LINE.match(line))
    entries = sum(1 for line in lines if _LOG_LINE.match(line))
    count = len(lines)
    return code >= _MIN_CODE_SHARE * count and values <= _MAX_VALUE_SHARE * count and entries < 0.5 * count
