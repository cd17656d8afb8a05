"""Errors travel: between threads, between processes."""

import copy
import pickle
from collections.abc import Callable

import pytest

from pe_infer import errors
from pe_infer.errors import Code, PeInferError, SeriesError

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, PeInferError)
]


def pickled(error: PeInferError) -> PeInferError:
    twin = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    assert isinstance(twin, PeInferError)
    return twin


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("duplicate", [copy.copy, pickled])
def test_a_copy_says_the_same(
    kind: type[PeInferError], duplicate: Callable[[PeInferError], PeInferError]
) -> None:
    try:
        error = kind("what happened", code=Code.GAP)
    except TypeError:  # its code is fixed
        error = kind("what happened")
    twin = duplicate(error)
    assert type(twin) is kind
    assert (str(twin), twin.code, twin.exit_code) == ("what happened", error.code, kind.exit_code)
    assert twin is not error


def test_a_copy_can_be_raised() -> None:
    with pytest.raises(SeriesError, match="lost") as caught:
        raise copy.copy(SeriesError("lost", code=Code.GAP))
    assert caught.value.code is Code.GAP
