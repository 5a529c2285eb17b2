"""A network's tokenizer -> the files that Transformers' AutoTokenizer loads, with the same ids for any text."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acn_scale.data.encoders import SETTINGS_NAME
from acn_scale.data.tokenizer import CLS, MASK, PAD, SEP, TOKENIZER_NAME, UNK
from acn_scale.errors import UserError
from acn_scale.runs import read_json, write_json

SPECIAL = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
SPACE = "\u2581"  # SentencePiece's mark for a space


def write_tokenizer(files: Mapping[str, bytes], folder: Path, max_tokens: int) -> None:
    """Of a SentencePiece model, made into theirs, or of Hugging Face's own files. Raises UserError for others."""
    if TOKENIZER_NAME in files:
        _write_ours(files[TOKENIZER_NAME], folder, max_tokens)
        return
    for name, content in files.items():
        (folder / name).write_bytes(content)
    settings = {"tokenizer_class": "BertTokenizer"}  # a BERT's need not say so, and in the folder may be an ACN
    settings |= read_json(folder / SETTINGS_NAME) if SETTINGS_NAME in files else {}
    write_json(folder / SETTINGS_NAME, settings | {"model_max_length": max_tokens})


def _write_ours(content: bytes, folder: Path, max_tokens: int) -> None:
    """`content` is a SentencePiece model, unigram or BPE. Sequences become [CLS] text [SEP], or of two texts
    [CLS] first [SEP] second [SEP].

    Of two splits with the very same score (== = and = ==) it may take the other one: SentencePiece adds up in fp32.
    Marks on a letter in another order than Unicode's, or on one that is spelled out (a ligature's), are joined to it,
    which SentencePiece does not.
    Raises UserError for another file.
    """
    from google.protobuf.message import DecodeError  # here: needed for nothing else
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    except DecodeError:
        raise UserError(f"{TOKENIZER_NAME}: not a SentencePiece model") from None
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if len(pieces) <= MASK:
        raise UserError(f"{TOKENIZER_NAME}: holds {len(pieces)} pieces, fewer than the special ones")
    names = {role: pieces[number][0] for role, number in SPECIAL.items()}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(number, pieces[number][0]) for number in SPECIAL.values()],
            "normalizer": _normalizer(proto.normalizer_spec),
            "pre_tokenizer": _spaces("never"),
            "post_processor": _template(names),
            "decoder": _spaces("always"),
            "model": _model(pieces, unigram=proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM),
        },
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens}
    settings |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    write_json(folder / SETTINGS_NAME, settings | names)


def _added(number: int, piece: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece, "special": True} | flags


def _normalizer(spec: Any) -> dict[str, Any]:
    """SentencePiece's own table of characters, then single spaces, none at the ends but its mark in front."""
    # Precompiled puts what the first mark makes of a letter for the letter with all of its marks: compose them before.
    steps: list[dict[str, Any]] = [{"type": "NFKC"}] if "nfkc" in spec.name else []
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    for pattern, content in ((r"\A +", ""), (r" +\z", ""), (" +", SPACE)):
        steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    steps.append({"type": "Prepend", "prepend": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _spaces(prepend: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prepend, "split": True}


def _template(names: dict[str, str]) -> dict[str, Any]:
    def special(role: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": names[role], "type_id": segment}}

    first, second = ({"Sequence": {"id": name, "type_id": segment}} for segment, name in enumerate("AB"))
    single = [special("cls_token", 0), first, special("sep_token", 0)]
    tokens = {
        names[role]: {"id": names[role], "ids": [SPECIAL[role]], "tokens": [names[role]]}
        for role in ("cls_token", "sep_token")
    }
    pair = [*single, second, special("sep_token", 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def _model(pieces: list[tuple[str, float]], *, unigram: bool) -> dict[str, Any]:
    if unigram:
        return {"type": "Unigram", "unk_id": UNK, "vocab": [list(piece) for piece in pieces], "byte_fallback": False}
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    return {
        "type": "BPE",
        "vocab": vocab,
        "merges": _merges(pieces, vocab),
        "unk_token": pieces[UNK][0],
        "fuse_unk": True,
        "byte_fallback": False,
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "ignore_merges": False,
    }


def _merges(pieces: list[tuple[str, float]], vocab: dict[str, int]) -> list[list[str]]:
    """Each way to make a piece of two others, in the order in which SentencePiece would merge: by the piece's score."""
    merges = []
    for piece, score in pieces[MASK + 1 :]:
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in ways if pair[0] in vocab and pair[1] in vocab]
        merges += [(-score, vocab[left], vocab[right], left, right) for left, right in known]
    return [[left, right] for *_, left, right in sorted(merges)]
