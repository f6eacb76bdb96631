"""One model's weights on disk in every layout that is measured, in bfloat16."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from environments import ROOT, Launcher


@dataclass(frozen=True)
class Layouts:
    """Where the weights and the prompt are.

    Attributes:
        litgpt: folder with `lit_model.pth`.
        huggingface: folder with safetensors.
        tokens: JSON list of the text's tokens.
    """

    litgpt: Path
    huggingface: Path
    tokens: Path


def ensure_layouts(launcher: Launcher, checkpoint: Path | None) -> Layouts:
    """Write the layouts of a checkpoint (None: the default model), unless they are there already.

    In a process of its own: the peak memory of a process counts for those that it starts, so ours has to stay small.
    """
    folder = launcher.work_dir / "weights" / ("default" if checkpoint is None else checkpoint.stem)
    if not folder.is_dir():
        print(f"Writing the weights to {folder} (once)", file=sys.stderr)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        name = None if checkpoint is None else str(checkpoint.expanduser().resolve())
        job = {"checkpoint": name, "out_dir": str(partial), "text": str(ROOT / "LICENSE")}
        launcher.work(Path(sys.executable), "write_layouts.py", job)
        os.replace(partial, folder)
    return Layouts(folder / "litgpt", folder / "huggingface", folder / "tokens.json")
