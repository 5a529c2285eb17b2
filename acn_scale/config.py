"""One frozen, strict model of a run. Every key, its meaning and its default stand here and nowhere else."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, model_validator

from acn_scale.durations import Duration, Length
from acn_scale.errors import UserError

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


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Section):
    name: str = Field(
        pattern=r"^\w[\w.=-]*(/\w[\w.=-]*)*$", description="results go to <dir>/<name>; a name may hold slashes"
    )
    dir: str = Field("runs", min_length=1, description="folder of all runs")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initial weights, the order of the data, and every random draw"
    )


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


class RemoteConfig(Section):
    """Shards behind a URL: how they are fetched and kept."""

    cache_dir: str | None = Field(
        None, min_length=1, description="folder on the node's own disk for them; default: in the temporary folder"
    )
    cache_gib: float = Field(100.0, gt=0, description="size of that folder; what was used longest ago is dropped")
    timeout: float = Field(60.0, gt=0, description="seconds of silence after which a connection has failed")
    retries: int = Field(6, ge=0, description="further attempts at a download, after about 1, 2, 4, ... 30 seconds")


class StreamConfig(Section):
    """What all data share: where the shards are and in which order they are read."""

    train: str = Field(
        min_length=1, description="folder of training shards with their index.json; or s3:// gs:// hf:// https://"
    )
    eval: str = Field(min_length=1, description="folder or URL of evaluation shards with their index.json")
    streams: int = Field(
        64, ge=1, description="canonical streams the data are split into; ranks that divide it read shards of their own"
    )
    shuffle_window: int = Field(16384, ge=1, description="samples of a stream that are shuffled together")
    workers: int = Field(0, ge=0, description="loader processes of each rank; 0 loads in the training process")
    on_bad_sample: Literal["fail", "skip"] = Field(
        "fail", description="what a sample that cannot be read does: ends the run, or is replaced by another one"
    )
    max_bad_samples: int = Field(1000, ge=0, description="different samples a run may skip before it ends")
    verify_checksums: bool = Field(
        True, description="check each shard's sha256 when a rank first opens it (remote ones always when they arrive)"
    )
    remote: RemoteConfig = RemoteConfig()


class Resize(Section):
    """How an image of any size becomes the model's input."""

    size: int = Field(ge=1, description="in pixels: of the shorter side before the centre crop (fit = crop), of both "
        "(squash), or of the longer (border)")  # fmt: skip
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = Field(
        "bicubic", description="between pixels"
    )
    fit: Literal["crop", "squash", "border"] = Field(
        "crop", description="keep the shape and crop the centre; do not keep it; or keep it and fill up with the mean"
    )
    like: Literal["torchvision", "timm", "transformers"] = Field(
        "torchvision", description="whose resizing and cropping is followed digit by digit; timm's is Pillow's"
    )

    @model_validator(mode="after")
    def _known_there(self) -> "Resize":
        if self.like != "timm" and (self.fit == "border" or self.interpolation in ("box", "hamming")):
            raise ValueError(
                f"fit = {self.fit}, interpolation = {self.interpolation}: {self.like} has it not, timm has"
            )
        return self

    def crop_pct(self, image_size: int) -> float:
        """timm's name for it, of which it makes floor(image_size / crop_pct) pixels again."""
        share = image_size / self.size
        return share if math.floor(image_size / share) == self.size else image_size / (self.size + 0.5)


