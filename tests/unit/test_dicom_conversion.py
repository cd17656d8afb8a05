"""One CT instance into slices: attributes, padding, stored bits, refusals."""

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import (
    FRAME_OF_REFERENCE,
    SERIES,
    STUDY,
    changed,
    ct_dataset,
    enhanced_dataset,
    items,
    ramp,
    refusal_of,
    save,
)
from pydicom.uid import SecondaryCaptureImageStorage

from pe_infer.dicom import convert, open_series, slices_of
from pe_infer.errors import Code, ConfigurationError, DicomError, GeometryError
from pe_infer.geometry import SeriesInfo
from pe_infer.result import Flag


def test_classic_image_becomes_one_slice(tmp_path: Path) -> None:
    path = save(
        ct_dataset(
            12.5,
            RescaleSlope=2,
            RescaleIntercept=-1024,
            ContrastBolusAgent="OMNI",
            BodyPartExamined="CHEST",
            ConvolutionKernel="STANDARD",
            SeriesDescription="CTPA",
            ProtocolName="PE",
            Manufacturer="ACME",
        ),
        tmp_path / "a.dcm",
    )
    (image,) = slices_of(path)
    np.testing.assert_array_equal(image.pixels, ramp())
    assert image.pixels.dtype == np.int16
    assert image.pixels.flags.writeable
    assert (image.rescale_slope, image.rescale_intercept) == (2.0, -1024.0)
    geometry = image.geometry
    assert (geometry.rows, geometry.cols) == (8, 10)
    assert (geometry.row_spacing_mm, geometry.col_spacing_mm) == (0.7, 0.8)
    assert geometry.image_position_mm == (-100.0, -90.0, 12.5)
    assert geometry.thickness_mm == 1.25
    assert image.frame_number is None
    assert image.acquisition_number == 2
    assert image.source == str(path)
    assert image.series == SeriesInfo(
        series_instance_uid=SERIES,
        study_instance_uid=STUDY,
        frame_of_reference_uid=FRAME_OF_REFERENCE,
        modality="CT",
        body_part_examined="CHEST",
        protocol_name="PE",
        series_description="CTPA",
        contrast_bolus_agent="OMNI",
        patient_position="HFS",
        convolution_kernel="STANDARD",
        manufacturer="ACME",
        series_number=3,
    )


def test_dataset_is_converted_and_not_changed() -> None:
    dataset = ct_dataset()
    before = dataset.to_json()
    (image,) = slices_of(dataset)
    assert dataset.to_json() == before
    assert image.sop_instance_uid == dataset.SOPInstanceUID


def test_other_types_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected a DICOM file"):
        convert(5)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name, reason in ((tmp_path, "no ordinary file"), ("a\0b", "null"), ("none", "No such")):
        with pytest.raises(DicomError, match=reason) as caught:
            convert(name)
        assert caught.value.code is Code.UNREADABLE_FILE


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DicomError, match="no ordinary file"):
        convert(tmp_path / "pipe")


def test_messages_hold_no_patient_data() -> None:
    for change in ({"RescaleSlope": None}, {"BitsAllocated": 32}, {"PixelData": b"\0\0"}):
        assert "SECRET" not in str(refusal_of(ct_dataset(**change)))


def test_sequences_in_the_place_of_values_are_not_printed() -> None:
    secret = items(PatientName="SECRET^NAME")
    dataset = ct_dataset()
    dataset.add_new("SeriesDescription", "SQ", secret)
    assert slices_of(dataset)[0].series.series_description is None
    dataset.add_new("RescaleSlope", "SQ", secret)
    error = refusal_of(dataset)
    assert error.code is Code.INVALID_ATTRIBUTE
    assert "SECRET" not in f"{error} {error.__cause__}"


def test_long_values_are_cut_in_messages() -> None:
    dataset = ct_dataset()
    dataset.add_new("RescaleSlope", "OB", b"x" * 5000)
    assert len(str(refusal_of(dataset))) < 500


@pytest.mark.parametrize(
    ("character_set", "text"),
    [
        ("ISO_IR 192", "Thorax Gefäße 胸部"),
        ("ISO_IR 144", "Грудь"),
        (["", "ISO 2022 IR 87"], "胸部造影"),
    ],
)
def test_text_in_other_character_sets(
    character_set: str | list[str], text: str, tmp_path: Path
) -> None:
    dataset = ct_dataset(SpecificCharacterSet=character_set, SeriesDescription=text)
    (image,) = slices_of(save(dataset, tmp_path / "a.dcm"))
    assert image.series.series_description == text


