"""Jinja for templates that are not trusted: they see only their variables, and have limits on size and time."""

import ctypes
import json
import re
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Environment, Template, TemplateError, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SIZE = 10_000_000  # characters, or elements of a list
SECONDS = 5.0
_MAX_MADE = 100 * MAX_SIZE  # by all sums and products of one run
_made = threading.local()
_MAX_WIDTH = 100_000
_WIDE = re.compile(r"\d{6,}")  # a width in a format
_PADDING = "batch center expandtabs indent ljust rjust round slice to_bytes tojson zfill"


class TemplateRefusal(TemplateError):
    """The template called `raise_exception`, e.g. because it has no system role."""


class TemplateLimit(TemplateError):
    """The template writes more text, or takes more time, than any conversation needs."""


def render(source: str, variables: dict[str, Any]) -> str:
    """Renders the template `source` with the extensions, filters and functions of chat templates in `transformers`.

    Raises `TemplateRefusal`, `TemplateLimit`, and any other error of the template.
    """
    template = _compile(source)
    result: list[Any] = []

    def work() -> None:
        try:
            parts, size = [], 0
            for part in template.generate(variables):
                size += len(part)
                if size > MAX_SIZE:
                    raise _too_large()
                parts.append(part)
            result.append("".join(parts))
        except BaseException as error:
            result.append(error)

    # a thread, since an exception can be raised in it wherever the template is
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TemplateLimit))
        raise TemplateLimit(f"it takes longer than {SECONDS:g} seconds")
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _too_large() -> TemplateLimit:
    return TemplateLimit(f"it makes a text or list of more than {MAX_SIZE:,} elements")


def _size(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters and elements of a value and of its elements; one that is in it twice counts twice."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 1
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = 0  # holds itself
        items = value.items() if isinstance(value, dict) else value
        known[id(value)] = len(value) + sum(_size(item, known) for item in items)
    return known[id(value)]


def _checked(value: Any) -> Any:
    if _size(value) > MAX_SIZE:
        raise _too_large()
    return value


def _join(parts: Iterable[Any]) -> str:
    return "".join(map(str, _checked(list(parts))))


def _check_arguments(name: str, value: Any, arguments: list[Any]) -> None:
    """Raises for a filter or method whose result would be large: padding, formats with a width, joining, replacing."""
    if name in ("format", "strftime_now") and any(isinstance(a, str) and _WIDE.search(a) for a in (value, *arguments)):
        raise _too_large()
    if name == "join":
        items, separator = (arguments[:1], value) if isinstance(value, str) else (value, arguments)
        count = len(items[0] if items is not value else value) if isinstance(items, (list, tuple)) and items else 1
        if _size(items) + _size(separator) * count > MAX_SIZE:
            raise _too_large()
    elif name == "replace" and len(arguments) > 1 and _size(value) * _size(arguments[1]) > MAX_SIZE:
        if str(value).count(str(arguments[0])) * _size(arguments[1]) > MAX_SIZE:
            raise _too_large()
    elif name in _PADDING.split() and any(isinstance(a, int) and abs(a) > _MAX_WIDTH for a in arguments):
        raise _too_large()


def _guarded(name: str, function: Callable) -> Callable:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        values = [
            _checked(a) for a in (*args, *kwargs.values()) if not isinstance(a, (Context, EvalContext, Environment))
        ]
        _check_arguments(name, values[0] if values else None, values[1:])
        return _checked(function(*args, **kwargs))

    return guarded


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """Renders the body of `{% generation %} ... {% endgeneration %}`, which marks answers for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _EmptyInSums(Undefined):
    """A missing value, such as a BOS token, adds nothing to a text."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _Generator
    concat = staticmethod(_join)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            undefined=_EmptyInSums,
            finalize=_checked,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.globals.update(raise_exception=_refuse, strftime_now=_now)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sequence, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(count, int) and not isinstance(sequence, int) and _size(sequence) * count > MAX_SIZE:
                raise _too_large()
        elif operator == "**" and isinstance(right, int) and abs(right) > 1000:
            raise TemplateLimit(f"it raises a number to the power of {right}")
        elif operator == "%" and isinstance(left, str) and (_WIDE.search(left) or "*" in left):
            raise _too_large()
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > 10_000:
            raise TemplateLimit("it computes with very large numbers")
        _made.size = getattr(_made, "size", 0) + _size(result)
        if _made.size > _MAX_MADE:
            raise _too_large()
        return _checked(result)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        name = getattr(__obj, "__name__", "")
        _check_arguments(name, owner, [*args, *kwargs.values()])
        return _checked(super().call(__context, __obj, *args, **kwargs))


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


_now.__name__ = "strftime_now"


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which changes the text for the model
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    return _Sandbox().from_string(source)
