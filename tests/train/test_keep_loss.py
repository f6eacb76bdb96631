"""The loss on what caches keep: its gradients beside autograd's of the loss written out, and what it teaches."""

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt

from litgpt.args import TrainArgs
from litgpt.kvcache import CacheSpec
from litgpt.model import CausalSelfAttention
from litgpt.train import keep_loss
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.chunks import chunks_of
from litgpt.train.keep_loss import KeepLoss, LayerKeepLoss
from litgpt.train.model import TrainingModel, restore_forward
from litgpt.train.options import LoRAOptions
from litgpt.train.stored_tokens import StoredTokens

CHUNK, SIZES, WEIGHT = 8, [40, 27], 3.0


@pytest.fixture
def few(monkeypatch):
    """Numbers for short texts."""
    for name, value in {"NEWEST": 5, "LOOKING": 100, "NEEDED": 6, "N_SINK": 2}.items():
        monkeypatch.setattr(keep_loss, name, value)


def model_of():
    torch.manual_seed(0)
    return tiny_gpt(n_layer=2, block_size=64, **VOCABULARY).double().train().requires_grad_()


def batch():
    idx = torch.randint(0, 100, (1, sum(SIZES)))
    labels = idx.roll(-1, 1).masked_fill(torch.arange(sum(SIZES)) % 7 != 6, -100)
    return idx, labels


def written_out(q, k, counted, scale, sums_up):
    """The sum of the losses of a layer and a row's chunks that have any, all tokens being stored: q (H, T, D), k (G, T, D)."""
    T, G, total = k.shape[1], k.shape[0], 0.0
    logits = (q.unflatten(0, (G, -1)) @ k.mT[:, None] * scale).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    weights = logits.softmax(-1)
    for start in range(CHUNK, T, CHUNK):
        end = min(start + CHUNK, T)
        later = [t for t in range(end, T) if counted[t]]
        if not later:
            continue
        needed = weights[:, :, later].mean(1).sum(1).detach()
        newest = weights[:, :, start if sums_up else max(start, end - 5) : end]  # no token is newer
        margin = keep_loss.MARGIN_OF_SUMS if sums_up else keep_loss.MARGIN
        scores = newest.sum((1, 2))[:, :start].log()
        for g in range(G):
            middle = scores[g, 2:].detach().median()
            for j in (2 + needed[g, 2:start].argsort(descending=True)[:6]).tolist():
                share = needed[g, j] / needed[g].sum()
                total = total + share * (middle + margin - scores[g, j]).relu() / G
    return total


@pytest.mark.parametrize(("policy", "keep_inputs"), [("snapkv", "device"), ("snapkv", 2), ("h2o", "device")])
def test_gradients_equal_autograd_of_the_loss_written_out(policy, keep_inputs, few):
    model = model_of()
    idx, labels = batch()
    params = list(model.parameters())
    spec = CacheSpec(policy, cache_length=64)
    training = TrainingModel(model, cached_layers=CachedLayers(model, spec, CHUNK, keep_inputs), keep_loss=WEIGHT)
    loss = training(idx, labels, row_sizes=SIZES)
    found = torch.autograd.grad(loss, params, allow_unused=True)
    restore_forward(model)
    seen, own = [], CausalSelfAttention.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CausalSelfAttention, "attend", lambda self, q, k, *rest: (seen.append((q, k)), own(self, q, k, *rest))[1]
        )
        plain = TrainingModel(model)(idx, labels, row_sizes=SIZES)
    torch.testing.assert_close(loss, plain)
    kept, n_chunks = 0.0, 5
    for q, k in seen:
        rows = zip(q[0].split(SIZES, 1), k[0].split(SIZES, 1), (labels[0] != -100).split(SIZES), strict=True)
        kept = kept + sum(written_out(*row, model.mha.scale, policy == "h2o") for row in rows) / (n_chunks * len(seen))
    assert kept > 0
    expected = torch.autograd.grad(plain + WEIGHT * (labels != -100).sum() * kept, params, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_needed_tokens_that_are_gone_are_scored_beside_those_that_are_stored(few):
    model = model_of()
    G, a, T, D = 2, 2, 16, 16
    q, k = torch.randn(1, a * G, 24, D, dtype=torch.float64), torch.randn(1, G, 24, D, dtype=torch.float64)
    tokens = StoredTokens(24)
    tokens.put(torch.arange(T), k[:, :, :T], k[:, :, :T])
    layer = LayerKeepLoss(KeepLoss(torch.arange(24) == 23, model), tokens, [0], False)
    _, middle, last = chunks_of([24], CHUNK, torch.device("cpu"))
    assert layer.chunk(last, q[:, :, 16:], k[:, :, 16:], k[:, :, :16], [16]) == []  # no later token is counted
    stored = [0, 1, 4, 6, 7]  # of the first 8, and an empty slot
    old = torch.cat((k[:, :, stored], k[:, :, :1]), dim=2)
    ((found, places, leaf),) = layer.chunk(middle, q[:, :, 8:16], k[:, :, 8:16], old, [5])
    seen = [(k[0, h // a] @ q[0, h, 23] * model.mha.scale).softmax(0) for h in range(G * a)]
    needed, expected = torch.stack(seen).unflatten(0, (G, a)).mean(1), 0.0
    assert [sorted(of_head) for of_head in places[0].tolist()] == [[2, 3, 4, 5, 6, 7]] * G
    torch.testing.assert_close(leaf[0], torch.stack([k[0, g, places[0, g]] for g in range(G)]))
    for g in range(G):
        heads = range(g * a, g * a + a)
        scores = torch.zeros(8, dtype=torch.float64)
        for h in heads:
            for t in range(11, 16):
                logits = (k[0, g] @ q[0, h, t] * model.mha.scale).exp()
                scores += logits[:8] / logits[[*stored, *range(8, t + 1)]].sum()
        limit = scores.log()[[4, 6, 7]].median() + keep_loss.MARGIN
        expected = expected + (needed[g, 2:8] * (limit - scores.log()[2:]).relu()).sum() / G
    torch.testing.assert_close(found, expected)


def test_training_makes_the_loss_smaller(few, monkeypatch):
    model, losses, start = model_of(), [], KeepLoss.__init__
    monkeypatch.setattr(KeepLoss, "__init__", lambda self, *args: (start(self, *args), passes.append(self))[0])
    training = TrainingModel(
        model, cached_layers=CachedLayers(model, CacheSpec("h2o", cache_length=16), CHUNK), keep_loss=1e3
    )
    optimizer, (idx, labels), passes = torch.optim.Adam(model.parameters(), 1e-3), batch(), []
    for _ in range(20):
        optimizer.zero_grad()
        training(idx, labels, row_sizes=SIZES).backward()
        losses.append(torch.stack(passes[-1].losses).mean())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():  # validation has none
        training(idx, labels, row_sizes=SIZES)
    assert len(passes) == 20


@pytest.mark.parametrize("cache", ["lastrec", "knorm", "keydiff"])
def test_caches_that_look_at_no_attention_are_refused(cache):
    model = model_of()
    with pytest.raises(ValueError, match=f"{cache} does not keep tokens by the attention"):
        TrainingModel(model, cached_layers=CachedLayers(model, CacheSpec(cache, cache_length=16), CHUNK), keep_loss=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": TrainArgs(epochs=1, keep_loss=1.0)}, "--train.keep_loss is for training through"),
        ({"train": TrainArgs(epochs=1, keep_loss=1.0), "kv_cache": "lastrec", "cache_length": 16}, "by the attention"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LoRAOptions(checkpoint_dir="x", **options).check()
