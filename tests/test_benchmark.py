"""The sampler benchmark: what counts as a network call, the best grid, resuming, the sentence of the verdict."""

import argparse
import json

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler
from diffusers_gm.studies.common import Cells
from PIL import Image

from diffusers_gm import AnnealedLangevinScheduler, GMLangevinScheduler
from diffusers_gm import benchmark_models as models
from diffusers_gm import benchmark_samplers as bench
from diffusers_gm.studies.report import Report


@pytest.mark.parametrize(
    "cls", [DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler]
)
def test_a_budget_is_network_calls(cls):
    """Counted, not believed: second-order schedulers call the network twice a step."""
    scheduler = cls.from_config(models.SOURCE.config)
    calls = 0

    def network(x, t):
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    assert models.budget(scheduler, 9) == (9 if scheduler.order == 1 else 5)
    models.sample(network, scheduler, (1, 1, 8, 8), seed=0)
    assert calls == 9


def test_every_scheduler_has_a_run_on_some_grid():
    for name, by_grid in models.compatible(models.SOURCE.config).items():
        assert any(models.budget(scheduler, 21) for scheduler in by_grid.values()), name
        assert "default" in by_grid


def test_own_networks_are_given_to_diffusers_where_it_can_read_them():
    described = AnnealedLangevinScheduler(noise_space="ve", sigma_max=9.0)
    samplers = models.own_samplers(described)
    assert {"langevin", "CLD, sscs", "DDPM", "UniPC"} <= set(samplers)
    for scheduler in samplers["UniPC"].values():
        assert float(1 / scheduler.alphas_cumprod[-1]) == pytest.approx(1 + 9.0**2, rel=1e-4)
    mixture = {"mixture_weights": [0.5, 0.5], "mixture_scales": [0.5, 1.5], "model_noise": "mixture"}
    assert "UniPC" not in models.own_samplers(GMLangevinScheduler(**mixture))


def test_best_grid_by_the_median_and_nothing_is_measured_twice(tmp_path):
    asked = []

    def sample(scheduler, calls, seed):
        asked.append((scheduler, seed))
        return torch.tensor([float(seed), 3.0, 3.0, 3.0] if scheduler == "a" else [2.0, 2.0, 9.0, 2.0])

    model = bench.Model("it", {"s": {"a": "a", "b": "b", "none": "none"}}, sample, lambda x: float(x.median()), "")
    model.samplers["s"].pop("none")
    cells = Cells(tmp_path / "cells.json")
    best = bench.best_of(model, "s", 5, 3, cells, None)
    assert (best.grid, best.ratios, best.median) == ("b", [2.0, 2.0, 2.0], 2.0)
    assert str(best) == "2.00 ± 0.00 b"
    again = bench.best_of(model, "s", 5, 3, Cells(tmp_path / "cells.json"), None)
    assert again == best
    assert len(asked) == 6
    assert bench.best_of(model, "s", 5, 3, cells, "a").grid == "a"


def test_other_grids_where_the_best_one_below_has_no_run(tmp_path):
    """`a` is best at 20 calls and has no run at 50: `b` is the answer there, not a gap in the table."""

    def sample(grid, calls, seed):
        return None if (grid, calls) == ("a", 50) else torch.tensor([1.0 if grid == "a" else 2.0])

    model = models.Model("it", {"s": {"a": "a", "b": "b"}}, sample, float, "")
    args = argparse.Namespace(calls=[20, 50], seeds=1, num_samples=1, output=tmp_path)
    report = bench.benchmark("it", model, args, Cells(tmp_path / "cells.json"))
    assert report.tables[0].rows == [["s", "1.00 a", "2.00 b"]]


def test_a_run_that_diverges_or_does_not_exist_is_no_result(tmp_path):
    answers = {"nan": torch.tensor([float("nan")]), "none": None}
    model = bench.Model("it", {"s": {k: k for k in answers}}, lambda s, *_: answers[s], float, "")
    assert bench.best_of(model, "s", 5, 1, Cells(tmp_path / "cells.json"), None) is None
    assert set(json.loads((tmp_path / "cells.json").read_text()).values()) == {None}


def test_the_command_in_small(tmp_path):
    samplers = ["CLD, sscs", "DDPM", "Euler ancestral", "UniPC"]
    words = ["--num_samples", "40", "--seeds", "1", "--calls", "5", "--output", str(tmp_path), "--samplers", *samplers]
    bench.main(words)
    report = Report.read(tmp_path / "samplers_exact_n40.json")
    assert [row[0] for row in report.tables[0].rows] == ["**CLD, sscs**", *samplers[1:]]
    assert "At 5 calls SSCS has" in report.verdict
    assert (tmp_path / report.pictures[0]).stat().st_size < 150_000


def test_the_exact_denoiser_of_any_images(tmp_path, generator):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(torch.randint(0, 256, (12, 6, 6, 3), generator=generator, dtype=torch.uint8)):
        Image.fromarray(image.numpy()).save(pictures / f"{i}.png")
    words = ["--train_data_dir", str(pictures), "--resolution", "4", "--num_images", "10", "--num_samples", "20"]
    words += ["--seeds", "1", "--calls", "30", "--samplers", "CLD, sscs", "DDPM", "--output", str(tmp_path)]
    bench.main(words)
    report = Report.read(tmp_path / "samplers_exact_pictures_3x4x4_10_n20.json")
    assert report.title == "Samplers at equal network calls: the exact denoiser of 10 images of pictures, 3x4x4"
    # Good samples are near the floor: of the data, not of the digits.
    assert all(float(row[1].split()[0]) < 2 for row in report.tables[0].rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calls", "2"], "--calls must be at least 3"),
        (["--samplers", "SSCS"], "exact has CLD, sscs,"),
        (["--seeds", "0"], "--seeds 0 is too small"),
        (["--models", "cld", "--num_samples", "400"], "there are 360 held-out digits"),
        (
            ["--models", "cld", "--num_samples", "40", "--resolution", "8"],
            "--resolution: what model 'exact' is made of",
        ),
        (["--train_data_dir", "nowhere"], "nowhere"),
    ],
)
def test_arguments_out_of_range(words, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert message in capsys.readouterr().err
