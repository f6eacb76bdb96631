"""Ctrl-C at any point leaves a chat that goes on as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from linecache import getline
from subprocess import PIPE

import pytest
import torch
from tiny import CHAT_TEMPLATE, VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.chat.conversation import Conversation
from litgpt.chat.ctrl_c import CtrlC
from litgpt.engine.loading import Ready
from litgpt.engine.session import Session
from litgpt.prompts import ChatTemplate


class InterruptedAt:
    """Raises `KeyboardInterrupt` before the `number`-th line of this package that is run (0: only counts them). Lines of `with`
    do not count: they are run again on leaving it, where Python handles no signal before the lock is free."""

    def __init__(self, number=0):
        self.number, self.lines = number, 0

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *exception):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if not frame.f_globals.get("__name__", "").startswith("litgpt."):
            return None
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            self.lines += 1
            if self.lines == self.number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


@pytest.fixture(params=["dense", "lastrec"])
def conversation(request):
    model = tiny_gpt(**VOCABULARY, block_size=512)
    ready = Ready(model, tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), None)
    length = None if request.param == "dense" else 300
    return Conversation(ready, lambda: Session(model, request.param, length), 4, {"temperature": 0.0})


def check_goes_on(conversation):
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * (len(conversation.messages) // 2)
    list(conversation.ask("And?"))
    tokens = torch.tensor(conversation._history.tokens)
    prompt, answer = tokens.split([conversation.prompt_tokens, conversation.answer_tokens])
    expected = greedy_without_caches(conversation.ready.model, prompt, 4).tolist()
    assert answer.tolist() == (expected[: expected.index(0)] if 0 in expected else expected)


def test_an_interrupt_at_any_line_leaves_a_usable_conversation(conversation):
    counting = InterruptedAt()
    with counting:
        list(conversation.ask("Hello"))
    draw = random.Random(1)
    for number in sorted(draw.sample(range(1, counting.lines), 40)):
        conversation.reset()
        conversation.renew_caches()
        if number % 2:
            list(conversation.ask("Before"))
        with suppress(KeyboardInterrupt), InterruptedAt(number):  # fewer lines run once caches are there
            for _ in conversation.ask("Hello"):
                pass
        conversation.renew_caches()
        check_goes_on(conversation)


def test_a_message_that_is_interrupted_before_its_answer_is_as_if_it_was_not_said(conversation):
    list(conversation.ask("Hello"))
    before = conversation.messages
    with pytest.raises(KeyboardInterrupt), InterruptedAt(30):
        next(conversation.ask("And?"))
    conversation.renew_caches()
    assert conversation.messages == before


def test_ctrl_c_raises_only_where_it_may():
    before = signal.getsignal(signal.SIGINT)  # in a background job it is ignored
    with CtrlC().handled() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        assert ctrl_c.pressed
        with ctrl_c.as_mode("stop"):
            assert not ctrl_c.pressed
            signal.raise_signal(signal.SIGINT)
            assert ctrl_c.pressed
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        with ctrl_c.as_mode("raise"):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # tidying up is not interrupted
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_at_random_times_end_answers_and_nothing_else(model):
    """Answers after many interrupts are those of a chat that had none."""
    options = ["--temperature", "0", "--max_new_tokens", "100", "--precision", "32-true"]
    command = [sys.executable, "-m", "litgpt", "chat", model, *options]
    settings = {"text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": PIPE, "stderr": PIPE}
    expected = subprocess.run(command, input="Hello\n", timeout=60, check=True, **settings).stdout
    draw = random.Random(2)
    with subprocess.Popen(command, stdin=PIPE, **settings) as process:

        def say(text, until):
            process.stdin.write(f"{text}\n")
            process.stdin.flush()
            while until not in (line := process.stderr.readline()):
                assert line
                assert "error" not in line

        while "Talking" not in process.stderr.readline():
            pass
        for i in range(15):
            process.stdin.write("Hello\n")
            process.stdin.flush()
            for _ in range(draw.choice([1, 1, 2])):
                time.sleep(draw.random() ** 2 * 0.2)
                process.send_signal(signal.SIGINT)
            say(f"/system {i}", f"System prompt: {i}.")
        say("/system", "Starting anew")
        process.stdin.write("/reset\nHello\n")
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert out.endswith(expected)
