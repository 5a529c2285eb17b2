"""What a report is about: a network, the shards to evaluate it on, and the run it comes from, if there is one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from acn_scale.checkpoint import STATE_NAME
from acn_scale.config import DataConfig, EvalConfig, SentenceDataConfig, TextDataConfig
from acn_scale.convert.export import is_export
from acn_scale.convert.network import Card, Network
from acn_scale.convert.sources import read_model
from acn_scale.data import evaluation_of
from acn_scale.data.storage import read_file
from acn_scale.data.stream import Evaluation
from acn_scale.data.tokenizer import TOKENIZER_NAME
from acn_scale.errors import UserError
from acn_scale.runs import read_config


@dataclass(frozen=True)
class Subject:
    name: str
    given: Path  # as the user wrote it
    folder: Path  # of the run or the export
    is_run: bool
    network: Network
    data: DataConfig
    evaluation: Evaluation

    @property
    def slug(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"\W+", "_", self.name).strip("_") or "network"

    @property
    def metric(self) -> str:
        """What "accuracy" is of it."""
        return "accuracy on masked tokens" if isinstance(self.data, TextDataConfig) else "accuracy"


def open_subjects(folders: Sequence[Path], data: str | None) -> list[Subject]:
    """Of runs, checkpoints and exports. `data` takes the place of a run's own evaluation shards; an export needs it.

    Raises UserError for what is none of them, and for shards that are missing or do not fit.
    """
    subjects = [_open(folder, data) for folder in folders]
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        subjects = [replace(subject, name=str(subject.given)) for subject in subjects]
    for number, subject in enumerate(subjects):
        if subject.name in [other.name for other in subjects[:number]]:
            raise UserError(f"{subject.given}: given twice")
    return subjects


def _open(given: Path, data: str | None) -> Subject:
    net = read_model(given)
    whole = given.resolve()
    if is_export(given):
        config, batch_size = _data_of_export(given, net.card, data), EvalConfig().batch_size
        name, folder, is_run = whole.name, given, False
    else:
        checkpoint = (given / STATE_NAME).exists()
        folder = given.absolute().parents[1] if checkpoint else given
        cfg = read_config(folder)
        config, batch_size = cfg.data, cfg.eval.batch_size
        if data is not None:
            config = config.model_copy(update={"eval": data})
        name = f"{whole.parents[1].name}/{whole.name}" if checkpoint else whole.name
        is_run = True
    evaluation = evaluation_of(config, net.card.model, batch_size=batch_size)
    if TOKENIZER_NAME in net.tokenizer and isinstance(config, TextDataConfig):
        _check_tokenizer(net.tokenizer[TOKENIZER_NAME], config)
    return Subject(name, given, folder, is_run, net, config, evaluation)


def _data_of_export(folder: Path, card: Card, data: str | None) -> DataConfig:
    """Images prepared and text masked as the export says; masked as is usual where it does not."""
    if data is None:
        raise UserError(f"{folder}: an export has no evaluation shards of its own; name some with --data DIR")
    if card.model.name == "bert":
        if card.model.num_classes:
            return SentenceDataConfig(kind="sentences", train=data, eval=data, tokenizer=str(folder))
        return TextDataConfig(kind="text", train=data, eval=data, **(card.masks.model_dump() if card.masks else {}))
    if card.images is None:
        raise UserError(f"{folder}/config.json: images = null: must say how images are prepared")
    return card.images.data(data)


def _check_tokenizer(tokenizer: bytes, data: DataConfig) -> None:
    try:
        same = read_file(data.eval, TOKENIZER_NAME, data.remote) == tokenizer
    except OSError as error:
        raise UserError(f"{data.eval}/{TOKENIZER_NAME}: {error.strerror or error}") from None
    if not same:
        raise UserError(f"{data.eval}/{TOKENIZER_NAME}: not the tokenizer that the network was trained with")
