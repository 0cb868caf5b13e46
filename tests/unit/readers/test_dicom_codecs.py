"""Every compressed transfer syntax gives the values that went in, or is refused; no decoder runs past its header."""

from __future__ import annotations

import base64
import importlib.metadata
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame

from medseg.errors import ReadError
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_codecs import CODECS, Layout, decode, decode_rle
from medseg.readers.dicom_codestream import j2k_codestream, jpeg_codestream
from medseg.readers.dicom_header import header_of, quiet
from medseg.readers.dicom_pixels import stored_values
from medseg.readers.dicom_series import read_series
from medseg.volume import Volume

REPOSITORY = Path(__file__).parents[3]
SHAPE = (38, 35, 3)
AFFINE = np.diag([-1.0, -1, 2.5, 1])

HTJ2K = {
    "unsigned": (
        "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI"
        "kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAP4AAf+TwAAmY/sFB3QAAMAAE0AAE0AAEYAE"
        "/QKHdAD2+QMHdAAncwDAABUwAATwAASA33xDFEkBQrQAP9zhAKI0AP4RMwDAABaUAAFrQAASAPe+740bPn3e94avDP5iCLG3AFsf"
        "Wz62PrY+/NEf/vDDDk9zCEAWuADgwHQAwAAuqgABd5AACcDtbtu2bUMDJWW727Zt29BASdnutm3bNtAAZWn+Ey1+svna/WXCKxsx"
        "vgBrLGONNdZYY4019mmf9mmf9mmf9mmf1lBpDZXWUGkNldZQaQ2V1lBpjWkAAAKBAAAGPQINAxyQQiQWsgH/f/0AcFUA/9k="
    ),
    "signed": (
        "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABjwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI"
        "kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAP4AAf+TwAAmY/sDB3QAAMAAE0AAE0AAEYAE"
        "/QKHdAD2+QMHdAAncwDAABUwAATwAASA33xDFEkBQrQAP9zhAKI0AP4RMwDAABaUAAFrQAASAPe+740bPn3e94avDP5iCLG3AFsf"
        "Wz62PrY+/NEf/vDDDk9zCEAWuADgwHQAwAAuqgABd5AACcDtbtu2bUMDJWW727Zt29BASdnutm3bNtAAZWn+Ey1+svna/WXCKxsx"
        "vgBrLGONNdZYY4019mmf9mmf9mmf9mmf1lBpDZXWUGkNldZQaQ2V1lBpjWkAAAKBAAAGPQINAxyQQiQWsgH/f/0AcFUA/9k="
    ),
    "lossy": (
        "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAAJP9SAAwAAgABAAUEBEAA/1wAIyKH"
        "dIdFh0WHF39cf1x/PXeqd6p3wmA1YDVgeFgaWBpnv/9kABcAAU9wZW5KUEggVmVyIDAuMjYuMy7/kAAKAAAAAACDAAH/k8AATO2B"
        "BQd0AADAAJYABKCOAQd0APIBB3QAwAE8ABMATeMwAEK0APv+AAI0AMAE8AFXABKAM0ThjmK0ALsNCAC6OT3Pp1YA++AgdADACogB"
        "aMAFQEDngMj08ncAAwccGDgwcCTi+nJTp8lN2AAC4fn9ACPVAP/Z"
    ),
}
"""The picture of `ht_picture`, encoded by OpenJPH 0.26 (no encoder for HTJ2K is among the requirements)."""


def ht_picture() -> np.ndarray:
    rows, columns = np.mgrid[:12, :16]
    return (columns * columns * 7 + rows**3 * 2) % 4096


def smooth(low: int, high: int, seed: int = 0) -> np.ndarray:
    """(I, J, K): a ramp with noise that reaches both ends, as pictures are (encoders take other ways for noise)."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(low, high, int(np.prod(SHAPE))).reshape(SHAPE)
    found = np.clip(np.rint(ramp + rng.normal(0, (high - low) / 60, SHAPE)), low, high)
    found[0, 0, :], found[1, 0, :] = low, high
    return found


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Write an MR series whose stored numbers are `truth`, with the bits and the sign asked for."""

    def write(truth: np.ndarray, stored: int, signed: bool, allocated: int = 16) -> list[Path]:
        files = write_series(Volume(np.abs(truth)[None].astype(np.float32), AFFINE), tmp_path, modality="MR")
        for k, file in enumerate(files):
            dataset = pydicom.dcmread(file)
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, stored - 1
            dataset.PixelRepresentation = int(signed)
            data = truth[:, :, k].T.astype(f"<{'i' if signed else 'u'}{allocated // 8}").tobytes()
            dataset.PixelData = data + b"\0" * (len(data) % 2)
            dataset["PixelData"].VR = "OB" if allocated == 8 else "OW"
            dataset.save_as(file)
        return files

    return write


