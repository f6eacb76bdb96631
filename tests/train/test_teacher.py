"""Self-distillation through caches: divergences from the dense model before training, and their gradients."""

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, tiny_gpt

from litgpt.args import TrainArgs
from litgpt.kvcache import CacheSpec
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import add_lora
from litgpt.train import loss
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.model import TrainingModel
from litgpt.train.teacher import Teacher


def model_of(lora):
    torch.manual_seed(0)
    model = tiny_gpt(n_layer=2, block_size=64, **VOCABULARY)
    if lora:
        add_lora(model, LoRAConfig.extending(model.config, lora_r=4, lora_alpha=8, lora_dropout=0.5, lora_all=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not lora or "lora_" in name)
    return model.double().train()


def batch():
    sizes = [17, 9]
    idx = torch.randint(0, 100, (1, sum(sizes)))
    return idx, idx.roll(-1, 1).masked_fill(torch.arange(sum(sizes)) % 5 == 0, -100), sizes


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_loss_and_gradients_equal_autograd_of_the_divergence_from_the_model_before_training(lora, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 1)  # 16 tokens at a time
    monkeypatch.setattr(loss, "TRAINED_LOGITS_BYTES", 1)
    model = model_of(lora)
    idx, labels, sizes = batch()
    with torch.no_grad():
        before = torch.log_softmax(model.eval()(idx, row_sizes=sizes), -1)
    cached, teacher = CachedLayers(model, CacheSpec("lastrec", cache_length=8), 4), Teacher(model, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    params = [p for p in model.parameters() if p.requires_grad]
    ours = TrainingModel(model, cached_layers=cached, teacher=teacher)(idx, labels, row_sizes=sizes)
    found = torch.autograd.grad(ours, params)
    logits = torch.log_softmax(model.logits(cached(idx, sizes)), -1)
    counted = labels != -100
    expected = F.kl_div(logits[counted], before[counted], reduction="sum", log_target=True)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for own, other in zip(found, torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)


def test_a_model_with_the_same_cache_has_nothing_to_learn_and_dropout_is_not_the_teachers():
    model = model_of(lora=True).eval()
    idx, labels, sizes = batch()
    training = TrainingModel(model, cached_layers=CachedLayers(model, CacheSpec(), 4), teacher=Teacher(model, 4))
    assert training(idx, labels, row_sizes=sizes).abs() < 1e-12
    training.train()
    with torch.no_grad():
        [p.fill_(0.1) for name, p in model.named_parameters() if "lora_B" in name]
    training(idx, labels, row_sizes=sizes).backward()
    assert all(module.training for module in model.modules())
    assert all(p.eq(0.1).all() for name, p in model.named_parameters() if "lora_B" in name)


def test_validation_is_by_labels():
    model = model_of(lora=True).eval()
    idx, labels, sizes = batch()
    cached = CachedLayers(model, CacheSpec("lastrec", cache_length=8), 4)
    with torch.no_grad():
        taught = TrainingModel(model, cached_layers=cached, teacher=Teacher(model, 4))(idx, labels, row_sizes=sizes)
        assert taught == TrainingModel(model, cached_layers=cached)(idx, labels, row_sizes=sizes)


@pytest.mark.parametrize("option", [{"teacher": "sparse"}, {"keep_inputs": "tape"}, {"keep_inputs": 0}])
def test_unknown_teachers_and_places_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        TrainArgs(**option)
