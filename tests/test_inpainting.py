"""Runs that start from an image, keep some of its pixels, or go up to latents: measured on perfect networks."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import perfect_network, seeded, tiny_network
from PIL import Image

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
)
from diffusers_gm.pipelines import slerp
from diffusers_gm.pipelines.encoding import ours
from diffusers_gm.pipelines.inpainting import Picture
from diffusers_gm.readings import VelocityReading

MIXTURE = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.7, 1.744], "model_noise": "mixture"}
OURS = {
    "gm-sgm": lambda: GMLangevinScheduler(noise_space="ve", **MIXTURE),
    "ncsnv2": lambda: AnnealedLangevinScheduler(noise_space="ve", num_langevin_steps=2),
    "calibrated": lambda: CalibratedMultistepScheduler(noise_space="ve"),
    "lifted": lambda: CLDSSCSScheduler(noise_space="ve"),
    "cld": lambda: CLDSSCSScheduler(prediction_type="cld_mixed"),
}
THEIRS = {
    cls.__name__: cls
    for cls in (
        DDIMScheduler,
        DDPMScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
}
every_scheduler = pytest.mark.parametrize("make", (OURS | THEIRS).values(), ids=(OURS | THEIRS).keys())

# Neighbours of an 8x8 image of mean 0 and standard deviation .5 are alike.
ALIKE = torch.exp(-(torch.arange(8.0)[:, None] - torch.arange(8.0)).abs() / 4)
COVARIANCE = 0.25 * torch.kron(ALIKE, ALIKE).double()
VARIANCES, AXES = torch.linalg.eigh(COVARIANCE)


def denoiser(y, sigma):
    """D of these images."""
    return (((y.flatten(1).double() @ AXES) * (VARIANCES / (VARIANCES + float(sigma) ** 2))) @ AXES.T).view(y.shape)


def drawn(count, seed=0):
    noise = torch.randn(count, 64, generator=seeded(seed)[0], dtype=torch.float64)
    return (noise * VARIANCES.sqrt() @ AXES.T).view(count, 1, 8, 8).float()


def pipeline_of(scheduler, perfect=True):
    reader = ours(scheduler)
    velocities = isinstance(reader.reading, VelocityReading)
    network = tiny_network(2 if velocities else 1, 1)
    made = (CLDPipeline if velocities else GMSGMPipeline)(network, scheduler)
    made.set_progress_bar_config(disable=True)
    if perfect:
        answer = perfect_network(reader, denoiser)
        made.unet.forward = lambda x, t, **_: UNet2DOutput(answer(x.double(), torch.as_tensor(t)).float())
    return made


def half_mask():
    """The right half is new."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    return mask


IMAGE = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@every_scheduler
def test_known_pixels_stay_and_new_ones_follow_the_seed(make):
    pipeline = pipeline_of(make(), perfect=False)
    options = {"image": IMAGE, "mask_image": half_mask(), "num_resamples": 1, "output_type": "pt"}
    one, other = (pipeline(2, 12, seeded(seed, 9), **options).images for seed in (0, 1))
    for images in (one, other):
        torch.testing.assert_close(images[..., :4], IMAGE[..., :4].expand(2, -1, -1, -1))
        assert images.isfinite().all()
    assert torch.equal(one[1], other[1])
    assert torch.equal(pipeline(2, 12, seeded(0, 9), **options).images, one)


@every_scheduler
def test_a_weak_noise_changes_little(make):
    """The more noise, the farther from the image; what remains is the share of the run."""
    pipeline, image = pipeline_of(make()), (drawn(64).clamp(-1, 1) + 1) / 2
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(0))
    distances = []
    for strength in (0.2, 0.5, 0.9):
        calls.clear()
        images = pipeline(64, 20, seeded(0)[0], image=image, strength=strength, output_type="pt").images
        made = round(strength * 20)
        assert len(calls) == (2 * made - 1 if make is HeunDiscreteScheduler else made)
        distances.append(float((images - image).square().mean().sqrt()))
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] < 0.17, "images differ by .35 from each other"


