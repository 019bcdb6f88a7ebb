"""The experts of gpt-oss as a PyTorch layer that reads only those it needs, one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from generator_svc.export.checkpoint.experts import ExpertMatrices
from generator_svc.export.checkpoint.tensors import Tensors


class StreamedExperts(torch.nn.Module):  # type: ignore[misc]
    """Replaces GptOssExperts of transformers and computes the same.

    Gate and up alternate in the rows of `gate_up`. In a trace it is a placeholder that keeps the
    router in the graph, and that `graph/experts.py` replaces by the operator.
    """

    def __init__(
        self, gate_up: ExpertMatrices, down: ExpertMatrices, alpha: float, limit: float
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.alpha = alpha
        self.limit = limit

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """From hidden states [batch, sequence, hidden size] to the same shape.

        `router_indices` are [tokens, chosen], `routing_weights` [tokens, experts].
        """
        if torch.jit.is_tracing():
            return hidden_states * routing_weights.sum()
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        result = torch.zeros_like(tokens)
        biases = [torch.from_numpy(part.bias()) for part in (self.gate_up, self.down)]
        for expert in router_indices.unique().tolist():
            chosen = (router_indices == expert).any(-1).nonzero()[:, 0]
            weight = torch.from_numpy(self.gate_up.floats(expert))
            gate_up = functional.linear(tokens[chosen], weight, biases[0][expert])
            weight = torch.from_numpy(self.down.floats(expert))
            output = functional.linear(self._activate(gate_up), weight, biases[1][expert])
            result.index_add_(0, chosen, output * routing_weights[chosen, expert, None])
        return result.reshape(hidden_states.shape)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate = gate_up[..., 0::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def stream_experts(model: Any, tensors: Tensors, is_mxfp4: bool) -> None:
    """Replaces the experts of all layers; raises ExportError if `tensors` do not have them."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, GptOssExperts):
            continue
        hidden, inner = module.hidden_size, module.intermediate_size
        gate_up, down = (
            ExpertMatrices(tensors, f"{name}.{part}", is_mxfp4, module.num_experts, rows, columns)
            for part, rows, columns in (
                ("gate_up_proj", 2 * inner, hidden),
                ("down_proj", hidden, inner),
            )
        )
        gate_up.check()
        down.check()
        model.set_submodule(name, StreamedExperts(gate_up, down, module.alpha, module.limit))
