"""Run by every process of a group: layers that are divided among them are trained through caches as those of one process."""

import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))  # of `tiny`
from tiny import VOCABULARY, tiny_gpt

from litgpt.kvcache import CacheSpec
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import add_lora, mark_only_lora_as_trainable
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.model import TrainingModel
from litgpt.train.setting import divide_parameters

LENGTH, LAYERS = 20, 2


def make(method: str, chunk: int | None) -> TrainingModel:
    torch.manual_seed(0)
    gpt = tiny_gpt(n_layer=LAYERS, block_size=64, **VOCABULARY).double()
    if method == "full":
        gpt.requires_grad_(True)
    else:
        add_lora(gpt, LoRAConfig.extending(gpt.config, lora_r=2, lora_alpha=4, lora_all=True, lora_dropout=0.2))
        gpt.double()
        for name, parameter in gpt.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        mark_only_lora_as_trainable(gpt)
    cached = None if chunk is None else CachedLayers(gpt, CacheSpec("h2o", cache_length=6), chunk)
    return TrainingModel(gpt.train(), cached_layers=cached)


def loss_of(model: torch.nn.Module, rank: int) -> torch.Tensor:
    torch.manual_seed(7 + rank)
    idx = torch.randint(0, 100, (1, LENGTH + 1))
    return model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


class Noted(torch.profiler.record_function):
    """Counts the parts of FSDP's work by their names, which end with that of the layer."""

    counts = Counter()

    def __init__(self, name: str) -> None:
        super().__init__(name)
        Noted.counts[name] += 1


def noted_all_reduce(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    Noted.counts["all_reduce"] += 1
    return allreduce_hook(None, bucket)


def check(method: str, n_chunks: int) -> None:
    """One step, of two kinds of processes and of one (no chunks: without caches)."""
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    chunk = LENGTH // n_chunks if n_chunks else None
    one = make(method, chunk)
    losses = [loss_of(one, other) for other in range(processes)]
    (sum(losses) / processes).backward()
    mesh = init_device_mesh("cpu", (processes,), mesh_dim_names=("data_parallel",))
    divided = divide_parameters(make(method, chunk), {"data_parallel": mesh})
    shared = DistributedDataParallel(make(method, chunk))
    shared.register_comm_hook(None, noted_all_reduce)
    for several in (divided, shared):
        Noted.counts.clear()
        loss, counts = loss_of(several, rank), Noted.counts
        loss.backward()
        torch.testing.assert_close(loss, losses[rank], rtol=1e-10, atol=1e-10)
        found, wanted = gradients(several), gradients(one)
        assert found.keys() == wanted.keys()
        assert len(found) > 4 * LAYERS
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10)
        if several is divided:
            for i in range(LAYERS):
                assert counts[f"FSDP::all_gather (gpt.transformer.h.{i})"] == 2, counts
                assert counts[f"FSDP::post_backward_reduce (gpt.transformer.h.{i})"] == 1, counts
        else:
            assert counts["all_reduce"] == 1, counts


def main() -> None:
    _fsdp_param_group.record_function = Noted
    for method, n_chunks in (("full", 0), ("full", 1), ("full", 2), ("full", 5), ("lora", 5)):
        check(method, n_chunks)
