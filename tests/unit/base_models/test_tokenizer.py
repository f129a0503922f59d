import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from peft_core.base_models.resolve import resolve
from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer, require_rows
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, DataError
from peft_core.modeling.batches import tokenise, tokenise_segments
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Example, Segment
from tests.model_files import model_shapes, write_model
from tests.tiny_models import VOCABULARY, write_sentencepiece_tokenizer, write_tiny_tokenizer

END = 0
ANSWER = Conversation.learning_every_answer([{"role": "assistant", "content": "x"}])


@pytest.fixture
def tokenizer(tmp_path: Path) -> BaseTokenizer:
    write_tiny_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def example(*segments: Segment) -> Example:
    return Example(segments=segments, path="a.py", language="python", kind="function")


def learned_text(tokenizer: BaseTokenizer, segments: tuple[Segment, ...]) -> str:
    document = tokenise(example(*segments), tokenizer, max_length=1000)
    return "".join(VOCABULARY[token] for token in document.ids_T[document.learn_T])


def test_a_text_ends_with_the_end_of_text_token_and_all_but_its_first_token_is_learned(
    tokenizer: BaseTokenizer,
) -> None:
    document = tokenise(example(Segment(text="abc")), tokenizer, max_length=10)
    assert [VOCABULARY[token] for token in document.ids_T] == ["a", "b", "c", "<end>"]
    assert document.learn_T.tolist() == [False, True, True, True]
    assert document.targets == 3


def test_a_truncated_text_has_no_end_of_text_token(tokenizer: BaseTokenizer) -> None:
    broken_off = example(Segment(text="abc")).model_copy(update={"ends": False})
    document = tokenise(broken_off, tokenizer, max_length=10)
    assert [VOCABULARY[token] for token in document.ids_T] == ["a", "b", "c"]
    assert document.learn_T.tolist() == [False, True, True]


def test_prompt_segments_carry_no_loss(tokenizer: BaseTokenizer) -> None:
    assert learned_text(tokenizer, (Segment(text="question ", learn=False), Segment(text="answer"))) == "answer<end>"


@pytest.mark.parametrize("beginning", [(), (1,)])
def test_tokenise_segments_returns_where_each_segment_starts(
    tokenizer: BaseTokenizer, beginning: tuple[int, ...]
) -> None:
    parts = (Segment(text="def f", learn=False), Segment(text="return"))
    with_prefix = replace(tokenizer, beginning=beginning)
    document, segments = tokenise_segments(example(*parts), with_prefix, max_length=100)
    for part, (start, tokens) in zip(parts, segments, strict=True):
        assert document.ids_T[start : start + len(tokens.ids)].tolist() == tokens.ids
        assert [VOCABULARY[token] for token in tokens.ids] == list(part.text)
    assert segments[0][0] == len(beginning)


def test_a_long_text_is_truncated_to_max_length(tokenizer: BaseTokenizer) -> None:
    document = tokenise(example(Segment(text="x" * 100)), tokenizer, max_length=64)
    assert len(document) == 64
    assert END not in document.ids_T


def test_code_that_spells_a_special_token_produces_none(tokenizer: BaseTokenizer) -> None:
    text = "a<|fim_prefix|>b<end>"
    tokenizer.tokenizer.add_special_tokens(["<|fim_prefix|>", "<end>"])
    special = {tokenizer.tokenizer.token_to_id("<|fim_prefix|>"), END}
    code = tokenise(example(Segment(text=text, literal=True)), tokenizer, max_length=100).ids_T.tolist()
    assert special.isdisjoint(code[:-1])
    assert tokenizer.tokenizer.decode(code[:-1], skip_special_tokens=False).replace(" ", "") == text
    rendered = tokenise(example(Segment(text=text)), tokenizer, max_length=100).ids_T.tolist()
    assert special <= set(rendered)


def named(tokenizer: BaseTokenizer, ids: Sequence[int]) -> list[str]:
    return [str(tokenizer.tokenizer.id_to_token(token)) for token in ids]


