"""Sublayers, blocks and patch embedding that the models are built from, and their initial weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acn_scale.models.connectivity import Trunk

EPS = 1e-6  # of LayerNorm in ViT and Mixer, as in timm and big_vision


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017).

    `out_norm` adds a LayerNorm on the output, which the ACN authors' ViT code has and the paper does not mention.
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0, out_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.out_norm = nn.LayerNorm(dim, eps=EPS) if out_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, tokens, dim), mask: (batch, tokens), False where nothing may look -> (batch, tokens, dim)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, num_heads, tokens, head_dim)
        if mask is not None:
            mask = mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_norm(self.proj(x.transpose(1, 2).reshape(batch, tokens, dim)))


class MLP(nn.Module):
    """Two linear maps with GELU between them.

    `bypass` adds a fixed identity round each map, as the ACN authors' ViT code does: with D = [I; 0],
    h = GELU(W1 x + b1 + D x), output W2 h + b2 + D^T h. Its hidden width must be at least `dim`.
    """

    def __init__(self, dim: int, mlp_dim: int, *, bypass: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.bypass = bypass

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, tokens, dim) -> (batch, tokens, dim); the mask is not needed."""
        hidden = self.fc1(x)
        if self.bypass:
            hidden = hidden + F.pad(x, (0, hidden.shape[-1] - x.shape[-1]))
        hidden = F.gelu(hidden)
        y = self.fc2(hidden)
        return y + hidden[..., : y.shape[-1]] if self.bypass else y


class TokenMixing(nn.Module):
    """An MLP over the tokens, the same for every feature (Tolstikhin et al. 2021, Eq. 1)."""

    def __init__(self, num_tokens: int, token_dim: int) -> None:
        super().__init__()
        self.mlp = MLP(num_tokens, token_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, num_tokens, dim) -> (batch, num_tokens, dim); the mask is not needed."""
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class Sublayer(nn.Module):
    """norm -> op -> dropout. With post-LN the norm stands in the Trunk, after the join, and is Identity here."""

    def __init__(self, norm: nn.Module, op: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.op = op
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, tokens, dim), mask: (batch, tokens) or None -> (batch, tokens, dim)."""
        return self.dropout(self.op(self.norm(x), mask))


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


def pre_norm_block(ops: Sequence[nn.Module], inner: str, dim: int, *, dropout: float = 0.0, eps: float = EPS) -> Trunk:
    """A block of sublayers, each behind a LayerNorm of its own, joined by the pattern `inner`."""
    return Trunk([Sublayer(nn.LayerNorm(dim, eps=eps), op, dropout) for op in ops], inner, dim)


def post_norm_block(ops: Sequence[nn.Module], inner: str, dim: int, *, dropout: float, eps: float) -> Trunk:
    """A block of sublayers, joined by the pattern `inner`, with a LayerNorm after each join (BERT's order)."""
    norms = [nn.LayerNorm(dim, eps=eps) for _ in ops]
    return Trunk([Sublayer(nn.Identity(), op, dropout) for op in ops], inner, dim, norms=norms)


class PatchEmbed(nn.Module):
    """Image -> tokens: linear patches, an optional class token in front, position embedding, dropout."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int,
        dim: int,
        class_token: bool,
        positions: str | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_shape = (channels, image_size, image_size)
        side = image_size // patch_size
        self.num_tokens = side * side + class_token
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(self.num_tokens, dim)) if positions == "learned" else None
        if positions == "sincos":
            table = sincos_positions(side, dim)
            table = torch.cat([torch.zeros(int(class_token), dim), table])
            self.register_buffer("pos_table", table, persistent=False)
        self.positions = positions
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, channels, image_size, image_size) -> (batch, num_tokens, dim).

        Raises ValueError for images of another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}: the model takes {self.image_shape}")
        x = self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], 1, -1), x], dim=1)
        if self.positions is not None:
            x = x + (self.pos_embed if self.positions == "learned" else self.pos_table.to(x.dtype))
        return self.dropout(x)


def sincos_positions(side: int, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2-D position embedding (side * side, dim) of Beyer et al. 2022 (arXiv 2205.01580); dim divides by 4."""
    if dim % 4:
        raise ValueError(f"dim = {dim}: sincos positions take a multiple of 4")
    frequencies = temperature ** -(torch.arange(dim // 4) / (dim // 4 - 1))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rows = rows.flatten()[:, None] * frequencies
    columns = columns.flatten()[:, None] * frequencies
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)


def initialize(model: nn.Module, scheme: str) -> None:
    """Set the initial weights of a whole model, in place. Joins keep the start that their pattern defines.

    scheme   linear, patches      embeddings, positions, class token    biases
    xavier   uniform (Glorot)     N(0, 0.02)                            0
    normal   N(0, 0.02)           N(0, 0.02)                            0
    torch    PyTorch's default    N(0, 1), as in the ACN authors' code  PyTorch's default
    """
    std = 1.0 if scheme == "torch" else 0.02
    for name, module in model.named_modules():
        if "joins" in name.split("."):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d) and scheme != "torch":
            weight = module.weight.view(len(module.weight), -1)
            if scheme == "xavier":
                nn.init.xavier_uniform_(weight)
            else:
                nn.init.normal_(weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, PatchEmbed):
            for parameter in (module.cls_token, module.pos_embed):
                if parameter is not None:
                    nn.init.normal_(parameter, std=std)
