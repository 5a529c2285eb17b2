"""Nearest neighbours and linear maps on the frozen readouts of every depth."""

from pathlib import Path

import numpy as np
import torch
from networks import GREY, image_export, mixer, network
from networks import vit as vit_config
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from acn_scale.convert import read_model
from acn_scale.data import evaluation_of
from acn_scale.downstream.probes import NEIGHBOURS, TEMPERATURE, _fit, draw, features_of, nearest_neighbours


def test_probes_are_scikit_learns(rng: np.random.Generator) -> None:
    """The same neighbours, votes and optimum."""
    centres = rng.normal(size=(4, 12))
    labels, others = rng.integers(0, 4, 300), rng.integers(0, 4, 150)
    train, test = (centres[each] + 1.2 * rng.normal(size=(len(each), 12)) for each in (labels, others))
    theirs = KNeighborsClassifier(
        NEIGHBOURS, metric="cosine", weights=lambda distances: np.exp((1 - distances) / TEMPERATURE)
    ).fit(train, labels)
    tensors = [torch.from_numpy(each) for each in (train, labels, test)]
    said = nearest_neighbours(*tensors, 4)
    assert said.tolist() == theirs.predict(test).tolist()
    assert accuracy_score(others, said) > 0.6
    tensors = [each.float() if each.is_floating_point() else each for each in tensors]
    penalty = 1e-2
    ours = _fit(tensors[0], tensors[1], 4, penalty, None)
    optimum = LogisticRegression(C=1 / (penalty * 300), tol=1e-8, max_iter=1000).fit(train, labels)
    weights = ours[:-1] - ours[:-1].mean(dim=1, keepdim=True)
    np.testing.assert_allclose(weights.T, optimum.coef_, atol=2e-3)


def test_readouts_that_are_fitted_to_are_those_of_the_head() -> None:
    """At every depth; the head's own linear map on them gives its logits."""
    for model in (vit_config(connectivity="acn"), mixer(pool="cls")):
        net = network(model)
        images = torch.randn(5, 3, 8, 8)
        with torch.no_grad():
            readouts = list(features_of(net.model).readouts(images))
            logits = list(net.model.readouts(images))
            for readout, expected in zip(readouts, logits, strict=True):
                torch.testing.assert_close(net.model.head.linear(readout), expected)


def test_a_draw_has_as_many_of_each_class(digits: Path, tmp_path: Path) -> None:
    source = image_export(tmp_path / "source", vit_config(**GREY))
    images = read_model(source).card.images
    samples = evaluation_of(images.data(str(digits / "train")), read_model(source).card.model, batch_size=1).samples
    chosen = draw(samples, 7)
    read = [samples.reader.read(*samples.key(number)[1:])["cls"] for number in chosen]
    assert sorted(read) == sorted(str(number).encode() for number in range(10) for _ in range(7))
    assert len(set(chosen)) == 70
    assert len(draw(samples, 10_000)) == 1400
    only = evaluation_of(images.data(str(digits / "train")), read_model(source).card.model, batch_size=9, chosen=chosen)
    labels = torch.cat([batch["labels"][counts] for batch, counts in only])
    assert labels.tolist() == [int(label) for label in read]
