"""From a checkpoint to a model in memory, and from either to a LitGPT folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import yaml

from litgpt.checkpoint.base import CONFIG_NAME, EMBEDDING, HEAD, QUANTIZED_NAME, WEIGHTS_NAME, Checkpoint, RowShard
from litgpt.checkpoint.files import copy_side_files, replacing, write_safetensors, write_state_dict
from litgpt.checkpoint.finetuned import Finetuned
from litgpt.checkpoint.litgpt_folder import LitGPTCheckpoint
from litgpt.checkpoint.meta_model import meta_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.runners.quantized_weights import BNB_MODES, MODES, QuantizedLinear, Scheme, quantize_model
from litgpt.settings import listed
from litgpt.waiting import report_progress


def load_model(
    checkpoint: Checkpoint | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Callable[[str], torch.device] = "cpu",
    quantize: str | None = None,
    tie_embeddings: bool = True,
) -> GPT:
    """A model with a checkpoint's weights, in `dtype` (default: as stored) on `device`, or on `device(name)` for each module.

    Every weight is copied once, from the file into the model. A tied output embedding is the input embedding's tensor, in
    training too; with `tie_embeddings=False` it is a copy that is trained apart, as in LitGPT. With `quantize` (int8 or
    int4) every row shard is quantised as it is read; bitsandbytes quantises the whole model, on the CPU.
    Raises `ValueError` naming the first weights that are missing, not expected or of the wrong shape.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    how, dtype = checkpoint.quantization, dtype or checkpoint.dtype
    if quantize is not None and how is not None:
        raise ValueError(f"{checkpoint.path} is quantised already ({how.mode}): leave out quantize={quantize!r}")
    model = meta_model(checkpoint.config)
    if how is not None:
        quantize_meta(model, how, dtype, checkpoint.tied)
    check_weights(checkpoint, model)
    if quantize in BNB_MODES:
        if callable(device):
            raise ValueError(f"quantize={quantize!r} is for one device: use int8 or int4")
        model = fill_model(model, checkpoint.row_shards(), checkpoint.tied, dtype, "cpu")
        quantize_model(model, quantize)
        return model.to(device)
    if quantize is not None:
        quantize_meta(model, Scheme(quantize), dtype, checkpoint.tied)
    tied = checkpoint.tied and (tie_embeddings or model.quantization is not None)
    return fill_model(model, checkpoint.stored(), tied, dtype, device)


def load_finetuned(
    finetuned: Finetuned,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
) -> GPT:
    """The fine-tuned model of `checkpoint`, for inference. Nothing is loaded if the trained weights do not fit it.

    With `quantize` the weights of the checkpoint are quantised; LoRA's and an adapter's are not.
    """
    config = finetuned.config(checkpoint.config)
    if finetuned.method == "full":
        path = finetuned.path
        return load_model(LitGPTCheckpoint(path.parent, path.name, config), dtype, device, quantize)
    finetuned.part(config)
    model = load_model(checkpoint, dtype, device, quantize)
    finetuned.add_to(model, config)
    return model


def quantize_meta(model: GPT, how: Scheme, dtype: torch.dtype, tied: bool) -> None:
    """Replaces the layers of a meta model by those that hold quantised weights."""
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    quantize_model(model.to(dtype), how.mode, how.group_size)


def fill_model(
    model: GPT,
    row_shards: Iterable[RowShard],
    tied: bool,
    dtype: torch.dtype,
    device: torch.device | str | Callable[[str], torch.device],
) -> GPT:
    """Gives a meta model memory and weights; a quantised model quantises those that are not yet."""
    _allocate(model, dtype, device if callable(device) else lambda name: device)
    if tied and not is_tied(model):
        model.lm_head.weight = model.transformer.wte.weight
    targets = model.state_dict()
    quantized = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    done, total = set(), sum(not name.endswith((".scale", ".minimum")) for name in targets)
    with torch.no_grad():
        for name, row, shard in row_shards:
            if tied and name == HEAD:
                continue
            done.add(name)
            report_progress(len(done) - 1, total)
            if name in quantized and shard.is_floating_point():
                quantized[name].set_rows(row, shard)
            else:
                targets[name].narrow(0, row, shard.shape[0]).copy_(shard)
    return model.eval()


