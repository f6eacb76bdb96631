"""The finished runs of comparisons, in a file with a JSON object a line."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "runs.jsonl"

Record = dict[str, Any]


class Records:
    """Finished runs by their key.

    Args:
        folder: of the file (None: they are not written).

    Attributes:
        path: the file.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / FILE_NAME
        self._records: dict[str, Record] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            for line in text.splitlines():
                if (record := _read(line)) is not None:
                    self._records[record["key"]] = record
            if text and not text.endswith("\n"):  # interrupted while it was written
                self._append("\n")

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Add a finished run."""
        self._records[record["key"]] = record
        if self.path is not None:
            self._append(json.dumps(record, ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def key_of(settings: Mapping[str, Any]) -> str:
    """A short text that is the same for the same settings only."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(line: str) -> Record | None:
    """The record of a line (None: it is not whole)."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "key" in record else None
