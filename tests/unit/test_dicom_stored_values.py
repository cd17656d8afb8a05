"""From stored bits to the values of a slice: sign, garbage, padding."""

import numpy as np
import pytest
from dicom_files import (
    ct_dataset,
    ramp,
    refusal_of,
    with_pixels,
)

from pe_infer.dicom import slices_of
from pe_infer.errors import Code


def test_garbage_above_the_stored_bits_is_dropped() -> None:
    values = np.array([[0, 1, 4095], [2048, 24, 1024]], np.uint16)
    garbage = values | np.uint16(0xF000)
    dataset = with_pixels(ct_dataset(), garbage, bits=12, high_bit=11, signed=False)
    (image,) = slices_of(dataset)
    assert image.pixels.dtype == np.uint16
    np.testing.assert_array_equal(image.pixels, values)


def test_signed_values_get_their_sign_from_the_stored_bits() -> None:
    values = np.array([[-2048, -1, 0], [1, 2047, -1024]], np.int16)
    bits = values.view(np.uint16) & np.uint16(0x0FFF)
    dataset = with_pixels(ct_dataset(), bits, bits=12, high_bit=11, signed=True)
    np.testing.assert_array_equal(slices_of(dataset)[0].pixels, values)


@pytest.mark.parametrize("signed", [False, True])
def test_values_that_do_not_start_at_bit_0_are_shifted(signed: bool) -> None:
    low, high = (-2048, 2047) if signed else (0, 4095)
    values = np.array([[low, 0, high], [7, 100, 1024]], np.int16 if signed else np.uint16)
    bits = (values.view(np.uint16) << 4) | np.uint16(0x000A)
    dataset = with_pixels(ct_dataset(), bits, bits=12, high_bit=15, signed=signed)
    (image,) = slices_of(dataset)
    assert image.pixels.dtype == values.dtype
    np.testing.assert_array_equal(image.pixels, values)


@pytest.mark.parametrize("kind", ["u1", "i1"])
def test_8_bit_images_are_widened(kind: str) -> None:
    values = (np.arange(9) * 13 - (60 if kind == "i1" else 0)).reshape(3, 3).astype(kind)
    (image,) = slices_of(ct_dataset(pixels=values, RescaleSlope=16))
    assert image.pixels.dtype == (np.int16 if kind == "i1" else np.uint16)
    np.testing.assert_array_equal(image.pixels, values)


def test_unsigned_16_bit_images_keep_large_values() -> None:
    values = np.array([[0, 40000], [65535, 1]], np.uint16)
    np.testing.assert_array_equal(slices_of(ct_dataset(pixels=values))[0].pixels, values)


# --- padding


def padded(value: int = -2000) -> np.ndarray:
    pixels = ramp()
    pixels[0, :3] = value
    return pixels


def test_padding_is_taken() -> None:
    dataset = ct_dataset(pixels=padded())
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    assert slices_of(dataset)[0].padding == (-2000, -2000)


def test_trap_padding_stored_unsigned_for_signed_pixels() -> None:
    dataset = ct_dataset(pixels=padded())
    dataset.add_new("PixelPaddingValue", "US", 63536)
    assert slices_of(dataset)[0].padding == (-2000, -2000)


def test_padding_stored_signed_for_unsigned_pixels() -> None:
    values = np.array([[63536, 1], [2, 3]], np.uint16)
    dataset = ct_dataset(pixels=values, RescaleSlope=1, RescaleIntercept=-1024)
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    assert slices_of(dataset)[0].padding == (63536, 63536)


@pytest.mark.parametrize(("value", "limit"), [(-2000, -1500), (-1500, -2000)])
def test_padding_range_comes_in_either_order(value: int, limit: int) -> None:
    dataset = ct_dataset()
    dataset.add_new("PixelPaddingValue", "SS", value)
    dataset.add_new("PixelPaddingRangeLimit", "SS", limit)
    assert slices_of(dataset)[0].padding == (-2000, -1500)


def test_padding_of_8_bit_signed_pixels_may_be_unsigned() -> None:
    dataset = ct_dataset(pixels=np.full((2, 2), -128, np.int8), RescaleSlope=10)
    dataset.add_new("PixelPaddingValue", "US", 128)
    assert slices_of(dataset)[0].padding == (-128, -128)


def test_trap_padding_declared_and_not_used_does_not_erase_tissue() -> None:
    pixels = np.full((6, 6), -1000, np.int16)
    pixels[2:4, 2:4] = 0  # water, where 0 is declared as padding
    dataset = ct_dataset(pixels=pixels)
    dataset.add_new("PixelPaddingValue", "SS", 0)
    assert slices_of(dataset)[0].padding is None


def test_dense_padding_is_believed_if_a_corner_has_it() -> None:
    pixels = np.full((6, 6), -1000, np.int16)
    pixels[-1, 0] = 0
    dataset = ct_dataset(pixels=pixels)
    dataset.add_new("PixelPaddingValue", "SS", 0)
    assert slices_of(dataset)[0].padding == (0, 0)


@pytest.mark.parametrize("limit", [0, 100])
def test_range_of_padding_does_not_erase_tissue(limit: int) -> None:
    dataset = ct_dataset(pixels=padded())
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    dataset.add_new("PixelPaddingRangeLimit", "SS", limit)
    assert slices_of(dataset)[0].padding is None


@pytest.mark.parametrize("keyword", ["PixelPaddingValue", "PixelPaddingRangeLimit"])
@pytest.mark.parametrize(("vr", "value"), [("SL", -100_000), ("UL", 4_294_965_296)])
def test_padding_beyond_16_bits_is_refused(keyword: str, vr: str, value: int) -> None:
    dataset = ct_dataset()
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    dataset.add_new(keyword, vr, value)
    error = refusal_of(dataset)
    assert error.code is Code.INVALID_ATTRIBUTE
    assert f"{keyword} is {value}" in str(error)


def test_trap_padding_outside_of_the_stored_bits_stays_padding() -> None:
    # -2000 as 16 bits, in an image of 12 unsigned bits: masking it would make it tissue of 2096.
    values = np.array([[63536, 0, 4095], [0xF000 | 1024, 63536, 7]], np.uint16)
    dataset = with_pixels(ct_dataset(), values, bits=12, high_bit=11, signed=False)
    dataset.RescaleIntercept = -1024
    dataset.add_new("PixelPaddingValue", "US", 63536)
    (image,) = slices_of(dataset)
    assert image.padding == (63536, 63536)
    np.testing.assert_array_equal(image.pixels, [[63536, 0, 4095], [1024, 63536, 7]])


def test_negative_padding_in_12_signed_bits() -> None:
    values = np.array([[-2000, 0], [100, 2047]], np.int16)
    bits = values.view(np.uint16) & np.uint16(0x0FFF)
    dataset = with_pixels(ct_dataset(), bits, bits=12, high_bit=11, signed=True)
    dataset.add_new("PixelPaddingValue", "US", 0x0830)  # -2000 in 12 bits
    (image,) = slices_of(dataset)
    assert image.padding == (-2000, -2000)
    assert image.pixels[0, 0] == -2000