def _allocate(model: GPT, dtype: torch.dtype, device_of: Callable[[str], torch.device | str]) -> None:
    """Gives memory to a meta model, as `to_empty` does; that would import torch's compiler, for more than 0.5 s."""
    for path, module in model.named_modules():
        device = device_of(path)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def is_tied(model: GPT) -> bool:
    """Whether input and output embedding are one tensor."""
    return model.lm_head.weight is model.transformer.wte.weight


class ModelCheckpoint(Checkpoint):
    """A model in memory, to be saved as any other checkpoint. It has no tokenizer."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.config.name or "the model")
        self._model, self.config, self.dtype = model, model.config, model.dtype
        self.tied, self.quantization = is_tied(model), model.quantization

    def row_shards(self, meta: bool = False) -> Iterator[RowShard]:
        for name, tensor in self._model.state_dict().items():
            yield name, 0, tensor.to("meta" if meta else "cpu")

    def copy_side_files(self, out_dir: Path) -> None:
        """Copies nothing."""


def check_weights(checkpoint: Checkpoint, model: GPT) -> None:
    """Compares names and shapes of a checkpoint with a model's; one `ValueError` names the first of each kind of difference."""
    kinds = ("missing", "not expected", "wrong shape or type")
    shards = checkpoint.row_shards(meta=True) if model.quantization is None else checkpoint.stored(meta=True)
    found = zip(kinds, weight_differences(model.state_dict(), shards), strict=True)
    if problems := "; ".join(f"{kind}: {listed(names)}" for kind, names in found if names):
        raise ValueError(f"{checkpoint.path}: weights do not fit the config {model.config.name!r}: {problems}")


def weight_differences(
    weights: Mapping[str, torch.Tensor], row_shards: Iterable[RowShard]
) -> tuple[list[str], list[str], list[str]]:
    """How row shards differ from `weights`: names that are missing, names that are too many, and wrong shapes in words."""
    expected = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    rows = dict.fromkeys(expected, 0)
    extra: list[str] = []
    wrong: dict[str, str] = {}
    for name, row, shard in row_shards:
        if name not in expected:
            extra.append(name)
            continue
        shape, found = expected[name], tuple(shard.shape)
        if weights[name].is_floating_point() and not shard.is_floating_point():
            wrong.setdefault(name, f"{name} of {str(shard.dtype).removeprefix('torch.')}")
        rows[name] += found[0] if found else 1
        if not found or found[1:] != shape[1:] or row + found[0] > shape[0]:
            wrong.setdefault(name, f"{name} {found} for {shape}")
    for name, count in rows.items():
        if 0 < count != expected[name][0]:
            wrong.setdefault(name, f"{name} {count} rows for {expected[name][0]}")
    return [name for name, count in rows.items() if count == 0], extra, list(wrong.values())


def layout_to_write(
    source: Checkpoint, dtype: torch.dtype | None, device: torch.device | str | None = None
) -> dict[str, torch.Tensor]:
    """The parameters of a checkpoint as empty tensors, in `dtype` or as stored, without a tied output embedding.

    Raises `ValueError` if the weights do not fit the config.
    """
    meta = meta_model(source.config)
    check_weights(source, meta)
    stored = {name: shard.dtype for name, _, shard in source.row_shards(meta=True)}
    return {
        name: torch.empty(tensor.shape, dtype=dtype or stored[name], device=device)
        for name, tensor in meta.state_dict().items()
        if not (source.tied and name == HEAD)
    }


