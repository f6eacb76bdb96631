"""Commands for fine-tuned models, and `merge_lora`, on tiny models."""

import re
import shutil
from functools import partial

import pytest
import torch
import yaml
from tiny import VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt import adapter, adapter_v2, lora
from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.export import save_huggingface
from litgpt.checkpoint.finetuned import Finetuned
from litgpt.checkpoint.load import load_finetuned, load_model
from litgpt.model import GPT
from litgpt.prompts import Alpaca, ChatTemplate, encode_prompt, save_prompt_style
from litgpt.runners.compiled import compile_decode
from litgpt.runners.packed_weights import PackedLinear, can_pack
from litgpt.runners.quantized_weights import Int8Linear

GREEDY = ["--temperature", "0", "--max_new_tokens", "12", "--precision", "32-true", "--prompt", "Hi!"]
PATHS = {"full": "finetuned_path", "lora": "lora_path", "adapter": "adapter_path", "adapter_v2": "adapter_path"}
LORA = {
    **{"lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "lora_query": True, "lora_key": False, "lora_value": True},
    **{"lora_projection": False, "lora_mlp": True, "lora_head": False},
}
FIELDS = {"n_layer": 3, "block_size": 512, **VOCABULARY}


@pytest.fixture
def base(tmp_path):
    """A folder with a small model."""
    tokenizer = tiny_tokenizer()
    gpt = tiny_gpt(name="tiny", **FIELDS)
    LLM(gpt, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)).save(tmp_path / "base")
    return tmp_path / "base"


def tuned_model(method: str, base, seed: int = 0) -> tuple[GPT, dict[str, torch.Tensor]]:
    """A model of `base` with random values where the method trains, and those alone."""
    torch.manual_seed(seed)
    model = load_model(base)
    if method == "lora":
        lora.add_lora(model, lora.Config.extending(model.config, **LORA))
        trained = lora.lora_filter
    elif method == "full":
        trained = lambda name, value: True  # noqa: E731
    else:
        config = adapter.Config.extending(model.config, adapter_prompt_length=4, adapter_start_layer=1)
        (adapter.add_prefixes if method == "adapter" else adapter_v2.add_adapter_v2)(model, config)
        trained = {"adapter": adapter.adapter_filter, "adapter_v2": adapter_v2.adapter_filter}[method]
    weights = {name: x for name, x in model.state_dict().items() if trained(name, x)}
    for name, x in weights.items():
        mean = 1.0 if x.ndim == 1 and "bias" not in name else 0.0
        torch.nn.init.normal_(x, mean=mean, std=2.0 if "gating_factor" in name else 0.3)
    return model, weights


def write_tuned(method: str, base, folder, seed: int = 0):
    """What fine-tuning writes; returns the model."""
    model, weights = tuned_model(method, base, seed)
    folder.mkdir()
    suffix = "" if method == "full" else f".{method}"
    torch.save({"model": weights}, folder / f"lit_model.pth{suffix}")
    options = {"checkpoint_dir": str(base), "precision": None, **(LORA if method == "lora" else {})}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(options))
    return model


def expected_answer(model, base, prompt: str = "Hi!", style=None, count: int = 12, **kwargs) -> str:
    checkpoint = open_checkpoint(base)
    tokenizer = checkpoint.tokenizer()
    tokens = encode_prompt(tokenizer, style or checkpoint.prompt_style(), prompt, **kwargs)
    answer = greedy_without_caches(model, tokens, count).tolist()
    return tokenizer.decode(answer[: answer.index(0)] if 0 in answer else answer) + "\n"


@pytest.mark.parametrize("method", PATHS)
@pytest.mark.parametrize(
    "options", [(), ("--prompt_chunksize", "3"), ("--kv_cache", "lastrec", "--cache_length", "100")]
)
def test_a_command_answers_as_the_fine_tuned_model_does_without_caches(method, options, base, tmp_path, capsys):
    model = write_tuned(method, base, tmp_path / "tuned")
    plain = expected_answer(load_model(base), base)
    path = f"--{PATHS[method]}={tmp_path / 'tuned'}"
    assert main([f"generate_{method}", str(base), path, *GREEDY, *options]) == 0
    answer = capsys.readouterr().out
    assert answer == expected_answer(model, base)
    assert answer != plain


@pytest.mark.parametrize("method", PATHS)
def test_the_checkpoint_that_was_fine_tuned_is_known(method, base, tmp_path, capsys):
    model = write_tuned(method, base, tmp_path / "tuned")
    file = next(file for file in (tmp_path / "tuned").iterdir() if "pth" in file.name)
    assert main([f"generate_{method}", f"--{PATHS[method]}={file}", *GREEDY]) == 0
    assert capsys.readouterr().out == expected_answer(model, base)


