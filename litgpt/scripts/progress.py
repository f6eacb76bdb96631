"""Shows the progress of a conversion on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from litgpt.checkpoint.base import Checkpoint
from litgpt.waiting import report_progress, waiting


@contextmanager
def weights_progress(verb: str, checkpoint: Checkpoint, names: bool = False) -> Iterator[Callable[[str, int], None]]:
    """Gives a function to call with the name and the bytes of every converted weight of a checkpoint.

    Shows a bar if stderr is a terminal, or, with `names`, a line for every weight.
    """
    if names:
        yield lambda name, size: print(f"{name} ({size:,} bytes)", file=sys.stderr)
        return
    done, total = 0, sum(shard.nbytes for _, _, shard in checkpoint.row_shards(meta=True))

    def advance(name: str, size: int) -> None:
        nonlocal done
        done += size
        report_progress(done, total)

    with waiting(f"{verb} {checkpoint.name}", log=True):
        yield advance
