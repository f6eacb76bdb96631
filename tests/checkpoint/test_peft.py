"""LoRA weights to and from PEFT's format, against `transformers` with the matrices merged by PEFT's rules, and PEFT itself."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import GROUPED, SIZES

from litgpt import lora
from litgpt.__main__ import main
from litgpt.checkpoint.finetuned import Finetuned
from litgpt.checkpoint.load import load_finetuned, load_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.checkpoint.peft import load_peft, save_peft

transformers = pytest.importorskip("transformers")
MODELS = {
    "llama": (transformers.LlamaConfig, GROUPED),
    "qwen2": (transformers.Qwen2Config, GROUPED),
    "phi3": (transformers.Phi3Config, GROUPED | {"pad_token_id": 0}),
    "gpt_neox": (transformers.GPTNeoXConfig, SIZES),
}
KINDS = {"plain": {}, "rslora": {"lora_rslora": True}, "dora": {"lora_dora": True}}
SOME = {"lora_query": True, "lora_value": True, "lora_projection": True}
ALL = {"lora_all": True, "lora_head": True}


def write_base(kind, folder):
    """A tiny model of `transformers`, saved."""
    config, sizes = MODELS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def write_lora(base, folder, **options):
    """What fine-tuning writes, with random matrices; returns the model's logits of `tokens()`."""
    model = load_model(base, torch.float32)
    config = lora.Config.extending(model.config, lora_r=3, lora_alpha=7, **options)
    lora.add_lora(model, config)
    weights = {name: x for name, x in model.state_dict().items() if lora.lora_filter(name, x)}
    for name, x in weights.items():
        torch.nn.init.uniform_(x, 0.5, 1.5) if "magnitude" in name else torch.nn.init.normal_(x, std=0.3)
    folder.mkdir()
    torch.save({"model": weights}, folder / "lit_model.pth.lora")
    hyperparameters = {"checkpoint_dir": str(base), **config.lora_options()}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(hyperparameters))
    with torch.no_grad():
        return model.eval()(tokens())


def tokens():
    return torch.arange(3, 27).view(2, 12)


