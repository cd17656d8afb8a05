"""Typed access to DICOM attributes: a value arrives checked, or as a coded refusal."""

from collections.abc import Iterable, Sequence
from typing import cast

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items

from pe_infer.errors import Code, DicomError

MAX_MAGNITUDE = 1e10  # a number beyond it is damage; below it no arithmetic overflows
_RESEND = "Send the image again from the scanner or the archive."
_MAX_QUOTED = 160  # characters of a damaged value, or of what pydicom says of it


def brief(text: str) -> str:
    """Return text for a message: one line of what can be printed, cut if long."""
    line = " ".join(_printable(text).split())
    return line if len(line) <= _MAX_QUOTED else f"{line[:_MAX_QUOTED]}..."


def _printable(text: str) -> str:
    """Return text whose control characters (of a terminal, say) have become spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


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
            f"{self.name}: {keyword} is {brief(repr(value))}, expected {expected}. {_RESEND}",
            code=Code.INVALID_ATTRIBUTE,
        )

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Return the values of a text attribute, empty if absent or damaged.

        They come without padding and control characters.
        """
        try:
            value = self._value(keyword)
        except DicomError:
            return ()
        if isinstance(value, Items):
            return ()
        values = value if isinstance(value, MultiValue | list | tuple) else (value,)
        texts = (_printable(str(v)).strip() for v in values if v is not None)
        return tuple(text for text in texts if text)

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

    def numbers(
        self, keyword: str, count: int, *, most: float = MAX_MAGNITUDE
    ) -> tuple[float, ...] | None:
        """Return ``count`` numbers from ``-most`` to ``most``; ``None`` if absent or empty.

        Raises:
            DicomError: ``INVALID_ATTRIBUTE`` if there are more or fewer, others, or not numbers.
        """
        value = self._value(keyword)
        if value is None or (isinstance(value, str | bytes | Sequence) and len(value) == 0):
            return None
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
        values = list(cast("Iterable[object]", value)) if several else [value]
        within = "" if most == MAX_MAGNITUDE else f" from {-most:g} to {most:g}"
        expected = f"{count} number{'s' if count > 1 else ''}{within}"
        try:
            numbers = tuple(_number(v) for v in values)
        except (TypeError, ValueError) as exc:
            raise self.invalid(keyword, value, expected) from exc
        # Written so that NaN is refused.
        if len(numbers) != count or not all(abs(number) <= most for number in numbers):
            raise self.invalid(keyword, value, expected)
        return numbers

    def required_numbers(
        self, keyword: str, count: int, remedy: str = _RESEND, *, most: float = MAX_MAGNITUDE
    ) -> tuple[float, ...]:
        """Return ``count`` numbers from ``-most`` to ``most``.

        Raises:
            DicomError: ``MISSING_ATTRIBUTE`` or ``INVALID_ATTRIBUTE``.
        """
        numbers = self.numbers(keyword, count, most=most)
        if numbers is None:
            raise self.missing(keyword, remedy)
        return numbers

    def number(self, keyword: str) -> float | None:
        """Return one number; ``None`` if absent or empty.

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
        found = value if isinstance(value, Items) else ()
        return [Attributes(item, self.name) for item in found]

    def item(self, keyword: str) -> "Attributes | None":
        """Return the first item of a sequence; ``None`` if it is absent, empty or damaged."""
        items = self.items(keyword)
        return items[0] if items else None

    def _value(self, keyword: str) -> object:
        try:
            value: object = self.dataset.get(keyword)
        except Exception as exc:  # pydicom converts values here; damaged ones raise almost anything
            raise DicomError(
                f"{self.name}: {keyword} cannot be read: {brief(str(exc))}. {_RESEND}",
                code=Code.INVALID_ATTRIBUTE,
            ) from exc
        return value


def _number(value: object) -> float:
    """Read a number as DICOM writes it (PS3.5 6.2): without the underscores of Python."""
    if isinstance(value, Dataset):  # its text would be that of all attributes in it
        raise TypeError("a sequence holds no number")
    text = str(value)
    if "_" in text:
        raise ValueError(text)
    return float(text)
