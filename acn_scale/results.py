"""What evaluations found: one format for all, eval/<task>.json in the folder of a run or an export."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acn_scale.data.shards import INDEX_NAME
from acn_scale.errors import UserError
from acn_scale.runs import read_json, write_json

LOWER_IS_BETTER = ("mCE",)  # among metrics that are shares
NOT_SHARES = ("loss",)


class Measurement(BaseModel):
    """One number. Further keys of a file are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    task: str  # what was evaluated on, such as "sst2" or "imagenet+gaussian_0.2"
    metric: str
    value: float
    interval: list[float] | None = Field(None, min_length=2, max_length=2)  # at 95 %, over the samples
    samples: int | None = None
    depth: int | None = None  # blocks that were read out; None: all of them
    checkpoint: str | None = None  # Network.digest() of what was evaluated
    seed: int | None = None  # of the run
    mean_of: int | None = None  # runs, where it is a mean over them
    note: str | None = None  # what one should know to judge it


def write_measurements(folder: Path, task: str, measurements: Sequence[Measurement]) -> Path:
    """To <folder>/eval/<task>.json, in place of what it held. Raises UserError."""
    path = folder / "eval" / f"{task}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [each.model_dump(mode="json") for each in measurements])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return path


def read_measurements(folder: Path, *, means: bool = False) -> list[Measurement]:
    """Of all tasks; with the `means` over runs that a table has left there, or without. Raises UserError for files of
    another form.
    """
    paths = [path for path in sorted((folder / "eval").glob("*.json")) if path.name != INDEX_NAME]
    return [line for path in paths for line in _read(path) if means or line.mean_of is None]


def _read(path: Path) -> list[Measurement]:
    """Of one file: an object or a list of them."""
    values = read_json(path)
    try:
        return [Measurement.model_validate(each) for each in (values if isinstance(values, list) else [values])]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
