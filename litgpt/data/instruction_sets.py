"""Data sets of instructions that are fetched once: JSON files, or data sets of the Hugging Face hub. Fields: see `SFTModule`."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from litgpt.data.base import SFTModule, no_option
from litgpt.data.download import download_if_missing, load_hub_dataset
from litgpt.data.encoding import Sample, Splits
from litgpt.data.json_data import read_samples, read_values
from litgpt.prompt_style import PromptStyle

_ALPACA = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
_GPT4 = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"
_LONGFORM = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"
_FLAN = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"
_FLAN_TASKS = """
    aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen copa
    coqa cosmos_qa dart definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp hellaswag
    imdb_reviews math_dataset mnli_matched mnli_mismatched multi_news multirc natural_questions openbookqa
    opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes para_crawl_enes paws_wiki piqa qnli quac record rte
    samsum sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb trec trivia_qa true_case web_nlg_en wic
    wiki_lingua_english_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien
    wmt16_translate_roen wmt16_translate_ruen wmt16_translate_tren wnli word_segment wsc yelp_polarity_reviews
"""
FLAN_SUBSETS = frozenset(f"{task}_10templates" for task in _FLAN_TASKS.split())


@dataclass
class Alpaca(SFTModule):
    """52,000 instructions written by a language model, cleaned: a JSON file; `file_url` and `file_name` say which."""

    val_split_fraction: float = 0.03865
    download_dir: Path = Path("./data/alpaca")
    file_url: str = field(repr=False, default=_ALPACA)
    file_name: str = field(repr=False, default="alpaca_data_cleaned_archive.json")

    def prepare_data(self) -> None:
        download_if_missing(Path(self.download_dir) / self.file_name, self.file_url)

    def samples(self) -> Splits:
        return self.split(read_samples(Path(self.download_dir) / self.file_name))


@dataclass
class AlpacaGPT4(Alpaca):
    """Alpaca's instructions with answers of GPT-4."""

    val_split_fraction: float = 0.03847
    download_dir: Path = Path("./data/alpacagpt4")
    file_url: str = field(repr=False, default=_GPT4)
    file_name: str = field(repr=False, default="alpacagpt4_data_cleaned_archive.json")


@dataclass
class Alpaca2k(Alpaca):
    """Two thousand samples of Alpaca, from the hub."""

    val_split_fraction: float = 0.05
    download_dir: Path = Path("./data/alpaca2k")
    repo_id: str = field(repr=False, default="mhenrichsen/alpaca_2k_test")
    file_name: str = field(repr=False, default="alpaca2k_data_cleaned_archive.json")

    def prepare_data(self) -> None:
        self.samples()

    def samples(self) -> Splits:
        data = load_hub_dataset(self.repo_id, cache_dir=self.download_dir)["train"]
        parts = data.train_test_split(test_size=self.val_split_fraction, seed=self.seed)
        return parts["train"], parts["test"]


@dataclass
class _DividedFiles(SFTModule):
    """JSON files for training, and others for validation."""

    names = ("instruction", "output")  # fields that they have in the files

    val_split_fraction: None = no_option()

    @abstractmethod
    def addresses(self) -> tuple[list[str], list[str]]:
        """Where the files for training are fetched, and those for validation."""

    def _file(self, address: str) -> Path:
        return Path(self.download_dir) / address.rpartition("/")[2]

    def prepare_data(self) -> None:
        for address in chain(*self.addresses()):
            download_if_missing(self._file(address), address)

    def samples(self) -> Splits:
        train, val = ([sample for address in part for sample in self._samples(address)] for part in self.addresses())
        return train, val

    def _samples(self, address: str) -> list[Sample]:
        asked, answer = self.names
        rows = read_values(self._file(address)).values()
        return [{"instruction": row[asked], "output": row[answer]} for row in rows]


@dataclass
class LongForm(_DividedFiles):
    """Long texts, with instructions that a model found for them (arXiv:2304.08460)."""

    names = ("input", "output")

    prompt_style: str | PromptStyle = "longform"
    download_dir: Path = Path("./data/longform")

    def addresses(self) -> tuple[list[str], list[str]]:
        return [f"{_LONGFORM}/train.json"], [f"{_LONGFORM}/val.json"]


@dataclass
class FLAN(_DividedFiles):
    """Many tasks, written as instructions (arXiv:2109.01652): two files for each. `subsets` names tasks, separated by commas
    (None: all of them, which are many gigabytes)."""

    names = ("inputs", "targets")

    prompt_style: str | PromptStyle = "flan"
    download_dir: Path = Path("./data/flan")
    url: str = _FLAN
    subsets: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tasks = sorted(FLAN_SUBSETS) if self.subsets is None else self.subsets.split(",")
        if unknown := sorted(set(self._tasks) - FLAN_SUBSETS):
            raise ValueError(f"subsets: {', '.join(unknown)} not known; there are {', '.join(sorted(FLAN_SUBSETS))}")

    def addresses(self) -> tuple[list[str], list[str]]:
        both = ([f"{self.url}/{split}/{task}_{split}.jsonl" for task in self._tasks] for split in ("train", "test"))
        return tuple(both)


@dataclass
class LIMA(SFTModule):
    """1,000 careful answers (arXiv:2305.11206), from the hub, which asks for an access token."""

    val_split_fraction: float = 0.1
    include_multiturn_conversations: bool = False
    repo_id: str = "GAIR/lima"
    access_token: str | None = field(repr=False, default_factory=lambda: os.getenv("HF_TOKEN"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.access_token is None:
            raise ValueError("LIMA needs an access token of the Hugging Face hub: set HF_TOKEN, or --data.access_token")

    def samples(self) -> Splits:
        rows = load_hub_dataset(self.repo_id, token=self.access_token)["train"]
        talks = (row["conversations"] for row in rows)
        return self.split(samples_of_turns(talks, self.include_multiturn_conversations))


@dataclass
class Deita(SFTModule):
    """10,000 conversations chosen for their quality (arXiv:2312.15685), from the hub. Each turn is a sample, or only the first."""

    val_split_fraction: None = no_option()
    include_multiturn_conversations: bool = False
    download_dir: Path = Path("./data/deita")
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"

    def samples(self) -> Splits:
        parts = load_hub_dataset(self.repo_id, split=["train_sft", "test_sft"], cache_dir=self.download_dir)
        return tuple(samples_of_messages(parts[i], self.include_multiturn_conversations) for i in (0, 1))


def samples_of_messages(dataset: Iterable[Mapping[str, Any]], include_multi_turn_conversations: bool) -> list[Sample]:
    """Samples of conversations whose `messages` alternate between user and assistant."""
    talks = ([message["content"] for message in row["messages"]] for row in dataset)
    return samples_of_turns(talks, include_multi_turn_conversations)


def samples_of_turns(talks: Iterable[Sequence[str]], all_turns: bool) -> list[Sample]:
    """Samples of texts that alternate between user and assistant: of the first turn, or of all."""
    return [
        {"instruction": said, "input": "", "output": answer}
        for texts in talks
        for said, answer in islice(zip(texts[::2], texts[1::2], strict=False), None if all_turns else 1)
    ]
