"""Procedural B-mode ultrasound phantoms of a fetal head with exactly known measurements.

Each phantom is an axial view of a fetal head as in the HC18 data set (van den Heuvel et al. 2018,
"Automated measurement of fetal head circumference using 2D ultrasound images"): a gray image, the
filled ellipse along the outer edge of the skull, the pixel size and the head circumference.

The image is made the way a scanner makes one, a file for each step:

1. `geometry`: draw the head (size, place, pixel size) and the convex probe that looks at it;
2. `anatomy` and `brain`: paint echo strength on a `canvas`, a polar raster of depths by beams;
3. `echo`: turn echo strength into speckle, random scatterers blurred by the point spread function,
   attenuate along each beam, apply depth gain and compress the envelope logarithmically;
4. `screen`: scan-convert the raster to pixels and burn in the marks of the screen.

The anatomy is drawn in *reference pixels*, those of an 800x540 image, so a seed gives the same head
at every size.
"""

from fetal_flax.data.phantoms.phantom import Phantom, make_phantom

__all__ = ["Phantom", "make_phantom"]