def test_text_of_several_values_is_joined() -> None:
    (image,) = slices_of(ct_dataset(ConvolutionKernel=["I31f", " 3 "]))
    assert image.series.convolution_kernel == "I31f\\3"


def test_control_characters_do_not_reach_a_terminal() -> None:
    (image,) = slices_of(ct_dataset(SeriesDescription="a\x1b[2Jb\r\nfoo\0"))
    assert image.series.series_description == "a [2Jb  foo"


def test_settings_of_pydicom_do_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save(ct_dataset(2.5), tmp_path / "a.dcm")
    monkeypatch.setattr(pydicom.config, "use_DS_numpy", True)
    assert slices_of(path)[0].geometry.image_position_mm == (-100.0, -90.0, 2.5)
    settings = pydicom.config.settings
    monkeypatch.setattr(settings, "reading_validation_mode", pydicom.config.RAISE)
    dataset = ct_dataset()
    dataset["SOPClassUID"]._value = "1.02.3"
    assert refusal_of(dataset).code is Code.NOT_AXIAL_IMAGE


# --- rescale


@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_trap_rescale_is_not_assumed(keyword: str) -> None:
    error = refusal_of(ct_dataset(**{keyword: None}))
    assert error.code is Code.MISSING_ATTRIBUTE
    assert keyword in str(error)


def test_trap_rescale_is_not_ignored() -> None:
    (image,) = slices_of(ct_dataset(RescaleSlope=0.5, RescaleIntercept=-1000))
    assert (image.rescale_slope, image.rescale_intercept) == (0.5, -1000.0)


@pytest.mark.parametrize(
    "change",
    [
        {"RescaleSlope": 0},
        {"RescaleSlope": "1e-12"},
        {"RescaleSlope": "1e12"},
        {"RescaleIntercept": "-1e12"},
    ],
)
def test_rescale_beyond_the_arithmetic_is_refused_before_decoding(
    change: dict[str, object],
) -> None:
    with pytest.raises(DicomError, match=next(iter(change))) as caught:
        open_series([ct_dataset(**change)])
    assert caught.value.code is Code.INVALID_ATTRIBUTE


@pytest.mark.parametrize("kind", ["US", "OD", "mgml", "HUX"])
def test_values_that_are_no_hounsfield_units_are_refused(kind: str) -> None:
    error = refusal_of(ct_dataset(RescaleType=kind))
    assert error.code is Code.UNSUPPORTED_PIXELS
    assert "RescaleType" in str(error)


@pytest.mark.parametrize("kind", [None, "", "HU", "hu", "HU_MOD"])
def test_rescale_type_may_be_absent(kind: str | None) -> None:
    assert len(slices_of(ct_dataset(RescaleType=kind))) == 1


def test_modality_lut_is_refused() -> None:
    lut = items(LUTDescriptor=[2, 0, 16], ModalityLUTType="HU", LUTData=[0, 1])
    error = refusal_of(ct_dataset(ModalityLUTSequence=lut))
    assert error.code is Code.UNSUPPORTED_PIXELS


# --- attributes


@pytest.mark.parametrize(
    "keyword",
    [
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "Modality",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "PixelRepresentation",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "PixelData",
    ],
)
def test_missing_attribute_is_named(keyword: str, tmp_path: Path) -> None:
    path = save(ct_dataset(**{keyword: None}), tmp_path / "part.dcm")
    with pytest.raises(DicomError) as caught:
        convert(path)
    assert caught.value.code is Code.MISSING_ATTRIBUTE
    assert keyword in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "PixelSpacing", "RescaleSlope"])
def test_empty_attribute_is_missing(keyword: str) -> None:
    assert refusal_of(ct_dataset(**{keyword: ""})).code is Code.MISSING_ATTRIBUTE


