"""Configs and the command line: strict, typed, and every mistake in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from pydantic import ValidationError

from acn_scale import pretrain
from acn_scale.cli import config_from_args, load_config
from acn_scale.config import Config, Section
from acn_scale.durations import Horizon
from acn_scale.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = """
[run]
name = "tiny"
[model]
name = "vit"
connectivity = "acn"
depth = 2
dim = 16
num_heads = 2
image_size = 8
patch_size = 4
num_classes = 10
[data]
kind = "images"
train = "train"
eval = "eval"
[optim]
lr = 3e-4
[train]
length = "2ep"
global_batch_size = 12
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_overrides_are_toml_values_or_bare_strings(tiny: Path) -> None:
    cfg = load_config(
        tiny, ["optim.lr=1e-2", "run.name=a/b", 'run.dir="x"', "model.recompute=true", "data.mean=[1,2,3]"]
    )
    assert (cfg.optim.lr, cfg.run.name, cfg.run.dir, cfg.model.recompute) == (0.01, "a/b", "x", True)
    assert cfg.data.mean == [1, 2, 3]


def test_base_is_inherited_once(tiny: Path) -> None:
    child, grandchild = tiny.with_name("child.toml"), tiny.with_name("grandchild.toml")
    child.write_text('base = "tiny.toml"\n[model]\nconnectivity = "residual"\n')
    cfg = load_config(child, ["model.depth=5"])
    assert (cfg.model.connectivity, cfg.model.depth, cfg.model.dim) == ("residual", 5, 16)
    grandchild.write_text('base = "child.toml"\n')
    with pytest.raises(UserError, match="only one is followed"):
        load_config(grandchild)


def test_size_of_a_vit(tiny: Path) -> None:
    tiny.write_text(TINY.replace("depth = 2\ndim = 16\nnum_heads = 2", 'size = "S"'))
    cfg = load_config(tiny, ["model.depth=3"])
    assert (cfg.model.dim, cfg.model.depth, cfg.model.num_heads) == (384, 3, 6)


def test_the_launchers_own_argument_is_ignored(tiny: Path) -> None:
    args = ["--config", str(tiny), "run.seed=3"]
    for place in range(len(args) + 1):
        for own in ("--local_rank=1", "--local-rank=0"):
            assert config_from_args([*args[:place], own, *args[place:]], "p").run.seed == 3
    with pytest.raises(UserError, match=r"^usage: p --config FILE.toml \[key.sub=value ...\]; --help"):
        config_from_args(args[1:], "p")


def test_nothing_is_said_in_one_way(tiny: Path) -> None:
    """A ramp of no epochs is none: the micro batch is not an eighth."""
    for nothing in ("0ep", "0run", "0.0step", "00step"):
        cfg = load_config(tiny, [f"train.batch_ramp={nothing}", f"train.anneal={nothing}"])
        assert (cfg.train.batch_ramp, cfg.train.anneal) == ("0step", "0step")


