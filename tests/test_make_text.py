"""Shards of text: every document in its place, whoever writes them and however often it is killed."""

import gzip
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from made import hashes, record_of, run_killed

from acn_scale.cli import text_parser
from acn_scale.data.make_text import describe_text, make_text_shards, train_source_tokenizer
from acn_scale.data.shards import ShardIndex
from acn_scale.data.text_sources import Counts, TextSources, split_documents
from acn_scale.data.tokenizer import MASK, SEP, load_tokenizer, sample_documents, train_tokenizer
from acn_scale.errors import UserError

DOCUMENTS = ["One line.\nAnother line.", "Once more; with a tab\there.", "Ünïcödé — and \u4e2d\u6587.", "The last."]


@pytest.mark.parametrize("kind", ["text", "text.gz", "wikiextractor", "jsonl", "parquet", "hf", "hf streaming"])
def test_sources_of_text(kind: str, tmp_path: Path) -> None:
    plain = "\n\n\n".join(DOCUMENTS) + "\n"
    wiki = "".join(f'<doc id="1" url="u" title="t">\n{document}\n</doc>\n' for document in DOCUMENTS)
    rows = [{"id": 1, "text": document} for document in DOCUMENTS]
    lines = "\n".join(json.dumps(row) for row in rows)
    name, content = {
        "text": ("a.txt", plain.encode()),
        "text.gz": ("a.txt.gz", gzip.compress(plain.encode())),
        "wikiextractor": ("wiki_00", wiki.encode()),
        "jsonl": ("a.jsonl", lines.encode()),
    }.get(kind, ("a.jsonl", lines.encode()))
    (tmp_path / name).write_bytes(content)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    opener = {"wikiextractor": "text", "text.gz": "text"}.get(kind, kind.split()[0])
    place = {"hf": tmp_path, "parquet": tmp_path / "*.parquet"}.get(opener, tmp_path / name)
    sources = TextSources([f"{opener}:{place}"], streaming="streaming" in kind)
    assert [document.rstrip("\n") for _, document in sources.documents()] == DOCUMENTS


