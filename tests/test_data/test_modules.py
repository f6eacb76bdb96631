"""The modules that fetch their data: fields, files of the same form, and a clear word without a network."""

import json
import sys
import tarfile
from dataclasses import fields
from types import ModuleType, SimpleNamespace

import pytest
from tiny import tiny_tokenizer

import litgpt.data as data
from litgpt.data import (
    FLAN,
    LIMA,
    Alpaca,
    Alpaca2k,
    AlpacaGPT4,
    Deita,
    LitData,
    LongForm,
    MicroLlama,
    OpenWebText,
    TinyLlama,
    deita,
    download,
    tokens,
)
from litgpt.data.instruction_sets import samples_of_turns
from litgpt.prompts import PromptStyle

hub_answers = download.hub_answers

SFT = {"mask_prompt": False, "ignore_index": -100, "seed": 42, "num_workers": 4}
FIELDS = {
    "Alpaca": {**SFT, "val_split_fraction": 0.03865, "prompt_style": "alpaca"},
    "Alpaca2k": {**SFT, "val_split_fraction": 0.05, "prompt_style": "alpaca", "repo_id": "mhenrichsen/alpaca_2k_test"},
    "AlpacaGPT4": {**SFT, "val_split_fraction": 0.03847, "prompt_style": "alpaca"},
    "Deita": {**SFT, "include_multiturn_conversations": False, "repo_id": "HuggingFaceH4/deita-10k-v0-sft"},
    "FLAN": {**SFT, "prompt_style": "flan", "subsets": None},
    "JSON": {**SFT, "val_split_fraction": None, "prompt_style": "alpaca"},
    "LIMA": {**SFT, "val_split_fraction": 0.1, "include_multiturn_conversations": False, "repo_id": "GAIR/lima"},
    "LongForm": {**SFT, "prompt_style": "longform"},
    "LitData": {"split_names": None, "seed": 42, "num_workers": 8},
    "TextFiles": {"val_data_path": None, "seed": 42, "num_workers": 4},
    "TinyStories": {"seed": 42, "num_workers": 8},
    "OpenWebText": {"val_split_fraction": 0.0005, "seed": 42, "num_workers": 8},
    "TinyLlama": {"seed": 42, "num_workers": 8, "use_starcoder": True},
    "MicroLlama": {"seed": 42, "num_workers": 8},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_those_of_litgpt(name):
    found = {field.name: field.default for field in fields(getattr(data, name))}
    assert {key: found[key] for key in FIELDS[name]} == FIELDS[name]


def ready(module, limit=512):
    module.connect(tiny_tokenizer(), batch_size=2, max_seq_length=limit)
    module.prepare_data()
    module.setup()
    return module


def first_text(loader):
    batch = next(iter(loader))
    return tiny_tokenizer().decode(batch["input_ids"][0])


@pytest.mark.parametrize("kind", [Alpaca, AlpacaGPT4])
def test_alpaca(kind, tmp_path):
    module = kind(download_dir=tmp_path, file_name="a.json", val_split_fraction=0.25)
    samples = [{"instruction": f"Say {i}", "input": "it", "output": str(i)} for i in range(8)]
    (tmp_path / "a.json").write_text(json.dumps(samples))
    ready(module)
    assert (len(module.train_dataloader()), len(module.val_dataloader())) == (3, 1)
    assert "### Input:\nit" in first_text(module.train_dataloader())
    assert isinstance(module.prompt_style, PromptStyle.styles["alpaca"])


def test_longform(tmp_path):
    for split, n in (("train", 4), ("val", 2)):
        (tmp_path / f"{split}.json").write_text(
            json.dumps([{"input": f"Write {i}", "output": "Text"} for i in range(n)])
        )
    module = ready(LongForm(download_dir=tmp_path))
    assert (len(module.train_dataloader()), len(module.val_dataloader())) == (2, 1)


def test_flan(tmp_path):
    for split in ("train", "test"):
        rows = [{"inputs": f"Ask {i}", "targets": f"Answer\u2028{i}"} for i in range(4)]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"cola_10templates_{split}.jsonl").write_text(text, encoding="utf-8")
    module = ready(FLAN(download_dir=tmp_path, subsets="cola_10templates"))
    assert len(module.train_dataloader()) == 2
    with pytest.raises(ValueError, match="subsets: colour not known"):
        FLAN(subsets="colour")


class Part(list):
    @property
    def _fingerprint(self):
        return str(hash(str(self)))

    def train_test_split(self, test_size, seed, shuffle=True):
        n = round(test_size * len(self))
        return {"train": Part(self[n:]), "test": Part(self[:n])}


