import json

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.checkpoint import open_checkpoint, save_litgpt
from litgpt.checkpoint.export import save_huggingface

CHECKS = ["files", "config", "weights", "tokenizer", "prompt", "forward"]


@pytest.fixture
def lit(tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer")
    save_litgpt(tiny_gpt(**VOCABULARY), tmp_path / "lit", tokenizer_dir=tmp_path / "tokenizer")
    return tmp_path / "lit"


@pytest.fixture
def validate(capsys):
    """Runs the command: exit code, what was said of each check, the other lines of stdout, stderr."""

    def run(*args):
        try:
            code = main(["validate", *map(str, args)])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        checks, rest = {}, []
        for line in captured.out.splitlines():
            if line.startswith(("ok ", "failed ")):
                state, name, *_ = line.split()
                checks[name] = state
            else:
                rest.append(line)
        return code, checks, rest, captured

    return run


def test_a_good_checkpoint_of_either_kind_passes_all_checks(lit, tmp_path, validate):
    save_huggingface(open_checkpoint(lit), tmp_path / "hf")
    for path in (lit, tmp_path / "hf"):
        code, checks, rest, captured = validate(path)
        assert (code, captured.err) == (0, "")
        assert checks == dict.fromkeys(CHECKS, "ok")
        assert rest == [
            "parameters:      95,168",
            "weights:         381 kB in float32",
            "key-value cache: 512 bytes a token, 65.5 kB for the context of 128 tokens",
        ]


def test_training_and_dtype_change_the_memory(lit, validate):
    _, checks, rest, _ = validate(lit, "--training", "--dtype", "bfloat16")
    assert checks["forward"] == "ok"
    assert rest[1:] == [
        "weights:         190 kB in bfloat16",
        "key-value cache: 256 bytes a token, 32.8 kB for the context of 128 tokens",
        "gradients:       190 kB",
        "AdamW's state:   381 kB",
    ]


def damage(lit, what):
    weights = torch.load(lit / "lit_model.pth", weights_only=True)
    if what == "files":
        (lit / "lit_model.pth").write_bytes((lit / "lit_model.pth").read_bytes()[:-100])
        return
    if what == "config":
        text = (lit / "model_config.yaml").read_text()
        (lit / "model_config.yaml").write_text(text.replace("n_head: 4", "n_head: 5"))
    elif what == "weights":
        weights["surplus"] = weights.pop("lm_head.weight")
        weights["transformer.ln_f.weight"] = torch.ones(3)
    elif what == "tokenizer":
        values = json.loads((lit / "tokenizer.json").read_text())
        values["decoder"] = None
        (lit / "tokenizer.json").write_text(json.dumps(values))
    elif what == "prompt":
        values = json.loads((lit / "tokenizer_config.json").read_text())
        (lit / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": "{% for x %}"}))
        (lit / "prompt_style.yaml").unlink(missing_ok=True)
    elif what == "forward":
        weights["transformer.ln_f.weight"][0] = float("nan")
    torch.save(weights, lit / "lit_model.pth")


@pytest.mark.parametrize("what", CHECKS)
def test_what_is_wrong_fails_its_check_and_the_command(what, lit, validate):
    damage(lit, what)
    code, checks, _, captured = validate(lit)
    assert code == 1
    assert [name for name, state in checks.items() if state == "failed"] == [what]
    assert captured.err == f"litgpt: error: {lit} is not usable, failed: {what}\n"


def test_all_differences_of_the_weights_are_in_one_line(lit, validate):
    damage(lit, "weights")
    _, checks, _, captured = validate(lit)
    line = next(line for line in captured.out.splitlines() if "weights" in line)
    for words in (
        "missing: lm_head.weight",
        "not expected: surplus",
        "wrong shape or type: transformer.ln_f.weight 3 rows for 64",
    ):
        assert words in line
    assert "forward" not in checks


def test_a_tokenizer_with_more_tokens_than_embeddings_fails(lit, tmp_path, validate):
    save_litgpt(tiny_gpt(), tmp_path / "small", tokenizer_dir=lit)
    code, checks, _, captured = validate(tmp_path / "small")
    assert (code, checks["tokenizer"], checks["forward"]) == (1, "failed", "ok")
    assert "but the model only 100 embeddings" in captured.out


def test_a_missing_tokenizer_fails_and_the_rest_is_checked(lit, validate):
    (lit / "tokenizer.json").unlink()
    code, checks, _, _ = validate(lit)
    assert (code, checks["tokenizer"], checks["forward"]) == (1, "failed", "ok")


def test_another_file_of_weights_can_be_named(lit, validate):
    (lit / "lit_model.pth").rename(lit / "other.pth")
    code, checks, _, captured = validate(lit, "--model_filename", "other.pth")
    assert (code, checks) == (0, dict.fromkeys(CHECKS, "ok"))
    assert "other.pth: 3" in captured.out
    code, checks, _, captured = validate(lit, "--model_filename", "none.pth")
    assert (code, checks) == (1, {"files": "failed"})
    assert f"{lit / 'none.pth'} does not exist" in captured.out


def test_what_is_not_there_fails_in_one_line(tmp_path, validate):
    code, checks, rest, captured = validate(tmp_path)
    assert (code, checks, rest) == (1, {"files": "failed"}, [])
    assert "holds no weights" in captured.out


def test_a_wrong_dtype_is_refused_before_anything_is_read(lit, validate):
    code, checks, _, captured = validate(lit, "--dtype", "int8")
    assert (code, checks) == (1, {})
    assert "dtype 'int8' is no floating-point type" in captured.err


@pytest.mark.real_model
def test_the_default_model_passes(default_gguf, validate):
    code, checks, rest, _ = validate(default_gguf, "--dtype", "bfloat16")
    assert (code, checks) == (0, dict.fromkeys(CHECKS, "ok"))
    assert rest[0].split() == ["parameters:", "134,515,008"]