def merged_by_peft_rules(base, adapter):
    """The model of `transformers` with what an adapter's folder says merged into its weights."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if "lm_head" in settings["target_modules"]:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    weights, state = load_file(adapter / "adapter_model.safetensors"), model.state_dict()
    for name in [name for name in weights if name.endswith("lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        module = stem.removeprefix("base_model.model.")
        assert any(module == t or module.endswith(f".{t}") for t in settings["target_modules"])
        alpha = next(
            (x for key, x in settings["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?({key})", module)),
            settings["lora_alpha"],
        )
        A, B = weights[name], weights[f"{stem}.lora_B.weight"]
        W = state[f"{module}.weight"] + B @ A * alpha / (len(A) ** 0.5 if settings["use_rslora"] else len(A))
        if settings["use_dora"]:
            W = weights[f"{stem}.lora_magnitude_vector"][:, None] * W / W.norm(dim=1, keepdim=True)
        state[f"{module}.weight"].copy_(W)
    with torch.no_grad():
        return model.eval()(tokens()).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flags", [SOME, ALL], ids=["some", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_weights_go_to_peft_and_come_back(family, kind, flags, tmp_path):
    base = write_base(family, tmp_path / "base")
    expected = write_lora(base, tmp_path / "ours", **KINDS[kind], **flags)
    if kind == "dora" and flags is SOME and family in ("phi3", "gpt_neox"):
        with pytest.raises(ValueError, match="cannot have DoRA for only some"):
            save_peft(tmp_path / "ours", tmp_path / "peft")
        return
    save_peft(tmp_path / "ours", tmp_path / "peft")
    close(merged_by_peft_rules(base, tmp_path / "peft"), expected)
    load_peft(tmp_path / "peft", tmp_path / "again")
    model = load_finetuned(
        Finetuned(tmp_path / "again", "lora"), open_checkpoint(base), torch.float32, torch.device("cpu")
    )
    close(model(tokens()), expected)
    close(load_model(tmp_path / "again", torch.float32)(tokens()), expected)
    if family in ("llama", "qwen2"):  # whose layers are cut alike, but for qkv
        first, second = (torch.load(tmp_path / x / "lit_model.pth.lora")["model"] for x in ("ours", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_ranks_and_scales_that_differ_by_layer_become_one(tmp_path):
    base = write_base("llama", tmp_path / "base")
    write_lora(base, tmp_path / "ours", lora_query=True, lora_mlp=True)
    save_peft(tmp_path / "ours", tmp_path / "peft")
    file, config = tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "peft" / "adapter_config.json"
    weights = load_file(file)
    for name in list(weights):
        if "down_proj" in name:  # of rank 5
            rows = (5, *weights[name].shape[1:]) if "lora_A" in name else (len(weights[name]), 5)
            weights[name] = torch.randn(rows) * 0.3
        if "layers.1" in name and "q_proj" in name:  # a layer is left out
            del weights[name]
    save_file(weights, file)
    values = json.loads(config.read_text())
    values |= {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"mlp.down_proj": 2}}
    config.write_text(json.dumps(values))
    load_peft(tmp_path / "peft", tmp_path / "again")
    close(load_model(tmp_path / "again", torch.float32)(tokens()), merged_by_peft_rules(base, tmp_path / "peft"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "is no LoRA matrix of a linear layer"),
        ("base_model.model.model.norm.weight", "is no LoRA matrix of a linear layer"),
        ("base_model.model.model.vision.q_proj.lora_A.weight", "cannot have LoRA matrices"),
    ],
)
def test_what_is_no_lora_of_linear_layers_is_refused(name, message, tmp_path):
    base = write_base("llama", tmp_path / "base")
    write_lora(base, tmp_path / "ours", **SOME)
    save_peft(tmp_path / "ours", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    more = {name: torch.zeros(3, 32)} | {name.replace("lora_A", "lora_B"): torch.zeros(32, 3)}
    save_file(load_file(file) | more, file)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "peft", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_commands(tmp_path, capsys):
    base = write_base("llama", tmp_path / "base")
    write_lora(base, tmp_path / "ours", **SOME)
    ours, peft, again = (str(tmp_path / name) for name in ("ours", "peft", "again"))
    assert main(["convert_to_peft", ours, peft]) == main(["convert_from_peft", peft, again]) == 0
    assert capsys.readouterr().out == f"{peft}\n{again}\n"
    assert main(["convert_to_peft", ours, peft]) == 1
    assert "holds PEFT weights already" in capsys.readouterr().err
    (tmp_path / "peft" / "adapter_config.json").unlink()  # as a conversion that was killed before it wrote this
    assert main(["convert_to_peft", ours, peft]) == 0
    capsys.readouterr()
    assert main(["convert_from_peft", ours, peft]) == 1
    assert "holds no adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [SOME, ALL], ids=["some", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_peft_itself_computes_the_same_in_both_directions(family, kind, flags, tmp_path):
    peft = pytest.importorskip("peft")
    base = write_base(family, tmp_path / "base")
    expected = write_lora(base, tmp_path / "ours", **KINDS[kind], **flags)
    if kind == "dora" and flags is SOME and family in ("phi3", "gpt_neox"):
        return
    save_peft(tmp_path / "ours", tmp_path / "peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        close(tuned(tokens()).logits, expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": kind == "dora"}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings, use_rslora=kind == "rslora")).eval()
    for name, x in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(x, mean=1.0 if "magnitude" in name else 0.0, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    load_peft(tmp_path / "theirs", tmp_path / "from", base)
    with torch.no_grad():
        close(load_model(tmp_path / "from", torch.float32)(tokens()), theirs(tokens()).logits)
