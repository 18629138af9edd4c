"""Networks that a training takes: of other classes than UNet2DModel, and of other sizes than squares."""

import json

import pytest
import torch
from images import save_images
from networks import KINDS, conditional, dit, seeded, tiny_autoencoder, tiny_network, written
from training import SHORT

from diffusers_gm import (
    CLDPipeline,
    GMSGMPipeline,
    NCSNv2Pipeline,
)
from diffusers_gm.networks import as_unet_call
from diffusers_gm.training.network import (
    fit_unet,
    given_unet,
    new_unet,
)
from diffusers_gm.training.options import TrainingArguments

PIPELINES = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline}


# --- Other classes ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_called_as_others_are(kind):
    """A single timestep, or one for each image; without labels the class that stands for none."""
    network, images = as_unet_call(KINDS[kind]()), torch.randn(2, 1, 8, 8, generator=seeded(0)[0])
    with torch.no_grad():
        one = network(images, torch.tensor(3.5)).sample
        assert torch.equal(network(images, torch.tensor([3.5, 3.5])).sample, one)
        assert torch.equal(network(images, 3.5).sample, one)
        assert not torch.allclose(network(images, torch.tensor([3.5, 700.0])).sample, one)
        if kind == "dit":
            assert torch.equal(network(images, 3.5, class_labels=torch.tensor([10, 10])).sample, one)
            assert not torch.equal(network(images, 3.5, class_labels=torch.tensor([1, 2])).sample, one)


@pytest.mark.parametrize("method", PIPELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_other_classes_are_trained_saved_and_loaded(train, tmp_path, kind, method):
    times, words = (2, "cld --cld_feed_companion") if method == "cld" else (1, method)
    config = written(KINDS[kind](times, 1), tmp_path / "network")
    train(SHORT, f"--method {words} --model_config {config} --output_dir", tmp_path / "out")
    pipeline = PIPELINES[method].from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.unet) is type(KINDS[kind]())
    assert pipeline(2, 4, seeded(0, 1), output_type="pt").images.shape == (2, 1, 8, 8)
    one = pipeline(1, 4, seeded(1), output_type="pt").images
    assert torch.allclose(pipeline(2, 4, seeded(0, 1), output_type="pt").images[1:], one, atol=1e-5)


def test_a_transformer_learns_latents(train, tmp_path):
    tiny_autoencoder(channels=1).save_pretrained(tmp_path / "vae")
    config = written(dit(4, sample_size=4), tmp_path / "network")
    train(SHORT, f"--model_config {config} --vae {tmp_path / 'vae'} --output_dir", tmp_path / "out")
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline(1, 4, seeded(0)).images[0].size == (8, 8)
    labelled = pipeline(1, 4, seeded(0), class_labels=3, output_type="latent").images
    assert not torch.equal(labelled, pipeline(1, 4, seeded(0), output_type="latent").images)


@pytest.mark.parametrize(
    ("network", "resolution", "said"),
    [
        (lambda: dit(sample_size=16), 8, "sample_size = 16, and is to learn 8x8"),
        (
            lambda: conditional(cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")),
            8,
            "run",
        ),
        (conditional, 7, "--resolution 7 must be a multiple of 2"),
        (conditional, [8, 7], "--resolution 8 7 must be a multiple of 2"),
    ],
)
def test_networks_that_cannot_do_it_say_so(network, resolution, said):
    with pytest.raises(ValueError, match=said):
        fit_unet(network(), TrainingArguments(), resolution)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "Imaginary"}, "is a Imaginary, which is no network of diffusers"),
        ({"_class_name": "DDPMScheduler"}, "is a DDPMScheduler, which is no network"),
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL: what is trained here is called with a noisy image and"),
        ({"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel: what is trained here"),
    ],
)
def test_what_is_no_network_of_images_and_timesteps(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        given_unet(TrainingArguments(model_config=str(tmp_path / "config.json")))


def test_a_transformer_cannot_forget_the_timestep():
    with pytest.raises(ValueError, match="--conditioning none: a DiTTransformer2DModel has no time embedding"):
        fit_unet(dit(), TrainingArguments(method="ncsnv2", conditioning="none"), 8)


def test_a_transformer_drops_no_labels_but_those_that_it_is_told_to(generator):
    """By itself it would in training, in each block others, and by the global RNG."""
    network = fit_unet(dit(num_layers=3), TrainingArguments(class_conditional=True), 8).train()
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.3, generator=generator)
    sample = torch.randn(32, 1, 8, 8, generator=generator)
    labels = torch.arange(32) % 10
    outputs = [mode(sample, torch.full((32,), 10), labels).sample for mode in (network, network.eval())]
    assert torch.equal(*outputs)


def test_an_answer_that_holds_a_variance_is_trained_and_sampled_without(train, tmp_path):
    tiny_network(1, 2).save_pretrained(tmp_path / "unet")
    train(SHORT, f"--model_name_or_path {tmp_path / 'unet'} --output_dir", tmp_path / "out")
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config["variance_type"] == "learned_range"
    assert pipeline(1, 4, seeded(0), output_type="pt").images.shape == (1, 1, 8, 8)
    before, after = (w.state_dict()["conv_out.weight"] for w in (tiny_network(1, 2), pipeline.unet))
    assert torch.equal(before[1], after[1]), "nothing is learned of it"
    assert not torch.equal(before[0], after[0])


# --- Other sizes ---


@pytest.mark.parametrize("method", PIPELINES)
def test_images_that_are_no_squares(train, tmp_path, method):
    folder = save_images(tmp_path / "images", 20, size=(30, 20), mode="RGB")
    options = f"{SHORT} --block_out_channels 8 8 --method {method} --train_data_dir {folder} --random_flip"
    train(options, "--resolution 16 24 --output_dir", tmp_path / "out")
    pipeline = PIPELINES[method].from_pretrained(tmp_path / "out")
    assert pipeline.unet.config["sample_size"] == [16, 24]
    assert pipeline(1, 4, seeded(0)).images[0].size == (24, 16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "generation of 16x24 images" in card
    assert "--resolution 16 24" in card
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["resolution"] == [16, 24]
    train(options, "--resolution 16 24 --resume_from_checkpoint latest --output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--resolution was \[16, 24\] and is 16"):
        train(options, "--resolution 16 --resume_from_checkpoint latest --output_dir", tmp_path / "out")


def test_latents_of_images_that_are_no_squares(train, tmp_path):
    tiny_autoencoder("AutoencoderTiny").save_pretrained(tmp_path / "vae")
    folder = save_images(tmp_path / "images", 20, size=(30, 20), mode="RGB")
    train(
        f"{SHORT} --block_out_channels 8 8 --train_data_dir {folder} --vae {tmp_path / 'vae'} --resolution 16 24",
        f"--output_dir {tmp_path / 'out'}",
    )
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config["sample_size"] == [8, 12]
    assert pipeline(1, 4, seeded(0)).images[0].size == (24, 16)


def test_one_number_stays_a_square():
    assert TrainingArguments(resolution=[32]).resolution == TrainingArguments(resolution=32).resolution == 32
    with torch.random.fork_rng():
        assert new_unet(TrainingArguments(block_out_channels=[8]), [8, 8], 1).config["sample_size"] == 8
