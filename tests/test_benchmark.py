"""The sampler benchmark: what counts as a network call, the best grid, resuming, the sentence of the verdict."""

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from networks import tiny_network
from PIL import Image

from diffusers_gm import AnnealedLangevinScheduler, CalibratedMultistepScheduler, GMLangevinScheduler, NCSNv2Pipeline
from diffusers_gm.evaluation.results import Results, Statistic
from diffusers_gm.evaluation.sampling import NoGridError, sample
from diffusers_gm.pipelines.unconditional import UnconditionalPipeline
from diffusers_gm.processes.cld import CLD
from diffusers_gm.samplers import CriticallyDamped, Langevin, Memory, TwoStep
from diffusers_gm.studies import sampler_benchmark as bench
from diffusers_gm.studies import sampler_benchmark_cells as cells
from diffusers_gm.studies import sampler_benchmark_models as models
from diffusers_gm.studies import step_cost
from diffusers_gm.studies.demo import SAMPLERS
from diffusers_gm.studies.digits import parts_of, pipeline_of
from diffusers_gm.studies.exact import NetworkOf
from diffusers_gm.studies.report import Report
from diffusers_gm.studies.sampler_benchmark_calibration import GITS, VARIANTS, Calibrations
from diffusers_gm.studies.sampler_benchmark_schedulers import edm_peers, kl_optimal

# Of a network that nobody calibrates here.
UNMADE = Calibrations(None, Path("nowhere"), "")


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

    num_steps = cells.budget(scheduler, 9)
    assert num_steps == (9 if scheduler.order == 1 else 5)
    pipeline = pipeline_of(NetworkOf(network, (1, 8, 8)), scheduler)
    _, said = sample(pipeline, scheduler, num_steps, num_images=1, seed=0, batch_size=1)
    assert calls == said == 9


def test_every_scheduler_has_a_run_on_some_grid():
    for name, by_grid in models.compatible(models.SOURCE.config, UNMADE).items():
        possible = []
        for grid, scheduler in by_grid.items():
            if grid == GITS or grid.startswith(tuple(VARIANTS)):  # theirs would be made now
                continue
            with contextlib.suppress(NoGridError):
                possible.append(cells.budget(scheduler, 21))
        assert possible, name
        assert "default" in by_grid


def test_own_networks_are_given_to_diffusers_where_it_can_read_them():
    described = AnnealedLangevinScheduler(noise_space="ve", sigma_max=9.0)
    samplers = models.own_samplers(described, UNMADE)
    assert {"langevin", "CLD, sscs", "DDPM", "UniPC"} <= set(samplers)
    assert {"calibrated", GITS} <= set(samplers["UniPC"])
    for scheduler in samplers["UniPC"].values():
        assert float(1 / scheduler.alphas_cumprod[-1]) == pytest.approx(1 + 9.0**2, rel=1e-4)
    mixture = {"mixture_weights": [0.5, 0.5], "mixture_scales": [0.5, 1.5], "model_noise": "mixture"}
    assert "UniPC" not in models.own_samplers(GMLangevinScheduler(**mixture), UNMADE)


# --- The best grid ---


class Grid(DDPMScheduler):
    """Answers an image of one value at every call; `runs` is the most calls that it has a grid for."""

    def __init__(self, value=0.0, runs=1000):
        super().__init__()
        self.value, self.runs, self.asked = value, runs, 0

    def set_timesteps(self, num_inference_steps, device=None):
        if num_inference_steps > self.runs:
            raise ValueError("no run of so many calls")
        super().set_timesteps(num_inference_steps, device)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        self.asked += 1
        return DDPMSchedulerOutput(prev_sample=torch.full_like(sample, self.value))


def model_with(**grids):
    """Of which the reference is black, and the floor a little brighter."""
    pipeline = pipeline_of(NetworkOf(lambda x, t: x, (1, 8, 8)), DDPMScheduler())
    reference = torch.full((8, 1, 8, 8), -1.0)
    return models.Model("it", pipeline, {"s": grids}, reference, torch.full((4, 1, 8, 8), -0.9), "", "x")


def results_in(folder):
    results = Results.open(folder / "cells.json", {"num_samples": 4})
    results.floor = [{"sliced W2": 0.1 / 8}]
    return results


def best_of(model, calls, seeds, results, grids):
    return cells.best_of_each(model, [("s", grid) for grid in grids], calls, seeds, results).get(("s", calls))


