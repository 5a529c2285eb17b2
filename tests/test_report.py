"""The depth report: what it says of runs, checkpoints and exports, how sure it is, and what it leaves behind."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, small
from test_pretrain import run, run_until

from acn_scale.cli import load_config
from acn_scale.convert import convert, read_model
from acn_scale.data import build_evaluation
from acn_scale.data.make_text import make_text_shards, train_source_tokenizer
from acn_scale.data.shards import ShardIndex
from acn_scale.data.text_sources import TextSources
from acn_scale.errors import UserError
from acn_scale.report import depth_report
from acn_scale.report.bootstrap import cut_at, interval, resample
from acn_scale.report.measure import cut_copy, take_readings
from acn_scale.report.numbers import finite
from acn_scale.report.page import page
from acn_scale.runs import read_config, read_json, read_metrics

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(twins: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    """Of both: (what is printed, depth.json, report.html)."""
    out = tmp_path_factory.mktemp("report") / "out"
    printed = depth_report(twins, out, tolerance=2)
    assert {path.name for path in out.iterdir()} == {"depth.json", "depth_curve.png", "report.html"}
    assert (out / "depth_curve.png").read_bytes().startswith(b"\x89PNG")
    return printed, read_json(out / "depth.json"), (out / "report.html").read_text()


class Reader(HTMLParser):
    """Tags that occur; the text of tables and of the sentences at the top; all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        if tag in ("td", "p"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "p" in self.open:
            self.cells[-1] += data


def leaves(values: Any) -> list[float]:
    if isinstance(values, dict | list):
        return [leaf for each in (values.values() if isinstance(values, dict) else values) for leaf in leaves(each)]
    return [values] if isinstance(values, int | float) and not isinstance(values, bool) else []


def test_the_curve_is_that_of_the_last_evaluation(twins: list[Path], report: tuple) -> None:
    printed, numbers, _ = report
    rows = printed.splitlines()
    assert rows[0].split()[-4:] == ["0", "1", "2", "3"]
    for folder, net, row in zip(twins, numbers["networks"], rows[1:3], strict=True):
        last = [line for line in read_metrics(folder) if "eval/loss" in line][-1]
        expected = [last[f"eval/depth_{depth:02d}/accuracy"] for depth in range(4)]
        assert net["accuracy"] == pytest.approx(expected, abs=1e-9)
        assert net["loss"][-1] == pytest.approx(last["eval/loss"], abs=1e-5)
        assert row.split() == [folder.name, *(f"{100 * value:.1f}" for value in expected)]
        assert (net["step"], net["samples"]) == (40, 397)
        cuts = {cut["tolerance"]: cut["depth"] for cut in net["cutoffs"]}
        assert list(cuts) == [0.1, 0.5, 1.0, 2.0]
        assert cuts[0.5] == last["depth/cutoff"]


def test_what_comes_from_training_is_in_the_metrics(twins: list[Path], report: tuple) -> None:
    for folder, net in zip(twins, report[1]["networks"], strict=True):
        lines = {line["step"]: line for line in read_metrics(folder) if "train/lr" in line}
        norms = net["gradient_norms"]
        assert norms["steps"] == [5, 10, 15, 20, 25, 30, 35, 40]
        assert norms["blocks"] == [1, 2, 3]
        for step, row in zip(norms["steps"], norms["norms"], strict=True):
            assert row == [lines[step][f"grad_norm/block_{block:02d}"] for block in norms["blocks"]]
        assert net["config"] == read_json(folder / "config.json")
        assert net["environment"] == read_json(folder / "environment.json")


def test_the_page_is_made_of_its_numbers(report: tuple) -> None:
    """All that it shows comes from depth.json, and each figure of its tables and sentences is found there again."""
    _, numbers, html = report
    assert page(numbers) == html
    shown = {str(place) for place in range(4)} | {"1", "95"}
    for leaf in leaves(numbers):
        forms = [f"{leaf:g}", f"{leaf:,}", f"{abs(leaf):.2f}", f"{leaf:.3f}", f"{leaf:.4f}", f"{leaf:,.0f}"]
        forms += [f"{100 * leaf:.0f}", f"{100 * leaf:.1f}", f"{1000 * leaf:.2f}", f"{leaf / 1e6:,.1f}"]
        shown |= {form.removeprefix("-") for form in forms}
    paths = [net[key] for net in numbers["networks"] for key in ("folder", "data")]
    cells = [cell for cell in Reader(html).cells if not any(path in cell for path in paths)]
    text = " ".join(cells).replace(numbers["measured_on"]["device"], "").replace("fp32", "")
    figures = re.findall(r"\d[\d,]*(?:\.\d+)?", text)
    assert len(figures) > 150
    assert not [figure for figure in figures if figure.strip(",") not in shown]

    changed = json.loads(json.dumps(numbers))
    changed["networks"][0]["costs"][0]["bytes"] = 123456789
    assert "123,456,789" in page(changed)
    assert "different data" not in page(changed)
    changed["networks"][0]["fingerprint"] = "another"
    assert "different data" in page(changed)


def test_the_page_needs_nothing_else(report: tuple) -> None:
    _, _, html = report
    assert not {"script", "iframe", "img", "object"} & Reader(html).tags
    assert re.findall(r"<link[^>]*>", html) == ['<link rel="icon" href="data:,">']
    for address in re.findall(r'(?:href|src|url)\s*[=(]\s*"?([^">)]*)', html):
        assert address.startswith(("#", "data:")), address
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)


