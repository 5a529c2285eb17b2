"""Early exit: each sample as if it were alone, the trade-off as it then is, and training for it that can be resumed."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.nn.functional as F
from test_models import batch_for, bert, every_network, mixer, randomize
from test_models import vit as build_vit
from test_pretrain import measured, named, run, run_until
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acn_scale import curriculum
from acn_scale.config import BertConfig, Config, EarlyExitConfig, MixerConfig, TextDataConfig, ViTConfig
from acn_scale.convert.sources import read_model
from acn_scale.curriculum import drop_rates, loss_weights
from acn_scale.data import build_evaluation, build_stream
from acn_scale.depth import cost, exit_flops
from acn_scale.durations import Horizon
from acn_scale.early_exit import (
    CRITERIA,
    EarlyExit,
    cheapest,
    confidence,
    entropy,
    point,
    take_readings,
    tradeoff,
)
from acn_scale.errors import UserError
from acn_scale.evaluation import evaluate_run
from acn_scale.models import build_model
from acn_scale.optim import build_optimizer, learning_rate
from acn_scale.runs import read_metrics, run_folder, write_json

SAMPLES = 24
TOOL = Path(__file__).parents[1] / "tools/evaluate.py"


def classifier(build: Callable[..., nn.Module], **keys: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """With weights that make samples leave at different depths, and a batch, of BERT with padding."""
    torch.manual_seed(0)
    keys |= {"pool": "mean"} if build is build_vit else {}  # at depth 0 a class token is the same for all samples
    model = build(**({"num_classes": 5} | keys)).eval()
    randomize(model)
    batch = [batch_for(model) for _ in range(SAMPLES // 4)]
    batch = {name: torch.cat([part[name] for part in batch]) for name in batch[0] if name not in ("labels", "masked")}
    return model, batch


every_classifier = pytest.mark.parametrize("build", [build_vit, mixer, bert])
every_criterion = pytest.mark.parametrize("criterion", CRITERIA)


def middle(model: nn.Module, batch: dict[str, Tensor], criterion: str) -> float:
    """A threshold between two measured values, which about half of the samples meet at depth 0."""
    with torch.no_grad():
        values = CRITERIA[criterion].measure(next(model.readouts(**batch))).sort()[0]
    half = len(values) // 2
    gap = (values[half - 9 : half + 10] - values[half - 10 : half + 9]).argmax() + half - 10
    return float(values[gap : gap + 2].mean())


def test_what_the_criteria_measure() -> None:
    even, sure = torch.zeros(1, 8), torch.tensor([[100.0, 0, 0, 0]])
    assert (entropy(even).item(), confidence(even).item()) == pytest.approx((1.0, 1 / 8))
    assert (entropy(sure).item(), confidence(sure).item()) == pytest.approx((0.0, 1.0))
    coin = torch.tensor([[0.0, 0.0, -1000.0, -1000.0]])
    assert entropy(coin).item() == pytest.approx(0.5), "ln 2 / ln 4"


@every_network
def test_each_sample_leaves_at_its_first_sure_depth(build: partial) -> None:
    """With the readout of that depth, whatever the batch and its order; the extremes are full depth and depth 0."""
    model, batch = classifier(build.func, **build.keywords)
    with torch.no_grad():
        readouts = torch.stack(list(model.readouts(**batch)), dim=1)
        full = model(**batch)["logits"]
    for criterion, never, always in (("entropy", 0.0, 1.1), ("confidence", 1.0, 0.0)):
        logits, depths = EarlyExit(model, never, criterion)(**batch)
        torch.testing.assert_close(logits, full)
        assert depths.tolist() == [3] * SAMPLES
        logits, depths = EarlyExit(model, always, criterion)(**batch)
        assert torch.equal(logits, readouts[:, 0])
        assert depths.tolist() == [0] * SAMPLES

        threshold = middle(model, batch, criterion)
        early = EarlyExit(model, threshold, criterion)
        sure = CRITERIA[criterion].meets(CRITERIA[criterion].measure(readouts), threshold).tolist()
        expected = [next((depth for depth in range(3) if row[depth]), 3) for row in sure]
        logits, depths = early(**batch)
        assert depths.tolist() == expected
        assert len(set(expected)) > 1, "all samples leave at the same depth: this says little"
        torch.testing.assert_close(logits, readouts[torch.arange(SAMPLES), depths])
        order = torch.randperm(SAMPLES)
        other, elsewhere = early(**{name: values[order] for name, values in batch.items()})
        assert torch.equal(elsewhere, depths[order])
        torch.testing.assert_close(other, logits[order])
        alone = [early(**{name: values[[row]] for name, values in batch.items()}) for row in range(SAMPLES)]
        assert torch.equal(torch.cat([depth for _, depth in alone]), depths)
        torch.testing.assert_close(torch.cat([each for each, _ in alone]), logits)


def test_no_early_exit_of_a_masked_language_model() -> None:
    with pytest.raises(ValueError, match="takes a classifier"):
        EarlyExit(bert(), 0.5)


SHAPE = {"connectivity": "acn", "depth": 3, "dim": 16}
IMAGE = SHAPE | {"image_size": 8, "patch_size": 4, "num_classes": 5}
CONFIGS = [
    ViTConfig(name="vit", num_heads=2, pool="mean", **IMAGE),
    MixerConfig(name="mixer", token_dim=6, channel_dim=20, **IMAGE),
    BertConfig(name="bert", vocab_size=30, max_tokens=7, num_heads=2, num_classes=5, **SHAPE),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
def test_operations_are_those_of_the_blocks_and_heads_that_ran(cfg: Any) -> None:
    """Counted in a real run, in which samples leave the batch."""
    build = {"vit": build_vit, "mixer": mixer, "bert": bert}[cfg.name]
    model, batch = classifier(build)
    flops = exit_flops(cfg)
    early = EarlyExit(model, middle(model, batch, "entropy"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own is not counted
        _, depths = early(**batch)
    assert counter.get_total_flops() == sum(flops[depth] for depth in depths)
    assert 0 < depths.double().mean() < 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(torch.zeros(1, 5, 16))
    heads = counter.get_total_flops()
    left_out = (
        6 * (2 * 9 * 16 * 16 + 2 * 2 * 7 * 16) if cfg.name == "bert" else 0
    )  # by a cut one: all tokens but the first
    assert flops == [cost(cfg, depth).flops + depth * heads + left_out * (depth > 0) for depth in range(4)]


@every_criterion
def test_the_curve_is_what_early_exit_does(vit: Callable[..., Config], criterion: str) -> None:
    """Accuracy, depth and operations of one pass's readings equal those of running with each threshold."""
    cfg = vit(eval={"batch_size": 50})
    torch.manual_seed(1)
    model = build_model(cfg.model).eval()
    randomize(model)
    evaluation, flops = build_evaluation(cfg), exit_flops(cfg.model)
    readings = take_readings(model, evaluation, criterion, torch.device("cpu"))
    odd = [(batch, torch.arange(len(counts)) % 2 == 1) for batch, counts in evaluation]
    fewer = take_readings(model, odd, criterion, torch.device("cpu"))
    rows = torch.cat([counts for _, counts in odd])
    assert torch.equal(fewer.measured, readings.measured[rows])
    assert torch.equal(fewer.correct, readings.correct[rows])

    curve = tradeoff(readings, flops, points=7)
    assert [each.flops for each in curve] == sorted((each.flops for each in curve), reverse=True)
    assert curve[0].depth == cfg.model.depth
    assert curve[0].accuracy == readings.correct[:, -1].mean()
    for at in (curve[2], curve[4], point(readings, flops, 0.6)):
        early, right, depths = EarlyExit(model, at.threshold, criterion), [], []
        for batch, counts in evaluation:
            labels = batch.pop("labels")
            logits, left = early(**batch)
            right.append((logits.argmax(dim=1) == labels)[counts])
            depths.append(left[counts])
        assert at.accuracy == pytest.approx(torch.cat(right).double().mean().item(), abs=0.006)
        assert at.depth == pytest.approx(torch.cat(depths).double().mean().item(), abs=0.01)
        assert at.flops == pytest.approx(sum(flops[depth] for depth in torch.cat(depths)) / 397, rel=0.01)
    worse = [replace(at, accuracy=0.9 - 0.001 * number) for number, at in enumerate(curve)]
    assert cheapest(worse, 0.9, 0.3) == worse[3]


