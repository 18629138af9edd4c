"""What tests run samplers on: tiny untrained networks, perfect ones of known data, and noise that is known."""

import math

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from diffusers_gm.processes.cld import lift
from diffusers_gm.readings import CompanionReading, VelocityReading
from diffusers_gm.readings.velocity import score_coefficients
from diffusers_gm.samplers import Memory
from diffusers_gm.studies.exact import ExactDenoiser

CPU = torch.device("cpu")

# Four unequal points, as data of which any error of a sampler shows.
POINTS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).view(4, 1, 1, 2)
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])


def seeded(*seeds, device="cpu"):
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


# --- Networks ---


def build(make, *args, **kwargs):
    """A module with weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, **kwargs).eval()


def tiny_network(in_channels=1, out_channels=1, **config):
    """An untrained network for 8x8 images, always the same."""
    return build(
        UNet2DModel,
        **{
            "sample_size": 8,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": (8,),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",),
        }
        | config,
    )


def tiny_autoencoder(kind="AutoencoderKL", channels=3, latent_channels=4, **config):
    """An untrained autoencoder, always the same, of one latent for 2x2 pixels."""
    shape = {"in_channels": channels, "out_channels": channels, "latent_channels": latent_channels}
    if kind == "AutoencoderTiny":
        widths, blocks = ("encoder_block_out_channels", "decoder_block_out_channels"), ("encoder", "decoder")
        shape |= dict.fromkeys(widths, (8, 8)) | {f"num_{name}_blocks": (1, 1) for name in blocks}
        return build(AutoencoderTiny, **shape | config)
    shape |= {"block_out_channels": (8, 8), "norm_num_groups": 4}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return build({"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}[kind], **shape | config)


class Shuffle(torch.nn.Module):
    """Pixels to channels or back: `(B, C, H, W)` to `(B, 4C, H/2, W/2)`."""

    def __init__(self, up):
        super().__init__()
        self.up = up

    def forward(self, x, *_):
        return torch.nn.functional.pixel_shuffle(x, 2) if self.up else torch.nn.functional.pixel_unshuffle(x, 2)


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


def perfect_network(scheduler, denoiser):
    """`(input, label) -> output` of `denoiser(y, sigma) -> D`, in the words of the network that the scheduler
    describes; a score needs an `ExactDenoiser`."""
    kind, space = scheduler.config.prediction_type, scheduler.noise_space
    if isinstance(scheduler.reading, CompanionReading):
        return companion_network(scheduler.reading, denoiser)
    if isinstance(scheduler.reading, VelocityReading):
        return velocity_network(scheduler.reading.process, denoiser, kind)
    if isinstance(denoiser, ExactDenoiser):
        return lambda x, t: denoiser.network_output(x, t.double(), space, scheduler.reading.prediction_type)

    def network(x, t):
        sigma = float(space.sigma(t.double()))
        y = x / float(space.alpha(torch.tensor(sigma)))
        denoised = denoiser(y, sigma)
        return space.output(denoised, (y - denoised) / sigma, sigma, scheduler.reading.prediction_type)

    return network


def velocity_network(process, denoiser, prediction_type="velocity_score", num_train_timesteps=1000):
    """`(cat([x, v / sqrt(M)], 1), label) -> output` of `denoiser(y, sigma)`."""

    def network(model_input, label):
        marginal = process.marginal(process.clock(label.reshape(-1)[0].double() / num_train_timesteps))
        at = lift(marginal)
        x, v = model_input.chunk(2, 1)
        v = v * process.velocity_scale
        score = at.velocity_score(x, v, denoiser(at.image(x, v)[0], float(at.sigma)))
        of_velocity, of_output = score_coefficients(marginal, prediction_type)
        return (score - of_velocity * v) / of_output

    return network


def companion_network(reading, denoiser):
    """`(cat([alpha y, c], 1), label) -> output` of `denoiser(y, sigma)`."""

    def network(model_input, label):
        sigma = reading.sigma(label.reshape(-1)[:1].double())
        y = model_input.chunk(2, 1)[0] / float(reading.space.alpha(sigma))
        denoised = denoiser(y, float(sigma))
        return reading.space.output(denoised, (y - denoised) / float(sigma), float(sigma), "edm")

    return network


def normal_denoiser(variances):
    """The denoiser `(y, sigma) -> D` of pixels that are independent, of `variances` `(C, H, W)` and mean 0."""
    return lambda y, sigma: variances / (variances + sigma**2) * y


def output_of(reading, denoised, sample, call):
    """The network's output that the reading takes for `denoised`: D is affine in it."""
    zero = torch.zeros_like(denoised)
    at_zero = reading.denoised(zero, sample, call)
    return (denoised - at_zero) / (reading.denoised(zero + 1, sample, call) - at_zero)


