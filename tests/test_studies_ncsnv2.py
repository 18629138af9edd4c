"""The studies of NCSNv2's claims, and what all studies share."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_gm import training as tr
from diffusers_gm.data import split_digits
from diffusers_gm.processes.annealed import ladder_ratio
from diffusers_gm.studies import lifted, ncsnv2
from diffusers_gm.studies.common import (
    Cells,
    all_or_none,
    ddpm_loss,
    floor_of_digits,
    in_words,
    kept_unet,
    mean_and_spread,
    name_of,
    over_floor,
    parts_of,
    tie,
    trained,
)
from diffusers_gm.studies.ncsnv2_trained import last_call, verdict_of
from diffusers_gm.studies.report import Report


class Answer:
    def __init__(self, sample):
        self.sample = sample


# --- What the studies share ---


def test_cells_measure_once_and_survive_in_their_file(tmp_path):
    calls = []
    path = tmp_path / "cells.json"
    for _ in range(2):
        cells = Cells(path)
        for _ in range(2):
            assert cells("a", lambda: calls.append(1) or 2.5) == 2.5
    assert calls == [1]
    assert cells("nothing stable", lambda: None) is None
    assert Cells(path).values == {"a": 2.5, "nothing stable": None}


def test_cells_are_not_mixed_between_settings(tmp_path):
    path = tmp_path / "cells.json"
    Cells(path, {"power law": {"alpha": 1.5}})("power law, 5 calls", lambda: 2.5)
    assert Cells(path, {"stable": {"alpha": 1.8}})("power law, 5 calls", lambda: None) == 2.5
    with pytest.raises(ValueError, match=r"cells.json was made with other settings \(power law = .*1.5}, now .*1.2}"):
        Cells(path, {"power law": {"alpha": 1.2}})


def test_a_network_of_other_options_is_not_taken_for_this_one(tmp_path, tiny_unet):
    kept_unet(tmp_path / "net", lambda: tiny_unet, {"learning_rate": 1e-3})
    kept_unet(tmp_path / "net", lambda: None, {"learning_rate": 1e-3, "new option": "its default"})
    with pytest.raises(ValueError, match=r"net was made with other settings \(learning_rate = 0.001, now 0.002\)"):
        kept_unet(tmp_path / "net", lambda: None, {"learning_rate": 2e-3})


def test_two_studies_that_train_the_same_network_do_not_disturb_each_other(tmp_path, tiny_unet):
    def meanwhile():
        kept_unet(tmp_path / "net", lambda: tiny_unet)
        return tiny_unet

    kept_unet(tmp_path / "net", meanwhile)
    assert (tmp_path / "net" / "config.json").is_file()


def test_a_network_is_trained_once_and_kept(tmp_path, tiny_unet):
    trainings = []

    def train():
        trainings.append(1)
        return tiny_unet

    for _ in range(2):
        kept = kept_unet(tmp_path / "some name=1", train)
    assert trainings == [1]
    assert not any(p.requires_grad for p in kept.parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), tiny_unet.parameters(), strict=True))


def test_an_interrupted_training_leaves_nothing_that_looks_finished(tmp_path, tiny_unet):
    (tmp_path / "net.part").mkdir()
    (tmp_path / "net.part" / "rest").write_text("of an earlier run")
    kept_unet(tmp_path / "net", lambda: tiny_unet)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert not (tmp_path / "net" / "rest").exists()


def test_networks_are_named_after_their_options():
    args = tr.TrainingArguments(method="ncsnv2", max_train_steps=7, seed=1, conditioning="none")
    assert name_of(args) == "ncsnv2 conditioning=none max_train_steps=7 seed=1"
    assert name_of(tr.TrainingArguments()) == "gm-sgm"


def test_a_floor_is_of_as_many_images_as_there_are_samples():
    assert over_floor(split_digits()[1][:40]) == 1
    with pytest.raises(ValueError, match="num_samples 361: there are 360 held-out digits"):
        floor_of_digits(361)


def test_parts_are_ignored_by_git(tmp_path):
    assert (parts_of(tmp_path) / ".gitignore").read_text() == "*\n"


def test_seeds_in_words():
    assert mean_and_spread([1.0, 2.0, 4.0]) == (7 / 3, 1.5)
    assert in_words([1.0, 2.0]) == "1.50 ± 0.50"
    assert in_words([1.234]) == "1.23"
    assert in_words(all_or_none([1.0, None])) == "-"
    assert all_or_none([0.0, 1.0]) == [0.0, 1.0]


def test_the_loss_of_a_ddpm_is_nothing_for_a_network_that_knows_the_noise():
    scheduler = DDPMScheduler()
    noise_of_black = lambda x, t: Answer(x / (1 - scheduler.alphas_cumprod[t]).sqrt()[:, None, None, None])
    with torch.random.fork_rng():
        assert float(ddpm_loss(scheduler)(noise_of_black, torch.zeros(64, 1, 8, 8)).max()) < 1e-8
        # A network that answers nothing has the noise's own mean square, 1 with a standard error of sqrt(2 / n).
        loss = float(ddpm_loss(scheduler)(lambda x, t: Answer(torch.zeros_like(x)), torch.zeros(64, 1, 8, 8)).mean())
    assert abs(loss - 1) < 5 * (2 / 64**2) ** 0.5


def test_technique_3_reaches_the_networks_of_the_studies(tmp_path):
    args = tr.TrainingArguments(method="ncsnv2", max_train_steps=1, train_batch_size=2, conditioning="none")
    unet, _ = trained(args, tmp_path)
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    assert torch.equal(unet(x, 3).sample, unet(x, 900).sample)


# --- Formulas of the studies ---


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
    args = tr.TrainingArguments(method="ncsnv2")
    scheduler = tr.build_scheduler(args, tr.make_plan(args, *_digits(), None, 1))
    level, calls = 0.1, 30

    def black(x, t):
        sigma = scheduler.noise_space.sigma(torch.as_tensor(t).double())
        return Answer(x / float(scheduler.noise_space.alpha(sigma)) / float(sigma))

    before, after = last_call(black, scheduler, level, calls, 64, seed=0)
    ratio = torch.tensor([(scheduler.config.sigma_max / level) ** (1 / (calls - 2))], dtype=torch.float64)
    step = ncsnv2.optimal_step_size(ratio, 1)
    from diffusers_gm.processes.annealed import chain_variance

    variance = level**2 * float(chain_variance(step, ratio, 1))
    found = float(before.square().mean())
    assert abs(found / variance - 1) < 5 * (2 / before.numel()) ** 0.5
    assert float(after.abs().max()) < 1e-5


def _digits():
    from diffusers_gm.data import Examination, split_digits

    train, _ = split_digits()
    return Examination(train, 0), len(train)


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


def test_lifted_command(tmp_path):
    lifted.main(["--steps", "1", "--seeds", "1", "--num_samples", "4", "--calls", "6", "--output", str(tmp_path)])
    report = check_report(tmp_path, "lifted")
    rows = {row[0]: row[1] for row in report.tables[0].rows}
    assert all(math.isfinite(float(value)) for name, value in rows.items() if value != "-"), rows


def check_report(folder, name) -> Report:
    report = Report.read(folder / f"{name}.json")
    assert all((folder / picture).stat().st_size < 150_000 for picture in report.pictures)
    assert len(report.pictures) == 1
    assert report.verdict
    assert "nan" not in report.verdict
    assert all(len(row) == len(table.header) for table in report.tables for row in table.rows)
    return report
