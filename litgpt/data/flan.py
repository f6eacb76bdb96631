"""FLAN: many tasks, written as instructions (arXiv:2109.01652)."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.base import SFTModule, has_own_split
from litgpt.data.download import download_if_missing
from litgpt.data.encoding import Splits
from litgpt.data.json_data import read_values
from litgpt.prompt_style import PromptStyle

_URL = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"
_TASKS = """
    aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen copa
    coqa cosmos_qa dart definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp hellaswag
    imdb_reviews math_dataset mnli_matched mnli_mismatched multi_news multirc natural_questions openbookqa
    opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes para_crawl_enes paws_wiki piqa qnli quac record rte
    samsum sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb trec trivia_qa true_case web_nlg_en wic
    wiki_lingua_english_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien
    wmt16_translate_roen wmt16_translate_ruen wmt16_translate_tren wnli word_segment wsc yelp_polarity_reviews
"""
SUBSETS = frozenset(f"{task}_10templates" for task in _TASKS.split())


@dataclass(kw_only=True)
class FLAN(SFTModule):
    """Samples of JSONL files, two for each task, that are fetched once. Fields: see `SFTModule`.

    `subsets` names tasks, separated by commas (None: all of them, which are many gigabytes).
    """

    val_split_fraction: None = has_own_split()
    prompt_style: str | PromptStyle = "flan"
    download_dir: Path = Path("./data/flan")
    url: str = _URL
    subsets: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tasks = sorted(SUBSETS) if self.subsets is None else self.subsets.split(",")
        if unknown := sorted(set(self._tasks) - SUBSETS):
            raise ValueError(f"subsets: {', '.join(unknown)} not known; there are {', '.join(sorted(SUBSETS))}")

    def _files(self, split: str) -> list[Path]:
        return [Path(self.download_dir) / f"{task}_{split}.jsonl" for task in self._tasks]

    def prepare_data(self) -> None:
        for split in ("train", "test"):
            for file in self._files(split):
                download_if_missing(file, f"{self.url}/{split}/{file.name}")

    def samples(self) -> Splits:
        train, test = (
            [
                {"instruction": row["inputs"], "output": row["targets"]}
                for file in self._files(split)
                for row in read_values(file).values()
            ]
            for split in ("train", "test")
        )
        return train, test