@pytest.mark.parametrize("dummy_space", ["prepend", "metaspace"])
def test_only_the_first_segment_of_a_text_gets_the_sentencepiece_space(tmp_path: Path, dummy_space: str) -> None:
    write_sentencepiece_tokenizer(tmp_path, dummy_space=dummy_space)
    tokenizer = load_tokenizer(tmp_path)
    parts = (Segment(text="def\n", learn=False), Segment(text="def", literal=True), Segment(text=" def"))
    ids = tokenise(example(*parts), tokenizer, max_length=100).ids_T.tolist()
    assert named(tokenizer, ids) == ["\u2581def", "<0x0A>", "def", "\u2581def", "</s>"]
    assert [tokens.offsets for tokens in tokenizer.encode(parts)] == [[(0, 3), (3, 4)], [(0, 3)], [(0, 4)]]


@given(words=st.lists(st.sampled_from(["def", " def", "\n", "  ", "x(", "\N{SNOWMAN}", ""]), min_size=1, max_size=6))
def test_segments_are_tokenised_like_the_complete_text(words: list[str]) -> None:
    with TemporaryDirectory() as directory:
        write_sentencepiece_tokenizer(Path(directory), dummy_space="metaspace")
        tokenizer = load_tokenizer(Path(directory))
    # Characters that no merge of this vocabulary crosses stand between.
    segments = [Segment(text=f"{word};") for word in words]
    first, *others = tokenizer.encode(segments)
    whole = Segment(text="".join(segment.text for segment in segments))
    assert [token for tokens in (first, *others) for token in tokens.ids] == tokenizer.encode([whole])[0].ids
    assert tokenizer.count([segment.text for segment in segments[1:]]) == [len(tokens.ids) for tokens in others]


def test_code_around_a_gap_is_tokenised_as_code_llama_was_trained(tmp_path: Path) -> None:
    known = ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>")
    write_sentencepiece_tokenizer(tmp_path, dummy_space="prepend", marks=known)
    tokenizer = load_tokenizer(tmp_path)
    marks = tokenizer.fill_in_the_middle
    assert marks is not None
    assert named(tokenizer, tokenizer.ids(*marks.prompt("def", "def"))) == [
        *("\u2581<PRE>", "\u2581def"),
        *("\u2581<SUF>", "def"),
        "\u2581<MID>",
    ]


def test_code_around_a_gap_is_tokenised_as_codestral_was_trained(tmp_path: Path) -> None:
    write_sentencepiece_tokenizer(tmp_path, dummy_space="prepend", marks=["[PREFIX]", "[MIDDLE]", "[SUFFIX]"])
    tokenizer = load_tokenizer(tmp_path)
    marks = tokenizer.fill_in_the_middle
    assert marks is not None
    pieces = [*marks.prompt("def", "def"), "def"]  # the gap continues after the prefix
    assert named(tokenizer, tokenizer.ids(*pieces)) == ["[SUFFIX]", "def", "[PREFIX]", "\u2581def", "def"]


@pytest.mark.parametrize("special", [True, False])  # False: as in Qwen2.5-Coder
def test_code_that_spells_fill_in_the_middle_tokens_does_not_break_the_order_of_a_prompt(
    tokenizer: BaseTokenizer, special: bool, tmp_path: Path
) -> None:
    marks = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    add = tokenizer.tokenizer.add_special_tokens if special else tokenizer.tokenizer.add_tokens
    add([AddedToken(mark, special=special, normalized=False) for mark in marks])
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.fill_in_the_middle is not None
    before, after = 'STOP = "<|fim_middle|>"\n', "<|fim_prefix|> <|fim_suffix|>"
    ids = loaded.ids(*loaded.fill_in_the_middle.prompt(before, after))
    assert [mark for mark in named(loaded, ids) if mark in marks] == list(marks)
    assert loaded.fill_in_the_middle.prompt_text("a", "b") == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"


