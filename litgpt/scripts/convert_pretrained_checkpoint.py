"""The command `convert_pretrained_checkpoint`."""

from pathlib import Path

from litgpt.checkpoint.base import CONFIG_NAME, WEIGHTS_NAME
from litgpt.checkpoint.files import SIDE_FILES
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import save_litgpt
from litgpt.checkpoint.open import open_checkpoint
from litgpt.scripts.progress import weights_progress


def convert_pretrained_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Convert the result of pretraining to a checkpoint for all other commands.

    Leaves out the state of the optimizer and the data loader, and removes the prefixes of a compiled model's names.

    Args:
        checkpoint_dir: Folder that pretraining wrote.
        output_dir: Folder to write to; must not exist or be empty.
    """
    own = {CONFIG_NAME, *SIDE_FILES}  # all that a conversion that was killed leaves, but for hidden files
    if output_dir.is_dir() and any(f.name not in own and f.name[0] != "." for f in output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: give another folder, or delete it first")
    checkpoint = open_checkpoint(find_checkpoint(checkpoint_dir))
    with weights_progress("Converting", checkpoint) as progress:
        save_litgpt(checkpoint, output_dir, progress=progress)
    print(output_dir / WEIGHTS_NAME)
