"""Is the velocity's score easier to learn than the image's? A CLD network beside a VP network of the same training."""

import argparse
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..data import split_digits
from ..evaluation.table import Table
from ..losses import cld_loss
from ..pictures import curve_style
from ..processes.cld import CLD, lift, perturb
from ..training.methods.cld import FIRST_TIME
from ..training.options import TrainingArguments
from .cld_training import TIMES, as_network, train_cld
from .digits import TIE, kept_unet, parts_of, train_on_digits
from .exact import ExactDenoiser
from .pictures import save_picture
from .report import Report

HEADER = [
    *("t", "noise level CLD", "noise level VP", "loss CLD", "least", "loss VP", "least"),
    *("Jacobian CLD", "Jacobian VP"),
]


def vp_state(images: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`alpha x0 + s noise` and s, `(B, C, H, W)` and `(B, 1, 1, 1)`: the VP diffusion, beta from 0.1 to 20."""
    log_alpha = (-0.25 * times**2 * 19.9 - 0.05 * times).to(images)[:, None, None, None]
    deviation = (-torch.expm1(2 * log_alpha)).sqrt()
    return log_alpha.exp() * images + deviation * noise, deviation


def vp_loss(network: Callable[..., Any], images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Noise prediction with the mixed score `-y - output / s`, as CLD has it for the velocity: `(B,)`."""
    state, deviation = vp_state(images, times, noise)
    output = network(state, (1000 * times).float()).sample
    return (deviation * state + output - noise).square().flatten(1).mean(1)


def vp_training(network: Callable[..., Any], images: Tensor) -> Tensor:
    times = FIRST_TIME + (1 - FIRST_TIME) * torch.rand(len(images), dtype=torch.float64)
    return vp_loss(network, images, times, torch.randn_like(images))


def jacobian_norm(network: Callable[[Tensor], Tensor], inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Frobenius norm of `d output / d input` over the square root of the number of outputs, one per image, `(B,)`.

    From one probe e per image: `E |J^T e|^2 = |J|^2`; inputs are of unit size, so it is the gain of a small change.
    """
    leaf = inputs.detach().requires_grad_()
    output = network(leaf)
    probe = torch.randn(output.shape, generator=generator)
    (slope,) = torch.autograd.grad(output, leaf, probe)
    return (slope.square().flatten(1).sum(1) / output[0].numel()).sqrt()


def measure(cld: Any, vp: Any, process: CLD, t: float, images: Tensor, generator: torch.Generator) -> list[float]:
    """A row of the table, at time t; the least loss is that of the exact denoiser of the training digits."""
    denoiser = ExactDenoiser(split_digits()[0])
    times = torch.full((len(images),), t, dtype=torch.float64)
    noise = torch.randn((len(images), 2, 8, 8), generator=generator)
    labels = (1000 * times).float()

    x, v = perturb(process, images, times, noise)
    kernel = process.marginal(process.clock(torch.tensor(t)))
    at = lift(kernel)
    score = at.velocity_score(x, v, denoiser(at.image(x, v)[0], float(at.sigma)))
    least_cld = float((score * float(kernel.root[1, 1]) + noise[:, 1:]).square().mean())

    y, deviation = vp_state(images, times, noise[:, 1:])
    s = float(deviation[0])
    alpha, sigma = (1 - s**2) ** 0.5, s / (1 - s**2) ** 0.5
    least_vp = float(((y / alpha - denoiser(y / alpha, sigma)) / sigma - noise[:, 1:]).square().mean())

    with torch.no_grad():
        loss_cld = float(cld_loss(as_network(cld), images, times, noise, process).mean())
        loss_vp = float(vp_loss(vp, images, times, noise[:, 1:]).mean())
    inputs = ((as_network(cld), torch.cat([x, v / process.velocity_scale], 1)), (as_network(vp), y))
    norms = [
        float(jacobian_norm(lambda u, of=of: of(u, labels), state, generator).mean())  # type: ignore[misc]
        for of, state in inputs
    ]
    return [t, float(at.sigma), sigma, loss_cld, least_cld, loss_vp, least_vp, *norms]


def target(args: argparse.Namespace) -> Report:
    """Loss and Jacobian of a CLD and a VP network over time."""
    cld, scheduler = train_cld(args)
    # The same network for one image in place of image and velocity, and the same training.
    arguments = TrainingArguments(max_train_steps=args.steps, train_batch_size=args.batch)
    name = f"vp max_train_steps={args.steps} train_batch_size={args.batch}"
    vp = kept_unet(parts_of(args.output) / name, lambda: train_on_digits(arguments, vp_training, name))
    images, generator = split_digits()[0][: args.num_samples], torch.Generator().manual_seed(1)
    rows = [measure(cld, vp, scheduler.process, t, images, generator) for t in TIMES]

    columns = list(zip(*rows, strict=True))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for column, (label, at_cld, at_vp) in enumerate((("t", 0, 0), ("noise level of the equivalent image", 1, 2))):
        for row, (quantity, of_cld, of_vp) in enumerate((("loss", 3, 5), ("Jacobian norm of the network", 7, 8))):
            axis = axes[row][column]
            curves = {"CLD": (at_cld, of_cld), "VP": (at_vp, of_vp)}
            if quantity == "loss":
                curves |= {"CLD, least possible": (at_cld, 4), "VP, least possible": (at_vp, 6)}
            for i, (name, (x, y)) in enumerate(curves.items()):
                axis.plot(columns[x], columns[y], label=name, **curve_style(i))
            axis.set(xlabel=label, ylabel=quantity, yscale="log", xscale="log" if column else "linear")
            if quantity == "loss":
                axis.set_ylim(1e-5, 2)  # the least possible loss goes on down: the digits are points
            axis.legend(fontsize=8)
    return Report(
        name="cld_target",
        title="CLD: is the target easier?",
        question="Is the score of the velocity easier to learn than that of the image, as the paper argues?",
        verdict=verdict_on_target(rows),
        tables=[Table("Loss, the least possible loss, and the Jacobian norm of the networks.", HEADER, rows)],
        pictures=[save_picture(figure, args.output / "cld_target.png")],
        conditions=f"{len(images)} training digits; trainings of {args.steps} steps of {args.batch} images, seed 0; "
        "VP with beta from 0.1 to 20, both with the mixed score and the same noise.",
    )


def verdict_on_target(rows: list[list[float]]) -> str:
    loss_cld, least_cld, loss_vp, least_vp, norm_cld, norm_vp = (
        sum(row[i] for row in rows) / len(rows) for i in range(3, 9)
    )
    excess_cld, excess_vp = loss_cld - least_cld, loss_vp - least_vp

    def compared(cld: float, vp: float, less: str, more: str, equal: str) -> str:
        return less if cld * (1 + TIE) < vp else more if cld > vp * (1 + TIE) else equal

    smoother = compared(norm_cld, norm_vp, "smoother", "less smooth", "as smooth")
    closer = compared(excess_cld, excess_vp, "closer to", "further from", "as far from")
    return (
        f"Mean over the times, CLD and VP: Jacobian norm {norm_cld:.3f} and {norm_vp:.3f}, loss {loss_cld:.4f} and "
        f"{loss_vp:.4f}, loss above the least possible {excess_cld:.4f} and {excess_vp:.4f}. The CLD network is "
        f"{smoother}, and {closer} the best that can be learned (within {TIE:.0%} is called equal). At equal t they "
        "see different noise levels: the right-hand panels compare at equal ones."
    )
