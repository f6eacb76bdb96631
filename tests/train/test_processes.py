"""Two processes share a run: its losses and weights are those of one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run(checkpoint_dir, out_dir, json_path, *options):
    arguments = f"""finetune_full {checkpoint_dir} --out_dir {out_dir} --data JSON --data.json_path {json_path}
        --data.val_split_fraction 0.2 --train.max_steps 4 --train.global_batch_size 4 --train.micro_batch_size 1
        --train.lr_warmup_steps 1 --train.save_interval 2 --eval.max_iters 2 --eval.interval 2 --precision 32-true
        --optimizer.lr 0.01 --optimizer.eps 0.001 --eval.max_new_tokens 2
        --kv_cache lastrec --cache_length 24 --prompt_chunksize 16"""  # Adam's own eps magnifies rounding
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "litgpt", *arguments.split(), *options]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    text = done.stdout.decode(errors="replace")
    losses = [line.split("loss train: ")[1].split(",")[0] for line in text.splitlines() if "(step)" in line]
    losses += [line.split("val loss")[1].split(" |")[0] for line in text.splitlines() if "Final evaluation" in line]
    return losses, torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)["model"]


def test_losses_and_weights_are_those_of_one_process_also_after_a_stop(checkpoint_dir, tmp_path, json_path):
    losses, weights = run(checkpoint_dir, tmp_path / "one", json_path)
    options = ("--devices", "2", "--strategy", "fsdp")  # the script below has ddp
    found_losses, found = run(checkpoint_dir, tmp_path / "two", json_path, *options)
    assert found_losses == losses
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-4, atol=1e-5)
    for folder in ("final", "step-000004"):
        shutil.rmtree(tmp_path / "two" / folder)
    resumed_losses, resumed = run(checkpoint_dir, tmp_path / "two", json_path, *options, "--resume", "true")
    assert resumed_losses == losses[2:]
    for name in weights:
        assert torch.equal(resumed[name], found[name])


SCRIPT = """
import sys
from litgpt import LLM
from litgpt.train import finetune

if __name__ == "__main__":
    checkpoint_dir, json_path, devices = sys.argv[1:]
    llm = LLM.load(checkpoint_dir, distribute=None)
    options = {"max_steps": 3, "epochs": 9, "global_batch_size": 4, "lr_warmup_steps": 0, "learning_rate": 0.01}
    metrics = finetune(llm, json_path, "full", devices=int(devices), strategy="ddp", **options)
    answer = llm.generate("Say one", max_new_tokens=8, temperature=0.0)
    print(f"RESULT {metrics['train_loss']:.4f} {answer!r} END")
    if int(devices) > 1:
        import divided_layers  # of this folder: the group of processes is there already

        divided_layers.main()
        print("DIVIDED LAYERS END")
"""


def test_a_script_tunes_an_llm_in_two_processes_which_train_through_caches_as_one(
    checkpoint_dir, tmp_path, json_path, monkeypatch, capsys
):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "train")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, tmp_path / "script.py", checkpoint_dir, json_path, "2"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    output = done.stdout.decode(errors="replace")
    assert output.count("DIVIDED LAYERS END") == 2, output
    found = re.findall("RESULT .*? END", output)
    monkeypatch.setattr(sys, "argv", ["script.py", str(checkpoint_dir), str(json_path), "1"])
    capsys.readouterr()
    exec(compile(SCRIPT, "script.py", "exec"), {"__name__": "__main__"})
    assert found == re.findall("RESULT .*? END", capsys.readouterr().out) * 2
