"""Images in a folder for each class, read as they lie there, without shards."""

from collections.abc import Sequence
from pathlib import Path

from acn_scale.data.image_sources import Folder
from acn_scale.data.shards import Shard, ShardIndex
from acn_scale.errors import BadData, UserError


class ImageFiles:
    """A folder of class folders in the place of a folder of shards: one "shard" whose records are the files, by class
    and name. `index` describes it.

    `classes` names all classes in their order; default: the class folders, sorted. `split` is taken where the folder
    holds train and val folders of such. Raises UserError for a folder without images, and for a class folder that is
    not among the classes.
    """

    def __init__(self, folder: Path, split: str = "eval", classes: Sequence[str] | None = None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        self.images = Folder(str(folder), split, classes, streaming=False)
        self.location = str(self.images.root)
        info = {"kind": "images", "source": f"folder:{folder}", "classes": list(self.images.classes)}
        entry = Shard("*", self.images.size, 0, self.images.identity)
        self.index = ShardIndex(folder, [entry], info | {"rows_per_record": 1})

    def missing(self) -> list[str]:
        return []

    def read(self, shard: int, record: int, only: str | None = None) -> dict[str, bytes]:
        """As a record of a shard. Raises BadData for a file that cannot be read."""
        if only == "cls":
            return {"cls": str(self.images.label(record)).encode()}
        try:
            image = self.images.image(record)
        except OSError as error:
            raise BadData(f"cannot be read: {error.strerror}") from None
        return {"jpg": image.content, "cls": str(image.label).encode()}

    def key(self, shard: int, record: int) -> str | None:
        return self.images.paths[record]