def test_noise_side_by_side(twins: list[Path], tmp_path: Path) -> None:
    """A column for each noise, of each task's first metric."""
    folder = tmp_path / "run"
    shutil.copytree(twins[0], folder)
    (folder / "eval").mkdir()
    for number, task in enumerate(("shapes", "shapes+gaussian_0.1", "shapes+salt_pepper_0.1", "other")):
        lines = [{"task": task, "metric": metric, "value": number + depth / 8 + extra, "depth": depth}
                 for metric, extra in (("accuracy", 0), ("loss", 50)) for depth in range(4)]  # fmt: skip
        (folder / "eval" / f"{task}.json").write_text(json.dumps(lines))
    depth_report([folder], tolerance=100)
    html = (folder / "report" / "report.html").read_text()
    cells = re.findall(r"<t[hd][^>]*>([^<]*)<", html[html.index("Under noise") :])
    first = cells.index("shapes")
    assert cells[first : first + 5] == ["shapes", "depth", "no noise", "gaussian_0.1", "salt_pepper_0.1"]
    assert cells[first + 5 : first + 10] == ["run", "0", "0", "1", "2"]
    assert ["run", "3", "0.375", "1.375", "2.375"] in [cells[place : place + 5] for place in range(first, first + 30)]


def test_what_a_measurement_notes_is_shown(twins: list[Path], tmp_path: Path) -> None:
    """Means of several networks differ by it alone. They are not the network's own under noise."""
    folder = tmp_path / "run"
    shutil.copytree(twins[0], folder)
    (folder / "eval").mkdir()
    own = {"task": "rte+swap_0.1", "metric": "accuracy", "value": 0.125, "depth": 3, "note": "from mnli & on"}
    (folder / "eval/rte+swap_0.1.json").write_text(json.dumps(own))
    means = [own | {"value": value, "mean_of": 3, "note": f"{name}: mean of 3 seeds"}
             for name, value in (("acn", 0.75), ("twin", 0.625))]  # fmt: skip
    (folder / "eval/z.json").write_text(json.dumps(means))
    depth_report([folder], tolerance=100)
    html = (folder / "report" / "report.html").read_text()
    cells = re.findall(r"<t[hd][^>]*>([^<]*)<", html[html.index("Under noise") :])
    assert cells[cells.index("rte") :][:6] == ["rte", "depth", "swap_0.1", "run", "3", "0.125"]
    notes = ["from mnli &amp; on", "acn: mean of 3 seeds", "twin: mean of 3 seeds"]
    head = cells[cells.index("network") :]
    assert [head[head.index("note") + 10 * (row + 1)] for row in range(3)] == notes


