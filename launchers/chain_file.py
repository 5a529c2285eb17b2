"""The TOML file of a chain: its stages, each a tool with its arguments or a run with its config, and their order."""

import argparse
import io
import re
import runpy
import tomllib
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

from cluster_options import add_options
from pydantic import Field, ValidationError, model_validator

from acn_scale.config import Section
from acn_scale.errors import UserError

ROOT = Path(__file__).parents[1]


class Options(argparse.ArgumentParser):
    """Where to run a stage. Raises ValueError for what is no option."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"options: {message}")


OPTIONS = Options(add_help=False, allow_abbrev=False)
add_options(OPTIONS)


class Stage(Section):
    """Either a tool with arguments, or a config with overrides. {NAME} in them is the folder of the run of a stage."""

    name: str = Field(pattern=r"^\w+$")
    tool: str | None = None  # a file in tools/ or launchers/, without .py
    arguments: list[str] = Field([])
    config: str | None = None
    overrides: list[str] = Field([])
    after: list[str] | None = None  # default: the stage before
    options: list[str] = Field([])  # where to run it, in place of what the command line says
    even_after_failure: bool = False  # a tool that begins once those before have ended, well or not

    @model_validator(mode="after")
    def _can_be_run(self) -> "Stage":
        if (self.tool is None) == (self.config is None):
            raise ValueError("must have either tool or config")
        if self.tool and program(self.tool) is None:
            raise ValueError(f"tool = {self.tool}: no such file in tools/ or launchers/")
        if self.tool:
            self.read(self.arguments)
        if self.even_after_failure and self.config:
            raise ValueError("even_after_failure = true: must be a stage with a tool")
        self.over(argparse.Namespace())
        for option in ("--cluster", "--dry-run"):
            if any(each.partition("=")[0] == option for each in self.options):
                raise ValueError(f"options: {option} is of the whole chain")
        return self

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """What its tool makes of these. Raises ValueError where it does not take them."""
        parse = runpy.run_path(str(ROOT / program(self.tool))).get("parse")
        if parse is None:
            raise ValueError(f"tool = {self.tool}: is no tool, but a part of others")
        said = io.StringIO()
        try:
            with redirect_stdout(said), redirect_stderr(said):
                return parse(arguments)
        except SystemExit:  # after the usage, in the last line, what is wrong
            mistake = said.getvalue().rpartition(": error: ")[2].strip()
            raise ValueError(f"arguments of {self.name}: {mistake}") from None

    def over(self, args: argparse.Namespace) -> argparse.Namespace:
        """The options of the command line, with the stage's in their place."""
        return OPTIONS.parse_args(self.options, argparse.Namespace(**vars(args)))


class Chain(Section):
    name: str = Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")
    dir: str = "runs"
    stage: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Chain":
        names: list[str] = []
        runs: list[str] = []
        for stage in self.stage:
            for name in re.findall(r"\{([a-zA-Z_]\w*)\}", " ".join([*stage.arguments, *stage.overrides])):
                if name not in runs:
                    raise ValueError(f"stage {stage.name}: {{{name}}}: must be a stage above it that has a config")
            if unknown := [name for name in stage.after or [] if name not in names]:
                raise ValueError(f"stage {stage.name}: after = {unknown[0]}: must be a stage above it")
            if stage.name in names:
                raise ValueError(f"stage {stage.name}: there are two of this name")
            names.append(stage.name)
            runs += [stage.name] if stage.config else []
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
        parts = [str(path), place, first["msg"].removeprefix("Value error, ")]
        raise UserError(": ".join(filter(None, parts))) from None
    except ValueError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
