"""The `litgpt` command: a table of commands, each of which is a function whose signature gives its options."""

import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from litgpt.errors import UsageError, debugging, describe
from litgpt.kernels.library import compile_ahead
from litgpt.standard_streams import drop_unwritten, is_text, prepare_standard_streams
from litgpt.waiting import stderr_log, waiting

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# name -> (module in litgpt:function, help). The module is imported when the command is called.
_COMMANDS = {
    "chat": ("chat.base:main", "Chat with a model."),
    "generate": ("generate.base:main", "Let a model continue a prompt."),
    "generate_full": ("generate.full:main", "Answer a prompt with a model of which all weights were fine-tuned."),
    "generate_lora": ("generate.lora:main", "Answer a prompt with LoRA weights that were not merged."),
    "generate_adapter": ("generate.adapter:main", "Answer a prompt with the weights of an adapter."),
    "generate_adapter_v2": ("generate.adapter_v2:main", "Answer a prompt with the weights of an adapter V2."),
    "generate_speculatively": (
        "generate.speculative_decoding:main",
        "Answer a prompt with a large model, for which a small one drafts tokens.",
    ),
    "generate_sequentially": (
        "generate.sequentially:main",
        "Answer a prompt with a model whose layers are on several GPUs.",
    ),
    "generate_tp": ("generate.tp:main", "Answer a prompt with a model whose layers are divided among processes."),
    "finetune": ("finetune.lora:setup", "The same as finetune_lora."),
    "finetune_lora": ("finetune.lora:setup", "Fine-tune a model by LoRA: low-rank matrices added to its weights."),
    "finetune_full": ("finetune.full:setup", "Fine-tune all weights of a model."),
    "finetune_adapter": ("finetune.adapter:setup", "Fine-tune learned prefixes of a model's layers."),
    "finetune_adapter_v2": (
        "finetune.adapter_v2:setup",
        "Fine-tune learned prefixes, and scales and biases of linear layers.",
    ),
    "pretrain": ("pretrain:setup", "Train a model on text, from random weights or a checkpoint."),
    "evaluate": (
        "eval.evaluate:convert_and_evaluate",
        "Evaluate a model with the LM Evaluation Harness, or by built-in tasks.",
    ),
    "serve": ("deploy.serve:run_server", "Serve a model over HTTP: OpenAI's endpoints, /predict, a chat page."),
    "download": ("scripts.download:download_from_hub", "Download a model, or list the available ones."),
    "convert_to_litgpt": (
        "scripts.convert_hf_checkpoint:convert_hf_checkpoint",
        "Convert a Hugging Face checkpoint to LitGPT's format.",
    ),
    "convert_from_litgpt": (
        "scripts.convert_lit_checkpoint:convert_lit_checkpoint",
        "Convert a LitGPT checkpoint to Hugging Face's format.",
    ),
    "convert_pretrained_checkpoint": (
        "scripts.convert_pretrained_checkpoint:convert_pretrained_checkpoint",
        "Convert the result of pretraining for all other commands.",
    ),
    "merge_lora": ("scripts.merge_lora:merge_lora", "Merge LoRA weights into the checkpoint that was fine-tuned."),
    "convert_to_peft": ("scripts.convert_peft:convert_to_peft", "Convert LoRA weights to Hugging Face's PEFT."),
    "convert_from_peft": ("scripts.convert_peft:convert_from_peft", "Convert PEFT's LoRA weights to ours."),
    "quantize": ("scripts.quantize:quantize_checkpoint", "Quantise a checkpoint's weights to 8 or 4 bits."),
    "plan_cache": (
        "scripts.plan_cache:plan_cache",
        "Tell whether a model and its caches fit into a memory, and what would.",
    ),
    "compare_caches": (
        "scripts.compare_caches:compare_caches",
        "Compare key-value caches on a model: quality, bytes, speed.",
    ),
    "validate": ("scripts.validate:validate_setup", "Check a checkpoint, and estimate how much memory it needs."),
}
# name -> the libraries of kernels (litgpt/kernels/build.py) that it needs on a CPU
_KERNELS = {name: ("KERNELS",) for name in _COMMANDS if name.startswith("generate")}
_KERNELS |= dict.fromkeys(("chat", "evaluate", "serve", "compare_caches"), ("KERNELS",))
_KERNELS |= {name: ("KERNELS", "TRAINING") for name in _COMMANDS if name.startswith(("finetune", "pretrain"))}
COMMANDS = {name: (f"litgpt.{place}", text) for name, (place, text) in _COMMANDS.items()}


