"""Tasks one after another: what is seen when, what holds weights back, and that stopping changes nothing."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made import image_folder, png
from networks import mixer, same
from pydantic import ValidationError
from studied import setting, written
from test_models import randomize
from test_pretrain import measured, named, refused, run, run_until
from torch import Tensor, nn

from acn_scale.config import Config
from acn_scale.continual import ElasticWeights, Retention, SynapticIntelligence, fisher, read_retention
from acn_scale.convert import read_model
from acn_scale.data import build_evaluation, build_stream
from acn_scale.data.sequence import Turns, deal_classes
from acn_scale.models import build_model
from acn_scale.runs import run_folder
from acn_scale.studies import continual as study
from acn_scale.studies.study import Runs, per_cent

TASKS = {"continual": {"tasks": 5}}


def under(method: str, **keys: float) -> dict[str, dict]:
    return {"continual": {"tasks": 5, "method": method, **keys}}


@pytest.mark.parametrize(("steps", "tasks"), [(20, 5), (23, 5), (5, 5), (97, 20)])
def test_turns(steps: int, tasks: int) -> None:
    """Every task has an equal number of steps to within one, in a row, and ends once."""
    turns = Turns(steps, tasks)
    of = [turns.task(step) for step in range(steps)]
    assert of == sorted(of)
    assert {of.count(task) for task in range(tasks)} <= {steps // tasks, -(-steps // tasks)}
    assert [of.index(task) for task in range(tasks)] == [turns.start(task) for task in range(tasks)]
    ends = [step for step in range(1, steps + 1) if turns.ends(step)]
    assert ends == [turns.start(task) for task in range(1, tasks)] + [steps]


def test_classes_are_dealt_by_the_seed() -> None:
    dealt = [tuple(deal_classes(100, 20, seed)) for seed in range(5)]
    assert len(set(dealt)) == 5
    assert all(np.bincount(each).tolist() == [5] * 20 for each in dealt)


@pytest.mark.parametrize("method", ["naive", "replay"])
def test_what_a_task_sees(vit: Callable[..., Config], method: str) -> None:
    """Its own samples, each once in a pass; under replay every second is one of those kept of earlier tasks."""
    cfg = vit(train={"length": "300step"}, **under(method, memory=4))
    stream = build_stream(cfg)
    whole = stream.samples
    labels = whole.labels(range(len(whole.starts) and int(whole.starts[-1])))
    task_of, turns = deal_classes(10, 5, cfg.run.seed), Turns(300, 5)
    kept: dict[int, set[int]] = {}
    for task in range(5):
        steps = range(turns.start(task), turns.start(task) + 60)
        seen = np.array([sample for step in steps for sample in stream.samples_of(step)])
        if method == "replay" and task:
            seen, replayed = seen[::2], seen[1::2]
            for sample in replayed.tolist():
                assert task_of[labels[sample]] < task
                kept.setdefault(int(labels[sample]), set()).add(sample)
        mine = np.flatnonzero(task_of[labels] == task)
        for start in range(0, len(seen) - len(mine) + 1, len(mine)):
            assert sorted(seen[start : start + len(mine)].tolist()) == mine.tolist()
        assert set(seen.tolist()) == set(mine.tolist())
    if method == "replay":
        assert {len(samples) for samples in kept.values()} == {4}
        assert len(kept) == 8


def test_a_sample_that_cannot_be_read_is_replaced_within_its_task(vit: Callable[..., Config]) -> None:
    stream = build_stream(vit(train={"length": "90step"}, **TASKS))
    order, turns, task_of = stream.samples.order, Turns(90, 5), deal_classes(10, 5, 0)
    for position in (0, 287, 288, 289, 90 * 16 - 1):
        epoch, place = divmod(position, order.num_samples)
        others = order.replacements(epoch, place)
        found = [stream.samples.key(epoch * order.num_samples + next(others))[0].sample for _ in range(20)]
        assert set(task_of[stream.samples.labels(found)]) == {turns.task(position // 16)}


def test_a_sample_s_class_is_one_of_its_task_s() -> None:
    """In loss, gradient and score, as with a head for each task."""
    net = build_model(mixer(num_classes=6))
    randomize(net)
    net.tasks = torch.tensor([0, 1, 2, 0, 1, 2])
    images, labels = torch.randn(24, 3, 8, 8), torch.tensor([3, 4, 1] * 8)
    out = net(images, labels)
    mine = [[0, 3], [1, 4], [1, 4]] * 8
    alone = torch.stack([logits[own] for logits, own in zip(out["logits"], mine, strict=True)])
    places = torch.tensor([1, 1, 0] * 8)
    assert (out["logits"].argmax(dim=1) % 3 != labels % 3).any()  # some would be taken for another task's
    torch.testing.assert_close(out["loss"], F.cross_entropy(alone, places))
    out["loss"].backward()
    assert net.head.linear.weight.grad[[2, 5]].abs().sum() == 0
    assert net.head.linear.weight.grad[[0, 1, 3, 4]].abs().sum(dim=1).min() > 0
    assert net.score(out["logits"], images, labels)["accuracy"].tolist() == (alone.argmax(1) == places).tolist()


def test_accuracy_of_tasks(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """What the metrics say is what the final network does among each task's classes, and the summary is of them."""
    cfg = vit(train={"length": "40step", "log_every": "5step"}, **TASKS)
    one_rank(run, cfg)
    model = read_model(run_folder(cfg)).model.eval()
    batches = [batch for batch, _ in build_evaluation(cfg)]
    labels = torch.cat([batch["labels"] for batch in batches])
    with torch.no_grad():
        logits = torch.cat([model(batch["images"])["logits"] for batch in batches])
    task_of = torch.from_numpy(deal_classes(10, 5, 0))
    final = []
    for task in range(5):
        mine, classes = task_of[labels] == task, torch.nonzero(task_of == task).flatten()
        said = classes[logits[mine][:, classes].argmax(dim=1)]
        final.append((said == labels[mine]).float().mean().item())
    found = read_retention(run_folder(cfg))
    assert found.final == pytest.approx(final)
    lines = {line["step"]: line for line in measured(cfg) if "continual/task_04/accuracy" not in line}
    learnt = [line[f"continual/task_{step // 8 - 1:02d}/accuracy"] for step, line in lines.items()
              if any(name.startswith("continual") for name in line)]  # fmt: skip
    assert found.learnt == [*learnt, found.final[4]]
    assert found.accuracy == pytest.approx(np.mean(final))
    assert found.forgetting == pytest.approx(np.mean([one - other for one, other in zip(found.learnt, final)]))  # noqa: B905


