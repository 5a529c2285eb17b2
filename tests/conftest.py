"""What the tests share: ranks, and the configs and shards of tiny runs."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpus  # noqa: F401 before what could look for them
import numpy as np
import pytest
import torch
from glue_runs import glue_encoder, glue_files, glue_shards  # noqa: F401 fixtures
from ranks import Ranks

from acn_scale.config import Config
from acn_scale.convert import convert
from acn_scale.convert.export import write_export
from acn_scale.convert.network import Network
from acn_scale.data.make_images import make_image_shards

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First of all the longest, which mostly waits."""
    items.sort(key=lambda item: item.path.name != "test_slurm.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """No test over a set: its order differs between the processes that share the tests, which then run none of them."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if any(isinstance(value, set | frozenset) for value in (*mark.args, *mark.kwargs.values())):
            raise TypeError(f"{metafunc.definition.nodeid} is parametrized with a set: sort it")


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train and eval shards of real images: 1,400 in 28 uneven-sized shards, and 397."""
    folder = tmp_path_factory.mktemp("digits")
    make_image_shards("digits", "train", folder / "train", shard_size=51)
    make_image_shards("digits", "eval", folder / "eval", shard_size=100)
    return folder


@pytest.fixture(scope="session")
def twins(one_rank: Ranks, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders of an ACN and its residual twin, trained for a second each."""
    from networks import small  # here: what pytest rewrites must not be imported before
    from test_pretrain import run

    folder = tmp_path_factory.mktemp("twins")
    data = [f"data.train={digits}/train", f"data.eval={digits}/eval"]
    for config in ("ac_vit.toml", "residual_vit.toml"):
        one_rank(run, small(config, folder, Path(config).stem, *data))
    return [folder / "runs" / name for name in ("ac_vit", "residual_vit")]


@pytest.fixture
def vit(digits: Path, tmp_path: Path) -> Callable[..., Config]:
    """Builds the config of a tiny run on digits; keywords replace whole keys: vit(train={"zero_stage": 3})."""

    def build(**sections: dict[str, Any]) -> Config:
        values: dict[str, dict[str, Any]] = {
            "run": {"name": "tiny", "dir": str(tmp_path / "runs")},
            "model": {"name": "vit", "connectivity": "acn", "depth": 3, "dim": 16, "num_heads": 2, "image_size": 8}
            | {"patch_size": 4, "channels": 1, "num_classes": 10},
            "data": {"kind": "images", "train": f"{digits}/train", "eval": f"{digits}/eval", "streams": 4},
            "optim": {"lr": 1e-3, "warmup": "5step"},
            "train": {"length": "20step", "global_batch_size": 16, "clip_norm": 1.0, "log_every": "5step"},
            "early_exit": {},
            "eval": {"every": "10step"},
            "checkpoint": {"every": "5step"},
            "health": {},
            "depth": {},
            "prune": {},
            "continual": {},
            "profile": {},
        }
        return Config.model_validate({name: values.get(name, {}) | sections.get(name, {}) for name in values})

    return build


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """Converts a network by way of the library's own function, to a new folder."""

    def export(net: Network, to: str, **keys: Any) -> Path:
        source, out = tmp_path / f"source_{to}", tmp_path / f"{to}_{len(list(tmp_path.iterdir()))}"
        source.mkdir()
        write_export(net, source, "fp32")
        convert(str(source), to, out, **keys)
        shutil.rmtree(source)
        return out

    return export
