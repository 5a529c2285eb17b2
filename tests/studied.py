"""Small studies, and run folders as studies leave them."""

import json
from collections.abc import Mapping
from pathlib import Path

from acn_scale.config import Config
from acn_scale.runs import run_folder
from acn_scale.studies import depth
from acn_scale.studies.study import CONFIGS, Findings, Runs, Setting, Study, Trial, per_cent

SMALL = ["train.length=6step", "model.depth=2", "model.dim=16", "model.num_heads=2", "eval.every=3step"]


def setting(folder: Path, *seeds: int, scale: str = "laptop") -> Setting:
    return Setting(scale=scale, seeds=list(seeds), data="digits", folder=folder / "runs" / "study")


def note(cfg: Config) -> None:
    (run_folder(cfg) / "noted").write_text("")


def study(*extra: str) -> Study:
    """Twins of 6 steps on four digits, 20 images each; `extra` overrides keys of the second one."""

    def trials(_: Setting) -> list[Trial]:
        selection = {"first_classes": 4, "per_class": 20}
        return [
            Trial(
                name, CONFIGS / "studies/vit.toml", [*SMALL, f"model.connectivity={name}", *more], "images", selection
            )
            for name, more in (("acn", ()), ("residual", extra))
        ]

    def findings(runs: Mapping[str, Runs], _: Setting) -> Findings:
        rows = [[name, per_cent([curve[-1] for curve in each.accuracy])] for name, each in runs.items()]
        return Findings([["network", "accuracy"], *rows], depth.curves(runs), ["a sentence"])

    return Study("twins", trials, findings, note, "not*")


def config_of(trial: Trial, here: Setting) -> Config:
    return trial.config_of(0, here, [])


def written(here: Setting, name: str, *runs: list[dict[str, float]], train: Path = Path("shards")) -> Runs:
    """Runs as they are on the disk, of these lines of metrics."""
    configs = []
    for seed, lines in zip(here.seeds, runs, strict=True):
        trial = Trial(name, CONFIGS / "studies/mixer.toml", [f"data.train={train}"])
        configs.append(trial.config_of(seed, here, []))
        folder = run_folder(configs[-1])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(configs[-1].model_dump_json())
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Runs(configs)


def read_out(curve: list[float]) -> list[dict[str, float]]:
    """The lines of a run that was evaluated once."""
    depths = {f"eval/depth_{depth:02d}/accuracy": value for depth, value in enumerate(curve)}
    return [{"step": 1, "eval/loss": 1.0, "eval/accuracy": curve[-1], "depth/blocks": len(curve) - 1} | depths]
