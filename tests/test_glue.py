"""GLUE: files in, shards, batches of like length, metrics as scikit-learn has them, the server's files out."""

import json
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import forked
import numpy as np
import pytest
import torch
from glue_runs import ROOT, WORDS, complaint, evaluated, fine_tune, fine_tuning, sentence, train_only, written
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import bert, network
from ranks import Ranks
from scipy import stats
from sklearn import metrics as sklearn_metrics

from acn_scale.convert import TARGETS, convert
from acn_scale.convert.export import read_export, write_export
from acn_scale.convert.sources import read_model
from acn_scale.data import build_stream
from acn_scale.data.encoders import load_encoder
from acn_scale.data.order import BucketedOrder
from acn_scale.data.shards import ShardIndex
from acn_scale.data.tasks import TASKS
from acn_scale.data.tokenizer import CLS, SEP
from acn_scale.distributed import local_device
from acn_scale.downstream import tasks
from acn_scale.downstream.metrics import OF_COUNTS, measure
from acn_scale.downstream.predictions import Predictions
from acn_scale.downstream.tasks import Split, _measured, _warn, evaluate_tasks
from acn_scale.downstream.text_noise import drop_words, swap_characters, text_noise
from acn_scale.errors import UserError
from acn_scale.evaluation import evaluate_run
from acn_scale.models import build_model
from acn_scale.results import read_measurements
from acn_scale.runs import read_metrics, run_folder

SKLEARN = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": sklearn_metrics.f1_score,
    "matthews": sklearn_metrics.matthews_corrcoef,
    "pearson": lambda labels, said: stats.pearsonr(labels, said).statistic,
    "spearman": lambda labels, said: stats.spearmanr(labels, said).statistic,
}
WORD_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz", "##s", "##ing", "."]


def warned(folder: Path) -> list[str]:
    """On every rank, by an evaluation of classes no better than one for all samples."""
    messages: list[str] = []
    with (
        patch.object(tasks, "_no_better_than_one_class", lambda *_: "no better"),
        patch.object(tasks.log, "warning", lambda form, *values: messages.append(form % values)),
    ):
        evaluated(folder)
    return messages


@pytest.mark.parametrize("task", ["mrpc", "stsb", "mnli"])
def test_metrics_are_those_of_the_written_predictions(
    one_rank: Ranks, two_ranks: Ranks, glue_encoder: Path, glue_shards: Path, tmp_path: Path, task: str
) -> None:
    """At every depth; on two ranks the same to the last digit, though nothing divides the number of samples."""
    net, encoder = read_export(glue_encoder), tmp_path / "encoder"
    for weight in net.model.trunk.parameters():
        if weight.ndim > 1:
            weight.mul_(20)  # or after so few steps the outputs are the same for any text
    encoder.mkdir()
    write_export(net, encoder, "fp32")
    cfg = fine_tuning(tmp_path, encoder, glue_shards, task, "optim.lr=1e-2", "eval.batch_size=7")
    one_rank(fine_tune, cfg)
    folder = run_folder(cfg)
    found = [each for each in read_measurements(folder) if each.task == task]
    predictions = written(folder / "eval/predictions" / f"{task}.tsv")
    assert {each.depth for each in found} == {0, 1, 2}
    assert predictions["sample"].tolist() == list(range(53))
    assert np.ptp(predictions["depth_02"]) > 0
    for each in found:
        said = predictions[f"depth_{each.depth:02d}"]
        if np.ptp(said) > 0:  # all the same: not defined there, 0 here
            assert each.value == pytest.approx(SKLEARN[each.metric](predictions["label"], said), abs=1e-12)
        assert each.interval[0] <= each.value <= each.interval[1]
        assert each.samples == 53
    before = {path: path.read_bytes() for part in ("eval", "submission") for path in folder.glob(f"{part}/**/*.*")}
    two_ranks(evaluated, folder)
    assert {path: path.read_bytes() for path in before} == before
    if task == "mrpc":
        assert two_ranks(warned, folder) == [["mrpc: no better"], []]
    if task == "mnli":  # whose network answers the diagnostic set too
        for name in ("MNLI-m", "AX"):
            lines = (folder / "submission" / f"{name}.tsv").read_text().splitlines()
            assert lines[0] == "index\tprediction"
            assert [line.split("\t")[0] for line in lines[1:]] == list(map(str, range(17)))
            assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "neutral", "contradiction"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=40), st.sampled_from([2, 3]))
