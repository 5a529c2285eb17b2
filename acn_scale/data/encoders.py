"""Whatever tokenizer lies in a folder -> one way to turn text into ids: ours, or those of Hugging Face's encoders."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from acn_scale.data.tokenizer import CLS, PAD, SEP, TOKENIZER_NAME, load_tokenizer
from acn_scale.errors import UserError

TOKENIZER_FILES = (TOKENIZER_NAME, "tokenizer.json", "vocab.txt")
SETTINGS_NAME = "tokenizer_config.json"  # beside Hugging Face's


@dataclass(frozen=True)
class Encoder:
    """`encode` gives the ids of a text without special ones; `pieces` what ids stand for."""

    encode: Callable[[str], list[int]]
    pieces: Callable[[list[int]], list[str]]
    vocab_size: int
    cls: int = CLS
    sep: int = SEP
    pad: int = PAD

    def sequence(self, texts: tuple[str, ...], max_tokens: int) -> tuple[list[int], list[int]]:
        """Ids and segments of [CLS] first [SEP], or [CLS] first [SEP] second [SEP].

        Of two texts that are too long together, the longer one is cut first (Devlin et al. 2019, app. A.2); the number
        that is left over goes to the one that was longer, as Transformers does it.
        """
        parts = [self.encode(text) for text in texts]
        room = max_tokens - 1 - len(parts)
        if len(parts) == 1:
            parts = [parts[0][:room]]
        elif sum(map(len, parts)) > room:
            small = min(*map(len, parts), room // 2)
            sizes = (small, room - small) if len(parts[0]) <= len(parts[1]) else (room - small, small)
            parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        ids, segments = [self.cls], [0]
        for number, part in enumerate(parts):
            ids += [*part, self.sep]
            segments += [number] * (len(part) + 1)
        return ids, segments


def load_encoder(folder: str | Path) -> Encoder:
    """Raises UserError for a folder that holds no tokenizer, or one without [CLS], [SEP] and [PAD]."""
    folder = Path(folder)
    if (folder / TOKENIZER_NAME).exists():
        ours = load_tokenizer(folder)
        return Encoder(ours.EncodeAsIds, ours.IdToPiece, ours.vocab_size())
    for name in TOKENIZER_FILES[1:]:
        if (folder / name).exists():
            return _hugging_face(folder / name)
    raise UserError(f"data.tokenizer = {folder}: holds none of {', '.join(TOKENIZER_FILES)}")


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files that make up the tokenizer in a folder, by name; none where there is no tokenizer."""
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if TOKENIZER_NAME in names:
        names = [TOKENIZER_NAME]  # tokenizer.json beside it says what it was trained on
    elif names:
        names += [name for name in (SETTINGS_NAME, "special_tokens_map.json") if (folder / name).exists()]
    return {name: (folder / name).read_bytes() for name in names}


def _hugging_face(path: Path) -> Encoder:
    import tokenizers  # here: no run on images needs it

    try:
        if path.suffix == ".json":
            theirs = tokenizers.Tokenizer.from_file(str(path))
            theirs.no_truncation()
            theirs.no_padding()
        else:
            theirs = tokenizers.BertWordPieceTokenizer(str(path), lowercase=_lowercase(path.parent))
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    special = {name: theirs.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]")}
    if missing := [name for name, number in special.items() if number is None]:
        raise UserError(f"{path}: has no {missing[0]}; must be a tokenizer of BERT's kind")

    def encode(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False).ids

    def pieces(ids: list[int]) -> list[str]:
        return [theirs.id_to_token(number) or "?" for number in ids]

    return Encoder(encode, pieces, theirs.get_vocab_size(), *special.values())


def _lowercase(folder: Path) -> bool:
    """As BERT's tokenizer does unless its settings say otherwise."""
    settings = folder / SETTINGS_NAME
    return json.loads(settings.read_text()).get("do_lower_case", True) if settings.exists() else True
