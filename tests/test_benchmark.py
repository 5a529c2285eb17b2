"""The benchmark: its arithmetic, its turns, that both sides of a row do the same work; memory that is kept."""

import contextlib
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import bert, mixer, network, vit
from side import side
from test_models import batch_for

from acn_scale.benchmark import work
from acn_scale.benchmark.finetuning import pydoc_sentences
from acn_scale.benchmark.groups import Inputs, measure
from acn_scale.benchmark.inference import inference_rows
from acn_scale.benchmark.rows import in_turns, row, save, table
from acn_scale.benchmark.sides import Side
from acn_scale.benchmark.trainer import sentences
from acn_scale.benchmark.work import write_peer
from acn_scale.convert import TARGETS, read_model
from acn_scale.convert.timm_models import load_timm
from acn_scale.data import build_stream
from acn_scale.data.make_glue import write_split
from acn_scale.data.make_text import train_source_tokenizer
from acn_scale.data.text_sources import TextSources
from acn_scale.data.tokenizer import TOKENIZER_NAME
from acn_scale.engine import keep_freed_memory
from acn_scale.errors import UserError
from acn_scale.models import build_model

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
    """An epoch has the same token ids with the same labels, whatever batches they come in."""
    train_source_tokenizer(TextSources(["pydoc"]), 300, tmp_path / "tokenizer")
    model = bert(num_classes=2, vocab_size=300, max_tokens=16)
    net = network(model, (tmp_path / "tokenizer" / TOKENIZER_NAME).read_bytes())
    peer = tmp_path / "peer"
    peer.mkdir()
    TARGETS["hf"](net, peer, "fp32")
    rows = pydoc_sentences(24)
    info = {"task": "sst2", "split": "train", "classes": ["0", "1"]}
    for split in ("train", "eval"):
        write_split(tmp_path / split, rows, info)
    cfg = work.config(model, tmp_path, tmp_path, HERE, batch=4, tokenizer=str(peer))
    with contextlib.closing(build_stream(cfg)) as stream:
        batches = [next(stream) for _ in range(6)]
    ours = [
        (tokens[: int(mask.sum())].tolist(), int(label))
        for batch in batches
        for tokens, mask, label in zip(batch["tokens"], batch["mask"], batch["labels"], strict=True)
    ]
    theirs = [(row["input_ids"], row["labels"]) for row in sentences(tmp_path / "train", peer, model.max_tokens).rows]
    assert sorted(ours) == sorted(theirs)
    assert len({len(ids) for ids, _ in theirs}) > 3 and {label for _, label in theirs} == {0, 1}


def test_what_a_group_lacks_is_said_before_it_is_measured(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    nothing = Inputs(None, None, None, (tmp_path, tmp_path), None, False)
    for group, mistake, message in (
        ("data", {"mosaicml": tmp_path / "python"}, "--mosaicml .*python: No such file"),
        ("data", {"mosaicml": Path("/bin/false")}, "--mosaicml /bin/false: cannot import streaming"),
        ("loop", {"glue": tmp_path / "nowhere"}, "nowhere/SST-2: no such folder"),
        ("loop", {"glue": tmp_path}, "--glue .*: has no SST-2/train.tsv"),
        ("inference", {"runs": (tmp_path / "a", tmp_path / "b")}, "a: no such run"),
    ):
        with pytest.raises(UserError, match=message):
            next(measure([group], replace(nothing, **mistake), rounds=1, threads=None))


def test_inference_is_of_the_smallest_cut_that_is_as_good(twins: list[Path]) -> None:
    """Of a network beside itself: at its full depth, at its own cut-off, and read out at every depth."""
    accuracy = read_model(twins[0]).card.accuracy
    depth = len(accuracy) - 1
    cut = next(k for k, each in enumerate(accuracy) if each >= accuracy[-1] - 0.005 - 1e-9)
    rows = inference_rows(twins[0], twins[0], rounds=1)
    sizes = [f"{blocks} of {depth} blocks, {100 * accuracy[blocks]:.1f} %" for blocks in (cut, depth)]
    assert [each.work for each in rows[:2]] == [f"inference at equal accuracy: {sizes[0]}"] * 2
    assert [each.peer for each in rows[:2]] == [f"twin: {sizes[1]}", f"twin at its own cut-off: {sizes[0]}"]
    assert [each.peer for each in rows[2:]] == [f"{depth + 1} evaluations", "one evaluation"]
    assert all(each.ours > 0 and each.theirs > 0 for each in rows)


def test_freed_memory_is_kept() -> None:
    """Once a loop has had its tensors a few times, the kernel need clear no more pages for them."""
    keep_freed_memory()

    def faults(rounds: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            torch.ones(2**24) + 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(5)
    pages = 2 * 2**24 * 4 / 4096  # of a round
    assert faults(5) < pages / 2