def test_steps_are_counted_as_diffusers_does_but_for_rounding():
    """.29 * 100 is a bit less than 29."""
    assert [Picture(IMAGE, strength=strength).begins(n) for strength, n in ((0.29, 100), (0.58, 10))] == [[71], [5]]
    assert Picture(IMAGE, strength=0.9, num_resamples=2).begins(10) == [1, 4, 7]


def test_a_mask_is_black_or_white_and_steps_go_on_counting_where_a_run_is_repeated():
    pipeline, seen = pipeline_of(OURS["gm-sgm"]()), []

    def note(pipeline, step, timestep, tensors):
        seen.append(step)
        return tensors

    found = [
        pipeline(
            1,
            4,
            seeded(0)[0],
            image=IMAGE,
            mask_image=mask,
            num_resamples=1,
            callback_on_step_end=note,
            output_type="pt",
        ).images
        for mask in (half_mask(), half_mask() * 0.2 + 0.4)
    ]
    assert torch.equal(*found)
    assert seen == [*range(6), *range(6)], "four, and half a run again"


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 8, 8)], ids=["no mask", "all new"])
@pytest.mark.parametrize("space", [{"noise_space": "edm", "sigma_data": 0.5, "sigma_max": 80.0}, {}], ids=["edm", "vp"])
def test_a_whole_run_is_that_without_an_image(space, mask):
    """Also where it begins below the network's highest level, which would not hide the image."""
    scheduler = CalibratedMultistepScheduler(**space, calibration={"4": [4.0, 1.0, 0.4, 0.1]})
    pipeline, image = pipeline_of(scheduler), torch.ones(1, 1, 8, 8)
    options = {"image": image, "strength": 1.0} if mask is None else {"image": image, "mask_image": mask}
    found = pipeline(2, 4, seeded(0)[0], output_type="pt", **options).images
    torch.testing.assert_close(found, pipeline(2, 4, seeded(0)[0], output_type="pt").images)


