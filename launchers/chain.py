"""The whole way as one submission, each stage a job that waits for those before: python launchers/chain.py --config
configs/chain/quickstart_bert.toml

A stage is a tool, or a run in training; tools that evaluate have a process a GPU too, on one machine. What is done is
not done again: the same command goes on after a stage that failed. It is done anew where a stage that it waits for is
another one now. The code and all TOML files that stages take are copied: what is edited later does not reach a queued
job. --dry-run shows the stages, what is left and what each waits for; --cluster local runs them here, one after the
other.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import glue
import job
import local
import submission
from chain_file import Chain, Stage, program, read_chain
from cluster_options import add_options, tasks_per_node
from snapshots import snapshot_path, take_snapshot

from acn_scale.checkpoint import trained
from acn_scale.cli import exit_on_user_error, load_config, read_values
from acn_scale.config import Config
from acn_scale.errors import UserError
from acn_scale.runs import check_run_folder, run_folder
from acn_scale.stopping import EXIT_STOPPED

Where = Mapping[str, argparse.Namespace]  # the options of each stage
SNAPSHOT = "{snapshot}"  # in a command, for the folder that is not known yet
OUTPUTS = ("out", "csv", "json", "export", "submission")  # options of tools, which name what they write


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
        self.files: dict[str, bytes] = {}  # TOML files of the command, by their names in the snapshot
        self.outputs: list[Path] = []  # that the command names
        self.on_ranks = False  # whether a launcher may start the tool as several processes
        if stage.config:
            self.cfg: Config | None = load_config(Path(stage.config), [filled(each) for each in stage.overrides])
        else:
            arguments = [filled(each) for each in stage.arguments]
            if stage.tool == "glue" and not any(each.startswith("--config") for each in arguments):
                arguments += ["--config", str(glue.RECIPE)]
            parsed = stage.read(arguments)
            if stage.tool == "glue":
                try:
                    glue.check_keys(parsed)
                except UserError as error:
                    raise UserError(f"stage {stage.name}: {error}") from None
            options = vars(parsed)
            self.on_ranks = "local_rank" in options
            self.outputs = [options[name] for name in OUTPUTS if isinstance(options.get(name), Path)]
            self.command = [f"{SNAPSHOT}/{program(stage.tool)}", *map(self._copied, arguments)]
        self.waits_for = list(before)[-1:] if stage.after is None else stage.after
        self.before = [before[name] for name in self.waits_for]
        # What is done is done anew where a stage that it waits for is another one now.
        given = [step.digest for step in self.before]
        self.digest = _digest([self.command, self.files, self.cfg and self.cfg.model_dump_json(), *given])
        # Of a run, what its config may not change is checked with its folder; the marker says what it began from.
        self.marker = (
            chain.folder / "done" / f"{stage.name}-{self.digest if self.cfg is None else _digest(given)}"
        ).resolve()

    def done(self) -> bool:
        if self.cfg is None:
            whole = not self.stage.even_after_failure or all(step.done() for step in self.before)
            return whole and self.marker.exists() and all(path.exists() for path in self.outputs)
        return trained(self.cfg)

    def _copied(self, argument: str) -> str:
        """With a TOML file, alone or behind a =, as it will be in the snapshot."""
        option, sign, path = argument.rpartition("=")
        if not (path.endswith(".toml") and Path(path).is_file()):
            return argument
        name = f"configs/{self.stage.name}_{len(self.files)}.json"
        self.files[name] = json.dumps(read_values(Path(path)), indent=1).encode()
        return f"{option}{sign}{SNAPSHOT}/{name}"

    def other_beginnings(self) -> list[Path]:
        """Markers which say that the run of this stage began from other stages than those that it waits for now."""
        folder = run_folder(self.cfg).resolve()
        markers = [path for path in self.marker.parent.glob(f"{self.stage.name}-*") if path != self.marker]
        return [path for path in markers if path.read_text() == f"{folder}\n"]

    def check(self, ranks: int) -> None:
        """Raises UserError for a run that cannot begin or go on."""
        folder = run_folder(self.cfg)
        check_run_folder(self.cfg)
        self.cfg.micro_batch_size(ranks)
        others = self.other_beginnings()
        if others and (folder / "config.json").exists():
            raise UserError(
                f"stage {self.stage.name}: {folder} began after other stages than {', '.join(self.waits_for)} as they "
                f"are now; remove or rename it to have it trained anew, or remove {others[0]} to keep it"
            )

    def begin(self) -> None:
        """Note what a run begins from; of a tool, that it is not done."""
        if self.cfg is None:
            self.marker.unlink(missing_ok=True)
            return
        for path in self.other_beginnings():
            path.unlink()
        self.marker.write_text(f"{run_folder(self.cfg).resolve()}\n")

    def processes(self, args: argparse.Namespace) -> int:
        """That a tool is started as."""
        return tasks_per_node(args) if self.on_ranks else 1

    def run(self, snapshot: Path) -> list[str]:
        """The command of a tool, in the snapshot."""
        return [each.replace(SNAPSHOT, str(snapshot)) for each in self.command]

    def describe(self) -> str:
        command = " ".join(self.command).replace(f"{SNAPSHOT}/", "")
        return command if self.cfg is None else f"{self.stage.config}: {run_folder(self.cfg)}"

    def dependency(self) -> str:
        """As Slurm calls it, with stages in the place of jobs; empty where it waits for none."""
        kind = "afterany" if self.stage.even_after_failure else "afterok"
        return f"{kind}:{':'.join(self.waits_for)}" if self.waits_for else ""


def steps_of(chain: Chain) -> list[Step]:
    """Its stages, in their order. Raises UserError for a config that is not valid."""
    steps: dict[str, Step] = {}
    for stage in chain.stage:
        steps[stage.name] = Step(chain, stage, steps)
    return list(steps.values())


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of the chain, such as those in "
        "configs/chain")  # fmt: skip
    add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.cluster == "debug":
        raise UserError("--cluster debug: is for one run; --cluster local runs a chain here")
    chain = read_chain(args.config)
    steps = steps_of(chain)
    where = {step.stage.name: step.stage.over(args) for step in steps}
    for step in steps:
        if step.cfg is not None:
            own = where[step.stage.name]
            step.check(own.nodes * tasks_per_node(own))
    if args.dry_run:
        for step in steps:
            waits = f"  ({step.dependency()})" if step.waits_for else ""
            print(f"{step.stage.name:<12} {'done' if step.done() else 'to do':<6} {step.describe()}{waits}")
        return
    left = [step for step in steps if not step.done()]
    if args.cluster == "slurm":
        for step in left:
            own, name = where[step.stage.name], job_name(chain, step)
            if step.cfg is None:
                submission.check_tool(own, name, chain.folder)
            else:
                path = snapshot_path(run_folder(step.cfg), step.cfg)
                submission.check_with_slurm(submission.sbatch_file(own, name, [path]))
    (chain.folder / "done").mkdir(parents=True, exist_ok=True)
    files = {name: content for step in steps for name, content in step.files.items()}
    snapshot = take_snapshot(chain.folder, chain, files)
    for step in steps:
        if step in left or step.cfg is not None:
            step.begin()
    if args.cluster == "local":
        run_here(where, snapshot, steps, left)
    else:
        submit(where, chain, snapshot, steps, left)


def job_name(chain: Chain, step: Step) -> str:
    return f"{chain.name.replace('/', '_')}_{step.stage.name}"


def run_here(where: Where, snapshot: Path, steps: Sequence[Step], left: Sequence[Step]) -> None:
    """One stage after the other. After one that fails, only those that begin even then, where all that they wait for
    has ended. Raises SystemExit with the code of the one that failed.
    """
    codes: dict[str, int] = {}  # of the stages that have ended
    for number, step in enumerate(steps, 1):
        failed = any(codes.values())
        ended = all(name in codes for name in step.waits_for)
        if step in left and failed and not (step.stage.even_after_failure and ended):
            continue
        name = step.stage.name
        print(f"stage {number} of {len(steps)}, {name}: {step.describe() if step in left else 'done'}",
              file=sys.stderr)  # fmt: skip
        codes[name] = _run(where[name], snapshot, step) if step in left else 0
        if codes[name] == EXIT_STOPPED:
            break
    raise SystemExit(next(filter(None, codes.values()), 0))


def _run(args: argparse.Namespace, snapshot: Path, step: Step) -> int:
    """The stage's exit code."""
    if step.cfg is not None:
        return local.run_here(args, take_snapshot(run_folder(step.cfg), step.cfg))
    try:
        job.run_tool(step.run(snapshot), str(step.marker), str(snapshot), step.processes(args))
    except SystemExit as error:
        return error.code
    return 0


def submit(where: Where, chain: Chain, snapshot: Path, steps: Sequence[Step], left: Sequence[Step]) -> None:
    """Each stage that is left as a job. Where a stage before fails, it is taken out of the queue, or begins even so."""
    jobs: dict[str, list[str]] = {}
    for step in steps:
        args = where[step.stage.name]
        args.extra = [*args.extra, "kill-on-invalid-dep=yes"]
        after = [each for name in step.waits_for for each in jobs[name]]
        name = job_name(chain, step)
        if step not in left:
            jobs[step.stage.name] = []
        elif step.cfg is None:
            how = {"processes": step.processes(args), "anyway": step.stage.even_after_failure}
            jobs[step.stage.name] = [
                submission.submit_tool(args, name, snapshot, step.run(snapshot), step.marker, after, **how)
            ]
        else:
            run = take_snapshot(run_folder(step.cfg), step.cfg)
            jobs[step.stage.name] = submission.submit(args, name, [run], after=after)
        state = f"job {jobs[step.stage.name][0]}" if jobs[step.stage.name] else "done"
        print(f"{step.stage.name}: {state}{f', after {chr(44).join(after)}' if after else ''}")


if __name__ == "__main__":
    exit_on_user_error(main)
