"""Folders of checkpoints: complete, or not there."""

import os
import signal

from litgpt.train.checkpointing import replacing_folder


def test_a_process_that_is_killed_while_it_writes_leaves_the_last_complete_folder(tmp_path):
    folder = tmp_path / "final"
    with replacing_folder(folder) as temporary:
        (temporary / "file").write_text("whole")
    if not (child := os.fork()):
        with replacing_folder(folder) as temporary:
            (temporary / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / "file").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2
    with replacing_folder(folder) as temporary:
        (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (folder / "file").read_text() == "new"
