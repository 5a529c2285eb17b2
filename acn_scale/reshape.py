"""Checkpoints of another number of ranks, ZeRO stage or of blocks: each rank takes its part out of all ranks' files."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acn_scale import distributed, zero


def layout(engine: Any) -> dict[str, Any]:
    """How an engine's state is spread: what decides whether a checkpoint can be loaded as it is."""
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    ranks, stage = distributed.world_size(), engine.zero_optimization_stage()
    return {"ranks": ranks, "zero_stage": stage, "precision": precision, "depth": len(engine.module.trunk.blocks)}


def describe(layout: dict[str, Any]) -> str:
    ranks, blocks = layout["ranks"], layout["depth"]
    return f"{blocks} block{'s' * (blocks > 1)} on {ranks} rank{'s' * (ranks > 1)} at ZeRO-{layout['zero_stage']}"


def fits(written: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint can be loaded without reshaping. At stage 0 every rank holds the whole state."""
    return written == now or (written["zero_stage"] == 0 and written | {"ranks": now["ranks"]} == now)


def notes(engine: Any) -> dict[str, Any]:
    """What load() needs to know of the engine that wrote a checkpoint, for its state.json."""
    lamb_step = _inner(engine).param_groups[0].get("step")  # of all weights, where AdamW has one of each
    return {
        "layout": layout(engine),
        "parameters": names_in_order(engine),
        "frozen": [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad],
        "loss_scale": engine.optimizer.loss_scale if engine.fp16_enabled() else None,
        "lamb_step": None if lamb_step is None else int(lamb_step),
    }


def names_in_order(engine: Any) -> list[str]:
    """The parameters' names as the optimizer numbers them, at stage 0."""
    if engine.zero_optimization_stage():
        return []
    names = _names(engine)
    return [names[id(parameter)] for parameter in in_order(engine.optimizer)[0]]


def in_order(optimizer: Any) -> tuple[list[Tensor], list[Tensor], Any]:
    """At stage 0: the model's parameters as the optimizer numbers them, those that it updates, and PyTorch's optimizer.

    In 16 bits DeepSpeed puts a wrapper round that one, which holds the weights in fp32.
    """
    if hasattr(optimizer, "fp32_groups"):
        return [*chain(*optimizer.fp16_groups)], [*chain(*optimizer.fp32_groups)], optimizer.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return parameters, parameters, optimizer


@torch.no_grad()
def load(engine: Any, path: Path, state: dict[str, Any]) -> None:
    """Load what another layout wrote. Raises UserError for files that cannot be read, on all ranks."""
    inner = _inner(engine)
    moments = inner.state
    with distributed.together():
        kept = zero.kept(path, state)
        if engine.zero_optimization_stage() == 3:
            engine.optimizer.checkpoint_event_prologue()
        for name, flat, there, start, size in _places(engine):
            for key, pieces in kept[name].items():
                if pieces[0].dim() == 0:  # a counter, of the whole flat tensor
                    moments[flat][key] = pieces[0].to(_counter_device(inner, flat), copy=True)
                    continue
                if key != "fp32" and key not in moments[flat]:
                    moments[flat][key] = torch.zeros_like(flat)
                held = flat if key == "fp32" else moments[flat][key]
                whole = torch.cat([piece.flatten() for piece in pieces])
                held.view(-1)[there : there + size] = whole[start : start + size]
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                _fill(parameter, torch.cat([piece.flatten() for piece in kept[name]["fp32"]]))
    _to_model(engine)
    if engine.fp16_enabled():
        engine.optimizer.loss_scale = state["loss_scale"]
    if state["lamb_step"] is not None:
        for group in inner.param_groups:
            group["step"] = torch.tensor(float(state["lamb_step"]))


def _counter_device(optimizer: torch.optim.Optimizer, weight: Tensor) -> torch.device:
    """Where AdamW makes its "step": beside the weight where its kernel reads it, which takes it from nowhere else."""
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return weight.device if beside else torch.device("cpu")


def _places(engine: Any) -> Iterator[tuple[str, Tensor, int, int, int]]:
    """Of each weight of which this rank keeps a part in fp32: its name, the tensor that the part is in, where it begins
    there, where it begins in the weight, and its size.
    """
    stage, optimizer, names = engine.zero_optimization_stage(), engine.optimizer, _names(engine)
    if stage == 0:
        parameters, masters, _ = in_order(optimizer)
        for parameter, master in zip(parameters, masters, strict=True):
            yield names[id(parameter)], master, 0, 0, master.numel()
    elif stage < 3:
        for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
            for parameter in group:
                if parameter._hp_mapping is not None:
                    there, here = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
                    yield names[id(parameter)], flat, there.start, here.start, here.numel
    else:
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            there = 0
            for parameter in group:
                size = parameter.partition_numel()
                start = distributed.rank() * size
                yield names[id(parameter)], flat, there, start, max(0, min(size, parameter.ds_numel - start))
                there += size


def _fill(parameter: Tensor, whole: Tensor) -> None:
    """A weight that no optimizer keeps, from all of it, which may have padding behind it."""
    if hasattr(parameter, "ds_tensor"):  # this rank's partition, with stage 3
        start, size = distributed.rank() * parameter.ds_tensor.numel(), parameter.ds_tensor.numel()
        part = whole[: parameter.ds_numel][start : start + size]
        parameter.ds_tensor.view(-1)[: len(part)] = part
    else:
        parameter.copy_(whole[: parameter.numel()].view_as(parameter))


def _to_model(engine: Any) -> None:
    """From the weights that the optimizer keeps to those that the model computes with."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for parameter, master in zip(*in_order(optimizer)[:2], strict=True):
            parameter.copy_(master)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        groups = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        for low, high in groups:
            low.copy_(high)
        optimizer.checkpoint_event_epilogue()


def _inner(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else in_order(engine.optimizer)[2]


def _names(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}
