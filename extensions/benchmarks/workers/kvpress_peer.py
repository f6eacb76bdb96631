"""Log-probabilities of right answers after a context that a press of kvpress has compressed. Runs in kvpress' environment."""

import copy

import torch
from kvpress import (
    CompactorPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    PyramidKVPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses import base_press
from press_runs import Logprobs, each_run, queries_of
from timing import read_job, report
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3ForCausalLM
from transformers.utils import logging


class AlikeKVzipPress(KVzipPress):
    """KVzip that masks as many tokens in every head."""

    def compress_post(self, model):
        self.score_val[..., : self.n_sink] = torch.inf
        pruned = int(self.context_length * self.compression_ratio)
        for layer in model.model.layers:
            scores = self.score_val[layer.self_attn.layer_idx][0]
            slots = (-scores).topk(pruned).indices
            heads = torch.arange(len(scores)).repeat_interleave(pruned)
            layer.self_attn.masked_key_indices = torch.zeros_like(heads), heads, slots.flatten()


PRESSES = {
    "random": lambda removed: RandomPress(removed, seed=0),
    "knorm": KnormPress,
    "keydiff": KeyDiffPress,
    "tova": TOVAPress,
    "snapkv": SnapKVPress,
    "snapkv pyramid": PyramidKVPress,
    "h2o": ObservedAttentionPress,
    "expected": ExpectedAttentionPress,
    "compactor": CompactorPress,
    "kvzip alike": AlikeKVzipPress,
    "kvzip layerwise": lambda removed: KVzipPress(removed, layerwise=True),
    "kvzip": KVzipPress,
    "lastrec": StreamingLLMPress,
}


def main() -> None:
    job = read_job()
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    # it leaves layers with a window alone in the model that also reads images; the one that reads text only has the same layers
    base_press.Gemma3ForConditionalGeneration = Gemma3ForCausalLM
    models = {}

    def run(name: str, removed: float, samples: list[dict]) -> Logprobs:
        kind = "eager" if name == "h2o" else "sdpa"
        if kind not in models:
            models[kind] = load(job["folder"], kind)
        found: Logprobs = {}
        for sample in samples:
            values = answer(models[kind], PRESSES[name](removed) if removed else None, sample)
            found[sample["kind"]] = found.get(sample["kind"], []) + values
        return found

    each_run(job, run)
    report({})


def load(folder: str, kind: str):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=kind).eval()
    model.config._name_or_path = folder
    if isinstance(model, Gemma3ForCausalLM):  # presses ask for rotations without the kind of layer
        rotate = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda x, position_ids, layer_type="full_attention": rotate(
            x, position_ids, layer_type
        )
    return model


def answer(model, press, sample: dict) -> list[float]:
    """Mean log-probability of each right answer, by the calls of kvpress' own pipeline."""
    cache, context = DynamicCache(), torch.tensor([sample["context"]])
    if press is None:
        model.model(input_ids=context, past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=context, past_key_values=cache)
    found = []
    for before, right in queries_of(sample):
        logits = predict(model, copy.deepcopy(cache), context.shape[1], before + right)[len(before) - 1 : -1]
        found.append(logits.float().log_softmax(-1).gather(1, torch.tensor(right)[:, None]).mean().item())
    return found


def predict(model, cache: DynamicCache, length: int, tokens: list[int]) -> torch.Tensor:
    """Logits after each of the tokens, which follow a context of that length."""
    sizes = {layer.keys.shape[2] for layer in cache.layers}
    alike = len(sizes) == 1 or isinstance(model, Gemma3ForCausalLM)
    logits = []
    for start in range(0, len(tokens), len(tokens) if alike else 1):  # one token at a time needs no mask
        part = tokens[start:] if alike else tokens[start : start + 1]
        position = torch.arange(length + start, length + start + len(part))[None]
        mask = masks(model, cache, len(part)) if isinstance(model, Gemma3ForCausalLM) else None
        inputs = {"input_ids": torch.tensor([part]), "past_key_values": cache, "position_ids": position}
        logits.append(model(**inputs, attention_mask=mask).logits[0])
    return torch.cat(logits)


def masks(model, cache: DynamicCache, new: int) -> dict[str, torch.Tensor]:
    """Masks by the kind of layer, for caches that are shorter in layers without a window: transformers makes them for one length."""
    found = {}
    for kind, layer in zip(model.config.layer_types, cache.layers, strict=True):
        size = layer.keys.shape[2]
        ahead = torch.arange(-size, new) > torch.arange(new)[:, None]
        if kind == "sliding_attention":
            ahead |= torch.arange(-size, new) <= torch.arange(new)[:, None] - model.config.sliding_window
        found[kind] = torch.zeros(1, 1, new, size + new, dtype=model.dtype).masked_fill(
            ahead, torch.finfo(model.dtype).min
        )
    return found


if __name__ == "__main__":
    main()
