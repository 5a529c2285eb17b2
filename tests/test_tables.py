"""Tables of the results of many runs: over seeds and settings, networks against one another, under noise."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from acn_scale.config import Config
from acn_scale.data.image_noise import PAPER
from acn_scale.downstream.noise_table import PUBLISHED, noise_table
from acn_scale.downstream.table import paired, results_table
from acn_scale.errors import UserError
from acn_scale.results import Measurement, read_measurements, write_measurements
from acn_scale.runs import write_json


def lines_of(
    task: str, curve: Sequence[float], *, seed: int | None = None, checkpoint: str = "a", metric: str = "accuracy"
) -> list[Measurement]:
    """Of one run, at every depth."""
    return [
        Measurement(task=task, metric=metric, value=value, depth=depth, checkpoint=checkpoint, seed=seed)
        for depth, value in enumerate(curve)
    ]


def write(run: Path, task: str, curve: Sequence[float], **keys: object) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_measurements(run, task, lines_of(task, curve, **keys))


def results(folder: Path, runs: Sequence[tuple[int | None, Sequence[float]]]) -> Path:
    """A network's folder of evaluated runs, each with its seed and its accuracy at every depth."""
    for number, (seed, curve) in enumerate(runs):
        write(folder / f"run{number}", "rte", curve, seed=seed)
    return folder


def rows_of(*folders: Path) -> list[dict[str, str]]:
    """The table's lines."""
    path = folders[0].parent / "table.csv"
    results_table(folders, table=path)
    with path.open() as file:
        return list(csv.DictReader(file))


def test_results_over_seeds(tmp_path: Path) -> None:
    """Mean, deviation and the paired test are numpy's and scipy's; what failed is named."""
    scores = {"acn": [[0.5, 0.90, 0.902], [0.5, 0.80, 0.802]], "twin": [[0.5, 0.6, 0.85], [0.5, 0.6, 0.81]]}
    folders = [results(tmp_path / network, list(enumerate(curves))) for network, curves in scores.items()]
    for name, jobs in (("run2", None), ("run3", ""), ("run4", '{"code": 1, "reason": "no memory"}\n{"code')):
        (folders[1] / name / "jobs").mkdir(parents=True)
        (folders[1] / name / "environment.json").write_text("{}")
        if jobs is not None:
            (folders[1] / name / "jobs/ends.jsonl").write_text(jobs)
    text = results_table(folders)
    acn, twin = rows_of(*folders)
    last = {name: [curve[-1] for curve in curves] for name, curves in scores.items()}
    assert float(acn["mean"]) == pytest.approx(100 * np.mean(last["acn"]))
    assert float(acn["deviation"]) == pytest.approx(100 * np.std(last["acn"], ddof=1))
    assert (acn["cutoff"], twin["cutoff"], acn["p"]) == ("1", "2", "")
    assert float(twin["p"]) == pytest.approx(stats.ttest_rel(last["twin"], last["acn"]).pvalue)
    reasons = {"run2": "not finished, or not evaluated", "run3": "not finished, or not evaluated", "run4": "no memory"}
    assert [line for line in text.splitlines() if line.startswith("failed: ")] == [
        f"failed: {tmp_path}/twin/{name}: {reason}" for name, reason in reasons.items()
    ]
    with pytest.raises(UserError, match="holds no results"):
        results_table([folders[0] / "run0/eval"])


def test_a_constant_difference_has_no_deviation_to_test_by() -> None:
    """As of two seeds that differ by one sample each, which prove nothing."""
    assert paired([(0.5, 0.4)]) is None
    assert paired([(0.60, 0.61), (0.62, 0.63)]) is None
    assert paired([(0.60, 0.60), (0.62, 0.62)]) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "tested"),
    [
        ([None, None, None], [None, None, None], False),
        ([0, 0, 1], [0, 1, 2], False),
        ([0, 1, 2], [1, 1, 2], False),
        ([0, 1, 2], [None, 1, 2], True),
    ],
)
def test_only_what_has_one_seed_is_paired(
    tmp_path: Path, ours: list[int | None], theirs: list[int | None], tested: bool
) -> None:
    """Exports have none, and of runs of one seed it is not known which goes with which."""
    first = results(tmp_path / "acn", [(seed, [0.5, 0.80 + place / 50]) for place, seed in enumerate(ours)])
    second = results(tmp_path / "twin", [(seed, [0.5, 0.70 + place / 90]) for place, seed in enumerate(theirs)])
    assert (rows_of(first, second)[1]["p"] != "") == tested


