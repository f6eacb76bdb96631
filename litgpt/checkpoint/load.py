"""From a checkpoint to a model in memory, and from either to a LitGPT folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.overrides import TorchFunctionMode

from litgpt.checkpoint.base import CONFIG_NAME, EMBEDDING, HEAD, QUANTIZED_NAME, WEIGHTS_NAME, Checkpoint, Piece
from litgpt.checkpoint.files import copy_side_files, replacing, write_safetensors, write_state_dict
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
    """A model with a checkpoint's weights, in `dtype` (default: as stored) on `device`, which may depend on a module's name.

    Every weight is copied once, from the file into the model; a tied output embedding is the input embedding's tensor, in training
    too: both learn as one. With `tie_embeddings=False` it is a copy that learns apart, as in LitGPT.
    With `quantize` (int8 or int4) every piece is quantised as it is read; bitsandbytes gets the whole model, on the CPU.
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
        model = fill_model(model, checkpoint.pieces(), checkpoint.tied, dtype, "cpu")
        quantize_model(model, quantize)
        return model.to(device)
    if quantize is not None:
        quantize_meta(model, Scheme(quantize), dtype, checkpoint.tied)
    tied = checkpoint.tied and (tie_embeddings or model.quantization is not None)
    return fill_model(model, checkpoint.stored(), tied, dtype, device)


def quantize_meta(model: GPT, how: Scheme, dtype: torch.dtype, tied: bool) -> None:
    """Have a meta model take quantised weights."""
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    quantize_model(model.to(dtype), how.mode, how.group_size)


def meta_model(config: Config, kind: Callable[[Config], GPT] = GPT) -> GPT:
    """A model that has shapes and no memory, as `kind` makes it."""
    with torch.device("meta"), _WithoutRandomNumbers():
        return kind(config)


def fill_model(
    model: GPT,
    pieces: Iterable[Piece],
    tied: bool,
    dtype: torch.dtype,
    device: torch.device | str | Callable[[str], torch.device],
) -> GPT:
    """Gives a meta model memory, and weights from pieces that fit it; a quantised model quantises those that are not yet."""
    _allocate(model, dtype, device if callable(device) else lambda name: device)
    if tied and not is_tied(model):
        model.lm_head.weight = model.transformer.wte.weight
    targets = model.state_dict()
    quantized = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    done, total = set(), sum(not name.endswith((".scale", ".minimum")) for name in targets)
    with torch.no_grad():
        for name, row, piece in pieces:
            if tied and name == HEAD:
                continue
            done.add(name)
            report_progress(len(done) - 1, total)
            if name in quantized and piece.is_floating_point():
                quantized[name].set_rows(row, piece)
            else:
                targets[name].narrow(0, row, piece.shape[0]).copy_(piece)
    return model.eval()


def _allocate(model: GPT, dtype: torch.dtype, device_of: Callable[[str], torch.device | str]) -> None:
    """Gives memory to a meta model, as `to_empty` does; that would import torch's compiler, for more than 0.5 s."""
    for path, module in model.named_modules():
        device = device_of(path)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


class _WithoutRandomNumbers(TorchFunctionMode):
    """Skips the initialisation of weights: drawing for a meta tensor would import torch's compiler, for most of 1 s."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def is_tied(model: GPT) -> bool:
    """Whether input and output embedding are one tensor."""
    return model.lm_head.weight is model.transformer.wte.weight


def check_weights(checkpoint: Checkpoint, model: GPT) -> None:
    """Compares names and shapes of a checkpoint with a model's; one `ValueError` names the first of every kind of difference."""
    kinds = ("missing", "not expected", "wrong shape or type")
    pieces = checkpoint.pieces(meta=True) if model.quantization is None else checkpoint.stored(meta=True)
    found = zip(kinds, weight_differences(model.state_dict(), pieces), strict=True)
    if problems := "; ".join(f"{kind}: {listed(names)}" for kind, names in found if names):
        raise ValueError(f"{checkpoint.path}: weights do not fit the config {model.config.name!r}: {problems}")


