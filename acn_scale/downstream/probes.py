"""What frozen readouts are worth at every depth: a linear probe and k nearest neighbours, fitted to training images."""

from collections.abc import Callable
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acn_scale import distributed
from acn_scale.data.samples import Samples
from acn_scale.downstream.image_sets import Subject
from acn_scale.downstream.predictions import predict
from acn_scale.errors import UserError
from acn_scale.models.base import Model
from acn_scale.progress import bar
from acn_scale.report.bootstrap import share_interval
from acn_scale.results import Measurement, write_measurements

NEIGHBOURS, TEMPERATURE = 20, 0.07  # Caron et al. 2021 (DINO), after Wu et al. 2018
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the probe's squared weights, halved
HELD_OUT = 5  # every so manyth training image, to choose among them
STEPS = 200  # of L-BFGS for each
CHUNK = 256  # images that are compared with all training images at once

Fitted = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # training features and labels, features -> classes


def fitted(subject: Subject, device: torch.device, kinds: dict[str, Fitted], per_class: int) -> list[Measurement]:
    """Accuracy at every depth of each of the `kinds`, a part of KINDS, fitted to `per_class` training images of each
    class (0: all) and measured on the subject's images.

    A readout is what the head's linear map gets: pooled and normalised. Training images are prepared as those for
    evaluation, in one pass for all depths; their readouts are held in 16 bits by every rank. Writes
    eval/<data>_<kind>.json. Call it on every rank; rank 0 writes.
    """
    with distributed.together():
        if subject.train is None:
            raise UserError("--train: must name training images, to which --probe and --knn fit")
    whole = subject.evaluation(subject.train)
    with distributed.together():
        chosen = draw(whole.samples, per_class) if per_class else None
    model = features_of(subject.net.model)
    train, test = (
        predict(model, evaluation, device, name, lambda readout, labels: readout.half())
        for name, evaluation in (
            (f"{subject.train.name}: training readouts", subject.evaluation(subject.train, chosen=chosen)),
            (f"{subject.images.name}: readouts", subject.evaluation()),
        )
    )
    # Each rank fits for its share of the depths.
    depths = range(train.outputs.shape[1])
    mine = depths[distributed.rank() :: distributed.world_size()]
    labels, classes = torch.from_numpy(train.labels).to(device), subject.net.card.model.num_classes
    note = f"fitted to {len(train.labels):,} images" + f", {per_class} a class at most" * bool(per_class)
    found = []
    for kind, fit in kinds.items():
        shares = []
        for depth in bar(mine, f"{subject.images.name}: {kind}", len(mine), "depth"):
            here, there = (torch.from_numpy(each.outputs[:, depth]).to(device).float() for each in (train, test))
            said = fit(here, labels, there, classes).cpu().numpy()
            shares.append((depth, float((said == test.labels).mean())))
        name = f"{subject.images.name}_{kind}"
        known = {"samples": len(test.labels), "checkpoint": subject.digest, "seed": subject.seed, "note": note}
        mine_too = [
            Measurement(task=name, metric="accuracy", value=value, interval=share_interval(value, len(test.labels)),
                        depth=depth, **known)
            for depth, value in sorted(distributed.union(shares))
        ]  # fmt: skip
        if distributed.rank() == 0:
            write_measurements(subject.folder, name, mine_too)
        found += mine_too
    return found


def features_of(model: Model) -> Model:
    """The same model with pooled and normalised readouts in the place of logits; the weights are shared."""
    copied, head = copy(model), copy(model.head)
    copied._modules = model._modules | {"head": head}
    head._modules = model.head._modules | {"linear": nn.Identity()}
    return copied


def draw(samples: Samples, per_class: int, seed: int = 0) -> np.ndarray:
    """The numbers of `per_class` samples of each class, or of all where it has fewer; the same wherever it is done.
    Raises UserError for a label that is none."""
    labels = samples.labels(bar(range(samples.num_samples), "training labels", samples.num_samples, "image"))
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, sizes = np.unique(labels, return_counts=True)
    place_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[place_in_class < per_class])


def nearest_neighbours(train: Tensor, labels: Tensor, features: Tensor, classes: int) -> Tensor:
    """The class with the most votes of the NEIGHBOURS nearest by cosine, each of weight exp(cosine / TEMPERATURE) (Wu
    et al. 2018, section 3.4)."""
    train = F.normalize(train, dim=1).T
    said = []
    for part in F.normalize(features, dim=1).split(CHUNK):
        near, places = (part @ train).topk(min(NEIGHBOURS, train.shape[1]), dim=1)
        votes = torch.zeros(len(part), classes, dtype=torch.float64, device=part.device)
        said.append(votes.scatter_add_(1, labels[places], (near.double() / TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(said)


def linear_probe(train: Tensor, labels: Tensor, features: Tensor, classes: int) -> Tensor:
    """Multinomial regression on standardised features by L-BFGS: mean cross-entropy + penalty / 2 * |weights|^2. The
    penalty is the one that does best on a held-out part of the training images; then all of them are fitted."""
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    train, features = (train - mean) / std, (features - mean) / std
    held = torch.arange(len(train), device=train.device) % HELD_OUT == HELD_OUT - 1
    best, chosen, start = -1.0, PENALTIES[0], None
    for penalty in PENALTIES if held.any() else ():
        start = _fit(train[~held], labels[~held], classes, penalty, start)
        right = (_scores(train[held], start).argmax(dim=1) == labels[held]).double().mean().item()
        if right > best:
            best, chosen = right, penalty
    return _scores(features, _fit(train, labels, classes, chosen, None)).argmax(dim=1)


def _scores(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights[:-1] + weights[-1]


@torch.enable_grad()
def _fit(features: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None) -> Tensor:
    """(dim + 1, classes), the last row the bias, which no penalty is on."""
    size = features.shape[1] + 1, classes
    weights = (torch.zeros(size, device=features.device) if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_scores(features, weights), labels) + penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


KINDS: dict[str, Fitted] = {"knn": nearest_neighbours, "probe": linear_probe}
