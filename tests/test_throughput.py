"""The comparison of the training with diffusers' own loop, as a command."""

import re

import pytest
from test_data import save_images

from diffusers_gm.studies import latent_caching, throughput
from diffusers_gm.studies.report import Report


@pytest.mark.slow  # fourteen trainings in processes of their own
def test_the_command_reports_rates_and_efficiency(tmp_path):
    folder = save_images(tmp_path / "images", 24, mode="RGB")
    words = ["--train_data_dir", folder, "--block_out_channels", 8, 8, "--train_batch_size", 8, "--methods", "cld",
             "--steps", 100, "--repeats", 1, "--output", tmp_path / "out"]  # fmt: skip
    throughput.main(list(map(str, words)))
    found = Report.read(tmp_path / "out" / "throughput.json")
    assert "Images of 3x8x8, latents of 4x8x8, batches of 8" in found.conditions
    (table,) = found.tables
    loops = [f"{kind}, {loop}" for kind in ("png", "parquet", "latents") for loop in ("diffusers", "cld")]
    assert [row[0] for row in table.rows] == [*loops[:2], "png, cld, 2 processes", *loops[2:]]
    cost = {row[0]: float(row[1]) for row in table.rows}
    assert all(2 < value < 500 for value in cost.values()), "milliseconds"
    rates = {row[0]: float(row[4]) for row in table.rows if row[4]}
    for kind in ("png", "parquet", "latents"):
        assert rates[f"{kind}, diffusers"] == 1
        assert rates[f"{kind}, cld"] == pytest.approx(cost[f"{kind}, diffusers"] / cost[f"{kind}, cld"], rel=0.1)
    efficiency = float(re.search(r"Efficiency of 2 processes: (\d\.\d+)", found.verdict).group(1))
    assert efficiency == pytest.approx(2 * cost["png, cld"] / cost["png, cld, 2 processes"], rel=0.1)
    assert 0.2 < efficiency < 1.5


@pytest.mark.slow  # four processes
def test_the_cache_of_latents_beside_the_autoencoder_alone(tmp_path):
    words = ["--resolution", "32", "--batches", "40", "--repeats", "1"]
    latent_caching.main([*words, "--output", str(tmp_path)])
    found = Report.read(tmp_path / "latent_caching.json")
    ours, theirs = (float(row[1]) for row in found.tables[0].rows)
    ratio = float(re.search(r"The cache works at (\S+) times the rate", found.verdict).group(1))
    assert ratio == pytest.approx(theirs / ours, rel=0.1)
    assert 0.3 < ratio < 3


def test_bad_options(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, message in [
        (["--resolution", "12"], "--resolution 12: the digits come in multiples of 8"),
        (["--train_data_dir", str(tmp_path / "empty")], "empty: it holds no images"),
        (["--steps", "0"], "--steps: must be at least 1"),
    ]:
        with pytest.raises(SystemExit):
            throughput.main(words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        latent_caching.main(["--resolution", "12"])
    assert "--resolution 12 must be a multiple of 8" in capsys.readouterr().err
