"""Texts for pretraining: tokens in a file of our own, rows cut out of it, and going on in the middle of an epoch."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import TextFiles, TinyStories, tokens
from litgpt.data.tokens import TokenRows, encode_files


def documents(file):
    return [file.read_text("utf-8")]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"This is text {i}. " * 20)
    return folder


def connected(path, length=16, **options):
    data = TextFiles(path, **options)
    data.connect(tiny_tokenizer(), batch_size=2, max_seq_length=length)
    data.prepare_data()
    data.setup()
    return data


def test_files_follow_each_other_with_an_end_token_between(folder):
    data = connected(folder)
    tokenizer = tiny_tokenizer()
    texts = [(folder / f"{i}.txt").read_text().strip() for i in range(3)]
    expected = [i for text in texts[1:] for i in tokenizer.encode(text, eos=True).tolist()]
    assert data.train_rows.tokens.tolist() == expected
    assert data.val_rows.tokens.tolist() == tokenizer.encode(texts[0], eos=True).tolist()


def test_rows_foresee_every_token_but_the_first_once():
    rows = TokenRows(np.arange(33, dtype=np.uint16), 8)
    assert [row.tolist() for row in rows] == [list(range(8 * i, 8 * i + 9)) for i in range(4)]


def test_a_single_file_holds_its_end_back(tmp_path):
    (tmp_path / "a.txt").write_text("A long text. " * 200)
    data = connected(tmp_path / "a.txt")
    whole = tiny_tokenizer().encode(("A long text. " * 200).strip(), eos=True).tolist()
    assert [*data.train_rows.tokens.tolist(), *data.val_rows.tokens.tolist()] == whole
    assert len(data.val_rows.tokens) == round(0.05 * len(whole))


def test_a_folder_of_its_own_validates(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "val")
    data = connected(folder, val_data_path=tmp_path / "val")
    assert len(data.train_rows.tokens) == len(data.val_rows.tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "none does not exist"),
        (lambda folder: folder.parent / "cache", "does not exist|holds no .txt files"),
    ],
)
def test_missing_texts_are_named(make, message, folder):
    with pytest.raises(FileNotFoundError, match=message):
        connected(make(folder))


def test_texts_that_are_none_are_refused(folder):
    (folder / "1.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"1\.txt is not UTF-8: byte 3"):
        connected(folder)
    short = folder.parent / "short.txt"
    short.write_text("Hi")
    with pytest.raises(ValueError, match="for training has 0 tokens, less than one row of 17: use more text"):
        connected(short).train_dataloader()
    with pytest.raises(ValueError, match="give --tokenizer_dir"):
        TextFiles(folder).prepare_data()


def test_tokens_are_made_once_and_again_when_a_file_changes(folder, monkeypatch):
    first = connected(folder).train_rows.tokens.tolist()
    (made,) = (folder / "train").glob("tokens-*.bin")
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_encoded", None)
        assert connected(folder).train_rows.tokens.tolist() == first
    (folder / "2.txt").write_text("Another text. " * 20)
    assert connected(folder).train_rows.tokens.tolist() != first
    assert [file for file in (folder / "train").glob("tokens-*.bin") if file == made] == []


def test_what_changes_the_tokens_makes_the_file_stale(tmp_path):
    file, tokenizer = tmp_path / "a.txt", tiny_tokenizer()
    file.write_text("Text.")
    digests = {tokens.files_digest([file], tokenizer), tokens.files_digest([file], tokenizer, eos=True)}
    tokenizer_2 = tiny_tokenizer()
    tokenizer_2.use_bos = True
    digests.add(tokens.files_digest([file], tokenizer_2))
    os.utime(file, ns=(1, 1))  # changed, at the same length
    assert len({*digests, tokens.files_digest([file], tokenizer)}) == 4


def test_long_texts_are_encoded_in_pieces_without_a_loss(tmp_path, monkeypatch):
    text = "\n\n".join(f"Line {i}\nand more" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(tokens, "PART", 64)
    monkeypatch.setattr(tokens, "GROUP", 500)
    tokenizer = tiny_tokenizer()
    found = encode_files([tmp_path / "a.txt"], tmp_path / "out", tokenizer, documents)
    assert found.tolist() == tokenizer.encode(text, eos=True).tolist()


@pytest.mark.skipif(os.name == "nt", reason="needs a folder that is a file")
def test_where_the_texts_lie_need_not_be_writable(folder, own_cache):
    (folder / "train").write_text("in the way")
    assert len(connected(folder).train_rows.tokens)
    assert list(own_cache.glob("tokens-*.bin"))


def test_stories_are_read_from_files_of_their_form(tmp_path):
    source = tmp_path / "TinyStories_all_data"
    source.mkdir()
    for i in range(3):
        (source / f"data{i:02}.json").write_text(json.dumps([{"story": f" Once {i}. " * 9}, {"story": "End."}]))
    data = TinyStories(tmp_path)
    data.connect(tiny_tokenizer(), batch_size=1, max_seq_length=16)
    data.prepare_data()
    data.setup()
    text = data.tokenizer.processor.decode(data.train_rows.tokens.tolist(), skip_special_tokens=False)
    assert text.count("<|end|>") == 4
    assert text.startswith("Once 1.")
    assert next(iter(data.val_dataloader())).shape == (1, 17)


def test_a_stop_in_the_middle_of_an_epoch_changes_nothing(folder, tmp_path):
    config = tiny_gpt(name="tiny", n_layer=1, block_size=64, **VOCABULARY).config
    tiny_tokenizer().save(tmp_path / "tokenizer")

    def run(out, **options):
        pretrain.setup(
            "tiny",
            model_config=config,
            out_dir=out,
            data=TextFiles(folder),
            tokenizer_dir=tmp_path / "tokenizer",
            train=TrainArgs(
                save_interval=3,
                global_batch_size=4,
                micro_batch_size=2,
                lr_warmup_steps=1,
                max_tokens=4 * 16 * 16,
                max_seq_length=16,
                max_norm=1.0,
            ),
            eval=EvalArgs(interval=100, max_iters=2),
            precision="32-true",
            devices=1,
            logger_name="csv",
            **options,
        )
        return torch.load(out / "final" / "lit_model.pth", weights_only=True)["model"]

    expected = run(tmp_path / "whole")
    run(tmp_path / "half")
    half = tmp_path / "half"
    steps = sorted(half.glob("step-*"))
    assert len(steps) > 3
    for done in [half / "final", *steps[1:]]:
        shutil.rmtree(done)
    found = run(half, resume="auto")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
