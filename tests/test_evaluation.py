import math

import pytest
import torch

from diffusers_gm import GMLangevinScheduler, GMSGMPipeline
from diffusers_gm.evaluation import markdown_table, quality, sliced_wasserstein


def test_sliced_wasserstein_of_a_shift_is_its_length_over_sqrt_d(generator):
    """Every projection of a shift by m is a shift by <m, u>: root mean square |m| / sqrt(d)."""
    x = torch.randn(50, 1, 4, 4, generator=generator)
    shift = torch.zeros(1, 1, 4, 4)
    shift[..., 0, 0] = 3.0
    distance = sliced_wasserstein(x + shift, x, num_projections=20_000)
    # <m, u>^2 / |m|^2 has mean 1/16 and variance 2 (d - 1) / (d^2 (d + 2))
    error = 5 * math.sqrt(2 * 15 / (16**2 * 18) / 20_000) * 16 / 2
    assert distance == pytest.approx(3 / 4, rel=error)
    assert sliced_wasserstein(x, x) == 0


def test_sliced_wasserstein_refuses_what_it_cannot_measure():
    x = torch.zeros(4, 1, 2, 2)
    with pytest.raises(ValueError, match="different shapes"):
        sliced_wasserstein(x, torch.zeros(4, 3, 2, 2))
    with pytest.raises(ValueError, match="at least two"):
        sliced_wasserstein(x[:1], x)
    broken = x.clone()
    broken[1] = math.nan
    with pytest.raises(ValueError, match="1 of 4 samples"):
        sliced_wasserstein(broken, x)


def test_quality_table_measures_every_cell_and_puts_the_scheduler_back(tiny_unet, generator):
    original = GMLangevinScheduler()
    pipeline = GMSGMPipeline(tiny_unet, original)
    pipeline.set_progress_bar_config(disable=True)
    jump = {"mixture_weights": [0.99, 0.01], "mixture_scales": [0.5, 8.0]}
    schedulers = {
        "ode": GMLangevinScheduler(algorithm_type="ode"),
        "jump": GMLangevinScheduler(algorithm_type="jump", **jump),
    }
    reference = torch.rand(30, 1, 8, 8, generator=generator)
    cells = list(quality(pipeline, schedulers, (5, 10), reference, floor=0.5, num_samples=8))
    assert pipeline.scheduler is original
    assert [(c.sampler, c.calls) for c in cells] == [("ode", 5), ("ode", 10), ("jump", 5), ("jump", 10)]
    assert cells[0].ratio == cells[0].distance / 0.5 > 0
    assert cells[2].distance is None
    assert "no solution" in cells[2].reason
    table = markdown_table(cells)
    assert table.splitlines()[0] == "| sampler | 5 calls | 10 calls |"
    assert table.splitlines()[3] == "| jump | - | - |"
