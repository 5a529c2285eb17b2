"""Our networks as Transformers' classes. Never imported here: it is the end of the code that goes with an export."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    ImageClassifierOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)

from acn_scale.models import build_model
from acn_scale.models.patches import PatchEmbed, sincos_positions


class AcnConfig(PretrainedConfig):
    """`network` is the model section of acn_scale's config."""

    model_type = "acn_scale"

    def __init__(self, network: dict[str, Any] | None = None, **keywords: Any) -> None:
        self.network = network or {}
        super().__init__(**keywords)


class AcnPreTrained(PreTrainedModel):
    config_class = AcnConfig

    def __init__(self, config: AcnConfig) -> None:
        super().__init__(config)
        values = dict(config.network)
        if self.takes_labels(values):
            values["num_classes"] = config.num_labels
        self.network = build_model(SimpleNamespace(**values))
        self.post_init()

    @classmethod
    def takes_labels(cls, values: dict[str, Any]) -> bool:
        """Whether the head is a classifier of config.num_labels classes."""
        return values["num_classes"] > 0

    def _init_weights(self, module: nn.Module) -> None:
        """Of what a file does not hold: the head of another task, and tables that are computed."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed) and module.positions == "sincos":
            patches = len(module.pos_table) - (module.cls_token is not None)
            table = sincos_positions(round(patches**0.5), module.pos_table.shape[1])
            module.pos_table.copy_(torch.cat([torch.zeros_like(module.pos_table)[patches:].cpu(), table]))

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embed.token if hasattr(self.network.embed, "token") else self.network.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.network.embed.token = value

    @staticmethod
    def as_mask(attention_mask: Tensor | None) -> Tensor | None:
        """(batch, tokens), numbers or bools -> bools."""
        return None if attention_mask is None else attention_mask.bool()

    def text_logits(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """input_ids, attention_mask, token_type_ids: (batch, tokens) -> (batch, num_labels), or of a masked language
        model (batch, tokens, vocab_size).
        """
        return self.network(input_ids, segments=token_type_ids, mask=self.as_mask(attention_mask))["logits"]


class AcnModel(AcnPreTrained):
    """The readout after the last block, before the head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """input_ids: (batch, tokens) or pixel_values: (batch, channels, height, width) -> (batch, tokens, dim)."""
        if pixel_values is not None:
            return BaseModelOutput(last_hidden_state=self.network.trunk(self.network.embed(pixel_values)))
        x = self.network.embed(input_ids, token_type_ids)
        return BaseModelOutput(last_hidden_state=self.network.trunk(x, self.as_mask(attention_mask)))


class AcnForMaskedLM(AcnPreTrained):
    _tied_weights_keys = {"network.head.decoder.weight": "network.embed.token.weight"}  # noqa: RUF012

    @classmethod
    def takes_labels(cls, values: dict[str, Any]) -> bool:
        return False

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head.decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """input_ids: (batch, tokens) -> logits (batch, tokens, vocab_size); labels: the same shape, -100 where none."""
        logits = self.text_logits(input_ids, attention_mask, token_type_ids)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class AcnForSequenceClassification(AcnPreTrained):
    @classmethod
    def takes_labels(cls, values: dict[str, Any]) -> bool:
        return True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """input_ids: (batch, tokens) -> logits (batch, num_labels); labels: (batch,), numbers where there is one."""
        logits = self.text_logits(input_ids, attention_mask, token_type_ids)
        loss = None if labels is None else self.network.loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class AcnForImageClassification(AcnPreTrained):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """pixel_values: (batch, channels, height, width) -> logits (batch, num_labels); labels: (batch,)."""
        logits = self.network(pixel_values)["logits"]
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
