"""`accumulate`: one call a batch for training loops of one's own."""

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, tiny_gpt

from litgpt.kvcache import CacheSpec
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import add_lora, mark_only_lora_as_trainable
from litgpt.train.model import runs_as_it_is
from litgpt.train.teacher import Teacher
from litgpt.train.through_caches import accumulate

LENGTHS = (19, 12, 5)


def make(**options):
    torch.manual_seed(0)
    return tiny_gpt(n_layer=2, block_size=64, **VOCABULARY, **options).double().requires_grad_(True).eval()


@pytest.fixture
def batch():
    """Rows of `LENGTHS`, padded with tokens and labels that must not matter, some labels not counted."""
    ids = torch.randint(0, 100, (3, 21))
    labels = ids[:, 1:].clone()
    labels[0, :7] = -100
    return ids[:, :-1], labels


def expected(model, batch, spec, chunk, first=None, loss=None):
    """Summed loss, tokens and gradients, row by row, by the calls of serving under autograd."""
    losses, n = [], 0
    for ids, labels, length in zip(*batch, LENGTHS, strict=True):
        model.clear_kv_caches(assigned=True)
        model.assign_kv_caches(spec.create(model, 1))
        starts = [0, *range(first or chunk, length, chunk), length]
        logits = torch.cat([model(ids[None, a:b], input_pos=a) for a, b in zip(starts, starts[1:], strict=False)], 1)[0]
        counted = labels[:length] != -100
        logits, labels = logits[counted], labels[:length][counted]
        losses.append(F.cross_entropy(logits, labels, reduction="sum") if loss is None else loss(logits, labels))
        n += int(counted.sum())
    model.clear_kv_caches(assigned=True)
    total = sum(losses)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return total, n, dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check(found, wanted, factor=1.0):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], factor * gradient, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", ["lastrec", "h2o-int8", "snapkv", "dense-int4"])
def test_loss_tokens_and_gradients_are_those_of_serving_row_by_row(name, tie, batch):
    model, spec = make(), CacheSpec.parse(name)
    if tie:
        model.lm_head.weight = model.transformer.wte.weight
    spec = CacheSpec.parse(spec, cache_length=9 if spec.evicts else 30)
    wanted_loss, n, wanted = expected(model, batch, spec, 4, 6)
    loss, n_tokens = accumulate(model, *batch, spec, chunk_size=4, prompt_chunksize=6, lengths=LENGTHS, loss_scale=0.25)
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-10, atol=1e-10)
    assert n_tokens == n
    assert not loss.requires_grad
    check(gradients(model), wanted, 0.25)


def test_gradients_add_up_and_only_of_what_wants_some(batch):
    model, spec = make(), CacheSpec("lastrec", cache_length=9)
    add_lora(model, LoRAConfig.extending(model.config, lora_r=2, lora_alpha=4, lora_all=True))
    model.double()
    mark_only_lora_as_trainable(model)
    _, _, wanted = expected(model, batch, spec, 5)
    for _ in range(2):
        accumulate(model, *batch, spec, chunk_size=5, lengths=torch.tensor(LENGTHS))
    check(gradients(model), wanted, 2.0)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_nothing_evicted_is_plain_training(batch):
    model = make()
    ids, labels = (x[:1, :19] for x in batch)
    logits = model(ids)[0]
    wanted = F.cross_entropy(logits, labels[0], ignore_index=-100, reduction="sum")
    names, params = zip(*model.named_parameters(), strict=True)
    loss, _ = accumulate(model, ids, labels, CacheSpec(), chunk_size=4)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-10, atol=1e-10)
    check(gradients(model), dict(zip(names, torch.autograd.grad(wanted, params), strict=True)))


def test_another_loss(batch):
    def smoothed(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")

    model, spec = make(), CacheSpec("lastrec", cache_length=9)
    wanted_loss, _, wanted = expected(model, batch, spec, 4, loss=smoothed)
    loss, _ = accumulate(model, *batch, spec, chunk_size=4, lengths=LENGTHS, loss=smoothed)
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-10, atol=1e-10)
    check(gradients(model), wanted)


def test_a_teacher_with_the_same_cache_has_nothing_to_teach_and_its_dense_cache_has(batch):
    model = make()
    teacher = Teacher(model, 4)
    same, _ = accumulate(model, *batch, CacheSpec(), chunk_size=4, lengths=LENGTHS, teacher=teacher)
    other, _ = accumulate(
        model, *batch, CacheSpec("lastrec", cache_length=6), chunk_size=4, lengths=LENGTHS, teacher=teacher
    )
    assert abs(same) < 1e-10 < 1e-3 < other


def test_a_batch_without_counted_tokens_changes_nothing(batch):
    model, (ids, labels) = make(), batch
    loss, n_tokens = accumulate(model, ids, torch.full_like(labels, -100), CacheSpec(), chunk_size=8)
    assert (loss, n_tokens) == (0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_model_is_left_as_it_was(batch):
    model = make()
    model.set_kv_caches(1)
    caches = [block.attn.kv_cache for block in model.transformer.h]
    with pytest.raises(RuntimeError, match="meant"):
        accumulate(model, *batch, CacheSpec(), chunk_size=8, loss=_fails)
    assert runs_as_it_is(model)
    accumulate(model, *batch, CacheSpec(), chunk_size=8)
    assert runs_as_it_is(model)
    assert [block.attn.kv_cache for block in model.transformer.h] == caches
    assert not model.training


def _fails(logits, labels):
    raise RuntimeError("meant")


def test_a_model_of_which_nothing_is_trained_is_refused(batch):
    with pytest.raises(ValueError, match="no parameter of the model wants gradients"):
        accumulate(make().requires_grad_(False), *batch, "lastrec", chunk_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [19, 12]}, "lengths must be 3 numbers from 1 to 20, got \\[19, 12\\]"),
        ({"lengths": [19, 12, 21]}, "lengths must be 3 numbers from 1 to 20"),
        ({"chunk_size": 0}, "a chunk needs at least one token, got 0"),
        ({"prompt_chunksize": 0}, "a chunk needs at least one token, got 0"),
        ({"spec": "kvzip"}, "kvzip cannot be trained through"),
        ({"spec": "h3o"}, "h3o"),
        ({"keep_inputs": "tape"}, "keep_inputs must be"),
        (
            {"labels": torch.zeros(3, 4, dtype=torch.long)},
            "must be of one shape \\(B, T\\), got \\(3, 20\\) and \\(3, 4\\)",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(change, message, batch):
    arguments = {"input_ids": batch[0], "labels": batch[1], "spec": "lastrec", "chunk_size": 4} | change
    with pytest.raises(ValueError, match=message):
        accumulate(make(), **arguments)
