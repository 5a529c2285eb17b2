"""Members of a tar: as Python's own tarfile finds them."""

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from hypothesis import given, settings
from hypothesis import strategies as st

from acn_scale.data.tar import members

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