def test_an_adapter_v2_of_a_model_of_too_few_layers_for_prefixes_is_read(tmp_path):
    torch.save({"model": {"lm_head.adapter_scale": torch.ones(261)}}, tmp_path / "lit_model.pth.adapter_v2")
    config = tiny_gpt(n_layer=2, **VOCABULARY).config
    assert Finetuned(tmp_path, "adapter_v2").config(config) == adapter.Config.extending(config)


def test_an_input_goes_where_the_trained_style_has_it(base, tmp_path, capsys):
    model = write_tuned("adapter", base, tmp_path / "tuned")
    save_prompt_style("alpaca", tmp_path / "tuned")
    args = ["generate_adapter", str(base), "--adapter_path", str(tmp_path / "tuned"), *GREEDY]
    assert main([*args, "--input", "a llama"]) == 0
    with_input = capsys.readouterr().out
    assert with_input == expected_answer(model, base, style=Alpaca(), input="a llama")
    assert main(args) == 0
    without = capsys.readouterr().out
    assert without == expected_answer(model, base, style=Alpaca())
    assert without != with_input


def test_an_input_without_a_place_is_refused(base, tmp_path, capsys):
    write_tuned("full", base, tmp_path / "tuned")
    assert main(["generate_full", str(base), f"--finetuned_path={tmp_path / 'tuned'}", "--input", "a llama"]) == 1
    assert "prompt style ChatTemplate has no place for an input" in one_line(capsys)


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.removeprefix(captured.err.partition("litgpt: error: ")[0])
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("method", PATHS)
def test_a_missing_file_or_folder_is_named(method, base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "nowhere" / "lit_model.pth.lora"):
        assert main([f"generate_{method}", str(base), f"--{PATHS[method]}={path}"]) == 1
        line = one_line(capsys)
        assert str(path) in line
        assert "does not exist" in line


@pytest.mark.parametrize("method", PATHS)
@pytest.mark.parametrize("found", PATHS)
def test_weights_of_another_method_are_refused(method, found, base, tmp_path, capsys):
    if method == found:
        return
    write_tuned(found, base, tmp_path / "tuned")
    file = next(file for file in (tmp_path / "tuned").iterdir() if "pth" in file.name)
    assert main([f"generate_{method}", str(base), f"--{PATHS[method]}={file}"]) == 1
    line = one_line(capsys)
    assert f"{file} holds {found} weights, not {method} ones: use `litgpt generate_{found}`" in line


@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2"])
@pytest.mark.parametrize(("fields", "problem"), [({"n_embd": 32}, "size mismatch"), ({"n_layer": 4}, "it has trans")])
def test_weights_of_another_model_are_refused_before_the_model_is_loaded(
    method, fields, problem, base, tmp_path, capsys, monkeypatch
):
    tokenizer = tiny_tokenizer()
    other = tiny_gpt(name="other", **{**FIELDS, **fields})
    LLM(other, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)).save(tmp_path / "other")
    write_tuned(method, tmp_path / "other", tmp_path / "tuned")
    monkeypatch.setattr("litgpt.checkpoint.load.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main([f"generate_{method}", str(base), f"--{PATHS[method]}={tmp_path / 'tuned'}"]) == 1
    line = one_line(capsys)
    assert f"lit_model.pth.{method} was not made from tiny" in line
    assert problem in line


def test_weights_that_lack_a_layer_are_refused(base, tmp_path, capsys):
    write_tuned("lora", base, tmp_path / "tuned")
    file = tmp_path / "tuned" / "lit_model.pth.lora"
    weights = torch.load(file)["model"]
    del weights["transformer.h.1.attn.qkv.lora_A"]
    torch.save({"model": weights}, file)
    assert main(["generate_lora", str(base), f"--lora_path={file}"]) == 1
    assert "it lacks transformer.h.1.attn.qkv.lora_A" in one_line(capsys)


def test_full_weights_of_another_model_are_refused(base, tmp_path, capsys):
    write_tuned("full", base, tmp_path / "tuned")
    file = tmp_path / "tuned" / "lit_model.pth"
    weights = torch.load(file)["model"]
    weights["lm_head.weight"] = weights["lm_head.weight"][:50].clone()
    torch.save(weights, file)
    assert main(["generate_full", str(base), f"--finetuned_path={file}"]) == 1
    assert "weights do not fit the config 'tiny': wrong shape or type: lm_head.weight" in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "hyperparameters.yaml is missing or empty"),
        (yaml.safe_dump({**LORA, "lora_alpha": float("nan")}), "lora_alpha = nan must be a finite number"),
        (yaml.safe_dump({**LORA, "lora_query": "yes"}), "lora_query = 'yes' must be true or false"),
        ("- 3\n", "hyperparameters.yaml must hold names and values, found list"),
        ("a: [\n", "hyperparameters.yaml is not valid YAML"),
        (yaml.safe_dump({**LORA, "lora_r": "three"}), "lora_r = 'three' must be a whole number"),
    ],
)
def test_hyperparameters_that_are_missing_or_wrong_are_named(text, problem, base, tmp_path, capsys):
    write_tuned("lora", base, tmp_path / "tuned")
    path = tmp_path / "tuned" / "hyperparameters.yaml"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert main(["generate_lora", str(base), f"--lora_path={tmp_path / 'tuned'}"]) == 1
    assert problem in one_line(capsys)


