"""Some steps of fine-tuning by this package or by LitGPT 0.5.13, which have the same functions for it."""

import contextlib
import csv
import importlib
import shutil
import sys
from pathlib import Path

import torch
from timing import peak_bytes, read_job, report

from litgpt import adapter
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON


def main() -> None:
    job = read_job()
    out = Path(job["out_dir"])
    shutil.rmtree(out, ignore_errors=True)
    torch.set_num_threads(job["threads"])
    setup = importlib.import_module(f"litgpt.finetune.{job['method']}").setup
    # LitGPT 0.5.13 computes prefixes once, before training, and so never trains them: here it computes them every time
    adapter.CausalSelfAttention.adapter_kv_cache = property(lambda self: None, lambda self, value: None)
    own = job.get("train", {}) | ({"pack": True} if job.get("pack") else {})
    size = job["micro_batch_size"]
    train = TrainArgs(
        save_interval=10_000,
        global_batch_size=size * job["accumulation"],
        micro_batch_size=size,
        lr_warmup_steps=1,
        max_steps=job["steps"],
        epochs=100,
        max_seq_length=job["max_seq_length"],
        **own,
    )
    data = JSON(json_path=Path(job["samples"]), val_split_fraction=0.1, num_workers=0, mask_prompt=job["mask_prompt"])
    shares = explain_last_step(job["steps"]) if job.get("explain") else {}
    evaluate = EvalArgs(interval=10_000, max_iters=1, max_new_tokens=1, final_validation=False)
    with contextlib.redirect_stdout(sys.stderr):
        setup(
            Path(job["checkpoint"]),
            out_dir=out,
            precision=job["precision"],
            data=data,
            train=train,
            eval=evaluate,
            optimizer=job.get("optimizer", {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}),
            **job.get("options", {}),
        )
    with open(out / "logs" / "csv" / "version_0" / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["iter_time"]]
    skipped = job["accumulation"]  # the first step, in which memory is taken and much is set up
    seconds = sum(float(row["iter_time"]) for row in rows[skipped:])
    tokens = float(rows[-1]["total_tokens"]) - float(rows[skipped - 1]["total_tokens"])
    losses = [float(row["loss"]) for row in rows]
    shutil.rmtree(out, ignore_errors=True)
    report({"tokens": tokens, "seconds": seconds, "peak_bytes": peak_bytes(), "losses": losses, "shares": shares})


def explain_last_step(steps: int) -> dict[str, float]:
    """Profile the last of this package's optimizer steps; what is returned is filled then."""
    from step_shares import shares_of

    from litgpt.train.loop import Loop

    shares: dict[str, float] = {}
    step = Loop._step

    def profiled(loop: Loop, window: list) -> None:
        if loop.position.step_count < steps - 1:
            step(loop, window)
        else:
            shares.update(shares_of(lambda: step(loop, window)))

    Loop._step = profiled
    return shares


if __name__ == "__main__":
    main()