MISTAKES = {
    "eval.every=0step": "eval.every = '0step': above 0; '1run' is at the end alone",
    "checkpoint.keep_every=0ep": "checkpoint.keep_every = '0ep': above 0",
    "optim.lrr=1": "optim.lrr: no such key; the nearest is optim.lr",
    "optim.lr=x": "optim.lr = 'x': input should be a valid number",
    "optim.lr=nan": "optim.lr = nan: input should be a finite number",
    "optim.lr=-1": "optim.lr = -1: input should be greater than 0",
    "optim.lr=true": "optim.lr = True: input should be a valid number",
    'optim.lr="3"': "optim.lr = '3': input should be a valid number",
    "train.global_batch_size=1.5": "train.global_batch_size = 1.5: input should be a valid integer",
    "train.length=4": "train.length = 4: input should be a valid string",
    "train.length=4days": "train.length = '4days': a number and a unit: '90ep'",
    "model.name=resnet": "model.name = 'resnet': must be one of 'vit', 'mixer', 'bert'",
    "model.wrapper=true": "model.wrapper: not a key of model.name = vit",
    "data.mask_ratio=0.3": "data.mask_ratio: not a key of data.kind = images",
    "optimizer.lr=1": "optimizer: no such key",
    "optim.lr=1\nfoo = 2": "optim.lr = '1\\nfoo = 2': input should be a valid number",
    "optim.betas=[1.5, 0.9]": "optim.betas.0 = 1.5: input should be less than 1",
    "train.length=1run": "train.length = '1run': the length of the run itself: '90ep'",
    "run.seed=18446744073709551616": "run.seed = 18446744073709551616: ",
    "run.dir=": "run.dir = '': string should have at least 1 character",
    "model.channels=2": "model.channels = 2: input should be 1 or 3",
    "model.mlp_ratio=0.001": "model: mlp_ratio = 0.001: leaves the MLP of dim = 16 no hidden width",
    "data.x=" + "[" * 5000: "data.x: no such key",
    "model.connectivity=acm": "model.connectivity = 'acm': input should be 'feedforward', 'residual', 'acn'",
    "model.size=XL": "model.size = 'XL': input should be 'Ti', 'S', 'B' or 'L'",
    "model.patch_size=3": "model: patch_size = 3 must divide image_size = 8",
    "model.num_heads=3": "model: num_heads = 3 must divide dim = 16",
    "model.drop_path=0.1": "model: drop_path = 0.1: with connectivity = acn, inner = auto nothing is carried past",
    "model.inner=h_acn": "model: connectivity = acn, inner = h_acn: h_acn is a connectivity with inner = through",
    "data.kind=text": "data.kind = text: model.name = vit takes images",
    "data.std=[1.0]": "data.std = [1.0]: model.channels = 3 takes as many numbers",
    "model=3": "model = 3: must be a table, [model]",
    "run.name=../up": "run.name = '../up': string should match pattern",
    "=3": "'=3': an override is key.sub=value",
    "train.length": "'train.length': an override is key.sub=value",
    "a..b=1": "a: no such key",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_in_one_line(tiny: Path, override: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(tiny, [override])
    assert str(raised.value).startswith(f"{tiny}: " * ("an override" not in MISTAKES[override]) + MISTAKES[override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run = [", "not TOML: "),
        (b"\xff\xfe", "not TOML: "),
        (None, "No such file or directory"),
        (TINY.replace("[optim]\nlr = 3e-4", "").encode(), "optim: missing; it has no default"),
        (b'base = "absent.toml"', "absent.toml: No such file or directory"),
        (b"x = " + b"[" * 5000, "not TOML: "),
        (b'base = "a\\u0000b"', "not TOML: "),
        (b"base = 3", "base = 3: must be the path of another TOML file"),
        (TINY.replace('name = "vit"', "").encode(), "model: missing 'name', which says what kind it is"),
    ],
)
def test_files_that_are_no_configs(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "broken.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert str(raised.value).startswith(str(tmp_path))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_batches_that_do_not_divide(vit: Callable[..., Config]) -> None:
    assert vit().micro_batch_size(4) == 4
    assert vit(train={"micro_batch_size": 2}).micro_batch_size(4) == 2
    with pytest.raises(UserError, match=r"^train.global_batch_size = 16: must be a multiple of 3 "):
        vit().micro_batch_size(3)
    with pytest.raises(UserError, match=r"^train.micro_batch_size = 3: must divide a rank's share of 8"):
        vit(train={"micro_batch_size": 3}).micro_batch_size(2)
    with pytest.raises(UserError, match=r"^train.global_batch_size = 16: must be a multiple of 32 .*, and pairs"):
        vit(data={"mixup": 0.1}).micro_batch_size(16)
    with pytest.raises(UserError, match=r"^train.micro_batch_size = 1: .* and be even, since Mixup"):
        vit(data={"cutmix": 0.5}, train={"micro_batch_size": 1}).micro_batch_size(2)


def test_mistakes_leave_nothing_behind(tiny: Path) -> None:
    """Exit code 2, one line, no folder: for a bad key, and for shards that are not there."""
    for override, line in (("optim.lrr=1", "optim.lrr: no such key"), ("run.name=x", "train/index.json: No such file")):
        done = forked.command(pretrain.__file__, "--config", tiny.name, override, cwd=tiny.parent)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert line in done.stderr
        assert done.stderr.count("\n") == 1
        assert [path.name for path in tiny.parent.iterdir()] == [tiny.name]


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """Of the first rank; the process ends by the signal."""
    os.mkfifo(tmp_path / "names")  # the tool stands still where it reads them
    command = [sys.executable, ROOT / "tools/index_shards.py", tmp_path, "--classes", tmp_path / "names"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background ignores it
    ranks = [
        subprocess.Popen(command, env=os.environ | {"RANK": rank}, stderr=subprocess.PIPE, text=True, **heard)
        for rank in "01"
    ]
    with (tmp_path / "names").open("w"):
        for rank in ranks:
            while str(tmp_path / "names") not in open_files(rank.pid):
                assert rank.poll() is None
                time.sleep(0.05)
            rank.send_signal(signal.SIGINT)
        ends = [(rank.communicate(timeout=60)[1], rank.returncode) for rank in ranks]
    assert ends == [("\ninterrupted\n", -signal.SIGINT), ("", -signal.SIGINT)]


def test_the_first_rank_warns_for_all() -> None:
    code = "import logging; from acn_scale.cli import exit_on_user_error; "
    code += "exit_on_user_error(lambda: logging.getLogger('acn_scale.data').warning('said'))"
    said = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"RANK": rank}, capture_output=True, text=True)
        for rank in "01"
    ]
    assert [each.stderr for each in said] == ["said\n", ""]


def open_files(pid: int) -> list[str]:
    return [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]


def test_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    def keys(section: type[Section], prefix: str) -> typing.Iterator[str]:
        for name, field in section.model_fields.items():
            inner = [
                kind for kind in (field.annotation, *typing.get_args(field.annotation)) if hasattr(kind, "model_fields")
            ]
            for kind in inner:
                yield from keys(kind, f"{prefix}{name}.")
            if not inner:
                default = "required" if field.is_required() else f"default {field.default!r}"
                yield f"{prefix}{name} {default})\n      {field.description}"

    with pytest.raises(SystemExit, match=r"^0$"):
        config_from_args(["--config", "absent.toml", "--help"], "p")
    entries = re.split(r"\n  (?! )", capsys.readouterr().out.split("\n\nDurations")[0])[1:]
    assert {re.sub(r"  \(.*; ", " ", entry) for entry in entries} == set(keys(Config, ""))


def test_horizon() -> None:
    horizon = Horizon.of("3ep", samples_per_epoch=1000, global_batch_size=64)
    assert horizon.steps == 47  # 46.875
    assert [horizon.count(duration) for duration in ("1ep", "0.5run", "7step", "0.1ep")] == [16, 24, 7, 2]
    assert Horizon.of("0.04ep", 1000, 64).steps == 1  # 0.625
    for length in ("0.01ep", "0step"):
        with pytest.raises(UserError, match=rf"^train.length = {length}: less than one step"):
            Horizon.of(length, 1000, 64)


def test_resolved_config_reads_back_and_is_frozen(tiny: Path) -> None:
    cfg = load_config(tiny)
    assert Config.model_validate(json.loads(json.dumps(cfg.model_dump(mode="json")))) == cfg
    for section, key in ((cfg.run, "seed"), (cfg, "run")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)
