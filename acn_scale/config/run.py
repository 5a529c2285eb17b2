"""The whole config of a run, and what its sections ask of one another."""

from pydantic import Field, model_validator

from acn_scale.config.data import DataConfig
from acn_scale.config.models import CARRY_X, ModelConfig
from acn_scale.config.section import Section
from acn_scale.config.training import (
    CheckpointConfig,
    ContinualConfig,
    DepthConfig,
    EarlyExitConfig,
    EvalConfig,
    HealthConfig,
    OptimConfig,
    ProfileConfig,
    PruneConfig,
    TrainConfig,
)
from acn_scale.errors import UserError


class RunConfig(Section):
    name: str = Field(
        pattern=r"^\w[\w.=-]*(/\w[\w.=-]*)*$", description="results go to <dir>/<name>; a name may hold slashes"
    )
    dir: str = Field("runs", min_length=1, description="folder of all runs")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initial weights, the order of the data, and every random draw"
    )


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
        if self.optim.name == "muon" and train.clip_norm:
            raise ValueError(
                f"train.clip_norm = {train.clip_norm}: optim.name = muon takes 0, or it is Muon's updates that are "
                "clipped, which are as long whatever the gradient is"
            )
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
        ramp = self.train.batch_ramp != "0step"
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
