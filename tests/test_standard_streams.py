"""Commands whose stdin, stdout or stderr is closed, full or gone, or cannot write every character."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE, VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.prompts import ChatTemplate
from litgpt.standard_streams import is_text, replace_surrogates

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    LLM(tiny_gpt(**VOCABULARY, block_size=512), Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE)).save(
        folder
    )
    return str(folder)


def shell(line: str, *args: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which LITGPT is the program."""
    line = line.replace("LITGPT", f"{sys.executable} -m litgpt")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", line, "bash", *args],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        env=env | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("LITGPT --help >&-", 1, b"litgpt: error: stdout is closed\n"),
        ("LITGPT --help >/dev/full", 1, b"litgpt: error: No space left on device\n"),
        ("LITGPT --version <&- >/dev/null", 0, b""),
        ("LITGPT nothing 2>&-", 2, b""),
        ("LITGPT nothing 2>/dev/full", 2, b""),
        ("LITGPT --version >&- 2>&- <&-", 1, b""),
        ("LITGPT chat . <&-", 1, b"litgpt: error: stdin is closed: chat reads messages"),
        ("LITGPT chat . </dev/null >&-", 1, b"litgpt: error: stdout is closed: chat writes answers"),
        ("LITGPT generate . --prompt $'caf\\xe9'", 2, b"litgpt: error: --prompt is not text in UTF-8: b'caf\\xe9'\n"),
        ("LITGPT $'\\xff'", 2, b"litgpt: error: unknown command '\\udcff'"),
    ],
)
def test_streams_and_arguments_that_fail_are_one_line(line, code, error):
    result = shell(line)
    assert (result.returncode, result.stdout) == (code, b"")
    assert result.stderr.startswith(error)
    assert result.stderr.count(b"\n") <= 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["caf\udce9"], "litgpt: error: --checkpoint_dir is not text in UTF-8: b'caf\\xe9'\n"),
        (["--\udcff", "1"], "litgpt: error: --\\udcff is not text in UTF-8: b'1'\n"),
        ([".", "--config", "options.yaml"], "litgpt: error: --config"),
    ],
)
def test_arguments_that_are_no_text_are_one_line(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("options.yaml").write_bytes(b"prompt: caf\xe9")
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(error)


def test_what_stdout_cannot_write_is_replaced(model):
    command = "LITGPT generate \"$@\" --prompt 'Über 東京' --max_new_tokens 40 --temperature 0 --precision 32-true"
    expected = shell(command, model).stdout.decode()
    assert not expected.isascii()
    result = shell(command, model, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert result.returncode == 0
    assert result.stdout.decode() == expected.encode("ascii", "replace").decode()


def test_a_chat_goes_on_after_lines_that_are_not_text(model):
    command = "printf 'caf\\xe9\\n\\xed\\xa0\\x80\\n/system \\xff\\nHello\\n' | LITGPT chat \"$@\" --max_new_tokens 3"
    result = shell(command, model)
    assert result.returncode == 0
    assert result.stderr.count(b"computed before") == 3
    assert "System prompt: \ufffd.".encode() in result.stderr


def test_a_chat_needs_no_stderr(model):
    result = shell("printf 'Hello\\n' | LITGPT chat \"$@\" --temperature 0 --max_new_tokens 3 2>&-", model)
    again = shell("printf 'Hello\\n' | LITGPT chat \"$@\" --temperature 0 --max_new_tokens 3 2>/dev/full", model)
    assert (result.returncode, again.returncode) == (0, 0)
    assert result.stdout == again.stdout != b""


def test_a_chat_ends_with_those_who_read_it(model):
    result = shell('yes Hello | LITGPT chat "$@" --max_new_tokens 3 | head -c 1; echo ${PIPESTATUS[1]}', model)
    assert result.stdout.endswith(b"141\n")
    assert b"Traceback" not in result.stderr


def test_text_has_no_lone_surrogates():
    assert is_text({"a": ["b", 1, None, "\U0001f600"]})
    assert not is_text({"a": ["b", "\udce9"]})
    assert not is_text({"\ud800": 1})
    assert replace_surrogates("a\udce9\U0001f600") == "a\ufffd\U0001f600"