def test_wikiextractor_documents_keep_their_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "wiki").write_text('<doc id="1">\nTitle\n\nText.\n</doc>\n\n<doc id="2">\nOther\n\n</doc>\n')
    documents = [document for _, document in TextSources([f"text:{tmp_path}/wiki"]).documents()]
    assert documents == ["Title\n\nText.\n", "Other\n\n"]


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (b"ok\n\n\xff\xfe", "text", "line 3: not UTF-8"),
        (b'{"text": "a"}\n{"text": ', "jsonl", "line 2: not JSON"),
        (b'{"body": "a"}', "jsonl", "line 1: no text in 'text'; --column must name one of body"),
        (b"PAR1 nonsense", "parquet", "Parquet"),
    ],
)
def test_text_that_cannot_be_read(content: bytes, source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(TextSources([f"{source}:{tmp_path}/file"]).documents())


def test_half_of_a_character_is_replaced(tmp_path: Path) -> None:
    """JSON can hold one, such as an emoji that was cut; no tokenizer takes it."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{word} \\ud83d"}}\n' for word in topics))
    sources = TextSources([f"jsonl:{tmp_path}/a.jsonl"])
    assert {document[-2:] for _, document in split_documents(sources, 0.0, Counts())} == {" ?"}
    train_source_tokenizer(sources, 60, tmp_path / "tokenizer")
    made = make_text_shards(sources, tmp_path / "tokenizer", tmp_path / "out", tokens=8, eval_share=0.1)
    assert made["train"].num_samples > 0


def test_weights_are_shares_of_the_characters(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("\n\n".join(f"{number:04d}{'a' * 6}" for number in range(1000)))
    (tmp_path / "b").write_text("\n\n".join(f"{number:04d}{'b' * 36}" for number in range(1000)))
    names = [f"text:{tmp_path}/a", f"text:{tmp_path}/b"]
    sizes = [0, 0]
    for number, document in TextSources(names, weights=[1, 3]).documents():
        sizes[number] += len(document)
    assert sizes[1] / sizes[0] == pytest.approx(3, rel=0.01)
    assert sizes[0] == 10_999, "until the smaller one has no more"
    assert sum(1 for _ in TextSources(names).documents()) == 2000


def test_duplicates_go_and_sides_are_kept() -> None:
    """A document's side depends on nothing but itself."""

    class Repeated(TextSources):
        def documents(self) -> Iterator[tuple[int, str]]:
            yield from ((0, f"document {number % 300}") for number in range(900))

    counts = Counts()
    sides = list(split_documents(Repeated(["pydoc"]), 0.2, counts))
    assert (counts.read, counts.duplicates) == (900, 600)
    assert len({document for _, document in sides}) == 300
    assert counts.eval == sum(held_out for held_out, _ in sides)
    assert 30 < counts.eval < 90
    wider = dict((document, held_out) for held_out, document in split_documents(Repeated(["pydoc"]), 0.5, Counts()))
    assert all(wider[document] for held_out, document in sides if held_out)


def test_a_sample_is_bounded_and_the_same_in_any_order() -> None:
    documents = [f"{number:05d}" * 4 for number in range(1000)]
    sample = sample_documents(documents, 2000, hash)
    assert sum(map(len, sample)) == 2000
    assert set(sample) == set(sample_documents(documents[::-1], 2000, hash))
    assert sample_documents(documents, 10**9, hash) == documents


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of many documents with its tokenizer."""
    folder = tmp_path_factory.mktemp("prose")
    words = sorted({word for topic in topics.values() for word in topic.split()})[::5]
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(words, random.integers(3, 400))) for _ in range(3000)]
    (folder / "prose.txt").write_text("\n\n".join(documents))
    train_source_tokenizer(TextSources([f"text:{folder}/prose.txt"]), 300, folder / "tokenizer", eval_share=0.1)
    return folder


def test_ctrl_c_does_not_wait_for_sentencepiece(tmp_path: Path) -> None:
    """Which holds Python up; nothing is written before it ends."""
    before, seen = signal.getsignal(signal.SIGINT), set()

    def documents() -> Iterator[str]:
        for topic in topics.values():
            seen.add((signal.getsignal(signal.SIGINT), (tmp_path / "tokenizer").exists()))
            yield topic

    train_tokenizer(documents(), 300, tmp_path / "tokenizer")
    assert seen == {(signal.SIG_DFL, False)}
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(UserError, match="--vocab-size 500000"):
        train_tokenizer(topics.values(), 500_000, tmp_path / "other")
    assert signal.getsignal(signal.SIGINT) == before


def test_packed_shards_are_the_tokenized_documents(prose: Path, tmp_path: Path) -> None:
    """In their order, every token of a part but the last few; the same for any number of workers."""
    sources = TextSources([f"text:{prose}/prose.txt"])
    for workers in (1, 3):
        make_text_shards(
            sources, prose / "tokenizer", tmp_path / str(workers), tokens=32, shard_size=512, workers=workers
        )
    tokenizer = load_tokenizer(prose / "tokenizer")
    for split in ("train", "eval"):
        assert hashes(tmp_path / "1" / split) == hashes(tmp_path / "3" / split)
        names = sorted(str(path) for path in (tmp_path / "1" / split).glob("*.tar"))
        records = [sample["npy"] for sample in wds.WebDataset(names, shardshuffle=False).decode()]
        body = np.concatenate(records)[:, 1:-1].reshape(-1)
        texts = [text for held_out, text in split_documents(sources, 0.1, Counts()) if held_out == (split == "eval")]
        stream = [piece for text in texts for piece in (*tokenizer.EncodeAsIds(text), SEP)]
        assert body.tolist() == stream[: len(body)]
        assert len(stream) - len(body) < 30
        assert body.dtype == np.uint16
        info = ShardIndex.load(tmp_path / "1" / split).info
        counts = np.bincount(body, minlength=300)[MASK + 1 :]
        if split == "train":
            shares = (counts + 1) / (counts.sum() + 300)
            assert info["unigram_loss"] == pytest.approx(-(counts * np.log(shares)).sum() / counts.sum(), rel=1e-3)


def test_killed_text_makers_go_on_where_they_stopped(prose: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", f"text:{prose}/prose.txt"
    arguments = ["tools/make_text_shards.py", "--source", source, "--tokenizer", str(prose / "tokenizer")]
    run_killed([*arguments, "--tokens", "32", "--shard-size", "64", "--out", str(out)], out / "train", seen=40)
    finished = {
        path: path.stat().st_mtime_ns for path in (out / "train").glob("*.tar") if record_of(path.parent, path).exists()
    }
    sources = TextSources([source])
    for folder in (out, tmp_path / "whole"):
        make_text_shards(sources, prose / "tokenizer", folder, tokens=32, shard_size=64, workers=2)
    for split in ("train", "eval"):
        assert hashes(out / split) == hashes(tmp_path / "whole" / split)
        assert ShardIndex.load(out / split).info == ShardIndex.load(tmp_path / "whole" / split).info
    assert finished
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())


def test_parts_that_would_be_empty(prose: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the first blocks")
    with pytest.raises(UserError, match=r"--eval-share 0.5: leaves less than 128 tokens"):
        make_text_shards(
            TextSources([f"text:{tmp_path}/short.txt"]), prose / "tokenizer", tmp_path / "o", eval_share=0.5
        )
    with pytest.raises(UserError, match=r"--weights: 1 of them for 2 sources"):
        TextSources(["pydoc", "pydoc"], weights=[1.0])
    assert not list((tmp_path / "o").iterdir()), "what was made is removed"
    with pytest.raises(UserError, match="--tokens 2: must be 3 or more"):
        make_text_shards(TextSources(["pydoc"]), prose / "tokenizer", tmp_path / "o", tokens=2)


def test_shards_of_other_text_are_not_taken_over(prose: Path, tmp_path: Path) -> None:
    """Text that has changed since a run was killed would be cut at other places."""
    text = tmp_path / "text.txt"
    text.write_bytes((prose / "prose.txt").read_bytes())
    sources, options = TextSources([f"text:{text}"]), {"tokens": 32, "shard_size": 64}
    make_text_shards(sources, prose / "tokenizer", tmp_path / "out", **options)
    text.write_text("Something new.\n\n" + text.read_text())
    with pytest.raises(UserError, match=r"holds other shards \(files = "):
        make_text_shards(sources, prose / "tokenizer", tmp_path / "out", **options)


def test_dry_run_says_what_there_is() -> None:
    assert "71 train, 7 eval" in describe_text(TextSources(["pydoc"]), 0.1)


@pytest.mark.parametrize("words", [["--source", "a", "b", "--weights", "1", "2"], ["--source", "a", "--source", "b"]])
def test_sources_add_up(words: list[str]) -> None:
    args = text_parser(None).parse_args([*words, "--out", "here"])
    assert args.source == ["a", "b"] and args.weights in (None, [1.0, 2.0])