def by_pydicom(file: Path, syntax: str) -> None:
    dataset = pydicom.dcmread(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(file)


def by_gdcm(file: Path, name: str) -> None:
    reader = gdcm.ImageReader()
    reader.SetFileName(str(file))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(file))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


LOSSLESS = {
    uid.RLELossless: (by_gdcm, "RLELossless"),
    uid.JPEGLossless: (by_gdcm, "JPEGLosslessProcess14"),
    uid.JPEGLosslessSV1: (by_gdcm, "JPEGLosslessProcess14_1"),
    uid.JPEGLSLossless: (by_pydicom, uid.JPEGLSLossless),
    uid.JPEG2000Lossless: (by_pydicom, uid.JPEG2000Lossless),
    uid.JPEG2000: (by_gdcm, "JPEG2000"),
}
BITS = {
    "unsigned 8 of 8": (8, False, 8),
    "signed 8 of 8": (8, True, 8),
    "unsigned 8 of 16": (8, False, 16),
    "unsigned 10 of 16": (10, False, 16),
    "unsigned 12 of 16": (12, False, 16),
    "signed 12 of 16": (12, True, 16),
    "signed 15 of 16": (15, True, 16),
    "unsigned 16 of 16": (16, False, 16),
    "signed 16 of 16": (16, True, 16),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda value: uid.UID(value).keyword)
def test_lossless_syntaxes_give_what_went_in(syntax: str, bits: str, make: Any) -> None:
    stored, signed, allocated = BITS[bits]
    low = -(1 << (stored - 1)) if signed else 0
    truth = smooth(low, low + (1 << stored) - 1)
    encode, how = LOSSLESS[uid.UID(syntax)]
    for file in make(truth, stored, signed, allocated):
        encode(file, how)
        assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == syntax
    volume = read_series(file.parent)
    np.testing.assert_array_equal(volume.array[0], truth)
    assert volume.notes == ()


def test_one_series_may_hold_many_syntaxes_and_bits(tmp_path: Path) -> None:
    """What an archive does that compresses old slices its own way, and a scanner that counts bits slice by slice."""
    truth = np.concatenate([smooth(0, 1023, seed) for seed in (1, 2, 3)], axis=2)
    files = write_series(Volume(truth[None].astype(np.float32), AFFINE), tmp_path, modality="MR")
    for file, stored in zip(files, (10, 11, 12, 13, 14, 15, 16, 16), strict=False):
        dataset = pydicom.dcmread(file)
        dataset.BitsStored, dataset.HighBit = stored, stored - 1
        dataset.save_as(file)
    for file, (encode, how) in zip(files, LOSSLESS.values(), strict=False):
        encode(file, how)
    assert len({pydicom.dcmread(file).file_meta.TransferSyntaxUID for file in files}) == 7
    np.testing.assert_array_equal(read_series(tmp_path).array[0], truth)


@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K])
def test_htj2k(syntax: str) -> None:
    layout = Layout(12, 16, 16, 16, 0, signed=False)
    values, exact = decode(base64.b64decode(HTJ2K["unsigned"]), syntax, layout, "it")
    np.testing.assert_array_equal(values, ht_picture())
    assert exact
    signed = Layout(12, 16, 16, 16, 0, signed=True)
    values, _ = decode(base64.b64decode(HTJ2K["signed"]), syntax, signed, "it")
    np.testing.assert_array_equal(values, ht_picture() - 2048)
    values, exact = decode(base64.b64decode(HTJ2K["lossy"]), syntax, layout, "it")
    assert not exact
    assert np.abs(values.astype(int) - ht_picture()).max() < 64


def test_lossy_is_read_and_noted(make: Any) -> None:
    truth = smooth(0, 4095)
    for file in make(truth, 12, False):
        dataset = pydicom.dcmread(file)
        dataset.compress(uid.JPEG2000, j2k_cr=[4], generate_instance_uid=False)
        dataset.save_as(file)
    volume = read_series(file.parent)
    difference = np.abs(volume.array[0] - truth)
    assert difference.max() > 0
    assert difference.mean() < 40
    assert volume.notes == ("LOSSY",)


