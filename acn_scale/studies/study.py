"""What a study is: runs that differ in one thing, and what is read off them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from matplotlib.figure import Figure

from acn_scale.cli import load_config
from acn_scale.config import Config, Section
from acn_scale.data.image_sources import open_images
from acn_scale.data.shards import ShardIndex
from acn_scale.depth import cutoff
from acn_scale.downstream.source import completed
from acn_scale.errors import UserError
from acn_scale.runs import read_metrics, read_result, run_folder

CONFIGS = Path(__file__).parents[2] / "configs"
TOLERANCE = 0.5  # points that the cut-off may lose
TWINS = {"acn": "ac", "residual": "residual"}  # with what the names of their configs begin with
AUTHORS = ("model.wrapper=true", "model.pool=cls", "model.init=torch")  # of a Mixer, as configs/mixer/authors_* have it


class Setting(Section):
    """How a study is run. `data`: "digits", or a source of images such as cifar:FOLDER."""

    scale: Literal["laptop", "paper"]
    seeds: Sequence[int]
    data: str
    folder: Path  # of all its runs and its report


@dataclass(frozen=True)
class Trial:
    """One variant of a study, over the seeds. `name` tells it among the others."""

    name: str
    config: Path
    overrides: Sequence[str] = ()
    data: Literal["images", "text"] | None = None  # that the study makes; None: what the config names
    # Of the images, as make_image_shards takes it; per_class is for training, eval_per_class for evaluation.
    selection: Mapping[str, int] = field(default_factory=dict)
    after: str | None = None  # the trial from whose run of the same seed it starts
    needed: bool = True  # False: the findings can do without it

    def config_of(self, seed: int, setting: Setting, data: Sequence[str]) -> Config:
        """`data`: overrides that say where the shards are and what images they hold.

        A config that names no model takes that of the run it starts from, which must then be finished.
        """
        run = [f'run.dir="{setting.folder}"', f'run.name="{self.name}/seed={seed}"', f"run.seed={seed}"]
        if self.after:
            run.append(f'train.init_from="{setting.folder}/{self.after}/seed={seed}"')
        return load_config(self.config, [*data, *self.overrides, *run], completed)


@dataclass(frozen=True)
class Findings:
    """What a study's report says. The first row of the table is its head."""

    table: Sequence[Sequence[str]]
    figure: Figure
    sentences: Sequence[str]


@dataclass(frozen=True)
class Study:
    """`trials` depends on the scale; `findings` gets the finished runs of each trial, by its name. One of which no run
    was finished is not there, where it is not needed.

    `measure`, where more is asked about a run than it has noted itself, is called in a worker once the run is trained,
    and ends with the file in the run's folder that the pattern `leaves` fits. A run without it is not finished.
    """

    what: str
    trials: Callable[[Setting], Sequence[Trial]]
    findings: Callable[[Mapping[str, "Runs"], Setting], Findings]
    measure: Callable[[Config], None] | None = None
    leaves: str = ""


@dataclass(frozen=True)
class Runs:
    """The finished runs of one trial, a seed each, by their order."""

    configs: Sequence[Config]

    @property
    def seeds(self) -> list[int]:
        return [cfg.run.seed for cfg in self.configs]

    @property
    def accuracy(self) -> list[list[float]]:
        """0..1 at depth 0, 1, ... of the last evaluation, for each seed."""
        return [read_result(run_folder(cfg)).accuracy for cfg in self.configs]

    @property
    def mean_accuracy(self) -> list[float]:
        return [fmean(column) for column in zip(*self.accuracy, strict=True)]

    @property
    def cutoffs(self) -> list[int]:
        return [cutoff(curve, TOLERANCE) for curve in self.accuracy]

    def series(self, metric: str) -> list[list[float]]:
        """All values of a metric in each run, by step."""
        return [[line[metric] for line in read_metrics(run_folder(cfg)) if metric in line] for cfg in self.configs]

    def last(self, metric: str) -> list[float]:
        """The last value of a metric in each run; for speeds and memory, see metrics.jsonl."""
        return [values[-1] for values in self.series(metric)]

    def curves(self, metric: str) -> list[list[tuple[float, float]]]:
        """(epochs, value) of each line of metrics that has it, for each run."""
        found = []
        for cfg in self.configs:
            steps = ShardIndex.load(cfg.data.train, cfg.data.remote).num_samples / cfg.train.global_batch_size
            lines = read_metrics(run_folder(cfg))
            found.append([(line["step"] / steps, line[metric]) for line in lines if metric in line])
        return found


def check_classes(data: str, least: int, why: str) -> int:
    """How many classes the images have. Raises UserError for fewer than `least`."""
    classes = len(open_images(data, "train").classes)
    if classes < least:
        raise UserError(f"--data {data}: {classes} classes: must be {least} or more, {why}")
    return classes


def common_seeds(*runs: Runs) -> set[int]:
    """Those that are finished in all of them."""
    return set.intersection(*(set(each.seeds) for each in runs))


def paired(*runs: Runs) -> list[Runs]:
    """Of their common seeds. Raises UserError where there is none."""
    seeds = common_seeds(*runs)
    if not seeds:
        raise UserError(f"{', '.join(each.configs[0].run.name for each in runs)}: no seed is finished in all of them")
    return [Runs([cfg for cfg in each.configs if cfg.run.seed in seeds]) for each in runs]


def step_seconds(cfg: Config) -> dict[int, float]:
    """Of an optimizer step of a run, by the number of blocks that were trained: in its fastest stretch between two
    lines of metrics.jsonl, since what else the machine does makes steps slower, and never faster.
    """
    found: dict[int, float] = {}
    blocks = cfg.model.depth
    for line in reversed(read_metrics(run_folder(cfg))):
        blocks = line.get("depth/blocks", blocks)  # an evaluation comes after the steps, and before blocks are cut off
        if speed := line.get("speed/samples_per_second"):
            found[blocks] = min(cfg.train.global_batch_size / speed, found.get(blocks, math.inf))
    return found


def compared(acn: Runs, twin: Runs, the: str = "The") -> str:
    """Of their cut-offs seed by seed, and of their accuracies."""
    acn, twin = paired(acn, twin)
    pairs = list(zip(acn.cutoffs, twin.cutoffs, strict=True))
    below = sum(one < other for one, other in pairs)
    gap = 100 * (acn.mean_accuracy[-1] - twin.mean_accuracy[-1])
    return (
        f"{the} ACN's cut-off is below its twin's on {below} of {len(pairs)} seeds; its accuracy at full depth is "
        f"{difference(gap)}."
    )


def difference(points: float, more: str = "higher", less: str = "lower") -> str:
    """1.2 -> "1.2 points higher"."""
    return f"{abs(points):.1f} points {more if points >= 0 else less}"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and deviation where there are several."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def per_cent(values: Sequence[float]) -> str:
    return spread([100 * value for value in values])