def test_the_best_grid_and_nothing_is_measured_twice(tmp_path):
    model = model_with(a=Grid(-0.78), b=Grid(-0.8))
    best = best_of(model, 5, 3, results_in(tmp_path), "ab")
    assert best.grid == "b"
    assert best.ratio.spread == 0
    again = best_of(model, 5, 3, results_in(tmp_path), "ab")
    assert again == best
    assert [grid.asked for grid in model.samplers["s"].values()] == [3 * 5, 3 * 5]
    assert best_of(model, 5, 3, results_in(tmp_path), "a").grid == "a"
    assert str(cells.Best("b", Statistic.of([2.0, 2.0]))) == "2.00 ± 0.00 b"


def test_what_is_far_behind_has_one_seed(tmp_path):
    """And what all are compared with has all of them."""
    model = model_with(a=Grid(-0.7), b=Grid(-0.8))
    model.samplers["DDPM"] = {"default": Grid(0.0)}
    settings = [("s", "a"), ("s", "b"), ("DDPM", "default")]
    bests = cells.best_of_each(model, settings, 5, 3, results_in(tmp_path))
    assert [grid.asked for grid in model.samplers["s"].values()] == [5, 3 * 5]
    assert bests["DDPM", 5].ratio.num_values == 3
    assert best_of(model, 5, 3, results_in(tmp_path), "a").ratio.num_values == 3  # alone it is the best


def test_other_grids_where_the_best_one_below_has_no_run(tmp_path):
    """`b` is best at 20 calls and has no run at 50: `a` is the answer there, not a gap in the table."""
    model = model_with(a=Grid(-0.7), b=Grid(-0.8, runs=20))
    given = {"samplers": None, "grids": None, "device": "cpu"}
    args = argparse.Namespace(calls=[20, 50], seeds=1, num_samples=4, output=tmp_path, **given)
    report = bench.benchmark("it", model, args, Results.open(tmp_path / "cells.json", {"num_samples": 4}))
    assert report.tables[0].rows == [["s", "2.00 b", "3.00 a"]]


def test_a_first_look_leaves_out_what_is_far_behind(tmp_path, monkeypatch):
    """By fewer samples of one seed; what all are compared with stays."""
    model = model_with(a=Grid(-0.7), b=Grid(-0.8))
    model.samplers["DDPM"] = {"default": Grid(0.0)}
    monkeypatch.setattr(bench, "models_of", lambda args: iter([("it", model)]))
    words = ["--num_samples", "4", "--first_look", "2", "--seeds", "3", "--calls", "5", "--output", str(tmp_path)]
    bench.main(words)
    report = Report.read(tmp_path / "samplers_it_n4.json")
    assert [row[0] for row in report.tables[0].rows] == ["**s**", "DDPM"]
    assert "What 2 samples put 1.25 times behind is left out." in report.conditions
    looked, kept = (
        {(cell.scheduler, cell.seed) for cell in Results.read(path).cells}
        for path in (parts_of(tmp_path) / f"samplers it n={n} steps=1200.json" for n in (2, 4))
    )
    assert looked == {("s, a", 0), ("s, b", 0), ("DDPM, default", 0)}
    assert kept == {(name, seed) for name in ("s, b", "DDPM, default") for seed in range(3)}


def test_a_run_that_diverges_or_does_not_exist_is_no_result(tmp_path):
    model = model_with(nan=Grid(float("nan")), none=Grid(runs=1))
    assert best_of(model, 5, 1, results_in(tmp_path), ["nan", "none"]) is None
    kept = {cell.scheduler: cell for cell in Results.read(tmp_path / "cells.json").cells}
    assert kept["s, nan"].scores == {"num_nan": 4}
    assert "no run of so many calls" in kept["s, none"].reason or "network calls" in cells["s, none"].reason


def test_the_command_in_small(tmp_path):
    samplers = ["CLD, sscs", "DDPM", "Euler ancestral"]
    words = ["--num_samples", "40", "--seeds", "1", "--calls", "5", "--output", str(tmp_path), "--samplers", *samplers]
    bench.main([*words, "--grids", "default", "trailing", "quadratic"])
    report = Report.read(tmp_path / "samplers_exact_n40_selected.json")
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
    bench.main([*words, "--grids", "default", "trailing", "quadratic", "exponential"])
    report = Report.read(tmp_path / "samplers_exact_pictures_3x4x4_10_n20_selected.json")
    assert report.title == "Samplers at equal network calls: the exact denoiser of 10 images of pictures, 3x4x4"
    # Good samples are near the floor: of the data, not of the digits.
    assert all(float(row[1].split()[0]) < 2 for row in report.tables[0].rows)


