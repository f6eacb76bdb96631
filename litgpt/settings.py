"""Values from JSON and YAML files, checked for their type and range as they are read."""

import json
import re
import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from litgpt.git_lfs import refuse_lfs_pointer

LARGEST = 2**31 - 1  # of whole numbers: sizes beyond it fit no memory
_MISSING: Any = object()
_KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    dict: "names with values",
    list: "a list",
    type(None): "null",
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
# a text in quotes, or a comma before a closing bracket; and the end of a value whose comma is missing at the line's end
_LAST_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])')
_NO_COMMA = re.compile(r'("(?:[^"\\]|\\.)*"|[\]}\w])(?=\s*\n\s*")')


def shown(value: Any) -> str:
    """A value's shortened `repr`, for error messages."""
    try:
        text = _SHORT.repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:117]}..."


def listed(names: Collection[str], most: int = 5) -> str:
    """The first of some names, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type, given as in an annotation, such as `list[int] | None`.

    An int is a float too, true and false are neither. Numbers are finite.
    """
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if (origin := get_origin(kind)) in (list, tuple):
        return isinstance(value, (list, tuple)) and all(fits(one, get_args(kind)[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, get_args(kind)[1]) for one in value.values())
    if kind is float:
        # an int of hundreds of digits does not fit a float
        return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def described(kind: Any) -> str:
    """A type in words: "a whole number or null"."""
    if isinstance(kind, UnionType):
        return " or ".join(described(one) for one in get_args(kind))
    if get_origin(kind) is list:
        return f"a list, each entry {described(get_args(kind)[0])}"
    return _KINDS[get_origin(kind) or kind]


class Settings:
    """The names and values of a file; the methods below read a value and check it.

    A name without `default` is required. Null is allowed only with `null=True`, and is `None` then. An invalid value is a
    `ValueError` with the file, the name and the value.

    Args:
        values: The names and values.
        where: The file's name for messages.
        path: Names of the sections that hold these values, with dots.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json", path: str = "") -> None:
        self._values, self.where, self._path = values, where, path

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def equals(self, other: "Settings") -> bool:
        """Whether both have the same names and values."""
        return self._values == other._values

    def is_set(self, key: str) -> bool:
        """Whether the file has the name, and its value is not null."""
        return self._values.get(key) is not None

    def value(self, key: str, kind: Any, default: Any = _MISSING) -> Any:
        """A value of any type (see `fits`)."""
        if key not in self._values:
            if default is _MISSING:
                raise ValueError(f"{self.where} lacks {self._path + key!r}")
            return default
        value = self._values[key]
        if not fits(value, kind):
            raise self.error(key, f"must be {described(kind)}")
        return value

    def whole(
        self, key: str, default: Any = _MISSING, *, least: int = 1, most: int = LARGEST, null: bool = False
    ) -> Any:
        """A whole number from `least` to `most`."""
        value = self.value(key, int | None if null else int, default)
        if key in self and value is not None and not least <= value <= most:
            raise self.error(key, f"must be from {least} to {most}")
        return value

    def number(
        self,
        key: str,
        default: Any = _MISSING,
        *,
        positive: bool = False,
        least: float | None = None,
        null: bool = False,
    ) -> Any:
        """A finite number, above 0 if `positive`, not below `least` if that is given."""
        value = self.value(key, float | None if null else float, default)
        if key in self and value is not None:
            if positive and value <= 0:
                raise self.error(key, "must be positive")
            if least is not None and value < least:
                raise self.error(key, f"must be at least {least}")
        return value

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """True or false; null means the default."""
        return self.value(key, bool, default) if self.is_set(key) else default

    def text(self, key: str, default: Any = _MISSING, *, null: bool = False) -> Any:
        """A text."""
        return self.value(key, str | None if null else str, default)

    def section(self, key: str) -> "Settings":
        """The names and values below a name; none if it is missing or null."""
        values = self.value(key, dict) if self.is_set(key) else {}
        return Settings(values, self.where, f"{self._path}{key}.")

    def only(self, key: str, allowed: Collection[Any], default: Any, whose: str) -> None:
        """Raises for a value that is not allowed; null means the default, unless it is allowed."""
        value = self._values.get(key, default)
        value = default if value is None and None not in allowed else value
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise ValueError(
                f"{self.where}: {self._path}{key} = {shown(value)} is not supported for {whose}, only {choices}"
            )

    def token_ids(self, key: str) -> list[int]:
        """The ids of one or several tokens."""
        value = self.value(key, int | list[int] | None, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not 0 <= token <= LARGEST for token in ids):
            raise self.error(key, "must be ids of tokens")
        return ids

    def merged(self, other: "Mapping[str, Any] | Settings") -> "Settings":
        """These values updated with the other's."""
        others = other._values if isinstance(other, Settings) else other
        return Settings({**self._values, **others}, self.where, self._path)

    def error(self, key: str, problem: str) -> ValueError:
        """The error for a name whose value has a problem."""
        return ValueError(f"{self.where}: {self._path}{key} = {shown(self._values.get(key))} {problem}")


def read_json(path: str | Path, repair: bool = False) -> dict[str, Any]:
    """Reads a JSON object; raises `ValueError` naming the file for any other content.

    With `repair`, superfluous and missing commas at the ends of lines are corrected with a warning.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: byte {error.start} is no UTF-8") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        values = _repaired(text) if repair else None
        refuse_lfs_pointer(path)
        if values is None:
            reason = "its lists or objects are nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"{path} is not valid JSON: {reason[:200]}") from None
        warnings.warn(f"{path} is not valid JSON ({error}): commas of invalid JSON were mended", stacklevel=2)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def repair_json(text: str) -> str:
    """JSON with commas removed before closing brackets and added at the ends of lines where they are missing."""
    return _NO_COMMA.sub(r"\1,", _LAST_COMMA.sub(lambda match: match[1] or "", text))


def _repaired(text: str) -> Any:
    try:
        return json.loads(repair_json(text))
    except (ValueError, RecursionError):
        return None


def read_yaml(path: str | Path, holds: str = "names and values") -> dict[str, Any]:
    """Reads names and values, which `holds` describes, from YAML; raises `ValueError` naming the file for other content."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_bytes())
    except OSError:
        raise
    except Exception as error:  # besides its own errors, those of invalid dates and numbers
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {reason[:200]}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold {holds}, found {type(values).__name__}")
    return values
