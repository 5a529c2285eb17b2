"""The patterns against closed forms, the connection-matrix oracle, and one another."""

from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from acn_scale.config import OF_SUBLAYERS, Pattern, ViTConfig
from acn_scale.gradients import line_gradients
from acn_scale.models.connectivity import CONNECTIVITY, AutoCompressing, Highway, patterns
from acn_scale.models.trunk import Trunk

LINEAR = sorted(CONNECTIVITY.keys() - {"highway", "value_residual"})


class Branch(nn.Module):
    """A block of a test trunk: any function of x, called with a mask like all blocks."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("pattern", ["feedforward", "residual", "acn", "acn_detached"])
@pytest.mark.parametrize("depth", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_of_the_one_dimensional_network(pattern: str, depth: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, w = torch.randn(1, 1, 1, dtype=torch.float64), (torch.rand(depth, dtype=torch.float64) * 2 - 1).requires_grad_()
    trunk = Trunk([Branch(lambda x, i=i: w[i] * x) for i in range(depth)], pattern, 1)
    (gradient,) = torch.autograd.grad(trunk(x).sum(), w)
    torch.testing.assert_close(gradient, line_gradients(pattern, w.detach()) * x.item(), rtol=1e-12, atol=1e-12)


def connections(pattern: str, trunk: Trunk) -> tuple[list[Tensor], list[Tensor]]:
    """The oracle's rows: what block i + 1 gets is sum_j A_ij v_j, the output at depth i is sum_j r_ij v_j."""
    depth = len(trunk.blocks)
    last = [torch.eye(i + 1, dtype=torch.float64)[-1] for i in range(depth + 1)]
    ones = [torch.ones(i + 1, dtype=torch.float64) for i in range(depth + 1)]
    if pattern == "feedforward":
        return last, last
    if pattern in ("residual", "layernorm_scaling"):
        return ones, ones
    if pattern in ("acn", "acn_detached"):
        return last, ones
    if pattern == "acn_scaled":
        return last, [torch.cat([row[:1], row[1:].cumsum(dim=0) ** -0.5]) for row in ones]
    if pattern in ("layer_scale", "rezero"):
        scales = torch.randn(depth, dtype=torch.float64)
        for join, scale in zip(trunk.joins, scales, strict=True):
            nn.init.constant_(join.scale, scale)
        rows = [torch.cat([torch.ones(1), scales[:i]]) for i in range(depth + 1)]
        return rows, rows
    if pattern == "h_acn":  # what came in by a short path is damped by each gate on its way
        gates = torch.rand(depth, dtype=torch.float64).repeat_interleave(2)[:depth]
        for join, gate in zip(trunk.joins[::2], gates[::2], strict=True):
            nn.init.constant_(join.gate, gate)
        return [torch.stack([gates[j:i].prod() for j in range(i + 1)]) for i in range(depth + 1)], ones
    if pattern == "hyper":  # each stream as its weights over the branches
        streams, inputs, outputs = torch.ones(4, 1, dtype=torch.float64), [], []
        for join in trunk.joins:
            for parameter in join.parameters():
                nn.init.normal_(parameter)
            inputs.append(join.into @ streams)
            outputs.append(streams.mean(dim=0))
            streams = torch.cat([join.across.view(4, 4).T @ streams, join.out[:, None]], dim=1)
        return inputs, [*outputs, streams.mean(dim=0)]
    rows = [torch.randn(i + 2, dtype=torch.float64) for i in range(depth)]
    with torch.no_grad():
        for join, row in zip(trunk.joins, rows, strict=True):
            if pattern == "denseformer":
                join.weight.copy_(row)
            else:
                dim = len(join.mix.weight)
                join.mix.weight.copy_(torch.kron(row[None], torch.eye(dim, dtype=torch.float64)))
    return [ones[0], *rows], [ones[0], *rows]


@pytest.mark.parametrize("pattern", LINEAR)
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_linear_patterns_equal_the_connection_matrix(pattern: str, depth: int) -> None:
    """At every depth, with blocks that are not linear."""
    layers = [nn.Linear(5, 5, dtype=torch.float64) for _ in range(depth)]
    blocks = [Branch(nn.Sequential(layer, nn.Tanh())) for layer in layers]
    trunk = Trunk(blocks, pattern, 5).double()
    inputs, outputs = connections(pattern, trunk)
    x = torch.randn(2, 3, 5, dtype=torch.float64)

    def mix(row: Tensor, branches: list[Tensor]) -> Tensor:
        return sum(weight * branch for weight, branch in zip(row, branches, strict=True))

    branches = [x]
    expected = [mix(outputs[0], branches)]
    for index, block in enumerate(blocks):
        branches.append(block(mix(inputs[index], branches)))
        expected.append(mix(outputs[index + 1], branches))
    got = list(trunk.readouts(x))
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_start_of_the_learned_patterns() -> None:
    """Dense and hyper-connections start as residual, DenseFormer as feedforward, ReZero as the identity."""
    blocks = [Branch(nn.Linear(4, 4)) for _ in range(6)]
    x = torch.randn(2, 3, 4)
    for pattern, start in (("dense", "residual"), ("hyper", "residual"), ("denseformer", "feedforward")):
        torch.testing.assert_close(Trunk(blocks, pattern, 4)(x), Trunk(blocks, start, 4)(x))
    assert torch.equal(Trunk(blocks, "rezero", 4)(x), x)
    torch.testing.assert_close(Trunk(blocks, "layer_scale", 4)(x), x, rtol=0, atol=0.01)
    assert [join.into.argmax().item() for join in Trunk(blocks, "hyper", 4).joins] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("gate, limit", [(1.0, "residual"), (0.0, "acn")])
