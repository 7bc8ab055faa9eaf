"""Attention's probe against float64 scores: fused kernels, PyTorch's own attention layers, softmaxes of any model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax

from stabilitylab.probes.activations import ActivationProbe
from stabilitylab.probes.attention import AttentionProbe
from tests.stabilitylab.recording import Recording, watch


class Attending(nn.Module):
    """Attention of x with itself through scaled_dot_product_attention."""

    def __init__(self, heads: int, key_heads: int, **options: object) -> None:
        super().__init__()
        self.heads, self.key_heads, self.options = heads, key_heads, options
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k = (
            x_BTD.view(*x_BTD.shape[:2], h, -1)[..., :8].transpose(1, 2) * 4
            for h in (self.heads, self.key_heads)
        )
        self.seen = q, k
        return scaled_dot_product_attention(q, k, k, enable_gqa=self.heads != self.key_heads, **self.options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [0.0, 0.5])  # with dropout PyTorch takes its unfused path on CPUs
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_scores_of_any_module_that_calls_sdpa(dropout: float, key_heads: int) -> None:
    torch.manual_seed(0)
    inner = Attending(4, key_heads, is_causal=True, dropout_p=dropout)
    model = nn.Sequential(nn.Identity(), inner)
    monitor, sink = watch(model, AttentionProbe())
    x = torch.randn(2, 11, 32, requires_grad=True)
    torch.manual_seed(1)
    result = model(x)
    result.sum().backward()
    gradient, x.grad = x.grad, None
    monitor.step(0)
    monitor.close()
    torch.manual_seed(1)
    bare = model(x)
    bare.sum().backward()
    assert torch.equal(result, bare)
    assert gradient is not None
    assert x.grad is not None
    assert torch.equal(gradient, x.grad)
    assert inner.seen is not None
    q, k = inner.seen
    scores = (q.double() @ k.repeat_interleave(4 // key_heads, 1).double().transpose(-1, -2)) / math.sqrt(8)
    scores = scores.masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), -math.inf)
    largest = scores.amax((0, 2, 3)).tolist()
    upper, lower = (sink.vector(0, f"attention/1/{name}") for name in ("score_max", "score_max_sampled"))
    for exact, low, high in zip(largest, lower, upper, strict=True):
        assert low <= exact * (1 + 1e-5)
        assert exact * (1 - 1e-5) <= high <= exact + math.log(11)
        if dropout:
            assert low == high == pytest.approx(exact, rel=1e-5)
    headroom = sink.vector(0, "attention/1/fp16_headroom_bits")
    lowest = sink.vector(0, "attention/1/score_min")
    expected = [math.log2(65504 / max(abs(a), abs(b))) for a, b in zip(upper, lowest, strict=True)]
    assert headroom == pytest.approx(expected)


class Scores(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_materialised_scores_belong_to_the_parent_module() -> None:
    attention = nn.Module()
    attention.scores = Scores()
    model = nn.ModuleDict({"attention": attention})
    monitor, sink = watch(model, AttentionProbe())
    scores = torch.randn(2, 3, 5, 5)
    attention.scores(scores)
    monitor.step(0)
    monitor.close()
    assert sink.vector(0, "attention/attention/score_max") == scores.amax((0, 2, 3)).tolist()
    assert sink.vector(0, "attention/attention/score_min") == scores.amin((0, 2, 3)).tolist()


def exact(q_BHTD: Tensor, k_BHSD: Tensor, visible: Tensor | None = None) -> Tensor:
    """Scores [B, H, T, S] in float64, -inf where a query may not look."""
    scores = q_BHTD.double() @ k_BHSD.double().transpose(-1, -2) / math.sqrt(q_BHTD.shape[-1])
    return scores if visible is None else scores.masked_fill(~visible, -math.inf)


def check_range(sink: Recording, site: str, scores_BHTS: Tensor, *, is_exact: bool) -> None:
    """Maxima within what ``statistics.scores`` promises; float32 products of a score of size s err by 1e-5 s."""
    upper, lower = (sink.vector(0, f"attention/{site}/{name}") for name in ("score_max", "score_max_sampled"))
    largest = scores_BHTS.amax((0, 2, 3)).tolist()
    assert len(upper) == len(largest)
    for value, low, high in zip(largest, lower, upper, strict=True):
        slack = 1e-5 * max(1.0, abs(value))
        assert low <= value + slack
        assert value - slack <= high <= value + math.log(scores_BHTS.shape[-1]) + slack
        if is_exact:
            assert high == pytest.approx(value, rel=1e-5)
    if is_exact:
        smallest = torch.where(scores_BHTS.isinf(), math.inf, scores_BHTS).amin((0, 2, 3)).tolist()
        assert sink.vector(0, f"attention/{site}/score_min") == pytest.approx(smallest, rel=1e-5)


class AroundPyTorchs(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.inner, self.options = nn.MultiheadAttention(16, 4, batch_first=True), options

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.inner(x_BTD, x_BTD, x_BTD, **self.options)[0]
        return y_BTD


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_pytorchs_own_layer(need_weights: bool, causal: bool) -> None:
    torch.manual_seed(0)
    hidden = ~torch.ones(9, 9, dtype=torch.bool).tril() if causal else None
    model = AroundPyTorchs(need_weights=need_weights, attn_mask=hidden)
    x, weight = torch.randn(2, 9, 16) * 5, model.inner.in_proj_weight
    monitor, sink = watch(model, AttentionProbe())
    model(x)
    monitor.step(0)
    monitor.close()
    q, k = ((x @ weight[at : at + 16].T).view(2, 9, 4, 4).transpose(1, 2) for at in (0, 16))
    check_range(sink, "inner", exact(q, k, None if hidden is None else ~hidden), is_exact=need_weights)


def test_pytorchs_encoder() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2)
    monitor, sink = watch(model, AttentionProbe())
    model(torch.randn(2, 5, 16)).sum().backward()
    monitor.step(0)
    monitor.close()
    assert {name.split("/")[1] for _, name, _ in sink.rows} == {"layers.0.self_attn", "layers.1.self_attn"}


class CausalAttention(nn.Module):
    """As people write it by hand; ``flat``: heads folded into the batch."""

    def __init__(self, heads: int, flat: bool) -> None:
        super().__init__()
        self.n_head, self.flat = heads, flat
        self.c_attn = nn.Linear(16, 48)
        self.scores: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.c_attn(x_BTD).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        visible = torch.ones(T, T, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
        self.scores = exact(q, k, visible)
        if self.flat:
            return (softmax(scores.flatten(0, 1), dim=-1) @ v.flatten(0, 1)).sum()
        return (scores.softmax(-1) @ v).sum()


class Router(nn.Module):
    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.softmax(x_BTD, -1)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_written_by_hand(flat: bool, heads: int) -> None:
    torch.manual_seed(0)
    attention = CausalAttention(heads, flat)
    model = nn.Sequential(Router(), attention)
    x = torch.randn(3, 7, 16)
    monitor, sink = watch(model, AttentionProbe())
    model(x).backward()
    gradient = attention.c_attn.weight.grad
    monitor.step(0)
    monitor.close()
    assert attention.scores is not None
    check_range(sink, "1", attention.scores, is_exact=True)
    assert {name.split("/")[1] for _, name, _ in sink.rows} == {"1"}  # what a router weighs are no scores
    attention.c_attn.weight.grad = None
    model(x).backward()
    assert gradient is not None
    assert torch.equal(gradient, attention.c_attn.weight.grad)  # type: ignore[arg-type]


class Told(CausalAttention):
    """Shows its scores through a module, before it halves them for the softmax."""

    def __init__(self) -> None:
        super().__init__(2, flat=False)
        self.scores = Scores()

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, _ = self.c_attn(x_BTD).view(*x_BTD.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        return torch.softmax(self.scores(q @ k.transpose(-1, -2)) / 2, -1).sum()


def test_a_softmax_does_not_count_where_the_model_shows_its_scores() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), Told())
    seen = []
    model[1].scores.register_forward_hook(lambda module, args, output: seen.append(output))  # type: ignore[union-attr]
    monitor, sink = watch(model, AttentionProbe())
    model(torch.randn(2, 6, 16))
    monitor.step(0)
    monitor.close()
    assert sink.vector(0, "attention/1/score_max") == seen[0].amax((0, 2, 3)).tolist()
    assert sink.vector(0, "attention/1/score_min") == seen[0].amin((0, 2, 3)).tolist()


def test_softmaxes_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    attention = CausalAttention(4, flat=False)
    model = nn.Sequential(nn.Identity(), attention)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 7, 16)
    found = []
    for module in (model, compiled):
        monitor, sink = watch(module, AttentionProbe())  # type: ignore[arg-type]
        module(x)
        monitor.step(0)
        monitor.close()
        found.append(sink.rows)
    torch._dynamo.reset()
    assert found[0].keys() == found[1].keys() != set()
    assert all(found[1][key] == pytest.approx(value, rel=1e-5) for key, value in found[0].items())


class Softmaxing(nn.Module):
    """Attention over scores that it is given, by any of the ways to call a softmax."""

    def __init__(self, way: str, heads: int = 2) -> None:
        super().__init__()
        self.way, self.num_heads, self.softmax = way, heads, nn.Softmax(dim=-1)

    def forward(self, scores: Tensor) -> Tensor:
        calls = {
            "function": lambda: softmax(scores, -1),
            "named": lambda: torch.softmax(input=scores, dim=-1),
            "method": lambda: scores.softmax(dim=scores.dim() - 1),
            "module": lambda: self.softmax(scores),
        }
        return calls[self.way]()


def seen_by(model: nn.Module, *inputs: Tensor) -> Recording:
    monitor, sink = watch(nn.Sequential(nn.Identity(), model), AttentionProbe())
    for step, x in enumerate(inputs):
        monitor._context.model(x)
        monitor.step(step)
    monitor.close()
    return sink


@pytest.mark.parametrize("way", ["function", "named", "method", "module"])
@pytest.mark.parametrize("flat", [False, True])
def test_ways_to_call_a_softmax(way: str, flat: bool) -> None:
    scores = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    sink = seen_by(Softmaxing(way), scores.flatten(0, 1) if flat else scores)
    assert sink.vector(0, "attention/1/score_max") == scores.amax((0, 2, 3)).tolist()
    assert {name.split("/")[1] for _, name, _ in sink.rows} == {"1"}


@pytest.mark.parametrize("hidden", [-1e4, -1e9, -math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("added", [False, True])
def test_masks_are_no_scores(hidden: float, added: bool) -> None:
    """Whichever number masks a key, set or added."""
    scores = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    masked = scores + hidden * mask if added and hidden != -math.inf else scores.masked_fill(mask, hidden)
    sink = seen_by(Softmaxing("function"), masked)
    smallest = scores[..., ~mask].amin((0, 2)).tolist()
    assert sink.vector(0, "attention/1/score_min") == smallest
    assert min(sink.vector(0, "attention/1/fp16_headroom_bits")) > 10


class ClassificationHead(nn.Module):
    def forward(self, logits_BTC: Tensor) -> Tensor:
        return logits_BTC.softmax(-1)


def test_a_classifier_is_no_attention() -> None:
    assert not seen_by(ClassificationHead(), torch.randn(2, 5, 9)).rows


def test_numbers_of_heads_that_change() -> None:
    """Both directions of an axial attention are kept; lengths that pass for heads do not fill the memory."""
    shapes = [(1, 3, 4, 4), (1, 5, 4, 4)]
    sink = seen_by(Softmaxing("function"), *(torch.randn(shape) for shape in shapes for _ in range(2)))
    assert len(sink.vector(0, "attention/1/score_max")) == 3
    assert len(sink.vector(2, "attention/1:5/score_max")) == 5
    monitor, _ = watch(Softmaxing("function"), AttentionProbe())
    for step in range(40):
        monitor._context.model(torch.randn(1, 3 + step, 4, 4))
        monitor.step(step)
        if step == 5:
            size = monitor.nbytes
    assert monitor.nbytes == size
    monitor.close()


class OtherAttention(nn.Module):
    """Attention through a kernel that the probe does not know, such as flex_attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q = self.query(x_BTD).view(*x_BTD.shape[:2], 2, 8).transpose(1, 2)
        weights = (q @ q.mT).exp()
        return x_BTD + (weights @ q / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


class KnownAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q = self.query(x_BTD).view(*x_BTD.shape[:2], 2, 8).transpose(1, 2)
        return x_BTD + scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def test_a_kernel_that_is_not_seen_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(KnownAttention(), OtherAttention(), nn.Linear(16, 16), OtherAttention())
    monitor, _ = watch(model, AttentionProbe(), ActivationProbe())
    for step in range(3):
        model(torch.randn(2, 8, 16)).sum().backward()
        monitor.step(step)
    monitor.close()
    (said,) = [one.getMessage() for one in caplog.records if "are not seen" in one.getMessage()]
    assert said.startswith("attention scores of 1 (OtherAttention) are not seen")
