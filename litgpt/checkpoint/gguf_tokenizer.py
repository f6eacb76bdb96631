"""The tokenizer that the metadata of a GGUF file describe.

GGUF has only the name of the pre-tokenizer; the table below has its rules, from the models' own `tokenizer.json` files.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Processor

from litgpt.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# GGUF has one EOS id; chat models end a turn with another token, which is known by its text, as in llama.cpp
_ENDS = (
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn> <turn|> "
    "<|tool_response> <|endoftext|> <|end_of_text|> <|end_of_sentence|> <｜end▁of▁sentence｜> <|eos|> <eos> <EOT> _<EOT> "
    "[EOT] [EOS] <end_of_utterance> <|eot|> <|eom|> <|endofturn|> [|endofturn|] <|END_OF_TURN_TOKEN|>"
)
# where a vocabulary has both of a pair, <|end|> only ends one of the messages of a turn
_ENDS_BESIDE_MESSAGES = (("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>"))
_HTML_END = "</s>"  # ends a text in some vocabularies, and is an HTML tag in others
_MARKER = re.compile(r"<\|[^<>\s]+\|>|<｜[^<>\s]+｜>|<(start|end)_of_turn>")  # never ordinary text
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NO_ID = 2**32 - 1  # -1, by converters that had none

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
    """How a byte-level BPE splits a text before merging: by each of `patterns` in turn.

    With `whole_words`, a split that is in the vocabulary is one token even without merges for it. `add_bos` is the default
    where the metadata have none.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_PRE_TOKENIZERS_BY_NAMES = {
    "default": _PreTokenizer((_PUNCTUATION, _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "smollm starcoder refact command-r": _PreTokenizer((r"\p{N}", _GPT_2)),
    "gpt-2 phi-2 olmo mpt": _PreTokenizer((_GPT_2,)),
    "llama3 llama-v3 llama-bpe falcon3": _PreTokenizer((_CL100K,), whole_words=True, add_bos=True),
    "dbrx smaug-bpe": _PreTokenizer((_CL100K,)),
    "qwen2 deepseek-r1-qwen": _PreTokenizer((_QWEN_2,), nfc=True),
    "stablelm2": _PreTokenizer((_QWEN_2,)),
    "gpt-4o llama4": _PreTokenizer((_O200K,)),
    "tekken": _PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "falcon": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, r"[0-9][0-9][0-9]")),
}
_PRE_TOKENIZERS = {name: pre for names, pre in _PRE_TOKENIZERS_BY_NAMES.items() for name in names.split()}
# names in GGUF -> names in chat templates
_SPECIAL = {
    "bos": "bos_token",
    "eos": "eos_token",
    "eot": "",
    "eom": "",
    "unknown": "unk_token",
    "seperator": "sep_token",
}
_SPECIAL |= {"padding": "pad_token", "mask": "mask_token"}


def tokenizer_from_gguf(metadata: dict[str, Any], n_rows: int | None = None) -> Tokenizer:
    """Builds the tokenizer from the `tokenizer.*` entries of `metadata`.

    Kinds: `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE with byte fallback). Tokens that mark turns or end a text
    are known by their text too, since converters give them wrong types. Raises `ValueError` in one line for another kind,
    an unknown pre-tokenizer, inconsistent entries, and more tokens than the `n_rows` of the embedding.
    """
    values = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    kind = values.get("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise ValueError(f"GGUF tokenizer model {kind!r} is not supported, only {', '.join(map(repr, builders))}")
    tokens = _list_of(str, values, "tokens")
    if not tokens:
        raise ValueError("GGUF metadata lacks tokenizer.ggml.tokens")
    if n_rows is not None and len(tokens) > n_rows:
        raise ValueError(f"GGUF tokenizer has {len(tokens)} tokens, but the embedding only {n_rows} rows")
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if ids.setdefault(token, i) != i:
            raise ValueError(f"GGUF tokenizer has the token {token!r} twice, as {ids[token]} and {i}")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"tokenizer.chat_template must be a text, not {type(template).__name__}")
    special = {which: _token_id(values, f"{which}_token_id", tokens) for which in _SPECIAL}
    if kind == "llama":  # SentencePiece's own default
        for which, i, text in (("bos", 1, "<s>"), ("eos", 2, "</s>")):
            if special[which] is None and f"{which}_token_id" not in values and ids.get(text) == i:
                special[which] = i
    types = _types(values, tokens, kind)
    ends = _ends(ids, types, special)
    _correct_types(tokens, types, [*ends, special["bos"]])
    processor, use_bos = builders[kind](values, tokens, types)
    use_bos = bool(_flag(values, "add_bos_token", use_bos)) and special["bos"] is not None
    if use_bos:
        bos = tokens[special["bos"]]
        processor.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, special["bos"])]
        )
    named = {_SPECIAL[which]: tokens[i] for which, i in special.items() if _SPECIAL[which] and i is not None}
    return Tokenizer.from_tokenizers(
        processor,
        bos_id=special["bos"],
        eos_id=special["eos"],
        use_bos=use_bos,
        chat_template=template,
        eos_ids=ends,
        special_tokens=named,
    )


def _list_of(kind: type | tuple[type, ...], values: dict[str, Any], key: str) -> list[Any]:
    found = values.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
        raise ValueError(f"tokenizer.ggml.{key} must be a list of {'texts' if kind is str else 'numbers'}")
    return found