@pytest.mark.parametrize("method", ["si", "ewc"])
def test_stopping_changes_nothing(two_ranks: Callable, vit: Callable[..., Config], method: str) -> None:
    """Bit for bit, killed within the fourth task, after a checkpoint right at the end of the third, on two ranks."""
    whole = vit(
        run={"name": "whole"}, train={"log_every": "1step"}, checkpoint={"every": "12step"},
        model={"dropout": 0.1}, data={"augment": "cifar"}, **under(method, strength=10.0),
    )  # fmt: skip
    broken = named(whole, "broken")
    two_ranks(run, whole)
    two_ranks(run_until, broken, 14)
    two_ranks(run, broken)
    assert measured(broken) == measured(whole)
    assert same(*(read_model(run_folder(each)) for each in (whole, broken)))


def test_strength(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """Without any the penalties change nothing, bit for bit; with a lot of it weights hardly leave the anchor."""
    weights = {}
    for name, method, strength in (
        ("naive", "naive", 1.0),
        ("si", "si", 0.0),
        ("ewc", "ewc", 0.0),
        ("held", "si", 1e6),
    ):
        cfg = vit(run={"name": name}, train={"log_every": "1step"}, **under(method, strength=strength))
        one_rank(run, cfg)
        weights[name] = read_model(run_folder(cfg)).weights()
        if not strength:
            assert measured(cfg) == measured(named(cfg, "naive"))
    assert any(not torch.equal(weights["held"][name], weights["naive"][name]) for name in weights["naive"])
    for name in ("si", "ewc"):
        assert all(torch.equal(weights[name][part], weights["naive"][part]) for part in weights["naive"])


class Small(nn.Module):
    """With a loss of its own for each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(images), labels)}


def batch(seed: int = 0, size: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)
    return {"images": images, "labels": labels}


def descend(net: Small, method: SynapticIntelligence, data: dict[str, Tensor], lr: float, steps: int) -> float:
    """By gradient descent, as the engine calls a method; returns how far the loss fell."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    first = net(**data)["loss"].item()
    for _ in range(steps):
        optimizer.zero_grad()
        net(**data)["loss"].backward()
        method.before_update()
        optimizer.step()
        method.after_update()
    return first - net(**data)["loss"].item()


def test_paths_add_up_to_the_fall_of_the_loss(vit: Callable[..., Config]) -> None:
    """Under a penalty too, whose gradient is none of the loss. Importance is a path by its squared way."""
    net, cfg = Small(), vit(**under("si", damping=1e-3))
    method = SynapticIntelligence(net, cfg)
    for data in (batch(0), batch(1)):
        starts = [weight.detach().clone() for weight in method.weights]
        before = [importance.clone() for importance in method.importance]
        fall = descend(net, method, data, lr=0.01, steps=300)
        assert fall > 0.1
        assert sum(path.sum().item() for path in method.path) == pytest.approx(fall, rel=0.02)
        paths = [path.clone() for path in method.path]
        method.end_task(())
        parts = zip(method.weights, starts, before, paths, method.importance, method.anchor, strict=True)
        for weight, start, old, path, importance, anchor in parts:
            way = weight.detach() - start
            torch.testing.assert_close(importance, old + path.clamp_min(0) / (way**2 + 1e-3))
            assert torch.equal(anchor, weight)
        assert all(path.abs().sum() == 0 for path in method.path)


def test_the_penalty_s_gradient(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """What is added to the gradients is that of the penalty: for EWC of one for each earlier task."""
    one_rank(check_penalties, vit(**under("si", strength=0.7)))


def check_penalties(cfg: Config) -> None:
    for kind in (SynapticIntelligence, ElasticWeights):
        net = Small()
        method = kind(net, cfg)
        squares = []
        for seed in range(3):
            with torch.no_grad():
                for weight in method.weights:
                    weight.add_(torch.randn(weight.shape) / 3)
            data = batch(seed)
            counts = torch.arange(12) < 11
            net.zero_grad()
            net(**data)["loss"].backward()
            if kind is SynapticIntelligence:
                method.before_update()
                method.after_update()
            method.end_task([(data, counts)])
            anchors = [weight.detach().clone() for weight in method.weights]
            if kind is ElasticWeights:
                information = by_sample(net, {name: values[:11] for name, values in data.items()})
                for one, other in zip(fisher(net, [(data, counts)]), information, strict=True):
                    torch.testing.assert_close(one, other)
                squares.append(([each / 2 for each in information], anchors))
        if kind is SynapticIntelligence:
            squares = [(method.importance, anchors)]
        with torch.no_grad():
            for weight in method.weights:
                weight.add_(torch.randn(weight.shape) / 3)
        total = sum(
            0.7 * (factor * (weight - anchor) ** 2).sum()
            for factors, places in squares
            for factor, weight, anchor in zip(factors, method.weights, places, strict=True)
        )
        expected = torch.autograd.grad(total, method.weights)
        for weight in method.weights:
            weight.grad = torch.zeros_like(weight)
        method.before_update()
        for weight, gradient in zip(method.weights, expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


def by_sample(net: Small, data: dict[str, Tensor]) -> list[Tensor]:
    squares = [torch.zeros_like(weight) for weight in net.parameters()]
    for sample in range(len(data["labels"])):
        loss = net(**{name: values[sample : sample + 1] for name, values in data.items()})["loss"]
        for square, gradient in zip(squares, torch.autograd.grad(loss, [*net.parameters()]), strict=True):
            square += gradient**2 / len(data["labels"])
    return squares


def test_mistakes(one_rank: Callable, vit: Callable[..., Config]) -> None:
    for section, keys, message in (
        ("continual", {"tasks": 3}, "continual.tasks = 3: model.num_classes = 10"),
        ("continual", {"tasks": 10}, "continual.tasks = 10: model.num_classes = 10"),
        ("continual", {"tasks": 1, "method": "si"}, "continual.method = si: continual.tasks must be 2 or more"),
        ("train", {"zero_stage": 1}, "train.zero_stage = 1: continual.tasks = 5 takes 0"),
        ("data", {"mixup": 0.2}, "data.mixup = 0.2"),
    ):
        with pytest.raises(ValidationError, match=message):
            vit(**TASKS | {section: keys})
    assert "train.length = 4step: 4 steps for 5 tasks" in one_rank(refused, vit(train={"length": "4step"}, **TASKS))[0]


def test_a_task_without_samples(one_rank: Callable, vit: Callable[..., Config], tmp_path: Path) -> None:
    """To evaluate, or to train on."""
    one = image_folder(tmp_path / "one", [[(png(), "1")] * 4])
    for split in ("train", "eval"):
        said = one_rank(refused, vit(run={"name": split}, data={split: str(one)}, **TASKS))[0]
        assert re.fullmatch(rf"continual.tasks = 5: {one} has no samples of task \d", said)


def test_seeds_that_are_equal_have_a_picture() -> None:
    """Their mean, rounded, can be another number than they are."""
    accuracy = 45 / 397
    assert fmean([100 * accuracy] * 3) != 100 * accuracy
    study._figure({"acn-naive-5": [Retention([accuracy], [accuracy])] * 3})


def test_what_the_study_says(tmp_path: Path) -> None:
    """The table is of the runs; of forgetting, whether the ACN's is less or not."""
    here, (first, second) = setting(tmp_path, 0, 1), ("continual/task_00/accuracy", "continual/task_01/accuracy")

    def runs(name: str, learnt: list[float], final: list[float]) -> Runs:
        lines = [{"step": 1, first: learnt[0]}, {"step": 2, first: final[0], second: learnt[1]}]
        return written(here, name, lines, lines)

    less, more = ([0.9, 0.8], [0.7, 0.8]), ([0.9, 0.9], [0.5, 0.9])
    kept = {"acn-si-15": less, "residual-si-15": more, "acn-naive-15": more, "residual-naive-15": less}
    named = {name: runs(name, *each) for name, each in kept.items()}
    found = study.findings(named, here)
    rows = {"-".join(row[:3]): row[3:] for row in found.table[1:]}
    assert rows["acn-si-15"] == ["75.0 ± 0.0", "10.0 ± 0.0", "85.0 ± 0.0", "46.2 ± 0.8", "32 ± 1.8"]
    assert rows["residual-naive-15"][1] == per_cent([0.1, 0.1])
    assert "si at L = 15: the ACN forgets less than its twin on 2 of 2 seeds, 10.0 points less" in found.sentences[0]
    assert "5.0 points lower" in found.sentences[0]
    assert "naive at L = 15: the ACN forgets less than its twin on 0 of 2 seeds, 10.0 points more" in found.sentences[1]
    found = study.findings(named, here.model_copy(update={"scale": "paper"}))
    assert found.sentences[-1].startswith("Nor does the paper state these: the learning rate is constant")
