"""One frozen, strict model of a run. Every key, its meaning and its default stand here and nowhere else."""

from acn_scale.config.data import (
    DataConfig,
    ImageDataConfig,
    RemoteConfig,
    Resize,
    SentenceDataConfig,
    StreamConfig,
    TextDataConfig,
)
from acn_scale.config.models import (
    OF_SUBLAYERS,
    POST_NORM,
    BertConfig,
    ImageModelConfig,
    MixerConfig,
    ModelConfig,
    Pattern,
    TrunkConfig,
    ViTConfig,
)
from acn_scale.config.run import (
    Config,
)
from acn_scale.config.section import (
    Section,
)
from acn_scale.config.training import (
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

__all__ = [
    "OF_SUBLAYERS",
    "POST_NORM",
    "BertConfig",
    "Config",
    "ContinualConfig",
    "DataConfig",
    "DepthConfig",
    "EarlyExitConfig",
    "EvalConfig",
    "HealthConfig",
    "ImageDataConfig",
    "ImageModelConfig",
    "MixerConfig",
    "ModelConfig",
    "OptimConfig",
    "Pattern",
    "ProfileConfig",
    "PruneConfig",
    "RemoteConfig",
    "Resize",
    "Section",
    "SentenceDataConfig",
    "StreamConfig",
    "TextDataConfig",
    "TrainConfig",
    "TrunkConfig",
    "ViTConfig",
]
