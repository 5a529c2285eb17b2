"""A moving average of the weights, dealt to the ranks by whole tensors: any number of ranks can take it up."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from acn_scale import distributed
from acn_scale.reshape import in_order


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, in fp32, after each update (Polyak & Juditsky 1992).

    Of the tensors that are trained, rank r of n keeps every n-th. Its methods are collective.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.average = {name: weight.clone() for name, weight in self._weights()}

    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors of this rank's share, whole and in fp32."""
        from deepspeed.utils import safe_get_full_fp32_param  # here: importing it takes seconds

        mine, masters = [], {}
        if not self.engine.zero_optimization_stage():
            parameters, updated, _ = in_order(self.engine.optimizer)
            masters = {id(parameter): master for parameter, master in zip(parameters, updated, strict=True)}
        named = self.engine.module.named_parameters()
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        for number, (name, parameter) in enumerate(trained):
            whole = masters[id(parameter)].detach() if masters else safe_get_full_fp32_param(parameter)
            if number % distributed.world_size() == distributed.rank():
                mine.append((name, whole.float()))
        return mine

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights."""
        for name, weight in self._weights():
            self.average[name].lerp_(weight.to(self.average[name].device), 1 - self.decay)

    def parts(self) -> dict[str, bytes]:
        """This rank's file of a checkpoint."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.average.items()}
        return {f"ema_{distributed.rank():05d}.safetensors": save(tensors)}

    def load(self, checkpoint: Path) -> None:
        """From the files of any number of ranks."""
        for path in sorted(checkpoint.glob("ema_*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in self.average.keys() & set(file.keys()):
                    self.average[name].copy_(file.get_tensor(name))
