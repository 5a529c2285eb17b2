"""The residual twins equal timm's and Transformers' models on the same weights."""

import pytest
import torch
from test_models import TRUNK, bert, mixer, randomize, vit
from torch import Tensor, nn


def copy_weights(target: nn.Module, source: nn.Module, names: dict[str, str]) -> None:
    """source's weights -> target under target's names; "{}" stands for the block. Strict both ways."""
    depth = range(TRUNK["depth"])
    table = {ours.format(i): theirs.format(i) for ours, theirs in names.items() for i in depth}
    weights = {
        ours + kind: source.state_dict()[theirs + kind]
        for ours, theirs in table.items()
        for kind in (".weight", ".bias", "")
        if theirs + kind in source.state_dict()
    }
    shapes = {name: weight.shape for name, weight in target.state_dict().items()}
    target.load_state_dict({name: weight.reshape(shapes[name]) for name, weight in weights.items()})


VIT_NAMES = {
    "embed.proj": "patch_embed.proj",
    "trunk.blocks.{}.blocks.0.norm": "blocks.{}.norm1",
    "trunk.blocks.{}.blocks.0.op.qkv": "blocks.{}.attn.qkv",
    "trunk.blocks.{}.blocks.0.op.proj": "blocks.{}.attn.proj",
    "trunk.blocks.{}.blocks.1.norm": "blocks.{}.norm2",
    "trunk.blocks.{}.blocks.1.op.fc1": "blocks.{}.mlp.fc1",
    "trunk.blocks.{}.blocks.1.op.fc2": "blocks.{}.mlp.fc2",
    "embed.pos_embed": "pos_embed",
    "head.linear": "head",
}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_residual_vit_equals_timm(pool: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "depth": 3, "num_heads": 2}
    theirs = VisionTransformer(**shape, global_pool={"cls": "token", "mean": "avg"}[pool], class_token=pool == "cls")
    ours = vit(connectivity="residual", pool=pool)
    randomize(theirs)
    names = {"embed.cls_token": "cls_token", "head.norm": "norm"} if pool == "cls" else {"head.norm": "fc_norm"}
    copy_weights(ours, theirs, VIT_NAMES | names)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(images)["logits"], theirs.eval()(images), rtol=0, atol=1e-5)


def test_residual_mixer_equals_timm() -> None:
    from timm.models.mlp_mixer import MlpMixer

    shape = {"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "num_blocks": 3}
    theirs = MlpMixer(**shape, mlp_ratio=(0.5, 4.0))
    ours = mixer(connectivity="residual", token_dim=8, channel_dim=64)
    randomize(theirs)
    names = {"embed.proj": "stem.proj", "head.norm": "norm", "head.linear": "head"}
    for index, (norm, mlp) in enumerate((("norm1", "mlp_tokens"), ("norm2", "mlp_channels"))):
        op = f"trunk.blocks.{{}}.blocks.{index}.op"
        names |= {f"{op}.{fc}": f"blocks.{{}}.{mlp}.{fc}" for fc in ("fc1", "fc2")}
        names[f"trunk.blocks.{{}}.blocks.{index}.norm"] = f"blocks.{{}}.{norm}"
    copy_weights(ours, theirs, names)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(images)["logits"], theirs.eval()(images), rtol=0, atol=1e-5)


BERT_NAMES = {
    "embed.token": "bert.embeddings.word_embeddings",
    "embed.position": "bert.embeddings.position_embeddings",
    "embed.segment": "bert.embeddings.token_type_embeddings",
    "embed.norm": "bert.embeddings.LayerNorm",
    "trunk.blocks.{}.blocks.0.op.qkv": "bert.encoder.layer.{}.attention.self.qkv",
    "trunk.blocks.{}.blocks.0.op.proj": "bert.encoder.layer.{}.attention.output.dense",
    "trunk.blocks.{}.norms.0": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "trunk.blocks.{}.blocks.1.op.fc1": "bert.encoder.layer.{}.intermediate.dense",
    "trunk.blocks.{}.blocks.1.op.fc2": "bert.encoder.layer.{}.output.dense",
    "trunk.blocks.{}.norms.1": "bert.encoder.layer.{}.output.LayerNorm",
}
MLM_NAMES = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions.decoder",
}


class Fused(nn.Module):
    """A Transformers model whose state dict shows query, key and value as one matrix, as ours holds them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        weights = self.model.state_dict()
        for layer in range(TRUNK["depth"]):
            prefix = f"bert.encoder.layer.{layer}.attention.self."
            for kind in (".weight", ".bias"):
                parts = [weights[prefix + part + kind] for part in ("query", "key", "value")]
                weights[f"{prefix}qkv{kind}"] = torch.cat(parts)
        return weights


@pytest.mark.parametrize("num_classes", [0, 3])
def test_residual_bert_equals_transformers(num_classes: int) -> None:
    """With segments and padding: logits and loss."""
    import transformers

    shape = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "max_position_embeddings": 7, "num_labels": 3}
    kind = transformers.BertForSequenceClassification if num_classes else transformers.BertForMaskedLM
    theirs = kind(transformers.BertConfig(**shape)).eval()
    ours = bert(connectivity="residual", num_classes=num_classes).eval()
    randomize(theirs)
    pooler = {"head.pooler": "bert.pooler.dense", "head.linear": "classifier"}
    copy_weights(ours, Fused(theirs), BERT_NAMES | (pooler if num_classes else MLM_NAMES))

    tokens, segments = torch.randint(5, 30, (4, 7)), torch.randint(0, 2, (4, 7))
    mask = torch.arange(7) < torch.tensor([[7], [5], [6], [7]])
    masked = torch.tensor([[1, 3], [0, 4], [2, 5], [4, 6]])
    inputs = {"input_ids": tokens, "token_type_ids": segments, "attention_mask": mask.long()}
    if num_classes:
        labels = torch.tensor([0, 1, 2, 1])
        expected = theirs(**inputs, labels=labels)
        got, logits = ours(tokens, labels=labels, segments=segments, mask=mask), expected.logits
    else:
        labels = torch.randint(5, 30, (4, 2))
        everywhere = torch.full_like(tokens, -100).scatter(1, masked, labels)
        expected = theirs(**inputs, labels=everywhere)
        got = ours(tokens, masked, labels, segments, mask)
        logits = expected.logits.gather(1, masked[..., None].expand(-1, -1, 30))
    torch.testing.assert_close(got["logits"], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["loss"], expected.loss, rtol=0, atol=1e-5)