def test_what_comes_from_files_is_escaped(twins: list[Path], tmp_path: Path) -> None:
    evil = '"><script>alert(1)<'
    folder = tmp_path / evil
    shutil.copytree(twins[0], folder)
    environment = read_json(folder / "environment.json") | {"host": "</pre><script>alert(2)</script>"}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "eval").mkdir()
    found = {"task": "noise <img src=x onerror=alert(3)>", "metric": "$a$", "value": 0.25, "depth": 3, "other": 1}
    (folder / "eval" / "noise.json").write_text(json.dumps(found))
    (folder / "eval" / "others.json").write_text(json.dumps([found | {"task": "CIFAR-10", "interval": [0.125, 0.5]}]))
    depth_report([folder], tolerance=100)
    html = (folder / "report" / "report.html").read_text()
    reader = Reader(html)
    assert "after 0 of 3 blocks" in reader.text
    assert not {"script", "img"} & reader.tags
    assert html.count("&lt;script&gt;alert(1)&lt;") >= 5
    for text in (evil, environment["host"], found["task"], "Under noise", "Downstream", "0.125 to 0.5"):
        assert text in reader.text
    numbers = read_json(folder / "report" / "depth.json")
    numbers["networks"][0]["cutoffs"][-1]["depth"] = 3
    reader = Reader(page(numbers))
    assert "needs all its 3 blocks" in reader.text
    assert not {"script", "img"} & reader.tags
    (folder / "eval" / "noise.json").write_text('{"task": "noise"}')
    with pytest.raises(UserError, match=r"noise.json: metric: Field required"):
        depth_report([folder])


def test_bootstrap(rng: np.random.Generator) -> None:
    """Intervals hold the point estimate, shrink with the root of the number of samples, and depend on the seed."""
    widths = []
    for samples in (100, 400, 6400):
        accuracy = (rng.random((samples, 3)) < [0.3, 0.6, 0.7]).astype(float)
        means = resample(accuracy, seed=1)
        assert means.shape == (1000, 3)
        assert np.array_equal(means, resample(accuracy, seed=1))
        assert not np.array_equal(means, resample(accuracy, seed=2))
        points = accuracy.mean(axis=0)
        bounds = [interval(values, point) for values, point in zip(means.T, points, strict=True)]
        for (low, high), point in zip(bounds, points, strict=True):
            assert low < point < high
            expected = 2 * 1.96 * math.sqrt(point * (1 - point) / samples)
            assert high - low == pytest.approx(expected, rel=0.15)
        widths.append(bounds[0][1] - bounds[0][0])
        for tolerance in (0.1, 5, 20, 100):
            cut = cut_at(accuracy, means, tolerance)
            assert cut.interval[0] <= cut.depth <= cut.interval[1]
            assert cut.difference_interval[0] <= cut.difference <= cut.difference_interval[1]
    assert widths[0] > 1.5 * widths[1] > 4 * widths[2]
    assert [interval(np.arange(1001), point) for point in (-1, 500, 1002)] == [(-1, 975), (25, 975), (25, 1002)]


def test_depths_are_resampled_together(rng: np.random.Generator) -> None:
    """Two depths that are right on the same samples do not differ, in any resample."""
    right = (rng.random(200) < 0.5).astype(float)
    accuracy = np.stack([np.zeros(200), right, right], axis=1)
    cut = cut_at(accuracy, resample(accuracy), 5)
    assert (cut.depth, cut.interval, cut.difference_interval) == (1, (1, 1), (0, 0))


def test_a_small_set_says_so(rng: np.random.Generator) -> None:
    """Also where its samples do not differ at all, or the cut-off is at full depth; a large clear one does not."""

    def at(accuracy: np.ndarray, tolerance: float) -> Any:
        return cut_at(accuracy, resample(accuracy), tolerance)

    certain = at(np.ones((5, 4)), 0.5)
    assert (certain.depth, certain.too_small, certain.samples_needed) == (0, True, 600)
    assert not at(np.ones((601, 4)), 0.5).too_small
    noisy = (rng.random((50, 4)) < [0.1, 0.5, 0.8, 0.9]).astype(float)
    assert at(noisy, 1).too_small
    assert at(noisy, 1).samples_needed > 1000
    assert at(noisy, 0).samples_needed is None
    clear = (rng.random((20_000, 1)) < [0.1, 0.5, 0.9, 0.9]).astype(float)
    assert (at(clear, 0.1).depth, at(clear, 0.1).interval, at(clear, 0.1).too_small) == (2, (2, 2), False)