def test_evaluate_a_run(one_rank: Callable, vit: Callable[..., Config], tmp_path: Path) -> None:
    """Its readouts are those that the run itself measured at its end; picture and numbers are written."""
    cfg = vit(model={"depth": 2})
    one_rank(run, cfg)
    folder = run_folder(cfg)
    out = tmp_path / "numbers.json"
    done = forked.command(TOOL, folder, "--criterion", "confidence", "--json", out, "eval.batch_size=30")
    assert done.returncode == 0, done.stderr
    assert "full depth" in done.stdout
    numbers = json.loads(out.read_text())
    last = [line for line in read_metrics(folder) if "eval/loss" in line][-1]
    assert numbers["accuracy_by_depth"] == pytest.approx(
        [last[f"eval/depth_{depth:02d}/accuracy"] for depth in (0, 1, 2)]
    )
    assert numbers["full_depth"]["flops"] == cost(cfg.model, 2).flops
    assert numbers["early_exit"]["accuracy"] >= numbers["full_depth"]["accuracy"] - 0.005 - 1e-9
    assert (folder / "report/early_exit.png").read_bytes().startswith(b"\x89PNG")
    assert "confidence > 0.5 " in evaluate_run(folder, threshold=0.5, criterion="confidence")
    for overrides, message in ((["model.dim=32"], "keys of model"), (["data.eval=nowhere"], "nowhere/index.json")):
        with pytest.raises(UserError, match=message):
            evaluate_run(folder, overrides=overrides)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        evaluate_run(folder, json=tmp_path / "nowhere/numbers.json")