def test_metrics_are_scikit_learns(pairs: list[tuple[int, int]], classes: int) -> None:
    labels, said = (np.array(column) % classes for column in zip(*pairs, strict=True))
    counts = np.bincount(labels * classes + said, minlength=classes**2).reshape(classes, classes)
    for name in OF_COUNTS:
        if name == "f1" and classes == 3:
            continue
        extra = {"zero_division": 0.0} if name == "f1" else {}
        value, (low, high) = measure(name, labels, said, classes)
        assert value == SKLEARN[name](labels, said, **extra)
        assert OF_COUNTS[name](counts) == pytest.approx(value, abs=1e-9)  # what the resamples of the interval are by
        assert low <= value <= high


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of networks that are right in 80 % of all cases."""
    random, covered = np.random.default_rng(1), 0
    for trial in range(200):
        labels = random.integers(2, size=300)
        said = np.where(random.random(300) < 0.8, labels, 1 - labels)
        _, (low, high) = measure("accuracy", labels, said, 2, seed=trial)
        covered += low <= 0.8 <= high
    assert 180 <= covered <= 199


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
def test_buckets_change_the_order_alone(sizes: list[int], batch: int, streams: int, epoch: int) -> None:
    """Each sample comes once an epoch; a batch holds samples of a few batches that are neighbours by length in its
    chunk."""
    total = sum(sizes)
    lengths = np.random.default_rng(0).integers(1, 100, total)
    order = BucketedOrder(np.array(sizes), lengths=lengths, batch=batch, seed=3, streams=streams, window=7)
    first = np.concatenate([[0], np.cumsum(sizes)])
    found = [int(first[shard] + number) for shard, number in (order.locate(epoch, place) for place in range(total))]
    assert sorted(found) == list(range(total))
    start = -(epoch * total) % batch
    batches = [found[place : place + batch] for place in range(start, total - batch + 1, batch)]
    if len(batches) <= order.CHUNK:  # one chunk
        ordered = np.sort(lengths[np.ravel(batches).astype(int)])
        spans = [
            (part[0], part[-1])
            for part in np.split(ordered, range(order.LIKE * batch, len(ordered), order.LIKE * batch))
            if len(part)
        ]
        assert all(
            any(low <= min(lengths[part]) and max(lengths[part]) <= high for low, high in spans) for part in batches
        )


def test_samples_of_like_length_are_mixed() -> None:
    """Batches of neighbours alone would each be of one length, and lean to what goes with it."""
    lengths = np.arange(256)
    order = BucketedOrder(np.array([256]), lengths=lengths, batch=8, seed=0, streams=1, window=256)
    found = np.array([order.locate(0, place)[1] for place in range(256)]).reshape(-1, 8)
    spread = np.ptp(lengths[found], axis=1)
    assert spread.min() > 8
    assert spread.max() < order.LIKE * 8


@pytest.mark.parametrize("buckets", ["true", "false"])
def test_a_batch_is_of_the_whole_file(glue_encoder: Path, glue_shards: Path, tmp_path: Path, buckets: str) -> None:
    """Whose rows lie there by where they come from: each quarter has as many in the first steps as another."""
    found = []
    for seed in range(20):
        cfg = fine_tuning(tmp_path, glue_encoder, glue_shards, "cola", f"data.buckets={buckets}", f"run.seed={seed}")
        found += build_stream(cfg).samples_of(0)
    counts = np.bincount(np.array(found) * 4 // 150, minlength=4)
    assert (abs(counts - len(found) / 4) < 5 * (len(found) * 3 / 16) ** 0.5).all(), counts


def test_padding_changes_no_prediction(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    """And buckets leave less of it."""
    padded = {}
    for buckets in ("true", "false"):
        cfg = fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc", f"data.buckets={buckets}")
        stream = build_stream(cfg)
        batches = [next(stream) for _ in range(9)]
        padded[buckets] = sum(int((~batch["mask"]).sum()) for batch in batches)
    assert padded["true"] < 0.7 * padded["false"]
    model = build_model(cfg.model).eval()
    batch = batches[0]
    with torch.no_grad():
        together = model(**{name: batch[name] for name in ("tokens", "segments", "mask")})["logits"]
        for row, mask in enumerate(batch["mask"]):
            alone = {name: batch[name][row : row + 1, : int(mask.sum())] for name in ("tokens", "segments")}
            torch.testing.assert_close(model(**alone)["logits"][0], together[row], rtol=0, atol=1e-5)


def test_sequences_are_those_of_transformers(glue_encoder: Path, tmp_path: Path) -> None:
    """For a WordPiece vocabulary: ids and segments, of single texts and of pairs, cut where they are too long."""
    from transformers import BertTokenizerFast

    random = np.random.default_rng(2)
    (tmp_path / "vocab.txt").write_text("\n".join(WORD_PIECES))
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        ours = load_encoder(folder)
        for _ in range(40):
            texts = tuple(sentence(random, 30) + " Classes." for _ in range(random.integers(1, 3)))
            expected = theirs(*texts, truncation="longest_first", max_length=24)
            assert ours.sequence(texts, 24) == (expected["input_ids"], expected["token_type_ids"])
    ids, segments = load_encoder(glue_encoder).sequence(("for a value", "in names"), 40)
    assert (ids[0], ids[-1], ids.count(SEP)) == (CLS, SEP, 2)
    assert segments == sorted(segments)


def test_noise_is_of_the_sample_alone() -> None:
    text = sentence(np.random.default_rng(5), 40) + " statement"
    for change in (swap_characters, drop_words):
        one, two = (change(text, np.random.default_rng(7), 0.5) for _ in range(2))
        assert one == two != text
        assert change(text, np.random.default_rng(7), 0.0) == text
    assert sorted(swap_characters(text, np.random.default_rng(1), 1.0)) == sorted(text)
    assert len(drop_words(text, np.random.default_rng(1), 1.0).split()) == 1
    for name in ("swap", "swap_2", "burn_0.1"):
        with pytest.raises(UserError, match=f"--noise {name}"):
            text_noise(name)


def test_exports_name_the_classes(one_rank: Ranks, glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    cfg = fine_tuning(tmp_path, glue_encoder, glue_shards, "mnli", "train.length=1step")
    one_rank(train_only, cfg)
    convert(str(run_folder(cfg)), "safetensors", tmp_path / "export")
    convert(str(tmp_path / "export"), "hf", tmp_path / "hf")
    labels = json.loads((tmp_path / "hf/config.json").read_text())["id2label"]
    assert list(labels.values()) == list(TASKS["mnli"].labels)
    assert f"Classes: {', '.join(TASKS['mnli'].labels)}." in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
def test_exports_carry_the_tokenizer_of_hugging_face(
    one_rank: Ranks, glue_shards: Path, tmp_path: Path, name: str
) -> None:
    """Whichever file it lies in, with its settings: the source need not be there any more."""
    from transformers import AutoTokenizer, BertTokenizerFast

    source = tmp_path / "source"
    source.mkdir()
    TARGETS["hf"](network(bert(vocab_size=len(WORD_PIECES), max_tokens=40)), source, "fp32")
    (source / "vocab.txt").write_text("\n".join(WORD_PIECES))
    (source / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    if name == "tokenizer.json":
        BertTokenizerFast.from_pretrained(source).save_pretrained(source)
        (source / "vocab.txt").unlink()
    given = {path.name: path.read_bytes() for path in source.glob("*okeniz*.json")}
    cfg = fine_tuning(tmp_path, f"hf:{source}", glue_shards, "mrpc", "model.connectivity=acn")
    one_rank(fine_tune, cfg)
    run, export, other = run_folder(cfg), tmp_path / "export", tmp_path / "other"
    for network_of, folder in ((run, export), (f"hf:{source}", other)):
        convert(str(network_of), "safetensors", folder)
        assert (folder / name).exists()
        assert {each: (folder / each).read_bytes() for each in given} == given
    shutil.rmtree(source)
    one_rank(evaluated, export, str(glue_shards / "mrpc/eval"))
    tables = [(folder / "eval/predictions/mrpc.tsv").read_bytes() for folder in (run, export)]
    assert tables[0] == tables[1]
    convert(str(export), "hf", tmp_path / "hf")
    text = "Names of the class."  # whose first letter makes it another word, where case counts
    ids, _ = load_encoder(export).sequence((text,), 40)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids == ids
    assert ids[1] == WORD_PIECES.index("[UNK]")


def test_what_is_evaluated_is_what_is_asked_for(
    one_rank: Ranks, glue_encoder: Path, glue_shards: Path, tmp_path: Path
) -> None:
    """A folder that is none of a task's evaluation sets stands alone; a checkpoint on the way is not the run."""
    cfg = fine_tuning(
        tmp_path, glue_encoder, glue_shards, "mrpc", 'checkpoint={every="5step", keep=3}', "eval.batch_size=7"
    )
    one_rank(train_only, cfg)
    run, held = run_folder(cfg), tmp_path / "held"
    last = [line for line in read_metrics(run) if "train/lr" in line][-1]
    stream = build_stream(cfg)
    tokens = sum(int(next(stream)["mask"].sum()) for _ in range(9)) / (9 * 16)  # of a sample, without padding
    assert last["speed/tokens_per_second"] / last["speed/samples_per_second"] == pytest.approx(tokens)
    shutil.copytree(glue_shards / "mrpc/eval", held)
    for data, task, samples in ((glue_shards / "mrpc/train", "mrpc_train", 150), (held, "mrpc_held", 53)):
        one_rank(evaluated, run, str(data))
        assert {each.task: each.samples for each in read_measurements(run)}[task] == samples
    first = next((run / "checkpoints").glob("step_*05"))
    (message,) = one_rank(complaint, first)
    assert message.startswith(f"{first}: not the newest checkpoint of its run, step_00000009; --out must name")
    one_rank(evaluated, first, None, tmp_path / "out")
    assert {each.task for each in read_measurements(tmp_path / "out")} == {"mrpc"}
    assert "full depth" in evaluate_run(run, overrides=["eval.batch_size=7"])  # batches of several lengths
    net = read_model(run)
    next(net.model.parameters()).fill_(float("nan"))
    (tmp_path / "diverged").mkdir()
    write_export(net, tmp_path / "diverged", "fp32")
    (message,) = one_rank(complaint, tmp_path / "diverged", str(glue_shards / "mrpc/eval"))
    assert message.startswith("mrpc: some of the network's outputs are not finite")


