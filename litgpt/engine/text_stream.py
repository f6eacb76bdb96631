"""The text of a sequence as it is generated, up to a stop string."""

from collections.abc import Iterable, Sequence

from litgpt.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Decodes tokens as they arrive, and withholds text that may begin a stop string, also across tokens.

    Args:
        tokenizer: of the model.
        stops: texts, each of which ends the answer and is not part of it.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer)
        self._withheld = ""

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is now known to be output."""
        return self._release(self._decoder.push(tokens))

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return "" if self.stopped else self._release(self._decoder.finish()) + self._flush()

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._withheld + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._withheld = True, ""
            return text[: min(found)]
        undecided = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._withheld = text[len(text) - undecided :]
        return text[: len(text) - undecided]

    def _flush(self) -> str:
        text, self._withheld = self._withheld, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
