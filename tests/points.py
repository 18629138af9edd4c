"""The exact denoiser of three points, alone and as a network, in tests of calibrations."""

import torch
from diffusers import UNet2DModel

DOUBLE = {"dtype": torch.float64}
HIGH, LOW = 40.0, 0.01
POINTS = torch.tensor([-1.0, -0.2, 0.9]).double()


def points(y, sigma):
    """The denoiser of three narrow Gaussians."""
    variance = 0.05**2 + sigma**2
    share = torch.softmax(-((y[..., None] - POINTS.to(y)) ** 2) / (2 * variance), -1)
    mean = share @ POINTS.to(y)
    return mean + 0.05**2 / variance * (y - mean)


def seen(denoiser):
    """As calibrations see it: D of a network, which is not clipped."""
    return lambda y, sigma: (denoiser(y, sigma), None)


def start(n=256):
    return HIGH * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0), **DOUBLE)


class PointsNetwork(UNet2DModel):
    """The exact network of the three points behind a UNet's interface, for every pixel alike."""

    def forward(self, sample, timestep, **_):
        space = self.space
        sigma = float(space.sigma(torch.as_tensor(timestep).double().flatten()[0]))
        y = sample / float(space.alpha(torch.tensor(sigma)))
        denoised = points(y, sigma)
        self.count += 1
        answer = "flow_prediction" if space.kind == "flow" else "epsilon"
        return type("Output", (), {"sample": space.output(denoised, (y - denoised) / sigma, sigma, answer)})()


def network(space):
    with torch.random.fork_rng():
        made = PointsNetwork(
            sample_size=2, in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2,
            layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ).eval()  # fmt: skip
    made.space, made.count = space, 0
    return made
