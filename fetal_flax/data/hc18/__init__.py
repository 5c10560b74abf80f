"""HC18 as it is published: a folder of images, their outlines, and a CSV of measurements.

    training_set/000_HC.png, 000_HC_Annotation.png, 010_2HC.png, ...
    training_set_pixel_size_and_HC.csv

The number before the underscore is the examination; some have two to four images.
(van den Heuvel et al., "Automated measurement of fetal head circumference using 2D ultrasound
images", PLOS ONE 2018; Zenodo record 1327317, CC BY 4.0.)
"""

from fetal_flax.data.hc18.folder import (
    IMAGES,
    HC18Record,
    find_records,
    fingerprint,
    load,
    warn_of_contradictions,
)
from fetal_flax.data.hc18.measurements import COLUMNS, CSV, MOST_MM, read_pixel_sizes
from fetal_flax.data.hc18.outlines import contradiction, fill_outline
from fetal_flax.data.hc18.zenodo import download

__all__ = [
    "COLUMNS",
    "CSV",
    "IMAGES",
    "MOST_MM",
    "HC18Record",
    "contradiction",
    "download",
    "fill_outline",
    "find_records",
    "fingerprint",
    "load",
    "read_pixel_sizes",
    "warn_of_contradictions",
]
