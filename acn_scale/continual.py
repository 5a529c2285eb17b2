"""Tasks one after another in one run, and what keeps the earlier ones from being forgotten."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from acn_scale import distributed
from acn_scale.config import Config
from acn_scale.data import evaluations_of_tasks
from acn_scale.data.samples import Batch
from acn_scale.data.sequence import Turns, deal_classes
from acn_scale.data.stream import Evaluation
from acn_scale.depth import evaluate
from acn_scale.durations import Horizon
from acn_scale.errors import UserError
from acn_scale.runs import read_metrics

FISHER_BATCH = 32  # samples whose gradients are held at once

Examples = Iterable[tuple[Batch, Tensor]]


class TaskSequence:
    """The tasks of a run. Its methods are collective; at stage 0 in fp32 all ranks hold the same numbers."""

    def __init__(self, engine: Any, cfg: Config, horizon: Horizon) -> None:
        """Raises UserError for shards that are missing or do not fit the model."""
        self.engine, self.turns = engine, Turns(horizon.steps, cfg.continual.tasks)
        task_of = deal_classes(cfg.model.num_classes, cfg.continual.tasks, cfg.run.seed)
        engine.module.tasks = torch.from_numpy(task_of).to(engine.device)
        ranks = {"rank": distributed.rank(), "world_size": distributed.world_size(), "share": distributed.union}
        self.evaluations = evaluations_of_tasks(cfg, cfg.data, batch_size=cfg.eval.batch_size, **ranks)
        self.method = METHODS[cfg.continual.method](engine.module, cfg)
        self.examples: list[Evaluation] | None = None
        if self.method.sees_examples:
            trained_on = cfg.data.model_copy(update={"eval": cfg.data.train})
            self.examples = evaluations_of_tasks(cfg, trained_on, batch_size=FISHER_BATCH, **ranks)

    def finish(self, step: int, watch: Callable[[Examples], Examples] = iter) -> dict[str, float]:
        """Where a task ends with this step: have the method note what it needs. Returns the accuracy (0..1) on its
        evaluation samples, after the last task on those of all tasks; between two ends nothing. `watch` sees batches.
        """
        if not self.turns.ends(step):
            return {}
        task = self.turns.task(step - 1)
        self.method.end_task(watch(self.examples[task]) if self.examples else ())
        learnt = [task] if step < self.turns.steps else range(self.turns.tasks)
        model, device = self.engine.module, self.engine.device
        return {
            _metric(each): evaluate(model, watch(self.evaluations[each]), device)["accuracy"][-1] for each in learnt
        }

    def parts(self) -> dict[str, bytes]:
        """Rank 0's file of a checkpoint."""
        tensors = {f"{kind}.{number}": tensor for kind, tensors in self.method.state.items()
                   for number, tensor in enumerate(tensors)}  # fmt: skip
        return {"continual.safetensors": save(tensors)} if tensors and distributed.rank() == 0 else {}

    def load(self, checkpoint: Path) -> None:
        if not self.method.state:
            return
        tensors = load_file(checkpoint / "continual.safetensors")
        for kind, mine in self.method.state.items():
            for number, tensor in enumerate(mine):
                tensor.copy_(tensors[f"{kind}.{number}"])


def _metric(task: int) -> str:
    return f"continual/task_{task:02d}/accuracy"


@dataclass(frozen=True)
class Retention:
    """Accuracy (0..1) on each task when it had just been learnt, and at the end of the run."""

    learnt: list[float]
    final: list[float]

    @property
    def accuracy(self) -> float:
        """Mean accuracy at the end (Dorovatas et al. 2025, section 6: average accuracy)."""
        return fmean(self.final)

    @property
    def forgetting(self) -> float:
        """Mean fall of accuracy since a task was learnt; the last task counts with 0 (there: average forgetting)."""
        return fmean(self.learnt) - self.accuracy


def read_retention(folder: Path) -> Retention:
    """Of a run's metrics. Raises UserError for a run that did not learn tasks to its end."""
    lines = [line for line in read_metrics(folder) if any(name.startswith("continual/task_") for name in line)]
    tasks = len(lines)  # a line when each of them ends
    if not tasks or any(_metric(task) not in lines[-1] for task in range(tasks)):
        raise UserError(f"{folder}: has not come to the end of its tasks")
    return Retention(
        learnt=[line[_metric(task)] for task, line in enumerate(lines)],
        final=[lines[-1][_metric(task)] for task in range(tasks)],
    )


