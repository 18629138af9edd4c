"""Latents: autoencoders in pipelines, the cache of a training set, networks that learn them."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, LDMPipeline
from hub_client import TOKEN, Client
from hub_server import FakeHub
from networks import exact_autoencoder, seeded, tiny_autoencoder, tiny_network

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    NCSNv2Pipeline,
    calibrate,
)
from diffusers_gm.autoencoders import AUTOENCODERS, LatentSpace, as_learned, fingerprint, load_autoencoder

MEAN, STD = [0.5, -0.25, 0.0, 1.0], [2.0, 0.5, 1.0, 4.0]
CACHE = "latents"


def ladder(**options):
    return AnnealedLangevinScheduler(noise_space="ve", sigma_min=0.01, sigma_max=5.0, **options)


def latent_pipeline(vae=None, **options):
    vae = vae or tiny_autoencoder()
    return NCSNv2Pipeline(tiny_network(4, 4), ladder(), vae=vae, latents_mean=MEAN, latents_std=STD, **options)


# --- Autoencoders ---


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_an_autoencoder_is_found_alone_and_in_a_pipeline(kind, tmp_path):
    vae = tiny_autoencoder(kind)
    vae.save_pretrained(tmp_path / "alone")
    latent_pipeline(vae).save_pretrained(tmp_path / "pipeline")
    images = torch.rand(2, 3, 8, 12, generator=seeded(0)[0]) * 2 - 1
    spaces = [LatentSpace.of(v) for v in (vae, *(load_autoencoder(str(tmp_path / n)) for n in ("alone", "pipeline")))]
    latents = [space.encode(images) for space in spaces]
    assert latents[0].shape == (2, 4, 4, 6)
    for loaded in latents[1:]:  # not to the bit: convolutions differ with where in memory the weights are
        torch.testing.assert_close(loaded, latents[0], rtol=0, atol=1e-6)
    assert spaces[0].decode(latents[0]).shape == images.shape
    assert fingerprint(vae) == fingerprint(spaces[1].vae) == fingerprint(spaces[2].vae)
    assert fingerprint(vae).startswith(kind)
    assert not any(weight.requires_grad for weight in spaces[1].vae.parameters()), "it is not trained"


def test_another_component_is_no_autoencoder(tmp_path):
    tiny_network().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="is a UNet2DModel: give one of AutoencoderKL, AutoencoderTiny, VQModel"):
        load_autoencoder(str(tmp_path / "unet"))
    with pytest.raises(ValueError, match="holds no autoencoder, neither itself nor in a folder `vae`"):
        load_autoencoder(str(tmp_path / "nowhere"))


def test_variants_are_loaded(tmp_path):
    vae = tiny_autoencoder()
    vae.save_pretrained(tmp_path, variant="fp16")
    assert fingerprint(load_autoencoder(str(tmp_path), variant="fp16")) == fingerprint(vae)
    with pytest.raises(ValueError, match="cannot be loaded: .*diffusion_pytorch_model"):
        load_autoencoder(str(tmp_path))


def test_the_scaling_is_measured_or_that_of_the_config():
    images = torch.rand(2, 1, 8, 8, generator=seeded(0)[0]) * 2 - 1
    raw = torch.nn.functional.pixel_unshuffle(images, 2)
    vae = exact_autoencoder()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for space, latents in (
        (LatentSpace.of(vae, MEAN, STD), (raw - mean) / std),
        (LatentSpace.of(vae), raw * 0.18215),  # as diffusers' pipelines have it
        (LatentSpace.of(scaled(vae, scaling_factor=0.5, shift_factor=0.1)), (raw - 0.1) * 0.5),
        (LatentSpace.of(scaled(vae, scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)), (raw - mean) * 0.5 / std),
    ):
        assert torch.allclose(space.encode(images), latents, atol=1e-6)
        assert torch.allclose(space.decode(latents), images, atol=1e-6)


def scaled(vae, **config):
    vae.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
    vae.register_to_config(**config)
    return vae


def test_half_precision_that_overflows_is_left_for_a_moment():
    vae = tiny_autoencoder(force_upcast=True).half()
    seen = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    LatentSpace.of(vae).decode(torch.zeros(1, 4, 4, 4))
    hook.remove()
    assert (seen, vae.dtype) == ([torch.float32], torch.float16)


# --- Pipelines ---


def test_what_is_drawn_is_decoded(generator):
    """The picture is that of the latents, by an autoencoder of which both are known."""
    pipe = NCSNv2Pipeline(
        tiny_network(4, 4), ladder(), vae=exact_autoencoder(), latents_mean=MEAN, latents_std=[0.1] * 4
    )
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(2, 4, seeded(0, 1), output_type="latent").images
    assert latents.shape == (2, 4, 8, 8)
    images = pipe(2, 4, seeded(0, 1), output_type="pt").images
    expected = torch.nn.functional.pixel_shuffle(latents * 0.1 + torch.tensor(MEAN)[:, None, None], 2)
    assert torch.allclose(images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-6)
    assert pipe(1, 3, generator).images[0].size == (16, 16)
    assert pipe(1, 3, generator, height=8, width=24).images[0].size == (24, 8)
    with pytest.raises(ValueError, match="height=7 must be a positive multiple of 2"):
        pipe(1, 3, generator, height=7)
    with pytest.raises(ValueError, match="'pil', 'np', 'pt' or 'latent'"):
        pipe(1, 3, generator, output_type="png")


def test_a_pipeline_of_latents_is_saved_and_loaded(tmp_path):
    pipe = latent_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = NCSNv2Pipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.vae, AutoencoderKL)
    assert (loaded.latent_space.mean.tolist(), loaded.latent_space.std.tolist()) == (MEAN, STD)
    anyone = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    for pipeline in (pipe, loaded, anyone):
        pipeline.set_progress_bar_config(disable=True)
    pictures = [pipeline(1, 3, seeded(3), output_type="pt").images for pipeline in (pipe, loaded, anyone)]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_a_pipeline_of_images_is_saved_as_before(tmp_path):
    pipe = NCSNv2Pipeline(tiny_network(), ladder())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == {"unet", "scheduler"}
    assert NCSNv2Pipeline.from_pretrained(tmp_path).vae is None


def test_slices_and_tiles_are_those_of_the_autoencoder():
    pipe = latent_pipeline(tiny_autoencoder(sample_size=8))
    pipe.set_progress_bar_config(disable=True)
    whole = pipe(3, 3, seeded(0, 1, 2), output_type="pt").images
    sizes = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape)))
    pipe.vae.enable_slicing()
    assert torch.allclose(pipe(3, 3, seeded(0, 1, 2), output_type="pt").images, whole, atol=1e-5)
    assert sizes == [(1, 4, 8, 8)] * 3
    sizes.clear()
    pipe.vae.enable_tiling()
    assert pipe(3, 3, seeded(0, 1, 2), output_type="pt").images.shape == whole.shape
    assert max(shape[-1] for shape in sizes) == 4


@pytest.mark.parametrize("method", ["ncsnv2", "cld"])
def test_a_run_from_an_image_starts_from_its_latents(method):
    """Little noise changes little, and what a mask keeps is the picture."""
    vae = exact_autoencoder()
    scaling = {"vae": vae, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    if method == "cld":
        scheduler = CLDSSCSScheduler(prediction_type="cld_mixed")
        pipe = CLDPipeline(tiny_network(8, 4), scheduler, **scaling)
    else:
        pipe = NCSNv2Pipeline(tiny_network(4, 4), ladder(), **scaling)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 1, 16, 16, generator=seeded(0)[0])
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :5] = 1
    drawn = pipe(1, 4, seeded(1), image=image, mask_image=mask, output_type="pt").images
    assert torch.allclose(drawn[..., 6:], image[..., 6:], atol=1e-5), "of the sixth column, half of a latent is new"
    assert not torch.allclose(drawn[..., :6], image[..., :6], atol=0.05)
    pixel, square = torch.zeros(2, 1, 1, 16, 16)
    pixel[..., 7, 7], square[..., 6:8, 6:8] = 1, 1
    of_both = [pipe(1, 4, seeded(1), image=image, mask_image=new, output_type="pt").images for new in (pixel, square)]
    assert torch.equal(*of_both), "a latent one of whose pixels is new is new"
    with pytest.raises(ValueError, match="of 1 x 16 x 16"):
        pipe(1, 4, seeded(1), image=image[..., :8, :8])
    latents = pipe.encode(image, 4, seeded(0)[0])
    assert latents.shape == (1, 8 if method == "cld" else 4, 8, 8)


def test_real_images_or_their_latents_choose_the_stochasticity():
    """Of a latent pipeline, ours or diffusers', the images are encoded as its network takes them."""
    images = torch.rand(40, 3, 16, 16, generator=seeded(0)[0]) * 2 - 1
    pipe = latent_pipeline()
    unscaled = LDMPipeline(tiny_autoencoder("VQModel", scaling_factor=0.5), tiny_network(4, 4), DDIMScheduler())
    for each, space in ((pipe, pipe.latent_space), (unscaled, LatentSpace.of(unscaled.vqvae))):
        latents = as_learned(each, images, (4, 8, 8))
        assert torch.allclose(latents, space.encode(images), atol=1e-5)
        assert as_learned(each, latents, (4, 8, 8)) is latents
    torch.testing.assert_close(as_learned(unscaled, images, (4, 8, 8)), 0.5 * unscaled.vqvae.encode(images).latents)

    seen = []
    pipe.vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    options = {"calls": (3,), "effort": "fast", "progress": False, "batch_size": 4}
    schedulers = [calibrate(pipe, images=real, **options) for real in (images, pipe.latent_space.encode(images))]
    assert seen == [40, 16, 16, 8], "the latents by hand first, then the images, some at a time"
    assert schedulers[0].config.calibration == schedulers[1].config.calibration
    for wrong, said in (
        (images[..., :12], r"images must be \(n, 3, 16, 16\) or, of latents, \(n, 4, 8, 8\), .* got \(40, 3, 16, 12\)"),
        (images.to(torch.uint8), "floating point, got .* torch.uint8"),
        (images * 2, r"images must be in \[-1, 1\], they go from -1.999\d* to 1.999"),
    ):
        with pytest.raises(ValueError, match=said):
            calibrate(pipe, images=wrong, **options)


