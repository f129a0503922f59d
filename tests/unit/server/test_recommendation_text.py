"""What a person reads of a recommendation."""

from __future__ import annotations

from typing import Any

from peft_core.schemas.recommendation import BaseRecommendation, DownloadableBase, RecommendedBase, UnusableBase
from server.format_results import format_recommendation
from server.recommendation_text import candidate_line, download_sentence, recommendation_lines
from tests.clients import text_of

BASIS = "rule of thumb for 2 CPU cores"


def coder(**changes: Any) -> RecommendedBase:
    return RecommendedBase(
        **{
            "base_model": "ollama:coder:0.5b",
            "source": "ollama",
            "reason": "a model for code, with fill-in-the-middle",
            "code_model": True,
            "fill_in_the_middle": True,
            "chat_template": True,
            "parameters": 494_000_000,
            "quantisation": "Q8_0",
            "seconds": 4200.0,
            "memory_bytes": 2_300_000_000,
            "steps": 225,
            "basis": BASIS,
            **changes,
        }
    )


def recommendation(**changes: Any) -> BaseRecommendation:
    return BaseRecommendation(**{"candidates": [coder()], "device": "cpu", "estimated_for": "1000 examples", **changes})


DOWNLOAD = DownloadableBase(
    base_model="Org/Coder",
    reason="a model for code",
    command="hf download Org/Coder",
    licence="Apache-2.0",
    download_bytes=988_000_000,
    parameters=494_000_000,
    seconds=None,
    memory_bytes=3_700_000_000,
)


def test_each_base_is_a_line_with_reason_size_time_and_memory() -> None:
    assert candidate_line(coder(same_model=["org/a"])) == (
        "ollama:coder:0.5b: a model for code, with fill-in-the-middle; 494M parameters in Q8_0, about 1 h 10 min for 225 "
        "steps, 2.3 GB of memory (rule of thumb for 2 CPU cores). Also here as org/a."
    )
    assert candidate_line(coder(base_model="bundled", source="bundled", name="SmolLM2")).startswith(
        "bundled (SmolLM2): "
    )
    assert "unknown time for 225 steps" in candidate_line(coder(seconds=None))


def test_the_basis_of_the_times_is_said_once_if_it_is_the_same() -> None:
    same = "\n".join(recommendation_lines(recommendation(candidates=[coder(), coder()])))
    assert same.count(BASIS) == 1
    assert f"Time is estimated for 1000 examples ({BASIS}). Quality on your code was not measured." in same
    different = "\n".join(recommendation_lines(recommendation(candidates=[coder(), coder(basis="measured")])))
    assert "memory (rule of thumb for 2 CPU cores)" in different
    assert "memory (measured)" in different


def test_what_is_worth_downloading_comes_with_licence_size_and_command() -> None:
    assert download_sentence(DOWNLOAD) == (
        "Worth downloading: Org/Coder (Apache-2.0, 1.0 GB): a model for code; unknown time and 3.7 GB of memory. Download "
        "it with `hf download Org/Coder`."
    )
    assert download_sentence(DOWNLOAD) in recommendation_lines(recommendation(download=DOWNLOAD))


def test_names_from_files_cannot_add_lines_or_control_a_terminal() -> None:
    hostile = "a\n1. best\x1b[31m.gguf"
    result = format_recommendation(
        recommendation(
            candidates=[coder(base_model=hostile, name=hostile, source="default", same_model=[hostile])],
            unusable=[UnusableBase(base_model=hostile, reason="it is damaged")],
            omitted=2,
            not_examined=3,
        )
    )
    lines = text_of(result).splitlines()
    assert "\x1b" not in text_of(result)
    assert not any(line.startswith("1. best") for line in lines)
    assert "- and 2 more; list_base_models says why." in lines
    assert "3 more were not examined in time; call recommend_base again." in lines


def test_without_a_usable_base_the_answer_says_what_to_do() -> None:
    result = format_recommendation(recommendation(candidates=[], next="Install the bundled base model: pip install x"))
    assert text_of(result).startswith("No base model on this machine can be trained on cpu.")
    assert "Install the bundled base model" in text_of(result)
