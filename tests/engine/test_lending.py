"""Models with LoRA weights that share the weights of another one."""

import gc

import pytest
import torch
from tiny import LLAMA, VOCABULARY, tiny_gpt, tiny_tokenizer, write_lora

from litgpt.api import LLM, Preprocessor
from litgpt.checkpoint.finetuned import Finetuned
from litgpt.engine.loading import lend_weights, make_ready
from litgpt.kernels import ops
from litgpt.prompts import ChatTemplate
from litgpt.runners.opaque_weights import OpaqueLayer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("lending"), tiny_tokenizer()
    gpt = tiny_gpt(**{**LLAMA, **VOCABULARY, "n_embd": 128, "intermediate_size": 256})
    LLM(gpt, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)).save(folder / "base")
    for seed in (0, 1):
        write_lora(folder / "base", folder / f"lora{seed}", seed)
    return folder


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@torch.inference_mode()
def test_the_tuned_models_are_those_that_are_loaded_alone_and_the_base_stays(folders, precision, quantize):
    tokens = torch.arange(20)[None] + 40
    ready = make_ready(folders / "base", precision, quantize, join=False)
    alone = make_ready(folders / "base", precision, quantize).model(tokens)
    before = ready.model(tokens)
    assert (before - alone).abs().max() <= (0.2 if precision == "bf16-true" else 1e-4)
    if ops.available() and precision == "bf16-true":
        assert ready.model.layer_runner is not None
    for seed in (0, 1):
        finetuned = Finetuned(folders / f"lora{seed}", "lora")
        tuned = lend_weights(ready, finetuned)
        if ops.available() and quantize is None:
            assert tuned.model.layer_runner is not None
        merged = make_ready(folders / f"lora{seed}", "32-true").model(tokens)
        difference = (tuned.model(tokens) - merged).abs().mean() / merged.abs().mean()
        assert difference < (1e-5 if precision == "32-true" and quantize is None else 0.1)
        assert (merged - before).abs().mean() / merged.abs().mean() > 0.3
    assert torch.equal(ready.model(tokens), before)


def test_only_the_lora_weights_are_new(folders):
    ready = make_ready(folders / "base", "bf16-true", join=False)
    gc.collect()

    def layers(model):
        return {id(m) for m in model.modules() if isinstance(m, OpaqueLayer | torch.nn.Embedding)}

    finetuned = Finetuned(folders / "lora0", "lora")
    tuned = lend_weights(ready, finetuned)
    assert layers(ready.model) == layers(tuned.model)
    known = {id(x) for x in ready.model.parameters()}
    new = [x for x in tuned.model.parameters() if id(x) not in known]
    assert sum(x.numel() for x in new) == sum(x.numel() for x in finetuned.weights.values())
    assert tuned.model.kv_caches() == []
    assert tuned.model.caches is not ready.model.caches


def test_weights_for_another_model_are_refused(folders, tmp_path):
    tokenizer = tiny_tokenizer()
    other = tiny_gpt(**VOCABULARY)
    LLM(other, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)).save(tmp_path / "other")
    write_lora(tmp_path / "other", tmp_path / "lora")
    with pytest.raises(ValueError, match="was not made from"):
        lend_weights(make_ready(folders / "base", "32-true", join=False), Finetuned(tmp_path / "lora", "lora"))
