"""Colour pictures that lie in the patient (fused or painted CT, MR, PET): three channels, red, green, blue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, RLELossless

from medseg.readers.dicom_codecs import Layout, check_picture, codec_for
from medseg.readers.dicom_header import Header
from medseg.readers.dicom_refusals import refuse

RGB_LIKE = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
"""PhotometricInterpretation that pydicom turns into RGB (PS3.3 C.7.6.3.1.2)."""


def rgb_values(dataset: Dataset, header: Header) -> NDArray[np.uint8]:
    """Decode one colour picture, whichever way its planes are arranged.

    Returns
    -------
    (3, columns, rows) uint8, in the order red, green, blue.

    Raises
    ------
    ReadError : COLOUR, the kind of colour is another; TRUNCATED, LENGTH_MISMATCH, CODESTREAM_MISMATCH or NO_DECODER;
        EOFError: no pixels;
        PARSE_ERRORS: what pydicom finds damaged.
    """
    if "PixelData" not in dataset:
        raise EOFError("the file ends before its pixels")
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if dataset.PhotometricInterpretation not in RGB_LIKE or int(dataset.get("BitsStored", 8)) != 8:
        raise refuse("COLOUR", f"instance {header.instance} holds no 8-bit RGB or YBR picture")
    plugin = ""
    if syntax == RLELossless:
        plugin = "pydicom"
    elif syntax.is_encapsulated:
        # pydicom would go through all plugins that are installed, also those under the GPL
        plugin = codec_for(syntax).plugin
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        layout = Layout(header.rows, header.columns, 8, 8, 0, signed=False)
        check_picture(frame, syntax, layout, f"instance {header.instance}", samples=3)
    else:
        _check_length(dataset, header)
    picture = np.asarray(pixel_array(dataset, decoding_plugin=plugin))
    if picture.shape != (header.rows, header.columns, 3) or picture.dtype != np.uint8:
        raise refuse("LENGTH_MISMATCH", f"instance {header.instance} decodes to another size than it declares")
    return np.asarray(picture.transpose(2, 1, 0))


def _check_length(dataset: Dataset, header: Header) -> None:
    """Compare the bytes that are there with those that the size declares; one more may make their number even."""
    samples = 2 if dataset.PhotometricInterpretation == "YBR_FULL_422" else 3
    length, wanted = len(dataset.PixelData), header.rows * header.columns * samples
    if length < wanted:
        raise refuse("TRUNCATED", f"instance {header.instance} holds {length} of {wanted} bytes of pixels")
    if length > wanted + 1:
        raise refuse(
            "LENGTH_MISMATCH", f"instance {header.instance} holds {length} bytes of pixels, declared are {wanted}"
        )
