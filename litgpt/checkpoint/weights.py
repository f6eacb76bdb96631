"""Maps a family's tensors to rows of our parameters, and back."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from litgpt.checkpoint.base import RowShard
from litgpt.checkpoint.files import GetTensor
from litgpt.config import Config
from litgpt.families.base import Family

_INDEX = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class _Rule:
    """Modules whose matrices are one: several of theirs stacked are one of ours, or the other way around."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class _Stack:
    """One tensor of theirs, (experts, in, out), whose columns alternate between modules of ours."""

    ours: tuple[str, ...]
    theirs: str

    def place(self, indices: list[str], kind: str, tensor: torch.Tensor) -> Iterator[RowShard]:
        for expert, matrix in enumerate(tensor):
            for part, module in enumerate(self.ours):
                columns = matrix[..., part :: len(self.ours)]
                yield f"{module.format(*indices, expert)}.{kind}", 0, columns.mT if kind == "weight" else columns

    def build(self, parts: list[torch.Tensor]) -> torch.Tensor:
        matrices = torch.stack([part.mT if part.ndim > 1 else part for part in parts])
        return matrices.unflatten(0, (-1, len(self.ours))).movedim(1, -1).flatten(-2)


class WeightMap:
    """The names and layouts of one family's weights, for a model of one config."""

    def __init__(self, family: Family, config: Config) -> None:
        self.family = family
        self.config = config
        rules = [_Rule((ours,), (theirs,)) for ours, theirs in family.outer.items()]
        for ours, theirs in family.block.items():
            names = theirs if isinstance(theirs, str) else theirs(config)
            rules.append(
                _Rule(
                    tuple(f"transformer.h.{{}}.{name}" for name in ours.split()),
                    tuple(f"{family.blocks}.{{}}.{name}" for name in names.split()),
                )
            )
        self._by_theirs = {name: rule for rule in rules for name in rule.theirs}
        self._by_ours = {name: rule for rule in rules for name in rule.ours}
        stacks = [
            _Stack(tuple(f"transformer.h.{{}}.{name}" for name in ours.split()), f"{family.blocks}.{{}}.{theirs}")
            for ours, theirs in family.stacked.items()
        ]
        self._stack_by_theirs = {stack.theirs: stack for stack in stacks}
        self._stack_by_ours = {name: stack for stack in stacks for name in stack.ours}

    def place(self, name: str, tensor: torch.Tensor) -> Iterator[RowShard]:
        """The row shards of our parameters that one of their tensors holds; an unknown name is yielded unchanged."""
        name = self._canonical(name)
        if any(mark in name for mark in self.family.ignored):
            return
        template, indices, leaf = _split(name)
        if self.family.extra_blocks and indices and int(indices[0]) >= self.config.n_layer:
            return
        if stack := self._stack_by_theirs.get(f"{template}.{leaf.removesuffix('_bias')}"):
            yield from stack.place(indices, "bias" if leaf.endswith("_bias") else "weight", tensor)
            return
        rule = self._by_theirs.get(template)
        if rule is None:
            yield name, 0, tensor
            return
        ours = [f"{module.format(*indices)}.{leaf}" for module in rule.ours]
        if len(rule.theirs) > 1:
            sizes = qkv_sizes(self.config)
            part = rule.theirs.index(template)
            yield ours[0], sum(sizes[:part]), tensor
        elif len(ours) > 1:
            for our_name, part in zip(ours, tensor.chunk(len(ours)), strict=True):
                yield our_name, 0, part
        elif self.family.interleaved_qkv and rule.ours[0].endswith(".attn.qkv"):
            yield from split_interleaved(ours[0], tensor, self.config)
        else:
            yield ours[0], 0, tensor

    def part(self, name: str) -> tuple[str, int, int] | None:
        """For a tensor of theirs that is stacked with others in a parameter of ours: our name, its index, their number."""
        template, indices, leaf = _split(self._canonical(name))
        rule = self._by_theirs.get(template)
        if rule is None or len(rule.theirs) == 1:
            return None
        return f"{rule.ours[0].format(*indices)}.{leaf}", rule.theirs.index(template), len(rule.theirs)

    def covers(self, name: str) -> bool:
        """Whether one of their tensors is known, even if it is left out."""
        name = self._canonical(name)
        template, _, leaf = _split(name)
        stacked = f"{template}.{leaf.removesuffix('_bias')}" in self._stack_by_theirs
        return stacked or template in self._by_theirs or any(mark in name for mark in self.family.ignored)

    def _canonical(self, name: str) -> str:
        """One of their names without the prefixes of some files."""
        for prefix, replacement in self.family.prefixes.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return name

    def theirs(self, names: list[str]) -> dict[str, tuple[str, ...]]:
        """For each of their tensors, the parameters of ours, among `names`, from which it is built."""
        made: dict[str, tuple[str, ...]] = {}
        for name in names:
            template, indices, leaf = _split(name)
            if stack := self._stack_by_ours.get(template):
                experts = range(self.config.n_expert)
                modules = [module.format(indices[0], expert) for expert in experts for module in stack.ours]
                their_name = stack.theirs.format(indices[0]) + ("_bias" if leaf == "bias" else "")
                made[their_name] = tuple(f"{module}.{leaf}" for module in modules)
                continue
            rule = self._by_ours.get(template)
            if rule is None:
                raise ValueError(f"{name!r} does not exist in the architecture {self.family.model_type!r}")
            sources = tuple(f"{module.format(*indices)}.{leaf}" for module in rule.ours)
            made |= {f"{module.format(*indices)}.{leaf}": sources for module in rule.theirs}
        return made

    def build(self, name: str, sources: tuple[str, ...], get_tensor: GetTensor) -> torch.Tensor:
        """One of their tensors, built from our parameters (see `theirs`)."""
        template, _, leaf = _split(name)
        if stack := self._stack_by_theirs.get(f"{template}.{leaf.removesuffix('_bias')}"):
            return stack.build([get_tensor(source) for source in sources])
        rule = self._by_theirs[template]
        if len(sources) > 1:
            return torch.cat([get_tensor(source) for source in sources])
        tensor = get_tensor(sources[0])
        if len(rule.theirs) > 1:
            return tensor.split(qkv_sizes(self.config))[rule.theirs.index(template)]
        if self.family.interleaved_qkv and rule.ours[0].endswith(".attn.qkv"):
            return interleave(tensor, self.config)
        return tensor


