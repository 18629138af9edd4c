"""What the sampler benchmark compares on: denoisers that are known, levels for every scheduler, scores, settings."""

import itertools
import math

import diffusers
import pytest
import torch
from points import seen

from diffusers_gm import CalibratedMultistepScheduler
from diffusers_gm.evaluation.distances import frechet_distance, sliced_wasserstein
from diffusers_gm.evaluation.results import Results
from diffusers_gm.studies import sampler_benchmark as bench
from diffusers_gm.studies import sampler_benchmark_settings as settings
from diffusers_gm.studies.digits import pipeline_of
from diffusers_gm.studies.exact import Erring, ExactDenoiser, GaussianMixture, NetworkOf, exact_network
from diffusers_gm.studies.report import Report
from diffusers_gm.studies.sampler_benchmark_calibration import Calibrations, cheapest_path, step_costs
from diffusers_gm.studies.sampler_benchmark_cells import ahead
from diffusers_gm.studies.sampler_benchmark_models import FRECHET, Scores
from diffusers_gm.studies.sampler_benchmark_schedulers import (
    AYS,
    MULTISTEP,
    SOURCE,
    ays,
    kl_optimal,
    on_levels,
    snapped,
)

# --- Denoisers ---


def test_the_mixture_denoises_by_tweedie(generator):
    """`D = y + sigma^2 grad log p(y)`, p written down by torch."""
    mixture = GaussianMixture.drawn((2, 2, 2), seed=3, num_components=5)
    sigma = 0.4
    components = torch.distributions.Independent(
        torch.distributions.Normal(
            mixture.points.flatten(1).double(), (mixture.deviations.flatten(1).double().square() + sigma**2).sqrt()
        ),
        1,
    )
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights.double()), components)
    y = torch.randn(7, 8, generator=generator, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(y).sum(), y)
    images = y.detach().view(7, 2, 2, 2)
    expected = images + sigma**2 * score.view(images.shape)
    torch.testing.assert_close(mixture(images, sigma), expected)
    torch.testing.assert_close(mixture.score(images, sigma), score.view(images.shape))


def test_draws_of_the_mixture_have_its_mean_and_variance(generator):
    mixture = GaussianMixture.drawn((1, 1, 2), seed=0)
    draws = mixture.draw(40_000, generator)
    weights = mixture.weights[:, None, None, None]
    mean = (weights * mixture.points).sum(0)
    second = (weights * (mixture.points.square() + mixture.deviations.square())).sum(0)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(draws.var(0), second - mean.square(), atol=0.01, rtol=0)


def test_the_error_is_as_large_as_said_smooth_and_always_the_same(generator):
    denoiser = ExactDenoiser(torch.zeros(1, 3, 8, 8), width=0.5)
    erring, sigma = Erring(denoiser, deviation=0.5, error=0.2), 0.7
    y = math.hypot(0.5, sigma) * torch.randn(200, 3, 8, 8, generator=generator)
    before = torch.get_rng_state()
    error = erring(y, sigma) - denoiser(y, sigma)
    assert torch.equal(torch.get_rng_state(), before)
    assert float(error.square().mean().sqrt()) == pytest.approx(0.2 * sigma * 0.5 / math.hypot(0.5, sigma), rel=0.1)
    torch.testing.assert_close(erring(y, sigma) - denoiser(y, sigma), error)
    near = erring(y, 1.01 * sigma) - denoiser(y, 1.01 * sigma)
    far = erring(y, 4 * sigma) - denoiser(y, 4 * sigma)
    assert (near - error).norm() < 0.05 * error.norm()
    assert (far - error).norm() > 0.5 * error.norm()


# --- Levels ---


