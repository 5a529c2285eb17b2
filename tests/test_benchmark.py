"""The benchmark: its arithmetic, its turns, that both sides of a row do the same work; memory that is kept."""

import contextlib
import json
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import bert, mixer, network, vit
from side import side, summed, threads, visible
from test_models import batch_for

from acn_scale import distributed
from acn_scale.benchmark import data, groups, inference, mosaicml, tars, work
from acn_scale.benchmark.data import photos
from acn_scale.benchmark.finetuning import pydoc_sentences
from acn_scale.benchmark.groups import Inputs, measure
from acn_scale.benchmark.inference import inference_rows
from acn_scale.benchmark.model import bare_step
from acn_scale.benchmark.rows import Row, in_turns, row, save, table
from acn_scale.benchmark.sides import Build, Side, environment
from acn_scale.benchmark.trainer import build_trainer, sentences
from acn_scale.benchmark.work import write_peer
from acn_scale.config import Config
from acn_scale.convert import TARGETS, read_model
from acn_scale.convert.timm_models import load_timm
from acn_scale.data import build_stream
from acn_scale.data.encoders import read_tokenizer
from acn_scale.data.make_glue import write_split
from acn_scale.data.make_text import train_source_tokenizer
from acn_scale.data.text_sources import TextSources
from acn_scale.engine import keep_freed_memory
from acn_scale.errors import UserError
from acn_scale.models import build_model

TOOL = Path(__file__).parents[1] / "tools/benchmark.py"
HERE = work.scale(torch.device("cpu"), compiled=False)


def test_a_ratio_is_of_figures_of_the_same_round(tmp_path: Path) -> None:
    """The machine slowed down after the first round, both sides alike."""
    made = row("work", "peer", "s", [1.0, 10.0, 10.0], [2.0, 30.0, 20.0], more_is_better=False, peaks=(1.0, 2.0))
    assert (made.ours, made.theirs, made.ratio, made.ratio_low, made.ratio_high) == (10.0, 20.0, 2.0, 2.0, 3.0)
    other = row("work", "peer", "images/s", [4.0], [2.0], more_is_better=True)
    assert other.ratio == 2.0
    save([made, other], tmp_path / "rows.json")
    first, second = map(json.loads, (tmp_path / "rows.json").read_text().splitlines())
    keys = ["work", "peer", "ours", "theirs", "unit", "ratio", "ratio_low", "ratio_high"]
    assert list(first)[: len(keys)] == keys and first["theirs_peak"] == 2.0 and second["theirs_peak"] is None
    assert "2.00 ... 3.00" in table([made, other]) and "MFU" not in table([made, other])


def test_sides_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Side(side, log, "a", 1, 3) as a, Side(side, log, "b", 300, 3) as b:
        figures = in_turns({"a": a.measure, "b": b.measure}, rounds=2)
        assert log.read_text() == "ababab"  # the first round warms up
        assert figures == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
        assert 200 < b.peak - a.peak < 400
        with pytest.raises(UserError, match="a: no more turns"):
            a.measure()
    assert log.read_text() == "ababab.", "that b has no more turns is no error"


def test_a_side_sees_as_many_gpus_as_it_has_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer that sees more takes them all, and as many batches."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [environment(ranks)["CUDA_VISIBLE_DEVICES"] for ranks in (1, 2)] == ["0", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with Side(visible) as side:
        assert side.measure() == 3.0


def test_the_ranks_of_a_side_work_together() -> None:
    with Side(summed, -1, ranks=2) as side:
        assert side.measure() == 3.0
    with pytest.raises(UserError, match="rank 1 does not want to"), Side(summed, 1, ranks=2) as side:
        side.measure()


def test_the_ranks_of_a_side_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for ranks, each in ((1, 2), (2, 1), (3, 1)):
        with Side(threads, ranks=ranks) as side:
            assert side.measure() == each


def test_a_peer_sums_gradients_over_the_ranks(two_ranks: Callable, tmp_path: Path) -> None:
    folder = write_peer("timm", vit(), tmp_path / "peer")
    cfg = work.config(vit(), tmp_path, tmp_path, HERE, batch=8)
    first, second = two_ranks(weights_of_peer, cfg, folder)
    assert first == second != load_timm(folder).patch_embed.proj.weight.tolist()