def weight_differences(
    weights: Mapping[str, torch.Tensor], pieces: Iterable[Piece]
) -> tuple[list[str], list[str], list[str]]:
    """What pieces lack to be `weights`: names that are missing, names that are too many, and wrong shapes in words."""
    expected = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    rows = dict.fromkeys(expected, 0)
    extra: list[str] = []
    wrong: dict[str, str] = {}
    for name, row, piece in pieces:
        if name not in expected:
            extra.append(name)
            continue
        shape, found = expected[name], tuple(piece.shape)
        if weights[name].is_floating_point() and not piece.is_floating_point():
            wrong.setdefault(name, f"{name} of {str(piece.dtype).removeprefix('torch.')}")
        rows[name] += found[0] if found else 1
        if not found or found[1:] != shape[1:] or row + found[0] > shape[0]:
            wrong.setdefault(name, f"{name} {found} for {shape}")
    for name, count in rows.items():
        if 0 < count != expected[name][0]:
            wrong.setdefault(name, f"{name} {count} rows for {expected[name][0]}")
    return [name for name, count in rows.items() if count == 0], extra, list(wrong.values())


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
        dtype: Of the written weights (default: as they are).
        progress: Called with the name and the bytes of every piece that was written.
    """
    out_dir, config = Path(out_dir), source.config
    meta = meta_model(config)
    if isinstance(source, Checkpoint):
        check_weights(source, meta)
        stored = {name: piece.dtype for name, _, piece in source.pieces(meta=True)}
        tied, pieces = source.tied, source.pieces()
    else:
        weights = source.state_dict()
        stored = {name: tensor.dtype for name, tensor in weights.items()}
        tied = is_tied(source)
        pieces = ((name, 0, tensor.cpu()) for name, tensor in weights.items())
    if tied:
        pieces = (piece for piece in pieces if piece[0] != HEAD)
    layout = {name: torch.empty(t.shape, dtype=dtype or stored[name]) for name, t in meta.state_dict().items()}
    if tied:
        layout[HEAD] = layout[EMBEDDING]
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_side_files(source, out_dir, tokenizer_dir)
    write_state_dict(out_dir / WEIGHTS_NAME, layout, _reporting(pieces, progress))  # last: they make it a checkpoint


def save_quantized(
    source: Checkpoint | GPT,
    out_dir: str | Path,
    how: Scheme | None = None,
    *,
    tokenizer_dir: str | Path | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes `lit_model_quantized.safetensors`, `model_config.yaml` and the tokenizer's files.

    Args:
        source: A checkpoint, quantised with one of its tensors in memory, or a model that is quantised.
        out_dir: Made if it does not exist; files of these names in it are replaced.
        how: To quantise a checkpoint: int8 or int4.
        tokenizer_dir: Where the tokenizer comes from (default: the checkpoint; a model has none).
        progress: Called with the name and the bytes of every tensor of a checkpoint that is done.

    Raises `ValueError` for what is quantised already, or with bitsandbytes, and `FileExistsError` if `out_dir` holds
    weights of another kind. Nothing is written then.
    """
    out_dir = Path(out_dir)
    others = [file.name for kind in ("*.safetensors", "*.pth", "*.bin", "*.gguf") for file in out_dir.glob(kind)]
    if others := sorted(set(others) - {QUANTIZED_NAME}):
        raise FileExistsError(f"{out_dir} holds weights already ({others[0]}): give another folder")
    if isinstance(source, Checkpoint):
        if source.quantization is not None:
            raise ValueError(f"{source.path} is quantised already ({source.quantization.mode})")
        model, dtype = meta_model(source.config), source.dtype
        check_weights(source, model)
        stored = {name: piece.dtype for name, _, piece in source.pieces(meta=True)}
        quantize_meta(model, how, dtype, source.tied)
        tensors = _quantized_tensors(source, model, progress)
        layout = {
            # not `empty_like`, which without memory takes what torch compiles with: 40 MB more
            name: torch.empty(
                x.shape, dtype=stored.get(name, x.dtype) if x.is_floating_point() else x.dtype, device="meta"
            )
            for name, x in model.state_dict().items()
        }
    else:
        how, dtype, layout = source.quantization, source.dtype, source.state_dict()
        tensors = ((name, tensor.cpu()) for name, tensor in layout.items())
    if how.mode not in MODES:
        raise ValueError(f"weights quantised as {how.mode} cannot be saved, only {' and '.join(MODES)}")
    about = {"quantization": how.mode, "group_size": str(how.group_size), "dtype": str(dtype).removeprefix("torch.")}
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_side_files(source, out_dir, tokenizer_dir)
    write_safetensors(out_dir, {QUANTIZED_NAME: layout}, tensors, about)  # last: they make it a checkpoint


def _quantized_tensors(
    checkpoint: Checkpoint, model: GPT, progress: Callable[[str, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of a quantised model, which need not have memory, for the weights of a checkpoint."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, _, tensor in _reporting(((name, 0, tensor) for name, tensor in checkpoint.tensors()), progress):
        module, _, kind = name.rpartition(".")
        if name == HEAD and checkpoint.tied:
            continue
        if module in layers and kind == "weight":
            yield from ((f"{module}.{kind}", values) for kind, values in layers[module].quantized(tensor).items())
        else:
            yield name, tensor


def save_config(config: Config, checkpoint_dir: str | Path) -> None:
    """Writes `model_config.yaml` into a folder."""
    with replacing(Path(checkpoint_dir) / CONFIG_NAME) as temporary:
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def _write_side_files(source: Checkpoint | GPT, out_dir: Path, tokenizer_dir: str | Path | None) -> None:
    save_config(source.config, out_dir)
    if tokenizer_dir is not None:
        copy_side_files(Path(tokenizer_dir), out_dir)
    elif isinstance(source, Checkpoint):
        source.copy_side_files(out_dir)


def _reporting(pieces: Iterable[Piece], progress: Callable[[str, int], None] | None) -> Iterator[Piece]:
    for name, row, piece in pieces:
        yield name, row, piece
        if progress is not None:
            progress(name, piece.nbytes)
