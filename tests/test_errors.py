"""Errors in the words of `describe`."""

from pathlib import Path

import pytest

from litgpt.errors import describe


@pytest.mark.parametrize(
    ("existing", "said"),
    [("file", "'{}' is a file, and a folder is needed: give another name"), ("folder", "File exists")],
)
def test_a_file_in_the_place_of_a_folder_is_called_so(existing, said, tmp_path: Path):
    path = tmp_path / "out"
    path.touch() if existing == "file" else path.mkdir()
    with pytest.raises(FileExistsError) as error:
        path.mkdir()
    assert describe(error.value).startswith(said.format(path))
