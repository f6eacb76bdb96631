"""Text to token ids and back, from a checkpoint's own tokenizer files."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from litgpt.atomic_file import replacing
from litgpt.errors import one_line
from litgpt.git_lfs import refuse_lfs_pointer
from litgpt.settings import LARGEST, Settings, fits, read_json
from litgpt.standard_streams import check_text, is_text

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Their slow implementations in `transformers` prepend BOS unless `add_bos_token` says otherwise.
_BOS_BY_DEFAULT = ("Llama", "CodeLlama", "Gemma")


class Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json`, else `tokenizer.model` (SentencePiece).

    BOS and EOS ids are read from `tokenizer_config.json`, `generation_config.json` and `config.json`, in this order. BOS
    is prepended if `add_bos_token` in `tokenizer_config.json` is true, or is left out and the post-processor of
    `tokenizer.json` prepends it.

    Attributes: `bos_id`, `eos_id` (`None` where there is none), `eos_ids` (every id that ends a text), `use_bos`,
    `special_tokens` (name, such as "pad_token" -> text, as templates use them), `chat_template` (a Jinja template or
    `None`), `backend` ("huggingface" or "sentencepiece"), `processor` (the library's object), `vocab_size` (entries of
    the base vocabulary), `n_tokens` (the added tokens counted too).

    Raises `NotADirectoryError` or `FileNotFoundError` for a missing folder or missing files, `ValueError` for files that
    cannot be read, and `ImportError` if `tokenizer.model` needs the `sentencepiece` package.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        folder = Path(checkpoint_dir)
        if not folder.is_dir():
            raise NotADirectoryError(f"No tokenizer: {str(folder)!r} is not a folder")
        if (path := folder / "tokenizer.json").is_file():
            self._take(_HuggingFace.from_file(path))
        elif (path := folder / "tokenizer.model").is_file():
            self._take(_SentencePiece.from_file(path))
        else:
            raise FileNotFoundError(f"No tokenizer in {str(folder)!r}: neither tokenizer.json nor tokenizer.model")
        self._config = _read_optional(folder / "tokenizer_config.json")
        model_configs = [_read_optional(folder / name) for name in ("generation_config.json", "config.json")]
        bos_ids = [self._configured_id("bos"), *(i for c in model_configs for i in _ids(c.get("bos_token_id")))]
        eos_ids = [self._configured_id("eos"), *(i for c in model_configs for i in _ids(c.get("eos_token_id")))]
        self.bos_id: int | None = next((i for i in bos_ids if i is not None), None)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in eos_ids if i is not None))
        self.eos_id: int | None = next(iter(self.eos_ids), None)
        self.use_bos = self.check_if_bos_token_used(folder)
        self.chat_template: str | None = _read_chat_template(folder, self._config)
        self.special_tokens = _read_special_tokens(folder, self._config)

    @classmethod
    def from_tokenizers(
        cls,
        processor: "tokenizers.Tokenizer",
        *,
        bos_id: int | None,
        eos_id: int | None,
        use_bos: bool,
        chat_template: str | None = None,
        eos_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
    ) -> "Tokenizer":
        """Wraps a tokenizer that exists in memory, for example one built from a GGUF file."""
        self = cls.__new__(cls)
        self._take(_HuggingFace(processor))
        self._config = {}
        self.bos_id, self.eos_id, self.use_bos, self.chat_template = bos_id, eos_id, use_bos, chat_template
        self.eos_ids = tuple(dict.fromkeys([*_ids(eos_id), *eos_ids]))
        self.special_tokens = dict(special_tokens or {})
        return self

    def _take(self, backend: "_Backend") -> None:
        self._backend, self.backend, self.processor = backend, backend.name, backend.processor
        self.vocab_size, self.n_tokens = backend.vocab_size, backend.n_tokens

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_id is None else self._backend.id_to_token(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        return None if self.eos_id is None else self._backend.id_to_token(self.eos_id)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the vocabulary and of all settings that change how a text is encoded."""
        settings = json.dumps([self.bos_id, self.eos_ids, self.use_bos, self.chat_template])
        return hashlib.sha256(self._backend.serialize() + settings.encode()).hexdigest()

    def token_to_id(self, token: str) -> int:
        """The id of `token`; `ValueError` if it is not in the vocabulary."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"token {token!r} is not in the vocabulary")
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """The token with this id (`None`: there is none)."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token anywhere but at the start of a text; special tokens have none."""
        return self._backend.piece(token_id)

    def check_if_bos_token_used(self, checkpoint_dir: Path) -> bool:
        """Whether `encode` prepends BOS by default, by the files in `checkpoint_dir`."""
        config = _read_optional(Path(checkpoint_dir) / "tokenizer_config.json")
        if self.bos_id is None:
            return False
        if isinstance(config.get("add_bos_token"), bool):
            return config["add_bos_token"]
        return self._backend.adds_bos(self.bos_id, str(config.get("tokenizer_class")))

    def encode(
        self,
        string: str,
        device: torch.device | str | None = None,
        bos: bool | None = None,
        eos: bool = False,
        max_length: int = -1,
    ) -> torch.Tensor:
        """Token ids of `string`, shape (T,), `torch.int`.

        Special tokens that are spelled out in `string` count as such. `bos=None` means `use_bos`; a BOS or EOS that is
        there already is not doubled. `max_length > 0` truncates. Raises `ValueError` for a lone surrogate in `string`, and
        for a BOS or EOS that the tokenizer does not have.
        """
        check_text("the text", string)
        ids = self._with_ends(self._backend.encode(string), bos, eos)
        if max_length > 0:
            ids = ids[:max_length]
        return torch.tensor(ids, dtype=torch.int, device=device)

    def encode_batch(self, requests: Sequence[tuple[str, bool | None, bool]]) -> list[list[int]]:
        """As `encode`, for many texts on all cores: token ids of each (text, bos, eos)."""
        for text, _, _ in requests:
            check_text("the text", text)
        many = self._backend.encode_batch([text for text, _, _ in requests])
        return [self._with_ends(ids, bos, eos) for ids, (_, bos, eos) in zip(many, requests, strict=True)]

    def encode_with_places(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Of many texts, on all cores: token ids, without BOS and EOS, and for each token the characters up to its end.

        Only with the backend "huggingface": SentencePiece does not tell.
        """
        for text in texts:
            check_text("the text", text)
        return self._backend.encode_with_places(texts)

    def _with_ends(self, ids: list[int], bos: bool | None, eos: bool) -> list[int]:
        if self.use_bos if bos is None else bos:
            if self.bos_id is None:
                raise ValueError("bos=True, but this tokenizer defines no BOS token")
            if ids[:1] != [self.bos_id]:
                ids = [self.bos_id, *ids]
        if eos:
            if self.eos_id is None:
                raise ValueError("eos=True, but this tokenizer defines no EOS token")
            if ids[-1:] != [self.eos_id]:
                ids = [*ids, self.eos_id]
        return ids

    def decode(self, tensor: torch.Tensor | list[int]) -> str:
        """The text of token ids, without special tokens and ids outside the vocabulary."""
        ids = _to_list(tensor)
        text = self._backend.decode(ids)
        # for bytes that are not UTF-8, some libraries replace valid neighbours too
        return "".join(self.decode_stream([ids])) if "\ufffd" in text else text

    def decode_stream(
        self, token_stream: Iterable[torch.Tensor | list[int] | int], device: torch.device | str | None = None
    ) -> Iterator[str]:
        """Yields the text of tokens as they arrive; joined, it equals `decode` of all of them.

        Every token is decoded once. A character of several tokens is yielded when it is complete; one that is incomplete
        at the end is U+FFFD.
        """
        decoder = StreamDecoder(self)
        for tokens in token_stream:
            if text := decoder.push(_to_list(tokens)):
                yield text
        if rest := decoder.finish():
            yield rest

    def save(self, folder: Path | str) -> None:
        """Writes the tokenizer for `Tokenizer(folder)` and `transformers.AutoTokenizer`.

        The BOS and EOS ids are added to `generation_config.json`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast" if self.backend == "huggingface" else "LlamaTokenizer",
            "clean_up_tokenization_spaces": False,
            **self._config,
            **self.special_tokens,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "add_bos_token": self.use_bos,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        generation = _read_optional(folder / "generation_config.json")
        generation |= {"bos_token_id": self.bos_id} if self.bos_id is not None else {}
        generation |= {"eos_token_id": list(self.eos_ids)} if self.eos_ids else {}
        files = {self._backend.filename: self._backend.serialize(), "tokenizer_config.json": _json(config)}
        if generation:
            files["generation_config.json"] = _json(generation)
        for name, data in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(data)

    def _configured_id(self, which: str) -> int | None:
        """The id of `bos` or `eos` by `tokenizer_config.json`, else by the SentencePiece model itself."""
        token = self._config.get(f"{which}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token_id = self._backend.token_to_id(token) if isinstance(token, str) and is_text(token) else None
        return self._backend.own_id(which) if token_id is None else token_id


class StreamDecoder:
    """Tokens to text as they arrive: what `Tokenizer.decode_stream` yields, for callers that have the tokens one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer._backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._head: list[int] | None = []  # the first tokens, up to one that is not only spaces; None after it
        self._separator = b""  # after the last token, which the last token of a text has not

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is complete with these tokens."""
        data = b""
        for token_id in tokens:
            piece = self._backend.piece(token_id)
            if self._head is not None:
                self._head.append(token_id)
                if not piece.strip(b" "):
                    continue
                piece, self._head = self._first_piece(self._head), None
            if piece:
                inner = piece.removesuffix(self._backend.separator)
                data, self._separator = data + self._separator + inner, piece[len(inner) :]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return self._utf8.decode(b"", final=True) if self._head is None else self._backend.decode(self._head)

    def _first_piece(self, ids: list[int]) -> bytes:
        """The bytes of `ids`, of which only the last is not only spaces, at the start of a text: decoders drop spaces there."""
        text = self._backend.decode(ids)
        if "\ufffd" not in text:
            return text.encode() + self._backend.separator * self._backend.piece(ids[-1]).endswith(
                self._backend.separator
            )
        # a byte of a longer character: an ordinary token in its place shows how many spaces are dropped
        visible = self._backend.visible_id
        shown = self._backend.decode([*ids[:-1], visible]).encode()
        spaces, last = (b"".join(map(self._backend.piece, part)) for part in (ids[:-1], ids[-1:]))
        dropped = _leading_spaces(spaces + self._backend.piece(visible)) - _leading_spaces(shown)
        return (spaces + last)[min(max(dropped, 0), _leading_spaces(spaces + last)) :]


class _Backend:
    """A tokenizer of one of the two libraries."""

    name: str
    filename: str
    processor: Any
    vocab_size: int
    n_tokens: int
    separator = b""  # after a word that another one follows

    @cached_property
    def visible_id(self) -> int:
        """A token that is an ordinary character wherever it stands."""
        return next(i for i in range(self.n_tokens) if self.piece(i).strip(b" ").isalnum())


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Makes errors of the `tokenizers` library a `ValueError`: it raises bare `Exception`, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {one_line(error)}") from None
        raise


class _HuggingFace(_Backend):
    """A tokenizer of the `tokenizers` library, without its BOS and EOS handling, truncation and padding."""

    name = "huggingface"
    filename = "tokenizer.json"

    def __init__(self, processor: "tokenizers.Tokenizer") -> None:
        processor.no_truncation()
        processor.no_padding()
        # The library remembers the tokens of 10,000 words in every thread, up to 100 MB each where a whole text counts as a word.
        # Without, a text of 465,000 characters takes 0.33 instead of 0.28 s.
        resize = getattr(processor.model, "_resize_cache", None)
        if resize is not None:
            resize(0)
        self.processor = processor
        self.vocab_size = processor.get_vocab_size(with_added_tokens=False)
        self.n_tokens = processor.get_vocab_size()
        self._special = {i for i, token in processor.get_added_tokens_decoder().items() if token.special}
        decoder = {} if processor.decoder is None else json.loads(processor.decoder.__getstate__())
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        self._suffix: str = steps.get("BPEDecoder", {}).get("suffix", "")
        self.separator = b" " if self._suffix else b""
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: Path) -> "_HuggingFace":
        from tokenizers import Tokenizer as Processor

        refuse_lfs_pointer(path)
        with _refusing(f"{path} is not a tokenizer that can be read"):
            return cls(Processor.from_str(path.read_bytes().decode("utf-8-sig")))

    def encode(self, text: str) -> list[int]:
        with _refusing("the tokenizer cannot encode the text"):
            return self.processor.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.processor.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_places(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        found = self.processor.encode_batch(texts, add_special_tokens=False)
        return [(tokens.ids, [end for _, end in tokens.offsets]) for tokens in found]

    def decode(self, ids: list[int]) -> str:
        with _refusing("the tokenizer cannot decode the tokens"):
            return self.processor.decode(ids, skip_special_tokens=True)

    def id_to_token(self, token_id: int) -> str | None:
        return self.processor.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.processor.token_to_id(token)

    def own_id(self, which: str) -> int | None:
        return None

    def adds_bos(self, bos_id: int, tokenizer_class: str) -> bool:
        return self.processor.encode("a").ids[:1] == [bos_id] != self.encode("a")[:1]

    def serialize(self) -> bytes:
        return self.processor.to_str(pretty=True).encode()

    def piece(self, token_id: int) -> bytes:
        if token_id not in self._pieces:
            self._pieces[token_id] = self._make_piece(token_id)
        return self._pieces[token_id]

    def _make_piece(self, token_id: int) -> bytes:
        token = self.processor.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._byte_level:
            if all(c in _BYTE_OF_CHAR for c in token):
                return bytes(_BYTE_OF_CHAR[c] for c in token)
            return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        if self._suffix:
            return token.replace(self._suffix, " ").encode()
        once, twice = self.decode([token_id]), self.decode([token_id, token_id])
        return twice[len(once) :].encode()


class _SentencePiece(_Backend):
    """A tokenizer of the `sentencepiece` library."""

    name = "sentencepiece"
    filename = "tokenizer.model"

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.vocab_size = self.n_tokens = processor.vocab_size()
        control = {i: processor.id_to_piece(i) for i in range(self.vocab_size) if processor.is_control(i)}
        self._control = {token: i for i, token in control.items()}
        self._split = re.compile(f"({'|'.join(map(re.escape, self._control))})") if control else None

    @classmethod
    def from_file(cls, path: Path) -> "_SentencePiece":
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ImportError(
                f"{path} is a SentencePiece model: reading it needs `pip install 'litgpt[sentencepiece]'`"
            ) from None
        refuse_lfs_pointer(path)
        try:
            return cls(SentencePieceProcessor(model_file=str(path)))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {one_line(error)}") from None

    def encode(self, text: str) -> list[int]:
        # the library itself never finds control tokens in a text
        parts = [text] if self._split is None else self._split.split(text)
        ids = ([self._control[p]] if p in self._control else self.processor.encode(p) for p in parts if p)
        return [i for part in ids for i in part]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if 0 <= i < self.vocab_size])

    def id_to_token(self, token_id: int) -> str | None:
        return self.processor.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        token_id = self.processor.piece_to_id(token)
        return token_id if self.processor.id_to_piece(token_id) == token else None

    def own_id(self, which: str) -> int | None:
        token_id = self.processor.bos_id() if which == "bos" else self.processor.eos_id()
        return token_id if token_id >= 0 else None

    def adds_bos(self, bos_id: int, tokenizer_class: str) -> bool:
        return tokenizer_class.startswith(_BOS_BY_DEFAULT)

    def serialize(self) -> bytes:
        return self.processor.serialized_model_proto()

    def piece(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None or self.processor.is_control(token_id):
            return b""
        if self.processor.is_byte(token_id):
            return bytes.fromhex(_BYTE_TOKEN.fullmatch(token)[1])
        if self.processor.is_unknown(token_id):
            return self.processor.decode([token_id]).encode()
        return token.replace("\u2581", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 bytes are themselves, the others are U+0100 and so on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _leading_spaces(data: bytes) -> int:
    return len(data) - len(data.lstrip(b" "))


def _to_list(tokens: torch.Tensor | list[int] | int) -> list[int]:
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.tolist()
    return [tokens] if isinstance(tokens, int) else list(tokens)


def _ids(value: Any) -> list[int]:
    """The valid ids in `bos_token_id` or `eos_token_id` of a config: missing, one id, or a list."""
    return [i for i in (value if isinstance(value, list) else [value]) if fits(i, int) and 0 <= i <= LARGEST]


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, repair=path.name == "generation_config.json") if path.is_file() else {}


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The Jinja template of a checkpoint folder, in any of the files where versions of `transformers` keep it."""
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: byte {error.start}") from None
    name = "tokenizer_config.json" if config.get("chat_template") else "chat_template.json"
    values = config if config.get("chat_template") else _read_optional(folder / name)
    settings = Settings(values, str(folder / name))
    template = settings.value("chat_template", str | list[dict] | None, None)
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry.get("name"), str)}
        template = named.get("default", next(iter(named.values()), None))
        if not isinstance(template, str | None):
            raise settings.error("chat_template", "must be a text, or a list of a name and a template each")
    return template


def _read_special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The texts of the `..._token` entries; of the two files that have them the newer one counts."""
    tables = [config, config.get("extra_special_tokens"), config.get("model_specific_special_tokens")]
    if "added_tokens_decoder" not in config:
        tables.append(_read_optional(folder / "special_tokens_map.json"))
    found: dict[str, str] = {}
    for table in tables:
        for name, token in table.items() if isinstance(table, dict) else ():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                found.setdefault(name, text)
    return found


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode()