def __getattr__(name: str) -> dict[str, Callable[..., Any]]:
    """`PARSER_DATA`, LitGPT's table of commands: name -> function."""
    if name != "PARSER_DATA":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    places = {command: place.split(":") for command, (place, _) in COMMANDS.items()}
    return {command: getattr(import_module(module), function) for command, (module, function) in places.items()}


_FLAGS = ("-h", "--help", "--print_config")


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 1 (it failed), 2 (wrong usage), 130 (interrupted), 141 (stdout was
    closed by its reader).

    `LITGPT_DEBUG=1` shows the traceback of an error instead of one line.
    """
    prepare_standard_streams()
    if not debugging():  # where a warning comes from says nothing to whoever runs a command
        warnings.formatwarning = lambda message, *args, **kwargs: f"litgpt: warning: {message}\n"
    try:
        try:
            return _run(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if debugging():
            raise
        with suppress(OSError):
            print(f"litgpt: error: {describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        drop_unwritten()


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else 2
    if args[0] == "--version":
        import litgpt

        print(f"litgpt {litgpt.__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name.replace("-", "_"), COMMANDS)
        hint = f"did you mean {' or '.join(near)}?" if near else "`litgpt --help` lists the commands"
        raise UsageError(f"unknown {'option' if name.startswith('-') else 'command'} {name!r}; {hint}")
    module, _, attribute = COMMANDS[name][0].partition(":")
    with waiting("Starting"), _exit_on_interrupt():
        for which in _KERNELS.get(name, ()) if not any(flag in args for flag in _FLAGS) else ():
            compile_ahead(which)  # before torch is imported
        function = getattr(import_module(module), attribute)
        arguments = parse(name, function, args[1:])
    logging.getLogger("litgpt").addHandler(stderr_log)
    function(**arguments)
    return 0


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once inside the block: as an exception it can get lost in a module that is being imported, or
    leave one half initialised."""

    def leave(number: int, frame: Any) -> None:
        with suppress(OSError):
            os.write(2, b"\n" if sys.stderr.isatty() else b"")
        os._exit(130)

    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: litgpt COMMAND [options]",
            "",
            "commands:",
            *lines,
            "",
            "`litgpt COMMAND --help` explains a command, `litgpt --version` shows the version.",
        ]
    )


def parse(name: str, function: Callable[..., Any], args: list[str]) -> dict[str, Any]:
    """Returns the arguments for a command's function, from the command line and `--config FILE`.

    Parameters without a default, and the first one in any case, may be given without their names. Dashes in option
    names may stand for underscores, and a boolean option without a value is true.

    Raises:
        UsageError: an option is unknown, missing or has an impossible value.
    """
    from jsonargparse import ArgumentError

    parameters = inspect.signature(function).parameters
    positional = [key for i, (key, p) in enumerate(parameters.items()) if i == 0 or p.default is p.empty]
    parser = _parser(name, function, positional)
    named = _by_name(args, parameters, positional)
    try:
        parsed = parser.parse_args(named)
    except ArgumentError as error:
        message = _explain(str(error), parameters, _config_file(named))
        raise UsageError(f"{message} (`litgpt {name} --help` lists the options)") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {_config_file(named)} is not text in UTF-8, at byte {error.start}") from error
    except (OverflowError, ValueError) as error:  # numbers of hundreds of digits
        digits = [arg.partition("=")[0] for arg in named if re.search(r"=[-+]?\d{300}", arg)]
        place = digits[0] if digits else f"--config {_config_file(named)}"
        raise UsageError(f"{place} has a number that is too large") from error
    try:
        config = parser.instantiate(parsed)
    except (ValueError, OSError, TypeError) as error:
        while error.__cause__ or error.__context__:  # the first one is about the class's arguments
            error = error.__cause__ or error.__context__
        raise UsageError(describe(error)) from error
    return {key: config[key] for key in parameters}