def weights_of_peer(cfg: Config, folder: Path) -> list[Any]:
    """Of its patch embedding, after steps on this rank's own images."""
    torch.manual_seed(distributed.rank())
    model, images = load_timm(folder), {"images": torch.rand(4, 3, 8, 8)}

    def loss(whole: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return whole(batch["images"]).square().mean()

    bare_step(model, loss, repeat(images), cfg, 2, torch.device("cpu"))()
    return model.patch_embed.proj.weight.tolist()


@pytest.mark.parametrize("cfg, to", [(bert(), "hf"), (vit(), "timm"), (mixer(), "timm")], ids=["bert", "vit", "mixer"])
def test_the_peer_is_the_network_that_we_start_from(cfg: Any, to: str, tmp_path: Path) -> None:
    """The same loss, and the same gradient of the weights next to the input, to 1e-5."""
    folder = write_peer(to, cfg, tmp_path / "peer")
    torch.manual_seed(0)
    ours = build_model(cfg)
    batch = batch_for(ours)
    ours(**batch)["loss"].backward()
    if to == "timm":
        theirs = load_timm(folder).train()
        torch.nn.functional.cross_entropy(theirs(batch["images"]), batch["labels"]).backward()
        gradients = (
            ours.embed.proj.weight.grad,
            (theirs.stem if cfg.name == "mixer" else theirs.patch_embed).proj.weight.grad,
        )
    else:
        from transformers import AutoModelForMaskedLM

        theirs = AutoModelForMaskedLM.from_pretrained(folder).train()
        labels = torch.full_like(batch["tokens"], -100).scatter(1, batch["masked"], batch["labels"])
        keys = {
            "input_ids": batch["tokens"],
            "token_type_ids": batch["segments"],
            "attention_mask": batch["mask"].long(),
        }
        theirs(**keys, labels=labels).loss.backward()
        gradients = ours.embed.token.weight.grad, theirs.bert.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert gradients[0].abs().max() > 1e-3
    work.compile_blocks(theirs)
    compiled = [module for module in theirs.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == cfg.depth and len({type(module) for module in compiled}) == 1


def test_both_fine_tune_on_the_same_sentences(tmp_path: Path) -> None:
    """An epoch has the same token ids with the same labels; the peer too puts like lengths into a batch."""
    train_source_tokenizer(TextSources(["pydoc"]), 300, tmp_path / "tokenizer")
    model = bert(num_classes=2, vocab_size=300, max_tokens=16)
    net = network(model, read_tokenizer(tmp_path / "tokenizer"))
    peer = tmp_path / "peer"
    peer.mkdir()
    TARGETS["hf"](net, peer, "fp32")
    rows = pydoc_sentences(96)
    info = {"task": "sst2", "split": "train", "classes": ["0", "1"]}
    for split in ("train", "eval"):
        write_split(tmp_path / split, rows, info)
    cfg = work.config(model, tmp_path, tmp_path, HERE, batch=4, tokenizer=str(peer))
    with contextlib.closing(build_stream(cfg)) as stream:
        batches = [next(stream) for _ in range(24)]
    ours = [
        (tokens[: int(mask.sum())].tolist(), int(label))
        for batch in batches
        for tokens, mask, label in zip(batch["tokens"], batch["mask"], batch["labels"], strict=True)
    ]
    theirs = [(row["input_ids"], row["labels"]) for row in sentences(tmp_path / "train", peer, model.max_tokens).rows]
    assert sorted(ours) == sorted(theirs)
    assert len({len(ids) for ids, _ in theirs}) > 3 and {label for _, label in theirs} == {0, 1}
    trainer = build_trainer(cfg, peer, tmp_path / "trainer")
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in trainer.get_train_dataloader())
    lengths = np.array([len(ids) for ids, _ in theirs]).reshape(-1, 4)  # in the order of the shards
    assert 0 < padding < (lengths.max(axis=1, keepdims=True) - lengths).sum() / 2


def test_what_a_group_lacks_is_said_before_it_is_measured(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    nothing = Inputs(None, None, None, (tmp_path, tmp_path), None, False, 1)
    for group, mistake, message in (
        ("data", {"mosaicml": tmp_path / "python"}, "--mosaicml .*python: No such file"),
        ("data", {"mosaicml": Path("/bin/false")}, "--mosaicml /bin/false: cannot import streaming"),
        ("loop", {"glue": tmp_path / "nowhere"}, "nowhere/SST-2: no such folder"),
        ("loop", {"glue": tmp_path}, "--glue .*: has no SST-2/train.tsv"),
        ("inference", {"runs": (tmp_path / "a", tmp_path / "b")}, "a: no such run"),
    ):
        with pytest.raises(UserError, match=message):
            next(measure([group], replace(nothing, **mistake), rounds=1, threads=None))


def test_what_is_measured_before_a_mistake_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of its group and of the others, whose turn comes all the same; then it ends the command."""

    def rows(group: str, *_: Any) -> Iterator[Row]:
        yield row(f"the work of {group}", "peer", "s", [1.0], [2.0], more_is_better=False)
        if group == "data":
            raise UserError("no more of this")

    monkeypatch.setattr(groups, "_rows", rows)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "all", "--json", str(tmp_path / "rows.json")])
    main = runpy.run_path(str(TOOL))["main"]
    monkeypatch.setitem(main.__globals__, "WHAT", ("data", "model"))
    with pytest.raises(UserError, match=r"^data: no more of this$"):
        main()
    written = [json.loads(line)["work"] for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert written == ["the work of data", "the work of model"]
    shown = capsys.readouterr().out
    assert all(work in shown for work in written)


class Here(contextlib.ExitStack):
    """A Side in this process, which has imported everything."""

    def __init__(self, build: Build, *args: Any) -> None:
        super().__init__()
        self.measure = self.enter_context(build(*args))
        self.peak = 1.0


def test_inference_is_of_the_smallest_cut_that_is_as_good(twins: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network beside itself: at its full depth, at its own cut-off, and read out at every depth."""
    monkeypatch.setattr(inference, "Side", Here)
    accuracy = read_model(twins[0]).card.accuracy
    depth = len(accuracy) - 1
    cut = next(k for k, each in enumerate(accuracy) if each >= accuracy[-1] - 0.005 - 1e-9)
    rows = list(inference_rows(twins[0], twins[0], rounds=1))
    sizes = [f"{blocks} of {depth} blocks, {100 * accuracy[blocks]:.1f} %" for blocks in (cut, depth)]
    assert [each.work for each in rows[:2]] == [f"inference at equal accuracy: {sizes[0]}"] * 2
    assert [each.peer for each in rows[:2]] == [f"twin: {sizes[1]}", f"twin at its own cut-off: {sizes[0]}"]
    assert [each.peer for each in rows[2:]] == [f"{depth + 1} evaluations", "one evaluation"]
    assert all(each.ours > 0 and each.theirs > 0 and each.ours_peak and each.theirs_peak for each in rows)


def test_an_acn_that_is_worse_than_its_twin_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says that it is, and how much."""
    scores = {Path("acn"): [0.1, 0.5, 0.9], Path("twin"): [0.1, 0.4, 0.95]}
    monkeypatch.setattr(inference, "_accuracy", scores.get)
    monkeypatch.setattr(inference, "beside", lambda work, sides, rounds: iter([(work, list(sides))]))
    work, sides = next(inference_rows(*scores, rounds=1))
    assert work == "inference more than 0.5 points below the twin: 2 of 2 blocks, 90.0 %"
    assert sides[1] == "twin: 2 of 2 blocks, 95.0 %"


def test_the_rows_of_data_have_speeds_and_peaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (photo,) = photos(tmp_path / "photos", 1).glob("*/*")
    for number in range(data.BATCH):
        shutil.copy(photo, photo.with_stem(f"copy_{number}"))
    for module, name, value in (
        *((module, "Side", Here) for module in (data, tars)),
        *((tars, name, 20) for name in ("RECORDS", "SHARDS", "SMALL_RECORDS")),
        (tars, "PLACE", 5 * tars.SMALL_BATCH),
    ):
        monkeypatch.setattr(module, name, value)
    rows = [*data.decoding(tmp_path / "photos", tmp_path / "decoding", 1), *tars.raw_reading(tmp_path / "raw", 1)]
    rows += tars.resuming(tmp_path / "resume", None, 1)
    peers = ["timm", "torchvision", "webdataset", "webdataset", "our fresh start", "webdataset, skipping"]
    assert [each.peer for each in rows] == peers
    assert all(each.ours > 0 and each.theirs > 0 and each.ours_peak and each.theirs_peak for each in rows)


def test_webdataset_is_measured_without_what_our_readers_import() -> None:
    """They would count to its peak."""
    script = "import sys, acn_scale.benchmark.tar_peer; print({'torchvision', 'acn_scale.data'} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"


def test_mosaicml_says_its_time_and_its_peak_among_other_things(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nwhile read line; do echo noise; echo '{mosaicml.MARK}1.5 200.0'; done")
    python.chmod(0o755)
    with tars.MosaicML(python, tmp_path) as side:
        assert (side.measure(), side.peak) == (1.5, 200.0)
    python.write_text("#!/bin/sh\nread line")
    with (
        pytest.raises(UserError, match=r"--mosaicml .*: its process has ended"),
        tars.MosaicML(python, tmp_path) as side,
    ):
        side.measure()


def test_freed_memory_is_kept() -> None:
    """Once a loop has had its tensors a few times, the kernel need clear no more pages for them."""
    keep_freed_memory()

    def faults(rounds: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            torch.ones(2**24) + 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = 2 * 2**24 * 4 / 4096  # of a round; five of them would clear five times as many
    assert min(faults(5) for _ in range(5)) < pages / 2  # a heap with holes may grow once more