def test_influence_and_scores_count_each_sample_once(twins: list[Path]) -> None:
    """As from the trunk's own readouts, in batches of another size, and of two ranks, one of which has a batch more."""
    cfg = read_config(twins[0])
    model = read_model(twins[0]).model
    whole = take_readings(model, build_evaluation(cfg), CPU, "whole")
    one, few = (
        cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"batch_size": size})}) for size in (1000, 150)
    )
    ((batch, _),) = build_evaluation(one)
    with torch.no_grad():
        readouts = list(model.trunk.readouts(model.embed(batch["images"])))
    cosines = [F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(readouts)]
    assert whole.influence == pytest.approx([1 - cosine for cosine in cosines], abs=1e-6)
    assert max(whole.influence) > 0.01
    parts = [take_readings(model, build_evaluation(few, rank, 2), CPU, "part") for rank in range(2)]
    assert [len(part.accuracy) for part in parts] == [247, 150]
    shared = [(247 * a + 150 * b) / 397 for a, b in zip(*(part.influence for part in parts), strict=True)]
    assert shared == pytest.approx(whole.influence, abs=1e-6)
    for name in ("accuracy", "loss"):
        first, second = (getattr(part, name) for part in parts)  # which take turns at batches of 150
        scores = np.concatenate([first[:150], second, first[150:]])
        assert scores == pytest.approx(getattr(whole, name), abs=1e-5)
    assert not model.head._forward_pre_hooks


def test_cuts(twins: list[Path], report: tuple, tmp_path: Path, digits: Path) -> None:
    """What is timed is the cut network; its bytes are its export's, whose curve is the run's up to the cut."""
    net = read_model(twins[0])
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        readouts = list(net.model.readouts(images))
        for depth in range(4):
            assert torch.equal(cut_copy(net.model, depth)(images)["logits"], readouts[depth])
    assert len(net.model.trunk.blocks) == 3

    numbers = report[1]["networks"][0]
    cost = numbers["costs"][-1]
    assert cost["depth"] == 3
    assert cost["saved"] == {"parameters": 0, "flops": 0, "bytes": 0}
    assert [each["batch"] for each in cost["times"]] == [1, 32]
    assert all(each["seconds"] > 0 and each["rounds"] >= 5 and each["speed_up"] == 1 for each in cost["times"])

    export = tmp_path / "export"
    convert(str(twins[0]), "safetensors", export, depth=2)
    with pytest.raises(UserError, match=r"--data"):
        depth_report([export])
    with pytest.raises(UserError, match=r"nowhere/index.json"):
        depth_report([export], data="nowhere")
    assert {path.name for path in export.iterdir()} == {"config.json", "model.safetensors"}
    printed = depth_report([export], data=f"{digits}/eval")
    assert "TensorBoard" not in printed
    (cut,) = read_json(export / "report" / "depth.json")["networks"]
    assert cut["accuracy"] == numbers["accuracy"][:3]
    assert (cut["depth"], cut["full_depth"], cut["kind"]) == (2, 3, "export")
    assert cut["costs"][-1]["bytes"] == (export / "model.safetensors").stat().st_size
    assert cut["measurements"] == []
    assert not {"gradient_norms", "config", "environment"} & cut.keys()
    assert "Gradients" not in (export / "report" / "report.html").read_text()


def test_other_data(twins: list[Path], tmp_path: Path, digits: Path) -> None:
    """In the place of a run's own; what is not a number is none in depth.json, which any JSON reader takes."""
    depth_report([twins[1]], tmp_path, data=f"{digits}/train")
    text = (tmp_path / "depth.json").read_text()
    (net,) = json.loads(text)["networks"]
    assert (net["samples"], net["data"]) == (1400, f"{digits}/train")
    assert "NaN" not in text
    assert finite({"a": [math.nan, (1, math.inf)], "b": 0.5}) == {"a": [None, [1, None]], "b": 0.5}


def test_a_run_that_is_still_training(one_rank: Callable, digits: Path, tmp_path: Path) -> None:
    """Its newest complete checkpoint, or the one that is named; a line that is just being written is not there yet."""
    data = [f"data.train={digits}/train", f"data.eval={digits}/eval", "checkpoint.every=5step"]
    cfg = small("ac_vit.toml", tmp_path, "going", *data)
    one_rank(run_until, cfg, 13)
    folder = tmp_path / "runs" / "going"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "grad_norm/blo')
    (folder / "checkpoints" / "step_00000099").mkdir()
    depth_report([folder, folder / "checkpoints" / "step_00000005"])
    now, before = read_json(folder / "report" / "depth.json")["networks"]
    assert [(now["name"], now["step"]), (before["name"], before["step"])] == [
        ("going", 10),
        ("going/step_00000005", 5),
    ]
    assert now["gradient_norms"]["steps"][-1] == 10
    assert now["loss"] != before["loss"]


