"""`litgpt chat --session FILE`: a conversation goes on as if it had never been interrupted."""

import os
import re
import signal
import subprocess
import sys

import pytest
from tiny import tiny_gpt

import litgpt.chat.base as chat
from litgpt.__main__ import main
from litgpt.engine import Session
from litgpt.engine.session_file import read_session

EVICTING = ("--kv_cache", "lastrec", "--cache_length", "32")


@pytest.fixture
def talk(model, monkeypatch, capfd):
    """Say something to `litgpt chat`: its exit code, what it answers and what else it tells. What is said may also be
    something to call, or raise, when the next message is asked for; in the end there is no more input."""

    def run(*said, options=()):
        messages = iter(said)

        def read():
            message = next(messages, EOFError)
            while callable(message) and not isinstance(message, type):
                message()
                message = next(messages, EOFError)
            if isinstance(message, type):
                raise message
            return message

        monkeypatch.setattr("builtins.input", read)
        code = main(["chat", model, "--temperature", "0", "--max_new_tokens", "6", "--precision", "32-true", *options])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.mark.parametrize(
    "kind", [(), EVICTING, (*EVICTING, "--kv_cache_args.n_sink", "2")], ids=["dense", "lastrec", "sinks"]
)
def test_answers_are_those_of_one_conversation(talk, tmp_path, kind):
    said = ["Hello", "Über 東京", "And?", "So?"]
    _, expected, _ = talk(*said, options=kind)
    options = ("--session", str(tmp_path / "s"), *kind)
    answers, before = [], 0
    for i, message in enumerate(said):  # another process each time
        code, out, err = talk(message, *(["/exit"] if i % 2 else []), options=options)
        assert code == 0
        answers += out
        assert (f"Going on after {2 * i} messages" in err) == (i > 0)
        assert f"Saved to {tmp_path / 's'}: " in err
        length, reused = map(int, re.search(r"context (\d+) tokens, (\d+) of them", err).groups())
        assert reused >= before - 1
        before = length
    assert answers == expected


def test_every_answer_is_saved_at_once(talk, tmp_path):
    path, lengths = tmp_path / "s", []
    saved = lambda: lengths.append(len(read_session(path).about["notes"]["messages"]))  # noqa: E731
    talk("Hello", saved, "And?", saved, "/reset", "/exit", options=("--session", str(path)))
    assert lengths == [2, 4]
    assert read_session(path).about["notes"]["messages"] == []


def test_large_sessions_are_saved_on_leaving_only(talk, tmp_path, monkeypatch):
    path = tmp_path / "s"
    monkeypatch.setattr(chat, "SAVED_EACH_TIME", 100)
    lengths = []
    saved = lambda: lengths.append(len(read_session(path).about["notes"]["messages"]))  # noqa: E731
    talk("Hello", saved, "And?", saved, options=("--session", str(path)))
    assert lengths == [2, 2]
    assert len(read_session(path).about["notes"]["messages"]) == 4


def test_a_save_that_fails_or_is_interrupted_is_told_and_the_conversation_goes_on(talk, tmp_path, monkeypatch):
    save = chat.Conversation.save
    errors = iter([OSError(28, "No space left on device"), KeyboardInterrupt()])

    def failing(conversation, path):
        error = next(errors, None)
        if error is not None:
            raise error
        save(conversation, path)

    monkeypatch.setattr(chat.Conversation, "save", failing)
    code, out, err = talk("Hello", "And?", "So?", options=("--session", str(tmp_path / "s")))
    assert code == 0
    assert "not saved yet: [Errno 28] No space left on device" in err
    assert "not saved yet: interrupted" in err
    assert len(out) == 3
    assert len(read_session(tmp_path / "s").about["notes"]["messages"]) == 6


