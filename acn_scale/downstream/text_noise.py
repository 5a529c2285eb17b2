"""Noise on texts, drawn from a generator that the sample's key seeds: as typing makes it, and as words get lost."""

from functools import partial

import numpy as np

from acn_scale.data.sentences import TextNoise
from acn_scale.errors import UserError


def swap_characters(text: str, random: np.random.Generator, share: float) -> str:
    """Of each word of two letters or more, with probability `share`, two neighbouring characters change places."""
    words = text.split(" ")
    for place, word in enumerate(words):
        if random.random() < share and len(word) > 1:
            first = int(random.integers(len(word) - 1))
            words[place] = word[:first] + word[first + 1] + word[first] + word[first + 2 :]
    return " ".join(words)


def drop_words(text: str, random: np.random.Generator, share: float) -> str:
    """Each word is left out with probability `share`; one is kept at least."""
    words = text.split(" ")
    draws = random.random(len(words))
    kept = [word for word, draw in zip(words, draws, strict=True) if draw >= share]
    return " ".join(kept or [words[int(draws.argmax())]])


KINDS = {"swap": swap_characters, "drop": drop_words}


def text_noise(name: str) -> TextNoise:
    """Of a name such as "swap_0.1". Raises UserError for another."""
    kind, _, share = name.partition("_")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if kind not in KINDS or not 0 <= value <= 1:
        raise UserError(f"--noise {name}: must be swap_P or drop_P with P from 0 to 1, such as swap_0.1")
    return partial(KINDS[kind], share=value)
