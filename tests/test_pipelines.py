"""The pipelines, through real files and in fresh processes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import seeded, tiny_network
from PIL import Image, ImageOps

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    GaussianMixtureNoise,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
    UnconditionalPipeline,
)
from diffusers_gm.pipelines.inputs import as_images

MIXTURE = GaussianMixtureNoise.from_power_law(1.5, 2)


def gm_scheduler(**config):
    return GMLangevinScheduler(
        mixture_weights=MIXTURE.weights.tolist(),
        mixture_scales=MIXTURE.scales.tolist(),
        model_noise="mixture",
        **config,
    )


@pytest.fixture(params=["gm-sgm", "ncsnv2"])
def pipeline(request, tiny_unet):
    if request.param == "gm-sgm":
        made = GMSGMPipeline(tiny_unet, gm_scheduler())
    else:
        made = NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def seeds(*values):
    return [torch.Generator().manual_seed(v) for v in values]


def test_latents_as_wide_as_another_level_are_refused():
    """Of networks that are shown y: unit noise, or what was encoded for a run that begins elsewhere."""
    edm = {"noise_space": "edm", "sigma_data": 0.5, "sigma_max": 80.0}
    scheduler = CalibratedMultistepScheduler(**edm, calibration={"4": [4.0, 1.0, 0.4, 0.1]})
    pipe, noise = NCSNv2Pipeline(tiny_network(), scheduler), torch.randn(2, 1, 8, 8, generator=seeded(0)[0])
    for scale in (0.5, 80.0):
        with pytest.raises(ValueError, match="a standard deviation of .*, and the run begins at noise level 4:"):
            pipe(num_inference_steps=4, latents=scale * noise)
    pipe(num_inference_steps=4, latents=4.0 * noise)
    pipe(num_inference_steps=5, latents=80.0 * noise)


def test_output_types_show_the_same_image(pipeline):
    def images(output_type, **kw):
        return pipeline(2, 10, torch.Generator().manual_seed(0), output_type=output_type, **kw)

    tensor = images("pt").images
    assert tensor.shape == (2, 1, 8, 8)
    assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    assert float(tensor.std()) > 0
    array = images("np", return_dict=False)[0]
    assert (array == tensor.permute(0, 2, 3, 1).numpy()).all()
    pictures = images("pil").images
    assert [p.size for p in pictures] == [(8, 8)] * 2
    assert np.abs(np.asarray(pictures[0]) / 255 - array[0, :, :, 0]).max() < 0.51 / 255


def test_generators_decide_the_images(pipeline, monkeypatch):
    # Convolutions round differently in batches of other sizes: run the network image by image.
    forward = pipeline.unet.forward
    one_by_one = lambda x, t: UNet2DOutput(torch.cat([forward(one, t).sample for one in x.split(1)]))
    monkeypatch.setattr(pipeline.unet, "forward", one_by_one)
    whole = pipeline(4, 10, seeds(0, 1, 2, 3), output_type="pt").images
    halves = [pipeline(2, 10, seeds(*s), output_type="pt").images for s in ((0, 1), (2, 3))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole[0], whole[1])


def test_round_trip_through_a_folder_and_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    expected = pipeline(2, 10, torch.Generator().manual_seed(5), output_type="np").images
    code = (
        "import sys, numpy, torch\n"
        f"from diffusers_gm import {type(pipeline).__name__} as P\n"
        "pipe = P.from_pretrained(sys.argv[1])\n"
        "images = pipe(2, 10, torch.Generator().manual_seed(5), output_type='np').images\n"
        "numpy.save(sys.argv[2], images)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model", tmp_path / "images.npy"], check=True)
    assert (np.load(tmp_path / "images.npy") == expected).all()
    loaded = type(pipeline).from_pretrained(tmp_path / "model")
    assert dict(loaded.scheduler.config)["sigma_max"] == pipeline.scheduler.config.sigma_max


def test_callback_sees_and_may_edit_every_step(pipeline):
    calls = []

    def watch(pipe, step, timestep, tensors):
        calls.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"]) if step == 9 else tensors["latents"]}

    images = pipeline(1, 10, torch.Generator().manual_seed(0), output_type="pt", callback_on_step_end=watch).images
    assert [step for step, _ in calls] == list(range(10))
    assert [t for _, t in calls] == [float(t) for t in pipeline.scheduler.timesteps]
    assert torch.equal(images, torch.full_like(images, 0.5))
    untouched = pipeline(
        1, 10, torch.Generator().manual_seed(0), output_type="pt", callback_on_step_end=lambda *_: {}
    ).images
    assert torch.equal(untouched, pipeline(1, 10, torch.Generator().manual_seed(0), output_type="pt").images)


def test_latents_replace_the_start(tiny_unet):
    pipeline = GMSGMPipeline(tiny_unet, gm_scheduler(algorithm_type="ode"))
    pipeline.set_progress_bar_config(disable=True)
    latents = 50 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images = [pipeline(2, 10, g, latents=latents, output_type="pt").images for g in seeds(0, 1)]
    assert torch.equal(*images), "the ODE draws nothing but its start"


def test_a_mixture_model_starts_from_mixture_noise(tiny_unet):
    scheduler = gm_scheduler()
    scheduler.set_timesteps(10)
    start = scheduler.initial_sample((500, 1, 8, 8), seeds(0)[0], torch.device("cpu"), torch.float32)
    scales = start.square().mean((1, 2, 3)).sqrt() / scheduler.init_noise_sigma
    near = [(scales / c - 1).abs() < 5 / np.sqrt(2 * 64) for c in MIXTURE.scales]
    assert (near[0] | near[1]).float().mean() > 0.99
    assert min(float(n.float().mean()) for n in near) > 0.1


def test_half_precision_network(pipeline):
    pipeline.to(torch.bfloat16)
    images = pipeline(1, 10, torch.Generator().manual_seed(0), output_type="pt").images
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("cls", [DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_schedulers_of_diffusers_run_in_our_pipelines(cls, tiny_unet):
    """A vp network, back and forth: ours in theirs is tested with the schedulers."""
    pipeline = GMSGMPipeline(tiny_unet, cls())
    pipeline.set_progress_bar_config(disable=True)
    images = [pipeline(2, 10, torch.Generator().manual_seed(0), output_type="pt").images for _ in range(2)]
    assert torch.equal(*images)


def test_a_single_network_call(pipeline):
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    images = pipeline(2, 1, torch.Generator().manual_seed(0), output_type="pt").images
    assert seen == [999]
    assert images.isfinite().all()


def test_the_progress_bar_counts_network_calls(tiny_unet, capsys):
    GMSGMPipeline(tiny_unet, gm_scheduler())(1, 12, torch.Generator().manual_seed(0))
    assert "12/12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size must be a whole number of at least 1, got 2.0"),
        ({"generator": 0}, "generator must be a torch.Generator, or a list of them, got 0"),
        ({"generator": [None, None]}, "generator must be a torch.Generator, or a list of them"),
        ({"output_type": "jpg"}, "output_type 'jpg'"),
        ({"generator": seeds(0)}, "list of 1"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, r"latents must have shape \(2, 1, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
    ],
)
def test_bad_calls_are_refused_before_the_first_network_call(pipeline, arguments, message):
    pipeline.unet.forward = None  # any network call would fail differently
    with pytest.raises(ValueError, match=message):
        pipeline(**{"batch_size": 2, "generator": torch.Generator().manual_seed(0), **arguments})


def test_a_network_without_sample_size_is_named(pipeline):
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size"):
        pipeline(1)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_that_do_not_say_what_is_white_are_refused(pipeline, mode):
    picture = Image.fromarray(np.zeros((8, 8), {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    for call in (lambda: pipeline(1, 4, image=picture, strength=0.5), lambda: pipeline.denoise(picture, 0.1)):
        with pytest.raises(ValueError, match=f"of mode {mode}, which does not say what is white"):
            call()


def test_whole_numbers_are_no_noisy_images(pipeline):
    with pytest.raises(ValueError, match="holds whole numbers: give PIL images"):
        pipeline.estimate_noise_level(torch.full((1, 1, 8, 8), 200, dtype=torch.uint8))


def test_pictures_are_upright_and_on_white_as_a_training_reads_them(tmp_path):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (as_images(clear, "image", (1, 3, 8, 8)) == 1).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "sideways.png", exif=exif)
    sideways = Image.open(tmp_path / "sideways.png")
    turned = as_images(sideways, "image", (1, 1, 8, 8))[0, 0] * 255
    assert torch.equal(turned.round(), torch.arange(64.0).reshape(8, 8).rot90(-1))
    assert sideways.getexif()[0x0112] == 6, "the user's image stays as it is"


def test_scans_that_are_to_be_turned_are(tmp_path):
    """Those that Pillow would map into memory, and scramble."""
    Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16)).save(tmp_path / "scan.tif", tiffinfo={0x0112: 6})
    scan = Image.open(tmp_path / "scan.tif")
    turned = as_images(scan, "image", (1, 1, 16, 8))[0, 0] * 255
    assert torch.equal(turned.round(), torch.arange(128.0).reshape(8, 16).rot90(-1))
    assert scan.filename.endswith("scan.tif")


def test_an_image_that_may_have_been_turned_by_hand_is_named(tmp_path, caplog):
    """PIL's methods leave the tag, so that nobody can know."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 8)).save(tmp_path / "sideways.png", exif=exif)
    as_images(Image.open(tmp_path / "sideways.png"), "image", (1, 1, 8, 8))
    as_images(ImageOps.exif_transpose(Image.open(tmp_path / "sideways.png")), "image", (1, 1, 8, 8))
    assert not caplog.messages
    as_images(Image.open(tmp_path / "sideways.png").rotate(-90), "image", (1, 1, 8, 8))
    assert "image has the EXIF orientation 6 and is turned upright by it" in caplog.text


