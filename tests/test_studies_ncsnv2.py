"""The studies of NCSNv2's claims."""

import pytest
import torch

from diffusers_gm import AnnealedLangevinScheduler
from diffusers_gm.processes.annealed import chain_variance, ladder_ratio, optimal_step_size
from diffusers_gm.studies import ncsnv2
from diffusers_gm.studies.digits import tie, trained
from diffusers_gm.studies.ncsnv2_trained import last_call, verdict_of
from diffusers_gm.studies.report import Report


class Answer:
    def __init__(self, sample):
        self.sample = sample


# --- Formulas ---


def test_technique_3_reaches_the_networks_of_the_studies(tmp_path):
    unet, _ = trained(tmp_path, method="ncsnv2", max_train_steps=1, train_batch_size=2, conditioning="none")
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    assert torch.equal(unet(x, 3).sample, unet(x, 900).sample)


def test_mean_pairwise_distance_of_a_square():
    square = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).view(4, 1, 1, 2)
    assert ncsnv2.mean_pairwise_distance(square) == pytest.approx((4 + 2 * 2**0.5) / 6)


def test_coverage_of_independent_draws_and_of_one_mode(generator):
    modes = torch.eye(50).view(50, 1, 5, 10)
    found = [ncsnv2.coverage(modes[torch.randint(50, (100,), generator=generator)], modes) for _ in range(200)]
    error = float(torch.tensor(found).std()) / 200**0.5
    assert abs(sum(found) / 200 - 1) < 5 * error
    assert ncsnv2.coverage(modes[:1].expand(100, 1, 5, 10), modes) == pytest.approx(1 / (50 * (1 - 0.98**100)))


def test_published_settings_follow_from_the_formulas():
    for name, _, _, published, ours, overlap, _, eps, our_eps in ncsnv2.published_rows():
        assert our_eps == pytest.approx(eps, rel=0.02), name
        assert overlap == pytest.approx(0.5667, abs=5e-4), name
        assert 0.94 * published < ours < published, name


def test_overlap_is_the_inverse_of_the_ladder_ratio():
    for dim in (64, 3072):
        assert ncsnv2.overlap_of(ladder_ratio(dim, 0.4), dim) == pytest.approx(0.4, abs=1e-6)


def test_verdicts_need_more_than_the_spread_of_sampling_and_of_the_seeds():
    for ratios, spreads, least, word in [
        ([1.04, 0.96], [0, 0], 0.05, "no difference"),
        ([1.1, 0.9], [0, 0], tie(1), "no difference"),
        ([1.1, 1.0], [0, 0], tie(4), "worse"),
        ([1.5, 1.0], [0.1, 0], 0.05, "worse"),
        ([1.5, 1.0], [0.6, 0], 0.05, "no difference"),
        ([0.5, 0.9], [0, 0], 0.05, "better"),
        ([0.5, 1.9], [0, 0], 0.05, "mixed"),
    ]:
        assert verdict_of(ratios, spreads, least) == word


def test_the_last_call_removes_what_technique_4_says_is_left(tiny_unet):
    """A network that sees data at 0: before the last call, what is left is the chain's own noise."""
    scheduler = AnnealedLangevinScheduler(noise_space="ve", sigma_max=11.0, num_train_timesteps=1000)
    level, calls = 0.1, 30

    def black(x, t):
        sigma = scheduler.noise_space.sigma(torch.as_tensor(t).double())
        return Answer(x / float(scheduler.noise_space.alpha(sigma)) / float(sigma))

    before, after = last_call(black, scheduler, level, calls, 64, seed=0)
    ratio = torch.tensor([(scheduler.config.sigma_max / level) ** (1 / (calls - 2))], dtype=torch.float64)
    step = optimal_step_size(ratio, 1)
    variance = level**2 * float(chain_variance(step, ratio, 1))
    found = float(before.square().mean())
    assert abs(found / variance - 1) < 5 * (2 / before.numel()) ** 0.5
    assert float(after.abs().max()) < 1e-5


# --- The commands, in small ---


@pytest.mark.parametrize(
    "words",
    [
        ["noise_scales"],
        ["diversity", "--calls", "11", "--seeds", "1"],
        ["denoise", "--calls", "5", "--seeds", "1", "--steps", "2"],
        ["techniques", "--calls", "5", "--seeds", "1", "--steps", "1"],
    ],
    ids=lambda words: words[0],
)
def test_ncsnv2_commands(words, tmp_path):
    ncsnv2.main([*words, "--num_samples", "4", "--output", str(tmp_path)])
    check_report(tmp_path, f"ncsnv2_{words[0]}")


def check_report(folder, name) -> Report:
    report = Report.read(folder / f"{name}.json")
    assert all((folder / picture).stat().st_size < 150_000 for picture in report.pictures)
    assert len(report.pictures) == 1
    assert report.verdict
    assert "nan" not in report.verdict
    assert all(len(row) == len(table.header) for table in report.tables for row in table.rows)
    return report
