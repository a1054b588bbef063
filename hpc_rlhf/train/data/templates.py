"""Dialogues as text: rendered by the tokenizer's chat template, or as plain transcripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from re import Pattern
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data import special_strings
from hpc_rlhf.train.data.rows import ASSISTANT, MARKER, Sample, Turn, transcript

TEMPLATE_ROLES = {"system": "system", "human": "user", "assistant": "assistant"}
# In a transcript, a response that another turn follows.
EARLIER_RESPONSE = re.compile(f"{ASSISTANT}(?:(?!{MARKER.pattern}).)*(?={MARKER.pattern})", re.DOTALL)
END_OF_THINKING = "</think>"
# Before a template: what `enable_thinking` is for those who do not set it, such as a server.
THINKING_DEFAULT = "{{%- set enable_thinking = enable_thinking if enable_thinking is defined else {} -%}}"


@dataclass(frozen=True)
class Rendered:
    """A prompt with responses, as text with marks (see ``special_strings``).

    Attributes:
        prompt: ends where a response begins; empty for plain text.
        wholes: for each response, the prompt followed by it and by the end of its turn, if the template writes one;
            empty for an empty response.
        settings: of the template, for this prompt.
        drops_thinking: the template leaves the thinking of a response out.
    """

    prompt: str
    wholes: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    drops_thinking: bool = False


class Renderer:
    """Renders dialogues in the format of a tokenizer. Special strings in messages are marked, so that they stay text.

    A template that knows thinking receives whether a response thinks, so that its prompt is one that it continues.

    Args:
        ends: without a template, EOS follows earlier responses in prompts, for training on prompts.
    """

    def __init__(self, tokenizer: Any, ends: bool = False) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.template = tokenizer.chat_template
        thinks = isinstance(self.template, str) and self.template.startswith(THINKING_DEFAULT.format("true"))
        self.default = {"enable_thinking": thinks}

    @cached_property
    def special(self) -> Pattern[str]:
        """Matches what must not become a special token in a message."""
        frame = self._apply([{"role": "user", "content": "."}], True, self.default, "") if self.template else ""
        return special_strings.pattern(self.tokenizer, frame)

    def prompt(
        self,
        turns: Sequence[Turn],
        plain: str | None = None,
        settings: Mapping[str, Any] | None = None,
        where: str = "",
    ) -> str:
        """The prompt for the next response in a dialogue.

        Args:
            plain: the transcript to use if the tokenizer has no template; by default it is made from the turns.
            settings: of the template; by default those for responses as most of the data has them.
            where: the row, for errors.
        """
        if self.template:
            return self._apply(self._messages(turns), True, self.default if settings is None else settings, where)
        return self._plain(transcript(turns) if plain is None else plain)

    def _plain(self, prompt: str) -> str:
        """A transcript that is a prompt, with marks."""
        marked = special_strings.mark(prompt, self.special)
        return EARLIER_RESPONSE.sub(lambda match: match[0] + self.tokenizer.eos_token, marked) if self.ends else marked

    def dialogue(self, sample: Sample, *answers: str) -> Rendered | None:
        """A sample's prompt and responses to it: exactly what the template writes for these messages.

        Returns:
            None if the template writes no prompt that all responses continue, or writes a text without one of them.
        """
        if not self.template or not sample.prompt:
            prompt = self._plain(sample.prompt.rstrip())
            marked = [special_strings.mark(text.rstrip(), self.special) for text in answers]
            return Rendered(prompt, tuple(text and prompt + text for text in marked))
        if not any(answers):
            return Rendered(self.prompt(sample.turns, where=sample.where), answers, self.default)
        thinks = any(END_OF_THINKING in answer for answer in answers)
        forms: tuple[dict[str, bool], ...] = ({"enable_thinking": thinks}, {}, {"enable_thinking": not thinks})
        try:
            return next(filter(None, (self._continued(sample, answers, settings) for settings in forms)), None)
        except HpcRlhfError:
            if sample.turns[-1][0] != "assistant":
                raise
            return None  # two responses in succession

    def _continued(self, sample: Sample, answers: Sequence[str], settings: Mapping[str, Any]) -> Rendered | None:
        """A sample as the template writes it with these settings; None if its prompt is no prompt for all responses."""
        prompt = self.prompt(sample.turns, settings=settings, where=sample.where)
        wholes, drops = [], False
        for answer in answers:
            (message,) = self._messages([("assistant", answer.removeprefix(" "))])
            messages = [*self._messages(sample.turns), message]
            whole = self._apply(messages, False, settings, sample.where) if answer else ""
            wholes.append(whole)
            thinking, _, answer_text = message["content"].rpartition(END_OF_THINKING)
            if answer and not (whole.startswith(prompt) and answer_text.strip() in whole[len(prompt) :]):
                return None
            drops |= thinking.rpartition("<think>")[2].strip() not in whole[len(prompt) :]
        return Rendered(prompt, tuple(wholes), settings, drops)

    def whole(self, turns: Sequence[Turn]) -> str:
        """A dialogue that ends with a response, as the template writes it, or as a transcript; with marks."""
        if self.template:
            return self._apply(self._messages(turns), False, {}, "")
        return self._plain(f"{transcript(turns[:-1])} {turns[-1][1]}")

    def end_of(self, answer: str) -> str:
        """What the template writes behind a response."""
        messages = self._messages((("human", "question"), ("assistant", answer)))
        return self._apply(messages, False, self.default, "").rpartition(answer)[2]

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """Turns as messages for a template; successive turns of one role become one message."""
        messages: list[dict[str, str]] = []
        for role, text in turns:
            content, template_role = special_strings.mark(text, self.special), TEMPLATE_ROLES[role]
            if messages and messages[-1]["role"] == template_role:
                messages[-1]["content"] += f"\n\n{content}"
            else:
                messages.append({"role": template_role, "content": content})
        return messages

    def _apply(self, messages: list[dict[str, str]], prompt: bool, settings: Mapping[str, Any], where: str) -> str:
        """Messages rendered by the template.

        Raises:
            HpcRlhfError: the template refuses them.
        """
        system = messages[0]["content"] if messages[0]["role"] == "system" and len(messages) > 1 else None
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **settings
            )
            if system is None or system.strip() in text:
                return text
        except Exception as error:  # a template is a program
            if system is None:
                raise HpcRlhfError(
                    f"the tokenizer's chat template refuses a dialogue of {', '.join(m['role'] for m in messages)} "
                    f"({type(error).__name__}: {error})",
                    where=where or "data.template",
                    hint="remove or change the dialogue, or set data.template: plain",
                ) from error
        # Some templates support no system message: it becomes part of the first user message.
        first = {"role": messages[1]["role"], "content": f"{system}\n\n{messages[1]['content']}"}
        return self._apply([first, *messages[2:]], prompt, settings, where)


def knows_thinking(tokenizer: Any) -> bool:
    """Whether a template's prompts depend on ``enable_thinking``."""
    messages = [{"role": "user", "content": "question"}]
    prompts = {
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinks)
        for thinks in (False, True)
    }
    return len(prompts) > 1


def prompt_text(tokenizer: Any, turns: Sequence[Turn], plain: str | None = None) -> str:
    """``Renderer.prompt`` for a single dialogue."""
    return Renderer(tokenizer).prompt(turns, plain)
