"""Members of a tar: as Python's own tarfile finds them; a table of its records: as its headers tell."""

import contextlib
import io
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from acn_scale.data.make import write_shard
from acn_scale.data.tar import TABLE_NAME, Table, members
from acn_scale.errors import BadData

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(
    st.lists(st.tuples(NAMES, KINDS, st.integers(0, 1500)), max_size=6),
    FORMATS,
    st.none() | st.tuples(st.integers(0, 12), st.integers(0, 511), st.binary(max_size=3)),
)
@settings(max_examples=100, deadline=None)
def test_members_are_those_of_tarfile(
    wanted: list[tuple[str, bytes, int]], form: int, damage: tuple[int, int, bytes] | None
) -> None:
    """Whatever lies in the tar and however it is written; where it is damaged, or cut, those that come before."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=form) as tar:
        for name, kind, size in wanted:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, size if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
            with contextlib.suppress(ValueError):  # ustar takes no long names
                tar.addfile(member, io.BytesIO(b"a" * size))
        end = tar.offset  # zeros fill it up from there
    content = file.getvalue()
    if damage:
        block, offset, instead = damage
        at = (tarfile.BLOCKSIZE * block + offset) % (end + 1)
        content = content[:at] + instead + content[at + len(instead) :] if instead else content[:at]
    found: list[list[tuple[str, int, int]]] = [[], []]
    with tempfile.TemporaryFile() as file:
        file.write(content)
        for places, find in zip(found, (members, by_tarfile), strict=True):
            file.seek(0)
            with contextlib.suppress(tarfile.TarError, ValueError):
                places.extend(find(file))  # what came before an error counts
    assert found[0] == found[1]


def by_tarfile(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        yield from ((each.name, each.offset_data, each.size) for each in tar if each.isfile())


RECORDS = st.lists(st.dictionaries(st.sampled_from(["cls", "json", "png"]), st.binary(max_size=1500), min_size=1))


@given(RECORDS, st.integers(1, 120))
@settings(max_examples=50, deadline=None)
def test_a_table_says_what_the_headers_do(records: list[dict[str, bytes]], length: int) -> None:
    """However long the keys are; and webdataset's own reader finds the records alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        keys = [f"{number:0{length}d}" for number in range(len(records))]
        shard = write_shard(path, [{"__key__": key} | files for key, files in zip(keys, records, strict=True)])
        scanned, stored = Table(path), Table(path, shard.table)
        assert [stored.read(record) for record in range(len(records))] == records
        assert [stored.key(record) for record in range(len(records))] == keys
        assert stored.keys.tolist() == scanned.keys.tolist()
        assert (stored.extensions, stored.places.tolist()) == (scanned.extensions, scanned.places.tolist())
        read = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in read] == keys
        with tarfile.open(path) as tar:
            *names, last = tar.getmembers()
        assert (last.name, last.offset_data) == (TABLE_NAME, shard.table) and len(names) == sum(map(len, records))


@given(st.integers(-600, 900), st.binary(max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_damaged_table_is_refused_or_read_within_the_file(at: int, instead: bytes) -> None:
    """Nothing else is raised, and nothing is read from outside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        table = write_shard(path, [{"__key__": f"{number}", "cls": b"1"} for number in range(5)]).table
        content = bytearray(path.read_bytes())
        content[table + at : table + at + len(instead)] = instead
        path.write_bytes(content if instead else content[: table + at])
        with contextlib.suppress(BadData):
            opened = Table(path, table)
            for record in range(6):
                assert all(len(files) <= table for files in opened.read(record).values())


@pytest.mark.parametrize("where", [1, 512, 10**6])
def test_where_no_table_is_there_is_none(tmp_path: Path, where: int) -> None:
    write_shard(tmp_path / "a.tar", [{"__key__": "0", "cls": b"1"}])
    with pytest.raises(BadData, match="its table of records cannot be read"):
        Table(tmp_path / "a.tar", where)


@pytest.mark.parametrize("place", [(-1, 1), (0, -2), (0, 10**6), (512, 10**6), (10**6, 1)])
def test_a_table_names_no_place_outside(tmp_path: Path, place: tuple[int, int]) -> None:
    """Where it did, something else could be read as a record, or all memory taken."""
    path = tmp_path / "a.tar"
    table = write_shard(path, [{"__key__": "0", "cls": b"1"}]).table
    content = path.read_bytes()
    start = content.index(b"\n", table) + 2  # behind the only key, which has one byte
    assert content[start : start + 16] == struct.pack("<qq", 512, 1)
    path.write_bytes(content[:start] + struct.pack("<qq", *place) + content[start + 16 :])
    with pytest.raises(BadData, match="its table of records is damaged"):
        Table(path, table)
