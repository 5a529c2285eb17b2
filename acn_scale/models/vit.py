"""AC-ViT and its residual twin: patches -> trunk -> pool -> LayerNorm -> classifier."""

from torch import Tensor, nn

from acn_scale.config import ViTConfig
from acn_scale.models.classifier import Classifier
from acn_scale.models.initial_weights import initialize
from acn_scale.models.layers import EPS, MLP, Attention, build_trunk
from acn_scale.models.patches import PatchEmbed
from acn_scale.models.tokens import first_token


class ViTHead(nn.Module):
    """Pooling, LayerNorm and a linear map: the one head that every depth shares."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.pool = cfg.pool
        self.norm = nn.LayerNorm(cfg.dim, eps=EPS)
        self.linear = nn.Linear(cfg.dim, cfg.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, dim) -> logits (batch, num_classes)."""
        return self.linear(self.norm(x[:, 0] if self.pool == "cls" else x.mean(dim=1)))


class ViT(Classifier):
    """Vision Transformer (Dosovitskiy et al. 2021), pre-LN."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__(cfg.label_smoothing)

        def ops() -> list[nn.Module]:
            attention = Attention(
                cfg.dim,
                cfg.num_heads,
                dropout=cfg.dropout,
                out_norm=cfg.attention_norm,
                first_values=cfg.connectivity == "value_residual",
            )
            return [attention, MLP(cfg.dim, round(cfg.mlp_ratio * cfg.dim), bypass=cfg.mlp_bypass)]

        self.embed = PatchEmbed(
            image_size=cfg.image_size,
            patch_size=cfg.patch_size,
            channels=cfg.channels,
            dim=cfg.dim,
            class_token=cfg.pool != "mean",
            positions=cfg.positions,
            dropout=cfg.dropout,
        )
        self.trunk = build_trunk(cfg, ops)
        self.head = ViTHead(cfg)
        initialize(self, cfg.init)

    def read(self, x: Tensor) -> Tensor | None:
        return first_token(x) if self.head.pool == "cls" else None
