"""DeepSpeed's loops over weights, each done at once by PyTorch's foreach functions.

A kernel and a wait for each of a few hundred weights leaves a GPU idle for as long as a backward pass takes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

PART = 1024  # numbers whose squares a CPU adds up in fp32


def speed_up(optimizer: Any) -> None:
    """Give an optimizer of DeepSpeed's the functions of this file, where it is one that they are for."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.step = partial(_step, optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.has_overflow_partitioned_grads_serial = partial(_overflow, optimizer)
        optimizer.get_grad_norm_direct = partial(_norm, optimizer)


@torch.no_grad()
def _step(optimizer: Any) -> bool:
    """FP16_UnfusedOptimizer.step, of stage 0 in 16 bits: from the gradients of the weights in 16 bits to an update of
    those in fp32, and a copy back. Returns whether it was dropped, since a gradient is not finite.
    """
    masters = [weight for group in optimizer.fp32_groups for weight in group]
    weights = [weight for group in optimizer.fp16_groups for weight in group]
    gradients = [torch.empty_like(weight) for weight in masters]
    torch._foreach_copy_(gradients, [torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
    norm = squares(gradients).sqrt().item()  # of gradients times the loss scale
    optimizer.overflow = not norm < torch.inf
    if optimizer.overflow:
        return optimizer._skip_invalid_grad_norm()
    optimizer._global_grad_norm = norm
    scale = optimizer.unscale_and_clip_grads(norm, apply_scale=False)
    optimizer._update_scale(False)  # DeepSpeed has it before, and then divides by a scale that has just grown
    if scale != 1:
        torch._foreach_mul_(gradients, 1 / scale)
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    optimizer.optimizer.step()
    for master in masters:
        master.grad = None
    torch._foreach_copy_(weights, masters)
    return False


def _overflow(optimizer: Any) -> torch.Tensor:
    """DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial, of stages 1 and 2: (1,) bool."""
    gradients = [each for group in optimizer.averaged_gradients.values() for each in group or () if each is not None]
    if not gradients:
        return torch.zeros(1, dtype=torch.bool, device=optimizer.device)
    largest = torch.stack(torch._foreach_norm(gradients, torch.inf)).max()  # NaN where one of them is
    return ~largest.isfinite().view(1)


def _norm(optimizer: Any, gradients: list[torch.Tensor], params: object) -> torch.Tensor:
    """DeepSpeedZeroOptimizer.get_grad_norm_direct: () over all ranks, -1 where it is not finite."""
    total = squares(gradients).float()  # what pads the gradients is 0
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt().nan_to_num(nan=-1.0, posinf=-1.0)


def squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """() the sum of all squares, in fp64. A GPU sums those of one weight in many parts; a CPU in few, which in fp32
    loses 1e-3 of the norm of 25 million, unless it is given the parts.
    """
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()
    parts = [part for gradient in gradients for part in _parts(gradient.flatten())]
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in parts]
    return torch.cat(norms).double().square().sum()


def _parts(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) -> (n // PART, PART) and what is left, (1, n % PART)."""
    whole = len(numbers) // PART * PART
    return numbers[:whole].view(-1, PART), numbers[None, whole:]
