"""A torch data set of maps and their photos, see `Maps.to_torch`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from attnx.jobs.photos import Photos
from attnx.limits import IMAGE_SIDE
from attnx.methods import resize

if TYPE_CHECKING:
    from attnx.jobs.reader import Maps

__all__ = ["MapDataset"]


class MapDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A torch data set of the rows with a map. The arguments and errors are those of `Maps.to_torch`."""

    def __init__(
        self,
        maps: Maps,
        images: bool | str | Path | None = None,
        size: tuple[int, int] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        if "stats" in maps.settings:
            raise ValueError(f"to_torch: expected a job with maps; {maps.folder} has statistics of heads")
        if size is not None:
            _check_size(size)
            if maps.settings.get("store") == "full":
                raise ValueError(f"size: expected a job of maps over patches; {maps.folder} has whole maps")
        self.maps = maps
        self.size = size
        self.transform = transform
        self.photos = None if images is None or images is False else Photos(maps, None if images is True else images)
        if self.photos is not None:
            self.photos.check()
        elif transform is not None:
            raise ValueError("transform: only with images; got images=None")
        good = [np.ones(0, bool), *(maps.has_map(shard) for shard in range(maps.shards))]
        self._places = np.flatnonzero(np.concatenate(good))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: int) -> dict[str, Any]:
        place = int(self._places[at])
        row = self.maps[place]
        assert row.map is not None
        if row.crop is None or row.width is None or row.height is None:
            raise ValueError(f"{row.key[:200]}: expected a row with width, height and crop; got a map without them")
        amap = torch.from_numpy(row.map.astype(np.float32))
        item: dict[str, Any] = {
            "key": row.key, "map": amap if self.size is None else _resized(row.key, amap, self.size),
            "text": row.text or "", "crop": torch.tensor(row.crop), "width": row.width, "height": row.height,
        }  # fmt: skip
        if self.photos is not None:
            photo = self.photos(place, row)
            if self.size is not None:
                photo = photo.resize(self.size[::-1], Image.Resampling.BILINEAR)
            item["image"] = _tensor(photo) if self.transform is None else self.transform(photo)
        return item


def _check_size(size: tuple[int, int]) -> None:
    """Raise ValueError unless the size is a (height, width) in pixels."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= IMAGE_SIDE for side in sides):
        raise ValueError(f"size: expected (height, width) in 1..{IMAGE_SIDE}; got {size!r:.80}")


def _resized(key: str, amap: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map [..., h, w], resized bilinearly."""
    if amap.ndim < 2:
        raise ValueError(f"{key[:200]}: expected a map [..., h, w] over patches for size; got {list(amap.shape)}")
    return resize(amap, size)


def _tensor(photo: Image.Image) -> torch.Tensor:
    """A photo as float32 [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous().float().div_(255)