@pytest.fixture
def hub(monkeypatch):
    """A package `datasets` that has what a test puts there."""
    content = {}
    package = ModuleType("datasets")

    def load_dataset(repo_id, split=None, **kwargs):
        if repo_id not in content:
            raise ConnectionError(f"Couldn't reach\n'{repo_id}' on the Hub")
        found = content[repo_id]
        return found if split is None else [found[name] for name in split]

    package.load_dataset, package.config = load_dataset, SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setattr(download, "hub_answers", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return content


def test_alpaca2k(hub, tmp_path):
    rows = Part({"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(20))
    hub["mhenrichsen/alpaca_2k_test"] = {"train": rows}
    module = ready(Alpaca2k(download_dir=tmp_path))
    assert (len(module.train_dataset), len(module.test_dataset)) == (19, 1)


def test_openwebtext_is_encoded_once_while_the_pages_stay(hub, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(tokens, "report_progress", lambda done, total: shown.append(done / total))
    monkeypatch.setattr(tokens, "GROUP", 100)
    pages = [f"Page {i} has some words. " * 20 for i in range(20)]
    hub["openwebtext"] = {"train": Part({"text": page} for page in pages)}
    module = ready(OpenWebText(tmp_path, val_split_fraction=0.1), 16)
    assert tiny_tokenizer().decode(module.train_rows.tokens.tolist()) == "".join(page.strip() for page in pages[2:])
    assert max(shown, default=0) <= 1  # how many pages are left is not known
    files = set(tmp_path.glob("*/tokens-*.bin"))
    ready(OpenWebText(tmp_path, val_split_fraction=0.1), 16)
    assert set(tmp_path.glob("*/tokens-*.bin")) == files
    hub["openwebtext"]["train"].append({"text": "New."})
    ready(OpenWebText(tmp_path, val_split_fraction=0.1), 16)
    assert len({*files, *tmp_path.glob("*/tokens-*.bin")}) == len(files) + 1


CONVERSATION = ["question 1", "answer 1", "question 2", "answer 2"]


@pytest.mark.parametrize("all_turns", [False, True])
def test_deita_and_lima(all_turns, hub, tmp_path):
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, CONVERSATION, strict=True)
    ]
    expected = [
        {"instruction": "question 1", "input": "", "output": "answer 1"},
        {"instruction": "question 2", "input": "", "output": "answer 2"},
    ][: 1 + all_turns]
    assert deita.format_dataset([{"messages": messages}], all_turns) == expected
    assert samples_of_turns([CONVERSATION], all_turns) == expected
    hub["HuggingFaceH4/deita-10k-v0-sft"] = {
        "train_sft": [{"messages": messages}] * 3,
        "test_sft": [{"messages": messages}],
    }
    hub["GAIR/lima"] = {"train": [{"conversations": CONVERSATION}] * 10}
    module = ready(Deita(include_multiturn_conversations=all_turns, download_dir=tmp_path))
    assert (len(module.train_dataset), len(module.test_dataset)) == (3 * (1 + all_turns), 1 + all_turns)
    module = ready(LIMA(include_multiturn_conversations=all_turns, access_token="secret"))
    assert len(module.train_dataset) + len(module.test_dataset) == 10 * (1 + all_turns)
    assert "secret" not in repr(module)


def test_what_the_hub_does_not_give_is_one_line(hub, monkeypatch):
    with pytest.raises(
        OSError, match="alpaca_2k_test could not be fetched from the Hugging Face hub: Couldn't reach '"
    ) as error:
        ready(Alpaca2k())
    assert "\n" not in str(error.value)
    monkeypatch.setattr(download, "hub_answers", hub_answers)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="could not be fetched from the Hugging Face hub: it does not answer"):
        ready(Alpaca2k())
    assert sys.modules["datasets"].config.HF_HUB_OFFLINE  # else it retries for half a minute
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="set HF_TOKEN"):
        LIMA()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets"):
        ready(Deita())


def test_a_file_that_cannot_be_fetched_says_where_to_put_it(tmp_path):
    module = Alpaca(download_dir=tmp_path, file_url="http://127.0.0.1:9/a.json", file_name="a.json")
    with pytest.raises(
        OSError, match=r"127\.0\.0\.1:9/a\.json could not be fetched \(.*\): put the file at .*a\.json yourself"
    ):
        ready(module)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_fetched_whole_or_not_at_all(tmp_path):
    source = tmp_path / "source.json"
    source.write_text("[1]")
    download.download_if_missing(tmp_path / "new" / "a.json", source.as_uri())
    assert (tmp_path / "new" / "a.json").read_text() == "[1]"
    source.unlink()
    download.download_if_missing(tmp_path / "new" / "a.json", source.as_uri())  # is there


def test_an_archive_is_unpacked_once(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.json", "a.json")
    for _ in range(2):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.json"]


def test_optimised_folders_that_are_missing_are_named(tmp_path):
    for module in (TinyLlama(tmp_path), MicroLlama(tmp_path)):
        module.connect(max_seq_length=16)
        with pytest.raises(FileNotFoundError, match="slimpajama/train does not exist"):
            module.prepare_data()
    module = LitData(tmp_path / "none")
    module.connect(max_seq_length=16)
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        module.train_dataloader()
    with pytest.raises(ValueError, match="must be a tuple of two strings"):
        LitData(tmp_path, split_names=("train",))
