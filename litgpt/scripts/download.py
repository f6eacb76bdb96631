"""The command `download`."""

import sys
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
        model_name: Name of the architecture to read the weights as, instead of what config.json says.
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


def num_parameters(config: Config) -> int:
    """Weights of a model of this config, by arithmetic; the output embedding is counted even if it is the input's."""
    norm = 0
    if config.norm_class_name == "RMSNorm":
        norm = config.n_embd
    elif config.norm_affine:
        norm = 2 * config.n_embd
    norm_width = norm // config.n_embd

    def linear(inputs: int, outputs: int, bias: bool) -> int:
        return inputs * outputs + outputs * bias

    queries, keys = config.n_head * config.head_size, config.n_query_groups * config.head_size
    if config.latent_attention is not None:
        rank, latent = config.q_lora_rank, config.kv_lora_rank
        queries = config.n_head * config.qk_head_dim
        expanded = config.n_head * (config.qk_nope_head_dim + config.v_head_dim)
        attention = linear(config.n_embd, latent + config.qk_rope_head_dim, config.attn_bias) + latent
        attention += linear(latent, expanded, config.bias) + linear(rank or config.n_embd, queries, config.bias)
        attention += linear(config.n_embd, rank, config.attn_bias) + rank if rank else 0
        attention += linear(config.n_head * config.v_head_dim, config.n_embd, config.bias)
    else:
        attention = linear(config.n_embd, queries + 2 * keys, config.bias or config.attn_bias)
        attention += linear(queries, config.n_embd, config.bias) + config.n_head * config.attention_sinks
    if config.norm_qk:
        attention += norm_width * (queries + keys if config.norm_qk_type == "olmo2" else 2 * config.head_size)

    def mlp(size: int) -> int:
        ups = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
        return ups * linear(config.n_embd, size, config.bias) + linear(size, config.n_embd, config.bias)

    dense = config.n_layer
    mixture = 0
    if config.mlp_class_name == "LLaMAMoE":
        dense = min(config.first_k_dense_replace or 0, config.n_layer)
        size = config.moe_intermediate_size or config.intermediate_size
        mixture = linear(config.n_embd, config.n_expert, config.router_bias) + config.n_expert * mlp(size)
        mixture += mlp(size * config.n_shared_expert) if config.n_shared_expert else 0
    feed_forward = dense * mlp(config.intermediate_size) + (config.n_layer - dense) * mixture
    norms = [config.norm_1, config.norm_2 and not config.shared_attention_norm]
    norms += [config.post_attention_norm, config.post_mlp_norm]
    block = attention + norm * sum(norms)
    embedding = config.padded_vocab_size * config.n_embd
    head = linear(config.n_embd, config.padded_vocab_size, config.lm_head_bias)
    return embedding + head + config.n_layer * block + feed_forward + norm


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

    table = Table("Model", "Parameters", "Context", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    repositories = {f"{model['hf_config']['org']}/{model['hf_config']['name']}": model for model in configs}
    for repo_id, model in sorted(repositories.items(), key=lambda entry: entry[0].lower()):
        if all(word.lower() in repo_id.lower() for word in words.split()):
            config = Config(**model)
            table.add_row(repo_id, _short(num_parameters(config)), f"{config.block_size:,}")
    if not table.row_count:
        raise ValueError(f"No known model has a name with {words!r}; `litgpt download list` shows all")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _short(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