def test_mistakes_leave_things_as_they_were(twins: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    gone = tmp_path / "gone"
    shutil.copytree(twins[0], gone)
    config = read_json(gone / "config.json")
    config["data"]["eval"] = str(tmp_path / "nothing")
    (gone / "config.json").write_text(json.dumps(config))
    file = tmp_path / "file"
    file.touch()
    cases: list[tuple[list[Path], Path, dict[str, Any], str]] = [
        ([tmp_path], out, {}, "no complete checkpoint and no export"),
        ([twins[0], tmp_path / "none"], out, {}, "none: holds no complete checkpoint"),
        ([gone], out, {}, "nothing/index.json: No such file"),
        ([twins[0], twins[0]], out, {}, "given twice"),
        ([twins[0]], out, {"tolerance": -1.0}, "--tolerance -1.0: must be 0 to 100"),
        ([twins[0]], out, {"tolerance": math.nan}, "--tolerance nan: must be"),
        ([twins[0]], file / "out", {}, "no folder that can be written to"),
    ]
    for folders, where, options, message in cases:
        with pytest.raises(UserError) as caught:
            depth_report(folders, where, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not where.exists()
    depth_report([twins[0]], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    (out / "report.html" / "x").touch()  # so that the last of the files cannot be put in its place
    with pytest.raises(UserError, match=r"--out"):
        depth_report([twins[0]], out)
    assert {path.name for path in out.iterdir()} == before.keys()


def test_one_line_and_code_2(tmp_path: Path) -> None:
    done = forked.command(ROOT / "tools" / "depth_report.py", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}: holds no complete checkpoint and no export\n"


def test_masked_language_model(one_rank: Callable, tmp_path: Path) -> None:
    """Accuracy on masked tokens, the loss beside the unigram loss; an export is masked as its run was."""
    pydoc, folder = TextSources(["pydoc"]), tmp_path / "pydoc"
    train_source_tokenizer(pydoc, 512, folder, eval_share=0.1, character_coverage=1.0)
    make_text_shards(pydoc, folder, folder, tokens=32, shard_size=1000)
    text = [f"data.train={folder}/train", f"data.eval={folder}/eval"]
    size = ["model.vocab_size=512", "model.max_tokens=32", "train.length=10step", "eval.every=10step"]
    overrides = [each for each in SMALL if "patch" not in each]
    cfg = load_config(
        ROOT / "configs/quickstart/ac_bert.toml", [f"run.dir={tmp_path}", "run.name=bert", *overrides, *size, *text]
    )
    one_rank(run, cfg)
    printed = depth_report([tmp_path / "bert"])
    (net,) = read_json(tmp_path / "bert" / "report" / "depth.json")["networks"]
    (last,) = [line for line in read_metrics(tmp_path / "bert") if "eval/loss" in line]
    assert net["accuracy"][-1] == pytest.approx(last["eval/accuracy"], abs=1e-7)
    assert net["loss"][-1] == pytest.approx(last["eval/loss"], abs=1e-5)
    assert (net["metric"], net["mask_ratio"]) == ("accuracy on masked tokens", 0.3)
    guess = ShardIndex.load(folder / "eval").info["unigram_loss"]
    sentence = f"masked-token loss {last['eval/loss']:.2f} nats, held out; by unigram frequency {guess:.2f}"
    assert f"bert: {sentence}" in printed
    assert sentence in (tmp_path / "bert" / "report" / "report.html").read_text()

    convert(str(tmp_path / "bert"), "safetensors", tmp_path / "export")
    depth_report([tmp_path / "export"], data=str(folder / "eval"))
    (exported,) = read_json(tmp_path / "export" / "report" / "depth.json")["networks"]
    assert (exported["mask_ratio"], exported["unigram_loss"]) == (0.3, guess)
    assert exported["accuracy"] == net["accuracy"]
    tokenizer = folder / "eval" / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    with pytest.raises(UserError, match="not the tokenizer that the network was trained with"):
        depth_report([tmp_path / "export"], data=str(folder / "eval"))
