"""AC-Mixer and its residual twin: patches -> trunk -> LayerNorm -> pool -> classifier."""

from functools import partial

from torch import Tensor, nn

from acn_scale.config import MixerConfig
from acn_scale.models.classifier import Classifier
from acn_scale.models.initial_weights import initialize
from acn_scale.models.layers import EPS, MLP, OverTokens, Wrapper, build_trunk
from acn_scale.models.patches import PatchEmbed


class MixerHead(nn.Module):
    """LayerNorm, pooling and a linear map: the one head that every depth shares."""

    def __init__(self, cfg: MixerConfig) -> None:
        super().__init__()
        self.pool = cfg.pool
        self.norm = nn.LayerNorm(cfg.dim, eps=EPS)
        self.linear = nn.Linear(cfg.dim, cfg.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, dim) -> logits (batch, num_classes)."""
        x = self.norm(x)
        return self.linear(x[:, 0] if self.pool == "cls" else x.mean(dim=1))


class Mixer(Classifier):
    """MLP-Mixer (Tolstikhin et al. 2021); with a class token and the wrapper, the ACN authors' Mixer."""

    def __init__(self, cfg: MixerConfig) -> None:
        super().__init__(cfg.label_smoothing)
        self.embed = PatchEmbed(
            image_size=cfg.image_size,
            patch_size=cfg.patch_size,
            channels=cfg.channels,
            dim=cfg.dim,
            class_token=cfg.pool == "cls",
            positions=None,
            dropout=cfg.dropout,
        )

        def ops() -> list[nn.Module]:
            return [MLP(self.embed.num_tokens, cfg.token_dim, linear=OverTokens), MLP(cfg.dim, cfg.channel_dim)]

        self.trunk = build_trunk(cfg, ops, wrap=partial(Wrapper, dim=cfg.dim) if cfg.wrapper else None)
        self.head = MixerHead(cfg)
        initialize(self, cfg.init)
