"""How the weights of a training lie on its processes: whole on each, or in shards (FSDP2, arXiv:2304.11277).

Both ways have the same methods, so the loop does not know which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from slmops.training import ranks


class Replicated:
    """Every process holds all weights; gradients are summed after the last forward pass of a step."""

    def __init__(self, model: PreTrainedModel, projections: torch.nn.Module) -> None:
        self.root: torch.nn.Module = _Root(model, projections)
        self.model = model

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.root.named_parameters() if parameter.requires_grad}

    def forward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` gives, with all weights at hand."""
        return compute()

    def num_passes(self, wanted: int) -> int:
        """How many forward passes this process makes in a step, of which `wanted` have rows."""
        return wanted

    @property
    def validates(self) -> bool:
        """Whether this process runs held-out rows."""
        return ranks.rank() == 0

    @property
    def gradient_scale(self) -> float:
        """What the loss is multiplied by before the backward pass."""
        return 1.0

    def sum_gradients(self) -> None:
        """Have the sum over all processes in each gradient."""
        ranks.sum_gradients(self.trained.values())

    def state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trained weights and the optimizer's state, whole; every process asks at once."""
        return {name: parameter.data for name, parameter in self.trained.items()}, optimizer.state_dict()

    def load(
        self, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None, state: dict[str, Any]
    ) -> None:
        """Take over what `state` gave; without an optimizer, the weights alone."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(weights[name])
        if optimizer:
            optimizer.load_state_dict(state)

    def whole_model(self) -> PreTrainedModel:
        """The model as it is to be saved."""
        return self.model


class Sharded(Replicated):
    """Every process holds a part of weights, gradients and optimizer state, and a layer whole while it runs."""

    WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)

    def __init__(self, model: PreTrainedModel, projections: torch.nn.Module) -> None:
        super().__init__(model, projections)
        mesh = init_device_mesh(model.device.type, (ranks.size(),))
        layers = [each for each in model.modules() if type(each).__name__ in (model._no_split_modules or ())]
        for module in (*layers, self.root):
            fully_shard(module, mesh=mesh)

    def forward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = self.root(compute)
        return result

    def num_passes(self, wanted: int) -> int:
        """All processes gather and scatter together, so one with fewer rows makes empty passes."""
        return ranks.largest(wanted)

    @property
    def validates(self) -> bool:
        return True

    @property
    def gradient_scale(self) -> float:
        """FSDP averages, and the loss is divided by the tokens of all processes already."""
        return float(ranks.size())

    def sum_gradients(self) -> None:
        """The backward pass has done it."""

    def state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        weights = dcp.get_model_state_dict(self.root, options=self.WHOLE)
        return weights, dcp.get_optimizer_state_dict(self.root, optimizer, options=self.WHOLE)

    def load(
        self, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None, state: dict[str, Any]
    ) -> None:
        dcp.set_model_state_dict(self.root, dict[str, Any](weights), options=self.WHOLE)
        if optimizer:
            dcp.set_optimizer_state_dict(self.root, optimizer, state, options=self.WHOLE)

    def whole_model(self) -> PreTrainedModel:
        """A model with all weights, which the first process saves."""
        prefix = "model."
        weights = dcp.get_model_state_dict(self.root, options=self.WHOLE)
        model = type(self.model)(self.model.config)
        mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if ranks.rank() == 0:
            model.load_state_dict(mine, strict=False)
            model.tie_weights()
        return model


class _Root(torch.nn.Module):
    """All that is trained, as one module whose forward pass is the whole loss: FSDP gathers what it needs around it."""

    def __init__(self, model: PreTrainedModel, projections: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()