@pytest.fixture
def faces(tmp_path, generator):
    """A folder of 24 pictures of 8x8."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for i, image in enumerate(torch.randint(0, 256, (24, 8, 8), generator=generator, dtype=torch.uint8)):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return str(folder)


def saved(scheduler, folder):
    """A pipeline of a tiny network, untrained, in a folder."""
    cls = NCSNv2Pipeline if isinstance(scheduler, AnnealedLangevinScheduler) else UnconditionalPipeline
    cls(tiny_network(), scheduler).save_pretrained(folder)
    return str(folder)


def test_a_saved_pipeline_beside_real_images(tmp_path, faces):
    """Our EDM network is sampled by diffusers' schedulers for those, on its own levels too; a DDPM by all the others.
    Of the 24 images 8 are the floor, and 16 the reference."""
    edm = AnnealedLangevinScheduler(noise_space="edm", sigma_data=0.5, sigma_max=20.0, sigma_min=0.02)
    paths = [saved(edm, tmp_path / "edm"), saved(DDPMScheduler(), tmp_path / "ddpm")]
    words = ["--pipeline", *paths, "--train_data_dir", faces, "--num_samples", "8", "--seeds", "1", "--calls", "5"]
    words += ["--output", str(tmp_path / "out")]
    bench.main([*words[:1], paths[0], *words[3:], "--grids", "default", "AYS", "KL optimal"])
    report = Report.read(tmp_path / "out" / "samplers_edm_n8_selected.json")
    assert {"EDM Euler", "EDM DPM-Solver++(2M)", "EDM SDE-DPM-Solver++(2M)"} <= {
        row[0] for row in report.tables[0].rows
    }
    assert "DDPM" not in {row[0] for row in report.tables[0].rows}
    assert "Reference 16 real images, floor 8 others" in report.conditions
    bench.main([*words[:1], paths[1], *words[3:], "--samplers", "DDPM", "UniPC", "--grids", "default"])
    report = Report.read(tmp_path / "out" / "samplers_ddpm_n8_selected.json")
    assert [row[0] for row in report.tables[0].rows] == ["DDPM", "UniPC"]


def test_a_compiled_network_is_what_is_sampled(tmp_path, faces, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    words = ["--pipeline", saved(DDPMScheduler(), tmp_path / "ddpm"), "--train_data_dir", faces, "--num_samples", "8"]
    words += ["--seeds", "1", "--calls", "5", "--output", str(tmp_path), "--samplers", "DDIM", "--grids", "default"]
    bench.main([*words, "--compile"])
    assert len(calls) == 5


def test_edm_schedulers_of_diffusers_on_given_levels():
    config = AnnealedLangevinScheduler(noise_space="edm", sigma_data=0.5, sigma_max=20.0, sigma_min=0.02).config
    for by_grid in edm_peers(config, UNMADE).values():
        given = by_grid["KL optimal"]()
        for scheduler in (given, by_grid["default"]):
            scheduler.set_timesteps(6)
        assert given.sigmas[:-1].tolist() == pytest.approx(kl_optimal(20.0, 0.02, 6).tolist())
        assert by_grid["default"].sigmas[0] == pytest.approx(20.0)
        assert by_grid["default"].sigmas[1] != pytest.approx(float(given.sigmas[1]), rel=0.05)


def test_a_calibrated_pipeline_is_read_as_the_network_that_it_has(tmp_path, generator):
    """Not as a DDPM; and what it comes with is its calibrated scheduler."""
    edm = AnnealedLangevinScheduler(noise_space="edm", sigma_data=0.5, sigma_max=20.0, sigma_min=0.02)
    NCSNv2Pipeline(tiny_network(), CalibratedMultistepScheduler.from_config(edm.config)).save_pretrained(tmp_path / "m")
    images = torch.rand(16, 1, 8, 8, generator=generator)
    model = models.saved_model(str(tmp_path / "m"), images, 8, tmp_path)
    samplers = model.samplers
    args = argparse.Namespace(num_samples=8, steps=1, output=tmp_path)
    for asked in (samplers, {"EDM Euler": samplers["EDM Euler"]}):  # cells of some are kept beside those of all
        kept = bench.kept_cells("m", replace(model, samplers=asked), args)
        assert kept.conditions["default"] == ["as it comes", "default"]
    assert {"langevin", "consistent", "EDM Euler"} <= set(samplers)
    assert "DDPM" not in samplers
    assert isinstance(samplers["as it comes"]["default"], CalibratedMultistepScheduler)
    UnconditionalPipeline(tiny_network(), EDMEulerScheduler()).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="has a EDMEulerScheduler: a network of DDPM, or one of ours, is needed"):
        models.saved_model(str(tmp_path / "theirs"), images, 8, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--num_samples": "13"}, "24 real images are too few"),
        ({"--resolution": "6"}, "makes images of (1, 8, 8)"),
        ({"--train_data_dir": None}, "--pipeline needs --train_data_dir"),
    ],
)
def test_a_saved_pipeline_and_images_that_do_not_suit(changed, message, tmp_path, faces, capsys):
    words = {"--pipeline": saved(DDPMScheduler(), tmp_path / "ddpm"), "--train_data_dir": faces, "--num_samples": "8"}
    with pytest.raises(SystemExit):
        bench.main([word for pair in (words | changed).items() if pair[1] is not None for word in pair])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calls", "2"], "--calls: must be at least 3, got 2"),
        (["--samplers", "SSCS"], "exact has CLD, sscs,"),
        (["--first_look", "9", "--num_samples", "9"], "--first_look 9: must be fewer than --num_samples 9"),
        (["--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["--compile"], "--compile: networks of --pipeline are compiled, and none is given"),
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


@pytest.mark.parametrize("study", [bench, step_cost])
def test_a_gpu_that_is_not_there(study, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        study.main(["--device", "cuda"])
    assert "--device cuda" in capsys.readouterr().err


# --- The cost of a step ---


def test_the_cost_of_a_step_is_that_of_every_scheduler(tmp_path, capsys):
    """All of them on all shapes, beside two of diffusers, of which each is 1 over itself."""
    threads = torch.get_num_threads()
    step_cost.main(["--steps", "1", "--threads", str(threads), "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert torch.__version__ in Report.read(tmp_path / "step_cost.json").machine
    of_peer, of_unipc, milliseconds = (part.splitlines() for part in said.split("| scheduler | ")[1:])
    for cls, named in SAMPLERS.items():
        for name in named:
            (row,) = (line for line in milliseconds if line.startswith(f"| {cls.__name__}, {name} |"))
            assert all(float(value) > 0 for value in row.split("|")[2:-1])
    assert "| Euler ancestral | 1.00 | 1.00 | 1.00 | 1.00 |" in of_peer
    assert "| UniPC | 1.00 | 1.00 | 1.00 | 1.00 |" in of_unipc


@pytest.mark.parametrize(
    ("sampler", "num_read", "num_written"),
    [
        (Langevin(1, 0.01), 3, 1),  # y, D and a noise
        (TwoStep(), 3, 1),  # the D before
        (CriticallyDamped(CLD()), 6, 2),  # the companion, the D before, two noises
        (CriticallyDamped(CLD(), "euler_maruyama"), 5, 2),  # of its two noises one is next to nothing's
        (CriticallyDamped(CLD(), "probability_flow"), 4, 2),
    ],
    ids=lambda value: getattr(value, "algorithm", type(value).__name__) if not isinstance(value, int) else "",
)
def test_a_compiled_step_is_compared_with_what_it_has_to_move(sampler, num_read, num_written):
    y, denoised = torch.randn((2, 1, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    noise, memory = torch.randn(32, generator=torch.Generator().manual_seed(1)), Memory()
    plan = sampler.plan(torch.logspace(1, -1, 10, dtype=torch.float64))
    for i in range(3):
        _, memory = sampler.step(plan, i, y, denoised, memory, step_cost.Drawn(noise=noise))

    def step(y, denoised, noise):
        return sampler.step(plan, 3, y, denoised, memory, step_cost.Drawn(noise=noise))

    read, written = step_cost.moved(step, y, denoised, noise, memory)
    assert (len(read), written) == (num_read, num_written)
