"""The mathematics of NCSNv2."""

import math

import pytest
import torch

from diffusers_gm import AnnealedLangevinScheduler
from diffusers_gm.processes import annealed


def test_technique_1_is_the_largest_distance(generator):
    data = torch.randn(50, 3, 4, 4, generator=generator)
    brute = max(float((a - b).norm()) for a in data for b in data)
    for chunk_size in (1, 7, 50, None):
        assert annealed.max_pairwise_distance(data, chunk_size) == pytest.approx(brute, rel=1e-5)
    with pytest.raises(ValueError, match="at least two images"):
        annealed.max_pairwise_distance(data[:1])
    assert annealed.max_pairwise_distance(data * 1e-3 + 100) == pytest.approx(brute * 1e-3, rel=0.05)  # of float32
    for i in (0, 49):
        lost = data.clone()
        lost[i, 0, 0, 0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            annealed.max_pairwise_distance(lost, 7)


@pytest.mark.parametrize(("dim", "overlap"), [(64, 0.5), (3072, 0.5), (196608, 0.5), (10, 0.02)])
def test_technique_2_ratio_solves_its_equation(dim, overlap):
    """Few dimensions and little overlap ask for levels far apart."""
    g = annealed.ladder_ratio(dim, overlap)
    assert g > (1 if dim > 10 else 4)
    x = torch.tensor([math.sqrt(2 * dim) * (g - 1) + s * 3 * g for s in (1, -1)], dtype=torch.float64)
    upper, lower = torch.special.ndtr(x)
    assert float(upper - lower) == pytest.approx(overlap, abs=1e-9)


def test_technique_2_ladder_lengths_of_cifar10():
    assert annealed.ladder_length(50, 0.01, 3072) == 219  # a strict 0.5
    assert annealed.ladder_length(50, 0.01, 3072, overlap=0.566) == 232  # the published ladder
    assert annealed.ladder_length(1.001, 1.0, 3072) == 2, "a ladder has two ends"


def test_the_step_of_ncsn_is_half_its_published_eps():
    """There `x + alpha / 2 score + sqrt(alpha) z`, `alpha = 2e-5` on the last level; here `sqrt(2 a) sigma z`."""
    preset = annealed.PRESETS["ncsn"]
    a = annealed.fixed_step_size(preset.step_size, preset.sigma_min)
    assert math.sqrt(2 * a) * preset.sigma_min == pytest.approx(math.sqrt(2e-5))


@pytest.mark.parametrize("name", annealed.PRESETS)
def test_a_preset_for_images_in_minus_one_to_one_is_twice_as_large(name):
    """The same sampler in another unit: levels double, the dimensionless step stays."""
    preset = annealed.PRESETS[name]
    one, two = preset.scheduler_config(), preset.scheduler_config(image_range=2.0)
    assert [two[end] for end in ("sigma_min", "sigma_max")] == [2 * preset.sigma_min, 2 * preset.sigma_max]
    assert two["step_size"] / two["sigma_min"] ** 2 == pytest.approx(one["step_size"] / one["sigma_min"] ** 2)
    scheduler = AnnealedLangevinScheduler(**two)
    levels, steps = preset.num_levels, preset.num_langevin_steps
    assert scheduler.sampler.calls_per_level(preset.num_inference_steps) == [
        *[steps] * (levels - 1),
        steps + preset.denoise,
    ]
    assert scheduler.sampler.denoise == preset.denoise


# eps as the published configurations round it; Technique 4 must give the unrounded figure.
@pytest.mark.parametrize(
    ("preset", "eps"),
    [("cifar10", 6.18e-6), ("celeba", 3.34e-6), ("lsun", 1.77e-6), ("ffhq", 8.93e-7)],
)
def test_technique_4_gives_the_published_step_sizes(preset, eps):
    p = annealed.PRESETS[f"ncsnv2-{preset}"]
    ratio = torch.tensor([(p.sigma_max / p.sigma_min) ** (1 / (p.num_levels - 1))])
    a = annealed.optimal_step_size(ratio, p.num_langevin_steps, "prop3")
    assert float(a) * p.sigma_min**2 == pytest.approx(eps, rel=3e-3)
    assert p.step_size == pytest.approx(eps, rel=0.02)


@pytest.mark.parametrize(("criterion", "fourth_moment"), [("prop3", 1.0), ("fixed_point", 1.0), ("fixed_point", 2.5)])
def test_technique_4_is_the_minimum(criterion, fourth_moment):
    ratio = torch.tensor([1.02, 1.2, 1.6], dtype=torch.float64)
    steps = torch.tensor([1, 3, 5])
    a = annealed.optimal_step_size(ratio, steps, criterion, fourth_moment, max_step=0.6)
    variance = annealed.level_variance if criterion == "prop3" else annealed.chain_variance
    best = variance(a, ratio, steps, fourth_moment)
    grid = torch.linspace(1e-4, 0.6, 20001, dtype=torch.float64)[:, None]
    assert (best <= variance(grid, ratio, steps, fourth_moment).min(0).values + 1e-9).all()


def test_chain_variance_is_the_limit_of_the_recursion():
    a, ratio, steps, m4 = torch.tensor(0.05, dtype=torch.float64), 1.1, 4, 1.7
    v = 1.0
    for _ in range(300):
        for step in range(steps):
            v = (v * ratio**2 if step == 0 else v) * (1 - 2 * a + a**2 * m4) + 2 * a
    assert float(annealed.chain_variance(a, ratio, steps, m4)) == pytest.approx(float(v), rel=1e-9)


def test_cifar10_figures_of_one_level_and_of_the_whole_chain():
    p = annealed.PRESETS["ncsnv2-cifar10"]
    ratio = (p.sigma_max / p.sigma_min) ** (1 / (p.num_levels - 1))
    a = torch.tensor(p.step_size / p.sigma_min**2, dtype=torch.float64)
    assert float(annealed.level_variance(a, ratio, 5)) == pytest.approx(1.0555, abs=5e-5)
    assert float(annealed.chain_variance(a, ratio, 5)) == pytest.approx(1.1283, abs=5e-5)


def test_technique_4_without_a_solution_says_what_to_change():
    with pytest.raises(ValueError, match=r"with 1 Langevin step of.*more network calls") as refused:
        annealed.optimal_step_size(torch.tensor([3.0]), 1, fourth_moment=4.0, max_step=0.1)
    assert "step_size_criterion" not in str(refused.value), "the one in use is no way out"
    # With jumps the minimum of a single level can lie where the chain falls behind: refused, with the way out.
    with pytest.raises(ValueError, match="step_size_criterion='fixed_point' or"):
        annealed.optimal_step_size(torch.tensor([1.02]), 1, "prop3", fourth_moment=2.5)
    with pytest.raises(ValueError, match="step_size_criterion 'prop4'"):
        annealed.optimal_step_size(torch.tensor([3.0]), 1, "prop4")