def test_12_bits_written_as_16_by_gdcm_are_refused(make: Any) -> None:
    """Its own decoder gives every number 32768 too high."""
    for file in make(smooth(0, 4095), 12, False):
        by_gdcm(file, "JPEGExtendedProcess2_4")
    with pytest.raises(ReadError) as caught:
        read_series(file.parent)
    assert caught.value.code == "CODESTREAM_MISMATCH"


def test_baseline_8_bits(make: Any) -> None:
    truth = smooth(0, 255)
    for file in make(truth, 8, False, 8):
        by_gdcm(file, "JPEGBaselineProcess1")
    volume = read_series(file.parent)
    assert np.abs(volume.array[0] - truth).mean() < 4
    assert volume.notes == ("LOSSY",)


def test_near_lossless_keeps_its_promise(make: Any) -> None:
    truth = smooth(0, 4095)
    for file in make(truth, 12, False):
        dataset = pydicom.dcmread(file)
        dataset.compress(uid.JPEGLSNearLossless, jls_error=3, generate_instance_uid=False)
        dataset.save_as(file)
    volume = read_series(file.parent)
    assert 0 < np.abs(volume.array[0] - truth).max() <= 3
    assert volume.notes == ("LOSSY",)


def test_loss_that_only_the_header_tells_is_noted(make: Any) -> None:
    for file in make(smooth(0, 4095), 12, False):
        dataset = pydicom.dcmread(file)
        dataset.LossyImageCompression = "01"
        dataset.save_as(file)
    assert read_series(file.parent).notes == ("LOSSY",)


# Pixel values that pydicom's own documentation of these files gives (its tests check them, too).
KNOWN = {
    "JPGExtended.dcm": {(420, 140): 244, (230, 120): 95},
    "JPEG-lossy.dcm": {(420, 140): 244, (230, 120): 95},
    "J2K_pixelrep_mismatch.dcm": {(0, 0): -2000, (511, 511): -2000},
    "693_J2KI.dcm": {},
    "MR_small_RLE.dcm": {},
    "MR_small_jp2klossless.dcm": {},
    "MR_small_jpeg_ls_lossless.dcm": {},
}


def of_file(name: str) -> np.ndarray:
    dataset = pydicom.dcmread(str(get_testdata_file(name)))
    with quiet():
        return stored_values(dataset, header_of(dataset, Path("x"), str(dataset.SOPClassUID)))[0]


@pytest.mark.parametrize("name", KNOWN)
def test_real_files(name: str) -> None:
    found = of_file(name)
    for place, value in KNOWN[name].items():
        assert found[place] == value
    if "MR_small" in name:
        np.testing.assert_array_equal(found, of_file("MR_small.dcm"))


# ---- a codestream that is not what its header says ------------------------------------------------------------------


def picture(syntax: str, truth: np.ndarray, stored: int, *, signed: bool = False) -> bytes:
    """Encode one plane as the codestream of a syntax."""
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.MRImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = truth.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, stored, stored - 1
    dataset.PixelRepresentation = int(signed)
    dataset.PixelData = truth.astype("<i2" if signed else "<u2").tobytes()
    dataset.compress(syntax)
    return bytes(get_frame(dataset.PixelData, 0, number_of_frames=1))


PLANE = smooth(0, 2000)[:, :, 0]
SIGNED_PLANE = PLANE - 1000


def layout(stored: int, *, signed: bool = False, shift: int = 0, rows: int = 38) -> Layout:
    return Layout(rows, SHAPE[1], 16, stored, shift, signed)


def code_of(stream: bytes, syntax: str, how: Layout) -> str:
    with pytest.raises(ReadError) as caught:
        decode(stream, syntax, how, "instance 7")
    assert "instance 7" in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless])
def test_more_bits_than_declared_are_read_where_the_numbers_fit(syntax: str) -> None:
    stream = picture(syntax, PLANE, 16)
    np.testing.assert_array_equal(decode(stream, syntax, layout(12), "")[0], PLANE)
    assert code_of(stream, syntax, layout(10)) == "CODESTREAM_MISMATCH"


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless])
@pytest.mark.parametrize("written", ["cut to its bits", "sign extended"])
def test_signed_numbers_written_as_unsigned_ones(syntax: str, written: str) -> None:
    """The usual fault of encoders: the header says signed, the codestream does not."""
    bits = 12 if written == "cut to its bits" else 16
    stream = picture(syntax, SIGNED_PLANE.astype(int) & ((1 << bits) - 1), bits)
    np.testing.assert_array_equal(decode(stream, syntax, layout(12, signed=True), "")[0], SIGNED_PLANE)


