"""Images in a folder for each class, read as they lie there, without shards."""

import os
from pathlib import Path

from acn_scale.data.image_sources import Folder
from acn_scale.data.shards import ShardIndex
from acn_scale.data.storage import Shard
from acn_scale.errors import BadData


class ImageFiles:
    """A folder of class folders in the place of a folder of shards: one "shard" whose records are the files, by class
    and name. `index` describes it.

    `split` is taken where the folder holds train and val folders of such. Raises UserError for one without images.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.images = Folder(str(folder), split, None, streaming=False)
        self.location = str(self.images.root)

    @property
    def index(self) -> ShardIndex:
        info = {"kind": "images", "source": f"folder:{self.location}", "classes": list(self.images.classes)}
        entry = Shard("*", self.images.size, 0, self.images.identity)
        return ShardIndex(self.location, [entry], info | {"rows_per_record": 1})

    @property
    def class_folders(self) -> set[str]:
        """Those that hold images."""
        return {path.split(os.sep, 1)[0] for path in self.images.paths}

    def missing(self) -> list[str]:
        return []

    def read(self, shard: int, record: int, only: str | None = None) -> dict[str, bytes]:
        """As a record of a shard. Raises BadData for a file that cannot be read."""
        if only == "cls":
            return {"cls": str(self.images.label(record)).encode()}
        image = self.images.image(record)
        if image.problem:
            raise BadData(image.problem)
        return {"jpg": image.content, "cls": str(image.label).encode()}

    def key(self, shard: int, record: int) -> str | None:
        return self.images.paths[record]
