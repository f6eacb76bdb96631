"""Text as it is generated: stop strings across tokens are withheld and cut off."""

import random

import pytest
from tiny import tiny_tokenizer

from litgpt.engine.text_stream import TextStream

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("chance", range(30))
def test_pieces_joined_are_the_text_up_to_the_first_stop(chance):
    choose = random.Random(chance)
    text = "".join(choose.choice("ab ä😀") for _ in range(40))
    stops = ["".join(choose.choice("ab ä") for _ in range(choose.randint(1, 4))) for _ in range(2)]
    stream, pieces = TextStream(TOKENIZER, stops), []
    for token in TOKENIZER.encode(text).tolist():
        pieces.append(stream.push([token]))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == (text[: min(ends)] if ends else text)


def test_text_that_may_begin_a_stop_is_withheld():
    stream = TextStream(TOKENIZER, ["###"])
    assert [stream.push(TOKENIZER.encode(x).tolist()) for x in ("a#", "#b", "#", "##")] == ["a", "##b", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_withheld_text_comes_at_the_end_if_the_stop_does_not():
    stream = TextStream(TOKENIZER, ["###"])
    assert stream.push(TOKENIZER.encode("a##").tolist()) == "a"
    assert stream.finish() == "##"
