"""Some of a batch's tokens, or all but padding, are computed as if all were."""

from typing import Any

import pytest
import torch
from test_models import bert, networks, randomize
from torch import nn

from acn_scale.models.tokens import take


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("build", [each for each in networks() if not each.id.startswith("mixer")])
def test_tokens_that_are_read(build: Any, recompute: bool) -> None:
    """Come out as if all were, with the same gradients; the last MLP sees no others, if the pattern lets it."""
    model, read = build(recompute=recompute), torch.tensor([[3, 0], [1, 4], [2, 2], [4, 1]])
    randomize(model)
    x, mask = torch.randn(4, 5, 16), torch.arange(5) < torch.tensor([[5], [2], [3], [5]])
    seen = []
    model.trunk.blocks[-1].blocks[-1].op.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    outputs = []
    for out in (take(model.trunk(x, mask), read), model.trunk(x, mask, read)):
        outputs.append([out, *torch.autograd.grad(out.sum(), list(model.trunk.parameters()))])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)
    assert seen[-1] == (5 if build.keywords["connectivity"] == "hyper" else 2)
    model.trunk.truncate(0)
    assert torch.equal(model.trunk(x, mask, read), take(x, read))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("build", [each for each in networks() if each.id.startswith("bert")])
def test_padding_is_left_out(build: Any, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a classifier in training, with the same loss and gradients; what is computed token by token sees no more."""
    model, mask = build(num_classes=3, recompute=recompute), torch.arange(7) < torch.tensor([[7], [1], [3], [5]])
    randomize(model)
    batch = {"tokens": torch.randint(5, 20, mask.shape), "segments": torch.randint(0, 2, mask.shape), "mask": mask}
    batch["labels"] = torch.tensor([2, 0, 1, 2])
    seen = []
    model.trunk.blocks[0].blocks[1].op.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
    outputs = []
    for leaves_out in (True, False):
        monkeypatch.setattr(model, "by_sample", not leaves_out)
        out = model(**batch)
        gradients = torch.autograd.grad(out["loss"], list(model.parameters()), allow_unused=True)
        outputs.append([out["logits"], out["loss"], *(each for each in gradients if each is not None)])
    torch.testing.assert_close(*outputs)
    assert seen[0] == (1, 16) and seen[-1] == (4, 7)


def test_what_is_drawn_by_the_sample_keeps_its_padding() -> None:
    """So does what is read out at several depths, what begins with padding, and all that is not trained."""
    seen = []
    mask = torch.arange(7) < torch.tensor([[7], [1]])
    batch = {"tokens": torch.full(mask.shape, 5), "labels": torch.tensor([1, 0]), "mask": mask}

    def rows(model: nn.Module) -> int:
        model.trunk.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        assert model(**batch)["loss"].isfinite()
        return seen[-1]

    classifier = {"connectivity": "residual", "num_classes": 2}
    assert rows(bert(**classifier)) == 1
    assert rows(bert(**classifier).eval()) == 2
    batch["mask"] = mask.flip(1)
    assert rows(bert(**classifier)) == 2
    batch["mask"] = mask
    assert rows(bert(**classifier, drop_path=0.5)) == 2
    model = bert(**classifier)
    model.trunk.drop_rates = (0.5, 0.5, 0.5)
    assert rows(model) == 2
    model = bert(**classifier)
    model.loss_weights = (0.5, 0.5, 1.0)
    assert rows(model) == 2