def test_a_checkpoint_that_nothing_names_is_asked_for(base, tmp_path, capsys):
    write_tuned("adapter", base, tmp_path / "tuned")
    (tmp_path / "tuned" / "hyperparameters.yaml").unlink()
    assert main(["generate_adapter", f"--adapter_path={tmp_path / 'tuned'}"]) == 1
    assert "name the checkpoint that was fine-tuned" in one_line(capsys)


def test_a_file_that_is_none_is_refused(base, tmp_path, capsys):
    (tmp_path / "lit_model.pth.lora").write_text("no weights at all")
    assert main(["generate_lora", str(base), f"--lora_path={tmp_path}"]) == 1
    assert "lit_model.pth.lora" in one_line(capsys)


@pytest.mark.parametrize(
    "option",
    [
        ("--prompt", ""),
        ("--max_new_tokens", "0"),
        ("--top_p", "2"),
        ("--cache_length", "0"),
        ("--prompt_chunksize", "0"),
    ],
)
def test_options_that_mean_nothing_are_refused(option, base, tmp_path, capsys):
    write_tuned("full", base, tmp_path / "tuned")
    assert main(["generate_full", str(base), f"--finetuned_path={tmp_path / 'tuned'}", *option]) == 1
    assert option[0][2:] in one_line(capsys)


@pytest.mark.parametrize("method", PATHS)
def test_every_option_is_explained(method, capsys):
    with pytest.raises(SystemExit):
        main([f"generate_{method}", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "Further arguments of the key-value cache" in words
    assert "The text to answer." in words


@pytest.mark.skipif(
    not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)), reason="no packed bfloat16 products on this machine"
)
@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2"])
def test_packed_layers_inside_decode_as_the_fine_tuned_model_does(method, base, tmp_path):
    from litgpt.engine.loading import make_ready

    reference = write_tuned(method, base, tmp_path / "tuned")
    model = make_ready(base, "bf16-true", load=partial(load_finetuned, Finetuned(tmp_path / "tuned", method))).model
    layer = model.transformer.h[1].attn.qkv
    assert isinstance(layer if method == "adapter" else layer.linear, PackedLinear)
    idx = torch.randint(5, 261, (1, 30))
    model.set_kv_caches(1)
    with torch.inference_mode():
        steps = [model(idx[:, :20], 0), *(model(idx[:, pos : pos + 1], pos) for pos in range(20, 30))]
        expected, plain = reference(idx)[:, 20:], load_model(base)(idx)[:, 20:]
    error = (torch.cat(steps[1:], 1) - expected).norm()
    assert error < 0.1 * expected.norm()
    assert error < 0.2 * (plain - expected).norm()  # so what was trained has not been left out


@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2"])
def test_nothing_is_left_that_inference_need_not_do(method, base, tmp_path):
    write_tuned(method, base, tmp_path / "tuned")
    model = load_finetuned(
        Finetuned(tmp_path / "tuned", method), open_checkpoint(base), torch.float32, torch.device("cpu")
    )
    if method == "lora":
        assert all(layer.r for layer in model.modules() if isinstance(layer, lora.LoRALinear))
    else:
        assert all(block.attn.frozen_keys is not None for block in model.transformer.h[1:])


@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2"])
def test_the_checkpoint_below_may_be_quantised(method, base, tmp_path):
    model = write_tuned(method, base, tmp_path / "tuned")
    finetuned = Finetuned(tmp_path / "tuned", method)
    quantised = load_finetuned(finetuned, open_checkpoint(base), torch.float32, torch.device("cpu"), "int8")
    layer = quantised.transformer.h[1].attn.qkv
    assert isinstance(layer if method == "adapter" else layer.linear, Int8Linear)
    plain = load_model(base, torch.float32, "cpu", "int8")
    idx = torch.randint(5, 261, (1, 20))
    error = (quantised(idx) - model(idx)).norm() / model(idx).norm()
    assert error < 2 * (plain(idx) - load_model(base)(idx)).norm() / load_model(base)(idx).norm() < 0.3


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["lora", "adapter_v2"])
def test_compiled_decoding_is_one_graph_and_the_same(method, base, tmp_path):
    from torch._dynamo.utils import counters

    from litgpt.generate.base import generate

    model = write_tuned(method, base, tmp_path / "tuned").requires_grad_(False)
    finetuned = Finetuned(tmp_path / "tuned", method)
    compiled = load_finetuned(finetuned, open_checkpoint(base), torch.float32, torch.device("cpu")).requires_grad_(
        False
    )
    torch._dynamo.reset()
    counters.clear()
    compile_decode(compiled)
    prompt = torch.tensor([7, 8, 9])
    for length in (300, 40):
        tokens = generate(compiled, prompt, length, temperature=0.0)
        assert torch.equal(tokens[3:23], greedy_without_caches(model, prompt, 20))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# --- merge_lora


