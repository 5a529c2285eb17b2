"""The whole way as one submission, each stage a job that waits for those before: python launchers/chain.py --config
configs/chain/quickstart_bert.toml

A stage is a tool, or a run in training. What is done is not done again: the same command goes on after a stage that
failed. --dry-run shows the stages and what is left; --cluster local runs them here, one after the other.
"""

import argparse
import hashlib
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import job
import submission
from pydantic import Field, ValidationError, model_validator

from acn_scale.checkpoint import complete
from acn_scale.cli import exit_on_user_error, load_config
from acn_scale.config import Config, Section
from acn_scale.errors import UserError
from acn_scale.runs import check_run_folder, read_json, run_folder

ROOT = Path(__file__).parents[1]


class Stage(Section):
    """Either a tool with arguments, or a config with overrides. {NAME} in them is the folder of the run of a stage."""

    name: str = Field(pattern=r"^\w+$")
    tool: str | None = None  # a file in tools/ or launchers/, without .py
    arguments: list[str] = Field([])
    config: str | None = None
    overrides: list[str] = Field([])
    after: list[str] | None = None  # default: the stage before

    @model_validator(mode="after")
    def _one_of_two(self) -> "Stage":
        if (self.tool is None) == (self.config is None):
            raise ValueError("must have either tool or config")
        if self.tool and program(self.tool) is None:
            raise ValueError(f"tool = {self.tool}: no such file in tools/ or launchers/")
        return self


class Chain(Section):
    name: str = Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")
    dir: str = "runs"
    stage: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Chain":
        names: list[str] = []
        for stage in self.stage:
            if unknown := [name for name in stage.after or [] if name not in names]:
                raise ValueError(f"stage {stage.name}: after = {unknown[0]}: must be a stage above it")
            if stage.name in names:
                raise ValueError(f"stage {stage.name}: there are two of this name")
            names.append(stage.name)
        return self

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


def program(tool: str) -> str | None:
    """Where a tool lies in the repository; None where there is none."""
    found = [f"{part}/{tool}.py" for part in ("tools", "launchers") if (ROOT / part / f"{tool}.py").is_file()]
    return found[0] if found and "/" not in tool else None


def read_chain(path: Path) -> Chain:
    """Raises UserError for a file that is no chain."""
    try:
        return Chain.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise UserError(f"{path}: not TOML: {error}") from None


class Step:
    """A stage with all that it takes: what to run, and how to tell that it is done."""

    def __init__(self, chain: Chain, stage: Stage, before: "dict[str, Step]") -> None:
        runs = {name: run_folder(step.cfg) for name, step in before.items() if step.cfg is not None}

        def filled(text: str) -> str:
            for name, folder in runs.items():
                text = text.replace(f"{{{name}}}", str(folder))
            return text

        self.stage, self.cfg = stage, None
        self.command: list[str] = []
        if stage.config:
            self.cfg: Config | None = load_config(Path(stage.config), [filled(each) for each in stage.overrides])
        else:
            self.command = [program(stage.tool), *map(filled, stage.arguments)]
        self.waits_for = list(before)[-1:] if stage.after is None else stage.after
        # What is done is done anew where a stage that it waits for is another one now.
        parts = [
            self.command,
            self.cfg and self.cfg.model_dump_json(),
            *(before[name].digest for name in self.waits_for),
        ]
        self.digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
        self.marker = (chain.folder / "done" / f"{stage.name}-{self.digest}").resolve()

    def done(self) -> bool:
        if self.cfg is None:
            return self.marker.exists()
        folder = run_folder(self.cfg)
        checkpoints = complete(folder)
        return (
            bool(checkpoints) and checkpoints[-1].name == f"step_{read_json(folder / 'environment.json')['steps']:08d}"
        )

    def describe(self) -> str:
        return " ".join(self.command) if self.cfg is None else f"{self.stage.config}: {run_folder(self.cfg)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of the chain, such as those in "
        "configs/chain")  # fmt: skip
    submission.add_options(parser)
    args = parser.parse_args(arguments)
    if args.cluster == "debug":
        raise UserError("--cluster debug: is for one run; --cluster local runs a chain here")
    chain = read_chain(args.config)
    steps: dict[str, Step] = {}
    for stage in chain.stage:
        steps[stage.name] = Step(chain, stage, steps)
    for step in steps.values():
        if step.cfg is not None:
            check_run_folder(step.cfg)
            step.cfg.micro_batch_size(args.nodes * submission.tasks_per_node(args))
    if args.dry_run:
        for name, step in steps.items():
            print(f"{name:<12} {'done' if step.done() else 'to do':<6} {step.describe()}")
        return
    (chain.folder / "done").mkdir(parents=True, exist_ok=True)
    if args.cluster == "local":
        run_here(args, chain, list(steps.values()))
    else:
        submit(args, chain, list(steps.values()))


def run_here(args: argparse.Namespace, chain: Chain, steps: Sequence[Step]) -> None:
    """One stage after the other. Raises SystemExit with the code of the first one that fails."""
    snapshot = submission.prepare(chain.folder, chain)
    for number, step in enumerate(steps, 1):
        print(f"stage {number} of {len(steps)}, {step.stage.name}: {'done' if step.done() else step.describe()}",
              file=sys.stderr)  # fmt: skip
        if step.done():
            continue
        if step.cfg is None:
            job.run_tool([f"{snapshot}/{step.command[0]}", *step.command[1:]], str(step.marker), str(snapshot))
        elif code := submission.run_here(args, submission.prepare(run_folder(step.cfg), step.cfg)):
            raise SystemExit(code)


def submit(args: argparse.Namespace, chain: Chain, steps: Sequence[Step]) -> None:
    """Each stage that is left as a job; one whose stage before fails is taken out of the queue."""
    args.extra = [*args.extra, "kill-on-invalid-dep=yes"]
    snapshot = submission.prepare(chain.folder, chain)
    jobs: dict[str, list[str]] = {}
    for step in steps:
        after = [each for name in step.waits_for for each in jobs[name]]
        name = f"{chain.name.replace('/', '_')}_{step.stage.name}"
        if step.done():
            jobs[step.stage.name] = []
        elif step.cfg is None:
            command = [f"{snapshot}/{step.command[0]}", *step.command[1:]]
            jobs[step.stage.name] = [submission.submit_tool(args, name, snapshot, command, step.marker, after)]
        else:
            run = submission.prepare(run_folder(step.cfg), step.cfg)
            jobs[step.stage.name] = submission.submit(args, name, [run], after=after)
        state = f"job {jobs[step.stage.name][0]}" if jobs[step.stage.name] else "done"
        print(f"{step.stage.name}: {state}{f', after {chr(44).join(after)}' if after else ''}")


if __name__ == "__main__":
    exit_on_user_error(main)
