from fetal_flax.reporting.headline import headline


def test_the_headline_is_the_ellipses_and_the_raw_masks_stands_beside_it(tmp_path):
    names = ("dice", "ellipse_dice", "hc_error_mm", "hausdorff_mm")
    metrics = {name: {"mean": 0.5, "std": 0.25} for name in names}
    run = {"missed": ["a", "b"]}
    printed = headline({"n": 3, **metrics, "by": {}, "run": run}, tmp_path).splitlines()
    assert [line.split()[0] for line in printed[1:3]] == ["ellipse_dice", "hc_error_mm"]
    assert [line.split()[0] for line in printed[4:6]] == ["dice", "hausdorff_mm"]
    assert (printed[0], printed[3]) == ("ellipse of the mask's largest region:", "raw mask:")
    assert printed[1].split()[1:] == ["0.5000", "±", "0.2500"]
    assert printed[6] == "no head was found in 2 images: a, b"
    assert printed[7].startswith("3 images; ") and printed[7].endswith(f"are in {tmp_path}")
