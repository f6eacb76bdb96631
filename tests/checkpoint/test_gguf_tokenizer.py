"""Tokenizers rebuilt from GGUF metadata, against the tokenizers that the metadata were taken from."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from litgpt.tokenizer import Tokenizer as OurTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 12345 o'clock, we'll see.",
    "In 1984 there were 20000 reasons to say hello world, HELLO WORLD, hello_world!",
    "Un café, s'il vous plaît. Grüße aus Köln, naïve façade.\r\n\r\n\tÜber 3.14159",
    "def main():\n    return [x ** 2 for x in range(10)]  # done\n\n\n",
] * 3
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two  spaces ",
    "1984 🦙 漢字 कि",
    "a\n\n\nb",
    "x²½ Ⅷ",
    "I'LL don't",
    "u\u0308ber",
    "<|im_start|>user\nhi",
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_SYMBOLS = ["<table>", "▁▁", "\n"]
NORMAL, UNKNOWN, CONTROL_TYPE, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# The pre-tokenizers as the `tokenizer.json` of the model named has them.
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": GPT_2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_level(pre):
    processor = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    processor.pre_tokenizer, processor.decoder = GPT_2, decoders.ByteLevel()
    processor.normalizer = normalizers.NFC() if pre == "qwen2" else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    processor.train_from_iterator(CORPUS, trainer)
    processor.pre_tokenizer = PRE_TOKENIZERS[pre]  # merges that its words do not allow must not happen
    return processor


def metadata_of(processor, kind, **more):
    vocab = sorted(processor.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in vocab]
    merges = json.loads(processor.to_str())["model"]["merges"]
    values = {
        "model": "gpt2",
        "pre": kind,
        "tokens": tokens,
        "token_type": [CONTROL_TYPE if token in CONTROL else NORMAL for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | more).items()}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokenizer_equals_the_one_it_was_taken_from(pre):
    theirs = byte_level(pre)
    ours = tokenizer_from_gguf(metadata_of(theirs, pre))
    assert ours.use_bos == (pre == "llama-bpe")
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (1, 2, (2, 0))
    for text in TEXTS:
        ids = ours.encode(text, bos=False).tolist()
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_merges_do_not_matter_for_whole_words_of_llama_3():
    processor = byte_level("llama-bpe")
    metadata = metadata_of(processor, "llama-bpe")
    whole = next(token for token in reversed(metadata["tokenizer.ggml.tokens"]) if token.startswith("Ġ"))
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:1]
    whole_id = processor.token_to_id(whole)
    assert tokenizer_from_gguf(metadata).encode(processor.decode([whole_id]), bos=False).tolist() == [whole_id]


def test_user_defined_tokens_are_found_first_and_kept_when_decoding():
    metadata = metadata_of(byte_level("gpt-2"), "gpt-2")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens.append("    ")
    types.append(USER_DEFINED)
    ours = tokenizer_from_gguf(metadata)
    ids = ours.encode("x    y<|im_end|>").tolist()
    assert ids[1] == len(tokens) - 1
    assert ids[-1] == 2
    assert ours.decode(ids) == "x    y"


@pytest.mark.parametrize("add_bos", [True, False])
def test_saved_tokenizer_is_read_identically_here_and_by_transformers(add_bos, tmp_path):
    template = {"tokenizer.chat_template": "{{ messages }}"}
    metadata = metadata_of(byte_level("smollm"), "smollm", add_bos_token=add_bos, eot_token_id=0) | template
    ours = tokenizer_from_gguf(metadata)
    ours.save(tmp_path)
    again, theirs = OurTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.bos_id, again.eos_ids, again.use_bos, again.chat_template) == (1, (2, 0), add_bos, "{{ messages }}")
    assert theirs.chat_template == "{{ messages }}"
    for text in TEXTS:
        assert ours.encode(text).tolist() == again.encode(text).tolist()
        if text != TEXTS[-1]:  # begins with BOS, which ours does not double
            assert ours.encode(text).tolist() == theirs(text).input_ids


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def sentencepiece_model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        add_dummy_prefix=request.param,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[] if request.param else USER_SYMBOLS,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{path}.model"), request.param


def metadata_of_sentencepiece(model, add_prefix):
    def kind(i):
        flags = {
            UNKNOWN: model.is_unknown(i),
            CONTROL_TYPE: model.is_control(i),
            BYTE: model.is_byte(i),
            USER_DEFINED: not add_prefix and model.id_to_piece(i) in USER_SYMBOLS,
        }
        return next((number for number, holds in flags.items() if holds), NORMAL)

    ids = range(model.vocab_size())
    types = [kind(i) for i in ids]
    values = {
        "model": "llama",
        # as converters write them: user-defined ones with real spaces
        "tokens": [
            p.replace("▁", " ") if t == USER_DEFINED else p
            for p, t in zip(map(model.id_to_piece, ids), types, strict=True)
        ],
        "scores": [-1000.0 if t == USER_DEFINED else model.get_score(i) for i, t in zip(ids, types, strict=True)],
        "token_type": types,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
    }
    values |= {} if add_prefix else {"add_space_prefix": False}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def test_sentencepiece_tokenizer_equals_the_library(sentencepiece_model):
    theirs, add_prefix = sentencepiece_model
    ours = tokenizer_from_gguf(metadata_of_sentencepiece(theirs, add_prefix))
    assert (ours.bos_id, ours.eos_id, ours.use_bos) == (1, 2, True)

    @given(
        st.one_of(st.sampled_from(TEXTS), st.text(alphabet="helo wrd\n<tab>1é漢🦙 ", max_size=30), st.text(max_size=20))
    )
    @settings(max_examples=150)
    def check(text):
        ids = ours.encode(text, bos=False).tolist()
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text

    check()


def test_the_best_score_merges_first_whatever_the_order_of_ids():
    values = {
        "model": "llama",
        "tokens": ["<unk>", "a", "b", "c", "ab", "bc"],
        "scores": [0.0, -9.0, -9.0, -9.0, -5.0, -1.0],
        "token_type": [UNKNOWN] + [NORMAL] * 5,
        "add_space_prefix": False,
    }
    ours = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert ours.encode("abc").tolist() == [1, 5]


def test_text_between_user_defined_tokens_is_encoded_on_its_own(sentencepiece_model):
    theirs, add_prefix = sentencepiece_model
    metadata = metadata_of_sentencepiece(theirs, add_prefix)
    for key, value in (("tokens", "<note>"), ("scores", 0.0), ("token_type", USER_DEFINED)):
        metadata[f"tokenizer.ggml.{key}"].append(value)
    ids = tokenizer_from_gguf(metadata).encode("hello<note>hello</s>hello", bos=False).tolist()
    hello = theirs.encode("hello")
    assert ids == [*hello, theirs.vocab_size(), *hello, 2, *hello]


def metadata_with(kinds, pre="gpt-2", **more):
    """A byte-level tokenizer with further tokens of given types."""
    metadata = metadata_of(byte_level(pre), pre, **more)
    for token, kind in kinds.items():
        metadata["tokenizer.ggml.tokens"].append(token)
        metadata["tokenizer.ggml.token_type"].append(kind)
    return metadata


ENDS = [
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<eos>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "[EOT]",
    "<EOT>",
    "<|eot|>",
    "[|endofturn|]",
    "<|END_OF_TURN_TOKEN|>",
]


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, CONTROL_TYPE])
@pytest.mark.parametrize("end", ENDS)
def test_an_end_known_by_its_text_is_a_control_token_whatever_its_type(end, kind):
    ours = tokenizer_from_gguf(metadata_with({end: kind}))
    end_id = ours.token_to_id(end)
    assert ours.eos_ids == (2, 0, end_id)
    assert ours.encode(f"hi{end}").tolist()[-1] == end_id
    assert ours.decode([end_id]) == ""


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
def test_ends_and_begins_of_turns_that_are_typed_as_text_are_found(kind):
    metadata = metadata_of(byte_level("qwen2"), "qwen2", eos_token_id=0)
    metadata["tokenizer.ggml.token_type"][:3] = [kind] * 3
    ours = tokenizer_from_gguf(metadata)
    assert ours.eos_ids == (0, 2)
    ids = ours.encode("<|im_start|>user\nhi<|im_end|>").tolist()
    assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)
    assert ours.decode(ids).endswith("user\nhi")


def test_the_end_of_struck_out_text_ends_no_text():
    """Gemma's vocabulary has the tags of HTML, typed user-defined; its ends have other names."""
    ours = tokenizer_from_gguf(metadata_with({"<s>": USER_DEFINED, "</s>": USER_DEFINED}))
    assert ours.eos_ids == (2, 0)
    assert ours.decode(ours.encode("a<s>b</s>")) == "a<s>b</s>"
    ours = tokenizer_from_gguf(metadata_with({"</s>": CONTROL_TYPE}))
    assert ours.eos_ids == (2, 0, ours.token_to_id("</s>"))


