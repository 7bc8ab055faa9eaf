"""The transformer: embedding, layers, final norm, and the loss at the positions that have a target.

Shapes: B rows, T tokens, C hidden, V vocabulary, N target positions. Module paths are what telemetry calls its sites:
``embedding``, ``layers.3.attention.query_key_value``, ``layers.3.feed_forward.down``, ``final_norm``; the output of
``layers.3`` is the main branch after it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glm.errors import InputError
from glm.model.block import Block
from glm.model.config import ModelConfig
from glm.model.embedding import Embedding
from glm.model.initialise import initialise_block, initialise_embedding
from glm.model.layers import Linear, Norm, dropout
from glm.model.positions import alibi_bias, rotation, visible
from glm.model.vocabulary_loss import logits, vocabulary_loss


class Transformer(nn.Module):
    """A GLM, or one of the systems it is compared with, as the configuration says.

    Raises:
        InputError: the vocabulary is not set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocabulary is None:
            raise InputError(
                "model.vocabulary is not set: give --model.vocabulary, or data whose tokenizer has one"
            )
        self.config = config
        shrink = config.embedding
        self.embedding = Embedding(
            config.vocabulary,
            config.hidden,
            gradient_shrink=shrink.gradient_shrink,
            shrink_side=shrink.shrink_side,
        )
        learned = config.attention.positions == "learned"
        self.positions = nn.Parameter(torch.empty(config.length, config.hidden)) if learned else None
        self.embedding_norm = self._norm() if shrink.norm else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = self._norm() if config.norm != "post" else None
        self.projection = None if shrink.tied else Linear(config.hidden, config.vocabulary, bias=False)
        if not self.embedding.weight.is_meta:
            self.initialise()

    def initialise(self) -> None:
        """Draw the weights, as ``config.init`` says."""
        initialise_embedding(self.embedding.weight, self.config)
        if self.positions is not None:
            initialise_embedding(self.positions, self.config)
        for layer in self.layers:
            assert isinstance(layer, Block)
            initialise_block(layer, self.config)
        if self.projection is not None:
            initialise_embedding(self.projection.weight, self.config)

    def forward(
        self, tokens_BT: Tensor, positions: Tensor, segments_BT: Tensor, context_BT: Tensor
    ) -> Tensor:
        """Logits, [B, T, V] in the compute format.

        Args:
            tokens_BT: token numbers.
            positions: [B, T], or [B, T, 2].
            segments_BT: the piece each token belongs to; -1 is padding.
            context_BT: whether the token is part of its piece's bidirectional context.
        """
        return logits(self.hidden(tokens_BT, positions, segments_BT, context_BT), self.output_weight())

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions: Tensor,
        segments_BT: Tensor,
        context_BT: Tensor,
    ) -> tuple[Tensor, int]:
        """Sum of the target losses (fp32 scalar, nats) and how many there are; targets below 0 do not count."""
        hidden_BTC = self.hidden(tokens_BT, positions, segments_BT, context_BT)
        chosen = targets_BT >= 0
        target_N = targets_BT[chosen]
        total = vocabulary_loss(hidden_BTC[chosen], self.output_weight(), target_N, self.config.z_loss)
        return total, target_N.numel()

    def hidden(self, tokens_BT: Tensor, positions: Tensor, segments_BT: Tensor, context_BT: Tensor) -> Tensor:
        """The final hidden states, [B, T, C]."""
        attention = self.config.attention
        self._check_length(tokens_BT)
        place_BT = positions if positions.dim() == 2 else positions[..., 0]
        x_BTC: Tensor = self.embedding(tokens_BT)
        if self.positions is not None:
            x_BTC = x_BTC + self.positions[place_BT]
        if self.embedding_norm is not None:
            x_BTC = self.embedding_norm(x_BTC)
        x_BTC = dropout(x_BTC, self.config.dropout, self.training)
        visible_B1TT = visible(segments_BT, context_BT)
        turned = None
        if attention.positions in ("rope", "rope2d"):
            two = attention.positions == "rope2d"
            turned = rotation(positions, self.config.head, attention.rope_base, x_BTC.dtype, two=two)
        bias_BHTT = alibi_bias(place_BT, self.config.heads) if attention.positions == "alibi" else None
        for layer in self.layers:
            if self.config.recompute and self.training and torch.is_grad_enabled():
                x_BTC = checkpoint(layer, x_BTC, visible_B1TT, turned, bias_BHTT, use_reentrant=False)
            else:
                x_BTC = layer(x_BTC, visible_B1TT, turned, bias_BHTT)
        if self.final_norm is not None:
            x_BTC = self.final_norm(x_BTC)
        return x_BTC

    def output_weight(self) -> Tensor:
        """The output projection, [V, C]."""
        return self.embedding.output_weight() if self.projection is None else self.projection.weight

    def _check_length(self, tokens_BT: Tensor) -> None:
        if tokens_BT.shape[1] > self.config.length:
            raise InputError(
                f"the row has {tokens_BT.shape[1]} tokens but the model only {self.config.length} positions: shorten it, "
                "or train with a longer --model.length"
            )

    def _norm(self) -> Norm:
        return Norm(self.config.hidden, epsilon=self.config.norm_epsilon, bias=self.config.bias)
