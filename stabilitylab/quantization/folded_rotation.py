"""A rotation inside the weights makes an equivalent model with its steady outlier channels spread, at no cost when it runs.

A block of a pre-norm decoder reads its residual stream x through y = norm(x) g W' and adds a product to it. RMSNorm without its
gain commutes with every orthogonal Q. So the rotation moves gains into the weights that read them, and turns the stream as a whole:

    embedding   E Q                 readers (q, k, v, gate, up, router, output)   (W diag(g)) Q,  g = 1
    writers (o, down)   Q' W, b Q

Inside attention it also rotates the values of each head of d numbers, since a mixture of rows commutes with what follows it. v_proj
becomes R' W_v (its bias b R) and o_proj W_o R, with R the same for every head and so for grouped queries. Norms of q and k, per
head, come after the rotated products and see the same inputs as before. An output tied to the embedding is untied: only the output
absorbs the last gain.

Q = D (C x H): random signs, Sylvester's H of the largest power of two in the size, and for the odd rest m Hartley's orthogonal C[i,
j] = (cos + sin)(2 pi i j / m) / sqrt(m). No entry is beyond sqrt(2 / size), so a steady channel of size a is spread to at most a
sqrt(2 / size). What down_proj reads stays as it was: behind the gate only a rotation in every call could turn it (-had). Channels
that a gain held down weigh in full again: rounding sees the stream with its massive channels, where -had turns norm(x) g.

A norm on a layer's output (Gemma 2 and 3, OLMo 2) comes between the layer and the stream, and its gain does not commute with Q;
LayerNorm also subtracts a mean. ``rotate`` refuses such models, and any with a weight that is not accounted for.

Source: QuaRot, arXiv:2404.00456, section 4, stage 1; SliceGPT, arXiv:2401.15024, section 3; SpinQuant, arXiv:2405.16406, R1 and R2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.compat import TorchDispatchMode
from stabilitylab.errors import InputError
from stabilitylab.formats import rotation_signs
from stabilitylab.formats.hadamard import hadamard_matrix
from stabilitylab.models.fused_experts import SplitExperts

# Kinds of model -> the weight of a norm that changes nothing: Gemma multiplies by 1 + its weight.
_UNIT = {
    "llama": 1.0,
    "mistral": 1.0,
    "qwen2": 1.0,
    "qwen3": 1.0,
    "mixtral": 1.0,
    "qwen3_moe": 1.0,
    "gemma": 0.0,
}
# Blocks amplify differences in what enters them; we take rounding to grow a hundredfold at most. A wrong fold is off by about 1.
_AMPLIFIED = 100
_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Whose weights turn. A weight is given as (module, name of its parameter).

    Attributes:
        embedding, output: of the vocabulary.
        reads: each norm with the weights that read it.
        writes: weights [..., width, K] that add to the stream.
        attentions: each with its v_proj, o_proj and width of a head.
    """

    unit: float
    embedding: nn.Module
    output: nn.Module
    reads: list[tuple[nn.Module, list[tuple[nn.Module, str]]]] = field(default_factory=list)
    writes: list[tuple[nn.Module, str]] = field(default_factory=list)
    attentions: list[tuple[nn.Module, nn.Module, int]] = field(default_factory=list)


def rotate(model: nn.Module, seed: int = 0) -> None:
    """Rotate a model of transformers in place; its outputs stay what they were but for rounding to its own format.

    Args:
        model: a causal language model of a supported kind, experts fused or taken apart. A tied output is untied, and
            ``model.config`` says so.
        seed: of the random signs.

    Raises:
        InputError: it is of another kind, or holds a weight that no rule covers. The model is unchanged then.
    """
    parts = _parts(model)
    with torch.no_grad():
        _rotate(model, parts, seed)


def require_rotatable(model: nn.Module) -> None:
    """Raises InputError where ``rotate`` would."""
    _parts(model)


def orthogonal(size: int, seed: int) -> Tensor:
    """Q [n, n] of the module's head, in float64: Q' Q = 1."""
    power = size & -size
    odd = size // power
    # The matrix comes in fp32, where only roots of powers of four are exact.
    sylvester = hadamard_matrix(power).sign().double() / math.sqrt(power)
    product = torch.outer(torch.arange(odd), torch.arange(odd)) % odd
    angle = product.double() * (2 * math.pi / odd)
    hartley = (angle.cos() + angle.sin()) / math.sqrt(odd)
    signs = rotation_signs(1 << (size - 1).bit_length(), seed)[:size].double()
    return signs[:, None] * torch.kron(hartley, sylvester)


