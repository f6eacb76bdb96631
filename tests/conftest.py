"""Shared fixtures: where the real weights of `real_model` tests come from."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ  # one of several processes that test, with one thread each
if SIDE_BY_SIDE:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # torch finds graphs again that it compiled for another one
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor-{capability}-{os.getuid()}"))
    )

# the same examples in every run, however slow it is
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("same")


def pytest_collectstart() -> None:
    torch.manual_seed(1234)  # for models that a file makes when it is imported


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many threads after a test as before; two for kernels where others have one."""
    before = torch.get_num_threads()
    if SIDE_BY_SIDE and request.path.parent.name in ("kernels", "runners"):
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the user's cache, with the kernels that are compiled already: processes that tests start take those."""
    from litgpt.kernels.build import folders  # imports modules that only Linux has

    home, kernels = tmp_path_factory.mktemp("cache"), folders()[0]
    if kernels.is_dir():
        shutil.copytree(kernels, home / "litgpt" / "kernels")
    return home


@pytest.fixture
def own_cache(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of encoded samples, in the place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    shutil.rmtree(cache_home / "litgpt" / "samples", ignore_errors=True)
    return cache_home / "litgpt" / "samples"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(1234)  # for models that fixtures of a file or of the whole run make
    dry_run = os.environ.get("LITGPT_TEST_DEVICE") == "cpu" and item.path.parent.name == "gpu"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not dry_run:
        pytest.skip("needs a CUDA device")


def _first_existing(*candidates: str | None) -> Path | None:
    return next((Path(c) for c in candidates if c and Path(c).exists()), None)


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The SmolLM2-135M-Instruct Q4_1 GGUF file: `LITGPT_TEST_GGUF`, or fetched as the commands fetch it."""
    path = _first_existing(os.environ.get("LITGPT_TEST_GGUF"))
    if path is None:
        from litgpt.checkpoint.default_model import fetch_default_gguf

        try:
            path = fetch_default_gguf().resolve()  # tests change the folder
        except (OSError, RuntimeError, ValueError) as error:
            pytest.skip(f"default model not available: {error}")
    return path.resolve()


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """The Gemma-3-270m Q4_K_M GGUF file named by `LITGPT_TEST_GEMMA_GGUF`."""
    path = _first_existing(os.environ.get("LITGPT_TEST_GEMMA_GGUF"))
    if path is None:
        pytest.skip("LITGPT_TEST_GEMMA_GGUF does not name a file")
    return path
