"""GLUE: what does not fit is refused in one line that names the file and its line."""

import json
import shutil
from pathlib import Path

import forked
import pytest
from glue_runs import ROOT, complaint, fine_tuning, hugging_face, train_only, write
from ranks import Ranks

from acn_scale.convert import TARGETS, convert
from acn_scale.convert.export import read_export
from acn_scale.convert.network import Network
from acn_scale.data import build_stream
from acn_scale.data.glue_sources import read_split
from acn_scale.data.make_glue import make_glue_shards
from acn_scale.data.make_text import train_source_tokenizer
from acn_scale.data.order import BucketedOrder
from acn_scale.data.tasks import TASKS
from acn_scale.data.text_sources import TextSources
from acn_scale.errors import UserError
from acn_scale.models import build_model
from acn_scale.runs import run_folder, write_json


def test_a_run_does_not_go_on_in_an_order_of_another_kind(
    glue_encoder: Path, glue_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc")
    with monkeypatch.context() as patch:
        patch.setattr(BucketedOrder, "LIKE", 1)
        state = build_stream(cfg).state_dict()
    with pytest.raises(UserError, match="not the data this run began with"):
        build_stream(cfg).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("dev", [("index", "sentence1", "score"), (0, "a", 1)], "dev.tsv: line 1: has no column 'sentence2'"),
        ("dev", [("sentence1", "sentence2", "score")], "dev.tsv: holds no rows"),
        ("dev", [("sentence1", "sentence2", "score"), ("a", "b", "6")], "line 2: score = '6': must be a number from 0"),
        ("train", [("sentence1", "sentence2", "score"), ("a", "b", "x")], "train.tsv: line 2: score = 'x'"),
        ("train", [("sentence1", "sentence2", "score"), *[("a", "b")] * 3], "train.tsv: line 2: 2 of 3 columns, and 2"),
        ("test", [("index", "sentence1", "sentence2"), (0, "a", "b"), (1, "a")], "line 3: 2 of 3 columns: an eval"),
        ("dev", [("sentence1", "sentence2", "score"), ("a", "b", 1), ("a", "b")], "line 3: 2 of 3 columns: an eval"),
        ("dev", [("sentence1", "sentence2", "score"), ("a", "b", 1), ("\udcff", "b", 1)], "line 3: not UTF-8: invalid"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_their_line(
    glue_files: Path, tmp_path: Path, name: str, rows: list[tuple], message: str
) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"STS-B/{split}.tsv", [("sentence1", "sentence2", "score"), ("a", "b", 1.5)])
    write(tmp_path / f"STS-B/{name}.tsv", rows)
    with pytest.raises(UserError, match=r"\.tsv: ") as error:
        make_glue_shards(f"tsv:{tmp_path}", ["stsb"], tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / f"out/stsb/{name.replace('dev', 'eval')}/index.json").exists()


@pytest.mark.parametrize(
    ("task", "rows", "classes", "message"),
    [
        ("stsb", [("a", "b", 5.5)], [], "row 0: label = 5.5: must be a number from 0 to 5"),
        ("stsb", [("a", "b", -2)], [], "row 0: label = -2: must be a number from 0 to 5"),
        ("stsb", [("a", "b", "much")], [], "row 0: label = 'much': must be a number from 0 to 5"),
        ("stsb", [("a", "b", 1), ("c", "d", -1)], [], "row 1: has no label; only test sets go without"),
        ("stsb", [("a", "b", 1), ("c", None, 1)], [], "row 1: sentence2 = None: must be a text"),
        ("stsb", [("a", "b", 1)], ["unlike", "alike"], "classes unlike, alike: must be numbers"),
        ("rte", [("a", "b", 2)], [], "row 0: label = 2: must be one of entailment, not_entailment"),
        ("rte", [("a", "b", "yes")], [], "row 0: label = 'yes': must be one of entailment, not_entailment"),
        ("wnli", [("a", "b", 0)], ["no", "yes"], "classes no, yes: must be not_entailment, entailment"),
    ],
)
def test_bad_hugging_face_rows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, rows: list[tuple], classes: list[str], message: str
) -> None:
    """Of a local folder with a config for the task."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hub = hugging_face(tmp_path / "hub", {task: {"train": rows}}, classes)
    with pytest.raises(UserError) as error:
        make_glue_shards(f"hf:{hub}", [task], tmp_path / "out")
    assert str(error.value) == f"hf:{hub}: {task}, train: {message}"


@pytest.mark.parametrize(
    ("labels", "classes"), [
        ([0, 1, 1], []), ([0, 1, 1], ["not_entailment", "entailment"]), ([1, 0, 0], ["entailment", "not_entailment"]),
        (["0", "1", "1"], []), (["not_entailment", "entailment", "entailment"], []), ([1, 0, 0], ["1", "0"]),
    ],
)  # fmt: skip
def test_classes_of_hugging_face_go_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int | str], classes: list[str]
) -> None:
    """In whatever order a copy numbers them; what has no label yet may be a test set alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [("a", "b", label) for label in labels]
    unknown = rows if isinstance(labels[0], str) else [("a", "b", -1)]
    hub = hugging_face(tmp_path / "hub", {"wnli": {"train": rows, "validation": rows, "test": unknown}}, classes)
    for split in ("train", "eval"):
        found = read_split(f"hf:{hub}", "wnli", TASKS["wnli"], split)
        assert [row.label for row in found.rows] == [0, 1, 1]
    found = read_split(f"hf:{hub}", "wnli", TASKS["wnli"], "test")
    assert {row.label for row in found.rows} == ({0, 1} if isinstance(labels[0], str) else {None})
    assert read_split(f"hf:{hub}", "ax", TASKS["ax"], "test") is None