class Method:
    """Nothing against forgetting. `state`: what a checkpoint holds of it."""

    sees_examples = False  # whether it looks at a task's samples once more when the task ends

    def __init__(self, model: nn.Module, cfg: Config) -> None:
        self.model, self.cfg = model, cfg.continual
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.state: dict[str, list[Tensor]] = {}

    def before_update(self) -> None:
        """Right before an update: see or change the gradients."""

    def after_update(self) -> None:
        """Right after it, where it was made."""

    def end_task(self, examples: Examples) -> None:
        """After the last update of a task. `examples`: its training samples, in batches with which of them count."""


class Penalty(Method):
    """loss + strength * sum_k importance_k (w_k - anchor_k)^2, by its gradient."""

    def __init__(self, model: nn.Module, cfg: Config) -> None:
        super().__init__(model, cfg)
        self.importance = [torch.zeros_like(weight) for weight in self.weights]
        self.anchor = [weight.detach().clone() for weight in self.weights]
        self.state = {"importance": self.importance, "anchor": self.anchor}

    @torch.no_grad()
    def before_update(self) -> None:
        for weight, importance, anchor in zip(self.weights, self.importance, self.anchor, strict=True):
            weight.grad.add_(importance * (weight - anchor), alpha=2 * self.cfg.strength)


class SynapticIntelligence(Penalty):
    """Zenke et al. 2017, arXiv 1703.04200, eq. 3 to 5: a weight's share of the fall of the task's loss on its path,

    path_k = -sum over updates of g_k dw_k, over the squared way of the whole task: importance_k grows by
    path_k / (way_k^2 + damping). The anchor is where the task before ended. g is the gradient of the loss without the
    penalty. A path that raised the loss counts as 0: the penalty must not push away.
    """

    def __init__(self, model: nn.Module, cfg: Config) -> None:
        super().__init__(model, cfg)
        self.path = [torch.zeros_like(weight) for weight in self.weights]
        self.state |= {"path": self.path}

    @torch.no_grad()
    def before_update(self) -> None:
        self._before = [(weight.grad.clone(), weight.clone()) for weight in self.weights]
        super().before_update()

    @torch.no_grad()
    def after_update(self) -> None:
        for weight, path, (gradient, before) in zip(self.weights, self.path, self._before, strict=True):
            path.sub_(gradient * (weight - before))

    @torch.no_grad()
    def end_task(self, examples: Examples) -> None:
        parts = zip(self.weights, self.importance, self.anchor, self.path, strict=True)
        for weight, importance, anchor, path in parts:
            importance.add_(path.clamp_min(0) / ((weight - anchor).square() + self.cfg.damping))
            anchor.copy_(weight)
            path.zero_()


class ElasticWeights(Penalty):
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, eq. 3): strength * sum_t sum_k F_tk / 2 (w_k - w_tk)^2

    over the earlier tasks t. That sum of squares is, but for a constant, one square with the sum of the F_t / 2 round
    the mean of the w_t weighted by them, so that its memory does not grow with the tasks.
    """

    sees_examples = True

    @torch.no_grad()
    def end_task(self, examples: Examples) -> None:
        parts = zip(self.weights, self.importance, self.anchor, fisher(self.model, examples), strict=True)
        for weight, importance, anchor, information in parts:
            importance.add_(information / 2)
            share = information / 2 / importance.clamp_min(torch.finfo(torch.float32).tiny)
            anchor.lerp_(weight, share)


METHODS = {"naive": Method, "replay": Method, "si": SynapticIntelligence, "ewc": ElasticWeights}


def fisher(model: nn.Module, examples: Examples) -> list[Tensor]:
    """The diagonal of the empirical Fisher information of each weight that is trained: the mean, over the samples of
    all ranks, of the squared gradient of a sample's own loss. Call it on every rank.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    was_training = model.training
    model.eval()

    def loss(weights: dict[str, Tensor], sample: Batch) -> Tensor:
        one = {name: values[None] for name, values in sample.items()}
        return functional_call(model, weights, kwargs=one)["loss"]

    gradients = vmap(grad(loss), in_dims=(None, 0))
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    total = torch.zeros(1, device=next(iter(weights.values())).device)
    for batch, counts in examples:
        found = gradients(weights, {name: values.to(total.device) for name, values in batch.items()})
        counts = counts.to(total.device)
        total += counts.sum()
        for name, each in found.items():
            sums[name] += each[counts].square().sum(dim=0)
    model.train(was_training)
    total = distributed.sum_over_ranks(total)
    return [distributed.sum_over_ranks(each) / total for each in sums.values()]
