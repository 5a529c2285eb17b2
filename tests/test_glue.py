"""GLUE: files in, shards, batches of like length, metrics as scikit-learn has them, the server's files out."""

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from ranks import Ranks
from scipy import stats
from sklearn import metrics as sklearn_metrics

from acn_scale.cli import load_config
from acn_scale.config import BertConfig
from acn_scale.convert import TARGETS, convert
from acn_scale.convert.export import read_export, write_export
from acn_scale.convert.network import Card, Network
from acn_scale.convert.sources import read_model
from acn_scale.data import build_stream
from acn_scale.data.encoders import load_encoder
from acn_scale.data.make_glue import make_glue_shards
from acn_scale.data.make_text import train_source_tokenizer
from acn_scale.data.order import BucketedOrder
from acn_scale.data.shards import ShardIndex
from acn_scale.data.tasks import TASKS
from acn_scale.data.text_sources import TextSources
from acn_scale.data.tokenizer import CLS, SEP
from acn_scale.distributed import local_device
from acn_scale.downstream.metrics import OF_COUNTS, measure
from acn_scale.downstream.predictions import Predictions
from acn_scale.downstream.source import completed
from acn_scale.downstream.tasks import Split, _measured, evaluate_task
from acn_scale.downstream.text_noise import drop_words, swap_characters, text_noise
from acn_scale.errors import RunFailed, UserError
from acn_scale.evaluation import evaluate_run
from acn_scale.models import build_model
from acn_scale.pretrain import train
from acn_scale.results import read_measurements
from acn_scale.runs import read_metrics, run_folder, write_json

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/glue/paper.toml"
WORDS = ["for", "in", "is", "the", "not", "a", "class", "def", "return", "object", "none", "value", "names", "of"]


def sentence(random: np.random.Generator, most: int = 12) -> str:
    return " ".join(random.choice(WORDS, random.integers(1, most)))


