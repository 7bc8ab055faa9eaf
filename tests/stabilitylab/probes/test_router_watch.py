"""Loads of HuggingFace's fused experts against a count by hand."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stabilitylab.probes.router_watch import RouterWatch

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_loads_of_fused_experts(family):
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
    }
    experts = (
        {"num_local_experts": 4} if family == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 16}
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **experts)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(
                lambda m, i, o, n=name: seen.setdefault(n, []).append((i[0], m.weight))
            )
    with RouterWatch(model) as watch:
        for seed in (1, 2):
            model(torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(seed)))
    readings = watch.readings()
    assert len(seen) == 2
    for name, calls in seen.items():
        load = [0] * 4
        for x, weight in calls:
            for row in x.reshape(-1, 16) @ weight.T:
                for expert in row.topk(2).indices.tolist():
                    load[expert] += 1
        total = sum(load)
        assert total == 2 * 16 * 2
        entropy = -sum(n / total * math.log(n / total) for n in load if n) / math.log(4)
        assert readings[f"experts/{name}/load_max"] == pytest.approx(max(load) / total * 4)
        assert readings[f"experts/{name}/load_entropy"] == pytest.approx(entropy)
        assert readings[f"experts/{name}/dead"] == load.count(0) / 4
        assert readings[f"experts/{name}/router_l2"] == pytest.approx(calls[0][1].norm().item(), rel=1e-5)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        share = (x @ self.weight.T).softmax(-1)
        weight, chosen = share.topk(2)
        return weight, chosen


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router()

    def forward(self, x):
        weight, chosen = self.router(x)
        return x + (weight[..., None] * self.router.weight[chosen]).sum(-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_choices_of_recomputed_layers_are_counted_once(reentrant):
    torch.manual_seed(0)
    model, loads = nn.Sequential(Layer(), Layer()), {}
    x = torch.randn(2, 6, 8, requires_grad=True)
    for recompute in (False, True):
        with RouterWatch(model) as watch:
            y = x
            for layer in model:
                y = checkpoint(layer, y, use_reentrant=reentrant) if recompute else layer(y)
            y.square().sum().backward()
        loads[recompute] = {path: load.tolist() for path, load in watch._loads.items()}
    assert loads[True] == loads[False]
    assert [sum(load) for load in loads[True].values()] == [2 * 6 * 2] * 2


def test_a_model_without_experts_says_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    with RouterWatch(model) as watch:
        model(torch.ones(1, 4))
    assert watch.readings() == {}
    assert not model[0]._forward_hooks
