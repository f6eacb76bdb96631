"""Log-probabilities of right answers after a context that a press of kvpress has compressed. Runs in kvpress' environment."""

import copy
import json
import sys
from pathlib import Path

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
from timing import read_job, report
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3ForCausalLM

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
    "kvzip": lambda removed: KVzipPress(removed, layerwise=True),
    "lastrec": StreamingLLMPress,
}


def main() -> None:
    job = read_job()
    torch.set_grad_enabled(False)
    # it leaves layers with a window alone in the model that also reads images; the one that reads text only has the same layers
    base_press.Gemma3ForConditionalGeneration = Gemma3ForCausalLM
    samples = json.loads(Path(job["samples"]).read_text(encoding="utf-8"))
    models, found = {}, []
    for name in job["kinds"]:
        kind = "eager" if name in ("h2o",) else "sdpa"
        if kind not in models:
            models[kind] = AutoModelForCausalLM.from_pretrained(
                job["folder"], dtype=torch.bfloat16, attn_implementation=kind
            ).eval()
        model = models[kind]
        model.config._name_or_path = job["folder"]
        for removed in [0.0] if name == "dense" else job["removed"]:
            logprobs: dict[str, list[float]] = {}
            try:
                for sample in samples:
                    values = answer(model, PRESSES[name](removed) if removed else None, sample)
                    logprobs[sample["kind"]] = logprobs.get(sample["kind"], []) + values
            except (RuntimeError, ValueError, AttributeError, AssertionError) as error:  # not for this model
                print(f"{name}: {error}", file=sys.stderr)
                logprobs = {}
            found.append({"cache": name, "removed": removed, "logprobs": logprobs})
    report(found)


def answer(model, press, sample: dict) -> list[float]:
    """Mean log-probability of each right answer, by the calls of kvpress' own pipeline."""
    cache, context = DynamicCache(), torch.tensor([sample["context"]])
    if press is None:
        model.model(input_ids=context, past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=context, past_key_values=cache)
    found = []
    for question, right in sample["queries"]:
        own, tokens = copy.deepcopy(cache), question + right
        position = torch.arange(context.shape[1], context.shape[1] + len(tokens))[None]
        first = max(len(question) - 1, 0)
        logits = model(input_ids=torch.tensor([tokens]), past_key_values=own, position_ids=position).logits[0, first:-1]
        wanted = torch.tensor(tokens[first + 1 :])
        found.append(logits.float().log_softmax(-1).gather(1, wanted[:, None]).mean().item())
    return found


if __name__ == "__main__":
    main()
