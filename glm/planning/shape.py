"""A model as the planner sees it: how many numbers of which kind each layer has, and where they are.

t tensor ranks split a layer's matrices and the biases of column-parallel ones; each holds its norms and the biases of row-parallel
matrices. They split the vocabulary too, at both ends of the pipeline; both end stages hold a tied matrix.

FLOPs of a forward pass, two a multiply-add: 2 (matrices) + 4 s h a token and layer for the two products of attention, 2 h V a token
for the output. With the paper's layer of 12 h^2 parameters, three forward passes' worth (forward and twice that backward) of this
is Narayanan et al.'s 72 B s L h^2 (1 + s/6h + V/12Lh) (2104.04473, equation 3, without its recomputation).
"""

from __future__ import annotations

from dataclasses import dataclass

from glm.errors import InputError
from glm.model.config import ModelConfig

GATED = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        layers, hidden, heads, vocabulary: L, h, a, V.
        length: s, tokens a row.
        inner: width of the feed-forward layer; ``gated``: it has two input projections.
        norms: norms a layer, ``norm_size`` and ``head_norm_size`` parameters each over the hidden width and over a head's;
            ``bias``: linear layers have biases.
        experts: of a layer, 0 where it is one; ``active`` that a token passes through, ``shared`` of one more for every token.
        key_heads: of attention, where fewer than ``heads``; None: as many.
        gate: outputs of attention's gate; ``vectors``: other vectors of a layer, such as learned sinks.
        learned_positions, embedding_norm, tied, final_norm: whether the model has them; ``head_norms``: norms over a head's width.
        softmax: how attention forms its scores (``AttentionConfig.softmax``).
        dropout: layers keep masks for the backward pass.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    length: int
    inner: int
    gated: bool = True
    norms: int = 2
    norm_size: int | None = None
    head_norm_size: int | None = None
    bias: bool = True
    key_heads: int | None = None
    gate: int = 0
    vectors: int = 0
    experts: int = 0
    active: int = 0
    shared: int = 0
    learned_positions: bool = False
    embedding_norm: bool = False
    tied: bool = True
    final_norm: bool = True
    head_norms: int = 0
    softmax: str = "fp32"
    dropout: bool = False

    @property
    def up(self) -> int:
        """Width of the feed-forward layer's input projection."""
        return self.inner * (GATED if self.gated else 1)

    @property
    def matrices(self) -> int:
        """Elements of a layer's matrices."""
        h = self.hidden
        feed_forward = self.up + self.inner
        if self.experts:
            feed_forward = (self.experts + self.shared) * feed_forward + self.experts
        return h * (self.attention_inputs + h + feed_forward)

    @property
    def used_matrices(self) -> int:
        """Elements of a layer's matrices that multiply a token."""
        idle = (self.experts - self.active) * (self.up + self.inner) if self.experts else 0
        return self.matrices - self.hidden * idle

    @property
    def attention_inputs(self) -> int:
        """Outputs of attention's input projections: queries, keys, values, gate."""
        head = self.hidden // self.heads
        return (self.heads + 2 * (self.key_heads or self.heads)) * head + self.gate

    @property
    def split_vectors(self) -> int:
        """Biases of a layer that tensor ranks split with their matrices."""
        up = self.shared * self.up if self.experts else self.up
        return (self.attention_inputs + up) * int(self.bias) + self.vectors

    @property
    def whole_vectors(self) -> int:
        """Norms and biases of a layer that every tensor rank holds."""
        head = self.head_norm_size
        if head is None:
            head = self.hidden // self.heads * (1 + int(self.bias))
        outputs = 1 if self.experts and not self.shared else 2
        return outputs * self.hidden * int(self.bias) + self.norms * self._norm + self.head_norms * head

    @property
    def _norm(self) -> int:
        return self.hidden * (1 + int(self.bias)) if self.norm_size is None else self.norm_size

    def layer_parameters(self, tensor: int) -> int:
        """Parameters of a layer on one of ``tensor`` ranks."""
        return (self.matrices + self.split_vectors) // tensor + self.whole_vectors

    def first_parameters(self, tensor: int) -> int:
        """Parameters of the first stage before its layers."""
        extra = self.length * self.hidden if self.learned_positions else 0
        norm = self._norm if self.embedding_norm else 0
        return self.vocabulary * self.hidden // tensor + extra + norm

    def last_parameters(self, tensor: int, *, alone: bool) -> int:
        """Parameters of the last stage after its layers; ``alone``: it is the first too, and has a tied matrix already."""
        norm = self._norm if self.final_norm else 0
        return norm + (0 if self.tied and alone else self.vocabulary * self.hidden // tensor)

    def stage_parameters(self, tensor: int, stages: list[int], stage: int) -> int:
        """Parameters of one GPU of a stage, where ``stages`` are the layers of each."""
        total = stages[stage] * self.layer_parameters(tensor)
        if stage == 0:
            total += self.first_parameters(tensor)
        if stage == len(stages) - 1:
            total += self.last_parameters(tensor, alone=len(stages) == 1)
        return total

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return self.stage_parameters(1, [self.layers], 0)

    def layer_flops(self, tokens: int) -> float:
        """FLOPs of a layer's forward pass."""
        return 2.0 * tokens * self.used_matrices + 4.0 * tokens * self.length * self.hidden

    def output_flops(self, tokens: int) -> float:
        """FLOPs of the output projection's forward pass."""
        return 2.0 * tokens * self.hidden * self.vocabulary

    def model_flops(self, tokens: int) -> float:
        """FLOPs of a forward and backward pass without recomputation, which MFU counts."""
        return 3.0 * (self.layers * self.layer_flops(tokens) + self.output_flops(tokens))

    def hardware_flops(self, tokens: int, *, recompute: bool) -> float:
        """The same with the layers' recomputed forward pass, which HFU counts."""
        again = self.layers * self.layer_flops(tokens) if recompute else 0.0
        return self.model_flops(tokens) + again


def shape_of(config: ModelConfig, *, vocabulary: int | None = None, length: int | None = None) -> Shape:
    """The shape of a configured model. Raises InputError where no vocabulary is known."""
    size = vocabulary or config.vocabulary
    if size is None:
        raise InputError("this preset takes its vocabulary from the data: give --vocabulary")
    return Shape(
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        vocabulary=size,
        length=length or config.length,
        inner=config.feed_forward.width(config.hidden),
        gated=config.feed_forward.is_gated,
        norms=config.norms_per_layer,
        norm_size=config.norm_parameters(config.hidden),
        head_norm_size=config.norm_parameters(config.head),
        head_norms=2 * int(config.attention.qk_norm) + int(config.attention.v_norm),
        key_heads=config.key_heads,
        gate={"none": 0, "head": config.heads, "element": config.hidden}[config.attention.gate],
        experts=config.feed_forward.experts.count,
        active=config.feed_forward.experts.active,
        shared=config.feed_forward.experts.shared,
        vectors=config.heads if config.attention.sink == "learned" else 0,
        bias=config.bias,
        learned_positions=config.attention.positions == "learned",
        embedding_norm=config.embedding.norm,
        tied=config.embedding.tied,
        final_norm=config.norm != "post",
        softmax=config.attention.softmax,
        dropout=config.dropout > 0,
    )
