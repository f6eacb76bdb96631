import json
import os
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Processor
from transformers import AutoTokenizer

from litgpt.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "In 1984 there were 12345 reasons to say hello world; hello, world!",
    "Un café, s'il vous plaît. Grüße aus Köln. The cafés are open.",
    "def main():\n    return [x * 2 for x in range(10)]\n",
] * 4
TEXTS = ["hello world", " leading space", "  two  spaces ", "1984 🦙 naïve 漢字\n\n\tend", "a</s>b", "", "🏴‍☠️"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level():
    processor = Processor(models.BPE())
    processor.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    processor.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    processor.train_from_iterator(CORPUS, trainer)
    processor.add_tokens([AddedToken("<|note|>", special=False)])
    return processor


def llama_like():
    """BPE over text with U+2581 for spaces and bytes for what is not in the vocabulary, as Llama 2 has it."""
    trained = Processor(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL + BYTES, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    processor = Processor(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    processor.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    processor.decoder = decoders.Sequence(steps)
    processor.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return processor


def unigram():
    processor = Processor(models.Unigram())
    processor.pre_tokenizer = pre_tokenizers.Metaspace()
    processor.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    processor.train_from_iterator(CORPUS, trainer)
    return processor


def gemma_like():
    """As Llama's, but no space is added to the start of a text, and none taken away."""
    processor = llama_like()
    processor.normalizer = normalizers.Replace(" ", "▁")
    processor.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return processor


def unigram_with_bytes():
    """As T5's and XLM-R's successors have it: pieces chosen by probability, bytes for what is in none."""
    trained = json.loads(unigram().to_str())["model"]["vocab"]
    vocab = [*map(tuple, trained), *((byte, -20.0) for byte in BYTES)]
    processor = Processor(models.Unigram(vocab, 0, True))
    processor.pre_tokenizer = pre_tokenizers.Metaspace()
    processor.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    processor.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return processor


def wordpiece(cleanup=True):
    """As BERT has it; the decoder puts spaces between words, and with `cleanup` takes some away again."""
    processor = Processor(models.WordPiece(unk_token="<unk>"))
    processor.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    processor.decoder = decoders.WordPiece(cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    processor.train_from_iterator([*CORPUS, "it's n't do not I'm we've they're a . b , c ? d ! \ufffd"], trainer)
    processor.add_tokens(["n't", "'s", "'m", ".", ",", " do not", "'ve"])
    return processor


def end_of_word():
    """As GPT-1 and CLIP have it: the last piece of a word says that it is the last."""
    processor = Processor(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    processor.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    processor.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    processor.train_from_iterator(CORPUS, trainer)
    return processor


def words():
    """Whole words, and no decoder."""
    processor = Processor(models.WordLevel(unk_token="<unk>"))
    processor.pre_tokenizer = pre_tokenizers.Whitespace()
    processor.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return processor


KINDS = {
    "byte_level": byte_level,
    "llama_like": llama_like,
    "gemma_like": gemma_like,
    "unigram": unigram,
    "unigram_with_bytes": unigram_with_bytes,
    "wordpiece": wordpiece,
    "wordpiece_as_is": lambda: wordpiece(cleanup=False),
    "end_of_word": end_of_word,
    "words": words,
}
LOSSLESS = ("byte_level", "llama_like", "gemma_like")


def with_bos(processor):
    bos = ("<s>", processor.token_to_id("<s>"))
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    processor.post_processor = template
    return processor


def write(folder, processor, **config):
    folder.mkdir(parents=True, exist_ok=True)
    processor.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_sentencepiece(path, model_type="bpe"):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(path / "tokenizer"),
        model_type=model_type,
        vocab_size=400 if model_type == "bpe" else 330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path


@pytest.fixture(scope="module", params=[*KINDS, "sentencepiece", "sentencepiece_unigram"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if not request.param.startswith("sentencepiece"):
        return write(path, KINDS[request.param]())
    return write_sentencepiece(path, "unigram" if "unigram" in request.param else "bpe")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("post_processor", [False, True])
def test_encode_and_decode_agree_with_transformers(kind, post_processor, tmp_path):
    processor = with_bos(KINDS[kind]()) if post_processor else KINDS[kind]()
    ours, theirs = Tokenizer(write(tmp_path, processor)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.use_bos is post_processor
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        expected = theirs(text).input_ids
        ids = ours.encode(text)
        assert ids.dtype == torch.int
        assert ids.dim() == 1
        assert ids.tolist() == expected
        assert ours.decode(ids) == theirs.decode(expected, skip_special_tokens=True)


def test_encode_and_decode_agree_with_sentencepiece(tmp_path):
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.use_bos) == (1, 2, False)
    assert tokenizer.vocab_size == 400
    for text in (t for t in TEXTS if "</s>" not in t):
        assert tokenizer.encode(text).tolist() == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
    assert tokenizer.encode("a</s>b").tolist() == [*reference.encode("a"), 2, *reference.encode("b")]


@pytest.mark.parametrize("kind", KINDS)
def test_places_of_tokens_are_ends_in_the_text(kind, tmp_path):
    tokenizer = Tokenizer(write(tmp_path, KINDS[kind]()))
    texts = [text for text in TEXTS if text] + ["ab</s>ab", "ab ab"]
    for text, (ids, ends) in zip(texts, tokenizer.encode_with_places(texts), strict=True):
        assert ids == tokenizer.encode(text, bos=False).tolist()
        assert ends == sorted(ends)
        assert len(ends) == len(ids)
        assert not ends or len(text.rstrip()) <= ends[-1] <= len(text)
    (_, ends), (_, twice) = tokenizer.encode_with_places(["ab</s>ab"] * 2)
    assert {2, 6, 8} <= set(ends) == set(twice)


@given(data=st.data())
@settings(max_examples=60)
def test_any_stream_of_tokens_gives_the_text_of_all(tokenizer, data):
    last = len(tokenizer.encode("")) + tokenizer.vocab_size + 5  # a few ids beyond the vocabulary
    ids = data.draw(st.lists(st.integers(0, last), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    chunks = [torch.tensor(ids[a:b], dtype=torch.int) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(tokenizer.decode_stream(chunks)) == tokenizer.decode(ids)
    assert "".join(tokenizer.decode_stream(iter(ids))) == tokenizer.decode(torch.tensor(ids))


@given(data=st.data())
@settings(max_examples=60)
def test_bytes_that_are_no_text_stream_as_they_are_decoded(tokenizer, data):
    """Byte tokens, spaces, the ends of characters and ordinary tokens in any order, cut anywhere."""
    count = tokenizer.processor.get_vocab_size() if tokenizer.backend == "huggingface" else tokenizer.vocab_size
    texts = [
        *BYTES[0x20:0x80:7],
        *BYTES[0x80::9],
        "<0x20>",
        "▁",
        "Ġ",
        "é",
        "Ã",
        "©",
        "##s",
        "a",
        "<s>",
        "▁the",
        "\ufffd",
    ]
    known = {text: i for i in range(count) if (text := tokenizer.id_to_token(i)) in texts}
    ids = data.draw(st.lists(st.one_of(st.sampled_from([*known.values(), 5]), st.integers(0, count)), max_size=12))
    whole = tokenizer.decode(ids)
    assert "".join(tokenizer.decode_stream(iter(ids))) == whole
    cut = data.draw(st.integers(0, len(ids)))
    assert "".join(tokenizer.decode_stream(iter([ids[:cut], [], ids[cut:]]))) == whole


@given(text=st.text(max_size=40))
@settings(max_examples=60)
def test_text_survives_encoding_and_streaming(folder, tokenizer, text):
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    if any(kind in str(folder) for kind in LOSSLESS):
        for token in SPECIAL:
            text = text.replace(token, "")
        assert decoded == text
    assert "".join(tokenizer.decode_stream(ids)) == decoded


@pytest.mark.parametrize(("kind", "space"), [("byte_level", "Ġ"), ("llama_like", "▁")])
def test_stream_keeps_spaces_and_holds_back_incomplete_characters(kind, space, tmp_path):
    tokenizer = Tokenizer(write(tmp_path, KINDS[kind]()))
    the = tokenizer.token_to_id(f"{space}t")
    llama = tokenizer.encode("🦙").tolist()[-4:]  # four bytes, each a token
    assert list(tokenizer.decode_stream(iter([the, the, *llama, the]))) == (
        [" t"] * (kind == "byte_level") + ["t"] * (kind == "llama_like") + [" t", "🦙", " t"]
    )
    assert list(tokenizer.decode_stream(iter([the, the, *llama[:3]])))[-1] == "\ufffd"


def test_one_bad_byte_does_not_hide_its_neighbours(tmp_path):
    tokenizer = Tokenizer(write(tmp_path, llama_like()))
    ids = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in (0xFF, *"€".encode())]
    assert tokenizer.decode(ids) == "\ufffd€"


def test_streaming_decodes_every_token_a_constant_number_of_times(tokenizer, monkeypatch):
    backend, decoded = tokenizer._backend, []
    original = type(backend).decode
    monkeypatch.setattr(type(backend), "decode", lambda self, ids: decoded.append(len(ids)) or original(self, ids))
    if hasattr(backend, "_pieces"):
        backend._pieces.clear()
    ids = tokenizer.encode("\n".join(CORPUS)).tolist() * 8
    assert len(ids) > 1000
    assert "".join(tokenizer.decode_stream(iter(ids)))
    assert sum(decoded) <= 3 * len(ids)
    assert max(decoded) <= 2


def test_bos_and_eos_are_added_once(tmp_path):
    tokenizer = Tokenizer(write(tmp_path, with_bos(byte_level())))
    plain = tokenizer.encode("hello", bos=False).tolist()
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert tokenizer.encode("hello").tolist() == [bos, *plain]
    assert tokenizer.encode("<s>hello").tolist() == [bos, *plain]
    assert tokenizer.encode("hello", bos=False, eos=True).tolist() == [*plain, eos]
    assert tokenizer.encode("hello</s>", bos=False, eos=True).tolist() == [*plain, eos]
    assert tokenizer.encode("hello", max_length=1).tolist() == [bos]
    assert tokenizer.encode("", bos=False).shape == (0,)


def test_special_tokens_of_a_prompt_stay_where_bos_is_not_used(tmp_path):
    """The BOS of SmolLM2 opens every chat turn, its EOS closes one."""
    tokenizer = Tokenizer(write(tmp_path, byte_level()))
    ids = tokenizer.encode("<s>hello</s>").tolist()
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_add_bos_token_overrides_the_post_processor(tmp_path):
    assert Tokenizer(write(tmp_path / "a", byte_level(), add_bos_token=True)).use_bos
    assert not Tokenizer(write(tmp_path / "b", with_bos(byte_level()), add_bos_token=False)).use_bos


def test_the_folder_name_decides_nothing(tmp_path):
    for name in ("SmolLM2-135M-Instruct", "Llama-3.2-1B", "salamandra-2b"):
        assert not Tokenizer(write(tmp_path / name, byte_level())).use_bos


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path):
    processor = byte_level()
    processor.enable_padding(length=50)
    processor.enable_truncation(2)
    expected = byte_level().encode("hello world").ids
    assert Tokenizer(write(tmp_path, processor)).encode("hello world").tolist() == expected


def test_special_ids_come_from_every_config_in_order(tmp_path):
    write(tmp_path, byte_level(), eos_token={"content": "</s>"}, bos_token=None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [9, 2]}))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 8, "eos_token_id": 11}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (7, 2, (2, 9, 11))
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).eos_ids == (9, 2, 11)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "list", "chat_template.jinja", "chat_template.json"])
def test_chat_template_is_found_in_every_place(where, tmp_path):
    write(tmp_path, byte_level())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if where == "chat_template.jinja":
        (tmp_path / where).write_text("{{ x }}")
    elif where == "list":
        config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ x }}"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        content = {"chat_template": "{{ x }}"} | (config if where == "tokenizer_config.json" else {})
        (tmp_path / where).write_text(json.dumps(content))
    assert Tokenizer(tmp_path).chat_template == "{{ x }}"


