"""Sublayers, and the blocks that the models are built from."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acn_scale.config import TrunkConfig
from acn_scale.models.connectivity import patterns
from acn_scale.models.tokens import Layout, Mask, first_token, take
from acn_scale.models.trunk import Trunk

EPS = 1e-6  # of LayerNorm in ViT and Mixer, as in timm and big_vision


class Dropout(nn.Dropout):
    """The same, on a CPU in less than half the time: PyTorch draws a mask number by number and keeps it as floats."""

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape -> the same."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        # Each 64 random bits make two whole numbers, -2^31 ... 2^31 - 1, of which a share of p lie below the threshold.
        bits = torch.empty(-(-x.numel() // 2), dtype=torch.int64).random_(-(2**63), None).view(torch.int32)
        stays = bits[: x.numel()].view(x.shape) >= round((self.p - 0.5) * 2**32)
        return x * stays * (1 / (1 - self.p))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017).

    `out_norm` adds a LayerNorm on the output, which the ACN authors' ViT code has and the paper does not mention.
    `first_values`: the output is a pair with the values of the network's first attention, which later ones are given
    and mix half and half into theirs (Zhou et al. 2024, arXiv 2410.17897).
    """

    def __init__(
        self, dim: int, num_heads: int, *, dropout: float = 0.0, out_norm: bool = False, first_values: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first_values = first_values
        self.dropout = Dropout(dropout)  # of the attention's weights
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.out_norm = nn.LayerNorm(dim, eps=EPS) if out_norm else nn.Identity()

    def forward(
        self, x: Tensor, mask: Mask | None = None, first: Tensor | None = None, *, read: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (batch, tokens, dim), mask: (batch, tokens), False where nothing may look -> (batch, tokens, dim).

        read: (batch, read), numbers of the tokens that look; default: all -> (batch, read, dim). first, and the second
        output with `first_values`: (batch, num_heads, tokens, head_dim). With a Layout, x is (1, total, dim), and what
        looks is all or the first token of each sequence, (1, batch).
        """
        qkv, layout = self.qkv(x), mask if isinstance(mask, Layout) else None
        if layout is not None:
            qkv, mask = layout.padded(qkv), layout.mask
            read = read if read is None else first_token(qkv)
        batch, tokens, dim = *qkv.shape[:2], x.shape[-1]
        # Taken apart before they are transposed, so that their gradients are put together where they belong.
        qkv = qkv.view(batch, tokens, 3, self.num_heads, dim // self.num_heads).unbind(2)
        if read is not None:
            qkv = (take(qkv[0], read), *qkv[1:])
        q, k, v = (each.transpose(1, 2) for each in qkv)  # each (batch, num_heads, tokens, head_dim)
        if first is None:
            first = v
        else:
            v = (first + v) / 2
        if self.dropout.p and self.training and x.device.type == "cpu":
            x = self.dropout(_attention_weights(q, k, mask)) @ v  # PyTorch's dropout takes twice the time
        else:
            mask = mask if mask is None else mask[:, None, None, :]
            dropout = self.dropout.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = x.transpose(1, 2).flatten(2)
        if layout is not None:
            x = layout.flat(x) if read is None else x.transpose(0, 1)
        x = self.out_norm(self.proj(x))
        return (x, first) if self.first_values else x


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)), masked and scaled by the product itself.

    q: (batch, num_heads, read, head_dim), k: (batch, num_heads, tokens, head_dim), mask: (batch, tokens) ->
    (batch, num_heads, read, tokens).
    """
    masked = q.new_zeros(1, k.shape[2])
    if mask is not None:
        masked = masked.masked_fill(~mask, -torch.inf).repeat_interleave(q.shape[1], 0)
    scores = torch.baddbmm(masked[:, None], q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1).unflatten(0, q.shape[:2])


class OverTokens(nn.Linear):
    """A linear map over the tokens, the same for every feature, which nothing need be transposed for."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_features, dim) -> (batch, out_features, dim)."""
        return torch.baddbmm(self.bias[:, None], self.weight.expand(x.shape[0], -1, -1), x)


class MLP(nn.Module):
    """Two linear maps with GELU between them: over the features, or as a Mixer's token mixing (Tolstikhin et al. 2021,
    Eq. 1) over the tokens.

    `bypass` adds a fixed identity round each map, as the ACN authors' ViT code does: with D = [I; 0],
    h = GELU(W1 x + b1 + D x), output W2 h + b2 + D^T h. Its hidden width must be at least `dim`.
    """

    def __init__(self, dim: int, mlp_dim: int, *, bypass: bool = False, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.fc1 = linear(dim, mlp_dim)
        self.fc2 = linear(mlp_dim, dim)
        self.bypass = bypass

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """x: (batch, tokens, dim) -> (batch, tokens, dim); the mask is not needed."""
        hidden = self.fc1(x)
        if self.bypass:
            hidden = hidden + F.pad(x, (0, hidden.shape[-1] - x.shape[-1]))
        hidden = F.gelu(hidden)
        y = self.fc2(hidden)
        return y + hidden[..., : y.shape[-1]] if self.bypass else y


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm times a constant."""

    def __init__(self, dim: int, *, eps: float, scale: float) -> None:
        super().__init__(dim, eps=eps)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim) -> (..., dim)."""
        return self.scale * super().forward(x)


class Sublayer(nn.Module):
    """norm -> op -> dropout. With post-LN the norm stands in the Trunk, after the join, and is Identity here.

    `drop_path`: the probability that, in training, a sample's output is 0; those that stay are scaled up for it.
    """

    def __init__(self, norm: nn.Module, op: nn.Module, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.op = op
        self.dropout = Dropout(dropout)
        self.drop_path = drop_path

    def forward(
        self, x: Tensor, mask: Mask | None = None, *more: Tensor, **read: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """x: (batch, tokens, dim), mask: (batch, tokens) or None -> (batch, tokens, dim).

        What else is given goes to the op, and what else it gives comes with the output.
        """
        y = self.op(self.norm(x), mask, *more, **read)
        y, *rest = y if isinstance(y, tuple) else (y,)
        y = self.dropout(y)
        if self.drop_path and self.training:
            stays = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
            y = y * (stays / (1 - self.drop_path)).to(y.dtype)
        return (y, *rest) if rest else y


class Wrapper(nn.Module):
    """LN(ReLU(W block(x) + b + x)): what the ACN authors' Mixer code puts round every block, in both twins.

    The sum keeps a short skip inside the ACN, which the literal Eq. 1 does not have.
    """

    def __init__(self, block: nn.Module, dim: int) -> None:
        super().__init__()
        self.block = block
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, tokens, dim) -> (batch, tokens, dim)."""
        return self.norm(F.relu(self.proj(self.block(x, mask)) + x))


def build_trunk(
    cfg: TrunkConfig,
    build_ops: Callable[[], Sequence[nn.Module]],
    *,
    eps: float = EPS,
    post_norm: bool = False,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> Trunk:
    """cfg.depth blocks of `build_ops()` each, joined as the config says; `wrap` goes round every block.

    A LayerNorm stands before each op, or with `post_norm` after its join (BERT's order). In block l = 1, ..., L, a
    sample passes each sublayer by with probability l / L cfg.drop_path (stochastic depth, Huang et al. 2016, arXiv
    1603.09382), and layernorm_scaling divides the LayerNorms' output by sqrt(l) (Sun et al. 2025, arXiv 2502.05795).
    """
    between, inner = patterns(cfg.connectivity, cfg.inner)
    through = inner == "through"
    blocks = []
    for index in range(cfg.depth):
        ops = build_ops()
        scaled = "layernorm_scaling" in (between, inner)
        norm = partial(ScaledLayerNorm, scale=(index + 1) ** -0.5) if scaled else nn.LayerNorm
        norms = [norm(cfg.dim, eps=eps) for _ in ops]
        before = [nn.Identity() for _ in ops] if post_norm else norms
        drop_path = cfg.drop_path * (index + 1) / cfg.depth
        sublayers = [Sublayer(norm, op, cfg.dropout, drop_path) for norm, op in zip(before, ops, strict=True)]
        block = Trunk(
            sublayers,
            between if through else inner,
            cfg.dim,
            norms=norms if post_norm else (),
            within=index * len(ops) if through else None,
            looks=0,
        )
        blocks.append(wrap(block) if wrap else block)
    return Trunk(blocks, between, cfg.dim, recompute=cfg.recompute, through=through)
