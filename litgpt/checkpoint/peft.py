"""LoRA weights in the format of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PEFT has A (r, E), B (O, r) and DoRA's magnitudes (O,) for each linear layer of `transformers`. A family's weight names map
their layers to ours: the parts of our `qkv` layer that are separate layers there get its rows; several layers of ours that
are one layer there become one with the sum of their ranks.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from litgpt.atomic_file import replacing
from litgpt.checkpoint.base import HEAD, WEIGHTS_NAME
from litgpt.checkpoint.files import load_state_dict, write_json
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.finetuned import HYPERPARAMETERS_NAME, Finetuned
from litgpt.checkpoint.huggingface import HuggingFaceCheckpoint
from litgpt.checkpoint.load import meta_model, save_config
from litgpt.checkpoint.open import open_checkpoint
from litgpt.checkpoint.weights import WeightMap
from litgpt.config import Config as BaseConfig
from litgpt.families import hf_from_config
from litgpt.lora import GPT, Config, LoRALinear, LoRAQKVLinear
from litgpt.settings import Settings, read_json

CONFIG_NAME, ADAPTER_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KINDS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"}


def save_peft(folder: Path, out_dir: Path, base: Path | None = None) -> None:
    """Converts the LoRA weights that fine-tuning wrote to PEFT's format.

    Args:
        folder: Folder with `lit_model.pth.lora` and `hyperparameters.yaml`.
        out_dir: Made if it does not exist.
        base: The checkpoint that was fine-tuned (default: the one in the hyperparameters).

    Raises `FileExistsError` if `out_dir` holds PEFT weights, `ValueError` if the weights have no equivalent in PEFT.
    """
    if (out_dir / CONFIG_NAME).exists():
        raise FileExistsError(f"{out_dir} holds PEFT weights already: give another folder")
    finetuned = Finetuned(folder, "lora")
    path = find_checkpoint(finetuned.base(base))
    checkpoint = open_checkpoint(path)
    config = finetuned.config(checkpoint.config)
    weight_map = _weight_map(checkpoint.config)
    model = finetuned.part(config)
    layers = {f"{n}.weight": x for n, x in model.named_modules() if isinstance(x, LoRALinear) and x.r > 0}
    if not layers:
        raise ValueError(f"{finetuned.path} has no layer with LoRA matrices")
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, sources in weight_map.theirs(list(layers)).items():
        module, _, leaf = name.rpartition(".")
        module = "lm_head" if sources == (HEAD,) else module  # its name in `transformers` 5, if not in files
        if leaf != "weight":
            raise ValueError(f"PEFT has no LoRA matrices for {name}, which holds all experts of a layer")
        parts = _joined(name, [layers[source] for source in sources], sources, weight_map, config)
        if parts is not None:
            kinds = zip(("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), parts, strict=True)
            tensors |= {f"{_PREFIX}{module}.{kind}": x.contiguous() for kind, x in kinds if x is not None}
            ranks[module] = len(parts[0])
    targets = _targets(list(ranks), weight_map, model)
    other = {target: rank for module, rank in ranks.items() if rank != config.lora_r for target in [targets[module]]}
    power = 0.5 if config.lora_rslora else 1  # B A is scaled by alpha / r ** power
    described = path if isinstance(checkpoint, HuggingFaceCheckpoint) else _repository(checkpoint.config) or path
    out_dir.mkdir(parents=True, exist_ok=True)
    with replacing(out_dir / ADAPTER_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    settings = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(described)},
        **{"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout, "bias": "none"},
        **{"use_rslora": config.lora_rslora, "use_dora": config.lora_dora, "inference_mode": True},
        **{"target_modules": sorted(set(targets.values())), "rank_pattern": other},
        "alpha_pattern": {key: config.lora_alpha * (r / config.lora_r) ** power for key, r in other.items()},
    }
    write_json(out_dir / CONFIG_NAME, settings)  # last: with it the folder is complete


def _weight_map(config: BaseConfig) -> WeightMap:
    return WeightMap(hf_from_config(config)[0], config)


def _repository(config: BaseConfig) -> str | None:
    names = config.hf_config
    return f"{names['org']}/{names['name']}" if {"org", "name"} <= set(names) else None


@torch.no_grad()
def _joined(
    name: str, layers: list[LoRALinear], sources: tuple[str, ...], weight_map: WeightMap, config: Config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """A, B and magnitudes of their weight `name`, which is built from the weights of these layers; None: all are zero."""
    starts, rank = {}, 0
    for source, layer in zip(sources, layers, strict=True):
        starts[source], rank = rank, rank + len(layer.lora_A)
    by_source = dict(zip(sources, layers, strict=True))

    def built(B_of: Callable[[LoRALinear], torch.Tensor]) -> torch.Tensor:
        """Their rows (O, rank), from ours, with separate columns for each layer."""

        def rows(source: str) -> torch.Tensor:
            B = B_of(by_source[source])
            wide = B.new_zeros(len(B), rank)
            wide[:, starts[source] : starts[source] + B.shape[1]] = B
            return wide

        return weight_map.build(name, sources, rows)

    used = built(lambda layer: layer.expanded_B(torch.ones_like(layer.lora_B))).any(dim=0)
    if not used.any():
        return None
    A = torch.cat([layer.lora_A for layer in layers])[used]
    m = None
    if config.lora_dora:
        m = weight_map.build(name, sources, lambda source: _magnitudes(by_source[source]))
        if m.isnan().any():
            raise ValueError(
                f"PEFT has one layer {name}: it cannot have DoRA for only some of queries, keys and values"
            )
    return A, built(lambda layer: layer.expanded_B())[:, used], m


def _magnitudes(layer: LoRALinear) -> torch.Tensor:
    """DoRA's magnitudes (O,), NaN for rows without one."""
    if not isinstance(layer, LoRAQKVLinear):
        return layer.lora_magnitude
    parts = iter(layer.lora_magnitude.split(layer.qkv_shapes))
    flags = zip(layer.part_sizes, layer.enable_lora, strict=True)
    return torch.cat([next(parts) if on else layer.lora_magnitude.new_full((size,), math.nan) for size, on in flags])