def test_published_formulas():
    assert ays(157.0, 0.01, 10).tolist() == pytest.approx(AYS[:-1])
    squeezed = ays(9.0, 0.01, 5)
    assert float(squeezed[0]) == pytest.approx(9.0)
    assert float(squeezed[-1]) > AYS[-1]
    levels = kl_optimal(80.0, 0.02, 7)
    assert levels[[0, -1]].tolist() == pytest.approx([80.0, 0.02])
    torch.testing.assert_close(levels.atan().diff(), levels.atan().diff()[:1].expand(6))


def test_levels_are_those_of_whole_timesteps_each_once():
    def crowded(high, low, n):
        return torch.tensor([high, 1.0, 1.0001, 1.0002, low], dtype=torch.float64)

    labels, levels = snapped(SOURCE.alphas_cumprod, crowded, 5)
    assert labels[0] == 999
    assert labels[-1] == 0
    assert labels[1] - labels[2] == labels[2] - labels[3] == 1
    alpha = SOURCE.alphas_cumprod.double()[labels]
    assert levels.tolist() == pytest.approx(((1 - alpha) / alpha).sqrt().tolist())
    with pytest.raises(ValueError, match="need more than the 1000 timesteps"):
        snapped(SOURCE.alphas_cumprod, kl_optimal, 1001)


