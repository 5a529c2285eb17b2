"""What a checkpoint of any ZeRO stage and number of ranks keeps of each weight, read without DeepSpeed."""

import pickle
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acn_scale.errors import UserError

Pieces = list[Tensor]  # of a tensor, one after the other when flat; the last may have padding behind it
Kept = dict[str, Pieces]  # of a weight: itself in fp32, "fp32", and what the optimizer keeps, such as "exp_avg"


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


def kept(checkpoint: Path, state: dict[str, Any]) -> dict[str, Kept]:
    """By the weights' names, as views of the files: read when they are used. `state`: what its state.json holds.

    A single number, such as "step", is one piece of each rank's. Raises UserError where a file is missing or strange.
    """
    try:
        ranks, stage = state["layout"]["ranks"], state["layout"]["zero_stage"]
        if stage == 0:
            return _whole(checkpoint, state["parameters"]) | frozen(checkpoint, state)
        shapes = _shapes(checkpoint) if stage == 3 else {}
        found: dict[str, Kept] = defaultdict(lambda: defaultdict(list))
        for rank in range(ranks):
            part = _optimizer_state(checkpoint, rank)
            for name, flats, start, size in _partitions(part, ranks, shapes) if stage == 3 else _slices(part):
                for key, flat in flats.items():
                    found[name][key].append(flat.detach()[start : start + size] if flat.dim() else flat)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{checkpoint}: not a checkpoint of this version: {error!r}") from None
    return found | frozen(checkpoint, state)


def frozen(checkpoint: Path, state: dict[str, Any]) -> dict[str, Kept]:
    """The same of the weights that the run does not train, in the precision that it computes with. Raises UserError."""
    names, layout = state["frozen"], state["layout"]
    if not names:
        return {}
    if layout["zero_stage"] < 3:
        parts = [_load(checkpoint / "mp_rank_00_model_states.pt")["module"]]
    else:
        files = (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(layout["ranks"]))
        parts = [_load(checkpoint / file)["frozen_param_fragments"] for file in files]
    return {name: {"fp32": [part[name] for part in parts]} for name in names}


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(RECORDS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def _optimizer_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    path = next((path for path in (checkpoint / f"bf16_{name}", checkpoint / name) if path.exists()), None)
    if path is None:
        raise UserError(f"{checkpoint / name}: no such file; the checkpoint is not whole")
    return _load(path)["optimizer_state_dict"]


def _whole(checkpoint: Path, names: list[str]) -> dict[str, Kept]:
    """Stage 0: all in one file; in 16 bits the optimizer holds the fp32 weights, in its own order."""
    state = _load(checkpoint / "mp_rank_00_model_states.pt")
    optimizer = state["optimizer"]
    if "fp32_groups" in optimizer:
        weights = [*chain(*optimizer["fp32_groups"])]
        optimizer = optimizer["optimizer_state_dict"]
    else:
        weights = [state["module"][name] for name in names]
    found = {}
    for number, (name, weight) in enumerate(zip(names, weights, strict=True)):
        moments = {key: [torch.as_tensor(values)] for key, values in optimizer["state"].get(number, {}).items()}
        found[name] = {"fp32": [weight.detach()]} | moments
    return found


# A weight's name, a rank's flat tensors by key, where in them a part of that weight begins, and the part's size.
Slice = tuple[str, dict[str, Tensor], int, int]


def _slices(part: dict[str, Any]) -> Iterator[Slice]:
    """Stages 1 and 2: a rank holds a stretch of each group's flat tensors and says where in it a weight's slice is."""
    moments = part["base_optimizer_state"]["state"]
    groups = zip(part["single_partition_of_fp32_groups"], part["param_slice_mappings"], strict=True)
    for number, (flat, places) in enumerate(groups):
        for name, place in places.items():
            yield name, {"fp32": flat} | moments.get(number, {}), place.start, place.numel


def _partitions(part: dict[str, Any], ranks: int, shapes: dict[str, torch.Size]) -> Iterator[Slice]:
    """Stage 3: each weight is cut into as many equal partitions as there are ranks, padded at the end."""
    moments = part["optimizer_state_dict"]["state"]
    flats = enumerate(part["fp32_flat_groups"])
    number, flat = next(flats)
    start = 0
    for name, shape in shapes.items():
        size = -(-shape.numel() // ranks)
        if start == len(flat):
            (number, flat), start = next(flats), 0
        yield name, {"fp32": flat} | moments.get(number, {}), start, size
        start += size


def _shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Of the weights, in the optimizer's order."""
    state = _load(checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return {name: shape for group in state["param_shapes"] for name, shape in group.items()}
