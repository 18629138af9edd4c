"""The comparison of the training with diffusers' own loop, as a command."""

import json
import os
import re
import subprocess
import sys

import pytest
from images import save_images

from diffusers_gm.studies import latent_caching, throughput
from diffusers_gm.studies.report import Report


@pytest.mark.slow  # seven trainings in processes of their own
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
    assert all(100 < float(row[5]) < 4000 for row in table.rows), "MiB"
    assert all(1 < float(row[6]) < 60 for row in table.rows), "seconds"


PYTHON = sys.executable, "-c"


def test_commands_in_turns_are_told_apart(tmp_path):
    """CPU seconds are those of each and of its children, whether they are shorter than a turn or longer."""
    burn = "import time\nwhile time.process_time() < {}: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn.format(1.2)!r}])"
    commands = [(*PYTHON, command) for command in (burn.format(0.3), burn.format(2.5), child)]
    short, long, with_child = throughput.cpu_seconds(commands, tmp_path)
    assert 0.3 <= short < 1
    assert 2.5 <= long < 3.2
    assert 1.2 <= with_child < 2


def test_none_goes_on_before_all_are_warm(tmp_path):
    """The first is warm at once, and would be done while the second starts."""
    script = (
        "import pathlib, time\nwhile time.process_time() < {}: pass\npathlib.Path('{}').touch()\n"
        "began = time.monotonic()\nwhile time.process_time() < 1.5: pass\n"
        "pathlib.Path('{}').write_text(str(began) + ' ' + str(time.monotonic()))"
    )
    commands = [(*PYTHON, script.format(share, f"warm{i}", f"done{i}")) for i, share in enumerate((0.05, 1.2))]
    throughput.cpu_seconds(commands, tmp_path, [tmp_path / "warm0", tmp_path / "warm1"])
    ends = [float((tmp_path / f"done{i}").read_text().split()[1]) for i in range(2)]
    warm = float((tmp_path / "done1").read_text().split()[0])
    assert ends[0] > warm


def test_a_command_that_fails_says_why_and_ends_the_others(tmp_path):
    waits = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(RuntimeError, match="failed:\n(?s:.*)no milk today"):
        throughput.cpu_seconds([(*PYTHON, waits), (*PYTHON, "raise SystemExit('no milk today')")], tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_step_is_the_median_of_windows():
    clock = [5.0]  # at the end of the first step
    for step in range(1, 50):
        clock.append(clock[-1] + (1.0 if step == 25 else 0.02))  # something that happened once
    loop = throughput.Loop()
    loop.note([{"seconds": clock, "memory": 2**30}, {"seconds": [s + 1 for s in clock], "memory": 2**31}])
    assert loop.step == [pytest.approx(40)], "of two processes"
    assert (loop.start, loop.memory) == ([6.0], [2048.0])


def test_clocks_of_a_script(tmp_path):
    """Its memory is not that of the process that starts it, which is larger here."""
    larger = b"x" * (1 << 30)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nassert sys.argv[1:] == ['--steps', '3'] and __name__ == '__main__'\n"
        "optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])\n"
        "for _ in range(12): optimizer.step()\nraise SystemExit(3)"
    )
    command = [sys.executable, *throughput.CLOCKED, tmp_path, script, "--steps", "3"]
    assert subprocess.run(command, check=False).returncode == 3
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    first, second, *_ = found["seconds"]
    assert len(found["seconds"]) == 12
    assert 0.1 < first <= second <= found["seconds"][-1] < first + 1
    assert (tmp_path / "warm").is_file()
    assert 100 << 20 < found["memory"] < len(larger)


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
