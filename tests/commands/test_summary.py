from fetal_flax.commands.main import main


def test_summary_prints_exact_counts(capsys):
    assert main(["summary", "--model", "mobilenet_aspp_se_unet"]) == 0
    printed = capsys.readouterr().out
    for count in ("10,012,177", "7,788,881", "25,253,893", "23,030,597", "2,223,296"):
        assert count in printed
