import copy

import pytest
import torch
from torch import nn

import litgpt.moe
from litgpt.config import Config
from litgpt.model import GPT, ClampedMLP, LLaMAMLP, LLaMAMoE
from litgpt.moe import Experts, GroupedTopkRouter, mix_experts, mix_experts_grouped, stack_experts

GROUPED_ON_CPU = hasattr(torch.nn.functional, "grouped_mm")
SIZES = {"n_embd": 16, "n_head": 2, "vocab_size": 40, "padded_vocab_size": 40, "block_size": 64, "n_layer": 2}
MIXTURE = SIZES | {
    "mlp_class_name": "LLaMAMoE",
    "norm_class_name": "RMSNorm",
    "bias": False,
    "parallel_residual": False,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_expert": 6,
    "n_expert_per_token": 2,
}
GROUPED = MIXTURE | {"n_expert_groups": 3, "n_topk_groups": 2, "n_topk_scores_per_group": 2}


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.requires_grad_(False)


def one_by_one(x, weights, chosen, experts):
    """Every token through each of its experts alone."""
    rows = [
        sum(w * experts[int(e)](token[None])[0] for w, e in zip(ws, es, strict=True))
        for token, ws, es in zip(x, weights, chosen, strict=True)
    ]
    return torch.stack(rows)


def make_experts(kind, bias):
    config = Config(**MIXTURE | {"bias": bias, "swiglu_limit": 0.7})
    return randomised(Experts(kind(config, 8) for _ in range(6)))


@pytest.mark.parametrize(("kind", "bias"), [(LLaMAMLP, False), (LLaMAMLP, True), (ClampedMLP, True)])
@pytest.mark.parametrize("tokens", [1, 13])
def test_every_token_gets_the_weighted_sum_of_its_experts(kind, bias, tokens):
    experts = make_experts(kind, bias)
    x, weights = torch.randn(tokens, 16), torch.rand(tokens, 3)
    chosen = torch.rand(tokens, 6).topk(3).indices % 5  # the last expert is idle
    chosen[0] = torch.tensor([4, 0, 2])
    expected = one_by_one(x, weights, chosen, experts)
    torch.testing.assert_close(mix_experts(x, weights, chosen, experts), expected, atol=1e-5, rtol=1e-5)
    if GROUPED_ON_CPU:
        before = {name: value.clone() for name, value in experts.state_dict().items()}
        stacks = stack_experts(experts)
        grouped = mix_experts_grouped(x, weights, chosen, experts, stacks)
        torch.testing.assert_close(grouped, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dict(experts.state_dict()), before, atol=0, rtol=0)
        assert experts[1].fc_2.weight.data_ptr() == stacks.up[1, 8:].data_ptr()


@pytest.mark.skipif(not GROUPED_ON_CPU, reason="this build of torch has no grouped product on CPU")
def test_stacks_follow_weights_that_are_replaced(monkeypatch):
    monkeypatch.setattr(litgpt.moe, "can_group", lambda x: True)
    experts = make_experts(LLaMAMLP, bias=False)
    x, weights, chosen = torch.randn(5, 16), torch.rand(5, 2), torch.tensor([[0, 1], [2, 3], [4, 5], [0, 5], [1, 2]])
    with torch.inference_mode():
        experts(x, weights, chosen)
        experts[0].fc_1.weight.data = torch.randn(8, 16)
        expected = one_by_one(x, weights, chosen, experts)
        torch.testing.assert_close(experts(x, weights, chosen), expected, atol=1e-5, rtol=1e-5)
    experts.requires_grad_(True)
    experts(x, weights, chosen).sum().backward()  # training goes on with the same parameters
    assert experts[0].fc_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_the_grouped_router_takes_the_best_experts_of_the_best_groups(norm_topk_prob):
    sizes = GROUPED | {"n_expert": 12, "n_expert_groups": 4, "n_expert_per_token": 3}
    router = randomised(GroupedTopkRouter(Config(**sizes, norm_topk_prob=norm_topk_prob)))
    router.e_score_correction_bias.normal_(std=0.2)
    x = torch.randn(50, 16)
    weights, chosen = router(x)
    for token, ws, es in zip(x, weights, chosen, strict=True):
        scores = (router.weight @ token).sigmoid()
        corrected = (scores + router.e_score_correction_bias).tolist()
        sums = [sum(sorted(corrected[3 * g : 3 * g + 3])[1:]) for g in range(4)]  # of the two best
        groups = sorted(range(4), key=sums.__getitem__, reverse=True)[:2]
        allowed = [e for e in range(12) if e // 3 in groups]
        best = sorted(allowed, key=corrected.__getitem__, reverse=True)[:3]
        assert sorted(es.tolist()) == sorted(best)
        expected = scores[es] / scores[es].sum() if norm_topk_prob else scores[es]
        torch.testing.assert_close(ws, expected)


def test_routed_experts_are_scaled_and_shared_ones_added():
    layer = randomised(LLaMAMoE(Config(**GROUPED, n_shared_expert=2, routed_scaling_factor=2.5)))
    x = torch.randn(2, 3, 16)
    weights, chosen = layer.gate(x.view(6, 16))
    routed = one_by_one(x.view(6, 16), 2.5 * weights, chosen, layer.experts).view(2, 3, 16)
    torch.testing.assert_close(layer(x), routed + layer.shared_experts(x), atol=1e-5, rtol=1e-5)
    assert layer.shared_experts.fc_1.out_features == 16


def test_first_layers_may_be_dense():
    model = GPT(Config(**MIXTURE, first_k_dense_replace=1))
    assert type(model.transformer.h[0].mlp) is LLaMAMLP
    assert type(model.transformer.h[1].mlp) is LLaMAMoE
    assert model.transformer.h[0].mlp.fc_1.out_features == 24


def test_gradients_reach_the_router_and_the_experts_in_use():
    layer = LLaMAMoE(Config(**MIXTURE))
    layer(torch.randn(1, 8, 16)).pow(2).sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0
    assert sum(expert.proj.weight.grad is not None for expert in layer.experts) > 1


@torch.inference_mode()
def test_a_mixture_compiles_as_one_graph():
    model = randomised(GPT(Config(**GROUPED, n_shared_expert=1, rotary_percentage=1.0)))
    tokens = torch.randint(40, (1, 5))
    expected = model(tokens)
    for used in (model, copy.deepcopy(model)):
        layers = torch.compile(used.run_layers, fullgraph=True, backend="eager")
        torch.testing.assert_close(used.logits(layers(tokens, used.rope_rows(0, 5), None, None)), expected)
        for parameter in model.transformer.h.parameters():
            parameter.zero_()  # the copy goes on with weights of its own