def test_means_are_not_measured_again(tmp_path: Path) -> None:
    """Written into a run below the folders, into one that has no results as well, they change no later table."""
    folder = results(tmp_path / "acn", [(seed, [0.5, 0.8, 0.802 + seed / 1000]) for seed in range(3)])
    (folder / "run9").mkdir()
    (folder / "run9/environment.json").write_text("{}")
    before = results_table([folder])
    for into in ("run0", "run9"):
        assert results_table([folder], into=folder / into) == results_table([folder]) == before
        found = read_measurements(folder / into, means=True)
        (mean,) = [each for each in found if each.mean_of]
        assert (mean.mean_of, mean.note) == (3, "acn: mean of 3 seeds; 80.00 at its cut-off, 1 of 2")


def test_networks_of_several_depths_have_a_mean_and_no_cut_off(tmp_path: Path) -> None:
    """As after cut_while_training: what is at a depth of one is not there in the other."""
    folder = results(tmp_path / "acn", [(0, [0.5, 0.8, 0.9]), (1, [0.5, 0.7])])
    (row,) = rows_of(folder)
    assert float(row["mean"]) == pytest.approx(80)
    assert (row["cutoff"], row["blocks"], row["mean_there"], row["note"]) == ("", "", "", "networks of 1 and 2 blocks")
    text = results_table([folder], into=folder / "run0")
    assert "networks of 1 and 2 blocks" in text
    assert [each.depth for each in read_measurements(folder / "run0", means=True) if each.mean_of] == [None]


def test_lower_is_better_of_mce(tmp_path: Path) -> None:
    """The best of its seeds, and the depth from which it is as low as at the end."""
    for seed, curve in enumerate([[1.0, 0.70, 0.60, 0.604], [1.0, 0.80, 0.70, 0.702]]):
        write(tmp_path / "acn" / str(seed), "imagenet+corruptions", curve, seed=seed, metric="mCE")
    (row,) = rows_of(tmp_path / "acn")
    assert (float(row["best"]), row["cutoff"]) == (pytest.approx(60.4), "2")


def run_of(folder: Path, cfg: Config, **sections: dict[str, object]) -> Path:
    """The folder of a run with this config; its name is that of what is special about it."""
    name = "-".join(f"{key}={value}" for section in sections.values() for key, value in section.items())
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").touch()
    values = json.loads(cfg.model_dump_json())
    values |= {section: values[section] | keys for section, keys in sections.items()}
    write_json(folder / name / "config.json", values)
    return folder / name


@pytest.mark.parametrize(
    ("section", "key", "values"),
    [("optim", "lr", (1e-3, 2e-3)), ("model", "dropout", (0.0, 0.3)), ("train", "global_batch_size", (16, 32))],
)
def test_a_network_of_a_grid_counts_by_its_best_settings(
    vit: Callable[..., Config], tmp_path: Path, section: str, key: str, values: tuple[float, float]
) -> None:
    """Whatever was tried; on noisy data, by what is best on clean: no network has the highest of both."""
    clean, noisy = ((0.5, 0.52), (0.3, 0.32)), ((0.1, 0.12), (0.2, 0.22))
    for place, value in enumerate(values):
        for seed in (0, 1):
            run = run_of(tmp_path / "grid", vit(), **{section: {key: value}, "run": {"seed": seed}})
            write(run, "cola", [0.1, clean[place][seed]], seed=seed)
            write(run, "cola+swap_0.1", [0.1, noisy[place][seed]], seed=seed)
    best, noised = sorted(rows_of(tmp_path / "grid"), key=lambda row: row["task"])
    assert (best["seeds"], float(best["mean"])) == ("2", pytest.approx(51))
    assert best["settings"] == noised["settings"] == f"{key}={values[0]} (best of 2)"
    assert float(noised["mean"]) == pytest.approx(11)


def test_what_does_not_change_a_run_is_no_setting(vit: Callable[..., Config], tmp_path: Path) -> None:
    """A run that went on with another micro batch is a seed like the others, and so is one that began elsewhere."""
    for seed, value in enumerate((0.50, 0.52, 0.60)):
        train = {"micro_batch_size": 4 + seed, "zero_stage": seed, "init_from": f"runs/mlm/seed={seed}"}
        write(run_of(tmp_path / "acn", vit(), run={"seed": seed}, train=train), "rte", [0.1, value], seed=seed)
    (row,) = rows_of(tmp_path / "acn")
    assert (row["seeds"], float(row["mean"]), row["settings"]) == ("3", pytest.approx(54), "")


