"""One model's weights on disk in every layout that is measured."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from environments import ROOT, Launcher

OWN = Path(sys.executable)


@dataclass(frozen=True)
class Layouts:
    """Where the weights in bfloat16 and the prompt are.

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

    def write(folder: Path) -> None:
        job = {"checkpoint": full_name(checkpoint), "out_dir": str(folder), "text": str(ROOT / "LICENSE")}
        launcher.work(OWN, "write_layouts.py", job)

    folder = once(launcher.work_dir / "weights" / stem(checkpoint), write)
    return Layouts(folder / "litgpt", folder / "huggingface", folder / "tokens.json")


def ensure_ggufs(launcher: Launcher, checkpoint: Path | None, llama_python: Path) -> dict[str, Path]:
    """The GGUF file of a checkpoint (None: the default model) as `shipped`, and as `bf16` and `q8_0`, made from it by
    llama.cpp unless they are there already.

    Raises `RuntimeError` if the checkpoint is something else.
    """

    def write(folder: Path) -> None:
        found = launcher.work(OWN, "find_gguf.py", {"checkpoint": full_name(checkpoint)})
        folder.mkdir(parents=True)
        launcher.work(llama_python, "write_ggufs.py", {"source": found["gguf"], "out_dir": str(folder)})

    folder = once(launcher.work_dir / "weights" / f"{stem(checkpoint)}-gguf", write)
    return {name: folder / f"{name}.gguf" for name in ("shipped", "bf16", "q8_0")}


def once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, which `write` makes if it is not there: all of it or nothing."""
    if not folder.is_dir():
        print(f"Writing the weights to {folder} (once)", file=sys.stderr)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        os.replace(partial, folder)
    return folder


def stem(checkpoint: Path | None) -> str:
    return "default" if checkpoint is None else checkpoint.stem


def full_name(checkpoint: Path | None) -> str | None:
    return None if checkpoint is None else str(checkpoint.expanduser().resolve())