def test_strokes_on_a_transparent_mask_are_what_is_new():
    """As layers of programs that draw have them."""
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (2, 2, 4, 4))
    assert as_images(mask, "mask_image", (1, 1, 8, 8)).sum() == 4


def test_pictures_and_arrays_are_not_mixed():
    with pytest.raises(ValueError, match="image must be PIL images, or arrays or tensors, not some of each"):
        as_images([Image.new("L", (8, 8)), np.zeros((8, 8, 1))], "image", (2, 1, 8, 8))


def test_a_run_that_cannot_begin_in_the_middle(tiny_unet):
    pipe = UnconditionalPipeline(tiny_unet, PNDMScheduler())
    with pytest.raises(ValueError, match="a PNDMScheduler cannot begin in the middle"):
        pipe(1, 20, seeded(0), image=torch.full((1, 1, 8, 8), 0.5), strength=0.3)
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    images = pipe(1, 20, seeded(0), image=torch.full((1, 1, 8, 8), 0.5), strength=0.3, output_type="latent").images
    assert images.abs().max() < 10


def test_a_scheduler_that_names_no_first_level(tiny_unet):
    pipe = UnconditionalPipeline(tiny_unet, FlowMatchEulerDiscreteScheduler())
    assert pipe(1, 4, seeded(0), output_type="pt").images.shape == (1, 1, 8, 8)


def test_a_calibration_runs_fewer_images_where_they_are_larger(tiny_unet):
    pipe = UnconditionalPipeline(tiny_unet, DDPMScheduler())
    assert pipe.calibration_arguments({}) == {"batch_size": 64}
    assert pipe.calibration_arguments({"height": 256, "width": 128}) == {"batch_size": 8}
    assert pipe.calibration_arguments({"height": 256, "width": 128, "batch_size": 32}) == {"batch_size": 32}
