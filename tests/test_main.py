import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest

from litgpt.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
LITGPT_COMMANDS = json.loads((Path(__file__).parent / "data" / "cli.json").read_text())


def talk(
    checkpoint_dir: Path | None = None,
    prompt: str = "What food do llamas eat?",
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    temperature: float = 0.8,
    quantize: Literal["int8", "int4"] | None = None,
    compile: bool = False,
) -> None:
    """Talk with a model.

    More than one line about it.

    Args:
        checkpoint_dir: Where the model is.
        prompt: What to say to it.
        max_new_tokens: The length of the answer in tokens.
        top_k: How many tokens to choose from.
        temperature: How bold to choose.
        quantize: How to store the weights.
        compile: Whether to compile the model.
    """
    print(json.dumps(locals(), default=str))


def turn(checkpoint_dir: Path, output_dir: Path, times: int = 3) -> None:
    print(json.dumps(locals(), default=str))


def learn(checkpoint_dir: Path, optimizer: str | dict = "AdamW") -> None:
    print(json.dumps(locals(), default=str))


@dataclass
class Arguments:
    epochs: int = 3
    """How often to see the data."""


def train(checkpoint_dir: Path, train: Arguments = Arguments()) -> None:  # noqa: B008
    print(type(train).__name__, train.epochs)


def fail(kind: str) -> None:
    if kind == "open":
        open("no/such/file")  # noqa: SIM115
    if kind == "unpack":
        first, second = [1]  # noqa: F841
    raise {
        "value": ValueError("top_p is 2,\n  but must be at most 1"),
        "runtime": RuntimeError("no device"),
        "index": IndexError("cache is full"),
        "interrupt": KeyboardInterrupt(),
        "defect": KeyError("n_layer"),
        "memory": RuntimeError("[alloc_cpu.cpp:127] can't allocate memory: you tried to allocate 8000000000 bytes."),
    }[kind]


@pytest.fixture(autouse=True)
def _fake_commands(monkeypatch):
    for function in (talk, turn, learn, train, fail):
        monkeypatch.setitem(COMMANDS, function.__name__, (f"{__name__}:{function.__name__}", "Does it."))
    monkeypatch.delenv("LITGPT_DEBUG", raising=False)


