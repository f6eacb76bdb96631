"""The loss in chunks against the loss written out."""

import pytest
import torch
import torch.nn.functional as F
from tiny import LLAMA, tiny_gpt

from litgpt import adapter
from litgpt.train import loss as module
from litgpt.train.model import TrainingModel


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for name in ("LOGITS_BYTES", "TRAINED_LOGITS_BYTES"):
        monkeypatch.setattr(module, name, 4 * 100 * 16)


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("softcapping", [None, 5.0])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_are_those_of_plain_cross_entropy(softcapping, tied):
    torch.manual_seed(0)
    model = tiny_gpt(final_logit_softcapping=softcapping).requires_grad_(True).double()
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    idx = torch.randint(0, 100, (3, 37))
    labels = torch.randint(0, 100, (3, 37))
    labels[torch.rand(3, 37) < 0.4] = -100
    ours = TrainingModel(model)(idx, labels)
    expected = F.cross_entropy(model(idx).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    ours, plain = gradients(model, ours), gradients(model, expected)
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-10, atol=1e-12)


def plain():
    return tiny_gpt().requires_grad_(True).double()


def sliding():
    windows = {"sliding_window_size": 4, "sliding_window_indices": [1, 0]}
    return tiny_gpt(**windows).requires_grad_(True).double()


def latent():
    sizes = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return tiny_gpt(latent_attention=sizes, n_query_groups=4).requires_grad_(True).double()


def with_prefixes():
    model = tiny_gpt().double()
    config = adapter.Config(**{**LLAMA, "adapter_start_layer": 0})
    adapter.add_prefixes(model, config)
    for name, parameter in model.named_parameters():
        if "gating" in name:
            torch.nn.init.normal_(parameter)
    return model.requires_grad_(True)


@pytest.mark.parametrize("make", [plain, sliding, latent, with_prefixes])
def test_rows_one_after_the_other_are_rows_of_their_own(make):
    torch.manual_seed(0)
    model = make()
    rows = [torch.randint(0, 100, (n,)) for n in (5, 1, 17)]
    labels = [row.roll(-1) for row in rows]
    together = TrainingModel(model)(torch.cat(rows)[None], torch.cat(labels)[None], row_sizes=[5, 1, 17])
    apart = sum(TrainingModel(model)(row[None], own[None]) for row, own in zip(rows, labels, strict=True))
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)
    ours, expected = gradients(model, together), gradients(model, apart)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-12)


def test_a_batch_without_counted_tokens_has_zero_loss_and_zero_gradients():
    model = tiny_gpt().requires_grad_(True)
    loss = TrainingModel(model)(torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), -100))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_without_gradients_only_the_loss_is_computed():
    torch.manual_seed(0)
    model = tiny_gpt()
    idx, labels = torch.randint(0, 100, (2, 20)), torch.randint(0, 100, (2, 20))
    loss = TrainingModel(model)(idx, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(model(idx).flatten(0, 1), labels.flatten(), reduction="sum"))


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = tiny_gpt().requires_grad_(True)
    idx, labels = torch.randint(0, 100, (2, 20)), torch.randint(0, 100, (2, 20))
    plain = gradients(model, TrainingModel(model)(idx, labels))
    again = gradients(model, TrainingModel(model, activation_checkpointing=True)(idx, labels))
    for name in plain:
        assert torch.equal(plain[name], again[name])


def test_gradients_of_a_loss_can_be_taken_once():
    ids = torch.randint(0, 100, (2, 20))
    loss = TrainingModel(tiny_gpt().requires_grad_(True))(ids, ids)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have been taken already"):
        loss.backward()
