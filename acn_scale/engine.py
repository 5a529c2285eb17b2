"""Our config -> DeepSpeed config -> engine; one optimizer step; gradient norms that are right at every ZeRO stage."""

import ctypes
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acn_scale import distributed, foreach
from acn_scale.averaging import averaging, bucket_size, dealt
from acn_scale.config import Config, OptimConfig
from acn_scale.errors import UserError
from acn_scale.optim import build_optimizer, from_the_top, parameter_groups, part_of


def deepspeed_config(cfg: Config, world_size: int, parameters: int) -> dict[str, Any]:
    """Everything DeepSpeed is told. What it would otherwise choose by itself (clipping at 1.0) is written out.

    `parameters`: how many numbers are trained; it takes the whole of a bucket's memory, however few they are.
    """
    micro_batch_size = cfg.micro_batch_size(world_size)
    stage = cfg.train.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket_size(cfg.train, stage, parameters)}
    if stage in (1, 2):
        # Off by default, as DeepSpeed's is. Races between CUDA streams spoilt gradients without a word, before what
        # the version pinned here has (its pull requests 5606, 7965 and 8080).
        zero["overlap_comm"] = cfg.train.overlap_comm
    if cfg.train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if cfg.train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    if cfg.optim.name == "muon":
        zero["reduce_scatter"] = False  # it needs whole gradients
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": cfg.train.global_batch_size // (micro_batch_size * world_size),
        "gradient_clipping": cfg.train.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled when training starts
        "bf16": {"enabled": cfg.train.precision == "bf16"},
        "fp16": {"enabled": cfg.train.precision == "fp16"},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def build_engine(model: nn.Module, cfg: Config, device: torch.device, world_size: int) -> Any:
    """A DeepSpeed engine round the model. Call it on every rank, inside the process group.

    Raises UserError for a precision that the device cannot do.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # or DeepSpeed warns at import that it had to guess
    import deepspeed  # here: it takes seconds, which --help and error messages need not wait for

    if cfg.train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise UserError(f"train.precision = fp16: not supported on this {device.type}; fp32 and bf16 are")
    deepspeed.ops.__compatible_ops__ = {}  # or it compiles programs to see which it could
    if cfg.optim.name != "muon":  # or it imports all of torch's compiler, whatever the optimizer is, for Muon's sake
        deepspeed.runtime.compiler.compile = lambda: lambda function: function
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says on a CPU that there is no CUDA
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's own calls
    if device.type == "cpu":
        keep_freed_memory()
    model = model.to(device)
    if cfg.train.compile:
        for block in model.trunk.blocks:  # alike, so that one compilation does for all
            block.compile()
    optimizer = _muon(model, cfg.optim) if cfg.optim.name == "muon" else build_optimizer(model, cfg.optim)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = deepspeed_config(cfg, world_size, trained)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    foreach.speed_up(engine.optimizer)
    engine.averaging = nullcontext  # what the last backward pass of a step happens in
    if cfg.train.zero_stage == 0:
        engine.enable_backward_allreduce = False
        if world_size > 1:
            size = bucket_size(cfg.train, 0, trained)
            engine.averaging = partial(averaging, dealt(from_the_top(engine.module), size))
        engine.clip_fp32_gradients = lambda: None  # _update() does it, at once for all weights
    return engine


def keep_freed_memory() -> None:
    """Have glibc keep the blocks that tensors leave, unless its own variables say what it should do.

    By default large ones go back to the kernel at once, which clears every page of them anew: a tenth of a step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _muon(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) from DeepSpeed, which knows how to do it under ZeRO, with updates as large as AdamW's;
    AdamW for what is no matrix.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups = parameter_groups(model, cfg)
    for group in groups:
        group["lr"] = cfg.lr
        group |= {} if group["use_muon"] else {"betas": tuple(cfg.betas), "eps": cfg.eps}
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)


@dataclass
class Step:
    """What one optimizer step gave: by default nothing, of a batch that was passed over."""

    stop: bool  # whether any rank was asked to stop
    loss: float = math.nan  # of the global batch
    own_loss: float = math.nan  # of this rank's part of it
    fault: str | None = None  # why the update was dropped
    applied: bool = False  # False where it was dropped: for a fault, or by fp16's loss scale
    seconds: float = 0.0  # of this rank's forward passes, in which it waits for no other below ZeRO-3
    gradient_norms: dict[str, float] | None = None  # of the global batch; None where not asked for
    tokens: int = 0  # of the texts of the global batch, without padding


