"""The cache of the latents of a training set."""

import pickle
from functools import partial

import pytest
import torch
from images import open_folder, save_images
from networks import exact_autoencoder, seeded, tiny_autoencoder
from safetensors.torch import load_file

from diffusers_gm.autoencoders import LatentSpace, fingerprint
from diffusers_gm.data import LatentCache, TensorImages, TrainingImages, TrainingLatents, subset

CACHE = "latents"


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
    examined = {latent.numpy().tobytes() for latent in latents.examined(0, 300, 10**6)}
    assert examined == {latent.numpy().tobytes() for latent in plain}, "none of them flipped"
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
        ({"images": torch.cat([images_of(20)[:-1], images_of(20)[:1]])}, "the images were others"),
        ({"flips": False}, "flips was True and is False"),
    ],
)
def test_latents_of_something_else_are_refused(tmp_path, change, said):
    filled(cache_of(tmp_path / CACHE, images_of(20)))
    before = {path.name: path.read_bytes() for path in (tmp_path / CACHE).iterdir()}
    with pytest.raises(ValueError, match=f"{said}.*; give another --latents_cache_dir, or remove"):
        cache_of(tmp_path / CACHE, **{"images": images_of(20)} | change)
    assert {path.name: path.read_bytes() for path in (tmp_path / CACHE).iterdir()} == before


def test_a_folder_that_another_training_began_to_fill_meanwhile(tmp_path):
    one, other = cache_of(tmp_path / CACHE, images_of(20)), cache_of(tmp_path / CACHE, images_of(19))
    filled(one)
    with pytest.raises(ValueError, match="num_images was 20 and is 19"):
        filled(other)


def test_workers_are_sent_no_latents(tmp_path):
    """They map the files themselves."""
    latents = TrainingLatents(filled(cache_of(tmp_path / CACHE, images_of(300, (16, 16)))), seed=0)
    first = latents[0, 299]
    sent = pickle.dumps(latents)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent)[0, 299], first)


def test_latents_on_another_background_are_refused(tmp_path):
    images = TensorImages(images_of(20))
    for colour in ((255, 255, 255), (0, 0, 0)):
        images.background = colour
        training = TrainingImages(images, [8, 8], 1, 0, center_crop=True)
        make = partial(
            LatentCache, tmp_path / CACHE, training, LatentSpace.of(exact_autoencoder(), [0.0], [1.0]).encode
        )
        if any(colour):
            filled(make("vae", (4, 4, 4), False))
    with pytest.raises(ValueError, match=r"background was \[255, 255, 255\] and is \[0, 0, 0\]"):
        make("vae", (4, 4, 4), False)
    save_images(tmp_path / "images", 2)
    assert subset(open_folder(tmp_path / "images", background="black"), 1, 0).background == (0, 0, 0)


def test_a_kill_at_the_very_start_is_gone_on_from(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "tmp-latents.json").write_text("{")
    filled(cache_of(tmp_path, images_of(20)))


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
