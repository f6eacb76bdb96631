"""The documentation says what is so: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import COMMANDS, main, parse
from litgpt.api import LLM, Preprocessor
from litgpt.checkpoint.default_model import DEFAULT_REPO
from litgpt.config import Config
from litgpt.families import families
from litgpt.kvcache import DenseKVCache, KVCacheParams
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.policies.dense import DensePolicy
from litgpt.kvcache.policies.lastrec import LastRecentPolicy
from litgpt.prompt_style import PromptStyle
from litgpt.prompts import ChatTemplate

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = [README, *sorted(ROOT.glob("tutorials/*.md")), *sorted(ROOT.glob("config_hub/**/*.md"))]
CONFIGS = sorted(path for name in ("chat", "generate") for path in ROOT.glob(f"config_hub/{name}/*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """Every code block in a language ("" for none): how many lines stand before it, and its text."""
    text = path.read_text("utf-8")
    blocks = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(2)].count("\n"), block[2]) for block in blocks if block[1] == language]


def run_python(path: Path) -> None:
    """Runs the Python blocks of a document in one namespace; an error shows the line of the document."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for lines_before, block in code_blocks(path, "python"):
        exec(compile("\n" * lines_before + block, path, "exec"), namespace)


def parse_command(line: str) -> dict[str, Any]:
    _, command, *args = shlex.split(line, comments=True)
    module, _, attribute = COMMANDS[command][0].partition(":")
    return parse(command, getattr(import_module(module), attribute), args)


