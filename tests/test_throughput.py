"""The comparison of the training with diffusers' own loop, as a command."""

import re

import pytest
from test_data import save_images

from diffusers_gm.studies import latent_caching, throughput


@pytest.mark.slow  # four trainings in processes of their own
def test_the_command_prints_the_ratio(tmp_path, capsys):
    folder = save_images(tmp_path / "images", 24, mode="RGB")
    words = ["--train_data_dir", folder, "--block_out_channels", 8, 8, "--train_batch_size", 8, "--method", "cld",
             "--steps", 100, "--repeats", 1, "--num_processes", 2]  # fmt: skip
    throughput.main(list(map(str, words)))
    printed = capsys.readouterr().out
    assert "images of 3x8x8, batches of 8" in printed
    ours, theirs = (float(value) for value in re.findall(r"\| (?:train_gm_sgm.py|diffusers) \| (\S+)", printed))
    ratio = float(re.search(r"rate of train_gm_sgm.py over that of diffusers: (\S+)", printed).group(1))
    assert ratio == pytest.approx(theirs / ours, rel=0.1)
    assert 2 < ours < 500, "milliseconds"
    both = float(re.search(r"\| train_gm_sgm.py, all processes \| (\S+)", printed).group(1))
    efficiency = float(re.search(r"efficiency of 2 processes: (\S+)", printed).group(1))
    assert efficiency == pytest.approx(2 * ours / both, rel=0.1)
    assert 0.2 < efficiency < 1.5


@pytest.mark.slow  # four processes
def test_the_cache_of_latents_beside_the_autoencoder_alone(capsys):
    latent_caching.main(["--resolution", "16", "--batch_size", "4", "--batches", "20", "--repeats", "1"])
    printed = capsys.readouterr().out
    ours, theirs = (float(value) for value in re.findall(r"\| the (?:cache|autoencoder alone) \| (\S+)", printed))
    ratio = float(re.search(r"rate of the cache over that of the autoencoder alone: (\S+)", printed).group(1))
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