@pytest.fixture
def litgpt(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        try:
            code = main(args)
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return run


def arguments(result: tuple[int, str, str]) -> dict:
    code, out, err = result
    assert (code, err) == (0, "")
    return json.loads(out)


def complaint(result: tuple[int, str, str], code: int = 2) -> str:
    assert result[:2] == (code, "")
    line = result[2]
    assert line.startswith("litgpt: error: ")
    assert line.count("\n") == 1
    return line


def process(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


# --- the top level


def test_help_is_a_table_of_all_commands(litgpt):
    code, out, err = litgpt("--help")
    assert (code, err) == (0, "")
    assert litgpt("-h")[1] == out
    rows = [line for line in out.splitlines() if line.startswith("  ")]
    assert [row.split()[0] for row in rows] == list(COMMANDS)
    assert len({row.index(help_line) for row, (_, help_line) in zip(rows, COMMANDS.values(), strict=True)}) == 1
    assert all(len(row) < 110 for row in rows)


def test_no_command_prints_help_and_fails(litgpt):
    assert litgpt() == (2, litgpt("--help")[1], "")


def test_help_imports_little():
    code = "import sys; from litgpt.__main__ import main; main(['--help']); print(*sys.modules)"
    loaded = set(process("-c", code).stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "jsonargparse", "yaml", "jinja2", "tokenizers", "rich", "importlib.metadata"}
    assert len(loaded) < 300


def test_generating_does_not_import_compilers():
    """They take a second, also of those who do not compile anything."""
    code = "import sys, litgpt.generate.base, litgpt.chat.base, litgpt.api; print(*sys.modules)"
    loaded = set(process("-c", code).stdout.split())
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "filelock", "huggingface_hub"}


def test_runs_as_a_module():
    result = process("-m", "litgpt", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: litgpt COMMAND")
    assert process("-m", "litgpt").returncode == 2


def test_version(litgpt):
    import litgpt as package

    assert litgpt("--version") == (0, f"litgpt {package.__version__}\n", "")


def test_unknown_commands_suggest_near_ones(litgpt):
    assert "unknown command 'chta'; did you mean chat?" in complaint(litgpt("chta"))
    assert "did you mean convert_to_litgpt" in complaint(litgpt("convert-to-litgpt"))
    assert "'zzz'; `litgpt --help` lists the commands" in complaint(litgpt("zzz"))
    assert "unknown option '--foo'" in complaint(litgpt("--foo"))


# --- options


def test_defaults_come_from_the_signature(litgpt):
    expected = {name: p.default for name, p in inspect.signature(talk).parameters.items()}
    assert arguments(litgpt("talk")) == expected


def test_the_first_parameter_goes_with_and_without_its_name(litgpt):
    for args in (["D"], ["--checkpoint_dir", "D"], ["--checkpoint_dir=D"], ["--checkpoint-dir", "D"], ["--", "D"]):
        assert arguments(litgpt("talk", *args))["checkpoint_dir"] == "D"
    assert arguments(litgpt("talk", "--top_k", "3", "D", "--compile", "true"))["checkpoint_dir"] == "D"


def test_parameters_without_default_go_in_order_or_by_name(litgpt):
    expected = {"checkpoint_dir": "A", "output_dir": "B", "times": 3}
    for args in (["A", "B"], ["--output_dir", "B", "A"], ["B", "--checkpoint_dir=A"]):
        assert arguments(litgpt("turn", *args)) == expected


def test_values_are_typed(litgpt):
    given = arguments(litgpt("talk", "--max-new-tokens", "7", "--top_k", "null", "--temperature=1", "--prompt", "5"))
    assert given["max_new_tokens"] == 7
    assert given["top_k"] is None
    assert given["temperature"] == 1.0
    assert given["prompt"] == "5"


@pytest.mark.parametrize("prompt", ["", "-5 degrees", "-x", "a=b", "null", "{a: 1}", "two\nlines", "3"])
def test_any_text_may_be_a_prompt(litgpt, prompt):
    assert arguments(litgpt("talk", "D", f"--prompt={prompt}"))["prompt"] == prompt
    assert arguments(litgpt("talk", "--prompt", prompt, "D"))["prompt"] == prompt


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--compile"], True),
        (["--compile", "true"], True),
        (["--compile", "False"], False),
        (["--compile", "no"], False),
        (["--compile=false"], False),
        (["--compile", "--top_k", "3"], True),
    ],
)
def test_booleans_need_no_value(litgpt, args, expected):
    given = arguments(litgpt("talk", *args, "D"))
    assert (given["compile"], given["checkpoint_dir"]) == (expected, "D")


def test_groups_of_arguments_keep_their_type(litgpt):
    assert litgpt("train", "D") == (0, "Arguments 3\n", "")
    assert litgpt("train", "D", "--train.epochs", "5") == (0, "Arguments 5\n", "")


def test_config_file_gives_values_and_the_command_line_wins(litgpt, tmp_path):
    file = tmp_path / "turn.yaml"
    file.write_text("checkpoint_dir: A\noutput_dir: B\ntimes: 4\n")
    assert arguments(litgpt("turn", "--config", str(file))) == {"checkpoint_dir": "A", "output_dir": "B", "times": 4}
    given = arguments(litgpt("turn", "X", "--config", str(file), "--times", "5"))
    assert given == {"checkpoint_dir": "X", "output_dir": "B", "times": 5}


@pytest.mark.parametrize(
    ("given", "path", "rates"),
    [
        ("--optimizer.lr 0.5", "torch.optim.AdamW", {"lr": 0.5, "eps": 0.1}),
        (
            "--optimizer.init_args.lr 0.5 --optimizer.foreach true",
            "torch.optim.AdamW",
            {"lr": 0.5, "eps": 0.1, "foreach": True},
        ),
        ("--optimizer SGD --optimizer.lr 0.5", "torch.optim.SGD", {"lr": 0.5}),
        ('--optimizer={"class_path":"torch.optim.SGD","init_args":{"lr":0.5}}', "torch.optim.SGD", {"lr": 0.5}),
    ],
)
def test_arguments_of_the_command_line_override_those_of_a_class_in_a_file(litgpt, tmp_path, given, path, rates):
    file = tmp_path / "learn.yaml"
    file.write_text("optimizer:\n  class_path: torch.optim.AdamW\n  init_args:\n    lr: 0.1\n    eps: 0.1\n")
    optimizer = arguments(litgpt("learn", "A", "--config", str(file), *given.split()))["optimizer"]
    assert optimizer == {"class_path": path, "init_args": rates}