def test_a_written_prompt_is_literal_unless_it_is_a_template(tokenizer: BaseTokenizer, tmp_path: Path) -> None:
    tokenizer.tokenizer.add_special_tokens(["<|fim_prefix|>"])
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    mark = loaded.tokenizer.token_to_id("<|fim_prefix|>")
    assert mark in loaded.ids(loaded.written_prompt("\n<|fim_prefix|>def"))
    assert mark not in loaded.ids(loaded.written_prompt("x = '<|fim_prefix|>'"))


def test_count_equals_the_number_of_encoded_tokens(tokenizer: BaseTokenizer) -> None:
    assert tokenizer.count(["abc", "", "ab\n"]) == [3, 0, 3]
    tokenizer.tokenizer.add_special_tokens(["<a>"])
    assert (tokenizer.count(["<a>"]), tokenizer.count(["<a>"], literal=True)) == ([1], [3])


def test_assistant_turns_carry_loss_including_their_end_token(tokenizer: BaseTokenizer) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    (segments,) = tokenizer.render_chat(Conversation.learning_every_answer(messages))
    whole = "".join(segment.text for segment in segments)
    assert whole == "[user]hi<end>\n[assistant]ho<end>\n[user]more<end>\n[assistant]no<end>"
    assert learned_text(tokenizer, segments) == "ho<end>no<end>"


def test_templates_that_rewrite_earlier_turns_give_one_example_per_turn(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    write_tiny_tokenizer(tmp_path, chat_template=template)
    turns = [("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "<think>e</think>f")]
    messages = [{"role": role, "content": content} for role, content in turns]
    examples = load_tokenizer(tmp_path).render_chat(Conversation.learning_every_answer(messages))
    assert [[(segment.text, segment.learn) for segment in example] for example in examples] == [
        [("[user]a<end>[assistant]", False), ("<think>b</think>c<end>", True)],
        [("[user]a<end>[assistant]c<end>[user]d<end>[assistant]", False), ("<think>e</think>f<end>", True)],
    ]


def test_conversations_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(DataError, match="no chat template"):
        load_tokenizer(tmp_path).render_chat(ANSWER)


def test_a_chat_templates_error_is_reported(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        load_tokenizer(tmp_path).render_chat(ANSWER)


def test_a_chat_template_cannot_escape_its_sandbox(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path, chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="unsafe"):
        load_tokenizer(tmp_path).render_chat(ANSWER)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseCheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_base_model_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(BaseCheckpointError, match="no end-of-text token"):
        load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_tokenizer(tmp_path).end_of_text == 5


def list_tokens(directory: Path, **tokens: int) -> Path:
    """List tokens in tokenizer_config.json alone."""
    write_tiny_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    listed = {str(number): {"content": f"<{name}>", "special": True} for name, number in tokens.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": listed}))
    return directory


def test_tokens_that_only_the_configuration_lists_are_recognised_as_transformers_does(tmp_path: Path) -> None:
    loaded = load_tokenizer(list_tokens(tmp_path / "listed", call=len(VOCABULARY), begin=1))
    assert loaded.ids(Segment(text="<call>"))[-1] == len(VOCABULARY)
    assert len(loaded.encode([Segment(text="<call>")])[0].ids) == 1


def test_a_listed_token_with_another_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseCheckpointError, match=r"lists '<call>' as token 7, which in tokenizer\.json is \d+"):
        load_tokenizer(list_tokens(tmp_path / "listed", call=7))


def test_a_vocabulary_that_is_larger_than_the_embedding_is_refused(tmp_path: Path, tokenizer: BaseTokenizer) -> None:
    base = resolve(str(write_model(tmp_path / "base", shapes=model_shapes(vocab=48))), Settings())
    with pytest.raises(BaseCheckpointError, match=f"has {len(VOCABULARY)} tokens, but its embedding has 48 rows"):
        require_rows(tokenizer, base)
