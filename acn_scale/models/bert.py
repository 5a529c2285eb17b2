"""AC-BERT and its residual twin: embeddings -> trunk -> masked-language-model head or classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acn_scale.config import BertConfig
from acn_scale.models.base import Model
from acn_scale.models.initial_weights import initialize
from acn_scale.models.layers import MLP, Attention, Dropout, build_trunk
from acn_scale.models.tokens import Layout, first_token, take
from acn_scale.models.trunk import Readouts

BERT_EPS = 1e-12  # of LayerNorm, as in BERT


class BertEmbed(nn.Module):
    """Sum of token, position and segment embeddings, LayerNorm, dropout."""

    def __init__(self, cfg: BertConfig) -> None:
        super().__init__()
        self.max_tokens = cfg.max_tokens
        self.token = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.position = nn.Embedding(cfg.max_tokens, cfg.dim)
        self.segment = nn.Embedding(2, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim, eps=BERT_EPS)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        """tokens, segments: (batch, tokens), segments 0 or 1 and all 0 if left out -> (batch, tokens, dim), or with a
        Layout (1, total, dim).

        Raises ValueError for sequences longer than max_tokens.
        """
        length = tokens.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"sequences of {length} tokens: the model takes at most {self.max_tokens}")
        positions = torch.arange(length, device=tokens.device)
        segments = torch.zeros_like(tokens) if segments is None else segments
        if layout is not None:
            tokens, segments, positions = (layout.flat(x) for x in (tokens, segments, positions.expand_as(tokens)))
        x = self.token(tokens) + self.position(positions) + self.segment(segments)
        return self.dropout(self.norm(x))


class MaskedLanguageHead(nn.Module):
    """dense -> GELU -> LayerNorm -> decoder tied to the token embedding."""

    def __init__(self, cfg: BertConfig) -> None:
        super().__init__()
        self.final_norm = nn.LayerNorm(cfg.dim, eps=BERT_EPS) if cfg.norm == "pre" else nn.Identity()
        self.dense = nn.Linear(cfg.dim, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim, eps=BERT_EPS)
        self.decoder = nn.Linear(cfg.dim, cfg.vocab_size)

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        """x: (batch, tokens, dim) -> logits (batch, tokens, vocab_size), or at `masked` positions, (batch, masked)."""
        x = x if masked is None else take(x, masked)
        return self.decoder(self.norm(F.gelu(self.dense(self.final_norm(x)))))


class ClassificationHead(nn.Module):
    """BERT's pooler on [CLS] (dense, tanh), dropout and a linear map."""

    def __init__(self, cfg: BertConfig) -> None:
        super().__init__()
        self.final_norm = nn.LayerNorm(cfg.dim, eps=BERT_EPS) if cfg.norm == "pre" else nn.Identity()
        self.pooler = nn.Linear(cfg.dim, cfg.dim)
        self.dropout = Dropout(cfg.dropout)
        self.linear = nn.Linear(cfg.dim, cfg.num_classes)

    def forward(self, x: Tensor, masked: None = None) -> Tensor:
        """x: (batch, tokens, dim) -> logits (batch, num_classes)."""
        return self.linear(self.dropout(self.pooler(self.final_norm(x[:, 0])).tanh()))


class Bert(Model):
    """BERT (Devlin et al. 2019): post-LN, or pre-LN with a LayerNorm on the readout.

    In the post-LN ACN a LayerNorm follows each sublayer, on the branch alone, and none stands on the sum; x_0 is the
    normed embedding. Unlike the authors' code, whose AC-BERT decoder is in effect untied, both twins tie it.
    """

    def __init__(self, cfg: BertConfig) -> None:
        super().__init__()

        def ops() -> list[nn.Module]:
            first_values = cfg.connectivity == "value_residual"
            attention = Attention(cfg.dim, cfg.num_heads, dropout=cfg.dropout, first_values=first_values)
            return [attention, MLP(cfg.dim, round(cfg.mlp_ratio * cfg.dim))]

        self.embed = BertEmbed(cfg)
        self.trunk = build_trunk(cfg, ops, eps=BERT_EPS, post_norm=cfg.norm == "post")
        self.by_sample = cfg.drop_path > 0
        self.head = ClassificationHead(cfg) if cfg.num_classes else MaskedLanguageHead(cfg)
        initialize(self, cfg.init)
        if not cfg.num_classes:
            self.head.decoder.weight = self.embed.token.weight

    def forward(
        self,
        tokens: Tensor,
        masked: Tensor | None = None,
        labels: Tensor | None = None,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """tokens, segments, mask: (batch, tokens), mask False at padding; masked: (batch, masked) positions to predict.

        labels: (batch, masked) token ids, or of a classifier (batch,) classes, or numbers where num_classes is 1.
        Returns "logits" (batch, masked, vocab_size), of all positions without `masked`, or (batch, num_classes) and,
        with labels, "loss".
        """
        if self._leaves_padding_out(mask, labels):
            layout = Layout.of(mask)
            x = self.embed(tokens, segments, layout)
            logits = self.head(self.trunk(x, layout, layout.firsts()).transpose(0, 1))
            return {"logits": logits, "loss": self.loss(logits, labels)}
        x = self.embed(tokens, segments)
        read = first_token(x) if isinstance(self.head, ClassificationHead) else masked
        if labels is None:
            return {"logits": self.head(self.trunk(x, mask, read))}
        return self.supervised(x, mask, read, lambda logits: self.loss(logits, labels))

    def _leaves_padding_out(self, mask: Tensor | None, labels: Tensor | None) -> bool:
        """A classifier in training does, but for what is drawn by the sample or read out at several depths."""
        if not self.training or labels is None or mask is None or not isinstance(self.head, ClassificationHead):
            return False
        # The head takes what stands first, and in what others pad that may be padding.
        return not (self.by_sample or self.trunk.drop_rates or self.loss_weights) and bool(mask[:, 0].all())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """() mean cross-entropy, or mean square of the error."""
        if logits.shape[-1] == 1:
            return F.mse_loss(logits.float().squeeze(-1), labels)
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())

    def readouts(
        self,
        tokens: Tensor,
        masked: Tensor | None = None,
        labels: Tensor | None = None,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Readouts:
        """The same -> logits as in forward() at each depth 0, 1, ..., in one pass.

        Of a classifier samples can leave on the way, as in Trunk.states().
        """
        return self.trunk.readouts(self.embed(tokens, segments), mask, lambda x: self.head(x, masked))

    def score(self, logits: Tensor, labels: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """logits: (batch, [masked,] classes), labels: (batch, [masked]) -> "loss" and "accuracy": (batch,).

        A number counts as right within half a unit.
        """
        if logits.shape[-1] == 1:
            error = logits.float().squeeze(-1) - labels
            return {"loss": error.square(), "accuracy": (error.abs() <= 0.5).float()}
        batch, classes = len(labels), logits.shape[-1]
        loss = F.cross_entropy(logits.float().view(-1, classes), labels.flatten(), reduction="none")
        correct = (logits.argmax(dim=-1) == labels).float()
        return {"loss": loss.view(batch, -1).mean(dim=1), "accuracy": correct.view(batch, -1).mean(dim=1)}
