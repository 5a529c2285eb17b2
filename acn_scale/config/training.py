"""The sections about a run's training: how long, by which rule, what is watched, evaluated and kept."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from acn_scale.config.section import Section
from acn_scale.durations import Duration, Interval, Length


class OptimConfig(Section):
    """Without weight decay on biases and norms."""

    name: Literal["adamw", "lamb", "muon"] = Field(
        "adamw", description="lamb: ZeRO-0 only; muon: for the blocks' matrices, with updates as large as AdamW's, and "
        "AdamW for all else; not with ZeRO-0 or train.clip_norm",
    )  # fmt: skip
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
    bucket_size: int = Field(
        25_000_000, ge=1, description="gradients that are summed over the ranks at once, at most; tools/plan.py has "
        "the number for a link",
    )  # fmt: skip
    overlap_comm: bool = Field(
        False, description="ZeRO-1 and 2: DeepSpeed sums gradients while others are computed, as it always does with "
        "ZeRO-3 and as we do with ZeRO-0; not measured on GPUs",
    )  # fmt: skip
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
    log_every: Interval = Field("50step", description="between two lines of training metrics")


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
    every: Interval = Field("1ep", description="between two evaluations; one is always made at the end")
    batch_size: int = Field(256, ge=1, description="samples of one evaluation pass on one rank")
    tolerance: float = Field(0.5, ge=0, description="points of accuracy the cut-off depth may lose")


class CheckpointConfig(Section):
    every: Interval = Field("1ep", description="between two checkpoints; one is always made at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: Interval | None = Field(
        None, description="the first checkpoint at or after each multiple of this is kept for good"
    )


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
    every: Interval = Field("1ep", description="between two prunings; none is made at the end")


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