# --- Loops ---


def run(scheduler, network, sample, generator, timesteps=None):
    """The loop of a pipeline, after `set_timesteps`. `network(input, label)`."""
    for t in scheduler.timesteps if timesteps is None else timesteps:
        output = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample


def samples_of(scheduler, denoiser, num_calls, shape, generator, dtype=torch.float64):
    """Images of a whole run on perfect `denoiser`; `shape` is that of the images."""
    if isinstance(scheduler.reading, VelocityReading):
        shape = (shape[0], 2 * shape[1], *shape[2:])
    scheduler.set_timesteps(num_calls)
    start = scheduler.initial_sample(shape, generator, CPU, dtype)
    return scheduler.reading.image(run(scheduler, perfect_network(scheduler, denoiser), start, generator))


def check_four_points(samples, slack=0.03):
    """Samples of `POINTS` with `WEIGHTS`: near one of them, in their proportions within five standard errors."""
    n = len(samples)
    distances, nearest = torch.cdist(samples.flatten(1).float(), POINTS.flatten(1)).min(1)
    assert float((distances < 0.15).float().mean()) > 0.98
    counts = torch.bincount(nearest, minlength=4) / n
    assert ((counts - WEIGHTS).abs() < 5 * (WEIGHTS * (1 - WEIGHTS) / n).sqrt() + slack).all(), counts


def four_points():
    return ExactDenoiser(POINTS, weights=WEIGHTS)


# --- Exact moments, without samples ---


class Pulses:
    """A `Draw` of unit pulses: every number drawn for an image is 1 in one image of the batch and 0 in the others.

    A run that is linear in what it draws makes of them its response to each draw; their squares add up to the variance.
    """

    dtype, device = torch.float64, CPU

    def __init__(self, size):
        self.size, self.drawn = size, 0

    def normal(self, shape):
        count = math.prod(shape[1:])
        rows = torch.zeros(self.size, count, dtype=self.dtype)
        rows[self.drawn : self.drawn + count] = torch.eye(count, dtype=self.dtype)
        self.drawn += count
        assert self.drawn <= self.size, "more draws than pulses"
        return rows.view(shape)


def final_variance(sampler, sigmas, variance, start=None):
    """Exact variance after a run on one-pixel data N(0, variance).

    `start`: `draw -> (y, companion)`; None: the exact marginal of the first level.
    """
    draw = Pulses(2 * len(sigmas) + 2)
    shape = (draw.size, 1, 1, 1)
    y, companion = start(draw) if start else ((variance + sigmas[0] ** 2).sqrt() * draw.normal(shape), None)
    plan, memory = sampler.plan(sigmas), Memory(companion=companion)
    for i, sigma in enumerate(plan.sigmas.tolist()):
        y, memory = sampler.step(plan, i, y, variance / (variance + sigma**2) * y, memory, draw)
    return float(y.square().sum())


# --- Of other classes than UNet2DModel ---


def dit(channels=1, out_channels=None, **config):
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "norm_num_groups": 4}
    shape |= {"num_embeds_ada_norm": 10, "in_channels": channels, "out_channels": out_channels}
    return build(DiTTransformer2DModel, **shape | config)


def conditional(channels=1, out_channels=1, **config):
    """A UNet2DConditionModel without attention to a text."""
    shape = {"sample_size": 8, "in_channels": channels, "out_channels": out_channels, "block_out_channels": (8, 8)}
    shape |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}
    return build(UNet2DConditionModel, **shape | {"mid_block_type": None, "layers_per_block": 1} | config)


KINDS = {"dit": dit, "conditional": conditional}


def written(unet, folder):
    """The path of a network's config."""
    unet.save_config(folder)
    return folder / "config.json"
