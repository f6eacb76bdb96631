import pytest
import torch
from tiny import create_kv_caches, in_chunks
from tiny_models import CASES, save_tiny

from litgpt.checkpoint import load_model
from litgpt.engine.caches import prepare_caches
from litgpt.engine.prefill import prefill

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_those_of_transformers(case, tmp_path):
    reference = save_tiny(case, tmp_path)
    model = load_model(tmp_path)
    tokens = torch.randint(70, (2, 24))
    expected = reference(tokens).logits
    torch.testing.assert_close(model(tokens), expected, **CLOSE)
    assert expected.std() > 0.3  # small logits would be close whatever is computed

    model.set_kv_caches(batch_size=3)
    model.expect_length(24)
    torch.testing.assert_close(in_chunks(model, tokens, [9, 1, 1, 7, 6]), expected, **CLOSE)
    torch.testing.assert_close(in_chunks(model, tokens, [1] * 24), expected, **CLOSE)

    model.clear_kv_caches()
    model.assign_kv_caches(create_kv_caches("lastrec", model.config, batch_size=2, cache_length=30))
    torch.testing.assert_close(in_chunks(model, tokens, [5, 8, 1, 10]), expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_rows_of_a_ragged_batch_equal_their_own_runs_in_transformers(case, tmp_path):
    reference = save_tiny(case, tmp_path)
    model = load_model(tmp_path)
    rows = [torch.randint(70, (length,)) for length in (23, 19, 21)]
    prepare_caches(model, 3, 24)
    following = torch.randint(70, (3, 1))
    first = prefill(model, rows)
    second = model(following, model.next_token_pos)[:, -1]
    for place, row in enumerate(rows):
        expected = reference(torch.cat((row, following[place]))[None]).logits[0, -2:]
        torch.testing.assert_close(torch.stack((first[place], second[place])), expected, **CLOSE)
