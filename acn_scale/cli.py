"""Command line and TOML file -> Config; a user's mistake -> one line and exit code 2."""

import argparse
import difflib
import json
import logging
import math
import os
import signal
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from acn_scale.config import Config, Section
from acn_scale.durations import Length
from acn_scale.errors import RunFailed, SharedError, UserError

USAGE = "usage: {program} --config FILE.toml [key.sub=value ...]"


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes one line on standard error and exit code 2, Ctrl-C one line.

    Until the run's log is open all ranks make the same checks, and rank 0 speaks for all.
    """
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if not first:
        logging.lastResort = logging.NullHandler()  # which warnings go to while there is no log
    try:
        main()
    except UserError as error:
        alike = isinstance(error, SharedError) or not logging.getLogger("acn_scale").handlers
        if first or not alike:
            print(f"error: {error}", file=sys.stderr)
        _exit(2)
    except RunFailed as error:  # on all ranks alike, and in the run's log
        if first:
            print(f"error: {error}", file=sys.stderr)
        _exit(1)
    except KeyboardInterrupt:  # the process still ends by the signal: a shell's loop would go on with the next one
        sys.excepthook = lambda *_: print("\ninterrupted", file=sys.stderr) if first else None
        raise


def _exit(code: int) -> NoReturn:
    """Slurm sends SIGTERM to the ranks that are slower than the first one; the code of all shall be this one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


