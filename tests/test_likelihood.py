"""The likelihood bound of CLD, against densities that are known."""

import math
import subprocess
import sys

import pytest
import torch
from networks import normal_denoiser, velocity_network
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_gm import CLDPipeline, CLDSSCSScheduler
from diffusers_gm.data import check_levels, dequantized
from diffusers_gm.evaluation.likelihood import cld_bits_per_dimension, main
from diffusers_gm.likelihood import bits_per_dimension, cld_nll, normal_log_prob
from diffusers_gm.processes.cld import CLD


@pytest.mark.parametrize(
    ("process", "prediction_type"),
    [
        (CLD(), "cld_mixed"),
        (CLD(), "velocity_score"),
        (CLD(beta_0=6.0, beta_1=4.0, mass=1.0, gamma=0.25), "scaled_velocity_score"),
    ],
)
def test_exact_on_gaussian_data(process, prediction_type, generator):
    """In nats per dimension to 3 decimals, for every image: image and velocity are independent, the bound is tight."""
    variances = torch.tensor([0.05, 0.25, 1.0, 2.0], dtype=torch.float64).view(1, 2, 2)
    images = variances.sqrt() * torch.randn(16, 1, 2, 2, generator=generator, dtype=torch.float64)
    exact = -(-0.5 * (images**2 / variances + (2 * math.pi * variances).log())).sum((1, 2, 3))
    bound = cld_nll(
        velocity_network(process, normal_denoiser(variances), prediction_type),
        images,
        process,
        prediction_type,
        100,
        1,
        generator,
    )
    assert (bound - exact).abs().max() / 4 < 5e-4


def test_a_wrong_model_is_bounded_from_above(generator):
    """The network that takes pixels for N(0, 1) gives its own density's value on average, not the data's."""
    process = CLD()
    images = 0.5 * torch.randn(256, 1, 2, 2, generator=generator, dtype=torch.float64)
    wrong = velocity_network(process, normal_denoiser(torch.ones(1, 2, 2)), "cld_mixed")
    bound = cld_nll(wrong, images, process, generator=generator)
    assert torch.allclose(bound, -normal_log_prob(images, 1.0), atol=5e-3)
    assert bound.mean() > -normal_log_prob(images, 0.25).mean()


def test_the_probe_is_unbiased(generator):
    """Pixels that depend on each other: `d output / dv` is no diagonal, and probes differ; their mean does not.

    Two pixels are rotated, independent normals. The exact bound is in the basis in which they are independent.
    """
    process, n = CLD(), 4000
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    variances = torch.tensor([0.05, 1.0], dtype=torch.float64).view(1, 1, 2)
    network = velocity_network(process, normal_denoiser(variances), "cld_mixed")

    def rotated(model_input, labels):
        back = model_input @ rotation
        return network(back, labels) @ rotation.T

    image = torch.tensor([0.3, -0.5], dtype=torch.float64).view(1, 1, 1, 2)
    bound = cld_nll(rotated, image.expand(n, -1, -1, -1), process, num_steps=25, generator=generator)
    plain = cld_nll(network, image @ rotation, process, num_steps=25, generator=generator)
    assert bound.std() > 1e-3
    assert abs(bound.mean() - plain) < 5 * bound.std() / n**0.5 + 1e-3


def test_bits_of_uniform_noise_are_those_of_its_levels():
    """A density of 1/2 on [-1, 1], dequantised: every level of 2^b has about b bits."""
    nats = torch.tensor([10 * math.log(2.0)])
    assert bits_per_dimension(nats, 10, 257).item() == pytest.approx(8)


def test_the_bound_is_one_on_the_probability_of_levels(generator):
    """Pixels N(0, s^2): the mean over dequantisations is above `-log2 P`, P the mass of a level's bin, and near it."""
    levels, deviation, n = 17, 0.5, 20000
    images = (torch.arange(levels) / 8 - 1).view(levels, 1, 1, 1)
    density = torch.distributions.Normal(0, torch.tensor(deviation, dtype=torch.float64))
    mass = density.cdf(images.flatten() + 1 / 16) - density.cdf(images.flatten() - 1 / 16)
    noisy = dequantized(images.double().expand(-1, n, 1, 1), levels, generator)
    bits = bits_per_dimension(-density.log_prob(noisy), 1, levels).view(levels, n)
    mean, error = bits.mean(1), bits.std(1) / n**0.5
    assert (mean + mass.log2() > -5 * error).all()
    # The gap is half the variance of log p in a bin, (u x / s^2)^2 / 2 at most.
    assert (mean + mass.log2() < 0.06).all()


def test_images_of_other_levels_are_refused(tiny_velocity_unet):
    check_levels(torch.arange(256) / 127.5 - 1, 256)
    with pytest.raises(ValueError, match="the images hold -0.992.*none of 17 equal levels"):
        check_levels(torch.tensor([-1.0, 1 / 127.5 - 1]), 17)
    with pytest.raises(ValueError, match="hold 1.125"):
        check_levels(torch.tensor([0.0, 1.125]), 17)
    pipeline = CLDPipeline(tiny_velocity_unet, CLDSSCSScheduler(prediction_type="cld_mixed"))
    with pytest.raises(ValueError, match="none of 256 equal levels"):
        cld_bits_per_dimension(pipeline, torch.full((1, 1, 8, 8), 0.125))