def _flag(values: dict[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if value not in (True, False):
        raise ValueError(f"tokenizer.ggml.{key} = {value!r} must be true or false")
    return bool(value)


def _token_id(values: dict[str, Any], key: str, tokens: list[str]) -> int | None:
    token_id = values.get(key)
    if token_id is None or token_id in (-1, _NO_ID):
        return None
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(f"tokenizer.ggml.{key} = {token_id!r} is no token: there are {len(tokens)}")
    return token_id


def _types(values: dict[str, Any], tokens: list[str], kind: str) -> list[int]:
    types = list(_list_of(int, values, "token_type"))
    if not types:
        types = [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"GGUF tokenizer has {len(tokens)} tokens, but {len(types)} token types")
    strange = next((i for i, its_type in enumerate(types) if its_type not in range(_BYTE + 1)), None)
    if strange is not None:
        raise ValueError(f"GGUF tokenizer has the type {types[strange]} for the token {tokens[strange]!r}, not 1 to 6")
    if kind == "llama":  # llama.cpp knows byte tokens by their text, whatever their type
        return [
            _BYTE if _BYTE_TOKEN.fullmatch(t) else its_type or _NORMAL
            for t, its_type in zip(tokens, types, strict=True)
        ]
    return [its_type or _NORMAL for its_type in types]


def _ends(ids: dict[str, int], types: list[int], special: dict[str, int | None]) -> list[int]:
    """The ids of tokens that end a text or a turn: first those in the metadata, then those known by their text."""
    ends = [special[which] for which in ("eos", "eot", "eom") if special[which] is not None]
    known = [token for token in _ENDS.split() if token in ids]
    if "<|end|>" in known and any({*pair} <= ids.keys() for pair in _ENDS_BESIDE_MESSAGES):
        known.remove("<|end|>")
    ends += sorted(ids[token] for token in known)
    if _HTML_END in ids and (types[ids[_HTML_END]] == _CONTROL or not ends):
        ends.append(ids[_HTML_END])
    return list(dict.fromkeys(ends))


def _correct_types(tokens: list[str], types: list[int], special: list[int | None]) -> None:
    """Gives the control type to tokens that begin or end a text, and to markers that have the normal type."""
    for i in special:
        if i is not None and re.fullmatch(r"_?<.+>|\[.+\]", tokens[i]):
            types[i] = _CONTROL
    for i, token in enumerate(tokens):
        if types[i] == _NORMAL and token[:1] == "<" and _MARKER.fullmatch(token):
            types[i] = _CONTROL


def _byte_level(values: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[Processor, bool]:
    name = values.get("pre", "default")
    pre = _PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ValueError(f"GGUF pre-tokenizer {name!r} is not supported; supported: {known}")
    merges = [tuple(merge.split(" ")) for merge in _list_of(str, values, "merges")]
    if wrong := next((merge for merge in merges if len(merge) != 2 or not all(merge)), None):
        raise ValueError(
            f"tokenizer.ggml.merges has {' '.join(wrong)!r}, which must be two tokens with a space between"
        )
    if not merges and any(its_type == _NORMAL and len(t) > 1 for t, its_type in zip(tokens, types, strict=True)):
        raise ValueError(
            "GGUF tokenizer of model 'gpt2' lacks tokenizer.ggml.merges, without which every byte would be a token: "
            "convert the model again, or take another file of it"
        )
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
    scores = _list_of((int, float), values, "scores")
    if len(scores) != len(tokens):
        raise ValueError(f"GGUF tokenizer has {len(tokens)} tokens, but {len(scores)} scores")
    if not all(map(math.isfinite, scores)):
        raise ValueError("GGUF tokenizer has scores that are no finite numbers")
    costs = {t: -scores[i] for i, t in enumerate(tokens) if types[i] in (_NORMAL, _UNUSED)}
    unknown = next(iter(_of_type(_UNKNOWN, tokens, types)), None)
    if unknown is None and (unknown_id := _token_id(values, "unknown_token_id", tokens)) is not None:
        unknown = tokens[unknown_id]
    byte_fallback = _BYTE in types
    processor = _bpe(tokens, _merges(costs), unk_token=unknown, byte_fallback=byte_fallback, fuse_unk=True)
    add_prefix = _flag(values, "add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if add_prefix else []
    processor.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    processor.decoder = decoders.Sequence(steps)
    _add_tokens(processor, tokens, types)
    return processor, True


def _merges(cost: dict[str, float]) -> list[tuple[str, str]]:
    """All merges of two tokens into a third, in the order of its cost.

    SentencePiece merges the neighbours that give the token with the best score; BPE follows the rank of a merge.
    """
    merges = []
    for token in sorted(cost, key=cost.__getitem__):
        for i in range(1, len(token)):
            left = token[:i]
            if left in cost and (right := token[i:]) in cost:
                merges.append((left, right))
    return merges


def _bpe(tokens: list[str], merges: list[tuple[str, ...]], **options: Any) -> Processor:
    try:
        return Processor(models.BPE({token: i for i, token in enumerate(tokens)}, merges, **options))
    except Exception as error:  # the library raises bare `Exception`
        raise ValueError(f"GGUF tokenizer cannot be built: {' '.join(str(error).split())}") from None


def _add_tokens(processor: Processor, tokens: list[str], types: list[int]) -> None:
    """Adds the tokens that are found before a text is split: control tokens, left out when decoding, and user-defined ones.

    The text between them is encoded on its own, as in llama.cpp.
    """
    processor.add_special_tokens([AddedToken(t, normalized=False) for t in _of_type(_CONTROL, tokens, types)])
    processor.add_tokens([AddedToken(t, normalized=False) for t in _of_type(_USER_DEFINED, tokens, types)])


def _of_type(kind: int, tokens: list[str], types: list[int]) -> list[str]:
    return [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