TEXT_SOURCES = """sources:
  text:GLOB       plain text, also .gz: a blank line ends a document; or WikiExtractor's <doc> blocks
  jsonl:GLOB      a JSON object a line, also .gz
  parquet:GLOB    Parquet files
  hf:NAME[:CONFIG]  a data set of the Hugging Face hub (hf:wikipedia, hf:bookcorpus, ...), or a local folder
  pydoc           the topics of Python's language reference"""


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that tell where text comes from."""
    parser = argparse.ArgumentParser(
        description=description, epilog=TEXT_SOURCES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    several = {"nargs": "+", "action": "extend"}  # given again, an option adds to what it had
    add("--source", required=True, **several, help="where the text comes from, one or several: see below")
    add("--weights", type=float, **several, help="mix the sources by these shares of characters, until one of them has "
        "no more (default: all of each)")  # fmt: skip
    add("--column", default="text", help="of the text in JSONL, Parquet and Hugging Face rows (default: text)")
    add("--streaming", action="store_true", help="hf: read from the hub without a copy on disk")
    add("--eval-share", type=share, help="share of the documents held out for evaluation, drawn by their hash "
        "(default: 0.01, or what the tokenizer was trained with)")  # fmt: skip
    add("--dry-run", action="store_true", help="look at the first documents and say what there is")
    add("--out", required=True, type=Path, help="folder to write to")
    return parser


def number(kind: type, fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """For argparse: an int or a float that `fits`; `what` says which do."""

    def read(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {what}")
        return value

    read.__name__ = "whole number" if kind is int else "number"  # what argparse calls it for a text that is none
    return read


positive = number(int, lambda value: value >= 1, "1 or more")
not_negative = number(int, lambda value: value >= 0, "0 or more")
positive_number = number(float, lambda value: 0 < value < math.inf, "above 0")
points = number(float, lambda value: 0 <= value <= 100, "from 0 to 100")  # of accuracy
share = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")


def length(text: str) -> str:
    """Epochs or steps, for argparse."""
    try:
        return TypeAdapter(Length).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text}: must be like 2ep (epochs) or 500step") from None


def config_from_args(
    args: Sequence[str], program: str, complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Config:
    """The run that a command line asks for. `complete` adds what it leaves to be found out.

    Raises UserError for anything in it that is not valid.
    """
    if "--help" in args or "-h" in args:
        print(USAGE.format(program=program), help_text(), sep="\n\n")
        sys.exit(0)
    args = [arg for arg in args if not arg.startswith(("--local_rank=", "--local-rank="))]  # a launcher's own
    if len(args) < 2 or args[0] != "--config":
        raise UserError(USAGE.format(program=program) + "; --help lists the keys")
    return load_config(Path(args[1]), args[2:], complete)


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Config:
    """Read a TOML file, or a run's config.json, after the file that its `base` names, and apply overrides such as
    "optim.lr=3e-4".
    """
    values = read_values(path)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"{override!r}: an override is key.sub=value")
        values = _merge(values, _nested(key.split("."), _parse(text)))
    try:
        return Config.model_validate(complete(values))
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def read_values(path: Path) -> dict[str, Any]:
    """What a file says, after the file that its `base` names."""
    values = _read(path)
    base = values.pop("base", None)
    return values if base is None else _merge(_read_base(path, base), values)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None


def _read_base(path: Path, base: object) -> dict[str, Any]:
    if not isinstance(base, str):
        raise UserError(f"{path}: base = {base!r}: must be the path of another TOML file, relative to this one")
    values = _read(path.parent / base)
    if "base" in values:
        raise UserError(f"{path}: base = {base!r}: that file has a base of its own, and only one is followed")
    return values


def _parse(text: str) -> Any:
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text  # a bare string, as in run.name=first_try
    return values["value"] if len(values) == 1 else text


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both_tables = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both_tables else value
    return merged


def _explain(error: ValidationError) -> str:
    """One mistake in one line: key, value, what would be valid. A misspelt key comes before what is missing for it."""
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    location = [str(part).replace("\n", "\\n") for part in first["loc"]]
    kind = location.pop(1) if len(location) > 1 and location[0] in ("model", "data") else None
    key, given, details = ".".join(location), first["input"], first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            return _explain_unknown(key, kind)
        case "missing":
            return f"{key}: missing; it has no default"
        case "union_tag_not_found":
            return f"{key}: missing {details['discriminator']}, which says what kind it is"
        case "union_tag_invalid":
            name = details["discriminator"].strip("'")
            return f"{key}.{name} = {details['tag']!r}: must be one of {details['expected_tags']}"
        case "model_type" | "model_attributes_type":
            return f"{key} = {given!r}: must be a table, [{key}]"
    if not isinstance(given, dict | BaseModel):
        key = f"{key} = {given!r}"
    message = first["msg"].removeprefix("Value error, ")
    return (f"{key}: " if key else "") + message[0].lower() + message[1:]


def _explain_unknown(key: str, kind: str | None) -> str:
    if key in dict(_fields()):
        section = key.split(".")[0]
        return f"{key}: not a key of {section}.{'name' if section == 'model' else 'kind'} = {kind}"
    nearest = difflib.get_close_matches(key, [name for name, _ in _fields(kind=kind)], n=1, cutoff=0.5)
    return f"{key}: no such key" + (f"; the nearest is {nearest[0]}" if nearest else "; --help lists all")


def help_text() -> str:
    """Every key with its type, default and meaning, made from the schema."""
    lines = []
    for key, field in _fields():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {key}  ({_type_name(field.annotation)}; {default})\n      {field.description}")
    return (
        "Keys (a TOML table per first part; the same key can stand under several kinds of model or data):\n"
        + "\n".join(dict.fromkeys(lines))
        + "\n\nDurations are a number and a unit: 90ep (epochs), 5000step (optimizer steps), 0.06run (of the run)."
        + '\nA file may take over another one with base = "other.toml".'
    )


def _fields(
    section: type[BaseModel] = Config, prefix: str = "", kind: str | None = None
) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of all kinds of model and data, or, where `kind` names one of them, of that one."""
    for name, field in section.model_fields.items():
        options = [each for each in (field.annotation, *typing.get_args(field.annotation)) if _is_section(each)]
        for option in [each for each in options if kind in _tags(each)] or options:
            yield from _fields(option, f"{prefix}{name}.", kind)
        if not options:
            yield f"{prefix}{name}", field


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    """The values of `name` or `kind` that choose this section among others."""
    tags = [field for name, field in section.model_fields.items() if name in ("name", "kind")]
    return typing.get_args(tags[0].annotation) if tags else ()


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    options = typing.get_args(annotation)
    if options and typing.get_origin(annotation) is not list:
        return " | ".join(_type_name(option) for option in options)
    return getattr(annotation, "__name__", str(annotation)).replace("NoneType", "none")
