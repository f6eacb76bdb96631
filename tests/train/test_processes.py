"""Two processes share a run: its losses and weights are those of one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from litgpt.__main__ import main

ROOT = Path(__file__).parents[2]


def arguments(checkpoint_dir, out_dir, json_path, *options):
    """Of the command."""
    text = f"""finetune_full {checkpoint_dir} --out_dir {out_dir} --data JSON --data.json_path {json_path}
        --data.val_split_fraction 0.2 --train.max_steps 4 --train.global_batch_size 4 --train.micro_batch_size 1
        --train.lr_warmup_steps 1 --train.save_interval 2 --eval.max_iters 2 --eval.interval 2 --precision 32-true
        --optimizer.lr 0.01 --optimizer.eps 0.001 --eval.max_new_tokens 2
        --kv_cache lastrec --cache_length 24 --prompt_chunksize 16"""  # Adam's own eps magnifies rounding
    return [*text.split(), *options]


def in_processes(*command):
    """What a command says that starts processes of its own."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "train")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode(errors="replace")


def losses_of(text):
    losses = [line.split("loss train: ")[1].split(",")[0] for line in text.splitlines() if "(step)" in line]
    return losses + [
        line.split("val loss")[1].split(" |")[0] for line in text.splitlines() if "Final evaluation" in line
    ]


def weights_of(out_dir):
    return torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)["model"]


SCRIPT = """
import sys
from litgpt import LLM
from litgpt.train import finetune

if __name__ == "__main__":
    checkpoint_dir, json_path, devices, *command = sys.argv[1:]
    llm = LLM.load(checkpoint_dir, distribute=None)
    options = {"max_steps": 3, "epochs": 9, "global_batch_size": 4, "lr_warmup_steps": 0, "learning_rate": 0.01}
    metrics = finetune(llm, json_path, "full", devices=int(devices), strategy="ddp", **options)
    answer = llm.generate("Say one", max_new_tokens=8, temperature=0.0)
    print(f"RESULT {metrics['train_loss']:.4f} {answer!r} END", flush=True)
    if int(devices) > 1:  # more work for the same processes
        import os

        import divided_layers  # of this folder
        from litgpt.__main__ import main

        divided_layers.main()
        os.write(1, b"DIVIDED LAYERS END\\n")  # at once, whatever the other writes
        os.environ.setdefault("LOCAL_RANK", "0")  # they need no start
        sys.exit(main(command))
"""


def test_two_processes_train_as_one_through_caches_from_the_command_and_a_script_and_after_a_stop(
    checkpoint_dir, tmp_path, json_path, monkeypatch, capsys
):
    """The command divides the layers (fsdp), the script does not (ddp), but resumes what the command began."""
    assert main(arguments(checkpoint_dir, tmp_path / "one", json_path)) == 0
    losses, weights = losses_of(capsys.readouterr().out), weights_of(tmp_path / "one")
    options = ("--devices", "2", "--strategy", "fsdp")
    command = arguments(checkpoint_dir, tmp_path / "two", json_path, *options)
    assert losses_of(in_processes("-m", "litgpt", *command)) == losses
    found = weights_of(tmp_path / "two")
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-4, atol=1e-5)
    for folder in ("final", "step-000004"):
        shutil.rmtree(tmp_path / "two" / folder)
    (tmp_path / "script.py").write_text(SCRIPT)
    output = in_processes(tmp_path / "script.py", checkpoint_dir, json_path, "2", *command, "--resume", "true")
    assert losses_of(output.partition("Resuming training from")[2]) == losses[2:]
    resumed = weights_of(tmp_path / "two")
    for name in weights:
        assert torch.equal(resumed[name], found[name])
    assert output.count("DIVIDED LAYERS END") == 2, output
    monkeypatch.setattr(sys, "argv", ["script.py", str(checkpoint_dir), str(json_path), "1"])
    exec(compile(SCRIPT, "script.py", "exec"), {"__name__": "__main__"})
    assert re.findall("RESULT .*? END", output) == re.findall("RESULT .*? END", capsys.readouterr().out) * 2