def qkv_sizes(config: Config) -> list[int]:
    """Rows of the query, key and value parts of `attn.qkv`."""
    return [heads * config.head_size for heads in (config.n_head, config.n_query_groups, config.n_query_groups)]


def split_interleaved(name: str, tensor: torch.Tensor, config: Config) -> Iterator[RowShard]:
    """A matrix whose query, key and value rows alternate by head group, as three row shards of the parameter `name`."""
    per_group = config.n_head // config.n_query_groups
    if tensor.shape[0] != sum(qkv_sizes(config)):
        yield name, 0, tensor  # a wrong shape, which the reader reports
        return
    groups = tensor.unflatten(0, (config.n_query_groups, per_group + 2, config.head_size))
    first_row = 0
    for part in (groups[:, :per_group], groups[:, per_group : per_group + 1], groups[:, per_group + 1 :]):
        rows = part.flatten(0, 2)
        yield name, first_row, rows
        first_row += rows.shape[0]


def interleave(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """The inverse of `split_interleaved`, from a matrix with all query, then key, then value rows."""
    parts = tensor.split(qkv_sizes(config))
    groups = [part.unflatten(0, (config.n_query_groups, -1, config.head_size)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)


def _split(name: str) -> tuple[str, list[str], str]:
    """A module's name with `{}` for its indices, the indices, and the parameter's own name."""
    module, _, leaf = name.rpartition(".")
    return _INDEX.sub(".{}", module + ".")[:-1], _INDEX.findall(module + "."), leaf
