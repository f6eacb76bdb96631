"""Gradients that large weights add to by themselves, and functions computed again, against autograd's."""

import pytest
import torch
from tiny import tiny_gpt

from litgpt.kernels.library import library
from litgpt.kernels.matrices import are_faster
from litgpt.train.model import TrainingModel, restore_forward
from litgpt.train.room import Room

CONFIGS = [
    {},
    {"bias": True},
    {"mlp_class_name": "GemmaMLP", "norm_unit_offset": True, "scale_embeddings": True},
    {"final_logit_softcapping": 5.0, "norm_qk": True},
    {"parallel_residual": True, "shared_attention_norm": True},
]


KERNELS = {"n_embd": 128, "intermediate_size": 96, "n_query_groups": 2, "n_layer": 2}


def nodes(of):
    """Names of the functions of a graph."""
    found, todo = [], [of]
    while todo:
        found.append(todo.pop())
        todo += {of for of, _ in found[-1].next_functions if of is not None} - {*found, *todo}
    return [of.name() for of in found]


def gradients(config, tied, kept, dtype=torch.float64, row_sizes=None, rounded=None):
    torch.manual_seed(0)
    gpt = tiny_gpt(**config).to(rounded or dtype).to(dtype).requires_grad_(True)
    if tied:
        gpt.lm_head.weight = gpt.transformer.wte.weight
    model = TrainingModel(gpt)
    if kept:
        model.keep_gradients()
    for batch in range(2):
        ids = torch.randint(0, 100, (2, 20), generator=torch.Generator().manual_seed(batch))
        ids = ids if row_sizes is None else ids.view(1, -1)
        (model(ids, ids, row_sizes=row_sizes, scale=0.25) * 0.25).backward()
    found = {name: p.grad.clone() for name, p in gpt.named_parameters()}
    restore_forward(gpt)
    assert not any({"forward", "gated"} & set(vars(module)) for module in gpt.modules())
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_autograds(config, tied, monkeypatch):
    plain = gradients(config, tied, kept=False)
    error = 1e-5 if config.get("norm_unit_offset") else 1e-10  # these norms compute in float32
    for size in (32 << 20, 1):  # all tokens at a time, and few
        monkeypatch.setattr("litgpt.train.loss.LOGITS_BYTES", size)
        ours = gradients(config, tied, kept=True)
        assert ours.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(ours[name], gradient, rtol=error, atol=error, msg=name)


OPTIONS = [
    {},
    {"nope_indices": [1, 0], "sliding_window_size": 7},
    {"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "norm_unit_offset": True, "n_query_groups": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_by_kernels_are_autograds(options):
    plain, ours = (gradients(KERNELS | options, True, kept, torch.float32, [13, 27]) for kept in (False, True))
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_by_kernels_are_no_further_from_the_exact_ones_than_autograds(options):
    config, sizes = KERNELS | options, [13, 27]
    exact = gradients(config, True, False, torch.float64, sizes, rounded=torch.bfloat16)
    plain, ours = (gradients(config, True, kept, torch.bfloat16, sizes) for kept in (False, True))
    for name, gradient in exact.items():
        error, usual = ((found[name] - gradient).norm() for found in (ours, plain))
        assert error < 1.25 * usual, name


@pytest.mark.skipif(not are_faster(), reason="no kernel for a whole layer")
def test_a_layer_is_one_function_and_runs_back_once():
    for options, count in [({}, 2), ({"post_mlp_norm": True}, 0), ({"bias": True}, 0), ({"norm_qk": True}, 0)]:
        gpt = tiny_gpt(**KERNELS | options).bfloat16().requires_grad_(True)
        model, ids = TrainingModel(gpt), torch.randint(0, 100, (1, 20))
        model.keep_gradients()
        loss = model(ids, ids, scale=1.0)
        assert nodes(loss.grad_fn).count("_BlockBackward") == count
    gpt = tiny_gpt(**KERNELS).bfloat16().requires_grad_(True)
    model = TrainingModel(gpt)
    model.keep_gradients()
    y = gpt(torch.randint(0, 100, (1, 20)), skip_lm_head=True).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        y.backward()


@pytest.mark.skipif(library() is None, reason="no compiled kernels")
def test_attention_is_one_function_for_plain_heads_alone():
    for options, used in [({}, True), ({"bias": True}, False), ({"attention_logit_softcapping": 20.0}, False)]:
        gpt = tiny_gpt(n_embd=128, **options).requires_grad_(True)
        model, ids = TrainingModel(gpt), torch.randint(0, 100, (1, 20))
        model.keep_gradients()
        assert ("_AttentionBackward" in nodes(model(ids, ids, scale=1.0).grad_fn)) == used


@pytest.mark.skipif(not are_faster(), reason="no kernel writes to memory of one's own")
@pytest.mark.parametrize(("options", "parts"), [({}, 1), ({"post_mlp_norm": True}, 2)])
def test_what_is_kept_lies_in_the_same_memory_and_is_not_overwritten(options, parts, monkeypatch):
    take = Room.take

    def noted_take(room, *args):
        memory, parts = take(room, *args)
        places[-1].append(memory.data_ptr())
        return memory, parts

    def run(at_once):
        torch.manual_seed(0)
        gpt = tiny_gpt(n_embd=128, **options).bfloat16().requires_grad_(True)
        model, losses = TrainingModel(gpt), []
        model.keep_gradients()
        for size in (40, 50, 45, 35):
            ids = torch.randint(0, 100, (1, size))
            places.append([])
            losses.append(model(ids, ids, scale=1.0))
            if not at_once:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        return [p.grad for p in gpt.parameters()]

    monkeypatch.setattr(Room, "take", noted_take)
    places = []
    one_by_one = run(at_once=False)
    _, largest, *later = places
    assert len(set(largest)) == 2 * parts + 1, "two layers, each with memory for its parts, and the logits"
    assert later == [largest, largest]
    places = []
    at_once = run(at_once=True)
    of_layers = [place for taken in places for place in taken[: 2 * parts]]
    assert len(set(of_layers)) == 4 * 2 * parts, "memory that a backward pass still needs was given away"
    for a, b in zip(one_by_one, at_once, strict=True):
        assert torch.equal(a, b)


def test_a_loss_multiplied_by_something_else_is_refused():
    gpt = tiny_gpt().requires_grad_(True)
    model = TrainingModel(gpt)
    model.keep_gradients()
    ids = torch.randint(0, 100, (2, 20))
    with pytest.raises(RuntimeError, match=r"multiplied by 0\.5, not by 2"):
        (model(ids, ids, scale=0.5) * 2).backward()


@pytest.mark.parametrize("mlp", ["LLaMAMLP", "GemmaMLP"])
def test_results_of_norms_and_gates_are_not_kept(mlp):
    gpt = tiny_gpt(mlp_class_name=mlp, intermediate_size=50).requires_grad_(True)
    model = TrainingModel(gpt)
    model.keep_gradients()
    ids, kept = torch.randint(0, 100, (1, 20)), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        model(ids, ids, scale=1.0)
    layers = gpt.config.n_layer
    assert sum(x.shape[-1] == 50 and 20 in x.shape for x in kept.values()) == 2 * layers  # the gate's two inputs
    residuals = [x for x in kept.values() if x.shape[-1] == gpt.config.n_embd and x.shape[0] in (1, 20)]
    assert len(residuals) <= 4 * layers  # inputs of norms and of products behind attention, not results of norms