@pytest.mark.parametrize("name", ["gm-sgm", "calibrated", "cld", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_resampling_brings_new_pixels_closer_to_their_law(name):
    """Of Gaussian images the law of a hole is known. That known pixels are put back is an approximation, and resampling
    makes it a better one."""
    pipeline, mask = pipeline_of((OURS | THEIRS)[name]()), torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    new, image = mask.flatten() > 0, 0.5 * drawn(1, seed=4)
    gain = torch.linalg.solve(COVARIANCE[~new][:, ~new], COVARIANCE[~new][:, new]).T
    mean = gain @ image.flatten()[~new].double()
    covariance = COVARIANCE[new][:, new] - gain @ COVARIANCE[~new][:, new]
    distances = []
    for num_resamples in (0, 3):
        last = []
        keep = lambda pipe, i, t, tensors, last=last: last.append(tensors["latents"]) or {}
        options = {"image": image / 2 + 0.5, "mask_image": mask, "num_resamples": num_resamples}
        pipeline(300, 30, seeded(0)[0], callback_on_step_end=keep, output_type="pt", **options)
        found = last[-1][:, :1].flatten(1)[:, new].double()
        assert float((found.mean(0) - mean).norm()) < 0.7 * float(mean.norm())
        distances.append(squared_wasserstein(found, mean, covariance))
    assert distances[1] < 0.9 * distances[0]


def squared_wasserstein(samples, mean, covariance):
    """Of two Gaussians, the first of which has the mean and the covariance of samples `(n, d)`."""
    values, axes = torch.linalg.eigh(covariance)
    root = axes * values.sqrt() @ axes.T
    own = torch.cov(samples.T)
    overlap = torch.linalg.eigvalsh(root @ own @ root).clamp(min=0).sqrt().sum()
    return float((samples.mean(0) - mean).square().sum() + own.trace() + covariance.trace() - 2 * overlap)


def test_under_mixture_noise_known_and_new_pixels_are_of_one_component():
    pipeline = pipeline_of(GMLangevinScheduler(noise_space="ve", **MIXTURE, algorithm_type="ode"), perfect=False)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipeline(64, 4, seeded(0)[0], image=IMAGE, mask_image=half_mask())
    first = seen[0] / seen[0].square().mean().sqrt()
    left, right = (half.square().mean((1, 2, 3)).sqrt() for half in first.chunk(2, -1))
    assert float(torch.corrcoef(torch.stack([left, right]))[0, 1]) > 0.8


# --- Inputs ---


def test_every_form_of_an_image_is_the_same_image(tiny_unet):
    pipeline = NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    array = pixels[..., None].astype(np.float32) / 255
    tensor = torch.from_numpy(array).movedim(-1, 1)
    forms = [[Image.fromarray(p, "L") for p in pixels], array, tensor, list(tensor), list(array)]
    results = [pipeline(2, 8, seeded(0, 1), image=form, strength=0.5, output_type="pt").images for form in forms]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": IMAGE, "strength": 0}, r"strength must be in \(0, 1\], got 0"),
        ({"image": IMAGE, "strength": 1.1}, r"strength must be in \(0, 1\], got 1.1"),
        ({"image": IMAGE, "strength": 0.05}, "strength=0.05 of num_inference_steps=10 leaves no network call"),
        ({"image": IMAGE, "strength": 0.4, "num_resamples": 4}, "strength=0.4 with num_resamples=4 of .* no network"),
        ({"image": IMAGE, "num_resamples": -1}, "num_resamples must be a whole number of at least 0, got -1"),
        ({"strength": 0.5}, "strength means nothing without image"),
        ({"mask_image": IMAGE}, "mask_image means nothing without image"),
        ({"num_resamples": 1}, "num_resamples means nothing without image"),
        ({"image": IMAGE, "latents": torch.zeros(2, 1, 8, 8)}, "image or latents to start from, not both"),
        ({"image": IMAGE[..., :6]}, r"image must be one image or 2, of 1 x 8 x 8 .* got \(1, 1, 8, 6\)"),
        ({"image": IMAGE.expand(3, -1, -1, -1)}, r"image must be one image or 2, .* got \(3, 1, 8, 8\)"),
        ({"image": 2 * IMAGE - 1}, r"image must be in \[0, 1\]"),
        ({"image": IMAGE * torch.nan}, r"image must be in \[0, 1\]"),
        ({"image": "cat.png"}, "image: Input is in incorrect format"),
        ({"image": IMAGE, "mask_image": IMAGE[..., :4]}, "mask_image must be one image or 2, of 1 x 8 x 8"),
        ({"height": 0}, "height=0 must be a positive multiple of 1"),
    ],
)  # fmt: skip
def test_bad_images_are_refused_before_the_first_network_call(tiny_unet, arguments, message):
    pipeline = NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler())
    pipeline.unet.forward = None  # any network call would fail differently
    with pytest.raises(ValueError, match=message):
        pipeline(2, 10, **arguments)


@pytest.mark.parametrize("name", ["gm-sgm", "cld"])
def test_images_of_another_size(name):
    levels = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    velocities = name == "cld"
    network = tiny_network(2 if velocities else 1, 1, **levels)
    pipeline = (CLDPipeline if velocities else GMSGMPipeline)(network, OURS[name]())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, 4, seeded(0)[0], height=12, width=6).images[0].size == (6, 12)
    options = {"generator": seeded(0)[0], "width": 16, "image": torch.cat([IMAGE, IMAGE], -1)}
    assert pipeline(2, 4, **options, output_type="pt").images.shape == (2, 1, 8, 16)
    if velocities:
        assert pipeline(1, None, seeded(0)[0], height=4, ode_solver="bosh3", rtol=0.1, atol=0.1).images[0].size == (
            8,
            4,
        )
    with pytest.raises(ValueError, match="height=7 must be a positive multiple of 2"):
        pipeline(1, height=7)


# --- Latents ---


