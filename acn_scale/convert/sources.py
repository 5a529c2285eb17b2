"""Whatever holds a trained network -> the network: a run, a checkpoint, an export."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from acn_scale.checkpoint import STATE_NAME, complete, damage, newest, read_state
from acn_scale.config import Config, ImageDataConfig, SentenceDataConfig
from acn_scale.convert.export import is_export, read_export, read_safetensors
from acn_scale.convert.hugging_face import read_hugging_face, read_parts
from acn_scale.convert.network import Card, Images, Masks, Network, network
from acn_scale.convert.timm_models import read_timm
from acn_scale.data.encoders import TOKENIZER_FILES, read_tokenizer
from acn_scale.data.shards import ShardIndex
from acn_scale.data.storage import read_file
from acn_scale.data.tokenizer import TOKENIZER_NAME
from acn_scale.errors import UserError
from acn_scale.runs import read_config, read_metrics
from acn_scale.zero import Pieces, frozen, kept

log = logging.getLogger(__name__)

FOREIGN = {"hf": lambda rest: read_hugging_face(Path(rest)), "timm": read_timm}


def read_model(source: Path | str, *, average: bool = False) -> Network:
    """Of a run folder (its newest undamaged checkpoint), a checkpoint, an export, hf:FOLDER or timm:NAME_OR_FILE.

    `average` takes the moving average of a checkpoint's weights. Raises UserError for anything else, and for files
    that are missing or damaged.
    """
    kind, _, rest = str(source).partition(":")
    if kind in FOREIGN and rest:
        if average:
            raise UserError(f"{source}: holds no average of the weights beside them")
        return FOREIGN[kind](rest)
    folder = Path(source)
    if (folder / STATE_NAME).exists():
        return _read_checkpoint(_whole(folder), average)
    if not average and is_export(folder):
        return read_export(folder)
    if checkpoints := complete(folder):
        return _read_checkpoint(newest(folder) or _whole(checkpoints[-1]), average)
    raise UserError(f"{source}: holds no complete checkpoint and no export{' with an average' * average}")


def run_of(source: Path | str, net: Network) -> Path | None:
    """The run's folder where `net` was read from `source`, a run or one of its checkpoints; None of all else."""
    if str(source).partition(":")[0] in FOREIGN or is_export(Path(source)):
        return None
    return Path(net.card.source).absolute().parents[1]


def results_folder(source: Path | str, net: Network, out: Path | None) -> Path:
    """Where evaluations of `net`, read from `source`, go: to `out`, or to the run or export itself.

    Raises UserError where `out` must be named: for another's network, and for a checkpoint that is not its run's
    newest, whose results would be taken for the run's.
    """
    if out is not None:
        return out
    if str(source).partition(":")[0] in FOREIGN:
        raise UserError(f"{source}: --out must name a folder for its results")
    run = run_of(source, net)
    if run is None:
        return Path(source)
    last = complete(run)[-1].name
    if Path(net.card.source).name != last:
        raise UserError(f"{source}: not the newest checkpoint of its run, {last}; --out must name a folder for results")
    return run


