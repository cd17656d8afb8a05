"""Typed access to DICOM attributes: a value arrives checked, or as a coded refusal."""

import math
from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from pe_infer.errors import Code, DicomError

_RESEND = "Send the image again from the scanner or the archive."


class Attributes:
    """One data set, or one item of a sequence in it.

    Text and sequences that are absent, empty or damaged are ``None``: nothing hangs on them.
    Numbers that are damaged are refused. ``required_`` methods refuse an absent or empty value too.
    pydicom converts values on access and may warn of them: use within ``reading.Quiet``.
    """

    def __init__(self, dataset: Dataset, name: str) -> None:
        """Wrap ``dataset``; ``name`` is the file, for messages."""
        self.dataset = dataset
        self.name = name

    def missing(self, keyword: str, remedy: str = _RESEND) -> DicomError:
        """Return the refusal for an attribute that is absent or empty."""
        return DicomError(
            f"{self.name}: {keyword} is missing. {remedy}", code=Code.MISSING_ATTRIBUTE
        )

    def invalid(self, keyword: str, value: object, expected: str) -> DicomError:
        """Return the refusal for an attribute with a value that makes no sense."""
        return DicomError(
            f"{self.name}: {keyword} is {value!r}, expected {expected}. {_RESEND}",
            code=Code.INVALID_ATTRIBUTE,
        )

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Return the values of a text attribute without padding, empty if absent or damaged."""
        try:
            value = self._value(keyword)
        except DicomError:
            return ()
        values = value if isinstance(value, MultiValue | list | tuple) else (value,)
        return tuple(
            text for text in (str(v).strip(" \0") for v in values if v is not None) if text
        )

    def text(self, keyword: str) -> str | None:
        """Return a text attribute, several values joined by a backslash; ``None`` without one."""
        return "\\".join(self.texts(keyword)) or None

    def required_text(self, keyword: str) -> str:
        """Return a text attribute.

        Raises:
            DicomError: ``MISSING_ATTRIBUTE``.
        """
        text = self.text(keyword)
        if text is None:
            raise self.missing(keyword)
        return text

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """Return ``count`` finite numbers; ``None`` if absent or empty.

        Raises:
            DicomError: ``INVALID_ATTRIBUTE`` if there are more or fewer, or not numbers.
        """
        value = self._value(keyword)
        if value is None or (isinstance(value, str | bytes | Sequence) and len(value) == 0):
            return None
        values = list(value) if isinstance(value, MultiValue | list | tuple) else [value]
        expected = f"{count} number{'s' if count > 1 else ''}"
        try:
            numbers = tuple(float(str(v)) for v in values)
        except (TypeError, ValueError) as exc:
            raise self.invalid(keyword, value, expected) from exc
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise self.invalid(keyword, value, expected)
        return numbers

    def required_numbers(
        self, keyword: str, count: int, remedy: str = _RESEND
    ) -> tuple[float, ...]:
        """Return ``count`` finite numbers.

        Raises:
            DicomError: ``MISSING_ATTRIBUTE`` or ``INVALID_ATTRIBUTE``.
        """
        numbers = self.numbers(keyword, count)
        if numbers is None:
            raise self.missing(keyword, remedy)
        return numbers

    def number(self, keyword: str) -> float | None:
        """Return one finite number; ``None`` if absent or empty.

        Raises:
            DicomError: ``INVALID_ATTRIBUTE``.
        """
        numbers = self.numbers(keyword, 1)
        return None if numbers is None else numbers[0]

    def whole(self, keyword: str) -> int | None:
        """Return one whole number; ``None`` if absent or empty.

        Raises:
            DicomError: ``INVALID_ATTRIBUTE``.
        """
        number = self.number(keyword)
        if number is None:
            return None
        if number != int(number):
            raise self.invalid(keyword, number, "a whole number")
        return int(number)

    def required_whole(self, keyword: str) -> int:
        """Return one whole number.

        Raises:
            DicomError: ``MISSING_ATTRIBUTE`` or ``INVALID_ATTRIBUTE``.
        """
        number = self.whole(keyword)
        if number is None:
            raise self.missing(keyword)
        return number

    def harmless_whole(self, keyword: str) -> int | None:
        """Return one whole number that nothing hangs on; ``None`` if absent, empty or damaged."""
        try:
            return self.whole(keyword)
        except DicomError:
            return None

    def items(self, keyword: str) -> "list[Attributes]":
        """Return the items of a sequence; none if it is absent or damaged."""
        try:
            value = self._value(keyword)
        except DicomError:
            return []
        found = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
        return [Attributes(item, self.name) for item in found if isinstance(item, Dataset)]

    def item(self, keyword: str) -> "Attributes | None":
        """Return the first item of a sequence; ``None`` if it is absent, empty or damaged."""
        items = self.items(keyword)
        return items[0] if items else None

    def _value(self, keyword: str) -> object:
        try:
            value: object = self.dataset.get(keyword)
        except Exception as exc:  # pydicom converts values here; damaged ones raise almost anything
            raise DicomError(
                f"{self.name}: {keyword} cannot be read: {exc}. {_RESEND}",
                code=Code.INVALID_ATTRIBUTE,
            ) from exc
        return value