@pytest.mark.parametrize(
    "change",
    [
        {"ImagePositionPatient": [1, 2]},
        {"PixelSpacing": [0.7]},
        {"RescaleSlope": [1, 2]},
        {"BitsStored": 17},
        {"BitsStored": 0},
        {"HighBit": 16},
        {"PixelRepresentation": 2},
        {"Rows": 0},
        {"Columns": 65535},
        {"NumberOfFrames": 2},
        {"NumberOfFrames": 0},
        {"NumberOfFrames": 2_000_000_000},
        {"ImagePositionPatient": ["1e306", 0, "1e306"]},
        {"ImageOrientationPatient": ["1e200", 0, 0, 0, "1e200", 0]},
        {"ImageOrientationPatient": [100, 0, 0, 0, 100, 0]},
        {"PixelSpacing": ["1e308", "1e308"]},
    ],
)
def test_attribute_without_sense_is_refused(change: dict[str, object]) -> None:
    error = refusal_of(ct_dataset(**change))
    assert error.code is Code.INVALID_ATTRIBUTE
    assert next(iter(change)) in str(error)


def test_optional_attributes_may_be_absent_or_empty() -> None:
    (image,) = slices_of(
        ct_dataset(
            SliceThickness=None,
            AcquisitionNumber="",
            SeriesNumber=None,
            PatientPosition=None,
            FrameOfReferenceUID=None,
            ContrastBolusAgent="",
            StudyInstanceUID=None,
        )
    )
    assert image.geometry.thickness_mm is None
    assert image.acquisition_number is None
    assert image.series.series_number is None
    assert image.series.contrast_bolus_agent is None


def test_thickness_of_zero_is_unknown() -> None:
    assert slices_of(ct_dataset(SliceThickness=0))[0].geometry.thickness_mm is None


# --- place in the patient


def test_trap_orientation_vectors_that_are_not_exactly_unit_length() -> None:
    axes = [0.9999, 0, 0, 0, 1.0002, 0]
    (image,) = slices_of(ct_dataset(ImageOrientationPatient=axes))
    assert image.geometry.row_direction == (1.0, 0.0, 0.0)
    assert image.geometry.col_direction == (0.0, 1.0, 0.0)


def test_bad_geometry_names_the_file(tmp_path: Path) -> None:
    path = save(ct_dataset(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), tmp_path / "skew.dcm")
    with pytest.raises(GeometryError, match=r"skew\.dcm.*Send the original images") as caught:
        convert(path)
    assert caught.value.code is Code.BAD_GEOMETRY


def test_coronal_image_is_refused() -> None:
    error = refusal_of(ct_dataset(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))
    assert error.code is Code.NON_AXIAL


@pytest.mark.parametrize(
    ("position", "flag"),
    [
        ("HFP", Flag.PRONE),
        ("FFP", Flag.PRONE),
        ("HFDR", Flag.DECUBITUS),
        ("FFDL", Flag.DECUBITUS),
    ],
)
def test_posture_is_flagged(position: str, flag: Flag) -> None:
    assert [f.flag for f in convert(ct_dataset(PatientPosition=position)).flags] == [flag]


@pytest.mark.parametrize("position", ["HFS", "FFS"])
def test_supine_is_not_flagged(position: str) -> None:
    assert convert(ct_dataset(PatientPosition=position)).flags == ()


def test_prone_is_seen_in_the_orientation_if_the_position_is_missing() -> None:
    upside_down = [-1, 0, 0, 0, -1, 0]
    found = convert(ct_dataset(PatientPosition=None, ImageOrientationPatient=upside_down))
    assert [f.flag for f in found.flags] == [Flag.PRONE]
    assert convert(ct_dataset(ImageOrientationPatient=upside_down)).flags == ()


# --- kinds of images


@pytest.mark.parametrize(
    "image_type",
    [
        ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ["ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"],
        ["DERIVED", "SECONDARY", "REF_SURVIEW"],
        ["DERIVED", "SECONDARY", "DOSE_INFO"],
        ["DERIVED", "SECONDARY", "SCREEN SAVE"],
        ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MIP"],
        ["DERIVED", "PRIMARY", "PERFUSION", "RCBF"],
        ["DERIVED", "PRIMARY", "AXIAL", "MAT_SPECIFIC"],
        ["DERIVED", "PRIMARY", "AXIAL", "MAT_REMOVED"],
        ["DERIVED", "PRIMARY", "AXIAL", "EFF_ATOMIC_NUM"],
        ["DERIVED", "PRIMARY", "AXIAL", "ELECTRON_DENSITY"],
    ],
)
def test_trap_localizers_mixed_in(image_type: list[str]) -> None:
    error = refusal_of(ct_dataset(ImageType=image_type))
    assert error.code is Code.NOT_AXIAL_IMAGE
    assert "Send the axial CT reconstruction" in str(error)


