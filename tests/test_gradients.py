"""The split of gradients against Table 1's closed forms, counts of paths, and passes that detach otherwise."""

from collections.abc import Callable

import pytest
import torch
from test_models import batch_for, bert, mixer, randomize, vit
from torch import Tensor, nn

from acn_scale.gradients import Line, backward_paths, line_gradients, split_gradients
from acn_scale.models.base import Model


@pytest.mark.parametrize("pattern", ["feedforward", "residual", "acn"])
@pytest.mark.parametrize("depth", [1, 2, 12])
def test_closed_forms_of_the_one_dimensional_network(pattern: str, depth: int) -> None:
    """FG as in Table 1; DG is the input of the block; with all weights 1 (skips aside), FG counts the paths."""
    torch.manual_seed(depth)
    weights = torch.rand(depth, dtype=torch.float64) * 2 - 1
    x = torch.randn(1, 1, 1, dtype=torch.float64)
    splits = split_gradients(Line(pattern, weights), {"x": x})
    assert list(splits) == [f"block_{block:02d}" for block in range(1, depth + 1)]
    for i, (split, expected) in enumerate(zip(splits.values(), line_gradients(pattern, weights), strict=True)):
        full = (expected * x).item()
        into = {"feedforward": weights[:i].prod(), "acn": weights[:i].prod(), "residual": (1 + weights[:i]).prod()}
        direct = (into[pattern] * x).item() if pattern != "feedforward" or i == depth - 1 else 0.0
        assert (split.full, split.direct) == pytest.approx((abs(full), abs(direct)), rel=1e-12)
        assert split.mediated == pytest.approx(abs(full - direct), rel=1e-9, abs=1e-12)
        assert split.cosine == pytest.approx(1.0 if full * direct > 0 else -1.0) or direct == 0
    one = {"x": torch.ones(1, 1, 1, dtype=torch.float64)}
    ones = split_gradients(Line(pattern, torch.ones(depth)), one).values()
    entering = [2**i if pattern == "residual" else 1 for i in range(depth)]
    counts = [split.full / n for split, n in zip(ones, entering, strict=True)]
    assert counts == backward_paths(pattern, depth)


def gradients(model: Model, batch: dict[str, Tensor], block: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(model(**batch)["loss"], list(block.parameters()))])


@pytest.mark.parametrize("build", [vit, mixer, bert])
def test_direct_part_of_an_acn(build: Callable) -> None:
    """That of the pattern whose blocks get detached inputs; and the parts of the full one are those of the loss."""
    model, detached = (build(connectivity=name).eval() for name in ("acn", "acn_detached"))
    randomize(model)
    detached.load_state_dict(model.state_dict())
    batch = batch_for(model)
    splits = split_gradients(model.train(), batch)
    assert model.training
    assert list(splits) == ["embed", "block_01", "block_02", "block_03", "head"]
    for index, name in enumerate(list(splits)[1:4]):
        full, direct = (gradients(each, batch, each.trunk.blocks[index]) for each in (model.eval(), detached))
        assert splits[name].full == pytest.approx(full.norm().item(), rel=1e-4)
        assert splits[name].direct == pytest.approx(direct.norm().item(), rel=1e-4)
        assert splits[name].mediated == pytest.approx((full - direct).norm().item(), rel=1e-3, abs=1e-4)
        assert splits[name].cosine == pytest.approx(torch.cosine_similarity(full, direct, dim=0).item(), abs=1e-4)
    for name in ("block_03", "head"):
        assert splits[name].direct == splits[name].full > 0 == splits[name].mediated


@pytest.mark.parametrize("keys", [{}, {"inner": "feedforward"}, {"inner": "through"}], ids=str)
def test_direct_part_of_a_residual_network(keys: dict[str, str]) -> None:
    """What later blocks add is taken as given: the readout is x after the block, and a constant."""
    torch.manual_seed(0)
    model = vit(connectivity="residual", **keys).eval()
    batch = batch_for(model)
    x = model.embed(batch["images"])
    states = list(model.trunk.readouts(x))
    splits = split_gradients(model, batch)
    for index in range(3):
        added = (states[3] - states[index + 1]).detach()
        loss = model.loss(model.head(states[index + 1] + added), batch["labels"])
        weights = list(model.trunk.blocks[index].parameters())
        direct = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
        assert splits[f"block_{index + 1:02d}"].direct == pytest.approx(direct.norm().item(), rel=1e-4)
