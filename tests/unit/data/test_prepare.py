"""Tests of the preparation of a dataset: what is held out, what is excluded, and what is recorded."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from peft_core.data.chunking import split_lines
from peft_core.data.dataset import PreparedDataset, read_examples
from peft_core.data.examples import learned_text
from peft_core.data.leakage import TrainingFingerprint, overlap_fraction
from peft_core.data.prepare import prepare
from peft_core.data.records import write_records
from peft_core.data.secrets import redact_secrets
from peft_core.data.summarise import summarise_source
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import DataError
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import DatasetPurpose, Example, Segment
from tests.factories import make_dataset_spec


class Words:
    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(re.findall(r"\w+|[^\w\s]|\s+", text)) for text in texts]

    fill_in_the_middle = None

    has_chat_template = True

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        return EstimatedTokenCounter().render_chat(conversation)


def function(name: str, number: int) -> str:
    return f"def {name}_{number}(total):\n    for {name} in range(10):\n        total += {name} * {number}\n    return total\n"


def repository(root: Path, files: int = 10, functions: int = 20) -> Path:
    for number in range(files):
        path = root / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(function(f"work_{number}", n) for n in range(functions)))
    return root


def build(
    source: Path, directory: Path, kind: str = "repository", *, fraction: float = 0.2, messages: list[str] | None = None
) -> PreparedDataset:
    return prepare(
        make_dataset_spec(source, source_kind=kind, held_out_fraction=fraction),
        directory=directory,
        token_counter=Words(),
        report=(messages if messages is not None else []).append,
    )


def all_examples(directory: Path) -> list[Example]:
    return read_examples(directory / "train.jsonl") + read_examples(directory / "held_out.jsonl")


def manifest(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return loaded


def test_a_repository_becomes_a_training_set_a_held_out_set_and_a_manifest(tmp_path: Path):
    messages: list[str] = []
    dataset = build(repository(tmp_path / "r"), tmp_path / "out", messages=messages)
    train, held_out = (read_examples(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "held_out"))
    assert (dataset.summary.train_examples, dataset.summary.held_out_examples) == (len(train), len(held_out))
    assert dataset.summary.train_tokens == sum(example.tokens for example in train)
    assert all(0 < example.tokens <= 128 for example in train + held_out)
    assert {e.path for e in train}.isdisjoint({e.path for e in held_out})
    assert dataset.languages == {"python": 10}
    assert messages[0] == "0 of 10 files"
    assert manifest(tmp_path / "out")["held_out_files"] == sorted({example.path for example in held_out})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "held_out.jsonl",
        "held_out_files.jsonl",
        "manifest.json",
        "names.json",
        "snapshot.json.gz",
        "train.jsonl",
        "trained_on.bin",
    ]


def test_a_source_that_the_summary_accepts_can_be_prepared(tmp_path: Path):
    root = repository(tmp_path / "r", files=2, functions=40)
    summarise_source(str(root))
    assert build(root, tmp_path / "out").summary.files == 2


def test_the_dataset_does_not_depend_on_the_location_of_the_source(tmp_path: Path):
    first = build(repository(tmp_path / "a"), tmp_path / "out1")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert build(tmp_path / "b", tmp_path / "out2").summary.sha256 == first.summary.sha256
    (tmp_path / "b" / "module_0.py").write_text(function("other", 1))
    assert build(tmp_path / "b", tmp_path / "out3").summary.sha256 != first.summary.sha256


def test_a_finished_dataset_is_reused_after_the_source_has_changed(tmp_path: Path):
    first = build(repository(tmp_path / "r"), tmp_path / "out")
    shutil.rmtree(tmp_path / "r")
    assert build(tmp_path / "r", tmp_path / "out") == first
    with pytest.raises(DataError, match="does not exist any more"):
        build(tmp_path / "r", tmp_path / "out", fraction=0.3)


def test_an_unfinished_dataset_is_prepared_again(tmp_path: Path):
    first = build(repository(tmp_path / "r"), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"schema": 1')
    (tmp_path / "out" / "train.jsonl").write_text("")
    assert build(tmp_path / "r", tmp_path / "out") == first


def test_a_progress_callback_that_raises_aborts_and_leaves_no_spool(tmp_path: Path):
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            make_dataset_spec(repository(tmp_path / "r")),
            directory=tmp_path / "out",
            token_counter=Words(),
            report=stop,
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_the_commit_and_uncommitted_changes_of_a_repository_are_recorded(tmp_path: Path):
    root = repository(tmp_path / "r")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-C", root]
    for arguments in (["init"], ["add", "."], ["commit", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    clean = build(root, tmp_path / "out1")
    assert re.fullmatch(r"[0-9a-f]{40}", clean.repository_commit or "")
    assert clean.repository_dirty is False
    (root / "new.py").write_text(function("new", 1))
    assert build(root, tmp_path / "out2").repository_dirty is True


def test_duplicates_are_trained_on_once_and_never_held_out(tmp_path: Path):
    root = repository(tmp_path / "r")
    for number in range(5):
        shutil.copy(root / "module_0.py", root / f"copy_{number}.py")
    dataset = build(root, tmp_path / "out")
    bodies = [" ".join(example.segments[-1].text.split()) for example in all_examples(tmp_path / "out")]
    assert len(bodies) == len(set(bodies))
    assert dataset.summary.left_out["duplicate"] > 0


def test_near_duplicates_are_reduced_to_one_and_counted(tmp_path: Path):
    root = repository(tmp_path / "r")
    body = "\n".join(f"    total += weight_{n}" for n in range(11))
    for number in range(10):
        near = f"def weigh(values, weights):\n{body}\n    return total + {number}\n"
        (root / f"near_{number}.py").write_text(near)
    dataset = build(root, tmp_path / "out")
    assert dataset.summary.left_out == {"near_duplicate": 9}
    held_out = read_examples(tmp_path / "out" / "held_out.jsonl")
    assert sum("def weigh" in example.text for example in all_examples(tmp_path / "out")) == 1
    assert not any("def weigh" in example.text for example in held_out), "text that occurs in several files is held out"
    assert "Jaccard" in manifest(tmp_path / "out")["near_duplicates"]["rule"]


def test_pairs_with_the_same_long_instruction_are_not_duplicates(tmp_path: Path):
    instruction = " ".join(f"rule {n}: brief." for n in range(8))
    pairs = [{"prompt": f"{instruction} Double {n}!", "completion": "It is even."} for n in range(20)]
    dataset = build(records_file(tmp_path, pairs), tmp_path / "out", "records")
    assert dataset.summary.left_out == {}


@pytest.mark.slow
def test_a_short_run_reads_only_a_sample_of_a_huge_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["peft_core.data.prepare"], "_MIN_SAMPLED_EXAMPLES", 40)
    root = repository(tmp_path / "r", files=40, functions=6)

    def prepared(directory: str, examples: int | None) -> PreparedDataset:
        spec = make_dataset_spec(root, enough_examples=examples)
        return prepare(spec, directory=tmp_path / directory, token_counter=Words(), report=lambda _: None)

    full, sample, repeated = prepared("all", None), prepared("sample", 4), prepared("repeated", 4)
    assert sample.summary.sha256 == repeated.summary.sha256
    assert sample.summary.left_out["not_needed"] > 20
    assert sample.summary.train_examples >= 20
    held_out = [set(manifest(tmp_path / name)["held_out_files"]) for name in ("sample", "all")]
    assert held_out[0] <= held_out[1], "a sample holds out other files"
    assert prepared("more", 1000).summary.train_examples == full.summary.train_examples


def test_too_few_distinct_examples_are_rejected_with_figures(tmp_path: Path):
    root = repository(tmp_path / "r", files=1)
    shutil.copy(root / "module_0.py", root / "module_1.py")
    with pytest.raises(DataError, match="in 0 files") as caught:
        build(root, tmp_path / "out")
    assert caught.value.code == "too_few_examples"


def test_tiny_units_are_excluded_and_counted(tmp_path: Path):
    root = repository(tmp_path / "r")
    (root / "tiny.py").write_text("x = 1\n")
    assert build(root, tmp_path / "out").summary.left_out["tiny"] == 1


# --- records -------------------------------------------------------------------------------------------------------


def records_file(tmp_path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path = tmp_path / "records.jsonl"
    write_records(records, path)
    return path


def test_a_prompt_is_context_and_a_completion_is_learned(tmp_path: Path):
    path = records_file(tmp_path, [{"prompt": f"double {n}: ", "completion": f"it is {2 * n}"} for n in range(20)])
    build(path, tmp_path / "out", "records")
    example = next(e for e in all_examples(tmp_path / "out") if e.path == "record 3")
    assert example.segments == (Segment(text="double 2: ", learn=False), Segment(text="it is 4"))
    assert example.tokens == sum(Words().count(["double 2: ", "it is 4"])) + 1


def paraphrased(answers: int, prompts: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"{how} add_{n}!", "completion": f"def add_{n}(a, b):\n    c = a + {n}\n    return b + c * {n}\n"}
        for n in range(answers)
        for how in ("Write", "Give me", "Show", "Please write", "I need")[:prompts]
    ]


def test_records_with_the_same_answer_are_on_one_side_of_the_split(tmp_path: Path):
    dataset = build(records_file(tmp_path, paraphrased(30, 5)), tmp_path / "out", "records")
    train, held_out = (
        {example.segments[-1].text for example in read_examples(tmp_path / "out" / f"{part}.jsonl")}
        for part in ("train", "held_out")
    )
    assert held_out
    assert train.isdisjoint(held_out)
    assert dataset.summary.train_examples + dataset.summary.held_out_examples == 150
    assert len(manifest(tmp_path / "out")["held_out_files"]) == dataset.summary.held_out_examples


def test_records_with_the_same_short_answer_are_not_grouped(tmp_path: Path):
    labels = [{"prompt": f"Is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(40)]
    dataset = build(records_file(tmp_path, labels), tmp_path / "out", "records")
    assert dataset.summary.left_out == {}
    assert 4 <= dataset.summary.held_out_examples <= 12
    assert {e.segments[-1].text for e in read_examples(tmp_path / "out" / "train.jsonl")} == {"yes", "no"}


def test_records_that_all_have_the_same_long_answer_are_refused(tmp_path: Path):
    (only,) = paraphrased(1, 1)
    records = records_file(tmp_path, [{**only, "prompt": f"question {n}"} for n in range(20)])
    with pytest.raises(DataError, match="the same answer"):
        build(records, tmp_path / "out", "records")


@pytest.mark.parametrize(
    ("context", "learned", "text"),
    [
        ("", "a = 1\nb = 2\n", "a = 1\nb = 2\n"),
        ("Is 2\neven?", "yes", "Is 2 even?yes"),
        (
            "Write it!\n",
            "def f(a):\n    return (a + 1) * (a + 2) * 3\n",
            "def f(a):\n    return (a + 1) * (a + 2) * 3\n",
        ),
    ],
)
def test_a_short_answer_is_identified_together_with_its_question(context: str, learned: str, text: str):
    segments = (*((Segment(text=context, learn=False),) if context else ()), Segment(text=learned))
    record = Example(segments=segments, path="record 1", language="text", kind="record")
    assert learned_text(record) == text


def overlap_of_held_out(tmp_path: Path) -> list[float]:
    """Return for each held-out example the fraction of its text that is in the training set."""
    train, held_out = (
        [learned_text(example) for example in read_examples(tmp_path / "out" / f"{part}.jsonl")]
        for part in ("train", "held_out")
    )
    return list(overlap_fraction(dict(enumerate(held_out)), train).values())


@pytest.mark.parametrize(("width", "step"), [(12, 9), (12, 6), (12, 3)])
def test_overlapping_windows_that_are_trained_on_are_not_held_out(tmp_path: Path, width: int, step: int):
    lines = [f"value_{n} = compute(value_{n - 1}, {n * n})" for n in range(600)]
    chunks = [
        {"content": "\n".join(lines[start : start + width]), "language": "python"}
        for start in range(0, len(lines), step)
    ]
    dataset = build(records_file(tmp_path, chunks), tmp_path / "out", "records")
    assert dataset.summary.held_out_examples
    assert dataset.summary.train_examples
    assert max(overlap_of_held_out(tmp_path)) < 0.5
    assert ("seen_in_training" in dataset.summary.left_out) == (step < 9)


def trained_on(directory: Path) -> TrainingFingerprint:
    known = TrainingFingerprint.from_bytes((directory / "trained_on.bin").read_bytes())
    assert known is not None
    return known


def prepare_evaluation(root: Path, directory: Path, known: TrainingFingerprint) -> PreparedDataset:
    spec = make_dataset_spec(root, held_out_fraction=1, seed=1, purpose=DatasetPurpose.EVALUATION)
    return prepare(spec, directory=directory, token_counter=Words(), report=lambda _: None, known=[known])


def test_examples_trained_on_before_are_excluded_from_an_evaluation(tmp_path: Path):
    root = repository(tmp_path / "r", files=10, functions=60)
    build(root, tmp_path / "out")
    evaluation = prepare_evaluation(root, tmp_path / "again", trained_on(tmp_path / "out"))
    first, second = (
        {example.text for example in read_examples(tmp_path / name / "held_out.jsonl")} for name in ("out", "again")
    )
    assert second == first
    assert evaluation.summary.train_examples == 0
    assert evaluation.summary.left_out["trained_on"] == len(read_examples(tmp_path / "out" / "train.jsonl"))


def test_conversations_are_rendered_by_the_token_counter(tmp_path: Path):
    records = [
        {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]}
        for n in range(20)
    ]
    build(records_file(tmp_path, records), tmp_path / "out", "jsonl")
    assert next(e for e in all_examples(tmp_path / "out") if e.path == "line 5").segments[-1] == Segment(text="a 4")


def test_a_pair_that_is_too_long_is_excluded_and_a_long_text_is_split(tmp_path: Path):
    long = " ".join(f"word{n}" for n in range(500))
    pairs = [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(20)]
    dataset = build(records_file(tmp_path, [*pairs, {"prompt": "p", "completion": long}]), tmp_path / "out1", "records")
    assert dataset.summary.left_out == {"too_long": 1}
    texts = [{"text": f"some text {n}"} for n in range(20)]
    build(records_file(tmp_path, [*texts, {"text": long}]), tmp_path / "out2", "records")
    chunks = [example for example in all_examples(tmp_path / "out2") if example.path == "record 21"]
    assert len(chunks) > 5
    assert "".join(example.text for example in chunks) == long


@pytest.mark.parametrize(
    "home", ["/Users/alice/project", "C:\\Users\\alice\\project", "c:/Users/alice/project", "//nas/alice/project"]
)
def test_chunks_get_their_path_without_the_home_directory(tmp_path: Path, home: str):
    records = [
        {"content": f"fn f{n}() {{ body({n}); }}", "language": "rust", "chunk_type": "function", "start_line": 10,
         "file_path": f"{home}/src/{'a' if n % 2 else 'b/c'}.rs"}
        for n in range(20)
    ]  # fmt: skip
    build(records_file(tmp_path, records), tmp_path / "out", "records")
    examples = all_examples(tmp_path / "out")
    assert {example.segments[0].text for example in examples} == {"// a.rs\n", "// b/c.rs\n"}
    assert {(example.kind, example.language, example.start_line) for example in examples} == {("function", "rust", 10)}


# --- secrets -------------------------------------------------------------------------------------------------------

# The secrets are assembled at run time, so that no scanner reports this file.
RANDOM = "q7Rk2ZpX9vLw4TnB8sYd1HfC6mJgA3eU5oQi"
SECRETS = {
    "aws": "AKIA" + "IOSFODNN7QXYZABC",
    "github": "ghp_" + RANDOM,
    "github fine": "github_pat_" + RANDOM,
    "gitlab": "glpat-" + RANDOM[:20],
    "slack": "xoxb-" + "123456789012-123456789012-" + RANDOM[:24].lower(),
    "stripe": "sk_live_" + RANDOM[:24],
    "openai": "sk-proj-" + RANDOM,
    "anthropic": "sk-ant-" + "api03-" + RANDOM,
    "hugging face": "hf_" + RANDOM,
    "google": "AIza" + (RANDOM + RANDOM)[:35],
    "npm": "npm_" + RANDOM,
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + RANDOM * 3,
    "sendgrid": "SG." + RANDOM[:22] + "." + (RANDOM * 2)[:43],
    "telegram": "123456789:AA" + RANDOM[:33],
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0." + RANDOM,
    "basic auth": "https://admin:" + RANDOM[:12] + "@db.internal/x",
    "assignment": 'DB_PASSWORD = "' + RANDOM[:24] + '"',
}
HEX = "5d41402abc4b2a76b9719d911017c592"
# Lines with a secret that has no form of its own: what stands before it says what it is.
LINES_WITH_A_SECRET = [
    f"DATABASE_PASSWORD={RANDOM[:24]}",
    f"export SECRET_KEY={RANDOM}",
    f"ENV API_TOKEN {RANDOM}",
    f"  password: {RANDOM[:20]}",
    f"  - DB_PASSWORD={RANDOM[:20]}",
    f"secret_key_base: {HEX * 4}",
    f"spring.datasource.password={RANDOM[:20]}",
    f"aws_secret_access_key = {RANDOM}",
    f'CONF = {{"pwd": "{RANDOM[:20]}"}}',
    f"const clientSecret = `{RANDOM}`;",
    f"const token: string = '{RANDOM}'",
    f'os.environ.setdefault("API_KEY", "{RANDOM}")',
    f"define('AUTH_KEY', '{RANDOM}|&(%<')",
    f'"api_key = \\"{RANDOM}\\"\\n",',
    f'<add key="ApiKey" value="{RANDOM}" />',
    f"    <passphrase>{RANDOM[:20]}</passphrase>",
    f"mysql -u root --password={RANDOM[:18]} db",
    f"Server=tcp:x.example.net;User ID=app;Password={RANDOM[:16]};Encrypt=true",
    f"jdbc:postgresql://db/x?user=app&password={RANDOM[:18]}",
    f'URL = "https://api.example.net/v2/x?api_key={RANDOM}&q=1"',
    f"redis://:{RANDOM[:20]}@cache:6379/0",
    f'sentry_sdk.init("https://{HEX}@o12345.ingest.sentry.io/678")',
    f"https://discord.com/api/webhooks/{'12' * 9}/{RANDOM * 2}",
    f"?sv=2022-11-02&ss=b&sig={(RANDOM * 2)[:43]}%3D",
    f'headers = {{"Authorization": "Bearer {RANDOM}"}}',
    f"# password is {RANDOM[:16]}",
    f"// token: {RANDOM}",
    f'{{"X-Api-Key": "{RANDOM}", "n": 1}}',
    f"curl -H 'Ocp-Apim-Subscription-Key: {RANDOM}'",
    f"curl --api-key {RANDOM}",
    f'"private-key": "{RANDOM}"',
    f'DB_PASS = "{RANDOM[:20]}"',
    f"const smtpPass = '{RANDOM[:20]}'",
    f"'pass' => '{RANDOM[:20]}',",
    f'key = os.getenv("API_KEY") or "{RANDOM}"',
    f"const key = process.env.API_KEY || '{RANDOM}'",
    f'const key = process.env["API_KEY"] ?? "{RANDOM}"',
    f'ENV.fetch("API_KEY") {{ "{RANDOM}" }}',
    f'api_key = "{RANDOM * 9}"',
    f"API_KEY={RANDOM * 9}",
]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_never_reaches_the_dataset(tmp_path: Path, name: str):
    root = repository(tmp_path / "r")
    value = SECRETS[name]
    literal = value if name == "assignment" else f'x = "{value}"'
    (root / "leak.py").write_text(f"import os\n\n\nclass Client:\n    {literal}\n\n    {function('a', 1)}\n# {value}\n")
    dataset = build(root, tmp_path / "out")
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert value.encode() not in written
    assert RANDOM[:12].encode() not in written
    assert dataset.summary.secrets_removed == 2
    assert [(secret["file"], secret["line"]) for secret in manifest(tmp_path / "out")["secrets"]] == [
        ("leak.py", 5),
        ("leak.py", 12),
    ]
    assert any("class Client" in example.text for example in all_examples(tmp_path / "out")), (
        "the code around the secret is missing"
    )


@pytest.mark.parametrize("line", LINES_WITH_A_SECRET)
def test_a_secret_is_found_by_what_stands_before_it(line: str):
    assert redact_secrets([f"{line}\n", "x = 1\n"])[0] == ["\n", "x = 1\n"]


@pytest.mark.parametrize("line", ["DB_PASSWORD={}", "password = '{}'"])
def test_random_values_are_seldom_taken_for_words(line: str):
    generator = random.Random(0)  # noqa: S311 -- nothing here is secret
    values = ["".join(generator.choices(string.ascii_letters + string.digits, k=24)) for _ in range(1000)]
    missed = [value for value in values if not redact_secrets([line.format(value)])[1]]
    assert len(missed) < 20  # most have no digit


@given(st.from_regex(r"([0-9A-Za-z_.~-]|%[0-9A-F]{2}){6,24}", fullmatch=True))
@example("7fK2pQ9xLm")
@example("12345678")
@example("user7Kq2ZpX9v")
@example("%40r7Kq2ZpX9v")
def test_a_password_in_a_connection_url_is_found_whatever_it_begins_with(password: str):
    assume(not re.fullmatch(r"passw(or)?d|secret|x+|\.+|user\w{0,4}", password, re.IGNORECASE))
    assert redact_secrets([f'DATABASE = "postgres://app:{password}@db/x"\n'])[1]


@pytest.mark.parametrize("password", ["8080", "user", "username", "user_pw", "password", "%s", "%PASSWORD%", '8080">a'])
def test_a_placeholder_or_a_port_in_a_url_is_no_password(password: str):
    assert redact_secrets([f"postgres://app:{password}@db/x\n"])[1] == []


@given(
    st.from_regex(r"[0-9a-f]{16,31}|[0-9A-F]{16,31}", fullmatch=True),
    st.sampled_from(["token", "x-api-key", "DB_PASS"]),
)
def test_a_short_hexadecimal_key_in_quotes_is_found_if_its_digits_vary(value: str, name: str):
    assume(len(set(value)) >= 8 and re.search(r"\d", value) and re.search("[a-f]", value, re.IGNORECASE))
    assume(not re.search("abc|1234", value, re.IGNORECASE))
    assert redact_secrets([f'"{name}": "{value}"\n'])[1]


def test_no_line_of_a_private_key_reaches_the_dataset(tmp_path: Path):
    root = repository(tmp_path / "r")
    body = "\n".join((RANDOM * 2)[:64] for _ in range(20))
    key = "-----BEGIN RSA PRIVATE " + f"KEY-----\n{body}\n-----END RSA PRIVATE " + "KEY-----"
    (root / "leak.py").write_text(f'KEY = """{key}"""\n\n\n{function("after", 1)}')
    build(root, tmp_path / "out")
    assert all(RANDOM not in example.text for example in all_examples(tmp_path / "out"))
    assert any("def after_1" in example.text for example in all_examples(tmp_path / "out"))


def test_a_file_whose_name_is_a_secret_is_excluded_and_not_named(tmp_path: Path):
    root = repository(tmp_path / "r")
    (root / f"{SECRETS['hugging face']}.py").write_text(function("a", 1))
    dataset = build(root, tmp_path / "out")
    assert dataset.summary.left_out["secret"] == 1
    assert all(RANDOM.encode() not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_pair_with_a_secret_is_excluded(tmp_path: Path):
    pairs = [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(20)]
    leak = {"prompt": "token?", "completion": SECRETS["github"]}
    dataset = build(records_file(tmp_path, [*pairs, leak]), tmp_path / "out", "records")
    assert (dataset.summary.left_out, dataset.summary.secrets_removed) == ({"secret": 1}, 1)


@pytest.mark.parametrize(
    "line",
    [
        'password = "correct horse battery staple"',
        'token_url = "https://example.com/oauth2/token"',
        'SECRET_KEY_NAME = "application-secret-key-name"',
        'password = os.environ["DATABASE_PASSWORD"]',
        'api_key = "your-api-key-goes-here-1234"',
        'url = f"postgres://{user}:{password}@{host}/db"',
        '"http://user:password@proxy.example.com:3128/"',
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        'task-id = "task-management-system-for-teams"',
        'key = "abcdefghijklmnopqrstuvwxyz0123456789"',
        "private_key: Ed25519PrivateKey | Ed448PrivateKey",
        "token = GitHubTokenV2Factory()",
        "password=settings.DATABASE_PASSWORD_2",
        "secret: SecretStr = Base64EncodedSecretString2",
        "# token is checked by OAuth2PasswordRequestForm",
        "redis://:${REDIS_PASSWORD}@cache:6379/0",
        'token = "0123456789abcdef"',
        'bypass_cache = "correct-horse-battery"',
        'os.getenv("API_KEY") or "your-api-key-goes-here-1234"',
    ],
)
def test_code_that_only_mentions_secrets_is_not_excluded(line: str):
    assert redact_secrets([f"{line}\n"])[1] == []


@given(st.lists(st.sampled_from([*SECRETS.values(), "x = 1", "", "# text"]), max_size=12))
def test_redaction_preserves_the_number_of_lines_and_every_clean_line(lines: list[str]):
    original = split_lines("\n".join(lines))
    clean, findings = redact_secrets(original)
    flagged = {finding.row for finding in findings}
    assert len(clean) == len(original)
    assert all(clean[n] == ("\n" if n in flagged else line) for n, line in enumerate(original))


def test_held_out_by_time_holds_out_the_files_changed_last(tmp_path: Path):
    root = repository(tmp_path / "r")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-C", root]
    for day, touched in ((1, None), (2, "module_4.py"), (3, "module_7.py")):
        if touched:
            (root / touched).write_text((root / touched).read_text().replace("return total", "return total + 1", 1))
        at = {**os.environ, "GIT_COMMITTER_DATE": f"2026-01-0{day}T00:00:00Z"}
        for arguments in (["init"], ["add", "."], ["commit", "-m", "one"]):
            subprocess.run([*git, *arguments], check=True, capture_output=True, env=at)
    spec = make_dataset_spec(root, held_out_by="time")
    prepare(spec, directory=tmp_path / "out", token_counter=Words(), report=lambda _: None)
    assert manifest(tmp_path / "out")["held_out_files"] == ["module_4.py", "module_7.py"]

    # An evaluation samples files randomly, but includes all files that the training held out.
    evaluation = prepare_evaluation(root, tmp_path / "again", trained_on(tmp_path / "out"))
    assert manifest(tmp_path / "again")["held_out_files"] == ["module_4.py", "module_7.py"]
    assert evaluation.summary.held_out_examples == len(read_examples(tmp_path / "out" / "held_out.jsonl"))
