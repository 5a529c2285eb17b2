"""Where the files of a tar lie."""

import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO


def members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of the regular files of a tar, as Python's tarfile finds them but several times as fast.

    That takes over at the first header which is more than ustar's plain ones. Raises tarfile.TarError.
    """
    offset = 0
    while True:
        header = os.pread(file.fileno(), tarfile.BLOCKSIZE, offset)
        name, kind, magic, prefix = header[:100], header[156:157], header[257:262], header[345:346]
        digits, checksum = header[124:135], header[148:154]
        if (
            len(header) < tarfile.BLOCKSIZE
            or kind != tarfile.REGTYPE
            or magic != b"ustar"
            or prefix != b"\0"
            or not (digits + checksum).isdigit()
        ):
            break
        # Adler-32's lower half is 1 plus the sum of the bytes; that of the checksum's own field is of eight spaces.
        own = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
        if own != (1 + int(checksum, 8) - 8 * ord(" ")) % 65521:
            break
        size = int(digits, 8)
        yield name.rstrip(b"\0").decode("utf-8", "surrogateescape"), offset + tarfile.BLOCKSIZE, size
        offset += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        yield from ((member.name, member.offset_data, member.size) for member in tar if member.isfile())