def test_the_diagnostic_set_is_made_where_it_is_there(tmp_path: Path) -> None:
    """All other tasks must be; a task that is asked for by its name too."""
    source = tmp_path / "source"
    for task in TASKS.values():
        values = dict.fromkeys(task.texts, "a") | {task.label: [*task.labels, "1"][0]}
        columns = task.columns or tuple(values)
        for split in {"train", "eval"} & task.splits.keys():
            row = [values.get(column, "") for column in columns]
            write(source / task.folder / task.splits[split], [row] if task.columns else [columns, row])
    names = [index.info["task"] for index in make_glue_shards(f"tsv:{source}", None, tmp_path / "out")]
    assert set(names) == TASKS.keys() - {"ax"}
    with pytest.raises(UserError, match="has no ax, diagnostic/"):
        make_glue_shards(f"tsv:{source}", ["ax"], tmp_path / "out")
    write(source / "diagnostic/diagnostic.tsv", [("index", "sentence1", "sentence2"), (0, "a", "b")])
    assert make_glue_shards(f"tsv:{source}", None, tmp_path / "out")[-1].info["task"] == "ax"
    (source / "RTE/dev.tsv").unlink()
    with pytest.raises(UserError, match="has no eval of rte, RTE/"):
        make_glue_shards(f"tsv:{source}", None, tmp_path / "out")


