"""From masks to numbers: the head and its ellipse, overlap, distances; NumPy, SciPy, OpenCV."""
