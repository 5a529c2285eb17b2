"""The weights in a checkpoint of any ZeRO stage and number of ranks, in fp32, read without DeepSpeed."""

import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acn_scale.checkpoint import STATE_NAME, damage
from acn_scale.errors import UserError
from acn_scale.runs import read_json

Pieces = dict[str, list[Tensor]]  # of each weight, one after the other when flat; the last may have padding behind it


class _Record:
    """Stands for DeepSpeed's plain classes in its files, so that no code of theirs is run or needed."""

    def __new__(cls, *_: Any) -> "_Record":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


RECORDS = [
    (type(name.rpartition(".")[2], (_Record,), {}), name)
    for name in (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
]


def weights(checkpoint: Path, *, average: bool = False) -> Pieces:
    """The fp32 weights by name, or their moving average, as views of the files: read when they are used.

    Raises UserError for a checkpoint that is damaged, lacks a rank's file or keeps no average.
    """
    if found := damage(checkpoint):
        raise UserError(found[0] + (f", and {len(found) - 1} more files are damaged" if len(found) > 1 else ""))
    if average:
        return _averages(checkpoint) | frozen(checkpoint)
    state = read_json(checkpoint / STATE_NAME)
    try:
        ranks, stage = state["layout"]["ranks"], state["layout"]["zero_stage"]
        if stage == 0:
            return _whole(checkpoint, state["parameters"]) | frozen(checkpoint)
        parts = [_optimizer_state(checkpoint, rank) for rank in range(ranks)]
        return (_slices(parts) if stage < 3 else _partitions(parts, _shapes(checkpoint))) | frozen(checkpoint)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{checkpoint}: not a checkpoint of this version: {error!r}") from None


def frozen(checkpoint: Path) -> Pieces:
    """The weights that the run does not train, in the precision that it has them in."""
    state = read_json(checkpoint / STATE_NAME)
    names, layout = state.get("frozen", []), state["layout"]
    if not names:
        return {}
    if layout["zero_stage"] < 3:
        module = _load(checkpoint / "mp_rank_00_model_states.pt")["module"]
        return {name: [module[name]] for name in names}
    files = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(layout["ranks"])]
    parts = [_load(checkpoint / file)["frozen_param_fragments"] for file in files]
    return {name: [part[name] for part in parts] for name in names}


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(RECORDS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def _averages(checkpoint: Path) -> Pieces:
    """ZeRO or not: each rank's file holds whole tensors."""
    files = sorted(checkpoint.glob("ema_*.safetensors"))
    if not files:
        raise UserError(f"{checkpoint}: keeps no average of the weights; train.ema_decay makes a run keep one")
    pieces = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                pieces |= {name: [file.get_tensor(name)] for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: {error}") from None
    return pieces


def _whole(checkpoint: Path, names: list[str]) -> Pieces:
    """Stage 0: all in one file; in 16 bits the optimizer holds the fp32 weights, in its own order."""
    state = _load(checkpoint / "mp_rank_00_model_states.pt")
    if "fp32_groups" in state["optimizer"]:
        masters = chain(*state["optimizer"]["fp32_groups"])
        return {name: [weight.detach()] for name, weight in zip(names, masters, strict=True)}
    return {name: [state["module"][name]] for name in names}


def _optimizer_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    path = next((path for path in (checkpoint / f"bf16_{name}", checkpoint / name) if path.exists()), None)
    if path is None:
        raise UserError(f"{checkpoint / name}: no such file; the checkpoint is not whole")
    return _load(path)["optimizer_state_dict"]


def _slices(parts: list[dict[str, Any]]) -> Pieces:
    """Stages 1 and 2: a rank holds a stretch of each group's flat weights and says where in it a weight's slice is."""
    pieces: Pieces = {}
    for part in parts:
        for flat, places in zip(part["single_partition_of_fp32_groups"], part["param_slice_mappings"], strict=True):
            for name, place in places.items():
                pieces.setdefault(name, []).append(flat.detach().narrow(0, place.start, place.numel))
    return pieces


def _shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Of the weights, in the optimizer's order."""
    state = _load(checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return {name: shape for group in state["param_shapes"] for name, shape in group.items()}


def _partitions(parts: list[dict[str, Any]], shapes: dict[str, torch.Size]) -> Pieces:
    """Stage 3: each weight is cut into as many equal partitions as there are ranks, padded at the end."""
    pieces: Pieces = {name: [] for name in shapes}
    for part in parts:
        flats = iter(part["fp32_flat_groups"])
        flat, start = next(flats).detach(), 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // len(parts))
            if start == len(flat):
                flat, start = next(flats).detach(), 0
            pieces[name].append(flat.narrow(0, start, size))
            start += size
    return pieces