def test_where_messages_have_an_end_of_their_own_it_does_not_end_the_turn():
    ours = tokenizer_from_gguf(metadata_with(dict.fromkeys(["<|end|>", "<|return|>", "<|call|>"], CONTROL_TYPE)))
    assert ours.token_to_id("<|end|>") not in ours.eos_ids
    assert {ours.token_to_id("<|return|>"), ours.token_to_id("<|call|>")} < set(ours.eos_ids)


def test_thinking_tags_stay_visible():
    ours = tokenizer_from_gguf(metadata_with({"<think>": USER_DEFINED, "</think>": NORMAL}))
    assert ours.decode(ours.encode("<think>hm</think>ok")) == "<think>hm</think>ok"


def test_special_tokens_have_the_names_that_templates_use(tmp_path):
    more = {"padding_token_id": 0, "unknown_token_id": 1, "seperator_token_id": 2**32 - 1}
    ours = tokenizer_from_gguf(metadata_of(byte_level("gpt-2"), "gpt-2", **more))
    assert ours.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|im_start|>",
    }
    ours.save(tmp_path)
    assert OurTokenizer(tmp_path).special_tokens == ours.special_tokens
    assert AutoTokenizer.from_pretrained(tmp_path).special_tokens_map == ours.special_tokens


def test_sentencepiece_without_ids_and_types_has_its_defaults(sentencepiece_model):
    theirs, add_prefix = sentencepiece_model
    metadata = metadata_of_sentencepiece(theirs, add_prefix)
    del metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    if add_prefix:
        del metadata["tokenizer.ggml.token_type"]
    ours = tokenizer_from_gguf(metadata)
    assert (ours.bos_id, ours.eos_ids, ours.use_bos) == (1, (2,), True)
    assert ours.encode("hello</s>🦙", bos=False).tolist() == [*theirs.encode("hello"), 2, *ours.encode("🦙", bos=False)]
    assert ours.decode(ours.encode("hello 🦙")) == "hello 🦙"