def _parser(name: str, function: Callable[..., Any], positional: list[str]) -> "ArgumentParser":
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):
        def format_help(self) -> str:
            return re.sub(r"<class\s+'([\w.]+)'>", r"\1", super().format_help())

    set_parsing_settings(config_read_mode_urls_enabled=False, docstring_parse_attribute_docstrings=True)
    parameters = inspect.signature(function).parameters
    shown = " ".join(key if parameters[key].default is inspect.Parameter.empty else f"[{key}]" for key in positional)
    parser = Parser(
        prog=f"litgpt {name}",
        usage=f"litgpt {name} {shown} [--option VALUE ...]",
        description=(inspect.getdoc(function) or COMMANDS[name][1]).split("\n\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="Path to a YAML file with values for the options.")
    for title, keys in (
        ("arguments, with or without their names", set(positional)),
        ("settings", set(parameters) - set(positional)),
    ):
        if keys:
            group = parser.add_argument_group(title)
            group.add_function_arguments(function, as_group=False, skip=set(parameters) - keys)
    return parser


def _by_name(args: list[str], parameters: Mapping[str, inspect.Parameter], positional: list[str]) -> list[str]:
    """Rewrites a command line so that every value is given as `--name=value`.

    Raises:
        UsageError: there are more values than parameters for them, one that is not text, or an empty path, which would mean the
            current folder.
    """
    named, values = [], []
    rest = iter(range(len(args)))
    for i in rest:
        arg, following = args[i], args[i + 1 : i + 2]
        if arg == "--":
            values += args[i + 1 :]
            break
        if arg in _FLAGS or re.match(r"-[^-]", arg) and not re.match(r"-[\d.]", arg):
            named.append(arg)
        elif not arg.startswith("--"):
            values.append(arg)
        else:
            option, equals, value = arg.partition("=")
            option = "--" + option[2:].replace("-", "_")
            parameter = parameters.get(option[2:])
            if option in _FLAGS and not equals:
                named.append(option)
            elif equals:
                named.append(f"{option}={value}")
            elif parameter and parameter.annotation in (bool, "bool") and not _is_boolean(following):
                named.append(f"{option}=true")
            elif following and not following[0].startswith("--"):
                named.append(f"{option}={following[0]}")
                next(rest)
            else:
                named.append(option)
    named = _with_class_arguments(named, parameters)
    given = {arg.partition("=")[0] for arg in named}
    free = [key for key in positional if f"--{key}" not in given]
    if len(values) > len(free):
        raise UsageError(f"unexpected argument {values[len(free)]!r}; other values need the name of their option")
    named += [f"--{key}={value}" for key, value in zip(free, values, strict=False)]
    for arg in named:
        option, equals, value = arg.partition("=")
        parameter = parameters.get(option[2:])
        if equals and not value and parameter is not None and "Path" in str(parameter.annotation):
            raise UsageError(f"{option} is empty: give the path of a file or folder, or a name")
        if not is_text(arg):
            raise UsageError(f"{ascii(option)[1:-1]} is not text in UTF-8: {os.fsencode(value)!r}")
    # Options of the command line override a configuration file, and are printed by --print_config.
    return sorted(named, key=lambda arg: (arg == "--print_config") - arg.startswith("--config="))


def _with_class_arguments(named: list[str], parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Moves arguments of a class that an option of type `str | dict` names (`--optimizer NAME --optimizer.lr 0.01`, also with
    `.init_args`) into its value. Where the class is a configuration file's, it keeps the arguments that it has there."""
    for key, parameter in parameters.items():
        if parameter.annotation != str | dict:
            continue
        pattern = re.compile(rf"--{key}\.(?:init_args\.)?(\w+)=(.*)", re.DOTALL)
        named = [re.sub(rf"--{key}\.class_path=", f"--{key}=", arg) for arg in named]
        found = {match[1]: _number_or_text(match[2]) for arg in named if (match := pattern.fullmatch(arg))}
        given = [_number_or_text(arg.partition("=")[2]) for arg in named if arg.startswith(f"--{key}=")]
        in_files = _from_config_files(named, key)
        chosen = (given or in_files or [parameter.default])[-1]
        if not found and not (given and isinstance(chosen, dict)):
            continue
        whole = chosen if isinstance(chosen, dict) else {"class_path": chosen}
        value = {**whole, "init_args": {**(whole.get("init_args") or {}), **found}}
        named = [arg for arg in named if not re.match(rf"--{key}[.=]", arg)]
        if in_files and isinstance(in_files[-1], dict):  # which jsonargparse merges with another file's value only
            path = str(value.get("class_path"))
            value["class_path"] = path if "." in path else f"torch.optim.{path}"
            named.append(f"--config={json.dumps({key: value})}")
        else:
            named.append(f"--{key}={json.dumps(value)}")
    return named


def _from_config_files(named: list[str], key: str) -> list[Any]:
    """The values of an option in the files of `--config`; what is wrong with these the parser says."""
    from litgpt.settings import read_yaml

    values = []
    for arg in named:
        if arg.startswith("--config="):
            with suppress(OSError, ValueError):
                values.append(read_yaml(arg.partition("=")[2]).get(key))
    return [value for value in values if value is not None]


def _number_or_text(text: str) -> Any:
    """The number, JSON value or text of a command line's value; for YAML, 1e-3 is no number."""
    with suppress(ValueError):
        return float(text) if re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", text) else json.loads(text)
    return text


def _is_boolean(words: list[str]) -> bool:
    return bool(words) and words[0].lower() in ("true", "false", "yes", "no")


def _config_file(named: list[str]) -> str:
    """The last file that is named by `--config`."""
    return next((arg.partition("=")[2] for arg in reversed(named) if re.match(r"--config=[^{]", arg)), "")


def _explain(message: str, parameters: Mapping[str, inspect.Parameter], config_file: str) -> str:
    """The message of a jsonargparse error in one line."""
    message = " ".join(message.split())
    if match := re.match(r'Parser key "([\w.]+)": Exceeds the limit', message):
        return f"--{match[1]} has a number that is too large"
    if match := re.match(r"(?:Problems parsing|Unexpected) config: ?(.*)", message):
        reason = match[1] if message.startswith("Problems") else "it has no lines `option: value`"
        return f"--config {config_file or chr(39) * 2} cannot be used: {reason}"
    if match := re.match(r"unrecognized arguments: (-+)([^\s=]+)", message, re.IGNORECASE):
        return _unknown(match[2], parameters, match[1])
    if match := re.match(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", message):
        return f"--config {config_file}: {_unknown(f'{match[1]}.{match[2]}' if match[1] else match[2], parameters)}"
    if match := re.match(r"the following arguments are required: -*(\w+)|.*Key \W*(\w+)\W* is required", message):
        return f"{match[1] or match[2]} is missing"
    if (match := re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: ?(.*)', message)) and match[1] in parameters:
        annotation = parameters[match[1]].annotation
        kind = next(
            (x for x in get_args(annotation) if isinstance(x, type) and x.__module__.startswith("litgpt.")), None
        )
        if kind is not None and not is_dataclass(kind):
            return _explain_object(match[1], kind, match[2], message)
        expected = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        expected = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", expected.replace("typing.", ""))
        expected = re.sub(r"Literal\[(.*)\]", r"one of \1", expected)
        return f"--{match[1]} cannot be {match[2]!r}, it takes {expected}"
    if match := re.match(r'Parser key "([\w.]+)": .*(?:Got|Given) value: ?(.*)', message):
        expected = [*_words(match[1], parameters), *re.findall(r"Expected an? <class '(\w+)'>", message)]
        shown = " or ".join(expected).replace("NoneType", "null")
        return f"--{match[1]} cannot be {match[2]!r}, it takes {shown or 'another kind of value'}"
    return re.sub(r'^Parser key "([\w.]+)":', r"--\1:", message)


def _unknown(name: str, parameters: Mapping[str, inspect.Parameter], dashes: str = "") -> str:
    """That no option has this name, and which one may be meant."""
    from difflib import get_close_matches

    names = {key.replace("_", ""): key for key in parameters}
    for key, parameter in parameters.items():
        if is_dataclass(parameter.annotation):
            names |= {f"{key}.{f.name}".replace("_", ""): f"{key}.{f.name}" for f in fields(parameter.annotation)}
    near = get_close_matches(name.replace("_", ""), names, n=1)
    return f"unknown option {dashes}{name}" + (f", did you mean {dashes}{names[near[0]]}?" if near else "")


def _words(key: str, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The words that an option of a group, such as `train.teacher`, takes."""
    name, _, field = key.partition(".")
    kind = parameters[name].annotation if name in parameters else None
    if not is_dataclass(kind):
        return []
    annotation = get_type_hints(kind).get(field)
    kinds = (annotation, *get_args(annotation))
    return [repr(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def _explain_object(key: str, kind: type, value: str, message: str) -> str:
    """Says what is wrong with an option whose value is the name of a subclass of `kind`, with arguments."""
    package = vars(import_module(kind.__module__.rpartition(".")[0]))
    known = [name for name, x in package.items() if isinstance(x, type) and issubclass(x, kind) and x is not kind]
    choice = f"one of {', '.join(sorted(known))}, or the import path of a class of yours"
    match = re.search(r"Problem with given class_path '(?:[\w.]+\.)?(\w+)': (.*?)(?: - Expected| Given value)", message)
    if match is None or match[1] not in [*known, kind.__name__]:
        return f"--{key} cannot be {value!r}, it takes {choice}"
    name, reason = match.groups()
    if argument := re.search(r"Option '(\w+)' is not accepted", reason):
        if name == kind.__name__:
            return f"--{key}.{argument[1]} belongs to a --{key} that is not given: {choice}"
        return f"--{key} {name} has no option --{key}.{argument[1]}"
    if argument := re.search(r"arguments are required: (\w+)", reason):
        return f"--{key} {name} needs --{key}.{argument[1]}"
    if argument := re.search(r"Parser key \"(\w+)\": (?:.*value: |)(.*)", reason):
        return f"--{key}.{argument[1]} cannot be {argument[2]!r}"
    return f"--{key} {name}: {reason}"


if __name__ == "__main__":
    sys.exit(main())