def test_what_does_not_fit_is_refused(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    cases = {
        "data.max_tokens = 64: model.max_tokens = 40": ["data.max_tokens=64"],
        "data.tokenizer = nowhere": ["data.tokenizer=nowhere"],
        "data.train = nowhere|nowhere/index.json": ["data.train=nowhere"],
        "holds no complete checkpoint": [f"train.init_from={tmp_path}"],
        "eval: holds cola; data.train = .*/mrpc/train holds mrpc": [f"data.eval={glue_shards}/cola/eval"],
        "data.eval = https://here/mrpc: must be a folder": ["data.eval=https://here/mrpc"],
    }
    for message, overrides in cases.items():
        with pytest.raises(UserError, match=message):
            fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc", *overrides)
    mnli = [f"data.{split}={glue_shards}/mnli/{split}" for split in ("train", "eval")]
    other = fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc", *mnli, "model.num_classes=2")
    with pytest.raises(UserError, match="has 3 classes"):
        build_stream(other)


def test_text_is_nothing_to_fine_tune_on() -> None:
    """It would be trained on to the end, and then not be evaluated."""
    done = forked.command(ROOT / "acn_scale/finetune.py", "--config", ROOT / "configs/quickstart/ac_bert.toml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: data.kind = text: must be sentences or images" in done.stderr


def test_anothers_tokenizer_is_refused(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    """Of ours and of Hugging Face's folders; as many pieces do not make it the same, a copy of one file does."""
    net = read_export(glue_encoder)
    named = [f"model.{key}={json.dumps(value)}" for key, value in net.card.model.model_dump(exclude_none=True).items()]
    named.append("model.num_classes=2")
    with pytest.raises(UserError, match="other: not the tokenizer that"):
        train_source_tokenizer(TextSources(["pydoc"]), 300, tmp_path / "other", eval_share=0.5)
        fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc", f"data.tokenizer={tmp_path}/other", *named)
    fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc", f"data.tokenizer={glue_encoder}", *named)
    cfg = net.card.model.model_copy(update={"connectivity": "residual"})
    (tmp_path / "hf").mkdir()
    TARGETS["hf"](
        Network(build_model(cfg), net.card.model_copy(update={"model": cfg}), net.tokenizer), tmp_path / "hf", "fp32"
    )
    for name in ("same/tokenizer.json", "same_ours/tokenizer.model"):
        (tmp_path / name).parent.mkdir()
    shutil.copy(tmp_path / "hf/tokenizer.json", tmp_path / "same")
    (tmp_path / "same_ours/tokenizer.model").write_bytes(net.tokenizer["tokenizer.model"])
    for source, same in ((glue_encoder, "same_ours"), (f"hf:{tmp_path}/hf", "same")):
        fine_tuning(tmp_path, source, glue_shards, "mrpc", f"data.tokenizer={tmp_path}/{same}")
        with pytest.raises(UserError, match="other: not the tokenizer that"):
            fine_tuning(tmp_path, source, glue_shards, "mrpc", f"data.tokenizer={tmp_path}/other")
    begun = fine_tuning(tmp_path, f"hf:{tmp_path}/hf", glue_shards, "mrpc")  # a run without a tokenizer of its own
    (tmp_path / "begun").mkdir()
    write_json(tmp_path / "begun/config.json", begun.model_dump(mode="json"))
    fine_tuning(tmp_path, tmp_path / "begun", glue_shards, "mrpc", f"data.tokenizer={tmp_path}/same", *named)
    with pytest.raises(UserError, match="other: not the tokenizer that"):
        fine_tuning(tmp_path, tmp_path / "begun", glue_shards, "mrpc", f"data.tokenizer={tmp_path}/other", *named)


def test_a_network_of_another_kind_is_refused(two_ranks: Ranks, glue_encoder: Path, glue_shards: Path) -> None:
    """On all ranks, with the same words."""
    messages = two_ranks(complaint, glue_encoder, str(glue_shards / "mrpc/eval"))
    assert messages == [f"{glue_encoder}: must be a classifier of texts"] * 2


def test_a_network_of_images_is_refused_by_its_kind(twins: list[Path], glue_shards: Path, tmp_path: Path) -> None:
    convert(str(twins[0]), "safetensors", tmp_path / "export")
    for source in (twins[0], tmp_path / "export"):
        with pytest.raises(UserError) as error:
            fine_tuning(tmp_path, source, glue_shards, "mrpc")
        assert str(error.value) == f"train.init_from = {source}: a vit; data.kind = sentences takes a bert"


def test_shards_of_another_task_are_refused(
    one_rank: Ranks, glue_encoder: Path, glue_shards: Path, tmp_path: Path
) -> None:
    """With as many classes they would be measured, and be in the table of results. MNLI's network answers AX."""
    cfg = fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc")
    one_rank(train_only, cfg)
    (message,) = one_rank(complaint, run_folder(cfg), str(glue_shards / "cola/eval"))
    assert message == f"--data {glue_shards}/cola/eval: holds cola; {run_folder(cfg)} was trained on mrpc"
    assert not list((run_folder(cfg) / "eval").glob("*cola*"))
    convert(str(run_folder(cfg)), "safetensors", tmp_path / "export")
    (message,) = one_rank(complaint, tmp_path / "export", str(glue_shards / "cola/eval"))
    assert message.endswith("export was trained on mrpc")
