"""The readers as a MONAI ImageReader: ``LoadImage(reader=MedsegReader())`` reads what medseg reads, as strictly."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from numpy.typing import NDArray

from medseg.errors import ReadError
from medseg.readers import read_image, reader_for
from medseg.volume import Volume, on_one_grid

Name = str | PathLike[Any]
Names = Sequence[Name] | Name


class MedsegReader(ImageReader):
    """Reads NIfTI files and DICOM series folders with the READERS of medseg.

    As with MONAI's NibabelReader, one channel comes as (I, J, K) and several as (I, J, K, C); LoadImage's
    ``ensure_channel_first`` makes both (C, I, J, K). The affine is in RAS+ mm. Several paths are the channels of one
    image; each may be stored in its own order of axes.
    """

    def verify_suffix(self, filename: Names) -> bool:
        """Tell by their names whether all paths can be read here."""
        try:
            return all(reader_for(Path(name)) is not None for name in ensure_tuple(filename))
        except ReadError:
            return False

    def read(self, data: Names, **kwargs: Any) -> list[Volume]:
        """Read one path, or one path per channel.

        Raises
        ------
        ReadError, GeometryError : as read_image does; CHANNEL_GRID when the paths do not share one grid. LoadImage
            wraps them in a RuntimeError that quotes them, unless the reader is given when it is called.
        """
        names = [Path(name) for name in ensure_tuple(data)]
        return on_one_grid({f"{number} ({path.name})": read_image(path) for number, path in enumerate(names)})

    def get_data(self, img: Volume | Sequence[Volume]) -> tuple[NDArray[Any], dict[str, Any]]:
        """Return the voxels and what MONAI needs to know of them."""
        volumes = ensure_tuple(img)
        first: Volume = volumes[0]
        array = np.concatenate([volume.array for volume in volumes])
        several = array.shape[0] > 1
        meta: dict[str, Any] = {
            str(MetaKeys.AFFINE): np.array(first.affine),
            str(MetaKeys.ORIGINAL_AFFINE): np.array(first.affine),
            str(MetaKeys.SPATIAL_SHAPE): np.asarray(first.shape),
            str(MetaKeys.SPACE): SpaceKeys.RAS,
            # NaN is MONAI's word for "no channel axis".
            str(MetaKeys.ORIGINAL_CHANNEL_DIM): -1 if several else float("nan"),
        }
        return (np.moveaxis(array, 0, -1) if several else array[0]), meta