def test_between_acn_and_residual(gate: float, limit: str) -> None:
    """A share of the short connections, fixed or learned, makes an ACN; all of them a residual network: bit for bit."""
    blocks = [Branch(nn.Linear(4, 4)) for _ in range(4)]
    x = torch.randn(2, 3, 4)
    expected = list(Trunk(blocks, limit, 4).readouts(x))
    hybrid, annealed = Trunk(blocks, "h_acn", 4), Trunk(blocks, "acn", 4)
    for parameter in hybrid.joins.parameters():
        assert parameter == 0.75
        nn.init.constant_(parameter, gate)
    for join in annealed.joins:
        join.short = gate
    for trunk in (hybrid, annealed):
        assert all(torch.equal(*pair) for pair in zip(trunk.readouts(x), expected, strict=True))


@pytest.mark.parametrize("pattern", sorted(CONNECTIVITY.keys() - {"value_residual"}))
def test_through_blocks_is_one_trunk_of_all_sublayers(pattern: str) -> None:
    """Bit for bit, at the depths where a block ends."""
    sublayers = [Branch(nn.Linear(4, 4)) for _ in range(6)]
    flat = Trunk(sublayers, pattern, 4)
    blocks = [Trunk(sublayers[i : i + 2], pattern, 4, within=i) for i in (0, 2, 4)]
    nested = Trunk(blocks, pattern, 4, through=True)
    joins = [join for block in blocks for join in block.joins]
    for own, other in zip(flat.joins, joins, strict=True):
        for parameter in own.parameters():
            nn.init.normal_(parameter)
        other.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 4)
    assert all(torch.equal(*pair) for pair in zip(nested.readouts(x), list(flat.readouts(x))[::2], strict=True))


def test_highway() -> None:
    join, x, y = Highway(4, 0), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gate = torch.sigmoid(x @ join.gate.weight.T - 2)
    torch.testing.assert_close(join((x,), lambda x: y)[0], gate * y + (1 - gate) * x)


def test_running_sum_is_fp32_in_bf16() -> None:
    """Its error over 48 blocks is that of one rounding, well below that of a bf16 sum."""
    outputs = [torch.randn(64, 8, 16).bfloat16() for _ in range(49)]
    following: Iterator[Tensor] = iter(outputs[1:])
    trunk = Trunk([Branch(lambda x: next(following)) for _ in range(48)], "acn", 16)
    assert AutoCompressing.start(outputs[0])[1].dtype == torch.float32
    exact = torch.stack(outputs).double().sum(0)
    rounded = outputs[0]
    for y in outputs[1:]:
        rounded = rounded + y
    readout = trunk(outputs[0])
    assert readout.dtype == torch.bfloat16
    assert (readout - exact).norm() < 0.4 * (rounded - exact).norm()


@pytest.mark.parametrize("depth", [-1, 4])
def test_truncate_refuses_what_is_not_there(depth: int) -> None:
    with pytest.raises(ValueError, match="must be 0 to 3"):
        Trunk([Branch(nn.Identity()) for _ in range(3)], "acn", 4).truncate(depth)


def test_usual_partners() -> None:
    assert patterns("acn", "auto") == ("acn", "feedforward")
    assert patterns("residual", "auto") == ("feedforward", "residual")
    assert patterns("denseformer", "auto") == ("denseformer", "residual")
    assert patterns("residual", "feedforward") == ("residual", "feedforward")
    assert patterns("hyper", "auto") == ("hyper", "through")


@pytest.mark.parametrize("name", CONNECTIVITY)
def test_a_config_knows_what_joins_what(name: str) -> None:
    """As the models do."""
    assert get_args(Pattern) == tuple(CONNECTIVITY)
    shape = {"name": "vit", "depth": 1, "dim": 4, "num_heads": 1, "image_size": 4, "patch_size": 2, "num_classes": 2}
    for inner in ("auto", "through", "residual")[: 2 if name in ("value_residual", "h_acn") else 3]:
        cfg = ViTConfig(**shape, connectivity=name, inner=inner)
        between, sublayers = patterns(name, inner)
        assert cfg.through == (sublayers == "through")
        assert cfg.round_sublayers == (between if cfg.through else sublayers)
    assert (patterns(name, "auto")[1] == "through") == (name in OF_SUBLAYERS)