@pytest.mark.parametrize(
    "name",
    ["UniPCMultistep", "DPMSolverMultistep", "DEISMultistep", "LMSDiscrete", "EulerDiscrete", "SASolver", "DDPM"],
)
def test_schedulers_of_diffusers_on_given_levels(name):
    cls = getattr(diffusers, f"{name}Scheduler")
    labels, levels = snapped(SOURCE.alphas_cumprod, ays, 8)
    scheduler = on_levels(cls, ays).from_config(SOURCE.config)
    if name != "DDPM":
        scheduler.register_to_config(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == pytest.approx(labels, abs=1e-2)
    if name != "DDPM":
        assert scheduler.sigmas[:-1].tolist() == pytest.approx(levels.tolist(), rel=1e-4)


def test_a_scheduler_that_takes_no_levels_is_left_out():
    assert on_levels(diffusers.DDIMScheduler, ays) is None


# --- Calibrations ---


def test_the_cheapest_path_is_the_cheapest(generator):
    costs = torch.rand(6, 7, generator=generator, dtype=torch.float64)
    costs[torch.arange(7) <= torch.arange(6)[:, None]] = math.inf
    for steps in (2, 3, 4):
        path = cheapest_path(costs, steps)
        paths = [[0, *between] for between in itertools.combinations(range(1, 6), steps - 1)]

        def cost(p):
            return sum(float(costs[a, b]) for a, b in itertools.pairwise([*p, 6]))

        assert cost(path) == pytest.approx(min(map(cost, paths)))
        assert path in paths


def test_straight_trajectories_cost_nothing(generator):
    """Of a single image every trajectory is a straight line; of two, not."""
    sigmas = torch.tensor([8.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    start = 8 * torch.randn(16, 1, 2, 2, generator=generator)
    image = torch.rand(1, 1, 2, 2, generator=generator)
    costs = step_costs(seen(ExactDenoiser(image)), start, sigmas)
    later = torch.arange(5) > torch.arange(4)[:, None]
    assert costs[later].max() < 1e-5
    assert costs[~later].isinf().all()
    assert step_costs(seen(ExactDenoiser(torch.cat([image, -image]))), start, sigmas)[0, 4] > 0.1


def test_a_calibration_is_made_once(tmp_path):
    calls = 0
    mixture = GaussianMixture.drawn((1, 1, 2), seed=0)
    exact = exact_network(mixture, CalibratedMultistepScheduler.from_config(SOURCE.config))

    def network(x, t):
        nonlocal calls
        calls += 1
        return exact(x, t)

    def made():
        return Calibrations(pipeline_of(NetworkOf(network, (1, 1, 2)), SOURCE), tmp_path, "0123456789abcdef01")

    assert made().table() is None
    scheduler = made().scheduler("fast")
    assert calls > 0
    calls = 0
    assert made().scheduler("fast").config.calibration == scheduler.config.calibration
    levels = made().levels("fast")(157.0, 0.01, 8)
    assert calls == 0
    assert levels.tolist() == pytest.approx(scheduler.config.calibration["8"])
    assert [row[0] for row in made().table().rows] == ["fast"]
    (kept,) = tmp_path.glob("calibration * fast.json")
    kept.write_text(kept.read_text().replace('"rules": "', '"rules": "0'))
    with pytest.raises(ValueError, match="was calibrated by other code than there is"):
        made().scheduler("fast")


# --- Scores ---


@pytest.mark.parametrize("num_reference", [200, 130, 40, 27])
def test_sliced_w2_is_that_of_evaluation(num_reference, generator):
    """Whether the reference is a multiple of the samples, fewer or neither."""
    samples = torch.rand(40, 1, 3, 2, generator=generator) * 3 - 1.5
    reference = torch.rand(num_reference, 1, 3, 2, generator=generator)
    found = Scores(reference)(samples)
    assert found["sliced W2"] == pytest.approx(sliced_wasserstein(samples.clamp(-1, 1), reference), rel=1e-9)
    samples[3, 0, 0, 0] = math.nan
    assert Scores(reference)(samples) == {"num_nan": 1}


def test_fd_is_of_as_many_principal_components_as_the_samples_allow(generator):
    """Of all, rotated, it is that of the pixels; of fewer, that of the directions in which the reference varies most:
    what samples lack in the others is not seen."""
    spread = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.2]).view(1, 3, 2) / 20
    reference, samples = (spread * torch.randn(n, 1, 3, 2, generator=generator) for n in (4000, 480))
    of_pixels = frechet_distance(samples.flatten(1), reference.flatten(1))
    assert Scores(reference)(samples)[FRECHET] == pytest.approx(of_pixels, rel=1e-6)
    few = samples[:32]
    first = frechet_distance(few.flatten(1)[:, :4], reference.flatten(1)[:, :4])
    assert Scores(reference)(few)[FRECHET] == pytest.approx(first, rel=0.1)
    few[:, 0, 2] = 0
    assert Scores(reference)(few)[FRECHET] == pytest.approx(first, rel=0.1)
    assert FRECHET not in Scores(reference)(few[:7])


# --- Settings alone ---


def results(folder, name, values, default=("DDPM", "default"), num_samples=8):
    """Of `{(setting, calls): sliced W2}`."""
    kept = Results.open(
        folder / ".parts" / f"samplers {name} n={num_samples}.json",
        {"study": f"samplers {name}", "num_samples": num_samples, "title": name, "default": default},
    )
    for (setting, calls), value in values.items():
        kept.measure(setting, calls, 0, lambda: (None, 5), lambda _, value=value: {"sliced W2": value})
    return kept


OURS = f"{MULTISTEP}, calibrated"


def test_every_setting_alone(tmp_path, capsys):
    one = {(OURS, 5): 2.0, ("UniPC, Karras", 5): 1.0, ("DEIS, AYS", 5): 4.0, ("DDPM, default", 5): 8.0}
    two = {(OURS, 5): 1.0, ("UniPC, Karras", 5): 8.0, ("DEIS, AYS", 5): 4.0, ("UniPC, calibrated", 5): 0.5}
    results(tmp_path, "a", one)
    results(tmp_path, "b", two)
    settings.main(["--output", str(tmp_path)])
    capsys.readouterr()
    report = Report.read(tmp_path / "samplers_settings.json")
    networks, chosen, given_ours, default, levels, alone = report.tables
    assert levels.rows == [], "no other sampler has both grids"
    assert networks.rows == [["a", "2.00", "2.00"], ["b", "0.25", "0.25"]]
    # The peers chosen afterwards are UniPC on a and DEIS on b; not on our levels, but in the next table.
    assert chosen.rows == [[OURS, "0.71", "0.71", "2.00 (a, 5 calls)"]]
    assert given_ours.rows[0][1] == "2.00"
    assert default.rows == [[OURS, "0.25", "0.25", "0.25 (a, 5 calls)"]]
    by_name = {row[1]: row for row in alone.rows}
    assert by_name[f"**{OURS}**"] == ["1", f"**{OURS}**", "0.71", "0.71", "2.00 (a, 5 calls)", "0"]
    assert by_name["UniPC, Karras"][2] == f"{2**0.5:.2f}"
    assert by_name["UniPC, Karras"][-1] == "1"
    assert by_name["UniPC, calibrated (1 cells lacking)"][-1] == "1"
    assert "DDPM, default (1 cells lacking)" in by_name
    assert "the best single setting of diffusers that was run everywhere (UniPC, Karras) has 1.41" in report.verdict
    assert "ahead of ours at no number of calls" in report.verdict


def test_settings_of_kept_cells_have_a_name(tmp_path):
    results(tmp_path / "kept", "a", {(OURS, 5): 2.0, ("UniPC, Karras", 5): 1.0})
    words = ["--cells", str(tmp_path / "kept" / ".parts"), "--name", "held out", "--output", str(tmp_path)]
    settings.main(words)
    report = Report.read(tmp_path / "samplers_settings_held-out.json")
    assert report.title.endswith("every scheduler on every grid alone, held out")
    assert report.tables[0].rows == [["a", "2.00", "2.00"]]


def test_what_is_against_us_is_said(tmp_path):
    kept = results(
        tmp_path, "a", {(OURS, 5): 2.0, (OURS, 8): 1.0, ("UniPC, Karras", 5): 1.0, ("UniPC, Karras", 8): 2.0}
    )
    assert "ahead of ours at 5 calls (UniPC, Karras, 1.00 against 2.00)" in settings.study([kept], 5).verdict
    # A setting that was run at some numbers of calls alone is compared there.
    kept.measure("DEIS, AYS", 8, 0, lambda: (None, 8), lambda _: {"sliced W2": 0.5})
    verdict = settings.study([kept], 5).verdict
    assert "5 calls (UniPC, Karras, 1.00 against 2.00), 8 calls (DEIS, AYS, 1.00 against 2.00)" in verdict
    assert "run everywhere (UniPC, Karras)" in verdict


def test_where_no_setting_was_run_everywhere_is_said(tmp_path):
    """Above 20 calls only the grid that was best before is run, another one for every network."""
    one = results(tmp_path, "a", {(OURS, n): 1.0 for n in (5, 30)} | {("UniPC, Karras", n): 2.0 for n in (5, 30)})
    two = results(tmp_path, "b", {(OURS, n): 1.0 for n in (5, 30)} | {("UniPC, Karras", 5): 2.0, ("LMS, AYS", 30): 2.0})
    verdict = settings.study([one, two], 5).verdict
    assert "ahead of ours at no number of calls (none of them was run everywhere at 30 calls)" in verdict


def test_what_our_levels_are_worth_to_others(tmp_path):
    both = {("UniPC, calibrated", 5): 1.0, ("UniPC, default", 5): 2.0, ("CLD, sscs, calibrated", 5): 3.0}
    kept = results(tmp_path, "a", {(OURS, 5): 1.0, ("CLD, sscs, default", 5): 1.0, **both})
    rows = settings.worth_of_levels(settings.Measured.of([kept], "sliced W2"), "").rows
    assert [row[:2] for row in rows] == [["**CLD, sscs**", "3.00"], ["UniPC", "0.50"]]


def test_settings_are_compared_on_the_seeds_that_most_of_them_have(tmp_path):
    kept = results(
        tmp_path, "a", {(OURS, 5): 2.0, ("UniPC, Karras", 5): 1.0, ("DEIS, AYS", 5): 0.8, ("PNDM, default", 5): 4.0}
    )
    kept.measure(OURS, 5, 1, lambda: (None, 5), lambda _: {"sliced W2": 4.0})
    report = settings.study([kept], 5)
    assert report.tables[0].rows == [["a", "2.50", "2.50"]]
    assert "1 seed(s)" in report.conditions
    # The luck of one seed is not compared with the mean of two.
    kept.measure("UniPC, Karras", 5, 1, lambda: (None, 5), lambda _: {"sliced W2": 2.0})
    report = settings.study([kept], 5)
    assert report.tables[0].rows == [["a", "2.00", "2.00"]]
    assert "2 seed(s)" in report.conditions
    # What is far behind on the first has that alone.
    assert settings.Measured.of([kept], "sliced W2").values["a", 5]["PNDM", "default"] == 4.0


def test_what_a_look_left_out_is_as_far_behind_as_it_was(tmp_path):
    """UniPC was 3 times the best of the look, and so it is of the best of more samples."""
    look = results(
        tmp_path, "a", {(OURS, 5): 2.0, ("UniPC, Karras", 5): 6.0, (OURS, 8): 1.0, ("UniPC, Karras", 8): 2.0}
    )
    more = results(tmp_path, "a", {(OURS, 5): 0.5, ("DEIS, AYS", 5): 1.0}, num_samples=400)
    for kept in ([look, more], [more, look]):
        values = settings.Measured.of(kept, "sliced W2").values
        assert values["a", 5] == {(MULTISTEP, "calibrated"): 0.5, ("DEIS", "AYS"): 1.0, ("UniPC", "Karras"): 1.5}
        assert values["a", 8] == {(MULTISTEP, "calibrated"): 1.0, ("UniPC", "Karras"): 2.0}
    assert "(n = 8, 1 seed(s); n = 400, 1 seed(s))" in settings.study([more, look], 5).conditions


def test_a_look_at_one_seed_is_no_measurement_where_others_have_several(tmp_path):
    kept = results(
        tmp_path, "a", {(OURS, 5): 2.0, ("UniPC, Karras", 5): 1.0, (OURS, 8): 9.0, ("UniPC, Karras", 8): 1.0}
    )
    for name in (OURS, "UniPC, Karras"):
        kept.measure(name, 5, 1, lambda: (None, 5), lambda _: {"sliced W2": 1.0})
    assert set(settings.Measured.of([kept], "sliced W2").values) == {("a", 5)}


def test_settings_without_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings.main(["--output", str(tmp_path)])
    assert "run `sampler_benchmark` first" in capsys.readouterr().err


# --- The command ---


def test_the_calibrated_sampler_in_small(tmp_path, capsys):
    words = ["--models", "mixture-2", "--num_samples", "40", "--seeds", "1", "--calls", "5", "--output", str(tmp_path)]
    words += ["--samplers", MULTISTEP, "DDPM", "UniPC", "--grids", "fast", "default", "KL optimal"]
    bench.main(words)
    first = capsys.readouterr().out
    report = Report.read(tmp_path / "samplers_mixture-2_n40_selected.json")
    assert [row[0] for row in report.tables[0].rows] == [f"**{MULTISTEP}**", "DDPM", "UniPC"]
    assert [row[0] for row in report.tables[1].rows] == ["fast"]
    assert "FD of pixels" in first
    bench.main(words)
    assert "sampled in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grids", "Karas"], "--grids ['Karas']: there are default, "),
        (["--models", "cifar10"], "--models cifar10 needs --cifar10, the folder of its parquet files"),
        (["--models", "cifar10", "--cifar10", "nowhere"], "--cifar10 nowhere: no such folder"),
    ],
)
def test_options_that_are_wrong(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        bench.main([*words, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_the_best_of_diffusers_is_measured_further_however_far_behind():
    values = {
        (MULTISTEP, "calibrated"): 1.0,
        ("UniPC", "AYS"): 2.0,
        ("UniPC", "calibrated"): 1.5,
        ("DDIM", "Karras"): 3.0,
    }
    assert ahead(values) == {(MULTISTEP, "calibrated"), ("UniPC", "AYS")}