def test_saved_tokenizer_reads_back_identical(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    for name in ("bos_id", "eos_id", "eos_ids", "use_bos", "chat_template", "vocab_size", "bos_token", "eos_token"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in TEXTS:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_tokenizer_from_memory_reads_back_identical_here_and_in_transformers(tmp_path):
    processor = with_bos(byte_level())
    options = {"bos_id": 1, "eos_id": 2, "use_bos": True, "chat_template": "{{ messages }}", "eos_ids": (2, 0)}
    tokenizer = Tokenizer.from_tokenizers(processor, **options)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    tokenizer.save(tmp_path)
    again, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_ids, again.use_bos, again.chat_template) == ((2, 0), True, "{{ messages }}")
    assert theirs.chat_template == "{{ messages }}"
    assert again.encode("hello").tolist() == tokenizer.encode("hello").tolist() == theirs("hello").input_ids
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "bos_token_id": 1, "eos_token_id": [2, 0]}
    assert not list(tmp_path.glob("*.tmp"))


def test_errors_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(NotADirectoryError, match="nowhere' is not a folder"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read: .+") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"litgpt\[sentencepiece\]"):
        Tokenizer(tmp_path)
    tokenizer = Tokenizer.from_tokenizers(byte_level(), bos_id=None, eos_id=None, use_bos=False)
    with pytest.raises(ValueError, match="no BOS"):
        tokenizer.encode("a", bos=True)
    with pytest.raises(ValueError, match="no EOS"):
        tokenizer.encode("a", eos=True)
    with pytest.raises(ValueError, match="'nope' is not in the vocabulary"):
        tokenizer.token_to_id("nope")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b'{"chat_template": [1]}', "chat_template = .* must be a text or a list"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template = 5 must be a text"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 5}]}', "chat_template"),
        ("chat_template.json", b'{"chat_template": {"a": 1}}', "chat_template"),
        ("chat_template.jinja", b"\xff", "UTF-8"),
        ("tokenizer_config.json", LFS, "is a Git LFS pointer"),
        ("tokenizer.json", LFS, "is a Git LFS pointer"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(name, content, message, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("token_id", [-1, 10**30, True, 1.5, [-1]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_that_no_token_can_have_stand_for_nothing(token_id, name, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "\\ud800", "eos_token": "</s>"}')
    (tmp_path / name).write_text(json.dumps({"bos_token_id": token_id, "eos_token_id": token_id}))
    ours = Tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids, ours.encode("a").tolist()) == (None, (2,), byte_level().encode("a").ids)


def test_a_byte_order_mark_before_the_tokenizer_changes_nothing(tmp_path):
    (tmp_path / "tokenizer.json").write_text("\ufeff" + byte_level().to_str(), encoding="utf-8")
    assert Tokenizer(tmp_path).encode("hello").tolist() == byte_level().encode("hello").ids


def test_what_the_tokenizer_cannot_encode_is_one_line(tmp_path):
    Processor(models.Unigram([("b", -1.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="cannot encode"):
        Tokenizer(tmp_path).encode("a")


@pytest.mark.parametrize("first", ["▁the", "the", "▁"])
def test_a_first_character_of_several_bytes_streams_whole_whatever_the_vocabulary_begins_with(first):
    processor = Processor(models.BPE({token: i for i, token in enumerate([first, *BYTES])}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    processor.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer.from_tokenizers(processor, bos_id=None, eos_id=None, use_bos=False)
    ids = [1 + byte for byte in "Ω é".encode()]
    for spaces in range(3):
        assert tokenizer.decode([33] * spaces + ids) == " " * (spaces - 1) + "Ω é"
        assert "".join(tokenizer.decode_stream([33] * spaces + ids)) == " " * (spaces - 1) + "Ω é"


def test_a_panic_of_the_library_is_a_refusal_too(tmp_path):
    path = write(tmp_path, byte_level()) / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["continuing_subword_prefix"] = "a prefix longer than the tokens of the merges"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer that can be read"):
        Tokenizer(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_texts_are_not_remembered():
    """Here texts without spaces, each of which counts as a word."""

    def memory():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tokenizer = Tokenizer.from_tokenizers(
        Processor(models.BPE({chr(i): i for i in range(128)}, [])), bos_id=None, eos_id=0, use_bos=False
    )
    for i in range(400):
        tokenizer.encode(f"{i:0250}")
    before = memory()
    for i in range(400, 4400):
        tokenizer.encode(f"{i:0250}")
    assert memory() - before < 20e6  # it would be 40 MB
