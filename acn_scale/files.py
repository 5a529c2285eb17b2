"""Files that are there whole, or not at all."""

from pathlib import Path


def write_file(path: Path, content: bytes) -> Path:
    """Under a temporary name first, so that a kill leaves what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    return temporary.replace(path)