def test_the_system_prompt_is_kept_unless_another_is_given(talk, tmp_path):
    options = ("--session", str(tmp_path / "s"))
    talk("/system Be brief.", "Hello", options=options)
    talk("And?", options=options)
    assert read_session(tmp_path / "s").about["notes"]["sys_prompt"] == "Be brief."
    _, answer, err = talk("So?", options=(*options, "--sys_prompt", "Be long."))
    notes = read_session(tmp_path / "s").about["notes"]
    assert notes["sys_prompt"] == "Be long."
    assert [message["role"] for message in notes["messages"]] == ["user", "assistant"] * 3


def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(talk, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(chat, "make_ready", load)
    (tmp_path / "damaged").write_bytes(b"not this")
    for name, message in (
        ("damaged", "damaged or incomplete: name another file to begin a new session"),
        ("no/folder/s", "there is no folder"),
        (".", "is not a file"),
    ):
        code, _, err = talk("Hello", options=("--session", str(tmp_path / name)))
        assert code == 1
        assert message in err
        assert len(err.splitlines()) == 1


def test_sessions_of_other_kinds_are_refused(talk, tmp_path):
    path = tmp_path / "s"
    talk("Hello", options=("--session", str(path)))
    before = path.read_bytes()
    _, _, err = talk("And?", options=("--session", str(path), *EVICTING))
    assert "use the same, or begin a new session" in err
    code, _, err = talk("And?", options=("--session", str(path), "--precision", "bf16-true"))
    assert code == 1
    assert "in the precision that the session was saved in" in err
    assert path.read_bytes() == before
    session = Session(tiny_gpt())
    session.save(path)
    _, _, err = talk("And?", options=("--session", str(path)))
    assert "no conversation" in err


def test_killed_in_the_middle_of_an_answer_it_goes_on_from_the_last_one(model, talk, tmp_path):
    args = ["chat", model, "--session", str(tmp_path / "s"), "--max_new_tokens", "400", "--precision", "32-true"]
    with subprocess.Popen(
        [sys.executable, "-m", "litgpt", *args, "--temperature", "0"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        process.stdin.write("Hello\nAnd?\n")
        process.stdin.flush()
        while "computed before" not in process.stderr.readline():
            pass
        while not (tmp_path / "s").exists():
            pass
        process.send_signal(signal.SIGKILL)
    assert len(read_session(tmp_path / "s").about["notes"]["messages"]) == 2
    code, _, err = talk("So?", options=("--session", str(tmp_path / "s")))
    assert code == 0
    assert "Going on after 2 messages" in err


def test_one_chat_at_a_time_goes_on_with_a_session(model, talk, tmp_path):
    path = tmp_path / "s"
    link = tmp_path / "link"
    link.symlink_to(path)
    with subprocess.Popen(
        [sys.executable, "-m", "litgpt", "chat", model, "--session", str(path), "--precision", "32-true"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while "Talking" not in process.stderr.readline():
            pass
        for name in (path, link):
            code, out, err = talk("Hello", options=("--session", str(name)))
            assert (code, out) == (1, [])
            assert re.fullmatch(r"litgpt: error: another chat has \S+ open, and would overwrite .*\n", err)
        process.send_signal(signal.SIGKILL)
    code, out, _ = talk("Hello", options=("--session", str(link)))
    assert (code, len(out)) == (0, 1)
    assert link.is_symlink()
    assert talk("Hello", options=("--session", str(path)))[0] == 0


def test_where_no_session_can_be_saved_is_said_at_the_start(talk):
    code, _, err = talk("Hello", options=("--session", "/proc/s"))
    assert code == 1
    assert err.count("\n") == 1
    assert "/proc/" in err


def test_one_token_is_one_token(talk, tmp_path):
    code, _, err = talk("Hello", options=("--max_new_tokens", "1", "--session", str(tmp_path / "s")))
    assert code == 0
    assert "[stopped at 1 token: --max_new_tokens]" in err
    assert re.search(r"^\[1 token; first after", err, re.MULTILINE)
