"""When numbers go wrong: bad steps are dropped or gone back from, by all ranks alike, up to a budget."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from test_pretrain import measured, named, refused, run, run_until

from acn_scale.config import Config, HealthConfig
from acn_scale.data.stream import Stream
from acn_scale.errors import RunFailed
from acn_scale.guard import Guard
from acn_scale.runs import run_folder


def guard(**health: object) -> Guard:
    return Guard(HealthConfig(**health))


def test_what_is_a_fault() -> None:
    watching = guard(spike_factor=3.0)
    assert watching.fault(math.nan) and watching.fault(math.inf)
    assert watching.fault(1e9) is None, "no median yet"
    for _ in range(30):
        watching.good(1.0, applied=True)
    assert watching.fault(2.9) is None
    assert "3.1 times the median of the last 30" in watching.fault(3.1)
    quiet = guard()
    for _ in range(30):
        quiet.good(1.0, applied=True)
    assert quiet.fault(1e9) is None


def test_budget() -> None:
    watching = guard(max_bad_steps=2, max_skipped_steps=10)
    watching.bad(1, "nan")
    watching.bad(2, "nan")
    watching.bad(2, "nan")  # the same one, after going back
    with pytest.raises(RunFailed, match=r"step 9: nan; health.max_bad_steps = 2"):
        watching.bad(9, "nan")
    in_a_row = guard(max_skipped_steps=2)
    in_a_row.bad(1, "nan")
    in_a_row.good(1.0, applied=True)
    in_a_row.bad(3, "nan")
    with pytest.raises(RunFailed, match="max_skipped_steps = 2"):
        in_a_row.bad(4, "nan")
    with pytest.raises(RunFailed, match=r"on_bad_step = fail"):
        guard(on_bad_step="fail").bad(1, "nan")


def test_state_goes_through_json() -> None:
    first = guard(spike_factor=2.0, rollback_batches=3)
    for step in range(150):
        first.good(0.1 * step, applied=step % 3 > 0)
    first.bad(7, "nan")
    first.pass_over(7, 5)
    assert first.passed_over == {6, 7}
    second = guard()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()


class Poisoned:
    """While entered, one rank's images of given steps are NaN, or their loss is so many times what it was."""

    def __init__(self, rank: int, steps: tuple[int, ...], value: float) -> None:
        self.rank, self.steps, self.value = rank, steps, value

    def poison(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if math.isnan(self.value):
            return {"images": batch["images"] * self.value}
        return {"labels": self.value * torch.nn.functional.one_hot(batch["labels"], 10)}

    def __enter__(self) -> None:
        self.take = take = Stream.__next__

        def poisoned(stream: Stream) -> dict[str, torch.Tensor]:
            step = stream.plan.place(stream.taken)[0] + 1
            batch = take(stream)
            if stream.plan.rank == self.rank and step in self.steps:
                batch |= self.poison(batch)
            return batch

        Stream.__next__ = poisoned

    def __exit__(self, *_: object) -> None:
        Stream.__next__ = self.take


def poisoned_run(cfg: Config, value: float = math.nan, until: int | None = None) -> str:
    """Steps 8 and 13 are bad on rank 1."""
    with Poisoned(1, (8, 13), value):
        return refused(cfg) if until is None else run_until(cfg, until)


def losses(cfg: Config) -> dict[int, float]:
    return {line["step"]: line.get("train/loss") for line in measured(cfg) if "train/lr" in line}


def bad_steps(cfg: Config) -> list[dict]:
    return [json.loads(line) for line in (run_folder(cfg) / "health/bad_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_a_nan_batch_changes_nothing_but_its_own_step(
    two_ranks: Callable, vit: Callable[..., Config], stage: int, precision: str
) -> None:
    """The update is dropped on all ranks; the run ends, and its samples are named."""
    train = {"zero_stage": stage, "precision": precision, "log_every": "1step", "micro_batch_size": 4}
    cfg = vit(train=train, model={"depth": 1})
    assert two_ranks(poisoned_run, cfg) == ["", ""]
    got = losses(cfg)
    assert [step for step in got if got[step] is None] == [8, 13]
    first, second = bad_steps(cfg)
    assert (first["step"], first["ranks"], second["step"]) == (8, [1], 13)
    assert len(first["samples"]) == 8
    dropped = [line["train/skipped_steps"] for line in measured(cfg) if "train/lr" in line]
    assert sum(dropped) == 2
    assert f"tools/inspect_batch.py {run_folder(cfg)} --step 8" in (run_folder(cfg) / "train.log").read_text()


def test_spikes_are_dropped_in_fp32(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    """A finite loss that jumps is left out just as a NaN is: the same losses at all other steps."""
    train = {"log_every": "1step", "length": "40step", "zero_stage": 2}
    nan = vit(run={"name": "nan"}, train=train)
    spike = vit(run={"name": "spike"}, train=train, health={"spike_factor": 4.0})

    def steps(cfg: Config, value: float) -> None:
        two_ranks(spiked_run, cfg, value)

    steps(nan, math.nan)
    steps(spike, 20.0)
    assert losses(spike) == losses(nan)
    assert "times the median" in bad_steps(spike)[0]["fault"]


def spiked_run(cfg: Config, value: float) -> None:
    with Poisoned(0, (30,), value):
        run(cfg)


@pytest.mark.parametrize("stage", [0, 2])
def test_going_back(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    """After a rollback the run is one that never saw the batches that were passed over, wherever it is stopped."""
    train = {"zero_stage": stage, "log_every": "1step", "micro_batch_size": 4}
    health = {"on_bad_step": "rollback", "rollback_batches": 2}
    whole = vit(run={"name": "whole"}, train=train, health=health, data={"workers": stage})
    broken = named(whole, "broken")
    assert two_ranks(poisoned_run, whole) == ["", ""]
    two_ranks(poisoned_run, broken, math.nan, 12)
    assert two_ranks(poisoned_run, broken) == ["", ""]
    assert [step for step, loss in losses(whole).items() if loss is None] == [7, 8, 12, 13]
    assert measured(broken) == measured(whole)
    log = (run_folder(whole) / "train.log").read_text()
    assert "back at step 5; passed over from there: the batches of steps [7, 8]" in log


def test_a_bad_step_can_end_the_run(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    cfg = vit(health={"on_bad_step": "fail"})
    first, second = two_ranks(poisoned_run, cfg)
    assert first == second == "step 8: the loss is nan (health.on_bad_step = fail)"