def test_images_for_a_calibration_are_those_that_a_network_learns(caplog):
    images = torch.rand(4, 3, 8, 8, generator=seeded(0)[0])
    assert as_learned(None, images * 2 - 1, (3, 8, 8)).min() < 0
    assert not caplog.records
    as_learned(None, images, (3, 8, 8))
    assert "in [-1, 1], where 0 is gray, they are all bright" in caplog.text
    resized = images * 2.0001 - 1  # which rounding takes beyond
    assert as_learned(None, resized, (3, 8, 8)) is resized
    for wrong, said in (
        (images * 255, r"must be in \[-1, 1\], they go from"),
        (images / 0, "must be finite"),
        (images[:0], "at least one"),
    ):
        with pytest.raises(ValueError, match=said):
            as_learned(None, wrong, (3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"vae": None, "latents_mean": MEAN, "latents_std": STD}, "are those of the latents of a vae"),
        ({"latents_mean": MEAN, "latents_std": None}, "must have 4 numbers each"),
        ({"latents_mean": MEAN[:3], "latents_std": STD[:3]}, "must have 4 numbers each"),
        ({"latents_mean": MEAN, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std must be positive"),
    ],
)
def test_a_scaling_that_makes_no_sense(arguments, said):
    with pytest.raises(ValueError, match=said):
        NCSNv2Pipeline(tiny_network(4, 4), ladder(), **{"vae": tiny_autoencoder()} | arguments)