def train_step(
    engine: Any,
    stream: Iterator[dict[str, Tensor]],
    lr: float,
    *,
    batch_size: int | None = None,
    judge: Callable[[float], str | None] = lambda loss: None,
    stop: bool = False,
    measure_gradients: bool = False,
    phase: Callable[[str], None] = lambda name: None,
    edit: Callable[[], None] | None = None,
) -> Step:
    """Take a global batch from the stream and make one update with learning rate `lr`.

    `batch_size`: samples of the global batch, where it is not the one of the step before.
    `judge` says what is wrong with the batch's loss, the same on every rank: the update is then dropped, as it is for
    a gradient that is not finite. `phase` is told where the step is. `stop`: whether this rank was asked to stop.
    `edit` can change weights, gradients and moments right before an update; at stage 0 in fp32 it is called.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    engine.set_train_batch_size(batch_size or engine.train_batch_size())
    micro_steps = engine.gradient_accumulation_steps()
    losses, tokens = [], 0
    seconds = 0.0
    for micro_step in range(micro_steps):
        phase("data")
        batch = {name: values.to(engine.device, non_blocking=True) for name, values in next(stream).items()}
        engine.set_gradient_accumulation_boundary(micro_step == micro_steps - 1)  # a ramp would shift its own count
        phase("forward")
        start = time.perf_counter()
        loss = engine(**batch)["loss"]
        seconds += time.perf_counter() - start
        losses.append(loss.detach())
        if "tokens" in batch:
            tokens += batch["mask"].sum() if "mask" in batch else batch["tokens"].numel()
        if micro_step < micro_steps - 1:
            phase("backward")
            _backward(engine, loss)
            engine.step()  # counts the micro batch
    start = time.perf_counter()
    own_loss = torch.stack(losses).double().mean().item()  # waits for a GPU's forward pass
    seconds += time.perf_counter() - start
    phase("exchange")
    total, stops, tokens = distributed.sum_on_cpu([own_loss, float(stop), float(tokens)])
    mean = total / distributed.world_size()
    fault = judge(mean)
    phase("backward")
    with engine.averaging():
        _backward(engine, loss if fault is None else loss * torch.nan)  # what is not finite is dropped, on all ranks
    phase("update")  # what comes now waits for a GPU's backward pass, and with it for the other ranks'
    norms = gradient_norms(engine) if measure_gradients and fault is None else None
    applied = _update(engine, edit)
    if not applied and fault is None and not engine.fp16_enabled():
        fault = "a gradient is not finite"
    return Step(stops > 0, mean, own_loss, fault, applied, seconds, norms, int(tokens))


def _backward(engine: Any, loss: Tensor) -> None:
    """At stage 0 DeepSpeed divides fp16's gradients by a scale that it has not multiplied the loss by."""
    if engine.fp16_enabled() and not engine.zero_optimization_stage():
        loss = loss * engine.optimizer.loss_scale
    engine.backward(loss)


def _update(engine: Any, edit: Callable[[], None] | None) -> bool:
    """Make the update and return whether it was made. DeepSpeed itself looks at the gradients from stage 1 on only."""
    whole = engine.zero_optimization_stage() == 0 and not (engine.fp16_enabled() or engine.bfloat16_enabled())
    if whole:
        norm = _whole_norm(engine.module)
        if not math.isfinite(norm):
            engine.optimizer.step = lambda: None  # in the place of the method, for this step
            engine.step()
            del engine.optimizer.step
            return False
        if edit:
            edit()
            norm = _whole_norm(engine.module)
        largest = engine.gradient_clipping()
        if largest and norm + 1e-6 > largest:  # PyTorch would multiply by 1 otherwise
            nn.utils.clip_grads_with_norm_(engine.module.parameters(), largest, torch.tensor(norm))
    engine.step()
    return engine.was_step_applied()


def _whole_norm(model: nn.Module) -> float:
    """The same on every rank, also where their processors round differently."""
    gradients = (parameter.grad for parameter in model.parameters())
    norm = foreach.squares([gradient for gradient in gradients if gradient is not None]).sqrt().item()
    return distributed.sum_on_cpu([norm])[0] / distributed.world_size()


def gradient_norms(engine: Any) -> dict[str, float]:
    """L2 norm of the whole gradient before clipping, "all", and of its parts: "embed", "block_01", ..., "head".

    A join counts to the block below it, and what is frozen has none. Call it on every rank, after the last backward
    pass of a step and before the update: full gradients are put together from all ranks. With Muon at ZeRO 1 and 2 a
    block's matrices count with their update, which DeepSpeed has then put in the gradient's place.
    """
    from deepspeed.utils import safe_get_full_grad

    squares: dict[str, Tensor | float] = {}
    scale = engine.optimizer.loss_scale if engine.fp16_enabled() else 1.0  # the engine knows the config alone
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
        if gradient is not None:
            part = part_of(name)
            squares[part] = squares.get(part, 0.0) + foreach.squares([gradient])
    norms = {part: float(square) ** 0.5 / scale for part, square in squares.items()}
    return {"all": math.hypot(*norms.values())} | norms
