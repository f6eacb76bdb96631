"""States of prompts by name, in files of one folder."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from litgpt.engine.prefixes import KeptPrefix
from litgpt.engine.session_file import read_session, write_session
from litgpt.fingerprint import fingerprint
from litgpt.kvcache import CacheSpec
from litgpt.model import GPT

log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".state"


class StateFolder:
    """The folder of a model's states.

    Args:
        folder: made when the first state is saved.
        model, spec: the model and its caches; states of others are refused.
    """

    def __init__(self, folder: Path, model: GPT, spec: CacheSpec) -> None:
        self.folder = folder
        self._about = {
            "model": model.config.name,
            "fingerprint": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache": repr(spec),
        }

    def path(self, name: str) -> Path:
        """The file of a state.

        Raises:
            ValueError: if the name is none: it could otherwise lead out of the folder.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"the name of a state has up to 64 letters, digits and ._- and begins with a letter or digit, got {name!r:.80}"
            )
        return self.folder / f"{name}{_SUFFIX}"

    def save(self, name: str, kept: KeptPrefix) -> None:
        """Write a state, in place of an earlier one of that name."""
        path = self.path(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, caches = {"tokens": torch.from_numpy(kept.tokens)}, []
        for layer, state in enumerate(kept.states):
            tensors |= {f"{layer}.{key}": x for key, x in state.items() if isinstance(x, torch.Tensor)}
            caches.append({key: x for key, x in state.items() if not isinstance(x, torch.Tensor)})
        write_session(
            path, {**self._about, "least": kept.least, "long_rope": kept.long_rope, "caches": caches}, tensors
        )

    def load(self, name: str) -> KeptPrefix:
        """A state, in memory-mapped tensors.

        Raises:
            FileNotFoundError: if there is none of that name.
            ValueError: if it is damaged, or of another model or other caches.
        """
        file = read_session(self.path(name))
        for key, value in self._about.items():
            if file.about.get(key) != value:
                raise ValueError(f"{file.path} was saved with another {key}: {file.about.get(key)!r}, not {value!r}")
        states = [dict(one) for one in file.about["caches"]]
        for key, x in file.tensors.items():
            layer, dot, rest = key.partition(".")
            if dot:
                states[int(layer)][rest] = x
        return KeptPrefix.of(file.tensors["tokens"].tolist(), file.about["least"], file.about["long_rope"], states)

    def load_all(self) -> Iterator[tuple[str, KeptPrefix]]:
        """All states that can be used, by name; others are logged."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                yield path.name.removesuffix(_SUFFIX), self.load(path.name.removesuffix(_SUFFIX))
            except ValueError as error:
                log.warning(f"a state is not used: {error}")

    def remove(self, name: str) -> None:
        """Remove a state; `FileNotFoundError` if there is none."""
        self.path(name).unlink()
