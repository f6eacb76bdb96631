"""The data of TinyLlama (arXiv:2401.02385): SlimPajama and Starcoder."""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from litgpt.data.lit_data import StreamModule, litdata

WEIGHTS = (0.693584, 0.306416)  # of SlimPajama and Starcoder


@dataclass
class TinyLlama(StreamModule):
    """Rows of folders that `litdata` has optimised: `slimpajama/train`, `slimpajama/val` and `starcoder`.

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
        super().__init__()
        root = str(self.data_path).rstrip("/")
        self.slimpajama_train, self.slimpajama_val = f"{root}/slimpajama/train", f"{root}/slimpajama/val"
        self.starcoder_train = f"{root}/starcoder"
        self.required_paths = [self.slimpajama_train, self.slimpajama_val]
        if self.use_starcoder:
            self.required_paths.append(self.starcoder_train)

    def prepare_data(self) -> None:
        for path in self.required_paths:
            if "://" not in path and not Path(path).is_dir():
                raise FileNotFoundError(
                    f"The directory {path} does not exist: --data.data_path must hold "
                    + ", ".join(str(Path(p).relative_to(str(self.data_path))) for p in self.required_paths)
                )

    def train_dataloader(self) -> DataLoader:
        rows = self.rows(self.slimpajama_train, shuffle=True)
        if self.use_starcoder:
            code = self.rows(self.starcoder_train, shuffle=True)
            rows = litdata().CombinedStreamingDataset(
                datasets=[rows, code], seed=self.seed, weights=WEIGHTS, iterate_over_all=False
            )
        return self.loader(rows)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.rows(self.slimpajama_val, shuffle=False))