def read_start(source: str) -> tuple[Card, dict[str, Tensor]]:
    """What is known, and the weights by name, of whatever read_model takes, or of an encoder without a head in
    hf:FOLDER.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf" and rest:
        return read_parts(Path(rest))
    net = read_model(source)
    return net.card, net.weights()


def _whole(checkpoint: Path) -> Path:
    """The same. Raises UserError where it is damaged."""
    if found := damage(checkpoint):
        raise UserError(found[0] + (f", and {len(found) - 1} more files are damaged" if len(found) > 1 else ""))
    return checkpoint


def _read_checkpoint(checkpoint: Path, average: bool) -> Network:
    run = checkpoint.absolute().parents[1]
    cfg = read_config(run)
    state = read_state(checkpoint)
    if state.get("short"):
        raise UserError(
            f"{checkpoint}: no ACN yet: train.anneal = {cfg.train.anneal} leaves {state['short']:.2g} of the short "
            "connections; take a checkpoint of a later step"
        )
    depth = state["layout"]["depth"]  # which a run may have cut
    masked = cfg.model.name == "bert" and not cfg.model.num_classes
    accuracy = None if average else _accuracy(run, state["step"], depth)  # a run evaluates the weights themselves
    card = Card(
        model=cfg.model.model_copy(update={"depth": depth}),
        source=str(checkpoint),
        full_depth=depth,
        run=cfg.run.name,
        step=state["step"],
        data=cfg.data.train,
        average=average,
        accuracy=accuracy,
        evaluated_at=None if accuracy is None else state["step"],
        **_said_of_shards(cfg),
        masks=Masks(mask_ratio=cfg.data.mask_ratio, whole_words=cfg.data.whole_words) if masked else None,
    )
    if average:
        still = {name: each["fp32"] for name, each in frozen(checkpoint, state).items()}
        return network(card, _averages(checkpoint) | still, _tokenizer(cfg))
    weights = {name: each["fp32"] for name, each in kept(checkpoint, state).items()}
    return network(card, weights, _tokenizer(cfg))


def _accuracy(run: Path, step: int, depth: int) -> list[float] | None:
    """At depth 0 ... `depth`, by the run's evaluation at this very step: of another step it is another network's."""
    try:
        found = [line for line in read_metrics(run) if line["step"] == step and "eval/loss" in line]
        if not found:
            raise UserError(f"{run}: was not evaluated at step {step}")
    except UserError as error:
        log.warning("%s; the network goes without its accuracy by depth", error)
        return None
    return [found[-1][f"eval/depth_{each:02d}/accuracy"] for each in range(depth + 1)]


def _averages(checkpoint: Path) -> dict[str, Pieces]:
    """ZeRO or not: each rank's file holds whole tensors."""
    files = sorted(checkpoint.glob("ema_*.safetensors"))
    if not files:
        raise UserError(f"{checkpoint}: keeps no average of the weights; train.ema_decay makes a run keep one")
    pieces = {}
    for path in files:
        pieces |= read_safetensors(path)
    return pieces


def _said_of_shards(cfg: Config) -> dict[str, Any]:
    """The classes of labelled data, and how images become the input, where the shards can still be read."""
    data = cfg.data
    if not isinstance(data, ImageDataConfig | SentenceDataConfig):
        return {}
    try:
        info = ShardIndex.load(data.train, data.remote).info
    except UserError as error:
        log.warning("%s; the network goes without its preprocessing and the names of its classes", error)
        return {}
    if isinstance(data, SentenceDataConfig):
        return {"classes": info["classes"]}

    def each(values: list[float]) -> list[float]:
        """For each channel; of grey shards the same."""
        return values * cfg.model.channels if len(values) == 1 else values

    images = Images(
        mean=each(data.mean or info["mean"]),
        std=each(data.std or info["std"]),
        classes=info["classes"],
        resize=data.evaluation_resize(cfg.model.image_size),
    )
    return {"images": images}


def _tokenizer(cfg: Config) -> dict[str, bytes]:
    """The file beside the shards, or those in the tokenizer's own folder, where they can still be read."""
    data, lost = cfg.data, "the network goes without its tokenizer"
    if isinstance(data, ImageDataConfig):
        return {}
    folder = data.tokenizer if isinstance(data, SentenceDataConfig) else data.train
    try:
        if isinstance(data, SentenceDataConfig):
            if not (found := read_tokenizer(Path(folder))):
                log.warning("%s: holds none of %s; %s", folder, ", ".join(TOKENIZER_FILES), lost)
            return found
        return {TOKENIZER_NAME: read_file(folder, TOKENIZER_NAME, data.remote)}
    except OSError as error:
        log.warning("%s/%s: %s; %s", folder, TOKENIZER_NAME, error, lost)
        return {}
