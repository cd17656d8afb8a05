"""Hounsfield units of one head, without contrast agent."""

from dataclasses import dataclass

from pe_infer.phantom.head.config import HeadConfig
from pe_infer.phantom.sampling import Draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Tissues:
    """Values of one study, HU.

    Attributes:
        gray, white, fluid, stem, cerebellum, dura: Content of the skull.
        vessel: Blood in sinuses and arteries: about the hematocrit in percent.
        clot: Blood that has clotted just now.
        infarct: Old infarcts.
        table, diploe, base, cells: Bone.
        skin, fat, muscle, orbit, globe, lens, secretion: Outside the skull.
        texture: Standard deviation of the unevenness of the brain.
    """

    gray: float
    white: float
    fluid: float
    stem: float
    cerebellum: float
    dura: float
    vessel: float
    clot: float
    infarct: float
    table: float
    diploe: float
    base: float
    cells: float
    skin: float
    fat: float
    muscle: float
    orbit: float
    globe: float
    lens: float
    secretion: float
    texture: float


def sample_tissues(draw: Draw, config: HeadConfig) -> Tissues:
    """Draw the values."""
    white = draw.uniform("white_hu", config.white_hu)
    gray = max(draw.uniform("gray_hu", config.gray_hu), white + 5.0)
    hematocrit = draw.uniform("hematocrit", config.hematocrit)
    vessel = 6.0 + 92.0 * hematocrit + draw.uniform("vessel_offset_hu", (-3.0, 3.0))
    return Tissues(
        gray=gray,
        white=white,
        fluid=draw.uniform("fluid_hu", config.fluid_hu),
        stem=0.5 * (gray + white) - draw.uniform("stem_hu", (0.0, 4.0)),
        cerebellum=0.75 * gray + 0.25 * white + draw.uniform("cerebellum_hu", (-1.5, 1.5)),
        dura=draw.uniform("dura_hu", (48.0, 66.0)),
        vessel=vessel,
        clot=vessel + draw.uniform("clot_hu", (14.0, 30.0)),
        infarct=draw.uniform("infarct_hu", (8.0, 20.0)),
        table=draw.uniform("table_hu", (1150.0, 1750.0)),
        diploe=draw.uniform("diploe_hu", (350.0, 850.0)),
        base=draw.uniform("base_hu", (650.0, 1050.0)),
        cells=draw.uniform("cells_hu", (500.0, 900.0)),
        skin=draw.uniform("skin_hu", (0.0, 45.0)),
        fat=draw.uniform("fat_hu", (-112.0, -85.0)),
        muscle=draw.uniform("muscle_hu", (48.0, 66.0)),
        orbit=draw.uniform("orbit_hu", (-105.0, -75.0)),
        globe=draw.uniform("globe_hu", (4.0, 16.0)),
        lens=draw.uniform("lens_hu", (70.0, 110.0)),
        secretion=draw.uniform("secretion_hu", (8.0, 45.0)),
        texture=draw.uniform("texture_hu", (0.4, 1.2)),
    )