ON_THE_HUB = """
import sys, torch
from types import SimpleNamespace
from diffusers_gm import NCSNv2Pipeline
from diffusers_gm.autoencoders import fingerprint, load_autoencoder
from diffusers_gm.data.labels import Labels
from diffusers_gm.training.classes import classes_of
from diffusers_gm.training.network import given_unet
from diffusers_gm.training.options import TrainingArguments
NCSNv2Pipeline.from_pretrained(sys.argv[1]).push_to_hub("me/latent")
pipe = NCSNv2Pipeline.from_pretrained("me/latent")
print("DRAWN", pipe(1, 3, torch.Generator().manual_seed(0), output_type="pt").images.sum().item())
print("ITS OWN", fingerprint(pipe.vae) == fingerprint(load_autoencoder("me/latent")))
for revision in (None, "next"):
    print("VAE", fingerprint(load_autoencoder("me/vae", revision=revision)))
    args = TrainingArguments(model_name_or_path="me/net", revision=revision)
    print("NET", given_unet(args).conv_in.weight.sum().item())
    # What the network's classes are called: those of the data are to be the same.
    args = TrainingArguments(model_name_or_path="me/pets", revision=revision, class_conditional=True, class_dropout=0)
    data = SimpleNamespace(labels=lambda column: Labels(["cat", "dog"], [0, 1]))
    try:
        print("CLASSES", classes_of(args, data, given_unet(args)).names)
    except ValueError as error:
        print("CLASSES", error)
"""