def evaluated_under_noise(sources: list[Path], out: Path | None = None) -> tuple[list[str], str]:
    """What is said of each, and the error at the end; on every rank."""
    said = []
    with pytest.raises(UserError) as error:
        for text in evaluate_tasks(sources, local_device(), noises={"drop_0.5": text_noise("drop_0.5")}, out=out):
            said.append(text)
    return said, str(error.value)


def test_a_source_that_fails_does_not_stop_the_others(
    one_rank: Ranks, glue_encoder: Path, glue_shards: Path, tmp_path: Path
) -> None:
    """And is named at the end, with the exit code of a mistake."""
    cfg = fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc")
    one_rank(train_only, cfg)
    run, again, gone = run_folder(cfg), tmp_path / "again", tmp_path / "gone"
    shutil.copytree(run, again)
    ((said, error),) = one_rank(evaluated_under_noise, [run, gone, again])
    assert error.startswith(f"1 of 3 failed: {gone}: ")
    assert [text.splitlines()[0] for text in said] == [str(run), str(again)]
    for folder in (run, again):
        assert {each.task for each in read_measurements(folder)} == {"mrpc+drop_0.5"}
    ((_, error),) = one_rank(evaluated_under_noise, [gone])
    assert "failed" not in error
    ((_, error),) = one_rank(evaluated_under_noise, [run, again], tmp_path)
    assert error == f"--out {tmp_path}: is for the results of one source, and there are 2"
    done = forked.command(ROOT / "tools/evaluate_task.py", gone, again, "--noise", "drop_0.5")
    assert (done.returncode, done.stdout.splitlines()[0]) == (2, str(again)), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: 1 of 2 failed: {gone}: ")


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ([1, 1, 1, 1, 1], "all samples are given the same class"),
        ([1, 1, 0, 0, 0], "accuracy 60.00 is not above 60.00, the share of the most frequent label"),
        ([1, 1, 0, 1, 0], None),
    ],
)
def test_a_score_of_the_majority_class_says_so(
    glue_shards: Path, said: list[int], noted: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning is of full depth; at the others the note tells."""
    labels = np.array([1, 0, 0, 1, 0])
    index = ShardIndex.load(glue_shards / "mrpc/eval")
    predictions = Predictions(np.arange(5), labels, np.array([said, said]).T)
    found = _measured(predictions, Split("mrpc", index, TASKS["mrpc"], None), "mrpc", "digest", 0)
    _warn(predictions, TASKS["mrpc"], "mrpc")
    assert {each.note for each in found} == {noted}
    assert {each.depth for each in found} == {0, 1}
    label = ", 1" if len(set(said)) == 1 else ""
    assert [record.getMessage() for record in caplog.records] == [f"mrpc: {noted}{label}"] * bool(noted)


def submitted(glue_encoder: Path, glue_shards: Path, tmp_path: Path, *arguments: object) -> str:
    """What launchers/glue.py would submit."""
    folders = ["--from", glue_encoder, "--data", glue_shards, "--name", "x"]
    done = forked.command(ROOT / "launchers/glue.py", *folders, *arguments, "--dry-run", f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_task_has_a_grid_of_its_own(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    """On top of what all have, and its learning rates in the place of theirs."""
    grid = ["--grid", "mrpc:optim.lr=1e-3,2e-3", "mrpc:train.global_batch_size=8,16", "cola:train.clip_norm=1.0,2.0"]
    text = submitted(glue_encoder, glue_shards, tmp_path, "--tasks", "cola", "mrpc", "stsb", "--lr", "5e-5", *grid)
    counts = {task: len(set(re.findall(rf"/x/{task}/(lr[^/\s]+)", text))) for task in ("cola", "mrpc", "stsb")}
    assert counts == {"cola": 2, "mrpc": 4, "stsb": 1}
    assert f"{tmp_path}/x/cola/lr=5e-5-clip_norm=2.0-seed=0" in text
    assert f"{tmp_path}/x/mrpc/lr=2e-3-global_batch_size=8-seed=0" in text
    for axis, message in (("rte:optim.lr=1", "--grid rte: must be one of the tasks cola"), ("x", "must be TASK:key")):
        command = ["--from", glue_encoder, "--data", glue_shards, "--tasks", "cola", "--grid", axis, "--dry-run"]
        done = forked.command(ROOT / "launchers/glue.py", *command)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_what_starts_from_mnli_waits_for_its_own_run(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    """One array for each of its seeds, which leaves the queue where that run fails."""
    text = submitted(
        glue_encoder, glue_shards, tmp_path, "--tasks", "mnli", "mrpc", "stsb", "--seeds", 0, 1, "--from-mnli"
    )
    first, *others = text.split("#!/bin/bash")[1:]
    assert "kill-on-invalid-dep" not in first
    assert [sorted(set(re.findall(r"x/(\w+/seed=\d)", each))) for each in others] == [
        ["mrpc/seed=0", "stsb/seed=0"], ["mrpc/seed=1", "stsb/seed=1"]
    ]  # fmt: skip
    assert all("kill-on-invalid-dep=yes" in each for each in others)
