"""Loggers, devices and progress."""

import logging
from types import SimpleNamespace

import lightning.fabric.loggers
from lightning.fabric.loggers import CSVLogger

from litgpt.train.loop import Position
from litgpt.train.report import Reporter
from litgpt.train.setting import make_logger


def test_without_tensorboard_pretraining_logs_to_csv(tmp_path, monkeypatch, caplog):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available")

    monkeypatch.setattr(lightning.fabric.loggers, "TensorBoardLogger", missing)
    with caplog.at_level(logging.WARNING, "litgpt"):
        assert isinstance(make_logger("tensorboard", tmp_path, "run", 1), CSVLogger)
    assert "pip install tensorboard" in caplog.text


def test_the_speed_of_a_resumed_run_counts_its_own_tokens_only():
    lines = []
    cpu = SimpleNamespace(type="cpu")
    fabric = SimpleNamespace(print=lines.append, log_dict=lambda *a, **k: None, device=cpu, world_size=1)
    position = Position(tokens=10**12, step_count=5, iter_num=5)
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.1])
    loop = SimpleNamespace(position=position, max_steps=10, scheduler=scheduler)
    report = Reporter(fabric, 1)
    report.begin(loop)
    position.tokens, position.step_count, position.iter_num = 10**12 + 100, 6, 6
    report.iteration(loop, 1.0, 100, 0.1, is_step=True)
    assert float(lines[0].split("(step) | ")[1].split(" tok/s")[0]) < 10**10
