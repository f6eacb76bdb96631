"""The shares of a training step's time, as torch's profiler sees them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

KINDS = {
    "products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "mkldnn::_linear_pointwise",
        "_Linear",
        "_LowRank",
        "_GatedMLP",
    ),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "_RowAttention"),
    "optimizer": ("aten::_fused_adamw",),
}
HEAD = "_HeadLoss"  # the node of the graph that has the head and the loss


def shares_of(function: Callable[[], Any]) -> dict[str, float]:
    """Share of the time of every kind of work in a call of `function`: head and loss, products of the layers, attention,
    the optimizer, and the rest, which is operations element by element, data and Python."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    seconds: Counter[str] = Counter()
    for event in profiler.events():
        ancestor = event
        while ancestor is not None and not ancestor.name.startswith(HEAD):
            ancestor = ancestor.cpu_parent
        kind = next((kind for kind, names in KINDS.items() if event.name.startswith(names)), "rest")
        seconds["head and loss" if ancestor is not None else kind] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: spent / total for kind, spent in seconds.most_common()}
