import pytest
import torch
from tiny_models import CASES, save_tiny

from litgpt.checkpoint import load_model


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_those_of_transformers_without_cache_and_in_chunks(case, tmp_path):
    reference = save_tiny(case, tmp_path)
    model = load_model(tmp_path)
    tokens = torch.randint(70, (2, 24))
    expected = reference(tokens).logits
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    model.set_kv_caches(batch_size=2)
    chunks = tokens.split([9, 1, 1, 7, 6], dim=1)
    starts = [0, 9, 10, 11, 18]
    cached = [model(chunk, input_pos=start) for chunk, start in zip(chunks, starts, strict=True)]
    torch.testing.assert_close(torch.cat(cached, dim=1), expected, atol=1e-4, rtol=1e-4)
