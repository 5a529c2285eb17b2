"""AC-BERT and its residual twin: embeddings -> trunk -> masked-language-model head or classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acn_scale.config import BertConfig
from acn_scale.models.base import Model
from acn_scale.models.layers import MLP, Attention, Dropout, build_trunk, initialize
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

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens, segments: (batch, tokens), segments 0 or 1 and all 0 if left out -> (batch, tokens, dim).

        Raises ValueError for sequences longer than max_tokens.
        """
        length = tokens.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"sequences of {length} tokens: the model takes at most {self.max_tokens}")
        positions = torch.arange(length, device=tokens.device)
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.token(tokens) + self.position(positions) + self.segment(segments)
        return self.dropout(self.norm(x))


class MaskedLanguageHead(nn.Module):
    """dense -> GELU -> LayerNorm -> decoder tied to the token embedding, at the masked positions only."""

    def __init__(self, cfg: BertConfig) -> None:
        super().__init__()
        self.final_norm = nn.LayerNorm(cfg.dim, eps=BERT_EPS) if cfg.norm == "pre" else nn.Identity()
        self.dense = nn.Linear(cfg.dim, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim, eps=BERT_EPS)
        self.decoder = nn.Linear(cfg.dim, cfg.vocab_size)

    def forward(self, x: Tensor, masked: Tensor) -> Tensor:
        """x: (batch, tokens, dim), masked: (batch, masked) positions -> logits (batch, masked, vocab_size)."""
        x = x.gather(1, masked[..., None].expand(-1, -1, x.shape[-1]))
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

        labels: (batch, masked) token ids, or, without `masked`, (batch,) classes, or numbers where num_classes is 1.
        Returns "logits" (batch, masked, vocab_size) or (batch, num_classes) and, with labels, "loss".
        """
        x = self.embed(tokens, segments)
        if labels is None:
            return {"logits": self.head(self.trunk(x, mask), masked)}
        return self.supervised(x, mask, lambda x: self.head(x, masked), lambda logits: self.loss(logits, labels))

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
