"""Loggers, devices and progress."""

import logging
import time
from types import SimpleNamespace
from typing import Any

import lightning.fabric.loggers
import pytest
from lightning.fabric.loggers import CSVLogger

from litgpt.args import TrainArgs
from litgpt.data import LIMA
from litgpt.train.report import Position, Reporter
from litgpt.train.setting import make_logger, plain


def test_secrets_are_not_written_to_files():
    data = plain({"data": LIMA(access_token="secret", seed=3), "access_token": "secret"})["data"]
    assert (data["class_path"], data["init_args"]["seed"]) == ("litgpt.data.LIMA", 3)
    assert "access_token" not in data["init_args"]


def test_without_tensorboard_losses_go_to_csv_and_a_line_says_so(tmp_path, monkeypatch, caplog):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available")

    monkeypatch.setattr(lightning.fabric.loggers, "TensorBoardLogger", missing)
    with caplog.at_level(logging.WARNING, "litgpt"):
        assert isinstance(make_logger("csv", tmp_path, "run", 1), CSVLogger)
        assert not caplog.text
        assert isinstance(make_logger("tensorboard", tmp_path, "run", 1), CSVLogger)
    (line,) = caplog.messages
    assert line.startswith("tensorboard is not installed (pip install tensorboard): losses go to logs/csv")


def a_report(max_steps: int, **train: Any) -> tuple[Reporter, list[str]]:
    """A report, and the lines that it prints."""
    lines: list[str] = []
    cpu = SimpleNamespace(type="cpu")
    fabric = SimpleNamespace(print=lines.append, log_dict=lambda *a, **k: None, device=cpu, world_size=1)
    return Reporter(fabric, TrainArgs(**train), max_steps), lines


def test_the_speed_of_a_resumed_run_counts_its_own_tokens_only():
    report, lines = a_report(max_steps=10)
    position = Position(tokens=10**12, step_count=5, iter_num=5)
    report.begin(position)
    position.tokens, position.step_count, position.iter_num = 10**12 + 100, 6, 6
    report.iteration(position, 1.0, 100, 0.1, 1, 0.1)
    assert float(lines[0].split("(step) | ")[1].split(" tok/s")[0]) < 10**10


@pytest.mark.parametrize(("max_time", "ends"), [(None, 40), (15.0, 15)])
def test_the_remaining_time_falls_from_one_micro_batch_to_the_next(max_time, ends, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report, lines = a_report(max_steps=10, max_time=max_time)
    position = Position()
    report.begin(position)
    for i in range(1, 9):  # of four micro-batches a step, each a second
        now[0], position.iter_num, position.step_count = float(i), i, i // 4
        report.iteration(position, 1.0, 100, 1.0, (i - 1) % 4 / 4 + 1 / 4, 0.1)
    assert [line.split("remaining time: ")[1] for line in lines] == [f"0:00:{ends - i:02}" for i in range(1, 9)]
