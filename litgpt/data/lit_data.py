"""Folders and streams that `litdata` has optimised, among them the data of TinyLlama and MicroLlama."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from litgpt.data.base import DataModule

WEIGHTS = (0.693584, 0.306416)  # of SlimPajama and Starcoder


def litdata() -> Any:
    """The package `litdata`'s streaming module; `ValueError` if it is not installed."""
    try:
        from litdata import streaming
    except ModuleNotFoundError:
        raise ValueError("this data needs the package litdata: pip install 'litgpt[litdata]'") from None
    return streaming


class StreamModule(DataModule):
    """A data module of optimised folders or streams. Subclasses have the fields `seed` and `num_workers`."""

    max_seq_length = seq_length = 2048

    def connect(self, *args: Any, **kwargs: Any) -> None:
        super().connect(*args, **kwargs)
        self.seq_length = self.max_seq_length + 1  # the token after the last is needed too

    def rows(self, input_dir: str, shuffle: bool) -> Any:
        """Rows of `seq_length` tokens of a folder, or of a stream (s3://...)."""
        check_data_folder(input_dir)
        loader = litdata().TokensLoader(block_size=self.seq_length)
        settings = {"shuffle": shuffle, "seed": self.seed, "drop_last": True}
        rows = litdata().StreamingDataset(input_dir=input_dir, item_loader=loader, **settings)
        # litdata would give each process its own rows, of which the loop takes this process's share: every process reads all
        rows.distributed_env = type(rows.distributed_env)(world_size=1, global_rank=0, num_nodes=1)
        return rows

    def loader(self, rows: Any) -> DataLoader:
        """Batches of rows."""
        settings = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return litdata().StreamingDataLoader(rows, **settings, drop_last=True)


def check_data_folder(path: str) -> None:
    """Raise `FileNotFoundError` if there is no such folder, and it is no address."""
    if "://" not in path and not Path(path).is_dir():
        raise FileNotFoundError(f"the data folder {path} does not exist")


@dataclass
class LitData(StreamModule):
    """Rows of a folder or stream.

    Attributes:
        data_path: a folder, or an address such as s3://....
        split_names: folders in it for training and validation (None: all of it is for both).
        seed: of the order.
        num_workers: processes that read.
    """

    data_path: str | Path = Path("data")
    split_names: tuple[str, str] | None = None
    seed: int = 42
    num_workers: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_names is not None and len(self.split_names) != 2:
            raise ValueError(f"If provided `split_names` must be a tuple of two strings, got {self.split_names}")

    def _folder(self, which: int) -> str:
        path = str(self.data_path).rstrip("/")
        return path if self.split_names is None else f"{path}/{self.split_names[which]}"

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.rows(self._folder(0), shuffle=True))

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.rows(self._folder(1), shuffle=False))


@dataclass
class TinyLlama(StreamModule):
    """The data of TinyLlama (arXiv:2401.02385): rows of the folders `slimpajama/train`, `slimpajama/val` and `starcoder`.

    Attributes:
        data_path: what holds these folders, or an address such as s3://....
        seed: of the order.
        num_workers: processes that read.
        use_starcoder: mix in code.
    """

    data_path: str | Path = Path("data")
    seed: int = 42
    num_workers: int = 8
    use_starcoder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        root = str(self.data_path).rstrip("/")
        self.slimpajama_train, self.slimpajama_val = f"{root}/slimpajama/train", f"{root}/slimpajama/val"
        self.starcoder_train = f"{root}/starcoder"
        self.required_paths = [self.slimpajama_train, self.slimpajama_val] + self.use_starcoder * [self.starcoder_train]

    def prepare_data(self) -> None:
        for path in self.required_paths:
            check_data_folder(path)

    def train_dataloader(self) -> DataLoader:
        rows = self.rows(self.slimpajama_train, shuffle=True)
        if self.use_starcoder:
            code = self.rows(self.starcoder_train, shuffle=True)
            mixture = {"datasets": [rows, code], "weights": WEIGHTS, "iterate_over_all": False}
            rows = litdata().CombinedStreamingDataset(**mixture, seed=self.seed)
        return self.loader(rows)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.rows(self.slimpajama_val, shuffle=False))


@dataclass
class MicroLlama(TinyLlama):
    """The data of MicroLlama: as `TinyLlama`, without code."""

    use_starcoder: bool = field(default=False, init=False)
