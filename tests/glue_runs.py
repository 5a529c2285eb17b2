"""GLUE files as the benchmark has them, of made sentences; shards of them, an encoder, and runs that fine-tune it."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acn_scale.cli import load_config
from acn_scale.config import BertConfig
from acn_scale.convert.export import write_export
from acn_scale.convert.network import Card, Network
from acn_scale.data.encoders import read_tokenizer
from acn_scale.data.make_glue import make_glue_shards
from acn_scale.data.make_text import train_source_tokenizer
from acn_scale.data.text_sources import TextSources
from acn_scale.distributed import local_device
from acn_scale.downstream.source import completed
from acn_scale.downstream.tasks import evaluate_task
from acn_scale.errors import RunFailed, UserError
from acn_scale.models import build_model
from acn_scale.pretrain import train
from acn_scale.runs import run_folder

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/glue/paper.toml"
WORDS = ["for", "in", "is", "the", "not", "a", "class", "def", "return", "object", "none", "value", "names", "of"]


def sentence(random: np.random.Generator, most: int = 12) -> str:
    return " ".join(random.choice(WORDS, random.integers(1, most)))


def write(path: Path, rows: Sequence[Sequence[Any]], mark: str = "") -> None:
    """A "\\udcff" in a row becomes the byte 0xff, which is no UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = mark + "".join("\t".join(map(str, row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def hugging_face(folder: Path, tasks: dict[str, dict[str, list[tuple]]], classes: Sequence[str] = ()) -> Path:
    """A folder that `datasets` opens, with a config for each task: pairs and labels, numbers of `classes` if any."""
    import datasets

    configs = []
    for task, splits in tasks.items():
        files = []
        (folder / task).mkdir(parents=True)
        for split, rows in splits.items():
            columns = zip(("sentence1", "sentence2", "label"), map(list, zip(*rows, strict=True)), strict=True)
            table = datasets.Dataset.from_dict(dict(columns))
            if classes:
                table = table.cast_column("label", datasets.ClassLabel(names=list(classes)))
            table.to_parquet(folder / task / f"{split}.parquet")
            files.append(f"{{split: {split}, path: {task}/{split}.parquet}}")
        configs.append(f"- config_name: {task}\n  data_files: [{', '.join(files)}]\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return folder


@pytest.fixture(scope="session")
def glue_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks in the official layout, of few rows; 53 of them in each evaluation set."""
    folder, random = tmp_path_factory.mktemp("glue_data"), np.random.default_rng(0)
    for split, count in (("train", 150), ("dev", 53)):
        texts = [sentence(random) for _ in range(count)]
        write(folder / "CoLA" / f"{split}.tsv", [("gj04", int("not" in text), "", text) for text in texts])
        pairs = [(sentence(random), sentence(random)) for _ in range(count)]
        rows = [(int(len(one) > len(two)), 1, 2, one, two) for one, two in pairs]
        write(
            folder / "MRPC" / f"{split}.tsv", [("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), *rows], "\ufeff"
        )
        rows = [(place, one, two, f"{min(5, len(one) / 12):.3f}") for place, (one, two) in enumerate(pairs)]
        write(folder / "STS-B" / f"{split}.tsv", [("index", "sentence1", "sentence2", "score"), *rows])
        labels = [("entailment", "neutral", "contradiction")[len(one) % 3] for one, _ in pairs]
        rows = [(place, one, two, label) for place, ((one, two), label) in enumerate(zip(pairs, labels, strict=True))]
        name = "train" if split == "train" else "dev_matched"
        write(folder / "MNLI" / f"{name}.tsv", [("index", "sentence1", "sentence2", "gold_label"), *rows])
    pairs = [(sentence(random), sentence(random)) for _ in range(17)]
    tests = [(place, *pair) for place, pair in enumerate(pairs)]
    write(folder / "STS-B/test.tsv", [("index", "sentence1", "sentence2"), *tests])
    write(folder / "MNLI/test_matched.tsv", [("index", "sentence1", "sentence2"), *tests])
    write(folder / "diagnostic/diagnostic.tsv", [("index", "sentence1", "sentence2"), *tests])
    return folder


@pytest.fixture(scope="session")
def glue_shards(glue_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    make_glue_shards(f"tsv:{glue_files}", ["cola", "mrpc", "stsb", "mnli", "ax"], folder)
    return folder


@pytest.fixture(scope="session")
def glue_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a masked language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    train_source_tokenizer(TextSources(["pydoc"]), 300, folder / "tokenizer")
    torch.manual_seed(0)
    cfg = BertConfig(name="bert", connectivity="acn", vocab_size=300, max_tokens=40, depth=2, dim=16, num_heads=2)
    model = build_model(cfg).eval().requires_grad_(False)
    (folder / "export").mkdir()
    tokenizer = read_tokenizer(folder / "tokenizer")
    write_export(Network(model, Card(model=cfg, source="here", full_depth=2), tokenizer), folder / "export", "fp32")
    return folder / "export"


def fine_tuning(tmp_path: Path, encoder: Path, shards: Path, task: str, *overrides: str) -> Any:
    values = [f"run.dir={tmp_path}", f"run.name={task}", f"train.init_from={encoder}", "optim.lr=3e-3"]
    values += [f"data.{split}={shards / task / split}" for split in ("train", "eval")]
    return load_config(RECIPE, [*values, "train.length=1ep", "train.global_batch_size=16", *overrides], completed)


def fine_tune(cfg: Any) -> None:
    """On every rank."""
    device = local_device()
    assert train(cfg, device)
    evaluate_task(run_folder(cfg), device)


def train_only(cfg: Any) -> None:
    """On every rank."""
    assert train(cfg, local_device())


def evaluated(folder: Path, data: str | None = None, out: Path | None = None) -> None:
    """On every rank."""
    evaluate_task(folder, local_device(), data=data, out=out)


def complaint(source: Path, data: str | None = None) -> str:
    with pytest.raises((UserError, RunFailed)) as error:
        evaluate_task(source, local_device(), data=data)
    return str(error.value)


def written(path: Path) -> dict[str, np.ndarray]:
    with path.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
