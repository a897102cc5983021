"""Alpaca's prompt, word for word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from albireo.data import prompt_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def test_without_an_input() -> None:
    assert prompt_of("Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:"
    )


def test_with_an_input() -> None:
    assert prompt_of("Translate.", "Guten Tag") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:"
    )


@given(instruction=TEXTS, input_text=TEXTS)
def test_texts_stand_in_it_as_they_are(instruction: str, input_text: str) -> None:
    """Braces, and the words of the template itself, are a user's text like any other."""
    prompt = prompt_of(instruction, input_text)
    assert prompt.endswith("\n\n### Response:")
    before, _, _ = prompt.partition("### Instruction:\n")
    assert prompt[len(before) + len("### Instruction:\n") :].startswith(instruction)
    has_input = bool(input_text.strip())
    assert ("paired with an input" in before) == has_input
    if has_input:
        assert prompt.endswith(f"### Input:\n{input_text}\n\n### Response:")


def test_braces_are_no_places_to_fill() -> None:
    assert "Explain {input} and {instruction}." in prompt_of("Explain {input} and {instruction}.", "{input}")
