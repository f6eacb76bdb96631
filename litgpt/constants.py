"""Which optional packages are installed, by LitGPT's names."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import get_args

from litgpt.types import LoggerChoice

_SUPPORTED_LOGGERS: tuple[str, ...] = get_args(LoggerChoice)


def _version(package: str) -> tuple[int, ...] | None:
    """The leading numbers of an installed package's version, say (0, 42, 0) (None: it is not installed)."""
    try:
        numbers = version(package).split("+")[0].split(".")
    except PackageNotFoundError:
        return None
    return tuple(int(number) for number in numbers if number.isdigit())


_LITLOGGER_AVAILABLE = (_version("litlogger") or ()) >= (0, 1, 7)
_TENSORBOARD_AVAILABLE = find_spec("tensorboard") is not None
_WANDB_AVAILABLE = find_spec("wandb") is not None
_MLFLOW_AVAILABLE = _version("mlflow") is not None
_MLFLOW_SKINNY_AVAILABLE = _version("mlflow-skinny") is not None
_BITANDBYTES_AVAILABLE = find_spec("bitsandbytes") is not None
_BITANDBYTES_AVAILABLE_NOT_EQUAL_0_42_0 = _version("bitsandbytes") not in (None, (0, 42, 0))