def test_virtual_monoenergetic_images_are_hounsfield_units() -> None:
    assert len(slices_of(ct_dataset(ImageType=["DERIVED", "PRIMARY", "AXIAL", "VMI"]))) == 1


def test_secondary_capture_with_modality_ct_is_no_slice() -> None:
    error = refusal_of(ct_dataset(SOPClassUID=SecondaryCaptureImageStorage))
    assert error.code is Code.NOT_AXIAL_IMAGE
    assert "Secondary Capture" in str(error)


def test_other_modalities_are_no_ct() -> None:
    assert refusal_of(ct_dataset(Modality="PT")).code is Code.NOT_CT
    magnetic = ct_dataset(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    assert refusal_of(magnetic).code is Code.NOT_CT


@pytest.mark.parametrize(
    "change",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
        {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
        {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0},
    ],
)
def test_pixels_of_other_kinds_are_refused(change: dict[str, object]) -> None:
    assert refusal_of(ct_dataset(**change)).code is Code.UNSUPPORTED_PIXELS


# --- enhanced images


def test_trap_enhanced_multi_frame_ct() -> None:
    (high, low) = slices_of(enhanced_dataset([7.5, 5.0]))
    assert [s.frame_number for s in (high, low)] == [1, 2]
    assert [s.geometry.image_position_mm[2] for s in (high, low)] == [7.5, 5.0]
    np.testing.assert_array_equal(low.pixels, high.pixels + 1)
    assert high.geometry.col_spacing_mm == 0.8
    assert high.geometry.thickness_mm == 1.25
    assert high.acquisition_number == 4
    assert high.sop_instance_uid == low.sop_instance_uid
    assert high.series.convolution_kernel == "STANDARD"
    assert "frame 2" in low.source


def test_group_of_the_frame_comes_before_the_shared_one() -> None:
    dataset = enhanced_dataset([0.0, 2.0])
    second = dataset.PerFrameFunctionalGroupsSequence[1]
    second.PixelValueTransformationSequence = items(RescaleSlope=3, RescaleIntercept=-7)
    first, other = slices_of(dataset)
    assert (first.rescale_slope, other.rescale_slope) == (1.0, 3.0)
    assert other.rescale_intercept == -7.0


def test_contrast_and_anatomy_of_an_enhanced_image() -> None:
    dataset = enhanced_dataset([0.0], ContrastBolusAgentSequence=items(CodeMeaning="Iohexol"))
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.FrameAnatomySequence = items(AnatomicRegionSequence=items(CodeMeaning="Chest"))
    info = slices_of(dataset)[0].series
    assert info.contrast_bolus_agent == "Iohexol"
    assert info.body_part_examined == "CHEST"


@pytest.mark.parametrize(
    "group",
    ["PixelMeasuresSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence"],
)
def test_missing_functional_group_is_named(group: str) -> None:
    dataset = enhanced_dataset([0.0])
    del dataset.SharedFunctionalGroupsSequence[0][group]
    error = refusal_of(dataset)
    assert error.code is Code.MISSING_ATTRIBUTE
    assert group in str(error)


def test_trap_frame_without_position_is_refused() -> None:
    dataset = enhanced_dataset([0.0, 2.0])
    del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    error = refusal_of(dataset)
    assert error.code is Code.MISSING_ATTRIBUTE
    assert "frame 2" in str(error)


def test_frames_that_are_no_slices_are_refused() -> None:
    dataset = enhanced_dataset([0.0, 2.0])
    second = dataset.PerFrameFunctionalGroupsSequence[1]
    second.CTImageFrameTypeSequence = items(FrameType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])
    error = refusal_of(dataset)
    assert error.code is Code.NOT_AXIAL_IMAGE
    assert "frame 2" in str(error)


def test_number_of_frames_must_agree() -> None:
    dataset = changed(enhanced_dataset([0.0, 2.0]), NumberOfFrames=3)
    assert refusal_of(dataset).code is Code.INVALID_ATTRIBUTE
    no_frames = changed(enhanced_dataset([0.0]), PerFrameFunctionalGroupsSequence=None)
    assert refusal_of(no_frames).code is Code.MISSING_ATTRIBUTE
