"""The transformer: embedding, layers, final norm, and the loss at positions with a target.

Shapes: B rows, T tokens, C hidden, V vocabulary, N target positions. Telemetry names its sites by module paths: ``embedding``,
``layers.3.attention.query_key_value``, ``layers.3.feed_forward.down``, ``final_norm``; the output of ``layers.3`` is the residual
stream after it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glm.errors import InputError
from glm.model.block import Block
from glm.model.cache import Cache
from glm.model.config import ModelConfig
from glm.model.dropout import EMBEDDING, dropout, fresh_keys
from glm.model.embedding import Embedding
from glm.model.experts import penalties
from glm.model.initialise import initialise_block, initialise_embedding
from glm.model.layers import Linear
from glm.model.norms import AnyNorm, make_norm
from glm.model.passes import recomputed
from glm.model.positions import Rotation, alibi, is_causal, rotation, score_bias, visible
from glm.model.scaling import width_ratio
from glm.model.vocabulary_loss import logits, vocabulary_losses
from glm.precision import upcasts


class Transformer(nn.Module):
    """A GLM, or one of the systems compared with it, as the configuration says.

    Args:
        config: shape and levers.
        seed: of the weights (``glm.model.initialise``); None: torch's generator draws one.

    Raises:
        InputError: the vocabulary is not set.
    """

    def __init__(self, config: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        if seed is None:
            # Before the layers draw their initial values: how many numbers they draw depends on the configuration.
            seed = int(torch.randint(2**62, (), device="cpu"))
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
            self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """Draw the weights, as ``config.init`` says."""
        initialise_embedding(self.embedding.weight, self.config, seed, "embedding.weight")
        if self.positions is not None:
            initialise_embedding(self.positions, self.config, seed, "positions")
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            initialise_block(layer, self.config, seed, f"layers.{number}")
        if self.projection is not None:
            initialise_embedding(self.projection.weight, self.config, seed, "projection.weight")

    def forward(
        self, tokens_BT: Tensor, positions: Tensor, segments_BT: Tensor, context_BT: Tensor
    ) -> Tensor:
        """Logits, [B, T, V] in the compute format.

        Args:
            tokens_BT: token numbers.
            positions: [B, T], or [B, T, 2].
            segments_BT: each token's piece; -1 is padding.
            context_BT: whether the token is part of its piece's bidirectional context.
        """
        return self.logits(self.hidden(tokens_BT, positions, segments_BT, context_BT))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of final hidden states [..., C], in the compute format."""
        return logits(hidden, self.output_weight(), self.config.logit_cap)

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions: Tensor,
        segments_BT: Tensor,
        context_BT: Tensor,
        keys_B: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Sum of the target losses with z-loss (fp32 scalar, nats), and how many there are; targets below 0 do not count.

        ``keys_B``: of the rows' dropout masks (``dropout.row_keys``); None: drawn here.
        """
        total, _, count = self.loss_parts(tokens_BT, targets_BT, positions, segments_BT, context_BT, keys_B)
        return total, count

    def loss_parts(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions: Tensor,
        segments_BT: Tensor,
        context_BT: Tensor,
        keys_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """``loss``, and between its two values the sum's auxiliary terms, without a gradient: the z-loss, and what routers of
        experts add to the mean.
        """
        hidden_BTC = self.hidden(tokens_BT, positions, segments_BT, context_BT, keys_B)
        chosen = targets_BT >= 0
        target_N = targets_BT[chosen]
        config = self.config
        total, of_z = vocabulary_losses(
            hidden_BTC[chosen], self.output_weight(), target_N, config.z_loss, config.logit_cap
        )
        count = target_N.numel()
        if config.feed_forward.experts.count and self.training and torch.is_grad_enabled():
            penalty = count * penalties(self)
            total, of_z = total + penalty, of_z + penalty.detach()
        return total, of_z, count

    def hidden(
        self,
        tokens_BT: Tensor,
        positions: Tensor,
        segments_BT: Tensor,
        context_BT: Tensor,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        """The final hidden states, [B, T, C]; arguments as of ``loss``."""
        self._check_length(tokens_BT.shape[1])
        if keys_B is None and self.config.dropout and self.training:
            keys_B = fresh_keys(tokens_BT.shape[0])
        attention = self.config.attention
        can_skip = attention.softmax == "fused" and attention.positions != "alibi"
        if can_skip and is_causal(segments_BT, context_BT):
            return self._through(tokens_BT, positions, None, keys_B=keys_B)
        return self._through(tokens_BT, positions, visible(segments_BT, context_BT), keys_B=keys_B)

    def extend(self, tokens_BT: Tensor, positions: Tensor, visible_B1TS: Tensor, cache: Cache) -> Tensor:
        """The final hidden states of tokens that follow those in the cache; adds them to it.

        Args:
            tokens_BT: the new tokens.
            positions: theirs, [B, T] or [B, T, 2].
            visible_B1TS: which tokens each may see, first those in the cache, then the new ones.
            cache: of the earlier tokens; allows neither dropout nor gradients.
        """
        self._check_length(visible_B1TS.shape[-1])
        return self._through(tokens_BT, positions, visible_B1TS, cache)

    def _through(
        self,
        tokens_BT: Tensor,
        positions: Tensor,
        visible_B1TS: Tensor | None,
        cache: Cache | None = None,
        keys_B: Tensor | None = None,
    ) -> Tensor:
        """``visible_B1TS`` None: causal, which fused attention can do without a mask, at half the work."""
        if not self.training:
            keys_B = None
        x_BTC = self.embed(tokens_BT, positions, keys_B)
        if visible_B1TS is None:
            bias_BHTS, turned = None, self._rotation(positions, x_BTC.dtype)
        else:
            bias_BHTS, turned = self.surroundings(positions, visible_B1TS, x_BTC.dtype, cache)
        for number, layer in enumerate(self.layers):
            if self.config.recompute and self.training and torch.is_grad_enabled():
                x_BTC = recomputed(layer, x_BTC, bias_BHTS, turned, None, keys_B)
            else:
                past = None if cache is None else cache.layers[number]
                x_BTC = layer(x_BTC, bias_BHTS, turned, past, keys_B)
        return self.close(x_BTC)

    def close(self, x_BTC: Tensor) -> Tensor:
        """The final hidden states, from the residual stream after the last layer."""
        if self.final_norm is not None:
            x_BTC = self.final_norm(x_BTC)
        ratio = width_ratio(self.config)
        return x_BTC / ratio if ratio != 1.0 else x_BTC

    def embed(self, tokens_BT: Tensor, positions: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """The first layer's input, [B, T, C]; no dropout without keys."""
        x_BTC: Tensor = self.embedding(tokens_BT)
        if self.config.embedding.scale == "sqrt":
            x_BTC = x_BTC * self.config.hidden**0.5
        if self.positions is not None:
            x_BTC = x_BTC + self.positions[_place(positions)]
        if self.embedding_norm is not None:
            x_BTC = self.embedding_norm(x_BTC)
        return dropout(x_BTC, self.config.dropout, keys_B, EMBEDDING)

    def surroundings(
        self, positions: Tensor, visible_B1TS: Tensor, dtype: torch.dtype, cache: Cache | None = None
    ) -> tuple[Tensor, Rotation | None]:
        """What every layer's attention needs of the tokens' places: bias of the scores, rotation of queries and keys.

        Args:
            positions: [B, T], or [B, T, 2].
            visible_B1TS: which token may see which.
            dtype: compute format.
            cache: takes the positions.
        """
        attention, place_BT = self.config.attention, _place(positions)
        place_BS = place_BT if cache is None else cache.extend_places(place_BT)
        wide = torch.promote_types(dtype, torch.float32)
        distance_BHTS = (
            alibi(place_BT, place_BS, self.config.heads, wide) if attention.positions == "alibi" else None
        )
        in_compute_format = attention.softmax == "compute" or (
            attention.softmax == "fused" and not upcasts(visible_B1TS.new_empty(0, dtype=dtype))
        )
        bias_BHTS = score_bias(visible_B1TS, distance_BHTS, dtype if in_compute_format else wide)
        return bias_BHTS, self._rotation(positions, dtype)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation | None:
        attention = self.config.attention
        if attention.positions not in ("rope", "rope2d"):
            return None
        two = attention.positions == "rope2d"
        return rotation(positions, self.config.head, attention.rope_base, dtype, two=two)

    def output_weight(self) -> Tensor:
        """The output projection, [V, C]."""
        return self.embedding.output_weight() if self.projection is None else self.projection.weight

    def _check_length(self, tokens: int) -> None:
        if tokens > self.config.length:
            raise InputError(
                f"the row has {tokens} tokens but the model only {self.config.length} positions: shorten it, "
                "or train with a longer --model.length"
            )

    def _norm(self) -> AnyNorm:
        return make_norm(self.config, self.config.hidden)


def _place(positions: Tensor) -> Tensor:
    """The position in the text, [B, T], of 1-D or 2-D positions."""
    return positions if positions.dim() == 2 else positions[..., 0]