def write(path: Path, rows: Sequence[Sequence[Any]], mark: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(mark + "".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture(scope="module")
def shards(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    make_glue_shards(f"tsv:{files}", ["cola", "mrpc", "stsb", "mnli", "ax"], folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a masked language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    train_source_tokenizer(TextSources(["pydoc"]), 300, folder / "tokenizer")
    torch.manual_seed(0)
    cfg = BertConfig(name="bert", connectivity="acn", vocab_size=300, max_tokens=40, depth=2, dim=16, num_heads=2)
    model = build_model(cfg).eval().requires_grad_(False)
    (folder / "export").mkdir()
    content = (folder / "tokenizer/tokenizer.model").read_bytes()
    write_export(Network(model, Card(model=cfg, source="here", full_depth=2), content), folder / "export", "fp32")
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


SKLEARN = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": sklearn_metrics.f1_score,
    "matthews": sklearn_metrics.matthews_corrcoef,
    "pearson": lambda labels, said: stats.pearsonr(labels, said).statistic,
    "spearman": lambda labels, said: stats.spearmanr(labels, said).statistic,
}


@pytest.mark.parametrize("task", ["mrpc", "stsb", "mnli"])
def test_metrics_are_those_of_the_written_predictions(
    one_rank: Ranks, two_ranks: Ranks, encoder: Path, shards: Path, tmp_path: Path, task: str
) -> None:
    """At every depth; on two ranks the same to the last digit, though nothing divides the number of samples."""
    cfg = fine_tuning(tmp_path, encoder, shards, task, "eval.batch_size=7")
    one_rank(fine_tune, cfg)
    folder = run_folder(cfg)
    found = [each for each in read_measurements(folder) if each.task == task]
    predictions = written(folder / "eval/predictions" / f"{task}.tsv")
    assert {each.depth for each in found} == {0, 1, 2}
    assert predictions["sample"].tolist() == list(range(53))
    for each in found:
        said = predictions[f"depth_{each.depth:02d}"]
        if np.ptp(said) > 0:  # all the same: not defined there, 0 here
            assert each.value == pytest.approx(SKLEARN[each.metric](predictions["label"], said), abs=1e-12)
        assert each.interval[0] <= each.value <= each.interval[1]
        assert each.samples == 53
    before = {path: path.read_bytes() for part in ("eval", "submission") for path in folder.glob(f"{part}/**/*.*")}
    two_ranks(evaluated, folder)
    assert {path: path.read_bytes() for path in before} == before
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
def test_a_batch_is_of_the_whole_file(encoder: Path, shards: Path, tmp_path: Path, buckets: str) -> None:
    """Whose rows lie there by where they come from: each quarter has as many in the first steps as another."""
    found = []
    for seed in range(20):
        cfg = fine_tuning(tmp_path, encoder, shards, "cola", f"data.buckets={buckets}", f"run.seed={seed}")
        found += build_stream(cfg).samples_of(0)
    counts = np.bincount(np.array(found) * 4 // 150, minlength=4)
    assert (abs(counts - len(found) / 4) < 5 * (len(found) * 3 / 16) ** 0.5).all(), counts


def test_a_run_does_not_go_on_in_an_order_of_another_kind(
    encoder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = fine_tuning(tmp_path, encoder, shards, "mrpc")
    with monkeypatch.context() as patch:
        patch.setattr(BucketedOrder, "LIKE", 1)
        state = build_stream(cfg).state_dict()
    with pytest.raises(UserError, match="not the data this run began with"):
        build_stream(cfg).load_state_dict(state)


def test_padding_changes_no_prediction(encoder: Path, shards: Path, tmp_path: Path) -> None:
    """And buckets leave less of it."""
    padded = {}
    for buckets in ("true", "false"):
        cfg = fine_tuning(tmp_path, encoder, shards, "mrpc", f"data.buckets={buckets}")
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


def test_sequences_are_those_of_transformers(encoder: Path, tmp_path: Path) -> None:
    """For a WordPiece vocabulary: ids and segments, of single texts and of pairs, cut where they are too long."""
    from transformers import BertTokenizerFast

    random = np.random.default_rng(2)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz", "##s", "##ing", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(piece.lower() if piece in WORDS else piece for piece in pieces))
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        ours = load_encoder(folder)
        for _ in range(40):
            texts = tuple(sentence(random, 30) + " Classes." for _ in range(random.integers(1, 3)))
            expected = theirs(*texts, truncation="longest_first", max_length=24)
            assert ours.sequence(texts, 24) == (expected["input_ids"], expected["token_type_ids"])
    ids, segments = load_encoder(encoder).sequence(("for a value", "in names"), 40)
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


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("dev", [("index", "sentence1", "score"), (0, "a", 1)], "dev.tsv: line 1: has no column 'sentence2'"),
        ("dev", [("sentence1", "sentence2", "score")], "dev.tsv: holds no rows"),
        ("dev", [("sentence1", "sentence2", "score"), ("a", "b", "6")], "line 2: score = '6': must be a number from 0"),
        ("train", [("sentence1", "sentence2", "score"), ("a", "b", "x")], "train.tsv: line 2: score = 'x'"),
        ("train", [("sentence1", "sentence2", "score"), *[("a", "b")] * 3], "train.tsv: line 2: 2 of 3 columns, and 2"),
        ("test", [("index", "sentence1", "sentence2"), (0, "a", "b"), (1, "a")], "line 3: 2 of 3 columns: the server"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_their_line(
    files: Path, tmp_path: Path, name: str, rows: list[tuple], message: str
) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"STS-B/{split}.tsv", [("sentence1", "sentence2", "score"), ("a", "b", 1.5)])
    write(tmp_path / f"STS-B/{name}.tsv", rows)
    with pytest.raises(UserError, match=r"\.tsv: ") as error:
        make_glue_shards(f"tsv:{tmp_path}", ["stsb"], tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / f"out/stsb/{name.replace('dev', 'eval')}/index.json").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b", 5.5)], "stsb, train: row 0: label = 5.5: must be a number from 0 to 5"),
        ([("a", "b", -2)], "stsb, train: row 0: label = -2: must be a number from 0 to 5"),
        ([("a", "b", 1), ("c", "d", -1)], "stsb, train: row 1: has no label; only test sets go without"),
    ],
)
def test_bad_hugging_face_rows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple], message: str
) -> None:
    """Of a local folder with a config for the task."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    (hub / "stsb").mkdir(parents=True)
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: stsb\n  data_files:\n  - {split: train, path: stsb/train.parquet}\n---\n"
    )
    columns = dict(zip(("sentence1", "sentence2", "label"), map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pa.table(columns), hub / "stsb/train.parquet")
    with pytest.raises(UserError) as error:
        make_glue_shards(f"hf:{hub}", ["stsb"], tmp_path / "out")
    assert message in str(error.value)


def test_what_does_not_fit_is_refused(encoder: Path, shards: Path, tmp_path: Path) -> None:
    cases = {
        "data.max_tokens = 64: model.max_tokens = 40": ["data.max_tokens=64"],
        "data.tokenizer = nowhere": ["data.tokenizer=nowhere"],
        "data.train = nowhere|nowhere/index.json": ["data.train=nowhere"],
        "holds no complete checkpoint": [f"train.init_from={tmp_path}"],
        "eval: holds cola; data.train = .*/mrpc/train holds mrpc": [f"data.eval={shards}/cola/eval"],
        "data.eval = https://here/mrpc: must be a folder": ["data.eval=https://here/mrpc"],
    }
    for message, overrides in cases.items():
        with pytest.raises(UserError, match=message):
            fine_tuning(tmp_path, encoder, shards, "mrpc", *overrides)
    mnli = [f"data.{split}={shards}/mnli/{split}" for split in ("train", "eval")]
    other = fine_tuning(tmp_path, encoder, shards, "mrpc", *mnli, "model.num_classes=2")
    with pytest.raises(UserError, match="has 3 classes"):
        build_stream(other)


def test_text_is_nothing_to_fine_tune_on() -> None:
    """It would be trained on to the end, and then not be evaluated."""
    done = forked.command(ROOT / "acn_scale/finetune.py", "--config", ROOT / "configs/quickstart/ac_bert.toml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: data.kind = text: must be sentences or images" in done.stderr


def test_anothers_tokenizer_is_refused(encoder: Path, shards: Path, tmp_path: Path) -> None:
    """Of ours and of Hugging Face's folders; as many pieces do not make it the same, a copy of one file does."""
    net = read_export(encoder)
    named = [f"model.{key}={json.dumps(value)}" for key, value in net.card.model.model_dump(exclude_none=True).items()]
    named.append("model.num_classes=2")
    with pytest.raises(UserError, match="other: not the tokenizer that"):
        train_source_tokenizer(TextSources(["pydoc"]), 300, tmp_path / "other", eval_share=0.5)
        fine_tuning(tmp_path, encoder, shards, "mrpc", f"data.tokenizer={tmp_path}/other", *named)
    fine_tuning(tmp_path, encoder, shards, "mrpc", f"data.tokenizer={encoder}", *named)
    cfg = net.card.model.model_copy(update={"connectivity": "residual"})
    (tmp_path / "hf").mkdir()
    TARGETS["hf"](
        Network(build_model(cfg), net.card.model_copy(update={"model": cfg}), net.tokenizer), tmp_path / "hf", "fp32"
    )
    for name in ("same/tokenizer.json", "same_ours/tokenizer.model"):
        (tmp_path / name).parent.mkdir()
    shutil.copy(tmp_path / "hf/tokenizer.json", tmp_path / "same")
    (tmp_path / "same_ours/tokenizer.model").write_bytes(net.tokenizer)
    for source, same in ((encoder, "same_ours"), (f"hf:{tmp_path}/hf", "same")):
        fine_tuning(tmp_path, source, shards, "mrpc", f"data.tokenizer={tmp_path}/{same}")
        with pytest.raises(UserError, match="other: not the tokenizer that"):
            fine_tuning(tmp_path, source, shards, "mrpc", f"data.tokenizer={tmp_path}/other")
    begun = fine_tuning(tmp_path, f"hf:{tmp_path}/hf", shards, "mrpc")  # a run without a tokenizer of its own
    (tmp_path / "begun").mkdir()
    write_json(tmp_path / "begun/config.json", begun.model_dump(mode="json"))
    fine_tuning(tmp_path, tmp_path / "begun", shards, "mrpc", f"data.tokenizer={tmp_path}/same", *named)
    with pytest.raises(UserError, match="other: not the tokenizer that"):
        fine_tuning(tmp_path, tmp_path / "begun", shards, "mrpc", f"data.tokenizer={tmp_path}/other", *named)


def test_a_network_of_another_kind_is_refused(two_ranks: Ranks, encoder: Path, shards: Path) -> None:
    """On all ranks, with the same words."""
    messages = two_ranks(complaint, encoder, str(shards / "mrpc/eval"))
    assert messages == [f"{encoder}: must be a classifier of texts"] * 2


def test_a_network_of_images_is_refused_by_its_kind(twins: list[Path], shards: Path, tmp_path: Path) -> None:
    convert(str(twins[0]), "safetensors", tmp_path / "export")
    for source in (twins[0], tmp_path / "export"):
        with pytest.raises(UserError) as error:
            fine_tuning(tmp_path, source, shards, "mrpc")
        assert str(error.value) == f"train.init_from = {source}: a vit; data.kind = sentences takes a bert"


def test_exports_name_the_classes(one_rank: Ranks, encoder: Path, shards: Path, tmp_path: Path) -> None:
    cfg = fine_tuning(tmp_path, encoder, shards, "mnli", "train.length=1step")
    one_rank(train_only, cfg)
    convert(str(run_folder(cfg)), "safetensors", tmp_path / "export")
    convert(str(tmp_path / "export"), "hf", tmp_path / "hf")
    labels = json.loads((tmp_path / "hf/config.json").read_text())["id2label"]
    assert list(labels.values()) == list(TASKS["mnli"].labels)
    assert f"Classes: {', '.join(TASKS['mnli'].labels)}." in (tmp_path / "hf/README.md").read_text()


def test_shards_of_another_task_are_refused(one_rank: Ranks, encoder: Path, shards: Path, tmp_path: Path) -> None:
    """With as many classes they would be measured, and be in the table of results. MNLI's network answers AX."""
    cfg = fine_tuning(tmp_path, encoder, shards, "mrpc")
    one_rank(train_only, cfg)
    (message,) = one_rank(complaint, run_folder(cfg), str(shards / "cola/eval"))
    assert message == f"--data {shards}/cola/eval: holds cola; {run_folder(cfg)} was trained on mrpc"
    assert not list((run_folder(cfg) / "eval").glob("*cola*"))
    convert(str(run_folder(cfg)), "safetensors", tmp_path / "export")
    (message,) = one_rank(complaint, tmp_path / "export", str(shards / "cola/eval"))
    assert message.endswith("export was trained on mrpc")


def test_what_is_evaluated_is_what_is_asked_for(one_rank: Ranks, encoder: Path, shards: Path, tmp_path: Path) -> None:
    """A folder that is none of a task's evaluation sets stands alone; a checkpoint on the way is not the run."""
    cfg = fine_tuning(tmp_path, encoder, shards, "mrpc", 'checkpoint={every="5step", keep=3}', "eval.batch_size=7")
    one_rank(train_only, cfg)
    run, held = run_folder(cfg), tmp_path / "held"
    last = [line for line in read_metrics(run) if "train/lr" in line][-1]
    stream = build_stream(cfg)
    tokens = sum(int(next(stream)["mask"].sum()) for _ in range(9)) / (9 * 16)  # of a sample, without padding
    assert last["speed/tokens_per_second"] / last["speed/samples_per_second"] == pytest.approx(tokens)
    shutil.copytree(shards / "mrpc/eval", held)
    for data, task, samples in ((shards / "mrpc/train", "mrpc_train", 150), (held, "mrpc_held", 53)):
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
    (message,) = one_rank(complaint, tmp_path / "diverged", str(shards / "mrpc/eval"))
    assert message.startswith("mrpc: some of the network's outputs are not finite")


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ([1, 1, 1, 1, 1], "all samples are given the same class"),
        ([1, 1, 0, 0, 0], "accuracy 60.00 is not above 60.00, the share of the most frequent label"),
        ([1, 1, 0, 1, 0], None),
    ],
)
def test_a_score_of_the_majority_class_says_so(
    shards: Path, said: list[int], noted: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning is of full depth; at the others the note tells."""
    labels = np.array([1, 0, 0, 1, 0])
    index = ShardIndex.load(shards / "mrpc/eval")
    found = _measured(
        Predictions(np.arange(5), labels, np.array([said, said]).T), Split("mrpc", index, TASKS["mrpc"], None),
        "mrpc", "digest", 0,
    )  # fmt: skip
    assert {each.note for each in found} == {noted}
    assert {each.depth for each in found} == {0, 1}
    assert [record.getMessage().startswith(f"mrpc: {noted}") for record in caplog.records] == [True] * bool(noted)


def submitted(encoder: Path, shards: Path, tmp_path: Path, *arguments: object) -> str:
    """What launchers/glue.py would submit."""
    folders = ["--from", encoder, "--data", shards, "--name", "x"]
    done = forked.command(ROOT / "launchers/glue.py", *folders, *arguments, "--dry-run", f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_task_has_a_grid_of_its_own(encoder: Path, shards: Path, tmp_path: Path) -> None:
    """On top of what all have, and its learning rates in the place of theirs."""
    grid = ["--grid", "mrpc:optim.lr=1e-3,2e-3", "mrpc:train.global_batch_size=8,16", "cola:train.clip_norm=1.0,2.0"]
    text = submitted(encoder, shards, tmp_path, "--tasks", "cola", "mrpc", "stsb", "--lr", "5e-5", *grid)
    counts = {task: len(set(re.findall(rf"/x/{task}/(lr[^/\s]+)", text))) for task in ("cola", "mrpc", "stsb")}
    assert counts == {"cola": 2, "mrpc": 4, "stsb": 1}
    assert f"{tmp_path}/x/cola/lr=5e-5-clip_norm=2.0-seed=0" in text
    assert f"{tmp_path}/x/mrpc/lr=2e-3-global_batch_size=8-seed=0" in text
    for axis, message in (("rte:optim.lr=1", "--grid rte: must be one of the tasks cola"), ("x", "must be TASK:key")):
        command = ["--from", encoder, "--data", shards, "--tasks", "cola", "--grid", axis, "--dry-run"]
        done = forked.command(ROOT / "launchers/glue.py", *command)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_what_starts_from_mnli_waits_for_its_own_run(encoder: Path, shards: Path, tmp_path: Path) -> None:
    """One array for each of its seeds, which leaves the queue where that run fails."""
    text = submitted(encoder, shards, tmp_path, "--tasks", "mnli", "mrpc", "stsb", "--seeds", 0, 1, "--from-mnli")
    first, *others = text.split("#!/bin/bash")[1:]
    assert "kill-on-invalid-dep" not in first
    assert [sorted(set(re.findall(r"x/(\w+/seed=\d)", each))) for each in others] == [
        ["mrpc/seed=0", "stsb/seed=0"], ["mrpc/seed=1", "stsb/seed=1"]
    ]  # fmt: skip
    assert all("kill-on-invalid-dep=yes" in each for each in others)
