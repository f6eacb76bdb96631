"""A tiny checkpoint and a few samples to train on."""

import json

import pytest
import torch
from tiny import tiny_gpt, tiny_tokenizer

from litgpt.checkpoint.load import save_litgpt


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory):
    """A LitGPT folder with a model of two layers and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    size = tokenizer.vocab_size
    model = tiny_gpt(name="tiny", vocab_size=size, padded_vocab_size=size, block_size=512, n_layer=3)
    for parameter in model.parameters():
        parameter.mul_(0.3)
    save_litgpt(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def samples():
    """Samples of several lengths."""
    return [
        {"instruction": f"Say {word} {i} times.", "input": "", "output": " ".join([word] * i)}
        for i in range(1, 6)
        for word in ("one", "two", "red", "blue")
    ]


@pytest.fixture
def json_path(tmp_path, samples):
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(own_cache):
    pass