def test_a_vocabulary_of_bytes_needs_no_merges():
    tokens = [*CONTROL, *pre_tokenizers.ByteLevel.alphabet()]
    values = {"model": "gpt2", "tokens": tokens, "token_type": [CONTROL_TYPE] * 3 + [NORMAL] * 256, "eos_token_id": 0}
    ours = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert ours.decode(ours.encode("héllo<|im_end|>")) == "héllo"


def test_more_tokens_than_rows_of_the_embedding_are_refused():
    metadata = metadata_of(byte_level("gpt-2"), "gpt-2")
    count = len(metadata["tokenizer.ggml.tokens"])
    assert tokenizer_from_gguf(metadata, count).vocab_size == count
    with pytest.raises(ValueError, match=f"has {count} tokens, but the embedding only {count - 1} rows"):
        tokenizer_from_gguf(metadata, count - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "tokenizer model 't5' is not supported, only 'gpt2', 'llama'"),
        ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of' is not supported; supported: .*smollm"),
        ({"tokens": []}, "lacks tokenizer.ggml.tokens"),
        ({"token_type": [1, 1]}, "but 2 token types"),
        ({"merges": ["q zzz"]}, "cannot be built: .*zzz"),
        ({"merges": ["q"]}, "tokenizer.ggml.merges has 'q'"),
        ({"merges": ["q  r"]}, "must be two tokens"),
        ({"model": "llama"}, "but 0 scores"),
        ({"model": "llama", "scores": [0.0] * 5}, "but 5 scores"),
        ({"model": "llama", "scores": [float("nan")] * 420}, "scores that are no finite numbers"),
        ({"model": "llama", "scores": ["a"] * 420}, "scores must be a list of numbers"),
        ({"model": ["gpt2"]}, r"model \['gpt2'\] is not supported"),
        ({"pre": 7}, "pre-tokenizer 7 is not supported"),
        ({"merges": []}, "lacks tokenizer.ggml.merges, without which every byte would be a token"),
        ({"merges": [1, 2]}, "merges must be a list of texts"),
        ({"tokens": [1, 2]}, "tokens must be a list of texts"),
        ({"tokens": "abc"}, "tokens must be a list of texts"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "has the token 'a' twice, as 0 and 2"),
        ({"token_type": [9] * 420}, "has the type 9 for the token '<|endoftext|>'"),
        ({"eos_token_id": 420}, "eos_token_id = 420 is no token: there are 420"),
        ({"bos_token_id": -7}, "bos_token_id = -7 is no token"),
        ({"eot_token_id": "2"}, "eot_token_id = '2' is no token"),
        ({"add_bos_token": "yes"}, "add_bos_token = 'yes' must be true or false"),
    ],
)
def test_metadata_that_do_not_fit_are_one_clear_line(change, message):
    metadata = metadata_of(byte_level("gpt-2"), "gpt-2", **change)
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_gguf(metadata)
    assert "\n" not in str(error.value)


