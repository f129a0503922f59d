"""Prompts in whole files: what an editor sends, with what follows where the base model can fill a gap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.evaluation.worker.completions import complete
from peft_core.evaluation.worker.prompts import MAX_NEW_TOKENS, choose_file_prompts
from peft_core.schemas.dataset import HeldOutFile
from peft_core.system.cancellation import StopFlag
from tests.tiny_models import tiny_model, write_byte_level_tokenizer

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TEXT = "".join(f"def w{n}(a):\n    b = {n}\n    c = a + b\n    ddd = c\n    return ddd + c\n\n" for n in range(40))


def make_file(name: str, rows: tuple[int, int] = (120, 240)) -> HeldOutFile:
    return HeldOutFile(path=f"{name}.py", language="python", text=TEXT, rows=(rows,))


def tokenizer_in(directory: Path, *marks: str) -> BaseTokenizer:
    directory.mkdir(exist_ok=True)
    write_byte_level_tokenizer(directory, marks)
    return load_tokenizer(directory)


@pytest.mark.parametrize("marks", [(), FIM])
def test_a_prompt_is_what_precedes_in_the_file_and_what_follows_if_the_base_fills_gaps(
    tmp_path: Path, marks: tuple[str, ...]
) -> None:
    tokenizer = tokenizer_in(tmp_path, *marks)
    prompts = choose_file_prompts([make_file("a"), make_file("b")], 8, 10_000, 0, tokenizer)
    assert {prompt.quoted.file for prompt in prompts} == {"a.py", "b.py"}
    rows = TEXT.splitlines(keepends=True)
    for prompt in prompts:
        quoted = prompt.quoted
        row = quoted.line - 1
        assert 120 <= row < 240, "only held-out rows are asked for"
        text = tokenizer.tokenizer.decode(list(prompt.ids), skip_special_tokens=False)
        expected = quoted.expected.count("\n")
        assert quoted.expected == "".join(rows[row : row + expected])
        assert len(tokenizer.ids(quoted.expected.strip())) <= MAX_NEW_TOKENS
        header = tokenizer.text(tokenizer.ids(f"# {quoted.file}\n"))  # the tiny vocabulary lacks some characters
        if marks:
            before, after = text.removeprefix(FIM[0]).removesuffix(FIM[2]).split(FIM[1])
            assert "".join(rows[row + expected :]).startswith(after)
            assert after.count("\n") >= 3
        else:
            before = text
        whole = "".join(rows[:row]) + quoted.indentation
        assert before.startswith(header)
        assert whole.endswith(before.removeprefix(header))
        assert before.count("\n") > 10
        assert len(prompt.ids) <= 320


def test_a_completion_says_whether_the_model_ended_by_itself(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, *FIM)
    prompts = choose_file_prompts([make_file("a")], 1, 10_000, 0, tokenizer)
    prompts = [replace(prompt, ids=prompt.ids[-200:]) for prompt in prompts]
    model = tiny_model()
    (limited,) = complete(model, prompts, tokenizer, StopFlag())
    assert not limited.has_ended
    with torch.no_grad():  # a model that now writes end-of-text
        last_D = model.model(torch.tensor([prompts[0].ids])).last_hidden_state[0, -1]
        model.get_input_embeddings().weight[tokenizer.end_of_text] = 100 * last_D
    (ended,) = complete(model, prompts, tokenizer, StopFlag())
    assert (ended.text, ended.has_ended) == ("", True)


def test_a_completion_that_reached_its_last_line_has_not_ended_by_itself(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    prompts = choose_file_prompts([make_file("a")], 2, 10_000, 0, tokenizer)
    model = tiny_model()
    newline = tokenizer.ids("\n")[-1]
    with torch.no_grad():  # it writes line ends after the first prompt
        last_D = model.model(torch.tensor([prompts[0].ids])).last_hidden_state[0, -1]
        model.get_input_embeddings().weight[newline] = 100 * last_D
    written = complete(model, prompts, tokenizer, StopFlag())
    assert written[0].text == "\n" * prompts[0].quoted.expected.count("\n") != "", "as many lines as are expected"
    assert not written[0].has_ended
