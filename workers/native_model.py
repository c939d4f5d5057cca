"""Llama 4's text model on the CPU kernels: layer by layer what model.py says in torch's own operators.

Shape suffixes: T rows of the step, X hidden size, D head dimension, R rows (a token once an expert it chose),
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention import temperature
from workers.exchange import Exchange
from workers.expert_map import ExpertMap
from workers.experts import Placement
from workers.kv_cache import KVCache
from workers.model_config import ModelConfig
from workers.native import Kernels, NativeAttention, NativeDense, NativeExperts, NativeHead, NativeRouter, StepRows
from workers.rope import inverse_frequencies, rotations
from workers.step_clock import StepClock
from workers.step_inputs import StepInputs
from workers.weights import LayerWeights, ModelWeights, MoeWeights


class NativeMoe:
    """x += shared_expert(norm(x)) + Σ expert(score · norm(x)), in place; as `MoeLayer`."""

    def __init__(
        self,
        kernels: Kernels,
        config: ModelConfig,
        norm: Tensor,
        weights: MoeWeights,
        placement: Placement,
        exchange: Exchange,
        clock: StepClock,
    ) -> None:
        self._placement, self._exchange, self._clock = placement, exchange, clock
        self._route = NativeRouter(kernels, norm, weights.router, config.experts_per_token, config.rms_norm_eps)
        self._shared = NativeDense(kernels, norm, weights.shared, config.rms_norm_eps)
        self.routed = NativeExperts(kernels, weights.routed, len(weights.router))

    def __call__(self, x_TX: Tensor) -> None:
        clock, exchange = self._clock, self._exchange
        normed_TX, scaled_RX, expert_R = self._route(x_TX)
        process_R = self._placement.process_of(expert_R, start=exchange.index)
        clock.lap("experts")
        dispatched = exchange.dispatch(scaled_RX, process_R, expert_R)
        clock.lap("exchange")
        y_SX = self.routed(dispatched.x_SD, dispatched.expert_S)
        clock.lap("experts")
        routed_RX = exchange.combine(y_SX, dispatched)
        clock.lap("exchange")
        self._shared(x_TX, normed_TX, routed_RX)
        clock.lap("dense")


class NativeLayer:
    """One layer, in place but for the rows that it leaves out."""

    def __init__(
        self, attention: NativeAttention, feed_forward: NativeDense | NativeMoe, is_local: bool, clock: StepClock
    ) -> None:
        self._attention, self.feed_forward, self._clock = attention, feed_forward, clock
        self.is_local = is_local

    def __call__(self, x_TX: Tensor, rows: StepRows, outputs: Tensor | None = None) -> Tensor:
        """With `outputs` the feed-forward part computes only those rows, and they alone are returned."""
        self._attention(x_TX, rows)
        if outputs is not None:
            x_TX = x_TX[outputs]
        self._clock.lap("attention")
        self.feed_forward(x_TX)
        if isinstance(self.feed_forward, NativeDense):
            self._clock.lap("dense")
        return x_TX


class NativeLlama4:
    """Computes what `Llama4` computes.

    Raises:
        KernelError: the kernels cannot be had on this machine.
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
        kernels = Kernels(weights.embedding.dtype, torch.get_num_threads())
        self._frequencies = inverse_frequencies(config)
        self._head = NativeHead(kernels, weights.norm, weights.head, config.rms_norm_eps)

        def feed_forward(number: int, layer: LayerWeights) -> NativeDense | NativeMoe:
            if not isinstance(layer.mlp, MoeWeights):
                return NativeDense(kernels, layer.mlp_norm, layer.mlp, config.rms_norm_eps)
            placement = Placement(expert_map, config.moe_layers.index(number), members, torch.device("cpu"))
            return NativeMoe(kernels, config, layer.mlp_norm, layer.mlp, placement, exchange, clock)

        self.layers = [
            NativeLayer(
                NativeAttention(kernels, config, layer.attention_norm, layer.attention, cache.layers[number]),
                feed_forward(number, layer),
                config.rope_layers[number],
                clock,
            )
            for number, layer in enumerate(weights.layers)
        ]

    @property
    def moe_layers(self) -> list[NativeMoe]:
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, NativeMoe)]

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs) -> Tensor:
        """Final hidden states of the step's output rows, normed: [rows, X]."""
        rotation_TC = rotations(inputs.position_T, self._frequencies)[:, 0]
        cos_TD = rotation_TC.real.repeat_interleave(2, dim=1)
        sin_TD = torch.stack([-rotation_TC.imag, rotation_TC.imag], dim=2).flatten(1)
        heat_T11 = temperature(inputs.position_T, self._config)
        local = StepRows(inputs.local_rows, cos_TD, sin_TD)
        global_ = StepRows(inputs.global_rows, temp_T=None if heat_T11 is None else heat_T11.flatten())
        self._clock.lap("inputs")
        x_TX = F.embedding(inputs.token_T, self._weights.embedding)
        self._clock.lap("dense")
        *most, last = self.layers
        for layer in most:
            layer(x_TX, local if layer.is_local else global_)
        x_TX = last(x_TX, local if last.is_local else global_, inputs.output_rows)
        hidden_TX = self._head.norm(x_TX)
        self._clock.lap("head")
        return hidden_TX

    @torch.inference_mode()
    def logits(self, hidden_TX: Tensor) -> Tensor:
        """[T, V] float32."""
        return self._head.logits(hidden_TX)