def test_print_config_can_be_read_again(litgpt, tmp_path):
    code, out, err = litgpt("turn", "--times", "9", "--print_config", "A", "B")
    assert (code, err) == (0, "")
    assert out == "checkpoint_dir: A\noutput_dir: B\ntimes: 9\n"
    (tmp_path / "turn.yaml").write_text(out)
    assert arguments(litgpt("turn", "--config", str(tmp_path / "turn.yaml")))["times"] == 9


def test_help_of_a_command_explains_every_option(litgpt):
    code, out, err = litgpt("talk", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: litgpt talk [checkpoint_dir] [--option VALUE ...]\n\nTalk with a model.\n")
    words = " ".join(out.split())
    for text in ("Where the model is.", "The length of the answer in tokens. (type: int, default: 50)", "--config"):
        assert text in words
    assert "<class" not in out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["talk", "--temperture", "3"], "unknown option --temperture, did you mean --temperature?"),
        (["talk", "--colour", "3"], "unknown option --colour ("),
        (["train", "D", "--train.epoch", "3"], "unknown option --train.epoch, did you mean --train.epochs?"),
        (["talk", "-x"], "unknown option -x"),
        (["talk", "D", "E"], "unexpected argument 'E'"),
        (["talk", "D", "--checkpoint_dir", "E", "F"], "unexpected argument 'D'"),
        (["talk", "--max_new_tokens", "many"], "--max_new_tokens cannot be 'many', it takes int"),
        (["talk", "--max_new_tokens", ""], "--max_new_tokens cannot be '', it takes int"),
        (["talk", "--max_new_tokens"], "argument --max_new_tokens: expected one argument"),
        (["talk", "--quantize", "int2"], "--quantize cannot be 'int2', it takes one of 'int8', 'int4' | None"),
        (["turn", ""], "--checkpoint_dir is empty: give the path of a file or folder, or a name"),
        (["turn", "A", "--output_dir="], "--output_dir is empty"),
        (["turn"], "checkpoint_dir is missing"),
        (["turn", "A"], "output_dir is missing"),
        (["talk", "--config", "nowhere.yaml"], "--config: File does not exist"),
        (["train", "D", "--train.epochs", "x"], "--train.epochs cannot be 'x', it takes int"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(litgpt, args, text):
    assert text in complaint(litgpt(*args))


def test_config_with_unknown_keys_is_refused(litgpt, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("temprature: 0.5\n")
    assert f"{path}: unknown option temprature, did you mean temperature?" in complaint(
        litgpt("talk", "--config", str(path))
    )
    path.write_text("train: {epoch: 3}\n")
    assert "unknown option train.epoch, did you mean train.epochs?" in complaint(
        litgpt("train", "D", "--config", str(path))
    )


def test_config_is_never_fetched_from_the_network(litgpt):
    assert "File does not exist" in complaint(litgpt("talk", "--config", "http://localhost:9/x.yaml"))


# --- errors


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("value", "top_p is 2, but must be at most 1"),
        ("runtime", "no device"),
        ("index", "cache is full"),
        ("open", "error: No such file or directory: 'no/such/file'"),
        ("unpack", "not enough values to unpack"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(litgpt, kind, text):
    assert text in complaint(litgpt("fail", kind), code=1)


def test_errors_of_our_own_need_no_hint(litgpt, monkeypatch):
    assert complaint(litgpt("fail", "value"), code=1).endswith("at most 1 (LITGPT_DEBUG=1 shows where)\n")
    monkeypatch.setitem(globals(), "__name__", "litgpt.fake")
    assert complaint(litgpt("fail", "value"), code=1) == "litgpt: error: top_p is 2, but must be at most 1\n"


def test_defects_are_one_line_that_says_where(litgpt):
    line = complaint(litgpt("fail", "defect"), code=1)
    assert re.search(r"internal error: KeyError: 'n_layer' at .*test_main\.py:\d+ \(LITGPT_DEBUG=1", line)


def test_out_of_memory_is_said_in_plain_words(litgpt):
    line = complaint(litgpt("fail", "memory"), code=1)
    assert "out of memory (8.0 GB more were asked for): take a smaller model" in line
    assert "alloc_cpu" not in line


def test_debugging_shows_the_traceback(litgpt, monkeypatch):
    monkeypatch.setenv("LITGPT_DEBUG", "1")
    with pytest.raises(ValueError, match="top_p"):
        litgpt("fail", "value")


def test_a_missing_dependency_is_one_line(litgpt, monkeypatch):
    monkeypatch.setitem(COMMANDS, "gone", ("no_such_package:main", "Is gone."))
    assert "No module named 'no_such_package'" in complaint(litgpt("gone"), code=1)


def test_interrupting_is_quiet(litgpt):
    assert litgpt("fail", "interrupt") == (130, "", "")


def test_a_closed_pipe_is_quiet(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "litgpt", "--help"]
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


# --- the real commands


@pytest.mark.parametrize("name", [name for name in COMMANDS if name in LITGPT_COMMANDS])
def test_command_has_the_options_and_defaults_of_litgpt(litgpt, name):
    expected = LITGPT_COMMANDS[name]
    assert COMMANDS[name][0] == expected["target"]
    module, _, attribute = expected["target"].partition(":")
    parameters = inspect.signature(getattr(import_module(module), attribute)).parameters
    for i, (key, default) in enumerate(expected["defaults"].items()):
        assert key in parameters
        if default == "required":
            assert list(parameters)[i] == key
        else:
            found = repr(parameters[key].default).replace("WindowsPath", "PosixPath")
            assert found == default or found.startswith(f"{default[:-1]}, "), key  # a group may have fields of ours
    code, out, err = litgpt(name, "--help")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    # An option without help text is directly followed by its type.
    unexplained = [key for key in parameters if f"--{key} {key.upper()} (" in words]
    assert not unexplained


@pytest.mark.parametrize("digits", [400, 6000])
def test_numbers_of_hundreds_of_digits_are_named(litgpt, tmp_path, digits):
    number = "1" + "0" * digits
    assert "--temperature has a number that is too large" in complaint(litgpt("talk", "--temperature", number))
    (tmp_path / "options.yaml").write_text(f"temperature: {number}\n")
    line = complaint(litgpt("talk", "--config", str(tmp_path / "options.yaml")))
    assert "options.yaml has a number that is too large" in line


SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    pass
def main() -> None:
    print("went on")
"""


def test_an_interrupt_while_a_command_is_imported_is_not_lost(tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    code = (
        "import signal, sys, litgpt.__main__ as m; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "m.COMMANDS['x'] = ('swallows:main', ''); sys.exit(m.main(['x']))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_the_help_of_kv_cache_names_all_policies_and_storages(capsys):
    from litgpt.kvcache.policies import POLICIES
    from litgpt.kvcache.storages import STORAGES

    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"Policies: {', '.join(POLICIES)}, or module:Class for a class of yours." in text
    assert f"Storages: {', '.join(STORAGES)}." in text


def test_a_warning_of_a_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert main(["--version"]) == 0
    assert warnings.formatwarning("beware", UserWarning, "<string>", 10) == "litgpt: warning: beware\n"


@pytest.mark.parametrize(
    ("name", "libraries"),
    [("generate", ["KERNELS"]), ("finetune_lora", ["KERNELS", "TRAINING"]), ("download", [])],
)
def test_commands_compile_the_kernels_that_they_need_while_they_start(monkeypatch, name, libraries):
    asked = []
    monkeypatch.setattr("litgpt.__main__.compile_ahead", asked.append)
    assert main([name, "--no_such_option", "1"]) == 2
    assert asked == libraries
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert asked == libraries