class ImageDataConfig(StreamConfig):
    kind: Literal["images"] = Field(description="what the shards hold")
    augment: Literal["none", "crop_flip", "randaugment", "cifar"] = Field(
        "none",
        description="none; RandomResizedCrop and flip; the same with RandAugment(2, 10); "
        "padded RandomCrop and AutoAugment's CIFAR-10 policy",
    )
    random_erasing: float = Field(0.0, ge=0, le=1, description="probability of filling a rectangle with noise")
    mixup: float = Field(0.0, ge=0, description="alpha of Mixup's beta distribution; 0 turns it off")
    cutmix: float = Field(0.0, ge=0, le=1, description="probability of CutMix")
    mean: list[float] | None = Field(None, description="per channel, of pixels in 0..1; default: from index.json")
    std: list[PositiveFloat] | None = Field(
        None, description="per channel, of pixels in 0..1; default: from index.json"
    )
    resize: Resize | None = Field(
        None, description="of images to be evaluated; default: where `augment` crops, the shorter side to image_size / "
        "0.875 and the centre of it (timm's default), else none",
    )  # fmt: skip
    mask_ratio: ClassVar[float] = 0.0

    @property
    def crops(self) -> bool:
        """Whether training images come in any size, of which a random crop is taken."""
        return self.augment in ("crop_flip", "randaugment")

    def evaluation_resize(self, image_size: int) -> Resize | None:
        """None: images to be evaluated come in the model's size."""
        return self.resize or (Resize(size=math.floor(image_size / 0.875)) if self.crops else None)

    @property
    def group(self) -> int:
        """Neighbours in the order of the data that stay together on one rank: the pairs that Mixup and CutMix mix."""
        return 2 if self.mixup > 0 or self.cutmix > 0 else 1


class TextDataConfig(StreamConfig):
    kind: Literal["text"] = Field(description="what the shards hold")
    mask_ratio: float = Field(0.15, gt=0, lt=1, description="share of the tokens to predict")
    whole_words: bool = Field(False, description="choose words to predict, with all their pieces, instead of pieces")
    group: ClassVar[int] = 1


class SentenceDataConfig(StreamConfig):
    kind: Literal["sentences"] = Field(description="what the shards hold")
    tokenizer: str = Field(
        min_length=1, description="folder with a tokenizer: tokenizer.model (ours), tokenizer.json or vocab.txt (BERT)"
    )
    max_tokens: int | None = Field(
        None, ge=4, description="longest sequence with [CLS] and [SEP], longer ones are cut; default: 128, or "
        "model.max_tokens where that is less"
    )  # fmt: skip
    buckets: bool = Field(True, description="put samples of like length into a batch, so that little of it is padding")
    mask_ratio: ClassVar[float] = 0.0
    group: ClassVar[int] = 1


DataConfig = Annotated[ImageDataConfig | TextDataConfig | SentenceDataConfig, Discriminator("kind")]


class OptimConfig(Section):
    """Without weight decay on biases and norms."""

    name: Literal["adamw", "lamb", "muon"] = Field(
        "adamw", description="lamb: ZeRO-0 only; muon: for the blocks' matrices, with AdamW for all else"
    )
    lr: float = Field(gt=0, description="peak learning rate")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="decay of the two moments"
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="the learning rate of a block as a multiple of that of the block above it"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled: each step shrinks a weight by lr * weight_decay")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then a linear decay"
    )
    warmup: Duration = Field("0step", description="linear warm-up from 0")
    decay: Duration = Field("0.2run", description="length of the final linear decay (wsd only)")
    final_lr: float = Field(0.0, ge=0, le=1, description="learning rate at the end as a share of the peak")


