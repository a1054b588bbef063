"""The text of a response while its tokens are drawn."""

from __future__ import annotations

from typing import Any

# The response of a model without a chat template ends where it writes a turn for the user.
NEXT_TURN = "\n\nHuman:"
_HALF = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text as soon as it is final: whole characters, without the response's surrounding white space.

    Args:
        stops: texts that end the response and do not belong to it, besides the user's next turn.

    Attributes:
        ended: whether a text that ends the response was drawn.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.own_stops = () if tokenizer.chat_template else (NEXT_TURN,)
        self.stops = (*self.own_stops, *stops)
        self.ended = False
        self._tokens: list[int] = []
        self._begin = self._end = 0  # the tokens that were last decoded to whole characters
        self._held = ""  # text that may not be final
        self._started = False

    def push(self, token: int) -> str:
        """The text that a token makes final; often empty."""
        self._tokens.append(token)
        before, now = self._decode(self._tokens[self._begin : self._end]), self._decode(self._tokens[self._begin :])
        if now.endswith(_HALF):
            return ""
        self._begin, self._end = self._end, len(self._tokens)
        self._held += now[len(before) :]
        stop = min((place for text in self.stops if (place := self._held.find(text)) >= 0), default=None)
        if stop is not None:
            self.ended = True
            self._held = self._held[:stop]
            return self.finish()
        return self._release(_without_begun(self._held, self.stops))

    def finish(self) -> str:
        """The rest of the text when no token follows."""
        return self._release(_without_begun(self._held, () if self.ended else self.own_stops))

    def _release(self, final: str) -> str:
        """Give out the first part of the held text, but keep white space at its end: the response may end there."""
        final = final.rstrip()
        self._held = self._held[len(final) :]
        if not self._started:
            final = final.lstrip()
            self._started = bool(final)
        return final

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _without_begun(text: str, stops: tuple[str, ...]) -> str:
    """The text without an end that may be the beginning of a stop."""
    begun = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return text[: len(text) - max(begun, default=0)]
