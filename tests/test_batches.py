"""A batch that is built again alone is the batch that the run had."""

from collections.abc import Callable
from pathlib import Path

import pytest
from made import numbered_images
from PIL import Image

from acn_scale.batches import inspect_batch
from acn_scale.config import Config
from acn_scale.data import build_stream
from acn_scale.data.make_text import make_text_shards, train_source_tokenizer
from acn_scale.data.text_sources import TextSources
from acn_scale.errors import UserError
from acn_scale.runs import run_folder, write_json


def run_of(cfg: Config) -> Path:
    """The folder of a run that has begun."""
    folder = run_folder(cfg)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", cfg.model_dump(mode="json"))
    return folder


def table(said: str) -> list[list[str]]:
    return [line.split() for line in said.split("\n\n")[0].splitlines()[1:]]


def test_the_table_names_the_samples_of_the_step(vit: Callable[..., Config], tmp_path: Path) -> None:
    """The grey of each image is its number, so that the batch itself tells which samples it has."""
    folder = numbered_images(tmp_path / "data", [30, 20])
    cfg = vit(data={"train": str(folder), "eval": str(folder), "shuffle_window": 8}, train={"global_batch_size": 16})
    run = run_of(cfg)
    stream = build_stream(cfg, rank=0, world_size=1)
    batches = [next(stream) for _ in range(5)]
    decoder = stream.samples.decoder
    for step in (1, 4, 5):
        rows = table(inspect_batch(run, step))
        greys = decoder.pixels(batches[step - 1]["images"])[:, 0, 0, 0].tolist()
        assert [int(row[2]) for row in rows] == greys
        assert [int(row[1]) for row in rows] == [position // 50 for position in range(16 * step - 16, 16 * step)]
        assert all(int(row[5]) == int(row[2]) for row in rows), "its key in the tar"
    assert Image.open(run / "report" / "batch_00000004.png").width == 1280


def test_stand_ins_and_pairs_are_shown(vit: Callable[..., Config], tmp_path: Path) -> None:
    folder = numbered_images(tmp_path / "data", [30, 20])
    (folder / "shard-000001.tar").unlink()
    data = {"train": str(folder), "eval": str(folder), "on_bad_sample": "skip", "mixup": 0.8}
    said = inspect_batch(run_of(vit(data=data)), 1, out=tmp_path / "sheet.png", most=3)
    assert len(table(said)) == 4, "whole pairs"
    assert (tmp_path / "sheet.png").exists()
    said = inspect_batch(run_of(vit(data=data, run={"name": "all"})), 1)
    assert "stands in for " in said
    assert "shard-000001.tar: sample" in said


def test_masks_are_marked(tmp_path: Path) -> None:
    sources = TextSources(["pydoc"])
    train_source_tokenizer(sources, 512, tmp_path / "tokenizer", eval_share=0.1)
    make_text_shards(sources, tmp_path / "tokenizer", tmp_path, tokens=32)
    config = tmp_path / "run.toml"
    config.write_text(
        f"""run.name = "text"
        optim.lr = 1e-3
        [model]
        name = "bert"
        connectivity = "acn"
        vocab_size = 512
        max_tokens = 32
        depth = 1
        dim = 8
        num_heads = 1
        [data]
        kind = "text"
        train = "{tmp_path}/train"
        eval = "{tmp_path}/eval"
        [train]
        length = "10step"
        global_batch_size = 8
        """
    )
    said = inspect_batch(config, 2, overrides=["data.whole_words=true"], out=tmp_path / "batch.txt")
    lines = (tmp_path / "batch.txt").read_text().split("\n\n")
    assert [line.split(":")[0] for line in lines] == [f"sample {row[2]}" for row in table(said)]
    assert all(line.count(" -> ") == 5 for line in lines)
    (tmp_path / "train" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer.model: .*make_text_shards.py writes it"):
        inspect_batch(config, 2)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        inspect_batch(tmp_path, 1)
    with pytest.raises(UserError, match="No such file"):
        inspect_batch(tmp_path / "none.toml", 1)
