"""Each probe's numbers against float64 computed aside, on a small GPT.

Powers and partial sums are float32 inside the summary (see test_summary): 1e-5 relative, of the magnitudes summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stabilitylab import Monitor
from stabilitylab.probes.activation_gradients import ActivationGradientProbe
from stabilitylab.probes.activations import ActivationProbe
from stabilitylab.probes.embedding_rows import TOP, EmbeddingRowProbe
from stabilitylab.probes.gradients import GradientProbe
from stabilitylab.probes.precision import PrecisionProbe
from stabilitylab.probes.updates import UpdateProbe
from stabilitylab.statistics.updates import SAMPLE, Update
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording, watch

Rows = dict[tuple[int, str, int], float]


def test_gradients_equal_float64() -> None:
    torch.manual_seed(0)
    model = GPT()
    monitor, sink = watch(model, GradientProbe())
    next_token_loss(model, batch(0)).backward()
    gradients = {n: p.grad.double().numpy() for n, p in model.named_parameters() if p.grad is not None}
    monitor.step(0)
    monitor.close()
    total = sum(float(np.sum(g**2)) for g in gradients.values())
    for name, g in gradients.items():
        found = {
            s: sink.rows[0, f"gradient/{name}/{s}", -1] for s in ("l2", "absmax", "mean", "std", "share")
        }
        assert found["l2"] == pytest.approx(np.linalg.norm(g), rel=1e-5)
        assert found["absmax"] == np.abs(g).max()
        assert found["mean"] == pytest.approx(g.mean(), rel=0, abs=1e-6 * np.abs(g).mean())
        assert found["std"] == pytest.approx(g.std(), rel=1e-5)
        assert found["share"] == pytest.approx(np.sum(g**2) / total, rel=1e-5)
        assert sink.rows[0, f"gradient/{name}/zero_fraction", -1] == np.mean(g == 0)
    assert sink.rows[0, "train/-/gradient_norm", -1] == pytest.approx(math.sqrt(total), rel=1e-5)


def test_given_norms_stand_in_for_gradients_that_are_gone() -> None:
    model = nn.Linear(3, 2)
    monitor, sink = watch(model, GradientProbe())
    assert isinstance(model.bias, Tensor)
    model.bias.grad = torch.tensor([0.0, 8.0])
    monitor.gradients_ready(gradients={"bias": model.bias.grad}, norms={"weight": 6.0, "bias": 8.0})
    monitor.step(0)
    monitor.close()
    assert sink.rows[0, "gradient/weight/l2", -1] == 6
    assert sink.rows[0, "gradient/weight/share", -1] == pytest.approx(0.36)
    assert sink.rows[0, "gradient/bias/share", -1] == pytest.approx(0.64)
    assert sink.rows[0, "train/-/gradient_norm", -1] == pytest.approx(10)
    assert (0, "gradient/weight/absmax", -1) not in sink.rows


def test_heaviest_embedding_rows_name_their_tokens() -> None:
    model = GPT()
    monitor, sink = watch(model, EmbeddingRowProbe())
    next_token_loss(model, batch(0)).backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    norms = gradient.double().norm(dim=1)
    monitor.gradients_ready(scale=4.0)
    monitor.step(0)
    monitor.close()
    order = norms.argsort(descending=True)[:TOP]
    site = "gradient/embedding.weight"
    assert sink.vector(0, f"{site}/top_row") == order.tolist()
    assert sink.vector(0, f"{site}/top_row_l2") == pytest.approx((norms[order] / 4).tolist(), rel=1e-6)
    share = norms[order].square().sum() / norms.square().sum()
    assert sink.vector(0, f"{site}/top_rows_share") == pytest.approx([float(share)], rel=1e-6)


def test_sparse_embedding_gradients() -> None:
    model = nn.Embedding(50, 4, sparse=True)
    monitor, sink = watch(model, EmbeddingRowProbe(), GradientProbe())
    (model(torch.tensor([7, 9, 9])) * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    monitor.step(0)
    monitor.close()
    assert sink.vector(0, "gradient/weight/top_row") == [9, 7]
    assert sink.vector(0, "gradient/weight/top_row_l2") == [10, 2]
    assert sink.rows[0, "gradient/weight/zero_fraction", -1] == 48 / 50
    assert sink.rows[0, "gradient/weight/l2", -1] == pytest.approx(math.sqrt(104))


def test_activation_sites_and_statistics_equal_float64() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=64)
    monitor, sink = watch(model, ActivationProbe())
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.update(
                {name: out.detach(), f"{name}:input": args[0].detach()}
            )
        )
    with torch.no_grad():  # outliers in one channel of the residual stream
        model.layers[0].feed_forward[2].bias[5] = 40.0
    next_token_loss(model, batch(0))
    monitor.step(0)
    monitor.close()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    sites = {*layers, *(f"{n}:input" for n in layers), "embedding", "layers.0", "layers.1"}
    assert {name.split("/")[1] for _, name, _ in sink.rows if name.startswith("activation/")} == sites
    for site in sites:
        x = seen[site].double().numpy()
        flat, size = x.reshape(-1, x.shape[-1]), np.abs(x)
        found = {n.rpartition("/")[2]: v for (_, n, _), v in sink.rows.items() if n.split("/")[1] == site}
        rms = math.sqrt(np.mean(x**2))
        channel = np.abs(flat).max(0)
        assert found["absmax"] == size.max()
        assert found["rms"] == pytest.approx(rms, rel=1e-5)
        assert found["mean"] == pytest.approx(x.mean(), abs=1e-6 * rms)
        assert found["kurtosis"] == pytest.approx(scipy.stats.kurtosis(x.ravel(), fisher=False), rel=1e-4)
        s2 = np.mean(flat**2, axis=0)
        assert found["channel_kurtosis"] == pytest.approx(np.mean(s2**2) / np.mean(s2) ** 2, rel=1e-4)
        assert found["channel_max_over_median"] == pytest.approx(channel.max() / np.median(channel), rel=1e-6)
        assert found["outlier_fraction"] == np.mean(size >= 6)
        assert found["outlier_6rms_fraction"] == pytest.approx(np.mean(size >= 6 * rms), abs=1 / size.size)
        assert found["fp16_headroom_bits"] == pytest.approx(math.log2(65504 / size.max()))
        assert found["fp8_e4m3_headroom_bits"] == pytest.approx(math.log2(448 / size.max()))
        assert found["fp8_e5m2_headroom_bits"] == pytest.approx(math.log2(57344 / size.max()))
        nonzero = size[size > 0]
        assert found["fp16_underflow_fraction"] == np.mean(nonzero <= 2.0**-25)
        assert found["fp8_underflow_fraction"] == np.mean(nonzero <= 2.0**-10)
        ordered = np.sort(size.ravel())
        for share in (1e-3, 1e-4, 1e-5, 1e-6):
            exact = ordered[-max(1, math.ceil(share * size.size))]
            assert exact / 1.126 <= found[f"quantile_{share:.0e}".replace("e-0", "e-")] <= exact * 1.126
    assert sink.rows[0, "activation/layers.0.feed_forward.2/channel_max_over_median", -1] > 20


def test_underflow_limits_are_those_of_the_formats() -> None:
    for dtype, limit in ((torch.float16, 2.0**-25), (torch.float8_e4m3fn, 2.0**-10)):
        assert torch.tensor(limit, dtype=torch.float32).to(dtype).float() == 0
        assert torch.tensor(limit * 1.001, dtype=torch.float32).to(dtype).float() > 0


def test_activation_gradients_equal_float64() -> None:
    torch.manual_seed(0)
    model = GPT()
    monitor, sink = watch(model, ActivationGradientProbe())
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            output.register_hook(lambda g: seen.update({name: g.detach().clone()}))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)) or name in ("embedding", "layers.0", "layers.1"):
            module.register_forward_hook(keep(name))
    (next_token_loss(model, batch(0)) * 1024).backward()
    monitor.gradients_ready(scale=1024.0)
    monitor.step(0)
    monitor.close()
    assert {n.split("/")[1] for _, n, _ in sink.rows if n.startswith("activation_gradient/")} == set(seen)
    for name, gradient in seen.items():
        g = gradient.double().numpy() / 1024
        found = {
            n.rpartition("/")[2]: v
            for (_, n, _), v in sink.rows.items()
            if n.startswith(f"activation_gradient/{name}/")
        }
        assert found["absmax"] == pytest.approx(np.abs(g).max(), rel=1e-7)
        assert found["rms"] == pytest.approx(math.sqrt(np.mean(g**2)), rel=1e-5)
        assert found["kurtosis"] == pytest.approx(scipy.stats.kurtosis(g.ravel(), fisher=False), rel=1e-4)
        assert found["fp16_headroom_bits"] == pytest.approx(math.log2(65504 / np.abs(g * 1024).max()))


def optimizers() -> dict[str, object]:
    return {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
        "fused adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }


@pytest.mark.parametrize("name", optimizers())
def test_updates_equal_float64(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 70), nn.Linear(70, 3))
    optimizer = optimizers()[name](model.parameters())  # type: ignore[operator]
    monitor, sink = watch(model, UpdateProbe(), optimizer=optimizer)
    for step in range(2):
        model(torch.randn(5, 80)).square().sum().backward()
        before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        optimizer.step()
        monitor.step(step)
        for n, p in model.named_parameters():
            found = {
                key.rpartition("/")[2]: value
                for (s, key, _), value in sink_after_flush(monitor, sink).items()
                if s == step and key.startswith(f"update/{n}/")
            }
            stride = Update(p).stride
            w, w2 = (x.reshape(-1)[::stride] for x in (before[n], p.detach().double()))
            assert len(w) >= min(SAMPLE, p.numel())
            rms = float((w2 - w).square().mean().sqrt())
            assert found["rms"] == pytest.approx(rms, rel=1e-6)
            assert found["weight_rms"] == pytest.approx(float(w.square().mean().sqrt()), rel=1e-6)
            assert found["ratio"] == pytest.approx(rms / float(w.square().mean().sqrt()), rel=1e-6)
            if name == "sgd":
                assert set(found) == {"rms", "weight_rms", "ratio"}
                continue
            state = optimizer.state[p]
            m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
            eps, beta2 = optimizer.defaults["eps"], optimizer.defaults["betas"][1]
            unbiased = v / (1 - beta2 ** float(state["step"]))
            assert p.grad is not None
            ratio = (p.grad.double().square() / unbiased.clamp_min(eps**2)).mean().sqrt()
            assert found["rms_t"] == pytest.approx(float(ratio), rel=1e-5)
            assert found["first_moment_l2"] == pytest.approx(float(m.norm()), rel=1e-6)
            assert found["second_moment_l2"] == pytest.approx(float(v.norm()), rel=1e-6)
            assert found["below_epsilon_fraction"] == float((unbiased < eps**2).double().mean())
        optimizer.zero_grad()
    monitor.close()


def sink_after_flush(monitor: Monitor, sink: Recording) -> Rows:
    monitor.flush()
    return sink.rows


@pytest.mark.parametrize("where", ["forward", "backward", "parameter"])
def test_overflow_site_is_the_first_non_finite_tensor(where: str) -> None:
    torch.manual_seed(0)
    model = GPT(layers=3)
    probes = GradientProbe(), ActivationProbe(), ActivationGradientProbe()
    gradients, activations, activation_gradients = probes
    precision = PrecisionProbe(activations, activation_gradients, gradients)
    monitor, sink = watch(model, *probes, precision)
    if (
        where == "forward"
    ):  # layers.1's norm overflows: its output is the first, though all after it are NaN too
        with torch.no_grad():
            model.layers[1].feed_forward_norm.weight[3] = math.inf
        next_token_loss(model, batch(0)).backward()
    elif where == "backward":
        model.layers[1].attention.output.register_full_backward_hook(lambda m, gi, go: (gi[0] * math.inf,))
        next_token_loss(model, batch(0)).backward()
    else:
        next_token_loss(model, batch(0)).backward()
        assert model.layers[2].attention.output.bias.grad is not None
        model.layers[2].attention.output.bias.grad[0] = math.nan
    monitor.step(0)
    monitor.close()
    (event,) = [event for event in sink.events if event.kind == "overflow"]
    expected = {
        "forward": ("layers.1.feed_forward_norm", "activation", 1),
        "backward": ("layers.1.attention.query_key_value", "activation_gradient", 2),
        "parameter": ("layers.2.attention.output.bias", "gradient", 3),
    }[where]
    assert (event.data["site"], event.data["tensor"]) == expected[:2]
    assert sink.rows[0, f"precision/{expected[0]}/first_overflow", -1] == expected[2]
    counts = [
        sink.rows[0, f"precision/-/nonfinite_{name}s", -1] for name in ("activation", "activation_gradient")
    ]
    assert (counts[0] > 0) == (where == "forward")
    assert (counts[1] > 0) == (where != "parameter")


def test_cross_entropy_twin_has_no_precision_event() -> None:
    model = nn.Linear(4, 3)
    gradients = GradientProbe()
    monitor, sink = watch(model, gradients, PrecisionProbe(gradients=gradients))
    cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2])).backward()
    monitor.step(0)
    monitor.close()
    assert sink.events == []
    assert sink.rows[0, "precision/-/nonfinite_gradients", -1] == 0
