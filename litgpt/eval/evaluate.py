"""The command `evaluate`."""

from pathlib import Path
from typing import Any

import torch

from litgpt.atomic_file import check_folder
from litgpt.checkpoint.find import find_checkpoint
from litgpt.engine.loading import Quantization, make_ready
from litgpt.eval.builtin import BUILT_IN, SUFFIXES, Evaluation
from litgpt.eval.results import Results, merged, table, write_results
from litgpt.generate.options import CacheOptions, ModelOptions
from litgpt.tasks.ruler import RULER

AUTO_BATCH_SIZE = 16
_PRECISIONS = {"float32": "32-true", "float16": "16-true", "bfloat16": "bf16-true", "auto": None}


def convert_and_evaluate(
    checkpoint_dir: Path,
    tasks: str | None = None,
    out_dir: Path | None = None,
    force_conversion: bool = False,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    limit: float | None = None,
    seed: int = 1234,
    save_filepath: Path | None = None,
    access_token: str | None = None,
    *,
    kv_cache: str | None = None,
    cache_length: int | None = None,
    kv_cache_args: dict[str, Any] | None = None,
    prompt_chunksize: int | None = None,
    quantize: Quantization | None = None,
    length: int = 2048,
    text: Path | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = True,
    threads: int | None = None,
) -> None:
    """Evaluate a model with the LM Evaluation Harness, or by tasks that need nothing else.

    Prints a table, and writes all results to a file. Without tasks it lists those that there are.

    Args:
        checkpoint_dir: Folder of a checkpoint (also one with LoRA weights), a .gguf file, or a model's name.
        tasks: Names with commas between them. Built in: perplexity, needle, key_value, variable_tracking, common_words. Files:
            a text (.txt, .md) for its perplexity, questions (.jsonl), a task of the harness (.yaml). All others are the
            harness's, such as hellaswag,mmlu (pip install 'litgpt[eval]'), most of which fetch their data.
        out_dir: Folder for results.json. Default: evaluate in the checkpoint's folder.
        force_conversion: Has no effect: nothing is converted.
        num_fewshot: Number of examples before each question, for tasks of the harness.
        batch_size: Most answers that are generated together: a number, or auto. Log-probabilities do not depend on it.
        device: Such as cuda, cuda:0 or cpu. Default: the first GPU, else the CPU.
        dtype: float32, bfloat16, float16, or a precision such as 32-true. Default: the fastest on the device.
        limit: Most samples of a task; below 1: the share of them.
        seed: Seed of random draws, and of the samples of built-in tasks.
        save_filepath: File for the results. Default: results.json in out_dir.
        access_token: Token for the Hugging Face hub.
        kv_cache: Which tokens the key-value cache keeps, as POLICY or POLICY-STORAGE, as for litgpt generate. Default: dense,
            or what the model was trained with.
        cache_length: Tokens that the key-value cache holds.
        kv_cache_args: Further arguments of the key-value cache.
        prompt_chunksize: Most tokens of a prefill call. Default: the whole prompt.
        quantize: Quantise the weights: int8, int4, or a mode of bitsandbytes.
        length: Tokens of a sample of the built-in tasks, answer included.
        text: File of text for perplexity and needle. Default: Python's reference, which comes with it.
        apply_chat_template: Ask as in a chat, with the model's template.
        system_instruction: System prompt, for tasks of the harness.
        fewshot_as_multiturn: Whether examples are turns of a chat of their own, with the chat template.
        threads: Threads that compute on the CPU. Default: $OMP_NUM_THREADS, or one for every core.
    """
    if tasks is None:
        print("\n".join([*BUILT_IN, *(_harness_tasks() if _has_harness() else [])]))
        return
    options = CacheOptions(
        kv_cache=kv_cache, cache_length=cache_length, kv_cache_args=kv_cache_args, prompt_chunksize=prompt_chunksize
    )
    rows, names = _batch_size(batch_size), [name.strip() for name in tasks.split(",") if name.strip()]
    for name, value in (("limit", limit), ("length", length)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot must be at least 0, got {num_fewshot}")
    own = [name for name in names if name in BUILT_IN or name in RULER or Path(name).suffix in SUFFIXES]
    others = [name for name in names if name not in own]
    for name in own:
        if Path(name).suffix in SUFFIXES and not Path(name).is_file():
            raise FileNotFoundError(f"there is no file {name!r}")
    if not names:
        raise ValueError("--tasks names no task")
    if others:
        _check_harness(others)
    path = find_checkpoint(checkpoint_dir, access_token)
    target = _target(path, out_dir, save_filepath)
    own_device = None if device is None else torch.device(device)
    loading = ModelOptions(threads=threads).loading()
    ready = make_ready(path, _precision(dtype), quantize, device=own_device, threads=loading["threads"])
    options = options.as_trained(ready.trained_cache)
    evaluation = Evaluation(
        ready, options.cache_spec(), rows, length, limit, seed, text, apply_chat_template, options.prompt_chunksize
    )
    parts: list[Results] = []
    for name in own:
        parts.append(evaluation.run(name).results(Path(name).stem if Path(name).suffix in SUFFIXES else name))
    if others:
        more = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "apply_chat_template": apply_chat_template,
            "system_instruction": system_instruction,
            "fewshot_as_multiturn": fewshot_as_multiturn and apply_chat_template,
        }
        parts.append(_run_harness(evaluation, others, more))
    prepare_results(merged(parts), target)


