"""Which component an image is in along an ancestral run: a study of `.gm_sgm`."""

import argparse
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..data import split_digits
from ..evaluation.table import Table
from ..processes.mixture import GaussianMixtureNoise
from ..schedulers import GMLangevinScheduler
from .digits import trained
from .exact import ExactDenoiser, Network, exact_network
from .pictures import save_picture
from .report import Report

WIDTH = 0.1
EXACT, TRAINED = "exact denoiser, K = 2", "trained network, K = 2"


@torch.no_grad()
def states(network: Network, scheduler: Any, num_samples: int, num_calls: int) -> list[tuple[Tensor, Tensor, float]]:
    """The noisy images, their denoised images and the noise level at every call of a run but the last."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(num_calls)
    sample = scheduler.initial_sample((num_samples, 1, 8, 8), generator, torch.device("cpu"), torch.float32)
    found = []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=True):
        output = network(scheduler.scale_model_input(sample, t), t)
        result = scheduler.step(output, t, sample, generator=generator)
        found.append((sample, result.pred_original_sample, sigma))
        sample = result.prev_sample
    return found[:-1]


def switches(found: Tensor) -> Tensor:
    """How often the most probable component changes along a run, per image, `(n,)`, of `(calls, n, K)`."""
    component = found.argmax(-1)
    return (component[1:] != component[:-1]).sum(0)


def switching(args: argparse.Namespace) -> Report:
    calls = args.calls[0] if args.calls else 50
    n = args.num_samples
    unet, described = trained(args.output, max_train_steps=args.steps)
    train, _ = split_digits()

    def with_mixture(mixture: GaussianMixtureNoise) -> tuple[Any, ExactDenoiser]:
        config = {"mixture_weights": mixture.weights.tolist(), "mixture_scales": mixture.scales.tolist()}
        scheduler = GMLangevinScheduler.from_config(described.config, algorithm_type="ancestral", **config)
        return scheduler, ExactDenoiser(train, WIDTH, mixture)

    def exact_run(scheduler: Any, denoiser: ExactDenoiser) -> list[tuple[Tensor, Tensor, float]]:
        return states(exact_network(denoiser, scheduler), scheduler, n, calls)

    def by_residual(run: list[tuple[Tensor, Tensor, float]], mixture: GaussianMixtureNoise) -> Tensor:
        """What the sampler draws its jumps from, `(calls - 1, n, K)`."""
        return torch.stack([mixture.responsibilities(y - denoised, sigma) for y, denoised, sigma in run])

    two, two_exact = with_mixture(described.mixture)
    three, three_exact = with_mixture(GaussianMixtureNoise.from_power_law(1.5, 3))
    run = exact_run(two, two_exact)
    sigmas = [sigma for _, _, sigma in run]
    runs = {
        EXACT: (by_residual(run, two.mixture), two.mixture),
        f"{EXACT}, true posterior": (torch.stack([two_exact.components(y, s) for y, _, s in run]), two.mixture),
        TRAINED: (by_residual(states(lambda x, t: unet(x, t).sample, two, n, calls), two.mixture), two.mixture),
        "exact denoiser, K = 3": (by_residual(exact_run(three, three_exact), three.mixture), three.mixture),
    }
    figures: dict[str, list[Any]] = {}
    for name, (found, mixture) in runs.items():
        # Were components drawn anew at every call, whatever the image:
        independent = (len(found) - 1) * (1 - float((mixture.weights**2).sum()))
        sure = float((found.max(-1).values > 0.9).float().mean())
        large = found[..., -1]
        figures[name] = [float(mixture.weights[-1]), float(large[0].mean()), float(large.mean()),
                         float(large[-1].mean()), sure, float(switches(found).float().mean()), independent]  # fmt: skip

    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2))
    for axis, name in zip(left.subplots(2, 1), (EXACT, TRAINED), strict=True):
        image = axis.imshow(runs[name][0][:, :40, -1].T, aspect="auto", cmap="inferno", vmin=0, vmax=1)
        axis.set(title=f"{name}: probability of a jump", ylabel="image", xlabel="network call")
    left.colorbar(image, ax=left.axes, shrink=0.6)
    for axis, (name, (found, mixture)) in zip(right.subplots(len(runs), 1, sharex=True), runs.items(), strict=True):
        for k, (weight, scale) in enumerate(zip(mixture.weights.tolist(), mixture.scales.tolist(), strict=True)):
            axis.semilogx(sigmas, found[..., k].mean(1), label=f"c = {scale:.2f}", color=f"C{k}")
            axis.axhline(weight, color=f"C{k}", linestyle=":", linewidth=0.9)
        axis.set(title=name, ylabel="responsibility", ylim=(0, 1))
        axis.legend(fontsize=7, loc="center left")
    right.axes[0].invert_xaxis()
    right.axes[-1].set_xlabel("noise level sigma (a run goes to the right); dotted: the weights")
    picture = save_picture(figure, args.output / "gm_sgm_switching.png")

    exact, true, learned = (figures[name] for name in (EXACT, f"{EXACT}, true posterior", TRAINED))
    does = min(exact[5], learned[5]) >= 1
    bias = abs(true[3] - exact[3]) > 0.05
    return Report(
        "gm_sgm_switching",
        "GM-SGM: switching between jumping and roaming",
        "The ancestral sampler draws the size of its next step from the posterior of the component. Does an image "
        "switch between large jumps and small roaming along a run, and when?",
        f"{'Yes' if does else 'Hardly'}: in a run of {calls} calls an image changes its likeliest component "
        f"{exact[5]:.1f} times with the exact denoiser and {learned[5]:.1f} with the trained network ({exact[6]:.1f} "
        f"if components were drawn anew at every call). The choice is clear (probability above 0.9) in {exact[4]:.0%} "
        f"and {learned[4]:.0%} of the calls: with one component for all pixels, the length of the noise tells it"
        + ("" if does else ", and an image goes on in the component that it started in")
        + f". The mean probability of a jump, whose weight is {exact[0]:.2f}, goes from {learned[1]:.2f} at the first "
        f"call to {learned[3]:.2f} at the last with the trained network, {exact[1]:.2f} to {exact[3]:.2f} with the "
        f"exact denoiser; the true posterior of the same images ends at {true[3]:.2f}. "
        + ("The difference is the sampler's: it tells the component from the residual y - D, which is shorter than the "
           "noise once the noise is smaller than the width of the data's own modes." if bias else
           "The residual y - D, which the sampler tells the component from, does as well."),
        [Table(f"{n} images, {calls} calls; a jump is the component of the largest scale.",
               ["", "weight of a jump", "at the first call", "mean", "at the last", "calls with a clear choice",
                "switches per image", "if drawn anew"], [[name, *row] for name, row in figures.items()])],
        [picture],
        f"Power-law mixtures, alpha = 1.5. Digits; the exact denoiser is that of Gaussians of width {WIDTH:g} around "
        f"the training images; the network was trained for {args.steps} steps, seed 0.",
    )  # fmt: skip
