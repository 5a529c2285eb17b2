"""From a checkpoint to a network that others can use: read it, cut it, write it in the form they load."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from acn_scale.convert.export import write_export
from acn_scale.convert.hugging_face import write_hugging_face
from acn_scale.convert.network import Network
from acn_scale.convert.programs import write_onnx, write_program
from acn_scale.convert.sources import read_model
from acn_scale.convert.timm_models import write_timm
from acn_scale.files import new_folder

TARGETS: dict[str, Callable[[Network, Path, str], None]] = {
    "safetensors": write_export,
    "hf": write_hugging_face,
    "timm": write_timm,
    "onnx": write_onnx,
    "export": write_program,
}


def convert(
    source: str,
    to: str,
    out: Path,
    *,
    depth: int | None = None,
    tolerance: float | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    average: bool = False,
    replace: bool = False,
) -> str:
    """Write the network in `source` to the new folder `out`, in the form `to`, one of TARGETS; say what was done.

    `depth` cuts it there, `tolerance` at the cut-off. With `replace`, `out` can hold an earlier result, and nothing
    else. Raises UserError; `out` is then as it was.
    """
    with new_folder(out, replace=replace) as folder:
        net = read_model(source, average=average)
        if depth is not None:
            net = net.cut(depth)
        elif tolerance is not None:
            net = net.cut_within(tolerance)
        card = net.card.portable()
        TARGETS[to](dataclasses.replace(net, card=card), folder, dtype)
    parameters = sum(parameter.numel() for parameter in net.model.parameters())
    return (
        f"{out}: {card.model.name}, {card.model.connectivity}, {card.model.depth} of {card.full_depth} blocks, "
        f"{parameters:,} parameters in {dtype}, from {source}"
    )