def prepare_results(results: Results, save_filepath: Path, print_results: bool = True) -> None:
    """Print the table of results, and write them to a file."""
    if print_results and "config" in results:  # of the harness
        from lm_eval.utils import make_table

        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
    elif print_results:
        print(table(results))
    write_results(results, save_filepath)


def _batch_size(batch_size: int | str) -> int:
    if isinstance(batch_size, str) and batch_size.startswith("auto"):
        return AUTO_BATCH_SIZE
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError("batch_size must be a positive integer, 'auto', or in the format 'auto:N'.")
    return batch_size


def _precision(dtype: str | torch.dtype | None) -> str | None:
    name = str(dtype).removeprefix("torch.")
    return None if dtype is None else _PRECISIONS.get(name, name)


def _target(checkpoint: Path, out_dir: Path | None, save_filepath: Path | None) -> Path:
    """The file for the results."""
    if save_filepath is None:
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        save_filepath = Path(out_dir or folder / "evaluate") / "results.json"
    if Path(save_filepath).is_dir():
        raise ValueError(f"--save_filepath {save_filepath} is a folder: name a file")
    check_folder(Path(save_filepath).parent)
    return Path(save_filepath)


# -- the harness


def _has_harness() -> bool:
    from importlib.util import find_spec

    return find_spec("lm_eval") is not None


def _check_harness(names: list[str]) -> None:
    if not _has_harness():
        raise ModuleNotFoundError(
            f"{names[0]!r} is not built in ({', '.join(BUILT_IN)}), and other tasks need the LM Evaluation Harness: "
            "pip install 'litgpt[eval]'"
        )


def _harness_tasks() -> list[str]:
    from lm_eval.tasks import TaskManager

    return list(TaskManager().task_index)


def _run_harness(evaluation: Evaluation, names: list[str], settings: dict[str, Any]) -> Results:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from litgpt.eval.harness import EngineLM

    files = [Path(name) for name in names if Path(name).suffix in (".yaml", ".yml")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {str(file)!r}")
    folders = sorted({str(file.resolve().parent) for file in files})
    names = [_task_of(Path(name)) if Path(name) in files else name for name in names]
    # reading all of the harness's own tasks takes many seconds
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"there is no task {unknown[0]!r}: `litgpt evaluate list` shows those that there are")
    model = EngineLM(
        evaluation.ready, evaluation.spec, evaluation.batch_size, evaluation.prompt_chunksize, evaluation.seed
    )
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), evaluation.seed)
    return simple_evaluate(
        model=model, tasks=names, task_manager=manager, batch_size=evaluation.batch_size, **seeds, **settings
    )


def _task_of(path: Path) -> str:
    """The name of the task, or of the group, that a file of the harness describes."""
    from yaml import YAMLError, safe_load

    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "!function" not in line]
    try:
        content = safe_load("\n".join(lines))
    except YAMLError:
        content = None
    name = content.get("task", content.get("group")) if isinstance(content, dict) else None
    if isinstance(name, list):
        name = content.get("group")
    if not isinstance(name, str):
        raise ValueError(f"{path} describes no task of the harness: it has no `task: NAME`")
    return name