def test_files_for_the_server_are_those_of_the_best_runs(tmp_path: Path) -> None:
    """Of each task; one that the server would refuse is named with its line."""
    for seed, value in enumerate((0.5, 0.7, 0.6)):
        for task in ("rte", "mnli", "stsb"):
            write(tmp_path / f"x/{task}/{seed}", task, [0.1, value], seed=seed, metric="accuracy")
        rows = {"rte/{}/RTE": "not_entailment", "stsb/{}/STS-B": f"{seed}.125"}
        rows |= {f"mnli/{{}}/{name}": "neutral" for name in ("MNLI-m", "MNLI-mm", "AX")}
        for place, said in rows.items():
            path = (tmp_path / "x" / place.format(seed)).with_suffix(".tsv")
            path = path.parent / "submission" / path.name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"index\tprediction\n0\t{said}\n1\t{said}\n")
    predictions = tmp_path / "x/stsb/1/eval/predictions/stsb_test.tsv"
    predictions.parent.mkdir()
    predictions.write_text("sample\tprediction\n0\t1.0\n1\t1.0\n")
    text = results_table([tmp_path / "x"], submission=tmp_path / "out")
    lacking = "CoLA.tsv, SST-2.tsv, MRPC.tsv, QQP.tsv, QNLI.tsv, WNLI.tsv"
    assert f"{tmp_path}/out: 5 files for the GLUE server, which wants all: lacking {lacking}." in text
    names = ["AX", "MNLI-m", "MNLI-mm", "RTE", "STS-B"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.tsv" for name in names]
    assert "1.125" in (tmp_path / "out/STS-B.tsv").read_text()
    for file, content, message in (
        (
            "stsb/1/submission/STS-B.tsv",
            "index\tprediction\n0\t5.5\n",
            "STS-B.tsv:2: prediction '5.5': must be a num",
        ),
        ("rte/1/submission/RTE.tsv", "index\tprediction\n1\tentailment\n", "RTE.tsv:2: index '1': must be 0, the rows"),
        ("rte/1/submission/RTE.tsv", "", r"RTE.tsv:1: \[\]: must be \['index', 'prediction'\]"),
        ("stsb/1/submission/STS-B.tsv", "index\tprediction\n0\t5.0\n", "STS-B.tsv: 1 predictions, must be 2, as "),
        ("rte/1/submission/RTE.tsv", "index\tlabel\n", r"RTE.tsv:1: .*: must be \['index', 'prediction'\]"),
        (
            "mnli/1/submission/AX.tsv",
            "index\tprediction\n0\tno\n",
            "AX.tsv:2: prediction 'no': must be entailment",
        ),
    ):
        whole = (tmp_path / "x" / file).read_text()
        (tmp_path / "x" / file).write_text(content)
        with pytest.raises(UserError, match=message):
            results_table([tmp_path / "x"], submission=tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        (tmp_path / "x" / file).write_text(whole)


def test_published_rows_stand_beside_ours(tmp_path: Path) -> None:
    """After the last network of a task that the paper has."""
    for name in ("acn", "twin"):
        for task in ("rte", "sst2"):
            write(tmp_path / name / task, task, [0.5, 0.8])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in results_table([tmp_path / "acn", tmp_path / "twin"]).splitlines() if "|" in line]  # fmt: skip
    assert {len(row) for row in rows} == {11}
    names = [(row[0], row[1]) for row in rows[2:]]
    ours = [(task, name) for task in ("rte", "sst2") for name in ("acn", "twin")]
    assert names == [*ours, ("sst2", "Res-BERT, published"), ("sst2", "AC-BERT, published")]
    residual, acn = rows[-2:]
    assert (residual[4], acn[4], acn[7:9]) == ("86.63 ± 0.09", "", ["3 of 12", "86.68 ± 0.06"])


def test_noise_table(tmp_path: Path) -> None:
    """A row at full depth and one at the cut-off; what was measured on other weights is not shown. Means over runs that
    another table has left there are no measurement."""
    for name in ("ac", "twin"):
        write(tmp_path / name, "birds", [0.1, 0.599, 0.6])
    for place, noise in enumerate(PAPER):
        curve = [0.05, 0.5 - place / 100, 0.4 - place / 100]
        write(tmp_path / "ac", f"birds+{noise}", curve)
        write(tmp_path / "twin", f"birds+{noise}", curve, checkpoint="a" if place else "b")
    text = noise_table([tmp_path / "ac", tmp_path / "twin"])
    rows = [line.split("  ") for line in text.splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows if len(row) > 6}
    assert cells["ac, 2 of 2 blocks"] == ["60.00", "40.00", "39.00", "38.00", "37.00", "36.00", "35.00"]
    assert cells["ac, 1 of 2 blocks"] == ["59.90", "50.00", "49.00", "48.00", "47.00", "46.00", "45.00"]
    assert cells["twin, 2 of 2 blocks"][1:3] == ["-", "39.00"]
    assert cells["AC-ViT, published"] == [f"{value:.2f}" for value in PUBLISHED["AC-ViT, published"]]
    results_table([tmp_path / "ac", tmp_path / "twin"], into=tmp_path / "ac")
    assert noise_table([tmp_path / "ac", tmp_path / "twin"]) == text
    with pytest.raises(UserError, match="holds no results under the paper's noise"):
        noise_table([tmp_path])