def test_merged_weights_are_a_checkpoint_that_answers_the_same(base, tmp_path, capsys):
    folder = tmp_path / "tuned"
    model = write_tuned("lora", base, folder)
    save_prompt_style("alpaca", folder)
    assert main(["merge_lora", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'lit_model.pth'}\n"
    merged = load_model(folder)
    idx = torch.randint(0, 261, (1, 30))
    torch.testing.assert_close(merged(idx), model(idx), atol=1e-4, rtol=1e-4)
    assert set(merged.state_dict()) == set(load_model(base).state_dict())
    assert "lora" not in (folder / "model_config.yaml").read_text()
    assert main(["generate", str(folder), *GREEDY]) == 0
    assert capsys.readouterr().out == expected_answer(model, base, style=Alpaca())


def test_merging_twice_says_so_and_changes_nothing(base, tmp_path, capsys):
    write_tuned("lora", base, tmp_path / "tuned")
    (tmp_path / "tuned" / "lit_model.pth").write_bytes(b"merged")
    assert main(["merge_lora", str(tmp_path / "tuned")]) == 0
    assert re.search("already been merged: delete .* to merge again", capsys.readouterr().out)
    assert (tmp_path / "tuned" / "lit_model.pth").read_bytes() == b"merged"


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16-true", torch.bfloat16)])
def test_merged_weights_have_the_precision_asked_for(precision, dtype, base, tmp_path):
    write_tuned("lora", base, tmp_path / "tuned")
    args = [] if precision is None else ["--precision", precision]
    assert main(["merge_lora", str(tmp_path / "tuned"), "--pretrained_checkpoint_dir", str(base), *args]) == 0
    assert open_checkpoint(tmp_path / "tuned").dtype == dtype


def test_what_cannot_be_merged_is_refused(base, tmp_path, capsys):
    write_tuned("adapter", base, tmp_path / "tuned")
    assert main(["merge_lora", str(tmp_path / "tuned")]) == 1
    assert "lit_model.pth.lora' does not exist" in one_line(capsys)
    assert main(["merge_lora", str(tmp_path / "nowhere")]) == 1
    assert "nowhere' does not exist" in one_line(capsys)


@pytest.mark.parametrize(
    "absent", [(), ("lora_r", "lora_dropout"), ("lora_query", "lora_key", "lora_value", "lora_mlp", "lora_head")]
)
def test_a_folder_with_lora_weights_only_is_the_model_with_them_merged(absent, base, tmp_path):
    model = write_tuned("lora", base, tmp_path / "tuned")
    path = tmp_path / "tuned" / "hyperparameters.yaml"
    options = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in absent}
    path.write_text(yaml.safe_dump(options))
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(load_model(tmp_path / "tuned")(tokens), model(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("32-true", torch.float32), (None, None)]
)
def test_merged_weights_have_the_precision_of_the_fine_tuning(precision, dtype, base, tmp_path):
    write_tuned("lora", base, tmp_path / "tuned")
    path = tmp_path / "tuned" / "hyperparameters.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "precision": precision}))
    assert main(["merge_lora", str(tmp_path / "tuned")]) == 0
    weights = torch.load(tmp_path / "tuned" / "lit_model.pth")
    assert {x.dtype for x in weights.values()} == {dtype or open_checkpoint(base).dtype}


def test_a_folder_with_an_adapter_only_says_which_command_takes_it(base, tmp_path):
    write_tuned("adapter", base, tmp_path / "tuned")
    with pytest.raises(ValueError, match="generate_adapter"):
        open_checkpoint(tmp_path / "tuned")


def test_a_folder_of_lora_weights_is_exported_with_the_tokenizer_of_its_base(base, tmp_path):
    write_tuned("lora", base, tmp_path / "tuned")
    checkpoint = open_checkpoint(tmp_path / "tuned")
    save_huggingface(checkpoint, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    torch.testing.assert_close(dict(open_checkpoint(tmp_path / "hf").tensors()), dict(checkpoint.tensors()))
