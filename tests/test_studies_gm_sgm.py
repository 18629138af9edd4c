"""The studies of GM-SGM's claims."""

import argparse
import math

import pytest
import torch

from diffusers_gm import GaussianMixtureNoise
from diffusers_gm.data import split_digit_labels, split_digits
from diffusers_gm.evaluation.results import Statistic
from diffusers_gm.studies import gm_sgm, own_level, rare_modes
from diffusers_gm.studies.exact import ExactDenoiser
from diffusers_gm.studies.gm_sgm import median, survival, tail_exponent
from diffusers_gm.studies.report import Report

# --- increments ---


def test_the_tail_of_one_component_is_gaussian():
    t = torch.tensor([0.0, 1, 2, 5, 14], dtype=torch.float64)
    expected = torch.special.erfc(t / 2**0.5)
    assert torch.allclose(survival(GaussianMixtureNoise([1.0], [1.0]), t), expected, rtol=1e-10, atol=0)
    assert median(GaussianMixtureNoise([1.0], [2.0])) == pytest.approx(2 * 0.6744897501960817)


def test_survival_is_the_share_of_draws_beyond(generator):
    mixture = GaussianMixtureNoise.from_stable(1.5, 3, per_element=True)
    draws = mixture.sample((400_000, 1), generator).abs()
    for t in (0.1, 1.0, 3.0, 20.0):
        p = float(survival(mixture, torch.tensor(t)))
        error = (p * (1 - p) / len(draws)) ** 0.5
        assert abs(float((draws > t).double().mean()) - p) < 5 * error


def test_the_exponent_of_a_power_law():
    t = torch.linspace(2, 20, 30)
    assert tail_exponent(t, 3 * t**-1.7) == pytest.approx(1.7, abs=1e-5)


def test_more_components_come_closer_to_the_stable_law():
    from scipy.stats import levy_stable

    t = torch.logspace(math.log10(2), math.log10(20), 8, dtype=torch.float64)
    law = torch.from_numpy(2 * levy_stable.sf(t.numpy(), 1.5, 0))
    half = levy_stable.ppf(0.75, 1.5, 0)
    off = []
    for count in (2, 3, 5):
        mixture = GaussianMixtureNoise.from_stable(1.5, count)
        off.append(float((survival(mixture, t * median(mixture) / half) / law).log().abs().max()))
    assert off[0] > off[1] > off[2]
    assert off[2] < math.log(1.25)


# --- rare modes ---


def test_exact_draws_have_no_total_variation_error(generator):
    points, weights = rare_modes.far_modes()
    n = 20_000
    draws = rare_modes.exact_draws(points, weights, n, generator, rare_modes.WIDTH)
    # Each share has a standard error of sqrt(w (1 - w) / n).
    bound = 0.5 * float(5 * (weights * (1 - weights) / n).sqrt().sum())
    assert rare_modes.total_variation(draws, points, weights) < bound
    assert rare_modes.total_variation(points[:1], points, weights) == pytest.approx(0.5)


def test_total_variation_of_shares():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    samples = torch.tensor([[0.1, 0.2], [0.0, -0.3], [0.2, 0.0], [9.8, 0.1]])
    assert rare_modes.total_variation(samples, centres, torch.tensor([0.75, 0.25, 0.0])) == 0
    assert rare_modes.total_variation(samples, centres, torch.tensor([0.25, 0.25, 0.5])) == pytest.approx(0.5)


def test_far_modes_are_equally_far():
    points, weights = rare_modes.far_modes()
    assert torch.allclose(torch.pdist(points.flatten(1)), torch.tensor(rare_modes.DISTANCE))
    assert float(weights.sum()) == pytest.approx(1)


def test_comparison_needs_two_standard_errors():
    found = {
        ("a", "l", 1): Statistic(1.0, 0.1),
        (rare_modes.LANGEVIN, "l", 1): Statistic(1.5, 0.1),
        ("a", "l", 2): Statistic(1.6, 0.1),
        (rare_modes.LANGEVIN, "l", 2): Statistic(1.5, 0.1),
        ("a", "l", 3): Statistic(1.9, 0.1),
        (rare_modes.LANGEVIN, "l", 3): Statistic(1.5, 0.1),
        ("a", "l", 4): None,
    }
    assert rare_modes.compare(found, "a", [("l", c) for c in (1, 2, 3, 4)]) == (1, 1)


def test_digits_are_told_by_their_nearest_image():
    train, held_out = split_digits()
    assert rare_modes.label_error(train) == 0
    assert rare_modes.label_error(held_out) < 0.08
    zeros = train[split_digit_labels()[0] == 0]
    assert rare_modes.label_error(zeros) == pytest.approx(1 - len(zeros) / len(train))


def test_exploring_finds_the_rare_modes(tmp_path):
    points, weights = rare_modes.far_modes()
    denoiser = ExactDenoiser(points, rare_modes.WIDTH, weights=weights)
    errors = {
        name: rare_modes.total_variation(
            rare_modes.from_image(rare_modes.SAMPLERS[name], denoiser, points[:1], 2.5, 0.1, 50, 1000, 0),
            points,
            weights,
        )
        for name in (rare_modes.EXPLORE, rare_modes.LANGEVIN, "annealed jumps, exact steps")
    }
    assert errors[rare_modes.EXPLORE] < 0.08
    assert min(errors.values()) == errors[rare_modes.EXPLORE] < errors[rare_modes.LANGEVIN] / 3


# --- claim ---


def test_a_run_on_its_own_level_makes_up_for_a_wrong_first_noise():
    """... of the probability flow, which carries the noise that is there to its end; measured once or at every call."""
    args = argparse.Namespace(num_samples=64)
    of = own_level.subject(args, own_level.EXACT, own_level.ONE, 0)
    ladder, every_call, once = (
        own_level.quality(of, "ode", way, 10, "first noise x 2", 0)["error"]
        for way in (own_level.LADDER, own_level.EVERY_CALL, own_level.ONCE)
    )
    assert every_call < 0.9 * ladder
    assert once < 0.9 * ladder


def test_a_mixture_network_errs_less_where_it_is_told_a_wrong_level():
    args = argparse.Namespace(num_samples=64)
    one, mixed = (
        own_level.errors(own_level.subject(args, own_level.EXACT, kind, 0), 0)
        for kind in (own_level.ONE, own_level.MIXED)
    )
    for tau in own_level.LEVELS[1:]:
        assert mixed[f"0.5, {tau}"] < one[f"0.5, {tau}"]
        assert mixed[f"known, {tau}"] == pytest.approx(one[f"known, {tau}"], rel=0.15)


# --- The commands, in small ---


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["claim", "--seeds", "1", "--calls", "4"], marks=pytest.mark.slow),  # six denoisers, 150 cells
        ["increments"],
        ["rare_modes", "--calls", "12"],
    ],
    ids=lambda words: words[0],
)
def test_gm_sgm_commands(words, tmp_path):
    gm_sgm.main([*words, "--num_samples", "4", "--steps", "1", "--output", str(tmp_path)])
    report = Report.read(tmp_path / f"gm_sgm_{words[0]}.json")
    assert (tmp_path / report.pictures[0]).stat().st_size < 150_000
    assert "nan" not in report.verdict
    assert all(len(row) == len(table.header) for table in report.tables for row in table.rows)