def section(path: Path, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def _scratch(tmp_path, monkeypatch) -> Iterator[None]:
    """An empty folder to work in; what documents register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_HOME", str(tmp_path / "home"))
    registries = POLICIES, PromptStyle.styles
    saved = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, saved, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def _tiny_default_model(_scratch, tmp_path) -> None:
    """A random model and a byte tokenizer where the default model is looked for."""
    gpt = tiny_gpt(name="SmolLM2-135M-Instruct", block_size=8192, **VOCABULARY)
    tokenizer = tiny_tokenizer()
    style = ChatTemplate.from_tokenizer(tokenizer)
    LLM(gpt, Preprocessor(tokenizer), style).save(tmp_path / "home" / DEFAULT_REPO)


@pytest.fixture
def _real_default_model(_scratch, tmp_path, default_gguf) -> None:
    folder = tmp_path / "home" / DEFAULT_REPO
    folder.mkdir(parents=True)
    (folder / default_gguf.name).symlink_to(default_gguf.resolve())


# --- Python


@pytest.mark.usefixtures("_tiny_default_model")
@pytest.mark.parametrize("path", [path for path in DOCS if code_blocks(path, "python")], ids=name_of)
def test_python_runs_in_the_order_it_stands(path, capsys):
    run_python(path)


@pytest.mark.real_model
@pytest.mark.usefixtures("_real_default_model")
def test_python_of_the_readme_runs_on_the_default_model(capsys):
    run_python(README)
    assert capsys.readouterr().out.startswith("The capital of France is Paris.\n")


def test_an_error_in_a_document_would_be_seen(tmp_path):
    (tmp_path / "bad.md").write_text("Text.\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run_python(tmp_path / "bad.md")
    assert (error.traceback[-1].path, error.traceback[-1].lineno + 1) == (tmp_path / "bad.md", 8)


# --- commands


def test_readme_sets_up_in_two_commands():
    blocks = [block for _, block in code_blocks(README, "bash")]
    assert blocks[:2] == ["pip install . && litgpt chat\n", "pip install '.[test]' && pytest\n"]


def test_readme_lists_the_commands():
    rows = re.findall(r"^\| `litgpt (\w+)` \|", section(README, "Commands"), re.MULTILINE)
    assert rows == list(COMMANDS)


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_commands_take_the_options_given_to_them(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config_hub").symlink_to(ROOT / "config_hub")  # where the paths of --config begin
    (tmp_path / "samples.json").write_text('[{"instruction": "Hi!", "output": "Hello!"}]')
    for _, block in code_blocks(path, "bash"):
        for line in block.splitlines():
            if line.startswith("litgpt ") and "--print_config" not in line:
                parse_command(line)


@pytest.mark.real_model
@pytest.mark.usefixtures("_real_default_model")
def test_the_session_in_the_readme_is_real(capsys, monkeypatch):
    (_, session), *_ = code_blocks(README, "")
    command, *lines = session.splitlines()
    questions = [line.removeprefix(">>> ") for line in lines if line.startswith(">>> ")]
    answers = [after for line, after in zip(lines, lines[1:], strict=False) if line.startswith(">>> ")]
    typed = iter(questions)
    monkeypatch.setattr("builtins.input", lambda: next(typed))
    assert main(shlex.split(command)[2:]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == answers
    told = [line for line in captured.err.splitlines() if not line.startswith("Loading ")]  # where that takes long
    assert lines[0] == told[0]


# --- config_hub


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_option_files_are_read_by_their_command(path):
    given = parse_command(f"litgpt {path.parent.name} --config {shlex.quote(str(path))}")
    values = yaml.safe_load(path.read_text("utf-8"))
    assert values
    assert {key: given[key] for key in values} == values


@pytest.mark.usefixtures("_tiny_default_model")
@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_option_files_work(path, capsys, monkeypatch):
    messages = iter(["Hi!", "/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(messages))
    args = ["--prompt", "Hi! " * 300] if path.parent.name == "generate" else []
    assert main([path.parent.name, DEFAULT_REPO, "--config", str(path), "--max_new_tokens", "3", *args]) == 0
    assert "key-value cache" in capsys.readouterr().err


def test_every_option_file_is_explained():
    assert CONFIGS
    linked = re.findall(r"\]\((\S+\.yaml)\)", (ROOT / "config_hub" / "README.md").read_text("utf-8"))
    here = [*ROOT.glob("config_hub/finetune/smollm2-135m/*.yaml"), ROOT / "config_hub" / "pretrain" / "text.yaml"]
    assert sorted(ROOT / "config_hub" / link for link in linked) == sorted([*CONFIGS, *here])


# --- what is said


def heading_anchors(path: Path) -> set[str]:
    """The names by which GitHub links to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = path if not target else path.parent / target
        assert file.exists(), link
        assert not anchor or anchor in heading_anchors(file), link


def test_readme_keeps_a_place_for_figures():
    text = README.read_text("utf-8")
    assert re.findall(r"<!-- figures:(\w+) -->", text) == ["start", "end"]


def test_readme_shows_what_the_slots_hold():
    rows = dict(
        re.findall(r"^(dense|lastrec|lastrec, n_sink=2) +((?:\d+ +)+)", README.read_text("utf-8"), re.MULTILINE)
    )
    policies = {"lastrec": LastRecentPolicy(8), "lastrec, n_sink=2": LastRecentPolicy(8, n_sink=2)}
    for name, policy in policies.items():
        assert [int(p) for p in rows.pop(name).split()] == policy.slot_positions(torch.tensor([12]))[0].tolist()
    assert [int(p) for p in rows.pop("dense").split()] == DensePolicy(8).slot_positions(torch.tensor([8]))[0].tolist()


def test_readme_names_every_part_of_the_package():
    shown = set(re.findall(r"(\w+(?:\.py|/))(?=[ :])", section(README, "Architecture")))
    folders = {f"{path.parent.name}/" for path in ROOT.glob("litgpt/*/__init__.py")}
    modules = {path.name for path in ROOT.glob("litgpt/*.py")} - {"__init__.py"}
    assert folders | modules <= shown
    places = [ROOT / "litgpt" / folder for folder in ("", "kvcache", "kernels")]
    assert all(any((place / name).exists() for place in places) for name in shown)


def test_checkpoint_tutorial_names_every_family():
    described = section(ROOT / "tutorials" / "checkpoints.md", "Families")
    assert [family.model_type for family in families() if f"`{family.model_type}`" not in described] == []


def test_cache_tutorial_tells_the_bytes_of_a_token():
    config = Config.from_name("SmolLM2-135M-Instruct")
    params = KVCacheParams.from_config(config, 1, 1, dtype=torch.bfloat16)
    nbytes = config.n_layer * DenseKVCache.size_estimate_apriori(params)[0] // 8
    assert f"takes {nbytes:,} bytes a token" in (ROOT / "tutorials" / "kv_cache.md").read_text("utf-8")
    assert f"default model {nbytes:,} bytes a token" in (ROOT / "tutorials" / "sessions.md").read_text("utf-8")
