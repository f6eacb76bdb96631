"""Folders that `litdata` has optimised, with the package itself."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import tiny_gpt

from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
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


@pytest.mark.parametrize("kind", [TinyLlama, MicroLlama])
def test_a_stop_after_the_first_epoch_changes_nothing(kind, folder, tmp_path):
    config = tiny_gpt(name="tiny", n_layer=1, vocab_size=12000, padded_vocab_size=12000).config

    def run(out, **options):
        pretrain.setup(
            "tiny",
            model_config=config,
            out_dir=out,
            data=kind(folder, num_workers=0),
            train=TrainArgs(
                save_interval=1,
                global_batch_size=40,
                micro_batch_size=20,
                max_tokens=8 * 40 * 16,
                max_seq_length=16,
                max_norm=1.0,
            ),
            eval=EvalArgs(interval=100, max_iters=1),
            precision="32-true",
            devices=1,
            logger_name="csv",
            **options,
        )
        return torch.load(out / "final" / "lit_model.pth", weights_only=True)["model"]

    expected = run(tmp_path / "whole")
    run(tmp_path / "half")
    position = torch.load(tmp_path / "half" / "step-00000007" / "lit_model.pth", weights_only=True)["loop"]["position"]
    assert position["epoch"] > 0
    for step in (8, "final"):
        shutil.rmtree(tmp_path / "half" / (step if step == "final" else f"step-{step:08}"))
    found = run(tmp_path / "half", resume="auto")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_processes_learn_from_the_rows_of_one_also_after_a_stop(folder, tmp_path):
    (tmp_path / "tiny").mkdir()
    config = tiny_gpt(name="tiny", n_layer=1, vocab_size=12000, padded_vocab_size=12000).config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_config": config.to_dict()}))
    data = f"--data TinyLlama --data.data_path {folder} --data.num_workers 0"

    def run(out, devices, *options):
        arguments = f"""pretrain tiny --config {tmp_path / "config.yaml"} --out_dir {tmp_path / out} {data}
            --train.save_interval 1 --train.global_batch_size 40 --train.micro_batch_size 10 --train.max_steps 8
            --train.max_seq_length 16 --eval.max_iters 1 --eval.interval 100 --precision 32-true --devices {devices}"""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "litgpt", *arguments.split(), *options]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=280)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        return torch.load(tmp_path / out / "final" / "lit_model.pth", weights_only=True)["model"]

    expected, found = run("one", 1), run("two", 2)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=5e-4)
    for step in ("final", "step-00000007", "step-00000008"):
        shutil.rmtree(tmp_path / "two" / step)
    resumed = run("two", 2, "--resume", "auto")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
