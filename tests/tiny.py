"""Tiny random models and a tokenizer for tests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import yaml
from tokenizers.pre_tokenizers import ByteLevel

from litgpt import lora
from litgpt.checkpoint.load import load_model
from litgpt.config import Config
from litgpt.kvcache import CacheSpec, KVCache
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

LLAMA: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "bias": False,
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_query_groups": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "padded_vocab_size": 100,
    "block_size": 128,
}
LATENT: dict[str, Any] = {
    "n_query_groups": 4,
    "latent_attention": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 12,
    },
}
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_gpt(**kwargs: Any) -> GPT:
    """A small Llama with random weights; large ones, so that tokens have clear winners."""
    model = GPT(Config(**{**LLAMA, **kwargs}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


class StaticShapes:
    """A layer runner that leaves all calls to the model's layers, planned as compiled ones need it."""

    static_shapes, runs_head = True, False

    def __call__(self, *args: Any) -> None:
        return None


def greedy_without_caches(model: GPT, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """`count` greedy tokens, each from a full forward over all before it."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens[None])[0, -1:].argmax(-1)))
    return tokens[len(prompt) :]


def in_chunks(model: GPT, tokens: torch.Tensor, lengths: Iterable[int], start: int = 0) -> torch.Tensor:
    """Logits of tokens (B, T) from `start` on, in calls that bring so many of them each."""
    logits = []
    for length in lengths:
        logits.append(model(tokens[:, start : start + length], start))
        start += length
    return torch.cat(logits, dim=1)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """A token for every byte, and a few special ones: 261 in all."""
    specials = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    processor = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    processor.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    processor.decoder = tokenizers.decoders.ByteLevel()
    processor.add_special_tokens(specials)
    return Tokenizer.from_tokenizers(processor, bos_id=None, eos_id=0, use_bos=False, chat_template=CHAT_TEMPLATE)


def write_lora(base: Path, folder: Path, seed: int = 0) -> None:
    """A folder as fine-tuning writes it, with random LoRA weights for the checkpoint `base`."""
    torch.manual_seed(seed)
    model = load_model(base)
    options = {"lora_r": 3, "lora_alpha": 7, "lora_query": True, "lora_value": True, "lora_mlp": True}
    lora.add_lora(model, lora.Config.extending(model.config, **options))
    weights = {name: x for name, x in model.state_dict().items() if lora.lora_filter(name, x)}
    for x in weights.values():
        torch.nn.init.normal_(x, std=0.3)
    folder.mkdir(parents=True)
    torch.save({"model": weights}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(base), **options}))


VOCABULARY = {"vocab_size": 261, "padded_vocab_size": 261}


def create_kv_caches(
    name: str,
    config: Config,
    batch_size: int,
    cache_length: int | None = None,
    dtype: torch.dtype | None = None,
    **args: Any,
) -> list[KVCache]:
    """Caches called `name` for all layers of a model with that configuration."""
    return CacheSpec.parse(name, cache_length, **args).create(config, batch_size, dtype=dtype)
