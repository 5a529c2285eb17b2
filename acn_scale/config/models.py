"""[model]: which network, and how its blocks are joined."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, model_validator

from acn_scale.config.section import Section

Pattern = Literal[
    "feedforward", "residual", "acn", "acn_detached", "acn_scaled", "h_acn", "highway", "layer_scale", "rezero",
    "layernorm_scaling", "value_residual", "dense", "denseformer", "hyper",
]  # fmt: skip
Init = Literal["xavier", "normal", "torch", "identity"]

# Variants of the residual network, which has a skip round each sublayer: by themselves they go through the blocks.
OF_SUBLAYERS = ("h_acn", "layer_scale", "rezero", "layernorm_scaling", "value_residual", "hyper")
# Patterns that carry x past a block, and nothing beside it.
CARRY_X = ("residual", "highway", "layer_scale", "rezero", "layernorm_scaling")
# Patterns that a LayerNorm can follow (post-LN): they carry x and no sum beside it, and need no LayerNorm before.
POST_NORM = ("feedforward", "residual", "highway", "layer_scale", "rezero", "value_residual")

# Dosovitskiy et al. 2021, table 1; Ti and S from Touvron et al. 2021, table 1.
VIT_SIZES = {
    "Ti": {"dim": 192, "depth": 12, "num_heads": 3},
    "S": {"dim": 384, "depth": 12, "num_heads": 6},
    "B": {"dim": 768, "depth": 12, "num_heads": 12},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16},
}


class TrunkConfig(Section):
    """What all models share: the blocks and how they are joined."""

    connectivity: Pattern = Field(description="how the blocks are joined")
    inner: Literal["auto", "through"] | Pattern = Field(
        "auto",
        description="how a block's sublayers are joined; through: by the pattern between blocks, which goes on through "
        "them; auto takes the field's usual partner: feedforward for acn, a skip round each sublayer for residual and "
        "its variants",
    )
    depth: int = Field(ge=1, description="number of blocks")
    dim: int = Field(ge=1, description="width of the tokens")
    dropout: float = Field(0.0, ge=0, lt=1, description="after embeddings and sublayers, and on attention weights")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth: probability that a sample passes a sublayer of the last block "
        "by, in training; it grows with depth in a line from 0",
    )  # fmt: skip
    init: Init = Field("xavier", description="scheme of the initial weights; identity: of blocks without skips")
    recompute: bool = Field(False, description="recompute each block's activations in the backward pass to save memory")

    @property
    def through(self) -> bool:
        """Whether the pattern between blocks goes on through them and joins their sublayers."""
        return self.inner == "through" or (self.inner == "auto" and self.connectivity in OF_SUBLAYERS)

    @property
    def round_sublayers(self) -> str:
        """The pattern that joins sublayers."""
        if self.inner not in ("auto", "through"):
            return self.inner
        usual = {"residual": "residual", "denseformer": "residual"}
        return self.connectivity if self.through else usual.get(self.connectivity, "feedforward")

    @model_validator(mode="after")
    def _joins_fit(self) -> "TrunkConfig":
        for name in ("value_residual", "h_acn"):  # which tell a block's two sublayers apart
            if self.inner == name or (self.connectivity == name and not self.through):
                raise ValueError(
                    f"connectivity = {self.connectivity}, inner = {self.inner}: {name} is a connectivity with inner = "
                    "through"
                )
        if self.drop_path and self.round_sublayers not in ("residual", *OF_SUBLAYERS):
            raise ValueError(
                f"drop_path = {self.drop_path}: with connectivity = {self.connectivity}, inner = {self.inner} nothing "
                "is carried past a sublayer that is left out"
            )
        return self


class ImageModelConfig(TrunkConfig):
    image_size: int = Field(ge=1, description="height and width of the input in pixels")
    patch_size: int = Field(ge=1, description="height and width of a patch in pixels")
    channels: Literal[1, 3] = Field(3, description="channels of the input: 3 for colour, 1 for grey")
    num_classes: int = Field(ge=2, description="number of classes")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")

    @model_validator(mode="after")
    def _whole_patches(self) -> "ImageModelConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size = {self.patch_size} must divide image_size = {self.image_size}")
        return self


class ViTConfig(ImageModelConfig):
    name: Literal["vit"] = Field(description="which model")
    size: Literal["Ti", "S", "B", "L"] | None = Field(
        None, description="sets dim, depth and num_heads; each may still be given"
    )
    num_heads: int = Field(ge=1, description="attention heads; must divide dim")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP as a multiple of dim")
    positions: Literal["learned", "sincos"] = Field("learned", description="position embedding")
    pool: Literal["cls", "mean", "mean_all"] = Field(
        "cls", description="class token, mean over patches, or mean over patches and class token (the authors' code)"
    )
    attention_norm: bool = Field(False, description="LayerNorm on the attention output (the ACN authors' ViT code)")
    mlp_bypass: bool = Field(False, description="fixed identity round both MLP maps (the ACN authors' ViT code)")

    @model_validator(mode="before")
    @classmethod
    def _apply_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("size"), str):
            return {**VIT_SIZES.get(values["size"], {}), **values}
        return values

    @model_validator(mode="after")
    def _widths_fit(self) -> "ViTConfig":
        if self.positions == "sincos" and (self.dim % 4 or self.dim < 8):
            raise ValueError(f"dim = {self.dim}: positions = 'sincos' takes a multiple of 4 from 8 on")
        if self.mlp_bypass and self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}: mlp_bypass takes 1 or more")
        return _check_widths(self)


class MixerConfig(ImageModelConfig):
    name: Literal["mixer"] = Field(description="which model")
    token_dim: int = Field(ge=1, description="hidden width of the token-mixing MLP")
    channel_dim: int = Field(ge=1, description="hidden width of the channel MLP")
    pool: Literal["cls", "mean"] = Field("mean", description="mean over patches, or a class token (the authors' code)")
    wrapper: bool = Field(
        False, description="wrap each block as LN(ReLU(Linear(block(x)) + x)), as the ACN authors' Mixer code does"
    )

    @model_validator(mode="after")
    def _sublayers_fit(self) -> "MixerConfig":
        if self.connectivity == "value_residual":
            raise ValueError("connectivity = value_residual: takes attention, which a Mixer has not")
        if self.wrapper and self.through:
            raise ValueError(f"wrapper = true: connectivity = {self.connectivity} would go through the wrapped blocks")
        return self


class BertConfig(TrunkConfig):
    name: Literal["bert"] = Field(description="which model")
    vocab_size: int = Field(ge=5, description="pieces of the tokenizer")
    max_tokens: int = Field(128, ge=2, description="longest sequence: size of the position embedding")
    num_heads: int = Field(ge=1, description="attention heads; must divide dim")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP as a multiple of dim")
    norm: Literal["post", "pre"] = Field("post", description="LayerNorm after each sublayer's join (BERT) or before it")
    num_classes: int = Field(
        0, ge=0, description="through BERT's pooler n classes, or 1: a number; 0: masked language model"
    )
    init: Init = Field("normal", description="scheme of the initial weights")

    @model_validator(mode="after")
    def _widths_fit(self) -> "BertConfig":
        if self.norm == "post" and (self.round_sublayers not in POST_NORM or self.connectivity == "layernorm_scaling"):
            raise ValueError(
                f"connectivity = {self.connectivity}, inner = {self.inner}: norm = 'post' takes {', '.join(POST_NORM)} "
                "round its sublayers"
            )
        return _check_widths(self)


def _check_widths(model):
    if round(model.mlp_ratio * model.dim) < 1:
        raise ValueError(f"mlp_ratio = {model.mlp_ratio}: leaves the MLP of dim = {model.dim} no hidden width")
    if model.dim % model.num_heads:
        raise ValueError(f"num_heads = {model.num_heads} must divide dim = {model.dim}")
    return model


ModelConfig = Annotated[ViTConfig | MixerConfig | BertConfig, Discriminator("name")]