def test_fewer_bits_than_declared_and_a_sign_is_in_doubt() -> None:
    stream = picture(uid.JPEGLSLossless, PLANE, 11)
    np.testing.assert_array_equal(decode(stream, uid.JPEGLSLossless, layout(12), "")[0], PLANE)
    assert code_of(stream, uid.JPEGLSLossless, layout(12, signed=True)) == "CODESTREAM_MISMATCH"
    low = picture(uid.JPEGLSLossless, PLANE // 2, 11)
    np.testing.assert_array_equal(decode(low, uid.JPEGLSLossless, layout(12, signed=True), "")[0], PLANE // 2)


def test_negative_numbers_where_none_are_declared() -> None:
    stream = picture(uid.JPEG2000Lossless, SIGNED_PLANE, 12, signed=True)
    assert code_of(stream, uid.JPEG2000Lossless, layout(12)) == "CODESTREAM_MISMATCH"
    stream = picture(uid.JPEG2000Lossless, PLANE, 12, signed=True)
    np.testing.assert_array_equal(decode(stream, uid.JPEG2000Lossless, layout(12), "")[0], PLANE)


def test_bits_that_are_not_the_lowest() -> None:
    stream = picture(uid.JPEGLSLossless, PLANE, 12)
    assert code_of(stream, uid.JPEGLSLossless, layout(12, shift=4)) == "CODESTREAM_MISMATCH"


def test_another_kind_of_picture() -> None:
    stream = picture(uid.JPEGLSLossless, PLANE, 12)
    for syntax in (uid.JPEGLosslessSV1, uid.JPEGExtended12Bit):
        assert code_of(stream, syntax, layout(12)) == "CODESTREAM_MISMATCH"


def test_a_syntax_without_decoder() -> None:
    with pytest.raises(ReadError) as caught:
        decode(b"", "1.2.840.10008.1.2.4.100", layout(12), "")
    assert caught.value.code == "NO_DECODER"


def test_a_bomb_is_refused_before_its_decoder_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """60000 x 60000 in the codestream, 38 x 35 in the header."""
    for codec in {id(codec): codec for codec in CODECS.values()}.values():
        monkeypatch.setitem(vars(codec), "decode", lambda *_: pytest.fail("it was decoded"))
    jls = bytearray(picture_bytes := picture_of(uid.JPEGLSLossless))
    at = jls.find(b"\xff\xf7")
    jls[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    assert code_of(bytes(jls), uid.JPEGLSLossless, layout(12)) == "LENGTH_MISMATCH"
    assert picture_bytes != bytes(jls)
    j2k = bytearray(picture_of(uid.JPEG2000Lossless))
    j2k[8:16] = struct.pack(">II", 60000, 60000)
    assert code_of(bytes(j2k), uid.JPEG2000Lossless, layout(12)) == "LENGTH_MISMATCH"
    assert code_of(picture_of(uid.JPEG2000Lossless), uid.JPEG2000Lossless, layout(12, rows=36)) == "LENGTH_MISMATCH"


def picture_of(syntax: str) -> bytes:
    return picture(syntax, PLANE, 12)


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_a_picture_cut_short_is_never_filled_up(name: str, make: Any) -> None:
    """Decoders of JPEG make up what is missing and only warn."""
    file = make(smooth(0, 4095), 12, False)[1]
    by_gdcm(file, name)
    dataset = pydicom.dcmread(file)
    frame = bytes(get_frame(dataset.PixelData, 0, number_of_frames=1))
    for keep in (0.3, 0.7, 0.95, 0.99):
        dataset.PixelData = encapsulate([frame[: int(len(frame) * keep)]])
        dataset.save_as(file)
        with pytest.raises(ReadError) as caught:
            read_series(file.parent)
        assert caught.value.code in ("TRUNCATED", "UNREADABLE")


@pytest.mark.parametrize("bits", [2, 7, 11, 13])
def test_a_lossless_picture_that_lies_about_its_bits(bits: int, make: Any) -> None:
    """GDCM ends the process where fewer than 8 of 8 bits are said to be used."""
    file = make(smooth(0, 4095), 12, False)[1]
    by_gdcm(file, "JPEGLosslessProcess14_1")
    frame = bytearray(get_frame(pydicom.dcmread(file).PixelData, 0, number_of_frames=1))
    frame[frame.find(b"\xff\xc3") + 4] = bits
    try:
        values, _ = decode(bytes(frame), uid.JPEGLosslessSV1, Layout(35, 38, 16, 12, 0, signed=False), "instance 7")
    except (ReadError, ValueError):
        return
    assert values.shape == (35, 38)


def test_damaged_codestreams_are_refused_or_of_the_right_size(rng: np.random.Generator) -> None:
    """Never an error of another kind, never a picture of another size."""
    for syntax in (uid.JPEGLSLossless, uid.JPEG2000Lossless):
        whole = picture_of(syntax)
        for _ in range(150):
            changed = bytearray(whole)
            changed[int(rng.integers(0, min(len(whole), 120)))] = int(rng.integers(256))
            try:
                values, _ = decode(bytes(changed), syntax, layout(12), "instance 7")
            except (ReadError, ValueError, EOFError, RuntimeError, struct.error, IndexError):
                continue
            assert values.shape == PLANE.shape


@pytest.mark.parametrize("bad", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xda\0\x08" + bytes(9), b"junk"])
def test_no_codestream_at_all(bad: bytes) -> None:
    with pytest.raises((ValueError, EOFError)):
        jpeg_codestream(bad)
    with pytest.raises((ValueError, EOFError, struct.error)):
        j2k_codestream(bad)


# ---- RLE ------------------------------------------------------------------------------------------------------------


def rle(*segments: bytes) -> bytes:
    offsets = [64 + sum(map(len, segments[:number])) for number in range(len(segments))]
    return struct.pack("<16I", len(segments), *offsets, *[0] * (15 - len(segments))) + b"".join(segments)


def test_rle_by_hand() -> None:
    """PS3.5 G.3.1: 2 literal bytes, a run of 3, an empty byte, then a run of 1; the high bytes come first."""
    high, low = b"\x01\x00\x01\xfe\x02\x80\x00\x03", b"\xfb\x07"
    found = np.frombuffer(decode_rle(rle(high, low), Layout(2, 3, 16, 16, 0, signed=False)), "<u2")
    assert found.tolist() == [0x0007, 0x0107, 0x0207, 0x0207, 0x0207, 0x0307]


def test_rle_unpacks_no_more_than_declared() -> None:
    bomb = rle(b"\x81\x05" * 2_000_000)
    assert decode_rle(bomb, Layout(2, 3, 8, 8, 0, signed=False)) == b"\x05" * 6


@pytest.mark.parametrize("segments", [[b"\x00\x01"], [b"\x01\x02"], [b""], [b"\x80" * 50]])
def test_rle_cut_short(segments: list[bytes]) -> None:
    with pytest.raises(EOFError):
        decode_rle(rle(*segments), Layout(2, 3, 8, 8, 0, signed=False))


def test_rle_with_another_number_of_segments() -> None:
    with pytest.raises(ValueError, match="1 segments where 2"):
        decode_rle(rle(b"\xfb\x07"), Layout(2, 3, 16, 16, 0, signed=False))


# ---- licences -------------------------------------------------------------------------------------------------------


def test_no_decoder_is_under_the_gpl() -> None:
    for codec in CODECS.values():
        meta = importlib.metadata.metadata(codec.package)
        licences = " ".join([*(meta.get_all("Classifier") or []), *(meta.get_all("License-Expression") or [])])
        assert re.search(r"\b(MIT|BSD|Apache)\b", licences), codec.package
        assert not re.search(r"\b[AL]?GPL|General Public", licences), codec.package
    pins = (REPOSITORY / "constraints.txt").read_text()
    for name in {codec.package for codec in CODECS.values()}:
        assert f"\n{name}==" in pins
    for name in ("pylibjpeg-libjpeg", "pylibjpeg-rle"):
        assert name not in pins


def test_no_plugin_of_pydicom_is_asked(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """pydicom takes pylibjpeg-libjpeg (GPL) where it is installed, and the next plugin where one fails."""
    for file, (encode, how) in zip(make(smooth(0, 4095), 12, False), list(LOSSLESS.values())[:3], strict=True):
        encode(file, how)
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.as_array", lambda *_, **__: pytest.fail("it was"))
    np.testing.assert_array_equal(read_series(file.parent).array[0], smooth(0, 4095))