def test_latent_models_and_revisions_on_the_hub(tmp_path):
    pipe = latent_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    autoencoders = [tiny_autoencoder(kind) for kind in ("AutoencoderKL", "AutoencoderTiny")]
    networks = [tiny_network(), tiny_network(act_fn="relu")]
    torch.nn.init.ones_(networks[1].conv_in.weight)
    with FakeHub({TOKEN: "me"}) as hub:
        for name, (first, second) in {"me/vae": autoencoders, "me/net": networks}.items():
            saved = []
            for model in (first, second):
                folder = tmp_path / name.split("/")[1] / str(len(saved))
                model.save_pretrained(folder)
                saved.append({path.name: path.read_bytes() for path in folder.iterdir()})
            hub.add(name, saved[0])
            hub.repos[name].commit("next", saved[1])
        for branch, names in {"main": ["dog", "cat"], "next": ["cat", "dog"]}.items():
            conditional = NCSNv2Pipeline(tiny_network(num_class_embeds=2), ladder(), class_names=names)
            conditional.save_pretrained(tmp_path / branch)
            files = [path for path in (tmp_path / branch).rglob("*") if path.is_file()]
            contents = {path.relative_to(tmp_path / branch).as_posix(): path.read_bytes() for path in files}
            if branch == "main":
                hub.add("me/pets", contents)
            else:
                hub.repos["me/pets"].commit(branch, contents)
        printed = Client(hub, tmp_path / "home", TOKEN).run(ON_THE_HUB, tmp_path / "pipeline").stdout.splitlines()
        assert "vae/config.json" in hub.repos["me/latent"].files
    said = [line.partition(" ")[::2] for line in printed]
    drawn = pipe(1, 3, seeded(0)[0], output_type="pt").images.sum().item()
    assert [value for name, value in said if name == "DRAWN"] == [str(drawn)]
    assert "ITS OWN True" in printed
    assert [value for name, value in said if name == "VAE"] == [fingerprint(vae) for vae in autoencoders]
    sums = [str(network.conv_in.weight.sum().item()) for network in networks]
    assert [value for name, value in said if name == "NET"] == sums
    of_main, of_next = (value for name, value in said if name == "CLASSES")
    assert "the first that differs was 'dog' and is 'cat'" in of_main
    assert of_next == "['cat', 'dog']"