@pytest.mark.parametrize(
    ("make", "errors"),
    [
        (lambda: GMLangevinScheduler(noise_space="ve", algorithm_type="ode"), (5e-3, 2e-4)),
        (OURS["calibrated"], (0.015, 1e-3)),
        (lambda: CalibratedMultistepScheduler.from_config(OURS["cld"]().config), (0.015, 1e-3)),
        (DDIMScheduler, (0.12, 0.02)),
        (EulerDiscreteScheduler, (0.12, 0.02)),
        (DPMSolverMultistepScheduler, (0.12, 0.02)),
    ],
    ids=["ode", "calibrated", "velocities", "DDIM", "Euler", "DPMSolver"],
)
def test_there_and_back(make, errors):
    """Root mean square of images in [0, 1], with 10 and with 80 calls each way."""
    pipeline, image = pipeline_of(make()), (drawn(32).clamp(-1, 1) + 1) / 2
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(0))
    for num_calls, most in zip((10, 80), errors, strict=True):
        calls.clear()
        latents = pipeline.encode(image, num_calls, seeded(3)[0])
        assert len(calls) == num_calls
        back = pipeline(num_inference_steps=num_calls, generator=seeded(4)[0], latents=latents, output_type="pt").images
        assert float((back - image).square().mean().sqrt()) < most
    # They are what runs start from: a whitened image, in the scheduler's convention.
    start = pipeline._initial_sample((2000, *latents.shape[1:]), seeded(5)[0], torch.device("cpu"))
    assert abs(float(latents.std() / start.std()) - 1) < 0.15


@pytest.mark.parametrize(
    ("theirs", "most"),
    [
        (FlowMatchEulerDiscreteScheduler(), 0.02),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), 0.02),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), 0.02),
        (DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False), 0.1),
    ],
    ids=["flow", "UniPC", "DPMSolver", "zero SNR"],
)
def test_there_and_back_from_pure_noise(theirs, most):
    """Of which schedulers of diffusers say nothing but that an image is not in it."""
    pipeline, image = pipeline_of(theirs), (drawn(32).clamp(-1, 1) + 1) / 2
    latents = pipeline.encode(image, 60, seeded(3)[0])
    assert 0.5 < float(latents.std()) < 2
    back = pipeline(num_inference_steps=60, generator=seeded(4)[0], latents=latents, output_type="pt").images
    assert float((back - image).square().mean().sqrt()) < most


def test_encoding_is_that_of_the_generator_and_of_each_image():
    pipeline = pipeline_of(CalibratedMultistepScheduler.from_config(OURS["cld"]().config))
    images = (drawn(3).clamp(-1, 1) + 1) / 2
    whole = pipeline.encode(images, 6, seeded(0, 1, 2))
    torch.testing.assert_close(pipeline.encode(images[1:], 6, seeded(1, 2)), whole[1:])
    with pytest.raises(ValueError, match="list of 1"):
        pipeline.encode(images, 6, seeded(0))
    with pytest.raises(ValueError, match=r"image must be in \[0, 1\]"):
        pipeline.encode(images * 3, 6)


def test_spherical_interpolation_keeps_to_the_shell():
    one, other = torch.randn(2, 3, 16, 16, generator=seeded(0)[0], dtype=torch.float64)
    between = slerp(one, 2 * other, 9)
    assert between.shape == (9, 3, 16, 16)
    torch.testing.assert_close(between[0], one)
    torch.testing.assert_close(between[-1], 2 * other)
    lengths = between.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.linspace(float(one.norm()), float(2 * other.norm()), 9).double())
    steps = torch.nn.functional.cosine_similarity(between[1:].flatten(1), between[:-1].flatten(1)).acos()
    torch.testing.assert_close(steps, steps[:1].expand(8))
    same = slerp(one[None], one[None], 3)
    torch.testing.assert_close(same, one.expand(3, -1, -1, -1))
    for arguments, message in (((one, other[:1], 3), "latents of two images"), ((one, other, 1), "at least 2")):
        with pytest.raises(ValueError, match=message):
            slerp(*arguments)
