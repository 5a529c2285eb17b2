"""Checkpoints of another number of ranks or ZeRO stage, by way of DeepSpeed's universal format: a file a tensor."""

import copy
import importlib.metadata
import logging
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from acn_scale import distributed
from acn_scale.errors import SharedError

log = logging.getLogger(__name__)

MODEL_FILE = "mp_rank_00_model_states.pt"
FOLDER = "universal"


def layout(engine: Any) -> dict[str, Any]:
    """How an engine's state is spread: what decides whether a checkpoint can be loaded as it is."""
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    ranks, stage = distributed.world_size(), engine.zero_optimization_stage()
    return {"ranks": ranks, "zero_stage": stage, "precision": precision, "depth": len(engine.module.trunk.blocks)}


def describe(layout: dict[str, Any]) -> str:
    return f"{layout['ranks']} rank{'s' * (layout['ranks'] > 1)} at ZeRO-{layout['zero_stage']}"


def fits(written: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint can be loaded without reshaping. At stage 0 every rank holds the whole state."""
    return written == now or (written["zero_stage"] == 0 and written | {"ranks": now["ranks"]} == now)


def names_in_order(engine: Any) -> list[str]:
    """The parameters' names as the optimizer numbers them, at stage 0."""
    if engine.zero_optimization_stage():
        return []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [names[id(parameter)] for parameter in in_order(engine.optimizer)[0]]


def in_order(optimizer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """At stage 0: the model's parameters as the optimizer numbers them, those that it updates, and PyTorch's optimizer.

    In 16 bits DeepSpeed puts a wrapper round that one, which holds the weights in fp32.
    """
    if hasattr(optimizer, "fp32_groups"):
        return [*chain(*optimizer.fp16_groups)], [*chain(*optimizer.fp32_groups)], optimizer.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return parameters, parameters, optimizer


def load(engine: Any, path: Path, state: dict[str, Any]) -> None:
    """Load what another layout wrote. The universal form is made once, by rank 0, and kept in the checkpoint."""
    universal = path / FOLDER
    written = state["layout"]
    mistakes = []
    if distributed.rank() == 0 and not universal.exists():
        temporary = path / f".{FOLDER}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            if written["zero_stage"] == 0:
                _spread(path, temporary, state["parameters"])
            else:
                _convert(path, temporary)
            shapes = {name: getattr(each, "ds_shape", each.shape) for name, each in engine.module.named_parameters()}
            _complete(temporary, shapes)
            temporary.rename(universal)
        except (OSError, RuntimeError) as error:
            mistakes.append(f"{path}: could not be brought from {describe(written)} to this run's: {error}")
    for mistake in distributed.union(mistakes):
        raise SharedError(mistake)
    if engine.zero_optimization_stage() == 0:
        _gather(engine, universal)
    else:
        _load_universal(engine, universal)


def _convert(path: Path, out: Path) -> None:
    """By DeepSpeed's own tool, in a process of its own: it prints, starts processes, and takes memory."""
    log.info("reshaping %s, once", path)
    arguments = ["--input_folder", str(path), "--output_folder", str(out), "--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1])


def _complete(universal: Path, shapes: dict[str, torch.Size]) -> None:
    """Add what DeepSpeed's tool leaves out and its loaders need, which differs between stages 1, 2 and 3."""
    path = universal / "zero" / "optimizer_state.pt"
    state = torch.load(path, map_location="cpu", weights_only=False)
    folders = [file.parent for file in (universal / "zero").glob("*/fp32.pt")]
    written = next((folder / "step.pt" for folder in folders if (folder / "step.pt").exists()), None)
    if written is not None:
        step = torch.load(written, weights_only=True)
    else:
        step = state["optimizer_state_dict"]["state"][0]["step"]
    for folder in folders:
        torch.save(step, folder / "step.pt")
        for file in folder.glob("*.pt") if folder.name in shapes else ():  # not of blocks that are cut off
            values = torch.load(file, map_location="cpu", weights_only=True)
            if file.stem != "step" and torch.is_tensor(values):  # from stage 3: bare, and flat
                torch.save({"param": values.view(shapes[folder.name])}, file)
    groups = (state if "param_groups" in state else state["optimizer_state_dict"])["param_groups"]
    kept = {name: state[name] for name in ("loss_scaler", "dynamic_loss_scale", "overflow") if name in state}
    kept |= {"ds_version": importlib.metadata.version("deepspeed"), "param_groups": groups}
    kept |= {"optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups}}
    torch.save(kept, path)


def _load_universal(engine: Any, universal: Path) -> None:
    optimizer = engine.optimizer
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    sharded_weights = engine.zero_optimization_partition_weights()
    if sharded_weights:
        optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict(state_dict_list=None, checkpoint_folder=str(universal), load_optimizer_states=True)
    if sharded_weights:
        optimizer.checkpoint_event_epilogue()
        for state in optimizer.optimizer.state.values():  # it shares one counter, which each group would then advance
            state["step"] = copy.deepcopy(state["step"])
    else:
        optimizer.update_lp_params()
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group |= values  # ZeRO-3 gives every group the first one's weight decay


def _spread(path: Path, out: Path, names: list[str]) -> None:
    """What a process holds at stage 0, in the universal format, which DeepSpeed makes from stage 1 on only."""
    state = torch.load(path / MODEL_FILE, map_location="cpu", weights_only=False)
    optimizer = state["optimizer"]
    if "fp32_groups" in optimizer:
        weights = [*chain(*optimizer["fp32_groups"])]
        optimizer = optimizer["optimizer_state_dict"]
    else:
        weights = [state["module"][name] for name in names]
    for number, (name, weight) in enumerate(zip(names, weights, strict=True)):
        folder = out / "zero" / name
        folder.mkdir(parents=True)
        for key, value in ({"fp32": weight.detach()} | optimizer["state"][number]).items():
            torch.save(value if key == "step" else {"param": value}, folder / f"{key}.pt")
    torch.save({"optimizer_state_dict": optimizer}, out / "zero" / "optimizer_state.pt")


def _gather(engine: Any, universal: Path) -> None:
    """The universal format into a process at stage 0. The loss scale of fp16 begins anew."""
    parameters, updated, optimizer = in_order(engine.optimizer)
    for name, parameter, master in zip(names_in_order(engine), parameters, updated, strict=True):
        values = {
            file.stem: torch.load(file, map_location="cpu", weights_only=True)
            for file in (universal / "zero" / name).glob("*.pt")
        }
        weight = values.pop("fp32")["param"].view_as(parameter)
        with torch.no_grad():
            parameter.copy_(weight)
            master.copy_(weight)
        optimizer.state[master] = {
            key: value if key == "step" else value["param"].view_as(parameter).to(parameter.device)
            for key, value in values.items()
        }
