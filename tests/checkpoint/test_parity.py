import pytest
import torch
from tiny_models import CASES, save_tiny

from litgpt.checkpoint import load_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_those_of_transformers(case, tmp_path):
    reference = save_tiny(case, tmp_path)
    model = load_model(tmp_path)
    tokens = torch.randint(70, (2, 24))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
