"""The tokenizer that the metadata of a GGUF file describes.

GGUF names the kind of pre-tokenizer and leaves its rules to the reader; the table below has them as the models'
own `tokenizer.json` files define them.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Processor

from litgpt.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# GGUF has one EOS id; chat models end a turn with another token, which can only be told by its text.
_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN_2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_O200K = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"


@dataclass(frozen=True)
class _PreTokenizer:
    """How a byte-level BPE cuts a text before merging: by each of `patterns` in turn.

    With `whole_words`, a cut-out word that is in the vocabulary is one token whatever the merges say. `add_bos` holds
    when the metadata do not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_DIGITS = _PreTokenizer((r"\p{N}", _GPT_2))
_PLAIN = _PreTokenizer((_GPT_2,))
_LLAMA_3 = _PreTokenizer((_CL100K,), whole_words=True, add_bos=True)
_QWEN = _PreTokenizer((_QWEN_2,), nfc=True)
_PRE_TOKENIZERS = {
    "default": _PreTokenizer((_PUNCTUATION, _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "olmo": _PLAIN,
    "mpt": _PLAIN,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama-bpe": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "dbrx": _PreTokenizer((_CL100K,)),
    "smaug-bpe": _PreTokenizer((_CL100K,)),
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "stablelm2": _PreTokenizer((_QWEN_2,)),
    "gpt-4o": _PreTokenizer((_O200K,)),
    "llama4": _PreTokenizer((_O200K,)),
    "tekken": _PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "falcon": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, r"[0-9][0-9][0-9]")),
}


def tokenizer_from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """Builds the tokenizer from the `tokenizer.*` entries of `metadata`.

    Kinds: `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE with byte fallback). Raises `ValueError` in one line
    for another kind, an unknown pre-tokenizer, and entries that are missing or do not fit together.
    """
    values = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    kind = values.get("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ValueError(f"GGUF tokenizer model {kind!r} is not supported, only {', '.join(map(repr, builders))}")
    tokens = values.get("tokens")
    if not tokens:
        raise ValueError("GGUF metadata lacks tokenizer.ggml.tokens")
    types = values.get("token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"GGUF tokenizer has {len(tokens)} tokens, but {len(types)} token types")
    processor, use_bos = builders[kind](values, tokens, types)
    use_bos = values.get("add_bos_token", use_bos)
    bos_id, eos_id = (_token_id(values, f"{which}_token_id", tokens) for which in ("bos", "eos"))
    if use_bos and bos_id is not None:
        bos = tokens[bos_id]
        processor.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
        )
    turn_ends = [_token_id(values, f"{which}_token_id", tokens) for which in ("eot", "eom")]
    turn_ends += [i for i, token in enumerate(tokens) if types[i] == _CONTROL and token in _END_OF_TURN]
    return Tokenizer.from_tokenizers(
        processor,
        bos_id=bos_id,
        eos_id=eos_id,
        use_bos=bool(use_bos) and bos_id is not None,
        chat_template=metadata.get("tokenizer.chat_template"),
        eos_ids=[i for i in turn_ends if i is not None],
    )


def _token_id(values: dict[str, Any], key: str, tokens: list[str]) -> int | None:
    token_id = values.get(key)
    return token_id if token_id is not None and token_id < len(tokens) else None


def _byte_level(values: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[Processor, bool]:
    name = values.get("pre", "default")
    pre = _PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ValueError(f"GGUF pre-tokenizer {name!r} is not supported; supported: {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges", [])]
    processor = _bpe(tokens, merges, ignore_merges=pre.whole_words)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    processor.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    processor.decoder = decoders.ByteLevel()
    if pre.nfc:
        processor.normalizer = normalizers.NFC()
    _add_tokens(processor, tokens, types)
    return processor, pre.add_bos


def _sentencepiece(values: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[Processor, bool]:
    scores = values.get("scores")
    if not scores or len(scores) != len(tokens):
        raise ValueError(f"GGUF tokenizer has {len(tokens)} tokens, but {len(scores or [])} scores")
    pieces = {t: -scores[i] for i, t in enumerate(tokens) if types[i] in (_NORMAL, _UNUSED)}
    unknown = next(iter(_of_type(_UNKNOWN, tokens, types)), None)
    if unknown is None and (unknown_id := _token_id(values, "unknown_token_id", tokens)) is not None:
        unknown = tokens[unknown_id]
    byte_fallback = _BYTE in types
    processor = _bpe(tokens, _merges(pieces), unk_token=unknown, byte_fallback=byte_fallback, fuse_unk=True)
    add_prefix = values.get("add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if add_prefix else []
    processor.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    processor.decoder = decoders.Sequence(steps)
    _add_tokens(processor, tokens, types)
    return processor, True


def _merges(cost: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the pieces of least cost first.

    SentencePiece merges whichever neighbours give the piece with the best score; BPE follows the rank of a merge.
    """
    merges = []
    for piece in sorted(cost, key=cost.__getitem__):
        for i in range(1, len(piece)):
            left = piece[:i]
            if left in cost and (right := piece[i:]) in cost:
                merges.append((left, right))
    return merges


def _bpe(tokens: list[str], merges: list[tuple[str, ...]], **options: Any) -> Processor:
    try:
        return Processor(models.BPE({token: i for i, token in enumerate(tokens)}, merges, **options))
    except Exception as error:  # the library raises bare `Exception`
        raise ValueError(f"GGUF tokenizer cannot be built: {' '.join(str(error).split())}") from None


def _add_tokens(processor: Processor, tokens: list[str], types: list[int]) -> None:
    """Marks what is found in a text before it is cut: control tokens, left out when decoding, and user-defined ones.

    What lies between them is encoded as a text of its own, as llama.cpp does.
    """
    processor.add_special_tokens([AddedToken(t, normalized=False) for t in _of_type(_CONTROL, tokens, types)])
    processor.add_tokens([AddedToken(t, normalized=False) for t in _of_type(_USER_DEFINED, tokens, types)])


def _of_type(kind: int, tokens: list[str], types: list[int]) -> list[str]:
    return [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
