"""Images -> tokens, and where these lie."""

import torch
from torch import Tensor, nn

from acn_scale.models.layers import Dropout


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
        self.dropout = Dropout(dropout)

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
