"""States of prompts in files, by name."""

import numpy as np
import pytest
import torch
from tiny import create_kv_caches, tiny_gpt

from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.prefixes import KeptPrefix, PrefixStore
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.engine.state_folder import StateFolder
from litgpt.kvcache import CacheSpec


def model_with(name, seed=0):
    torch.manual_seed(seed)
    model = tiny_gpt()
    if name != "dense":
        model.assign_kv_caches(create_kv_caches(name, model.config, 2, 24))
    return model


def run(batch, tokens, count=6):
    sequence = Sequence(torch.tensor(tokens), count, Sampling(temperature=0), wants_state=True)
    batch.submit(sequence)
    while not sequence.finish_reason:
        batch.step()
    return sequence


@pytest.mark.parametrize("name", ["dense", "lastrec", "h2o", "snapkv"])
def test_a_prompt_goes_on_from_a_saved_state_as_from_one_that_was_kept(name, tmp_path):
    begin = [i % 97 for i in range(40)]
    model = model_with(name)
    batch = ContinuousBatch(model, 2, 100, prefixes=PrefixStore(10**7))
    folder = StateFolder(tmp_path, model, CacheSpec.parse(name))
    first = run(batch, begin, 1)
    folder.save("one", first.state)
    expected = run(batch, [*begin, 7, 8, 9])
    assert expected.n_reused == len(begin)
    batch.close()
    other = PrefixStore(0)
    for known, kept in StateFolder(tmp_path, model_with(name), CacheSpec.parse(name)).load_all():
        other.name(known, kept)
    fresh = ContinuousBatch(model_with(name), 2, 100, prefixes=other)
    again = run(fresh, [*begin, 7, 8, 9])
    assert (again.n_reused, again.output) == (len(begin), expected.output)
    other.name("one", None)
    assert run(fresh, [*begin, 7, 8, 9]).n_reused == 0


def test_states_of_other_models_and_caches_and_damaged_ones_are_not_used(tmp_path, caplog):
    kept = KeptPrefix.of([1, 2], 0, False, [{"keys": torch.zeros(1, 2), "length": 2}])
    folder = StateFolder(tmp_path, model_with("dense"), CacheSpec())
    folder.save("one", kept)
    assert np.array_equal(folder.load("one").tokens, [1, 2])
    with pytest.raises(ValueError, match="another kv_cache"):
        StateFolder(tmp_path, model_with("dense"), CacheSpec.parse("lastrec", 24)).load("one")
    with pytest.raises(ValueError, match="another fingerprint"):
        StateFolder(tmp_path, model_with("dense", seed=1), CacheSpec()).load("one")
    data = bytearray((tmp_path / "one.state").read_bytes())
    data[-70] ^= 1
    (tmp_path / "two.state").write_bytes(data)
    with caplog.at_level("WARNING"):
        assert [name for name, _ in folder.load_all()] == ["one"]
    assert "two.state" in caplog.text


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", ".a", "a" * 65, "a\0", "é"])
def test_names_cannot_lead_out_of_the_folder(name, tmp_path):
    with pytest.raises(ValueError, match="name of a state"):
        StateFolder(tmp_path, model_with("dense"), CacheSpec()).path(name)
