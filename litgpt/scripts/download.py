"""The command `download`."""

import sys
from dataclasses import replace
from pathlib import Path

from litgpt.config import Config


def download_from_hub(
    repo_id: str,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool = True,
    dtype: str | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    model_name: str | None = None,
    filter: str | None = None,
) -> None:
    """Download a model from the Hugging Face hub, or list the models that are known by name.

    An interrupted download is resumed by the same command. Models that are not listed can be downloaded too, if their
    architecture is supported.

    Args:
        repo_id: What to download, say "HuggingFaceTB/SmolLM2-135M-Instruct", or "list" to see names.
        access_token: Token for models that ask for one; default: the environment variable HF_TOKEN.
        tokenizer_only: Leave out the weights.
        convert_checkpoint: Also write lit_model.pth, the format of LitGPT. Not needed by the commands of this package.
        dtype: Data type of lit_model.pth, say bfloat16, instead of the downloaded one.
        checkpoint_dir: Folder that gets a subfolder for the model; the default may be set by LITGPT_HOME.
        model_name: Name of the architecture to read the weights as, instead of the one in config.json.
        filter: With "list": show only names that contain all these words.
    """
    if repo_id == "list":
        _print_models(filter or "")
        return
    if filter is not None:
        raise ValueError("--filter goes with `litgpt download list`")
    from litgpt.checkpoint.hub import checkpoints_home, fetch_checkpoint

    config = None if model_name is None else Config.from_name(model_name)
    repo_id = _full_name(repo_id)
    home = checkpoints_home() if checkpoint_dir == Path("checkpoints") else checkpoint_dir
    try:
        folder = fetch_checkpoint(repo_id, home / repo_id, access_token, tokenizer_only, config)
    except ConnectionError as error:
        raise ConnectionError(f"Could not download {repo_id}: {error}") from None
    print(f"Saved {repo_id}", file=sys.stderr)
    if convert_checkpoint and not tokenizer_only:
        from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

        convert_hf_checkpoint(folder, model_name=model_name, dtype=dtype)
    else:
        print(folder)


def num_parameters(config: Config, tied: bool = False) -> int:
    """The number of parameters of a model of this config, a tied embedding counted once.

    Only the first layers are built, up to the first one with experts: all others equal it.
    """
    from litgpt.checkpoint.meta_model import meta_model

    built = min(config.n_layer, (config.first_k_dense_replace or 0) + 1)
    model = meta_model(replace(config, n_layer=built))
    once = sum(weight.numel() for name, weight in model.named_parameters() if not (tied and name == "lm_head.weight"))
    return once + (config.n_layer - built) * sum(weight.numel() for weight in model.transformer.h[-1].parameters())


def _full_name(repo_id: str) -> str:
    """`org/name` for the name of a known model."""
    if repo_id.count("/") == 1 and not repo_id.startswith((".", "/")):
        return repo_id
    try:
        hub = Config.from_name(repo_id).hf_config
    except ValueError as error:
        raise ValueError(f"{error} (`litgpt download list` shows names; others read org/name)") from None
    return f"{hub['org']}/{hub['name']}"


def _print_models(words: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from litgpt.config import configs
    from litgpt.families import is_tied

    table = Table("Model", "Parameters", "Context", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    repositories = {f"{model['hf_config']['org']}/{model['hf_config']['name']}": model for model in configs}
    for repo_id, model in sorted(repositories.items(), key=lambda entry: entry[0].lower()):
        if all(word.lower() in repo_id.lower() for word in words.split()):
            config = Config(**model)
            table.add_row(repo_id, _short(num_parameters(config, is_tied(config.name))), f"{config.block_size:,}")
    if not table.row_count:
        raise ValueError(f"No known model has a name with {words!r}; `litgpt download list` shows all")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _short(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
