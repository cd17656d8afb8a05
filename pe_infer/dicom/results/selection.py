"""Which slabs of a study are shown, and why."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pe_infer.result import SlabEvidence, probability_text

MOST: Final = 3
APART_MM: Final = 10.0  # so that one lesion does not take all places


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySlab:
    """A slab that is worth a look.

    Attributes:
        slab: What it contributed.
        rank: 1 for the strongest of the study.
        strength: How strong it is, in words.
    """

    slab: SlabEvidence
    rank: int
    strength: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The slabs that are worth a look.

    Attributes:
        slabs: Strongest first; none if nothing tells slabs apart.
        reason: How they were chosen, as a sentence.
    """

    slabs: tuple[KeySlab, ...]
    reason: str


def select(evidence: Iterable[SlabEvidence]) -> Selection:
    """Choose the slabs with the strongest attention peaks; without attention, the likeliest."""
    slabs = [slab for slab in evidence if not slab.gated]
    by_attention = [(slab.attention.peak, slab) for slab in slabs if slab.attention is not None]
    if by_attention:
        return _strongest(by_attention, "attention peak", "strongest attention peaks")
    by_probability = [(slab.probability, slab) for slab in slabs if slab.probability is not None]
    return _strongest(by_probability, "probability", "highest probabilities", probability_text)


def _strongest(
    candidates: Sequence[tuple[float, SlabEvidence]],
    quantity: str,
    plural: str,
    text: Callable[[float], str] = "{:.3g}".format,
) -> Selection:
    ranked = sorted(candidates, key=lambda pair: (-pair[0], pair[1].position_mm))
    chosen: list[KeySlab] = []
    for rank, (value, slab) in enumerate(ranked, start=1):
        if len(chosen) == MOST:
            break
        if all(_apart(slab, other.slab) for other in chosen):
            strength = f"{quantity} {text(value)}, number {rank} of {len(ranked)} slabs"
            chosen.append(KeySlab(slab=slab, rank=rank, strength=strength))
    return Selection(
        slabs=tuple(chosen),
        reason=f"{len(chosen)} of {len(ranked)} slabs: those with the {plural}, at least "
        f"{APART_MM:g} mm apart and at most {MOST}.",
    )


def _apart(a: SlabEvidence, b: SlabEvidence) -> bool:
    same = (a.sop_instance_uid, a.frame_number) == (b.sop_instance_uid, b.frame_number)
    return not same and abs(a.position_mm - b.position_mm) >= APART_MM
