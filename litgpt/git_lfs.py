"""Git LFS pointers, which Git leaves in place of large files."""

import re
from pathlib import Path


def refuse_lfs_pointer(path: Path) -> None:
    """Raises `ValueError` if a file is a Git LFS pointer instead of the file itself."""
    with open(path, "rb") as file:
        begin = file.read(200)
    if begin.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"size (\d+)", begin)
        about = f" of {int(size[1]):,} bytes" if size else ""
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file{about} itself: run `git lfs pull` in its folder, or download the "
            "file again"
        )
