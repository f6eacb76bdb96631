"""Folders that `litdata` has optimised, with the package itself."""

import pytest
import torch

from litgpt.data import LitData, MicroLlama, TinyLlama

litdata = pytest.importorskip("litdata")


def tokens_from(begin):
    yield torch.arange(begin, begin + 1000)


def optimise(path, inputs):
    from litdata.streaming import TokensLoader

    litdata.optimize(
        fn=tokens_from, inputs=inputs, output_dir=str(path), num_workers=1, chunk_size=4096, item_loader=TokensLoader()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, inputs in (("slimpajama/train", [0, 1000, 2000]), ("slimpajama/val", [5000]), ("starcoder", [10000])):
        optimise(folder / name, inputs)
    return folder


def ready(module):
    module.connect(batch_size=2, max_seq_length=16)
    module.prepare_data()
    module.setup()
    return module


def test_rows_of_a_folder(folder):
    module = ready(LitData(folder / "slimpajama", split_names=("train", "val"), num_workers=0))
    batches = list(module.train_dataloader())
    assert all(batch.shape == (2, 17) for batch in batches)
    rows = torch.cat(batches)
    assert (rows.diff(dim=1) == 1).float().mean() > 0.98  # consecutive, but where two documents meet
    assert len(rows.unique(dim=0)) == len(rows) >= 3000 // 17 - 2
    assert next(iter(module.val_dataloader()))[0, 0] >= 5000


@pytest.mark.parametrize(("kind", "code"), [(TinyLlama, True), (MicroLlama, False)])
def test_mixtures(kind, code, folder):
    module = ready(kind(folder, num_workers=0))
    rows = torch.cat(list(module.train_dataloader()))
    assert rows.shape[1] == 17
    assert bool((rows >= 10000).any()) is code
