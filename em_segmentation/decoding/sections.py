"""Sections as pictures of their own: 2D objects, for membranes of serial sections that are judged one by one."""

import numpy as np

from em_segmentation.decoding.cleaning import Compact, smallest_dtype
from em_segmentation.decoding.links import Volume
from em_segmentation.decoding.pipeline import segment_at
from em_segmentation.decoding.settings import Settings


def segment_sections(volume: Volume, settings: Settings, thresholds: tuple[int, ...]) -> list[Compact]:
    """Per threshold the instances [z, y, x] of a volume [c, z, y, x], none of which extends over two sections."""
    found = [segment_at(volume[:, z : z + 1], settings, thresholds) for z in range(volume.shape[1])]
    results = []
    for sections in zip(*found, strict=True):
        counts = [int(section.max(initial=0)) for section in sections]
        firsts = np.cumsum([0, *counts])
        labels = [
            np.where(section > 0, section.astype(np.int64) + first, 0)
            for section, first in zip(sections, firsts, strict=False)
        ]
        results.append(np.concatenate(labels).astype(smallest_dtype(int(firsts[-1]))))
    return results
