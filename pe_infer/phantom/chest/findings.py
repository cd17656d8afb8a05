"""Small findings of both classes: nodules, lymph nodes beside the vessels, plugged airways."""

import numpy as np

from pe_infer.phantom.chest.anatomy import Anatomy
from pe_infer.phantom.chest.config import PhantomConfig
from pe_infer.phantom.chest.frame import Frame
from pe_infer.phantom.chest.lungs import LungTrees
from pe_infer.phantom.chest.mediastinum import ARTERY_LEFT, ARTERY_RIGHT, TRACHEA, smooth
from pe_infer.phantom.raster import Capsules
from pe_infer.phantom.sampling import Draw


def confusers(
    draw: Draw, config: PhantomConfig, frame: Frame, trees: LungTrees, anatomy: Anatomy
) -> tuple[Capsules, Capsules]:
    """Return soft-tissue nodules with lymph nodes, and mucus plugs, both in patient coordinates."""
    rng = draw.rng("confusers")
    parts: list[Capsules] = []
    inside = anatomy.reference[anatomy.lung_mm < -6]
    for _ in range(draw.count("nodules", (0, config.nodules_max)) if len(inside) else 0):
        centre = inside[rng.integers(len(inside))]
        radius = float(np.exp(rng.uniform(np.log(1.5), np.log(6.0))))
        lumps = centre + rng.standard_normal((3, 3)).astype(np.float32) * 0.3 * radius
        parts.append(Capsules.chain(lumps, radius * rng.uniform(0.7, 1.0, 3)))
    hila = np.concatenate(
        [smooth(ARTERY_LEFT)[2:], smooth(ARTERY_RIGHT)[2:], smooth(TRACHEA[0])[-5:]]
    )
    for _ in range(draw.count("lymph_nodes", (0, config.lymph_nodes_max))):
        beside = hila[rng.integers(len(hila))]
        away = rng.standard_normal(3)
        away /= np.linalg.norm(away)
        radius = rng.uniform(2.2, 6.0)
        centre = beside[:3] + away * (beside[3] + radius * rng.uniform(0.7, 1.2))
        along = rng.standard_normal(3) * radius * 0.45
        parts.append(Capsules.chain(np.stack([centre - along, centre + along]), radius * 0.8))
    arteries = trees.arteries
    for _ in range(draw.count("peribronchial_nodes", (0, config.lymph_nodes_max))):
        thick = np.flatnonzero(arteries.radius_mm > 1.8)
        if not len(thick):
            break
        k = int(thick[rng.integers(len(thick))])
        away = rng.standard_normal(3)
        away /= np.linalg.norm(away)
        radius = rng.uniform(1.2, 3.4)
        centre = arteries.end[k] + away * (float(arteries.radius_mm[k]) + 0.8 * radius)
        parts.append(Capsules.of(centre, centre, radius, radius))
    parts += _hilar_nodes(draw, config, trees)
    plugs: list[Capsules] = []
    lumens = trees.airways
    wide = np.flatnonzero(lumens.end_radius_mm > 1.1)
    for _ in range(draw.count("mucus_plugs", (0, config.mucus_plugs_max)) if len(wide) else 0):
        k = int(wide[rng.integers(len(wide))])
        plugs.append(lumens[np.arange(k, k + 1)].grown(0.3))
    plugs += _plug_chains(draw, config, lumens)
    return frame.capsules(Capsules.join(parts)), frame.capsules(Capsules.join(plugs))


def _hilar_nodes(draw: Draw, config: PhantomConfig, trees: LungTrees) -> list[Capsules]:
    """Long nodes that lie against hilar and interlobar arteries, as an old clot would inside."""
    rng = draw.rng("hilar_nodes_shape")
    tree = trees.arteries
    thick = np.flatnonzero(tree.radius_mm > 2.6)
    parts: list[Capsules] = []
    for _ in range(draw.count("hilar_nodes", (0, config.hilar_nodes_max)) if len(thick) else 0):
        k = int(thick[rng.integers(len(thick))])
        along = tree.end[k] - tree.start[k]
        along = along / max(float(np.linalg.norm(along)), 1e-3)
        away = np.cross(along, rng.standard_normal(3))
        away /= max(float(np.linalg.norm(away)), 1e-3)
        radius = rng.uniform(1.8, 5.0)
        centre = tree.end[k] + away * (float(tree.radius_mm[k]) + 0.75 * radius)
        steps = np.linspace(-1, 1, 3)[:, None] * along * rng.uniform(0.8, 2.2) * radius
        wobble = rng.standard_normal((3, 3)) * 0.25 * radius
        parts.append(Capsules.chain(centre + steps + wobble, radius * rng.uniform(0.7, 1.0, 3)))
    return parts


def _plug_chains(draw: Draw, config: PhantomConfig, lumens: Capsules) -> list[Capsules]:
    """Mucus that fills a bronchus and branches beyond it, over up to five generations."""
    rng = draw.rng("plug_chains_where")
    wide = np.flatnonzero((lumens.end_radius_mm > 1.2) & (lumens.end_radius_mm < 3.0))
    chains: list[Capsules] = []
    for _ in range(draw.count("plug_chains", (0, config.plug_chains_max)) if len(wide) else 0):
        members = [int(wide[rng.integers(len(wide))])]
        for _ in range(int(rng.integers(1, 5))):
            tip = lumens.end[members[-1]]
            follows = np.flatnonzero(np.abs(lumens.start - tip).max(1) < 1e-3)
            if not len(follows):
                break
            members.append(int(follows[rng.integers(len(follows))]))
        chains.append(lumens[np.array(members)].grown(rng.uniform(0.2, 0.9)))
    return chains