def test_what_cannot_be_evaluated(vit: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/config.json: No such file"):
        evaluate_run(tmp_path / "nowhere")
    data = TextDataConfig(kind="text", train="a", eval="b")
    language = vit().model_copy(update={"model": CONFIGS[2].model_copy(update={"num_classes": 0}), "data": data})
    for name, cfg in (("language", language), ("new", vit())):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", cfg.model_dump(mode="json"))
    with pytest.raises(UserError, match="num_classes = 0: early exit takes a classifier"):
        evaluate_run(tmp_path / "language")
    with pytest.raises(UserError, match="new"):
        evaluate_run(tmp_path / "new")


def test_weights_of_the_losses_are_those_of_the_papers() -> None:
    assert loss_weights(EarlyExitConfig(), 4, 0, 9) == ()
    for losses in ("all", "rotational", "gradual"):  # of one block, which is what dead ones may leave
        assert loss_weights(EarlyExitConfig(losses=losses), 1, 0, 9) == (1.0,)
    assert loss_weights(EarlyExitConfig(losses="all"), 3, 0, 9) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    depth, steps, scale = 6, 1200, 0.2
    e = [scale * sum(range(block + 1)) for block in range(depth - 1)] + [5 + scale * sum(range(depth - 1))]
    for losses in ("rotational", "gradual"):
        cfg = EarlyExitConfig(losses=losses, scale=scale, rotation=3)
        for step in range(0, steps, 7):
            if losses == "rotational":
                on = {(first + step) % depth for first in (0, 3)} | {5}
            else:
                on = set(range(max(0, 5 - step // 100), 6))  # one more every 1200 / (2 * 6) steps
            total = sum(e[block] for block in on)
            expected = [e[block] / total if block in on else 0.0 for block in range(depth)]
            assert loss_weights(cfg, depth, step, steps) == pytest.approx(expected)


def test_layer_dropout_grows_with_depth_and_step() -> None:
    cfg = EarlyExitConfig(layer_dropout=0.4)
    assert drop_rates(EarlyExitConfig(), 3, 5, 9) == ()
    assert drop_rates(cfg, 3, 0, 9) == (0, 0, 0)
    assert drop_rates(cfg, 3, 8, 9) == pytest.approx([0, 0.4 * (2**0.5 - 1), 0.4])
    assert drop_rates(cfg, 3, 4, 9) == pytest.approx([0, 0.4 * (2**0.5 - 1) ** 2, 0.4 * (2**0.5 - 1)])
    assert drop_rates(cfg, 3, 0, 1) == (0, 0, 0)


@pytest.mark.parametrize("inner", ["feedforward", "through"])
def test_an_acn_that_begins_as_a_residual_network(vit: Callable[..., Config], inner: str) -> None:
    """Is at first just that, and at last just an ACN; a ramp in between, for evaluations too."""
    cfg = vit(model={"inner": inner}, train={"anneal": "8step"})
    model = build_model(cfg.model).eval()
    batch = batch_for(model)
    horizon = Horizon(1400, 16, 20)
    for step, connectivity in ((0, "residual"), (8, "acn"), (19, "acn")):
        limit = build_model(vit(model={"connectivity": connectivity, "inner": inner}).model).eval()
        limit.load_state_dict(model.state_dict())
        curriculum.apply(cfg, model, step, horizon)
        assert torch.equal(model(**batch)["logits"], limit(**batch)["logits"])
    assert [curriculum.short_share(8, step) for step in (0, 2, 7, 8, 19)] == [1.0, 0.75, 0.125, 0.0, 0.0]
    assert curriculum.short_share(0, 0) == 0


@pytest.mark.parametrize("build", [build_vit, mixer, bert])
@pytest.mark.parametrize("connectivity", ["acn", "residual"])
def test_the_loss_is_the_sum_over_the_readouts(build: Callable, connectivity: str) -> None:
    """With the same gradient; the head is not run where the weight is 0; in eval() the loss is that of full depth."""
    model = build(connectivity=connectivity)
    batch = batch_for(model)
    model.loss_weights = (0.25, 0.0, 0.75)
    got = model(**batch)
    readouts = list(model.readouts(**batch))
    losses = [F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten()) for logits in readouts]
    expected = 0.25 * losses[1] + 0.75 * losses[3]
    torch.testing.assert_close(got["loss"], expected)
    torch.testing.assert_close(got["logits"], readouts[3])
    for mine, right in zip(*(torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
                             for loss in (got["loss"], expected)), strict=True):  # fmt: skip
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine, right)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    model(**batch)
    assert len(calls) == 2
    torch.testing.assert_close(model.eval()(**batch)["loss"], losses[3])


PASSING = [
    {"connectivity": "residual"},
    {"connectivity": "residual", "inner": "feedforward"},
    {"connectivity": "highway"},
    {"connectivity": "rezero"},
]


@pytest.mark.parametrize("keys", PASSING, ids=str)
@pytest.mark.parametrize("build", [build_vit, mixer, bert])
def test_a_dropped_block_is_as_if_it_were_not_there(build: Callable, keys: dict[str, str]) -> None:
    """For the samples it is dropped for, about as many as its rate says; in eval() for none."""
    torch.manual_seed(0)
    model = build(**keys)
    randomize(model)
    trunk, x = model.trunk, torch.randn(400, 7 if build is bert else model.embed.num_tokens, 16)
    whole = trunk(x)
    trunk.drop_rates = (0.0, 0.3, 0.0)
    got = trunk(x)
    assert torch.equal(trunk.eval()(x), whole)
    trunk.train()
    del trunk.blocks[1], trunk.joins[1]
    trunk.drop_rates = ()
    without = trunk(x)
    kept, dropped = (torch.isclose(got, each, atol=1e-5).flatten(1).all(dim=1) for each in (whole, without))
    assert (kept ^ dropped).all()
    assert 0.2 < dropped.double().mean() < 0.4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"early_exit": {"layer_dropout": 0.1}},
            "early_exit.layer_dropout = 0.1: model.connectivity must be one of res",
        ),
        ({"early_exit": {"losses": "all"}, "model": {"depth": 1}}, "model.depth = 1"),
        (
            {"train": {"anneal": "1ep"}, "model": {"connectivity": "h_acn"}},
            "train.anneal = 1ep: model.connectivity must",
        ),
    ],
)
def test_what_a_config_refuses(vit: Callable[..., Config], sections: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit(**sections)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_curricula_go_on_after_a_stop_at_every_stage(
    two_ranks: Callable, vit: Callable[..., Config], stage: int
) -> None:
    """Bit for bit as the run that was not stopped; and stage 3 drops what stage 0 drops. At stage 1 an ACN that begins
    as a residual network, whose checkpoints are no ACN's until it is one.
    """
    early_exit = {"losses": "gradual" if stage % 2 else "rotational", "rotation": 2, "layer_dropout": 0.5}
    train = {"length": "10step", "log_every": "1step", "micro_batch_size": 4}
    keys = {"model": {"connectivity": "residual", "dropout": 0.1, "drop_path": 0.2}, "early_exit": early_exit}
    if stage == 1:
        train |= {"anneal": "0.8run"}
        keys = {"model": {"connectivity": "acn", "dropout": 0.1}, "early_exit": {"losses": "gradual"}}
    unbroken = vit(train=train | {"zero_stage": stage}, **keys)
    two_ranks(run, unbroken)
    broken = named(unbroken, "broken")
    two_ranks(run_until, broken, 8)
    if stage == 1:
        with pytest.raises(
            UserError, match=r"step_00000005: no ACN yet: train.anneal = 0.8run leaves 0.5 of the short"
        ):
            read_model(run_folder(broken))
    two_ranks(run, broken)
    assert measured(broken) == measured(unbroken)
    read_model(run_folder(broken))
    if stage == 3:
        first = named(vit(train=train | {"zero_stage": 0}, **keys), "first")
        two_ranks(run, first)
        for a, b in zip(measured(unbroken), measured(first), strict=True):
            assert a == pytest.approx(b, abs=2e-4)


def plain_losses(cfg: Config, steps: int) -> list[float]:
    """Of one process with PyTorch alone, the sum over the readouts written out: the oracle."""
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model)
    optimizer, stream = build_optimizer(model, cfg.optim), build_stream(cfg)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, Horizon(1400, 16, steps), step)
        batch = next(stream)
        parts = [F.cross_entropy(logits, batch["labels"]) for logits in model.readouts(**batch)]
        loss = sum(w * part for w, part in zip(loss_weights(cfg.early_exit, 3, step, steps), parts[1:], strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("stage", "losses"), [(0, "all"), (1, "gradual"), (2, "all"), (3, "rotational")])
def test_runs_train_on_every_depth(two_ranks: Callable, vit: Callable[..., Config], stage: int, losses: str) -> None:
    """As plain PyTorch does, with recomputed blocks and accumulation as well."""
    keys = {"early_exit": {"losses": losses, "rotation": 2}, "optim": {"lr": 1e-3, "eps": 1e-3}}
    train = {"zero_stage": stage, "micro_batch_size": 4, "length": "12step", "log_every": "1step"}
    cfg = vit(train=train, model={"recompute": True}, **keys)
    two_ranks(run, cfg)
    got = [line["train/loss"] for line in measured(cfg) if "train/loss" in line]
    assert got == pytest.approx(plain_losses(vit(**keys), 12), abs=1e-4)


def test_samples_can_leave_a_trunk() -> None:
    """By a bool of each or by their numbers, and their masks with them."""
    model, batch = classifier(bert)
    mask = batch["mask"]
    x = model.embed(batch["tokens"], batch["segments"])
    keep = torch.arange(SAMPLES) % 3 == 0
    with torch.no_grad():
        expected = [each[keep] for each in model.trunk.readouts(x, mask)]
        for index in (keep, keep.nonzero()[:, 0]):
            readouts = model.trunk.readouts(x, mask)
            next(readouts)
            got = [readouts.send(index), *readouts]
            for mine, right in zip(got, expected[1:], strict=True):
                torch.testing.assert_close(mine, right)
