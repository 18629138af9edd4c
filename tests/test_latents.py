"""Latents: autoencoders in pipelines, the cache of a training set, networks that learn them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, LDMPipeline
from hub_server import FakeHub
from images import save_images
from networks import Shuffle, seeded, tiny_autoencoder, tiny_network
from PIL import Image
from safetensors.torch import load_file
from test_hub import TOKEN, Client
from training import ROOT, WEIGHTS, launch, load, same_state

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
    calibrate,
)
from diffusers_gm.autoencoders import AUTOENCODERS, LatentSpace, as_learned, fingerprint, load_autoencoder
from diffusers_gm.data import LatentCache, TensorImages, TrainingImages, TrainingLatents
from diffusers_gm.training.folder import list_checkpoints, read_log
from diffusers_gm.training.options import TrainingArguments

MEAN, STD = [0.5, -0.25, 0.0, 1.0], [2.0, 0.5, 1.0, 4.0]
CACHE = "latents"


def exact_autoencoder():
    """One that loses nothing: pixels of 2x2 squares are the channels of a latent."""
    vae = tiny_autoencoder(channels=1, use_quant_conv=False)
    vae.encoder, vae.decoder = Padded(), Shuffle(up=True)
    torch.nn.init.dirac_(vae.post_quant_conv.weight)
    torch.nn.init.zeros_(vae.post_quant_conv.bias)
    return vae


class Padded(Shuffle):
    """As AutoencoderKL has it: mean and log variance."""

    def __init__(self):
        super().__init__(up=False)

    def forward(self, x):
        return torch.nn.functional.pad(super().forward(x), (0, 0, 0, 0, 0, 4))


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
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
    assert spaces[0].decode(latents[0]).shape == images.shape
    assert fingerprint(vae) == fingerprint(spaces[1].vae)
    assert fingerprint(vae).startswith(kind)


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
from diffusers_gm import NCSNv2Pipeline
from diffusers_gm.autoencoders import fingerprint, load_autoencoder
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
        printed = Client(hub, tmp_path / "home", TOKEN).run(ON_THE_HUB, tmp_path / "pipeline").stdout.splitlines()
        assert "vae/config.json" in hub.repos["me/latent"].files
    said = [line.partition(" ")[::2] for line in printed]
    drawn = pipe(1, 3, seeded(0)[0], output_type="pt").images.sum().item()
    assert [value for name, value in said if name == "DRAWN"] == [str(drawn)]
    assert "ITS OWN True" in printed
    assert [value for name, value in said if name == "VAE"] == [fingerprint(vae) for vae in autoencoders]
    sums = [str(network.conv_in.weight.sum().item()) for network in networks]
    assert [value for name, value in said if name == "NET"] == sums


# --- The cache ---


def images_of(number, size=(8, 8), seed=0):
    return torch.rand(number, 1, *size, generator=seeded(seed)[0]) * 2 - 1


def cache_of(folder, images, vae=None, flips=True, encode=None):
    vae = vae or exact_autoencoder()
    training = TrainingImages(TensorImages(images), list(images.shape[-2:]), 1, 0, center_crop=True)
    shape = (4, images.shape[-2] // 2, images.shape[-1] // 2)
    encode = encode or LatentSpace.of(vae, [0.0], [1.0]).encode
    return LatentCache(folder, training, encode, fingerprint(vae), shape, flips)


def filled(cache, **arguments):
    with cache.being_filled():
        cache.fill(32, **arguments)
    return cache


def test_latents_are_those_of_the_images_and_of_their_mirror_images(tmp_path):
    images = images_of(300, (8, 12))
    cache = filled(cache_of(tmp_path / CACHE, images))
    assert [len(load_file(path)["latents"]) for path in cache.paths] == [256, 44]
    latents = TrainingLatents(cache, seed=0, random_flip=True)
    keys = [(epoch, index) for index in range(300) for epoch in (0, 1)]
    of_images = TrainingImages(TensorImages(images), [8, 12], 1, 0, random_flip=True)
    raw = torch.stack([torch.nn.functional.pixel_unshuffle(image, 2) for image in of_images.__getitems__(keys)])
    found = torch.stack([latents[key] for key in keys])
    both = torch.cat([images, images.flip(-1)])
    pixels = torch.nn.functional.pixel_unshuffle(both, 2)
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True, correction=0)
    assert torch.allclose(found, (raw - mean) / std, atol=2e-3), "flipped as the images would be; kept in 16 bits"
    plain = torch.stack([TrainingLatents(cache, seed=0)[0, index] for index in range(300)])
    assert torch.allclose(plain[[3]], (torch.nn.functional.pixel_unshuffle(images[[3]], 2) - mean) / std, atol=2e-3)
    assert latents.examined(0, 50, 10**6).shape == (50, 4, 4, 6)
    assert latents.examined(0, 50, 960).shape == (10, 4, 4, 6)


def test_processes_share_the_work_and_what_is_there_stays(tmp_path):
    images = images_of(600)
    calls = []

    def encode(some):
        calls.append(len(some))
        return torch.nn.functional.pixel_unshuffle(some, 2)

    alone = filled(cache_of(tmp_path / "alone", images, flips=False))
    shared = cache_of(tmp_path / "shared", images, flips=False, encode=encode)
    for process in (1, 0):
        filled(shared, process_index=process, num_processes=2)
    assert sum(calls) == 600
    for one, other in zip(alone.paths, shared.paths, strict=True):
        assert one.read_bytes() == other.read_bytes()
    shared.paths[1].write_bytes(shared.paths[1].read_bytes()[:1000])
    shared.paths[2].unlink()
    calls.clear()
    filled(cache_of(tmp_path / "shared", images, flips=False, encode=encode))
    assert sum(calls) == 256 + 88, "what is damaged, and what is not there"
    assert [path.read_bytes() for path in alone.paths] == [path.read_bytes() for path in shared.paths]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vae": tiny_autoencoder("VQModel", 1)}, "vae was AutoencoderKL .* and is VQModel"),
        ({"images": images_of(20, (12, 8))}, r"size was \[8, 8\] and is \[12, 8\]"),
        ({"images": images_of(19)}, "num_images was 20 and is 19"),
        ({"images": images_of(20) * 0.5 + 0.5}, "the images were others, or in another order"),
        ({"flips": False}, "flips was True and is False"),
    ],
)
def test_latents_of_something_else_are_refused(tmp_path, change, said):
    filled(cache_of(tmp_path / CACHE, images_of(20)))
    before = {path.name: path.read_bytes() for path in (tmp_path / CACHE).iterdir()}
    with pytest.raises(ValueError, match=f"{said}.*; give another --latents_cache_dir, or remove"):
        cache_of(tmp_path / CACHE, **{"images": images_of(20)} | change)
    assert {path.name: path.read_bytes() for path in (tmp_path / CACHE).iterdir()} == before


def test_a_folder_of_other_files_is_no_cache(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files than latents"):
        cache_of(tmp_path, images_of(20))


def test_latents_that_are_not_finite(tmp_path):
    cache = cache_of(tmp_path / CACHE, images_of(20), encode=lambda images: torch.full((len(images), 4, 4, 4), 1e6))
    with pytest.raises(ValueError, match="latents that are not finite in float16"):
        filled(cache)
    assert not list((tmp_path / CACHE).glob("*.safetensors"))
    cache = filled(cache_of(tmp_path / CACHE, images_of(20), encode=lambda images: torch.ones(len(images), 4, 4, 4)))
    with pytest.raises(ValueError, match="the same latents in 4 of 4 channels"):
        cache.statistics()


# --- Training ---

SMALL = "--block_out_channels 8 16 --train_batch_size 16 --validation_inference_steps 4 --num_validation_images 4"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A path of an untrained autoencoder of gray images."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    tiny_autoencoder(channels=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2", "cld"])
def test_training_on_latents_and_going_on_with_it(train, tmp_path, autoencoder, method):
    options = (
        f"{SMALL} --method {method} --vae {autoencoder} --random_flip --max_train_steps 3 --checkpointing_steps 2 "
        f"--validation_steps 2 --max_train_samples 300 --latents_cache_dir {tmp_path / CACHE}"
    )
    train(options, "--output_dir", tmp_path / "whole")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / CACHE).glob("*.safetensors")}
    assert len(made) == 2
    train(options, "--output_dir", tmp_path / "sliced", "--max_train_minutes 1e-9")
    train(options, "--output_dir", tmp_path / "sliced", "--resume_from_checkpoint latest")
    assert {path: path.stat().st_mtime_ns for path in made} == made, "computed once"
    for name in (WEIGHTS, "checkpoint-3/model.safetensors", "checkpoint-3/optimizer.bin"):
        assert same_state(load(tmp_path / "whole" / name), load(tmp_path / "sliced" / name)), name
    assert read_log(tmp_path / "whole") != []

    pipeline = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline}[method].from_pretrained(
        tmp_path / "whole"
    )
    pipeline.set_progress_bar_config(disable=True)
    assert fingerprint(pipeline.vae) == fingerprint(load_autoencoder(str(autoencoder)))
    assert pipeline(1, 4, seeded(0), output_type="latent").images.shape == (1, 4, 4, 4)
    assert pipeline(1, 4, seeded(0)).images[0].size == (8, 8)
    assert Image.open(tmp_path / "whole" / "samples.png").size == (132, 132), "decoded: 2 x 2 images, 8 times as large"
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "This is a latent model" in card
    assert "generation of 8x8 images" in card
    record = json.loads((tmp_path / "whole" / "training_args.json").read_text())
    assert (record["vae"], record["resolution"]) == ("vae", 8)
    assert "latents_cache_dir" not in record


@pytest.mark.slow
def test_two_processes_compute_latents_and_train_on_them(tmp_path, autoencoder):
    """As one process does with accumulated gradients."""
    options = f"{SMALL} --vae {autoencoder} --random_flip --max_train_steps 3 --max_train_samples 300 --logging_steps 1"
    two = ("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29613")
    launch(options, "--output_dir", tmp_path / "two", launcher=two, env={"ACCELERATE_USE_CPU": "true"})
    launch(options, "--gradient_accumulation_steps 2 --output_dir", tmp_path / "one")
    for path in (tmp_path / "one" / CACHE).glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / CACHE / path.name).read_bytes()
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [entry["loss"] for entry in logs[0]] == pytest.approx([entry["loss"] for entry in logs[1]], rel=1e-3)


def test_a_dry_run_computes_a_few_latents_and_writes_nothing(train, tmp_path, autoencoder, capsys):
    train(SMALL, f"--vae {autoencoder} --dry_run --output_dir", tmp_path / "out")
    assert "1437 images of 1x8x8, as latents of 4x4x4" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_training_killed_while_it_computes_latents_goes_on_where_it_was(train, tmp_path, autoencoder):
    """Latents that are there are not computed again, and those of a killed training are as good as others."""
    folder = save_images(tmp_path / "images", 600, size=(8, 8))
    options = f"{SMALL} --vae {autoencoder} --train_data_dir {folder} --max_train_steps 1 --eval_batch_size 1"
    command = [sys.executable, str(ROOT / "train_gm_sgm.py"), *options.split(), "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    cache = tmp_path / "out" / CACHE
    deadline = time.monotonic() + 200
    while not list(cache.glob("latents-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in cache.glob("latents-*.safetensors")}
    assert 1 <= len(made) < 3
    train(options, "--output_dir", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    train(options, "--output_dir", tmp_path / "whole")
    assert same_state(load(tmp_path / "out" / WEIGHTS), load(tmp_path / "whole" / WEIGHTS))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--resolution 9", "--vae makes one latent of 2x2 pixels, and the images are 9x9: set --resolution to multipl"),
        ("--resolution 12", "--resolution 6 must be a multiple of 4, as the network has 3 levels"),
        ("--lr_warmup_steps 9 --max_train_steps 3", "--lr_warmup_steps 9 must be smaller than the 3 steps"),
        ("--algorithm_type gibbs", "unknown algorithm_type 'gibbs'"),
        ("--vae nowhere", "--vae nowhere holds no autoencoder"),
    ],
)
def test_what_does_not_go_together_is_said_before_latents_are_computed(train, tmp_path, autoencoder, options, said):
    with pytest.raises(ValueError, match=said):
        train(f"--block_out_channels 8 8 16 --vae {autoencoder} {options} --output_dir {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_network_of_other_latents_or_of_latents_that_nothing_explains(train, tmp_path, autoencoder):
    tiny_network(3, 3).save_pretrained(tmp_path / "three")
    tiny_network(4, 4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="needs a network from 4 channels to 4, this one goes from 3 to 3"):
        train(f"--model_name_or_path {tmp_path / 'three'} --vae {autoencoder} --output_dir {tmp_path / 'out'}")
    with pytest.raises(ValueError, match="goes from 4 to 4: for latents, give their autoencoder with --vae"):
        train(f"--model_name_or_path {tmp_path / 'four'} --output_dir {tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latents_cache_dir": "somewhere"}, "--latents_cache_dir is for --vae"),
        ({"vae": "somewhere", "dequantize": 256}, "--dequantize is for images of few levels"),
        ({"resolution": [8, 8, 8]}, "--resolution must be a side or a height and a width"),
        ({"resolution": 0}, "--resolution must be a side or a height and a width, at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(ValueError, match=said):
        TrainingArguments(**options)


def test_starting_anew_computes_latents_anew(train, tmp_path, autoencoder):
    options = f"{SMALL} --vae {autoencoder} --max_train_steps 1 --max_train_samples 40 --output_dir {tmp_path / 'out'}"
    train(options)
    tiny_autoencoder("AutoencoderTiny", 1).save_pretrained(tmp_path / "other")
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    with pytest.raises(ValueError, match="holds the latents of another training set or autoencoder: vae was"):
        train(options, f"--resume_from_checkpoint latest --vae {tmp_path / 'other'}")
    train(options, f"--overwrite_output_dir --vae {tmp_path / 'other'}")
    assert "AutoencoderTiny" in (tmp_path / "out" / CACHE / "latents.json").read_text()


def test_latents_by_class(train, tmp_path, autoencoder):
    """Labels stay with their images, and a class can be asked for."""
    options = f"{SMALL} --vae {autoencoder} --class_conditional --max_train_steps 2 --max_train_samples 300"
    train(options, "--random_flip --output_dir", tmp_path / "out")
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.num_classes == 10
    assert pipeline(1, 4, seeded(0), class_labels=3, guidance_scale=2.0).images[0].size == (8, 8)
