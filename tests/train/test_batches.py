"""Batches: rows without padding, and packing that changes nothing but the time."""

import random

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer
from torch.utils.data import DataLoader

from litgpt.data.json_data import Samples
from litgpt.train.batches import PackedBatchSampler, as_rows, pack
from litgpt.train.loss import IGNORE_INDEX
from litgpt.train.model import TrainingModel

LENGTHS = random.Random(1).choices(range(1, 61), k=200)


def connected(samples, pack, batch_size=2, limit=160, shuffle=True):
    data = Samples(given=samples)
    data.pack = pack
    data.connect(tiny_tokenizer(), batch_size=batch_size, max_seq_length=limit)
    data.setup()
    return data.loader(data.train_dataset, shuffle=shuffle)


def test_rows_hold_every_sample_once_and_no_more_than_fits():
    rows = pack(LENGTHS, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[i] for i in row) <= 64 for row in rows)
    assert sum(LENGTHS) / (64 * len(rows)) > 0.95


@pytest.mark.parametrize("rows", [1, 3, 8, 500])
def test_every_epoch_has_the_same_number_of_batches_in_another_order(rows):
    sampler = PackedBatchSampler(LENGTHS, 64, rows, torch.Generator().manual_seed(0))
    first, second = list(sampler), list(sampler)
    assert len(first) == len(second) == len(sampler)
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(len(LENGTHS)))
        assert all(sum(LENGTHS[i] for i in batch) <= 64 * rows for batch in epoch)
    assert first != second


def test_the_seed_decides_the_order():
    one, two = (list(PackedBatchSampler(LENGTHS, 64, 2, torch.Generator().manual_seed(7))) for _ in range(2))
    assert one == two


def test_a_sample_that_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="a sample of 65 tokens does not fit into rows of 64"):
        PackedBatchSampler([3, 65], 64, 1)


def test_no_samples_make_no_batches():
    assert list(PackedBatchSampler([], 64, 2)) == []


def test_packing_a_large_set_takes_no_time():
    lengths = random.Random(2).choices(range(10, 500), k=100_000)
    assert len(pack(lengths, 1024)) > 1000


def samples_of(words):
    return [{"instruction": f"Say {word}", "output": f"{word} " * n} for n, word in enumerate(words, 1)]


def model_of():
    torch.manual_seed(0)
    return TrainingModel(tiny_gpt(n_layer=2, **VOCABULARY, block_size=512).double().requires_grad_(True))


def losses(model, loader):
    """Summed loss over a loader's batches, and its gradients."""
    total = 0.0
    model.zero_grad()
    for batch in loader:
        ids, labels, sizes = as_rows(batch)
        loss = model(ids, labels, row_sizes=sizes)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_losses_and_gradients_equal_the_unpacked_ones():
    model, samples = model_of(), samples_of(["red", "blue", "green", "one", "two", "three"])
    packed = connected(samples, pack=True)
    assert len(packed) < 6
    expected, expected_gradients = losses(model, connected(samples, pack=False, batch_size=1))
    found, gradients = losses(model, packed)
    assert abs(found - expected) < 1e-9 * abs(expected)
    for name in expected_gradients:
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
def test_no_sample_sees_another(packed):
    model, words = model_of().eval(), ["red", "blue", "green", "black"]

    def hidden_of_first(words):
        samples = samples_of(words)
        data = connected(samples, pack=packed, batch_size=4, limit=400, shuffle=False)
        (batch,) = data
        ids, _, sizes = as_rows(batch)
        with torch.no_grad():
            hidden = model.gpt(ids, skip_lm_head=True, row_sizes=sizes)[0]
        return dict(zip([tuple(part.tolist()) for part in ids[0].split(sizes)], hidden.split(sizes), strict=True))

    before, after = hidden_of_first(words), hidden_of_first([*words[:3], "white"])
    same = before.keys() & after.keys()
    assert len(same) == 3
    for tokens in same:
        assert torch.equal(before[tokens], after[tokens])


def test_rows_of_a_batch_have_no_padding():
    (batch,) = connected(samples_of(["a", "bb", "ccc"]), pack=False, batch_size=3)
    ids, labels, sizes = as_rows(batch)
    counts = batch["token_counts"]["raw_plus_prompt_template"].flatten().tolist()
    assert sizes == counts
    assert ids.shape == labels.shape == (1, sum(counts))
    ends = torch.tensor(sizes).cumsum(0) - 1
    assert (labels[0, ends] == IGNORE_INDEX).all()
    assert ((labels != IGNORE_INDEX).sum() == (batch["labels"][:, 1:] != IGNORE_INDEX).sum()).item()


def test_batches_made_elsewhere_are_taken_as_they_are():
    ids = torch.arange(8).reshape(2, 4)
    rows, labels, sizes = as_rows({"input_ids": ids, "labels": ids})
    assert (rows.tolist(), sizes) == ([list(range(8))], [4, 4])
    assert labels.tolist() == [[1, 2, 3, -100, 5, 6, 7, -100]]
    text = as_rows(next(iter(DataLoader([torch.arange(5)]))))
    assert [x.tolist() for x in text[:2]] == [[[0, 1, 2, 3]], [[1, 2, 3, 4]]]
