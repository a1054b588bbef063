"""The demo's dialogues are reproducible, and each is a real choice."""

from __future__ import annotations

from itertools import islice

from hpc_rlhf.train.data.demo import dialogues, facts


def test_dialogues_are_a_function_of_the_seed() -> None:
    first = list(dialogues(300, 7))
    assert first == list(dialogues(300, 7))
    assert first != list(dialogues(300, 8))
    assert list(islice(dialogues(1000, 7), 300)) == first, "more of them begin with the same"


def test_every_pair_is_a_choice_and_the_chosen_response_is_right() -> None:
    answers = {question: answer for ways, answer in facts() for question in ways}
    for row in dialogues(2000, 1):
        assert row["chosen"] != row["rejected"]
        (answer,) = {answer for question, answer in answers.items() if row["prompt"].endswith(question)}
        assert answer in row["chosen"]


def test_every_fact_occurs_as_a_question() -> None:
    prompts = [row["prompt"] for row in dialogues(4000, 1)]
    for ways, _ in facts():
        assert any(prompt.endswith(ways) for prompt in prompts)