@pytest.mark.real_model
def test_tokenizer_of_the_default_model(default_gguf):
    tokenizer = open_checkpoint(default_gguf).tokenizer()

    def tokens(text):
        return [tokenizer.processor.id_to_token(i) for i in tokenizer.encode(text).tolist()]

    assert tokens("How are you?") == ["How", "Ġare", "Ġyou", "?"]
    assert tokens("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    assert tokens("<|im_start|>user\n")[:2] == ["<|im_start|>", "user"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.use_bos) == (1, 2, (2, 0), False)
    assert "<|im_start|>" in tokenizer.chat_template
    for text in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def merge_by_score(text, scores):
    """SentencePiece BPE, slowly: always join the neighbours that make the best-scored piece, leftmost first."""
    parts = list(text)
    while True:
        joined = [
            (-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores
        ]
        if not joined:
            return parts
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.real_model
def test_tokenizer_of_gemma_follows_its_scores(gemma_gguf):
    checkpoint = open_checkpoint(gemma_gguf)
    tokenizer, metadata = checkpoint.tokenizer(), checkpoint._file.metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = {t: metadata["tokenizer.ggml.scores"][i] for i, t in enumerate(tokens) if types[i] == NORMAL}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.use_bos) == (2, 1, (1, 106), True)
    texts = [
        "Internationalisation of tokenizers, 1984!",
        "Über die Brücke",
        "東京都に住んでいます",
        "Привет, мир",
        "def f(x): return x**2",
    ]
    for text in texts:
        expected = []
        for piece in merge_by_score(text.replace(" ", "▁"), scores):
            expected += [piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()]
        assert [tokenizer.processor.id_to_token(i) for i in tokenizer.encode(text, bos=False).tolist()] == expected
    for text in [*texts, *TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text
    assert tokenizer.encode("a  <table>\n\n").tolist()[2:] == [138, 168, 108]


STRANGE = [None, "", "x", -1, 0, 10**12, 2.5, float("nan"), True, [], [1], ["a"], [[1]], [None]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "key",
    [
        "model",
        "pre",
        "tokens",
        "token_type",
        "merges",
        "scores",
        "bos_token_id",
        "eos_token_id",
        "eot_token_id",
        "unknown_token_id",
        "padding_token_id",
        "add_bos_token",
        "add_space_prefix",
        "chat_template",
    ],
)
def test_strange_values_are_one_line_or_harmless(kind, key, sentencepiece_model):
    metadata = metadata_of(byte_level("gpt-2"), "gpt-2")
    if kind == "llama":
        metadata = metadata_of_sentencepiece(*sentencepiece_model)
    for value in STRANGE:
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        tokenizer, said = None, ""
        try:
            tokenizer = tokenizer_from_gguf(metadata | {name: value})
        except ValueError as error:
            said = str(error)
        assert "\n" not in said
        assert tokenizer is None or tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@pytest.mark.parametrize("types", [None, [NORMAL] * 263, [NORMAL] * 3 + [USER_DEFINED] * 256 + [NORMAL] * 4, [0] * 263])
def test_byte_tokens_are_known_by_their_text(types):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
    }
    ours = tokenizer_from_gguf(metadata | ({} if types is None else {"tokenizer.ggml.token_type": types}))
    assert ours.decode(ours.encode("ab é 漢")) == "ab é 漢"