class TrainConfig(Section):
    length: Length = Field(description="length of the run")
    global_batch_size: int = Field(ge=1, description="samples of one optimizer step over all ranks")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples of one forward pass on one rank; default: the rank's whole share"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights and activations in the passes")
    zero_stage: int = Field(0, ge=0, le=3, description="DeepSpeed ZeRO stage")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="what lies in main memory instead of a GPU's: the optimizer's state (ZeRO 1 to 3), or also "
        "the parameters (ZeRO-3)",
    )  # fmt: skip
    compile: bool = Field(False, description="torch.compile each block (not with ZeRO-3)")
    init_from: str | None = Field(
        None,
        min_length=1,
        description="start from the weights of a run, a checkpoint, an export, hf:FOLDER (also of an encoder without a "
        "head) or timm:NAME_OR_FILE; another connectivity's joins and another task's head keep their own start",
    )
    freeze: bool = Field(False, description="train the head alone; all else stays as train.init_from has it")
    batch_ramp: Duration = Field(
        "0step", description="at first an eighth of the global batch, doubled three times at equal intervals of this"
    )
    anneal: Duration = Field(
        "0step", description="acn only: a block's input is at first that of a residual network; the share of the short "
        "connections in it falls from 1 to 0 in a line over this",
    )  # fmt: skip
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="of a moving average of the weights, kept in checkpoints; 0 keeps none"
    )
    clip_norm: float = Field(0.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    log_every: Duration = Field("50step", description="between two lines of training metrics")


class EarlyExitConfig(Section):
    """Training that makes readouts below full depth good enough to leave at. train/loss is then the weighted sum."""

    losses: Literal["last", "all", "rotational", "gradual"] = Field(
        "last",
        description="depths whose loss is trained on: the last; all, by a weight that grows with depth; or LayerSkip's "
        "curriculum, the last and every so many others in turn, or one more at a time from the last down",
    )
    scale: float = Field(
        0.2, ge=0, le=1, description="weight of the lower depths (rotational and gradual), LayerSkip's e_scale"
    )
    rotation: int = Field(
        15, ge=1, description="of so many blocks one is trained on in each step (rotational), LayerSkip's R"
    )
    layer_dropout: float = Field(
        0.0, ge=0, lt=1, description="probability that a sample passes by the last block, at the end of the run; it "
        "grows with depth and step from 0 (residual networks and highway)",
    )  # fmt: skip

    @property
    def on(self) -> bool:
        return self.losses != "last" or self.layer_dropout > 0


class EvalConfig(Section):
    every: Duration = Field("1ep", description="between two evaluations; one is always made at the end")
    batch_size: int = Field(256, ge=1, description="samples of one evaluation pass on one rank")
    tolerance: float = Field(0.5, ge=0, description="points of accuracy the cut-off depth may lose")


class CheckpointConfig(Section):
    every: Duration = Field("1ep", description="between two checkpoints; one is always made at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: Duration | None = Field(None, description="checkpoints at multiples of this are kept for good")


class HealthConfig(Section):
    """What is done when numbers or ranks go wrong."""

    on_bad_step: Literal["fail", "skip", "rollback"] = Field(
        "skip",
        description="what a loss or gradient that is not finite, or a spike, does: ends the run, drops the update, or "
        "goes back to the last checkpoint and passes over the batches that led there",
    )
    spike_factor: float = Field(
        0.0, ge=0, description="a loss above this multiple of the median of the last 100 is a spike; 0: none is"
    )
    rollback_batches: int = Field(
        1, ge=1, description="global batches, the bad one the last of them, that are passed over after going back"
    )
    max_bad_steps: int = Field(20, ge=0, description="bad steps of the whole run, above which it ends")
    max_skipped_steps: int = Field(
        20, ge=1, description="dropped updates in a row that end the run, also those that fp16's loss scale drops"
    )
    hang_timeout: float = Field(
        600.0, gt=0, description="seconds without progress after which a rank counts as hung and the job is ended"
    )


class DepthConfig(Section):
    """Cutting off, while the run goes on, the blocks at the top that it does not use any more."""

    cut_while_training: bool = Field(
        False, description="cut blocks at the top that have died off the network and the optimizer's state"
    )
    dead_below: float = Field(
        0.05, ge=0, le=1, description="a block is dead while its share of the gradient's norm, and what it changes of "
        "the logits, are both below this",
    )  # fmt: skip
    evaluations: int = Field(
        2, ge=1, description="evaluations in a row after which dead blocks are cut off, where the accuracy below them "
        "stays within eval.tolerance",
    )  # fmt: skip


class PruneConfig(Section):
    """Movement pruning: linear weights of the blocks are set to zero for good while the run goes on."""

    share: float = Field(
        0.0, ge=0, lt=1, description="of the blocks' linear weights that are left, those with the smallest |weight x "
        "gradient|, which are pruned each time; 0 prunes none",
    )  # fmt: skip
    every: Duration = Field("1ep", description="between two prunings; none is made at the end")


class ContinualConfig(Section):
    """Tasks that are learnt one after another, each told by its classes alone (task-incremental)."""

    tasks: int = Field(
        1, ge=1, description="the classes are dealt to so many tasks by the seed; each is trained on for an equal part "
        "of the run, and a sample's class is one of its task's; an epoch is then a pass over one task",
    )  # fmt: skip
    method: Literal["naive", "si", "ewc", "replay"] = Field(
        "naive", description="against forgetting: nothing; Synaptic Intelligence; Elastic Weight Consolidation; or "
        "half of each batch from a few samples kept of earlier tasks",
    )  # fmt: skip
    strength: float = Field(1.0, ge=0, description="weight of the penalty (si, ewc)")
    damping: float = Field(0.1, gt=0, description="added to the square of a weight's way over a task (si)")
    memory: int = Field(10, ge=1, description="samples kept of each class (replay)")


class ProfileConfig(Section):
    """A look at single steps."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        max_length=2,
        description="first and last step to write a trace of, for Perfetto, into <run>/profile",
    )

    @model_validator(mode="after")
    def _first_and_last(self) -> "ProfileConfig":
        if self.steps and (len(self.steps) == 1 or self.steps[0] > self.steps[1]):
            raise ValueError(f"steps = {self.steps}: must be the first step and the last, or none")
        return self


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    early_exit: EarlyExitConfig = EarlyExitConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    depth: DepthConfig = DepthConfig()
    prune: PruneConfig = PruneConfig()
    continual: ContinualConfig = ContinualConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _stage_allows(self) -> "Config":
        stage, train = self.train.zero_stage, self.train
        if self.optim.name == "lamb" and stage:
            raise ValueError(
                "optim.name = lamb: its ratios are of whole layers, which train.zero_stage = 0 alone keeps"
            )
        if self.optim.name == "muon" and stage == 0:
            raise ValueError("optim.name = muon: train.zero_stage must be 1, 2 or 3")
        lowest = {"none": 0, "optimizer": 1, "parameters": 3}[train.offload]
        if stage < lowest:
            raise ValueError(f"train.offload = {train.offload}: train.zero_stage must be {lowest} or more")
        if train.compile and stage == 3:
            raise ValueError("train.compile = true: train.zero_stage must be 0, 1 or 2")
        return self

    @model_validator(mode="after")
    def _something_to_freeze(self) -> "Config":
        if self.train.freeze:
            if not self.train.init_from:
                raise ValueError("train.freeze = true: train.init_from must name the network that stays as it is")
            blocks = {"optim.name = muon": self.optim.name == "muon", "prune.share": self.prune.share > 0}
            blocks["depth.cut_while_training = true"] = self.depth.cut_while_training
            for key in [key for key, given in blocks.items() if given]:
                raise ValueError(f"{key}: is about blocks, which train.freeze = true does not train")
        return self

    @model_validator(mode="after")
    def _prune_fits_training(self) -> "Config":
        for key, value in {"zero_stage": 0, "precision": "fp32", "ema_decay": 0.0}.items():
            given = getattr(self.train, key)
            if self.prune.share and given != value:
                raise ValueError(f"train.{key} = {given}: prune.share = {self.prune.share} takes {value}")
        return self

    @model_validator(mode="after")
    def _tasks_fit(self) -> "Config":
        tasks, model, train = self.continual.tasks, self.model, self.train
        if tasks == 1:
            if self.continual.method != "naive":
                raise ValueError(f"continual.method = {self.continual.method}: continual.tasks must be 2 or more")
            return self
        if self.data.kind != "images":
            raise ValueError(f"continual.tasks = {tasks}: data.kind must be images")
        if model.num_classes % tasks or model.num_classes == tasks:
            raise ValueError(
                f"continual.tasks = {tasks}: model.num_classes = {model.num_classes} must be a multiple of it, and more"
            )
        needed = {"train.zero_stage": (train.zero_stage, 0), "train.precision": (train.precision, "fp32")}
        needed |= {"train.batch_ramp": (train.batch_ramp, "0step"), "data.mixup": (self.data.mixup, 0.0)}
        needed |= {"data.cutmix": (self.data.cutmix, 0.0), "model.label_smoothing": (model.label_smoothing, 0.0)}
        needed |= {"depth.cut_while_training": (self.depth.cut_while_training, False)}
        for key, (given, value) in needed.items():
            if given != value:
                raise ValueError(f"{key} = {given}: continual.tasks = {tasks} takes {value}")
        return self

    @model_validator(mode="after")
    def _data_fit_model(self) -> "Config":
        kind = "images"
        if self.model.name == "bert":
            kind = "sentences" if self.model.num_classes else "text"
        if self.data.kind != kind:
            classes = f" with num_classes = {self.model.num_classes}" if self.model.name == "bert" else ""
            raise ValueError(f"data.kind = {self.data.kind}: model.name = {self.model.name}{classes} takes {kind}")
        if self.data.kind == "sentences" and (self.data.max_tokens or 0) > self.model.max_tokens:
            raise ValueError(f"data.max_tokens = {self.data.max_tokens}: model.max_tokens = {self.model.max_tokens}")
        for key in ("mean", "std") if kind == "images" else ():
            values = getattr(self.data, key)
            if values is not None and len(values) != self.model.channels:
                raise ValueError(f"data.{key} = {values}: model.channels = {self.model.channels} takes as many numbers")
        return self

    @model_validator(mode="after")
    def _early_exit_fits_model(self) -> "Config":
        if self.early_exit.on and self.model.depth < 2:
            raise ValueError(f"model.depth = {self.model.depth}: the keys of early_exit take 2 blocks or more")
        if self.early_exit.layer_dropout and self.model.connectivity not in CARRY_X:
            raise ValueError(
                f"early_exit.layer_dropout = {self.early_exit.layer_dropout}: model.connectivity must be one of "
                f"{', '.join(CARRY_X)}, which carry x past a block that is left out, and no more"
            )
        return self

    @model_validator(mode="after")
    def _anneal_fits_model(self) -> "Config":
        if self.train.anneal != "0step" and self.model.connectivity != "acn":
            raise ValueError(
                f"train.anneal = {self.train.anneal}: model.connectivity must be acn; it is {self.model.connectivity}"
            )
        return self

    def micro_batch_size(self, world_size: int) -> int:
        """Samples of one forward pass on one rank. Raises UserError where the numbers do not divide."""
        total, group = self.train.global_batch_size, self.data.group
        if total % (world_size * group):
            raise UserError(
                f"train.global_batch_size = {total}: must be a multiple of {world_size * group}"
                f" ({world_size} ranks{', and pairs for Mixup or CutMix' if group > 1 else ''})"
            )
        ramp = not self.train.batch_ramp.startswith("0step")
        if ramp and total % (8 * world_size * group):
            raise UserError(
                f"train.global_batch_size = {total}: must be a multiple of {8 * world_size * group}: train.batch_ramp "
                f"begins with an eighth of it, on {world_size} ranks"
            )
        share = total // world_size // (8 if ramp else 1)
        micro = self.train.micro_batch_size or share
        if share % micro or micro % group:
            raise UserError(
                f"train.micro_batch_size = {micro}: must divide a rank's share of {share} samples"
                + (" and be even, since Mixup and CutMix mix pairs" if group > 1 else "")
            )
        return micro