def _targets(modules: list[str], weight_map: WeightMap, model: GPT) -> dict[str, str]:
    """The names for `target_modules`: the last part of a module's name, if no other module has the same."""
    short = {module: module.rpartition(".")[2] for module in modules}
    names = [name.replace(".linear.", ".") for name, x in model.named_parameters() if "lora_" not in name]
    others = {name.rpartition(".")[0] for name in weight_map.theirs(names)} - set(modules)
    if {module.rpartition(".")[2] for module in others} & set(short.values()):
        blocks = re.compile(rf"{re.escape(weight_map.family.blocks)}\.\d+\.")
        return {module: blocks.sub("", module) for module in modules}
    return short


def load_peft(folder: Path, out_dir: Path, base: Path | None = None) -> None:
    """Converts PEFT's LoRA weights to the files of our fine-tuning: for `chat`, `generate_lora`, `merge_lora` and others.

    Zeros and factors make ranks and scales equal for all layers, without changing any output.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        out_dir: Made if it does not exist.
        base: The checkpoint that they are for (default: the one in `adapter_config.json`).

    Raises `FileExistsError` if `out_dir` holds LoRA weights, `ValueError` for weights that are not LoRA matrices of linear
    layers of the model.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}: give the folder that PEFT wrote")
    if (out_dir / f"{WEIGHTS_NAME}.lora").exists():
        raise FileExistsError(f"{out_dir} holds LoRA weights already: give another folder")
    settings = Settings(read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME))
    if settings.text("peft_type", "LORA") != "LORA" or settings.flag("fan_in_fan_out", False):
        raise ValueError(f"{settings.where}: only LoRA of linear layers can be converted")
    named = base or settings.text("base_model_name_or_path", None, null=True)
    if named is None:
        raise ValueError(f"{settings.where} names no base model: give --pretrained_checkpoint_dir")
    path = find_checkpoint(Path(named))
    base_config = open_checkpoint(path).config
    rslora, dora = settings.flag("use_rslora", False), settings.flag("use_dora", False)
    modules = _read_modules(folder)
    patterns: Mapping[str, float] = read_json(folder / CONFIG_NAME).get("alpha_pattern") or {}
    power = 0.5 if rslora else 1
    scales = {}
    for module, kinds in modules.items():
        found = next((x for key, x in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
        alpha = settings.number("lora_alpha", 8) if found is None else found
        scales[module] = alpha / len(kinds["A"]) ** power
    widest = max(modules, key=lambda module: len(modules[module]["A"]))
    rank = len(modules[widest]["A"])
    placed = _placed(modules, scales, scales[widest], _weight_map(base_config))
    flags = _flags(placed, base_config)
    alpha = scales[widest] * rank**power
    kind = {"lora_r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}
    kind |= {"lora_dropout": settings.number("lora_dropout", 0.0), "lora_rslora": rslora, "lora_dora": dora}
    config = Config.extending(base_config, **kind, **flags)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in meta_model(config, GPT).named_modules():
        if isinstance(layer, LoRALinear) and layer.r > 0:
            weights |= {f"{name}.{kind}": x for kind, x in _filled(layer, placed.pop(name, []), name, settings).items()}
    if placed:
        raise ValueError(f"{folder}: {next(iter(placed))} of {base_config.name} cannot have LoRA matrices")
    out_dir.mkdir(parents=True, exist_ok=True)
    save_config(base_config, out_dir)
    hyperparameters = {"checkpoint_dir": str(path), **config.lora_options()}
    (out_dir / HYPERPARAMETERS_NAME).write_text(yaml.safe_dump(hyperparameters, sort_keys=False), encoding="utf-8")
    with replacing(out_dir / f"{WEIGHTS_NAME}.lora") as temporary:
        torch.save({"model": weights}, temporary)


def _read_modules(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """For each of their modules: A, B, and magnitudes m as a column."""
    file = folder / ADAPTER_NAME
    weights = load_file(file) if file.is_file() else load_state_dict(folder / "adapter_model.bin")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, x in weights.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+?)\.({'|'.join(map(re.escape, _KINDS))})", name)
        if match is None:
            raise ValueError(f"{folder}: {name} is no LoRA matrix of a linear layer, and cannot be converted")
        kind = _KINDS[match[2]]
        modules.setdefault(match[1], {})[kind] = x.reshape(-1, 1) if kind == "m" else x
    if not modules or any(not {"A", "B"} <= set(kinds) for kinds in modules.values()):
        raise ValueError(f"{folder}: every layer must have lora_A and lora_B")
    return modules


# Some rows of a layer of ours: the first row, and A, B and m of these rows
_Rows = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _placed(
    modules: Mapping[str, Mapping[str, torch.Tensor]], scales: Mapping[str, float], scale: float, weight_map: WeightMap
) -> dict[str, list[_Rows]]:
    """For each of our layers, its rows in their modules, scaled to one scale for all."""
    placed: dict[str, list[_Rows]] = {}
    for module, kinds in modules.items():
        B = kinds["B"] * (scales[module] / scale) if scales[module] != scale else kinds["B"]
        name = HEAD if module == "lm_head" else f"{module}.weight"
        shards = list(weight_map.place(name, B))
        magnitudes = [None] * len(shards)
        if "m" in kinds:
            magnitudes = [x for _, _, x in weight_map.place(name, kinds["m"])]
        for (name, row, rows), m in zip(shards, magnitudes, strict=True):
            placed.setdefault(name.removesuffix(".weight"), []).append((row, kinds["A"], rows, m))
    return placed


def _ranges(sizes: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


def _flags(placed: Mapping[str, list[_Rows]], config: BaseConfig) -> dict[str, bool]:
    """Which layers get matrices."""
    flags = {"lora_projection": ".attn.proj", "lora_mlp": ".mlp.", "lora_head": "lm_head"}
    found = {flag: any(mark in f"{name}." for name in placed) for flag, mark in flags.items()}
    heads = (config.n_head, config.n_query_groups, config.n_query_groups)
    ranges = list(_ranges([n * config.head_size for n in heads]))
    rows = [(row, row + len(B)) for name, shards in placed.items() if name.endswith(".qkv") for row, _, B, _ in shards]
    for part, (first, last) in zip(("query", "key", "value"), ranges, strict=True):
        found[f"lora_{part}"] = any(start < last and stop > first for start, stop in rows)
    return found


def _filled(layer: LoRALinear, shards: list[_Rows], name: str, settings: Settings) -> dict[str, torch.Tensor]:
    """The parameters of a layer of ours, zero where their modules have no rows."""
    dtype = shards[0][1].dtype if shards else torch.float32
    sizes, enabled = [layer.linear.out_features], [True]
    if isinstance(layer, LoRAQKVLinear):
        sizes, enabled = layer.part_sizes, layer.enable_lora
    parts = [part for part, on in zip(_ranges(sizes), enabled, strict=True) if on]
    A = torch.zeros(len(parts), layer.r, layer.linear.in_features, dtype=dtype)
    B = [torch.zeros(last - first, layer.r, dtype=dtype) for first, last in parts]
    m = [torch.full((last - first,), math.nan) for first, last in parts]
    for row, shard_A, shard_B, shard_m in shards:
        for i, (first, last) in enumerate(parts):
            start, stop = max(first, row), min(last, row + len(shard_B))
            if start < stop:
                A[i, : len(shard_A)] = shard_A
                B[i][start - first : stop - first, : len(shard_A)] = shard_B[start - row : stop - row]
                if shard_m is not None:
                    m[i][start - first : stop - first] = shard_m[start - row : stop - row, 0].float()
    weights = {"lora_A": A.flatten(0, 1), "lora_B": torch.cat(B)}
    if layer.dora:
        weights["lora_magnitude"] = torch.cat(m).to(dtype)
        if weights["lora_magnitude"].isnan().any():
            raise ValueError(f"{settings.where}: DoRA lacks magnitudes of {name}: it must cover layers as a whole")
    return weights