def test_dequantised_images_stay_in_their_bins(generator):
    images = torch.randint(0, 17, (8, 1, 8, 8), generator=generator) / 8 - 1
    noisy = dequantized(images, 17, generator)
    assert torch.equal((((noisy + 1) * 8).round()) / 8 - 1, images)
    # Uniform on [-1/16, 1/16]: variance (1/8)^2 / 12, its square estimated from 512 draws.
    difference = noisy - images
    assert difference.var() == pytest.approx(1 / 768, rel=5 * (0.8 / 512) ** 0.5)


def test_of_a_pipeline(tiny_velocity_unet, generator):
    scheduler = CLDSSCSScheduler(prediction_type="cld_mixed")
    pipeline = CLDPipeline(tiny_velocity_unet, scheduler)
    images = torch.randint(0, 17, (5, 1, 8, 8), generator=generator) / 8 - 1
    state = generator.get_state()
    bits = cld_bits_per_dimension(pipeline, images, 17, num_steps=5, generator=generator, batch_size=2)
    assert bits.shape == (5,)
    assert bits.isfinite().all()
    assert all(p.grad is None for p in tiny_velocity_unet.parameters())
    generator.set_state(state)
    assert torch.equal(
        cld_bits_per_dimension(pipeline, images, 17, num_steps=5, generator=generator, batch_size=2), bits
    )


def test_no_device_is_asked_for_float64(generator):
    """All of a float32 run stays float32 where the network is, but for the clock, and for log densities, which are
    `(B, d)` and `(B,)` on the CPU: `float64` of another shape than these would be on the device."""
    images = torch.rand(3, 2, 4, 5, generator=generator)
    wide = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                wide.add(tuple(result.shape))
            return result

    def network(u, labels):
        assert u.dtype == labels.dtype == torch.float32
        return (u[:, :2] * u[:, 2:]).tanh()

    with Watch():
        cld_nll(network, images, CLD(), num_steps=2, generator=generator)
    on_the_clock = {shape for shape in wide if math.prod(shape) <= 4}  # scalars and matrices of one time
    assert wide - on_the_clock <= {(3, 40), (3,), (3, 2, 2)}  # of two steps: three times, and their log densities


def test_bad_input(tiny_unet):
    images = torch.zeros(2, 1, 2, 2)
    network = velocity_network(CLD(), normal_denoiser(torch.ones(1, 2, 2)), "cld_mixed")
    with pytest.raises(ValueError, match="num_steps"):
        cld_nll(network, images, CLD(), num_steps=0)
    with pytest.raises(ValueError, match="finite"):
        cld_nll(network, images * math.nan, CLD())
    with pytest.raises(ValueError, match="prediction_type"):
        cld_nll(network, images, CLD(), "epsilon")
    with pytest.raises(ValueError, match="needs a velocity network.*'epsilon'"):
        cld_bits_per_dimension(CLDPipeline(tiny_unet, CLDSSCSScheduler()), images)


# --- The command ---


def test_the_command_says_which_models_it_takes(tmp_path):
    """In one line, to a user of the default demo, whose model is another."""
    (tmp_path / "model_index.json").write_text('{"_class_name": ["diffusers_gm.pipelines", "GMSGMPipeline"]}')
    command = [sys.executable, "-m", "diffusers_gm.evaluation.likelihood", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is a GMSGMPipeline, and the bound is one for a CLDPipeline" in done.stderr
    assert "make one with train_gm_sgm.py --method cld --dequantize 17" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_on_other_models(tmp_path, tiny_unet, tiny_velocity_unet, capsys):
    CLDPipeline(tiny_unet, CLDSSCSScheduler()).save_pretrained(tmp_path / "lifted")
    tiny_velocity_unet.register_to_config(sample_size=16)
    native = CLDPipeline(tiny_velocity_unet, CLDSSCSScheduler(prediction_type="cld_mixed"))
    native.save_pretrained(tmp_path / "large")
    (tmp_path / "empty").mkdir()
    for name, words in [
        ("lifted", "predicts no velocities"),
        ("large", "is one of 1x16x16 images, and not of the digits"),
        ("empty", "holds no trained model"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / name)])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_the_command_prints_a_bound(tmp_path, tiny_velocity_unet, capsys):
    scheduler = CLDSSCSScheduler(prediction_type="cld_mixed")
    CLDPipeline(tiny_velocity_unet, scheduler).save_pretrained(tmp_path)
    main([str(tmp_path), "--num_images", "3", "--num_steps", "2"])
    training, held_out = capsys.readouterr().out.splitlines()
    assert training.startswith("training digits: at most ")
    assert held_out.endswith(" bits per dimension (3 images)")
