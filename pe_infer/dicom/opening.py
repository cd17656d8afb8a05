"""From a folder, files or data sets to one CT series, ordered along the body, decoded on demand."""

import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset

from pe_infer.dicom.attributes import Attributes
from pe_infer.dicom.conversion import flags_of, slice_of
from pe_infer.dicom.frames import image_type_of
from pe_infer.dicom.headers import ImageHeader, check_ct_slice, image_headers
from pe_infer.dicom.reading import Quiet, read_image, stated_transfer_syntax, uid_of
from pe_infer.dicom.scanning import Instance, Scan, Source, scan
from pe_infer.dicom.selection import Refusal, SeriesSummary, choose, ordered
from pe_infer.dicom.source_file import SourceFile, source_file
from pe_infer.errors import Code, DicomError, InputError, SeriesError
from pe_infer.geometry import SeriesInfo, Slice, SliceGeometry
from pe_infer.result import Flag, QualityFlag
from pe_infer.series import analyse

_OTHER_KINDS = frozenset({Code.NOT_CT, Code.NOT_AXIAL_IMAGE})
_SKIP_REASONS = {
    "hidden": "hidden",
    "not_dicom": "not DICOM",
    "dicomdir": "DICOMDIR",
    "not_a_file": "no ordinary file",
    "other_kind": "of the chosen series but no axial CT image",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SliceReference:
    """One image of a series that can be read.

    Attributes:
        header: All that is known before the pixels are decoded.
        instance: Where they are.
    """

    header: ImageHeader
    instance: Instance

    @property
    def name(self) -> str:
        """File, for messages."""
        return self.header.name

    @property
    def geometry(self) -> SliceGeometry:
        """Place in the patient."""
        return self.header.geometry

    @property
    def position_um(self) -> int:
        """Position on the slice normal, growing to the head."""
        return self.header.geometry.position_um

    @property
    def sop_instance_uid(self) -> str:
        """Identity of the instance."""
        return self.header.sop_instance_uid

    @property
    def frame_number(self) -> int | None:
        """1-based frame of a multi-frame instance."""
        return self.header.frame_number


class Series:
    """One CT series: headers are read, pixels are decoded on demand. Safe in any number of threads.

    Attributes:
        summary: What the headers say.
        info: What the series says of itself (of the lowest slice).
        references: Its images, ascending position (feet to head); images at one position by UID and
            frame.
        flags: What was tolerated so far: files skipped, series chosen, lossy compression, posture.
            Spacing and tilt are judged elsewhere (``pe_infer.series``).
    """

    def __init__(
        self,
        summary: SeriesSummary,
        references: Sequence[SliceReference],
        flags: Sequence[QualityFlag],
    ) -> None:
        """Take what ``open_series`` found."""
        self.summary = summary
        self.references = tuple(references)
        self.flags = list(flags)
        self._lock = threading.Lock()
        # The multi-frame file read last: its frames come together.
        self._last: tuple[Instance, Dataset] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.references)

    @property
    def info(self) -> SeriesInfo:
        """What the series says of itself."""
        return self.references[0].header.series

    @Quiet()
    def read(self, reference: SliceReference) -> list[Slice]:
        """Decode one image.

        Returns:
            One slice: a reference stands for one frame.

        Raises:
            DicomError: The pixels are missing or cannot be decoded, or the file is another one than
                when the series was opened.
        """
        dataset = self._dataset(reference)
        uid = Attributes(dataset, reference.name).text("SOPInstanceUID")
        if uid != reference.sop_instance_uid:
            raise DicomError(
                f"{reference.name}: SOPInstanceUID is not the one found when the series was "
                "opened. Do not change files while they are read.",
                code=Code.UNREADABLE_FILE,
            )
        return [slice_of(dataset, reference.header)]

    @Quiet()
    def source_files(self) -> list[SourceFile]:
        """Return what result objects repeat of the files; data sets are left out."""
        by_instance: dict[Instance, list[ImageHeader]] = defaultdict(list)
        for reference in self.references:
            by_instance[reference.instance].append(reference.header)
        return [
            source_file(
                instance.header, instance.path, sorted(headers, key=lambda h: h.frame_index)
            )
            for instance, headers in by_instance.items()
            if instance.path is not None
        ]

    def slices(self, *, descending: bool = False) -> Iterator[Slice]:
        """Decode all images, feet to head, or head to feet with ``descending``."""
        for reference in reversed(self.references) if descending else self.references:
            yield from self.read(reference)

    def _dataset(self, reference: SliceReference) -> Dataset:
        instance = reference.instance
        if instance.path is None:
            return instance.header
        if reference.frame_number is None:
            return read_image(instance.path)
        with self._lock:
            if self._last is None or self._last[0] is not instance:
                self._last = (instance, read_image(instance.path))
            return self._last[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """The instances of one series that are of one kind (CT slices, or anything else).

    Attributes:
        summary: What the headers say.
        references: Images, ascending position.
        refusals: What was wrong with the other instances.
    """

    summary: SeriesSummary
    references: tuple[SliceReference, ...]
    refusals: tuple[InputError, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """What a source holds. Headers are read, and a series can be opened without reading them again.

    Attributes:
        groups: Series by kind, in the order of their first instance.
        instances: Number of DICOM instances.
        skipped: How many files were left aside, by reason.
    """

    groups: tuple[Group, ...]
    instances: int
    skipped: dict[str, int]

    @property
    def readable(self) -> list[tuple[SeriesSummary, SeriesInfo]]:
        """The axial CT series of which at least one image can be read, and what each says."""
        return [
            (group.summary, group.references[0].header.series)
            for group in self.groups
            if group.summary.refusal is None and group.references
        ]

    def open(
        self,
        series: str | int | None = None,
        *,
        prefer_contrast: bool = True,
        fitting: Collection[str] | None = None,
    ) -> Series:
        """Open one series (the rules of ``choose``); the same arguments and errors."""
        groups = self.groups
        if series is None and self.instances == 1 and groups[0].refusals:
            raise groups[0].refusals[0]  # the one file that was given: its own reason says more
        if not groups:
            skipped = _skipped_text(self.skipped)
            raise SeriesError(
                f"no DICOM image was found{f' ({skipped})' if skipped else ''}. "
                "Give the folder of the axial CT reconstruction.",
                code=Code.NO_CT_SERIES,
            )
        choice = choose(
            [group.summary for group in groups],
            series,
            prefer_contrast=prefer_contrast,
            fitting=fitting,
        )
        group = next(group for group in groups if group.summary is choice.summary)
        if group.refusals:
            _raise_first(group)
        flags = flags_of([reference.header for reference in group.references])
        skipped_files = dict(self.skipped)
        others = sum(
            g.summary.instances
            for g in groups
            if g is not group and g.summary.series_instance_uid == group.summary.series_instance_uid
        )
        if others:
            skipped_files["other_kind"] = others
        if skipped_files:
            flags.append(
                QualityFlag(
                    flag=Flag.FILES_SKIPPED,
                    message=f"files were skipped: {_skipped_text(skipped_files)}",
                    values=dict(sorted(skipped_files.items())),
                )
            )
        if choice.reason is not None:
            flags.append(
                QualityFlag(
                    flag=Flag.SERIES_CHOSEN,
                    message=choice.reason,
                    values={
                        "series_instance_uid": choice.summary.series_instance_uid,
                        "candidates": sum(g.summary.refusal is None for g in groups),
                    },
                )
            )
        return Series(choice.summary, group.references, flags)


def find_series(source: Source) -> list[SeriesSummary]:
    """List the series that a source holds, reading headers only.

    Instances belong to one series if they have the same SeriesInstanceUID. Within it, localizers
    and other objects that are no CT slices (see ``check_ct_slice``) form a summary of their own
    with a ``refusal``. CT slices are not split further: a slice of another size, orientation or
    frame of reference in a series is for the sequencer to refuse, not for this function to hide.

    Args:
        source: A folder, a file, a data set, or several of them.

    Returns:
        Usable series first, in the order in which ``open_series`` prefers them.

    Raises:
        ConfigurationError: The source is empty or does not exist.
        DicomError: A DICOM file cannot be read at all, so that its series is not known.
    """
    return ordered([group.summary for group in survey(source).groups])


def open_series(
    source: Source, series: str | int | None = None, *, prefer_contrast: bool = True
) -> Series:
    """Find the one axial CT series in a source and read its headers.

    Args:
        source: A folder, a file, a data set, or several of them. Data sets need ``file_meta``.
        series: SeriesInstanceUID or SeriesNumber; ``None`` lets the rules of ``choose`` decide.
        prefer_contrast: Whether a series with a contrast agent is preferred.

    Returns:
        The series; no pixel has been decoded.

    Raises:
        ConfigurationError: The source is empty or does not exist.
        SeriesError: ``NO_CT_SERIES``, ``AMBIGUOUS_SERIES``; ``CONFLICTING_DUPLICATE`` if images in
            different places have one SOPInstanceUID.
        DicomError: An instance of the series lacks an attribute or is damaged. No instance is left
            out silently.
        GeometryError: An instance of the series has no usable place in the patient.
    """
    return survey(source).open(series, prefer_contrast=prefer_contrast)


def survey(source: Source) -> Survey:
    """Find the series in a source, reading headers only.

    Raises:
        ConfigurationError: The source is empty or does not exist.
        DicomError: A DICOM file cannot be read at all, so that its series is not known.
    """
    found = scan(source)
    if found.broken:
        raise found.broken[0]  # it may be a slice of the series that is wanted
    return Survey(
        groups=tuple(groups_of(found)), instances=len(found.instances), skipped=dict(found.skipped)
    )


@Quiet()
def groups_of(found: Scan) -> list[Group]:
    """Sort instances into series and kinds, in the order of their first instance."""
    members: dict[tuple[str, str], list[Instance]] = defaultdict(list)
    kinds: dict[tuple[str, str], InputError | None] = {}
    for instance in found.instances:
        uid = Attributes(instance.header, instance.name).text("SeriesInstanceUID") or ""
        kind: InputError | None = None
        try:
            check_ct_slice(instance.header, instance.name)
        except InputError as exc:
            if exc.code in _OTHER_KINDS:  # otherwise a damaged CT slice, which is not set aside
                kind = exc
        key = (uid, "" if kind is None else kind.code)
        members[key].append(instance)
        kinds.setdefault(key, kind)
    return [_group(uid, kinds[uid, code], instances) for (uid, code), instances in members.items()]


def _group(uid: str, kind: InputError | None, instances: Sequence[Instance]) -> Group:
    references: list[SliceReference] = []
    refusals: list[InputError] = []
    if kind is not None:
        refusals.append(kind)
    else:
        for instance in instances:
            try:
                headers = image_headers(instance.header, instance.name)
            except InputError as exc:
                refusals.append(exc)
                continue
            references += [SliceReference(header=header, instance=instance) for header in headers]
        references.sort(
            key=lambda r: (r.position_um, r.sop_instance_uid, r.frame_number or 0, r.name)
        )
        if not references and all(refusal.code is Code.NON_AXIAL for refusal in refusals):
            kind = refusals[0]  # a coronal or sagittal reconstruction
        refusals += _shared_identities(references)
    return Group(
        summary=_summary(uid, kind, instances, references, refusals),
        references=tuple(references),
        refusals=tuple(refusals),
    )


def _shared_identities(references: Sequence[SliceReference]) -> list[SeriesError]:
    """Return a refusal for each SOPInstanceUID that images in different places have.

    A result could not say which of them it means. One image that is there twice, in two encodings
    perhaps, is for the sequencer to judge.
    """
    known: dict[tuple[str, int | None], SliceReference] = {}
    refusals: dict[tuple[str, int | None], SeriesError] = {}
    for reference in references:
        identity = (reference.sop_instance_uid, reference.frame_number)
        first = known.setdefault(identity, reference)
        if reference.geometry != first.geometry:
            refusals.setdefault(
                identity,
                SeriesError(
                    f"{reference.name}: SOPInstanceUID is {reference.sop_instance_uid}, the same "
                    f"as in {first.name}, though the images lie in different places "
                    f"({reference.geometry.position_mm:.3f} and {first.geometry.position_mm:.3f} "
                    "mm). Send the original images, each with an identity of its own.",
                    code=Code.CONFLICTING_DUPLICATE,
                ),
            )
    return list(refusals.values())


def _summary(
    uid: str,
    kind: InputError | None,
    instances: Sequence[Instance],
    references: Sequence[SliceReference],
    refusals: Sequence[InputError],
) -> SeriesSummary:
    a = Attributes(instances[0].header, instances[0].name)
    first = references[0].header if references else None
    info = first.series if first is not None else None
    geometry = analyse([reference.geometry for reference in references])
    step_um = geometry.nominal_step_um
    sop_class = uid_of(a.text("SOPClassUID") or "")
    return SeriesSummary(
        series_instance_uid=uid,
        study_instance_uid=a.text("StudyInstanceUID") or "",
        series_number=a.harmless_whole("SeriesNumber"),
        description=a.text("SeriesDescription"),
        modality=a.text("Modality"),
        sop_class=sop_class.name,
        image_type=first.image_type if first is not None else image_type_of(a),
        instances=len(instances),
        slices=len(references),
        rows=first.geometry.rows if first is not None else a.harmless_whole("Rows"),
        cols=first.geometry.cols if first is not None else a.harmless_whole("Columns"),
        thickness_mm=first.geometry.thickness_mm if first is not None else None,
        step_mm=None if step_um is None else step_um / 1000.0,
        extent_mm=geometry.extent_um / 1000.0,
        contrast_bolus_agent=info.contrast_bolus_agent
        if info is not None
        else a.text("ContrastBolusAgent"),
        convolution_kernel=info.convolution_kernel
        if info is not None
        else a.text("ConvolutionKernel"),
        body_part_examined=info.body_part_examined
        if info is not None
        else a.text("BodyPartExamined"),
        transfer_syntaxes=tuple(sorted({_syntax_name(instance) for instance in instances})),
        refusal=None if kind is None else Refusal(code=kind.code, message=str(kind)),
        problems=()
        if kind is not None
        else tuple(Refusal(code=refusal.code, message=str(refusal)) for refusal in refusals),
    )


def _syntax_name(instance: Instance) -> str:
    syntax = stated_transfer_syntax(instance.header)
    return "not stated" if syntax is None else syntax.name


def _raise_first(group: Group) -> None:
    first = group.refusals[0]
    if len(group.refusals) == 1:
        raise first
    raise type(first)(
        f"{first} ({len(group.refusals)} of {group.summary.instances} instances of "
        f"{group.summary.label} are refused)",
        code=first.code,
    ) from first


def _skipped_text(skipped: dict[str, int]) -> str:
    return ", ".join(
        f"{count} {_SKIP_REASONS[reason]}" for reason, count in sorted(skipped.items())
    )
