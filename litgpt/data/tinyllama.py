"""The data of TinyLlama (arXiv:2401.02385): SlimPajama and Starcoder."""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from litgpt.data.base import DataModule
from litgpt.data.lit_data import litdata, loader, rows
from litgpt.tokenizer import Tokenizer

WEIGHTS = (0.693584, 0.306416)  # of SlimPajama and Starcoder


@dataclass
class TinyLlama(DataModule):
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

    batch_size = 1
    seq_length = 2048

    def __post_init__(self) -> None:
        super().__init__()
        root = str(self.data_path).rstrip("/")
        self.slimpajama_train, self.slimpajama_val = f"{root}/slimpajama/train", f"{root}/slimpajama/val"
        self.starcoder_train = f"{root}/starcoder"
        self.required_paths = [self.slimpajama_train, self.slimpajama_val]
        if self.use_starcoder:
            self.required_paths.append(self.starcoder_train)

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        self.batch_size, self.seq_length = batch_size, max_seq_length + 1  # the token after the last is needed too

    def prepare_data(self) -> None:
        for path in self.required_paths:
            if "://" not in path and not Path(path).is_dir():
                raise FileNotFoundError(
                    f"The directory {path} does not exist: --data.data_path must hold "
                    + ", ".join(str(Path(p).relative_to(str(self.data_path))) for p in self.required_paths)
                )

    def train_dataloader(self) -> DataLoader:
        data = rows(self.slimpajama_train, self.seq_length, self.seed, shuffle=True)
        if self.use_starcoder:
            code = rows(self.starcoder_train, self.seq_length, self.seed, shuffle=True)
            data = litdata().CombinedStreamingDataset(
                datasets=[data, code], seed=self.seed, weights=WEIGHTS, iterate_over_all=False
            )
        return loader(data, self.batch_size, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        data = rows(self.slimpajama_val, self.seq_length, self.seed, shuffle=False)
        return loader(data, self.batch_size, self.num_workers)