def exact_logits(model: Any) -> Tensor:
    """Logits of a model in float64 on a few tokens, without the conversions to fp32 that norms and routers make inside."""
    config = model.config.get_text_config()
    count = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    ids = torch.randint(0, config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _Wide():  # type: ignore[no-untyped-call]
        logits: Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def rounding_bound(model: nn.Module) -> float:
    """How far the logits of equivalent models may differ in float64, as a share of the largest.

    A sum of K products is off by K u at most, u = 2^-53; a model adds up what some ten products of each of its L blocks are off.
    """
    longest = max(parameter.shape[-1] for parameter in model.parameters())
    layers = len(model.model.layers)  # type: ignore[union-attr, arg-type]
    return float(_AMPLIFIED * 10 * (layers + 1) * longest * 2.0**-53)


def _parts(model: Any) -> _Parts:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _UNIT:
        raise InputError(
            f"a model of kind {kind or type(model).__name__} is not rotated: its norms must be RMSNorm, none on what a layer "
            f"writes, and its layout known ({', '.join(_UNIT)}); schemes with -had rotate any linear layer in every call"
        )
    try:
        return _known_parts(model, kind)
    except AttributeError as error:
        raise InputError(
            f"this {kind} model is laid out in a way that is not known ({error}): open it unquantized, with its output"
        ) from None


def _known_parts(model: Any, kind: str) -> _Parts:
    parts = _Parts(unit=_UNIT[kind], embedding=model.model.embed_tokens, output=model.lm_head)
    kept: list[nn.Module] = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        first = [(layer, "weight") for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        parts.reads.append((block.input_layernorm, first))
        parts.attentions.append((attention.v_proj, attention.o_proj, attention.head_dim))
        parts.writes.append((attention.o_proj, "weight"))
        kept += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        inward, outward = _feed_forward(mlp)
        parts.reads.append((block.post_attention_layernorm, inward))
        parts.writes.extend(outward)
    parts.reads.append((model.model.norm, [(parts.output, "weight")]))
    _require_all(model, parts, kept)
    return parts


def _feed_forward(mlp: Any) -> tuple[list[tuple[nn.Module, str]], list[tuple[nn.Module, str]]]:
    """What reads the norm before it, and what writes to the stream."""
    experts = getattr(mlp, "experts", None)
    if experts is None:
        return [(mlp.gate_proj, "weight"), (mlp.up_proj, "weight")], [(mlp.down_proj, "weight")]
    if isinstance(experts, SplitExperts):
        ups: Any = experts.get_submodule(experts.inward)
        downs: Any = experts.down_proj
        return [(mlp.gate, "weight"), *((one, "weight") for one in ups)], [(one, "weight") for one in downs]
    if experts.is_transposed or experts.has_bias:
        raise AttributeError("experts with biases, or stored as [in, out]")
    return [(mlp.gate, "weight"), (experts, "gate_up_proj")], [(experts, "down_proj")]


def _require_all(model: nn.Module, parts: _Parts, kept: list[nn.Module]) -> None:
    """Refuse a model with a norm that is no RMSNorm, or with a weight that is neither turned nor known to stay."""
    for norm, _ in parts.reads:
        if "RMSNorm" not in type(norm).__name__ or set(dict(norm.named_parameters())) != {"weight"}:
            raise AttributeError(f"a norm of type {type(norm).__name__}")
    turned = [(parts.embedding, "weight"), *parts.writes, *((norm, "weight") for norm, _ in parts.reads)]
    turned += [weight for _, readers in parts.reads for weight in readers]
    known = {id(owner.get_parameter(name)) for owner, name in turned}
    known |= {id(owner.bias) for owner, _ in turned if isinstance(getattr(owner, "bias", None), Tensor)}
    known |= {id(parameter) for module in kept for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise AttributeError(f"no rule is known for {name}")
    held: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in held and parameter is not parts.embedding.weight:
            raise AttributeError(f"{name} and {held[id(parameter)]} are one tensor")
        held[id(parameter)] = name


def _rotate(model: Any, parts: _Parts, seed: int) -> None:
    stream = orthogonal(_width(parts), seed).to(parts.embedding.weight.device)  # type: ignore[arg-type]
    _put(parts.output, "weight", _read(parts.output, "weight"))  # its own, if it was tied
    model.config.tie_word_embeddings = False
    _put(parts.embedding, "weight", _read(parts.embedding, "weight") @ stream)
    for norm, readers in parts.reads:
        gain = _read(norm, "weight") + (1.0 - parts.unit)
        for owner, name in readers:
            _put(owner, name, (_read(owner, name) * gain) @ stream)
        _put(norm, "weight", torch.full_like(gain, parts.unit))
    for owner, name in parts.writes:
        _put(owner, name, stream.T @ _read(owner, name))
        if isinstance(getattr(owner, "bias", None), Tensor):
            _put(owner, "bias", _read(owner, "bias") @ stream)
    for v, o, size in parts.attentions:
        head = orthogonal(size, seed + 1).to(stream.device)
        weight = _read(v, "weight")
        _put(v, "weight", (head.T @ weight.view(-1, size, weight.shape[1])).reshape(weight.shape))
        if isinstance(v.bias, Tensor):
            _put(v, "bias", (_read(v, "bias").view(-1, size) @ head).flatten())
        weight = _read(o, "weight")
        _put(o, "weight", (weight.view(len(weight), -1, size) @ head).reshape(weight.shape))


def _width(parts: _Parts) -> int:
    weight = parts.embedding.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


def _read(owner: nn.Module, name: str) -> Tensor:
    return owner.get_parameter(name).detach().double()


def _put(owner: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter in the old one's format: the old one may be a view of a file, or shared."""
    before = owner.get_parameter(name)
    made = value.to(before.dtype, copy=True)
    owner._parameters[name] = nn.Parameter(made, requires_grad=before.requires_grad)


class _Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes in float64 whatever would be made in fp32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        return func(*args, **given)
