"""Measures the head in a scan: millimetres, gestational age, and why a person should look.

    python examples/measure_scan.py scan.png --pixel-size 0.12 --checkpoint runs/hc18

Without a scan it makes a phantom; without a checkpoint it takes a network that the package ships.
"""

import argparse

import fetal_flax as ff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scan", nargs="?", help="PNG, JPEG, BMP, TIFF or DICOM; else a phantom")
    parser.add_argument("--pixel-size", type=float, help="side of a pixel in mm; DICOM files tell")
    parser.add_argument("--checkpoint", help="training workdir, converted directory or name")
    options = parser.parse_args()

    if not options.checkpoint and not ff.list_networks():
        parser.error("this package ships no network: train one, and give its workdir --checkpoint")
    segmenter = ff.load(options.checkpoint or ff.list_networks()[0].name)

    if options.scan:
        image, pixel_size_mm = ff.read_image(options.scan)
    else:
        phantom = ff.make_phantom(0, 0, height=270, width=400)
        image, pixel_size_mm = phantom.image, phantom.pixel_size_mm
        print(f"a phantom whose head circumference is {phantom.head_circumference_mm:.1f} mm")

    result = segmenter.measure(image, options.pixel_size or pixel_size_mm)
    if result.hc_mm is not None:
        print(f"HC {result.hc_mm:.1f} mm, BPD {result.bpd_mm:.1f} mm, OFD {result.ofd_mm:.1f} mm")
    elif result.head is not None:
        print(f"HC {result.head.ellipse.circumference:.1f} pixels: give --pixel-size for mm")
    if result.ga_weeks is not None:
        print(f"gestational age {result.ga_weeks:.1f} weeks")
    print(f"look at: {', '.join(result.flags) or 'nothing'}")


if __name__ == "__main__":
    main()