def save_litgpt(
    source: Checkpoint | GPT,
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes `lit_model.pth`, `model_config.yaml` and the tokenizer's files: a folder that LitGPT loads too.

    Args:
        source: A checkpoint, converted with about one of its files in memory, or a model.
        out_dir: Made if it does not exist; files of these names in it are replaced.
        tokenizer_dir: Where the tokenizer comes from (default: the checkpoint; a model has none).
        dtype: Data type to write (default: unchanged).
        progress: Called with the name and the bytes of every tensor, or shard of one, that was written.
    """
    source = source if isinstance(source, Checkpoint) else ModelCheckpoint(source)
    out_dir, layout = Path(out_dir), layout_to_write(source, dtype)
    if source.tied:
        layout[HEAD] = layout[EMBEDDING]
    shards = (shard for shard in source.row_shards() if not (source.tied and shard[0] == HEAD))
    out_dir.mkdir(parents=True, exist_ok=True)
    save_config(source.config, out_dir)
    if tokenizer_dir is None:
        source.copy_side_files(out_dir)
    else:
        copy_side_files(Path(tokenizer_dir), out_dir)
    write_state_dict(out_dir / WEIGHTS_NAME, layout, reporting(shards, progress))  # last: they make it a checkpoint


def save_quantized(
    source: Checkpoint | GPT,
    out_dir: str | Path,
    how: Scheme | None = None,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes `lit_model_quantized.safetensors`, `model_config.yaml` and the tokenizer's files.

    Args:
        source: A checkpoint, quantised with one of its tensors in memory, or a model that is quantised.
        out_dir: Made if it does not exist; files of these names in it are replaced.
        how: For a checkpoint: int8 or int4.
        progress: As of `save_litgpt`.

    Nothing is written where it raises: `ValueError` for weights that are quantised already, or with bitsandbytes;
    `FileExistsError` if `out_dir` holds weights of another kind.
    """
    out_dir = Path(out_dir)
    others = [file.name for kind in ("*.safetensors", "*.pth", "*.bin", "*.gguf") for file in out_dir.glob(kind)]
    if others := sorted(set(others) - {QUANTIZED_NAME}):
        raise FileExistsError(f"{out_dir} holds weights already ({others[0]}): give another folder")
    if isinstance(source, Checkpoint):
        if source.quantization is not None:
            raise ValueError(f"{source.path} is quantised already ({source.quantization.mode})")
        stored = layout_to_write(source, None, "meta")
        model = meta_model(source.config)
        quantize_meta(model, how, source.dtype, source.tied)
        tensors = _quantized_tensors(reporting(source.tensors(), progress), model, source.tied)
        layout = {
            # not `empty_like`, which without memory imports torch's compiler: 40 MB more
            name: torch.empty(x.shape, dtype=(stored.get(name, x) if x.is_floating_point() else x).dtype, device="meta")
            for name, x in model.state_dict().items()
        }
    else:
        source = ModelCheckpoint(source)
        how, layout = source.quantization, {name: shard for name, _, shard in source.row_shards(meta=True)}
        tensors = source.tensors()
    if how.mode not in MODES:
        raise ValueError(f"weights quantised as {how.mode} cannot be saved, only {' and '.join(MODES)}")
    about = {"quantization": how.mode, "group_size": str(how.group_size)}
    about["dtype"] = str(source.dtype).removeprefix("torch.")
    out_dir.mkdir(parents=True, exist_ok=True)
    save_config(source.config, out_dir)
    source.copy_side_files(out_dir)
    write_safetensors(out_dir, {QUANTIZED_NAME: layout}, tensors, about)  # last: they make it a checkpoint


def _quantized_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], model: GPT, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of a quantised model, which may be a meta model, from weights that are not quantised."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, tensor in tensors:
        module, _, kind = name.rpartition(".")
        if name == HEAD and tied:
            continue
        if module in layers and kind == "weight":
            yield from ((f"{module}.{kind}", values) for kind, values in layers[module].quantized(tensor).items())
        else:
            yield name, tensor


def save_config(config: Config, checkpoint_dir: str | Path) -> None:
    """Writes `model_config.yaml` into a folder."""
    with replacing(Path(checkpoint_dir) / CONFIG_NAME) as temporary:
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


_Named = TypeVar("_Named", bound=tuple)


def reporting(items: Iterable[_Named], progress: Callable[[str, int], None] | None) -> Iterator[_Named]:
    """Passes on items that begin with a name and end with a tensor, and reports each after it was used."""
    for item in items:
        yield item
        if progress is not None:
            progress(item[0], item[-1].nbytes)
