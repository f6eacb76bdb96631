import pytest

from litgpt.checkpoint import find
from litgpt.checkpoint.default_model import DEFAULT_REPO


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path):
    """Names that the hub was asked for; the hub gives nothing."""
    names = []

    def fetch(repo_id, access_token=None):
        names.append(repo_id)
        raise ConnectionError("no network")

    monkeypatch.setenv("LITGPT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(find, "fetch_checkpoint", fetch)
    monkeypatch.setattr(find, "ensure_default_model", lambda: names.append("default") or tmp_path)
    return names


def test_a_path_is_taken_as_it_is(tmp_path, asked):
    assert find.find_checkpoint(tmp_path) == tmp_path
    assert not asked


@pytest.mark.parametrize("name", ["EleutherAI/pythia-14m", "pythia-14m"])
def test_a_model_below_the_folder_of_checkpoints_is_found_by_either_name(tmp_path, asked, name):
    folder = tmp_path / "home" / "EleutherAI" / "pythia-14m"
    folder.mkdir(parents=True)
    assert find.find_checkpoint(name) == folder
    assert not asked


@pytest.mark.parametrize("name", [None, DEFAULT_REPO, "SmolLM2-135M-Instruct"])
def test_the_default_model_comes_by_its_own_ways(asked, name):
    find.find_checkpoint(name)
    assert asked == ["default"]


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [("pythia-14m", "EleutherAI/pythia-14m"), ("someone/something", "someone/something")],
)
def test_other_names_are_asked_of_the_hub_and_the_failure_names_them(asked, name, repo_id):
    with pytest.raises(ConnectionError, match=f"'{name}' is not on this disk.*no network"):
        find.find_checkpoint(name)
    assert asked == [repo_id]


@pytest.mark.parametrize(
    "name", ["nonsense", "./folder/that/is/not", "/absolute/path", "../up", "file.gguf", "a/b.gguf"]
)
def test_what_is_no_name_is_not_asked_for(asked, name):
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        find.find_checkpoint(name)
    assert not asked
