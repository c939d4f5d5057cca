"""Llama 4's text model: from token rows to hidden states to logits.

Shape suffixes: T rows of the step, X hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention import Attention, PositionTensors, temperature
from workers.exchange import Exchange
from workers.expert_map import ExpertMap
from workers.experts import MoeLayer, Placement
from workers.kv_cache import KVCache
from workers.layers import mlp, rms_norm
from workers.model_config import ModelConfig
from workers.rope import inverse_frequencies, rotations
from workers.step_clock import StepClock
from workers.step_inputs import StepInputs
from workers.weights import LayerWeights, ModelWeights, MoeWeights


class Layer:
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self, weights: LayerWeights, attention: Attention, moe: MoeLayer | None, eps: float, clock: StepClock
    ) -> None:
        self._weights, self._eps, self._clock = weights, eps, clock
        self._attention, self.moe = attention, moe

    def __call__(
        self, x_TX: Tensor, positions: PositionTensors, inputs: StepInputs, rows: Tensor | None = None
    ) -> Tensor:
        """With `rows` the feed-forward part computes only those, and they alone are returned."""
        seen = inputs.local if self._attention.is_local else inputs.global_
        x_TX = x_TX + self._attention(rms_norm(x_TX, self._weights.attention_norm, self._eps), positions, seen)
        if rows is not None:
            x_TX = x_TX[rows]
        self._clock.lap("attention")
        normed_TX = rms_norm(x_TX, self._weights.mlp_norm, self._eps)
        if self.moe is not None:
            return x_TX + self.moe(normed_TX)
        assert not isinstance(self._weights.mlp, MoeWeights)
        x_TX = x_TX + mlp(normed_TX, self._weights.mlp)
        self._clock.lap("dense")
        return x_TX


class Llama4:
    """A rank's model. Every rank of the gang calls `hidden` for every step, with no rows where it has none.

    Args:
        members: ranks in process-group order.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        cache: KVCache,
        expert_map: ExpertMap,
        members: list[int],
        exchange: Exchange,
        clock: StepClock,
    ) -> None:
        self._config, self._weights, self._clock = config, weights, clock
        self._frequencies = inverse_frequencies(config).to(weights.embedding.device)
        self.layers = []
        for number, layer in enumerate(weights.layers):
            moe = None
            if isinstance(layer.mlp, MoeWeights):
                placement = Placement(expert_map, config.moe_layers.index(number), members, weights.embedding.device)
                moe = MoeLayer(layer.mlp, placement, exchange, config.experts_per_token, clock)
            attention = Attention(config, number, layer.attention, cache.layers[number])
            self.layers.append(Layer(layer, attention, moe, config.rms_norm_eps, clock))

    @property
    def moe_layers(self) -> list[MoeLayer]:
        return [layer.moe for layer in self.layers if layer.moe is not None]

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs) -> Tensor:
        """Final hidden states of the step's output rows, normed: [rows, X]."""
        positions = PositionTensors(
            rotations(inputs.position_T, self._frequencies), temperature(inputs.position_T, self._config)
        )
        self._clock.lap("inputs")
        x_TX = F.embedding(inputs.token_T, self._weights.embedding)
        *most, last = self.layers
        for layer in most:
            x_TX = layer(x_TX, positions, inputs)
        # Behind the last attention no row needs another: most of a prompt's rows end there.
        x_TX = last(x_TX, positions, inputs, inputs.output_rows)
        return rms_norm(x_TX, self._weights.norm, self._config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_TX: Tensor) -> Tensor:
        """[T, V] float32."""
        return F.linear(hidden_TX, self._weights.head).float()
