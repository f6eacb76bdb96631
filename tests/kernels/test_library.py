"""The kernels compile: other tests skip what they cannot compute with. Each library is loaded by whoever needs it."""

import pytest
import torch
from tiny import tiny_gpt

from litgpt.engine.loading import choose_kv_caches, speed_up_decode
from litgpt.generate.options import CacheOptions, command
from litgpt.kernels import library as libraries
from litgpt.kernels import processor
from litgpt.kernels.library import encoded_library, float32_library, library, training_library
from litgpt.kernels.toolchain import toolchain
from litgpt.kvcache import CacheSpec
from litgpt.train.model import TrainingModel

pytestmark = pytest.mark.skipif(
    processor.instruction_set() is None or toolchain().compiler() is None, reason="kernels are off, or have no compiler"
)
ALL = [library, encoded_library, float32_library, training_library]


@pytest.mark.parametrize("load", ALL)
def test_it_compiles(load):
    assert load() is not None


def test_inference_training_and_encoded_caches_load_what_they_need(monkeypatch):
    loaded, load = [], libraries._library
    monkeypatch.setattr(libraries, "_library", lambda which: loaded.append(which) or load(which))
    for one in ALL:
        one.cache_clear()
    tokens = torch.arange(12)[None]

    model = tiny_gpt().bfloat16()
    speed_up_decode(model)
    for cache, needed in (("dense", ["KERNELS"]), ("h2o", ["KERNELS"]), ("dense-int8", ["KERNELS", "ENCODED"])):
        choose_kv_caches(model, CacheSpec.parse(cache, 64))
        with torch.inference_mode():
            model(tokens, 0), model(tokens[:, :1], 12)
        assert loaded == needed

    model = tiny_gpt().requires_grad_(True)
    with torch.no_grad():
        model(tokens)
    assert loaded == ["KERNELS", "ENCODED"]
    TrainingModel(model)(tokens, tokens).backward()
    assert loaded == ["KERNELS", "ENCODED", "TRAINING"]


@pytest.mark.parametrize(
    ("cache", "needed"), [("dense", []), ("lastrec-fp8", []), ("dense-int4", ["ENCODED"]), ("dense-kivi", ["ENCODED"])]
)
def test_a_command_compiles_ahead_what_its_cache_needs(monkeypatch, cache, needed):
    asked = []
    monkeypatch.setattr("litgpt.generate.options.compile_ahead", asked.append)
    command(CacheOptions)(lambda options: asked.append("run"))(kv_cache=cache)
    assert asked == [*needed, "run"]
