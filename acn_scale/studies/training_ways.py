"""The ways to train an ACN that could close the gap in training, and the twins that they are held to."""

from acn_scale.cli import load_config
from acn_scale.durations import lengthened
from acn_scale.studies.study import CONFIGS, Setting, Trial, check_classes

TWIN = "residual"
ACN = "model.connectivity=acn"
MUON = ("optim.name=muon", "train.zero_stage=1", "train.clip_norm=0.0")
# The authors' Mixers, ACN and twin alike, clip gradients to 1 while these still have fp16's loss scale, 2^16 at first:
# Adam's eps then matters.
CLIP = f"train.clip_norm={2**-16}"
# Ways that change how gradients become updates, each with a twin of its own.
RULES = {"muon": "with Muon", "clip_before_unscale": "with gradients clipped before the loss scale is taken off"}
# What is changed in the run of the twin; nothing else is.
WAYS: dict[str, tuple[str, ...]] = {
    TWIN: (),
    "acn": (ACN,),
    "acn_longer": (ACN,),
    "identity": (ACN, "model.init=identity"),  # blocks begin near the identity
    "acn_scaled": ("model.connectivity=acn_scaled",),  # the sum weighs higher blocks less
    "h_acn": ("model.connectivity=h_acn",),  # short connections with learned gates
    "anneal": (ACN, "train.anneal=0.5run"),  # begins as its twin
    "short_warmup": (ACN,),
    "layer_decay": (ACN, "optim.layer_decay=0.9"),  # lower rates for lower blocks
    "cut": (ACN, "depth.cut_while_training=true"),  # dead blocks
    "muon": (ACN, *MUON),
    "residual_muon": MUON,
    "clip_before_unscale": (ACN, CLIP),
    "residual_clip_before_unscale": (CLIP,),
}
OWN_TWINS = {way: f"{TWIN}_{way}" for way in RULES}
LONGER = {"acn_longer": 1.5}  # times
WARMUP = {"short_warmup": 0.5}  # times the config's own
TASKS = {
    "vit": ("studies/vit.toml", "vit/residual_vit_b16.toml"),
    "mixer": ("studies/mixer.toml", "mixer/residual_mixer_cifar10.toml"),
    "bert": ("studies/bert.toml", "bert/residual_bert_base.toml"),
}
# At laptop scale: steps, and what makes 34 runs a seed short enough.
STEPS = {"vit": 200, "mixer": 250, "bert": 320}
SMALLER = {"vit": "model.depth=9", "mixer": "model.depth=9", "bert": "model.depth=3"}
# A BERT's LayerNorms follow the joins, which h_acn does not take; at laptop scale its steps take long.
OF_BERT = {"laptop": [TWIN, "acn", "acn_longer", "identity", "acn_scaled", "anneal"]}
OF_BERT["paper"] = [way for way in WAYS if way != "h_acn"]
READINGS = 10  # evaluations in a run
EVALUATED = 500  # images, at laptop scale: ten thousand would take longer than training, as often


def trials(setting: Setting) -> list[Trial]:
    """Each way on each task; on a BERT, those of OF_BERT."""
    found, selection = [], {}
    laptop = setting.scale == "laptop"
    if laptop:
        selection = {"eval_per_class": max(1, EVALUATED // check_classes(setting.data, 2, "to tell apart"))}
    for task, (small, large) in TASKS.items():
        config, data = CONFIGS / (small if laptop else large), "text" if task == "bert" else "images"
        cfg = load_config(config, [])
        usual = f"{STEPS[task]}step" if laptop else cfg.train.length
        values = [f"{key}={1 / READINGS}run" for key in ("eval.every", "train.log_every")]
        values += ["model.connectivity=residual", *[SMALLER[task]] * laptop]
        for way in OF_BERT[setting.scale] if task == "bert" else WAYS:
            length = lengthened(usual, LONGER[way]) if way in LONGER else usual
            keys = [*values, f"train.length={length}", *WAYS[way]]
            if way in WARMUP:
                keys.append(f"optim.warmup={lengthened(cfg.optim.warmup, WARMUP[way])}")
            name, made = f"{task}-{way}", data if laptop else None
            found.append(Trial(name, config, keys, made, selection, needed=way == TWIN))
    return found
