"""Pointers that Git leaves in the place of large files."""

import re
from pathlib import Path


def refuse_lfs_pointer(path: Path) -> None:
    """Raises `ValueError` if a file is what Git leaves in the place of a large file that was not fetched."""
    with open(path, "rb") as file:
        begin = file.read(200)
    if begin.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"size (\d+)", begin)
        about = f" of {int(size[1]):,} bytes" if size else ""
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file{about} that it stands for: run `git lfs pull` in its folder, or "
            "download the file again"
        )
