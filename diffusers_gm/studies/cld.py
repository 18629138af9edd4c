"""Critically-damped Langevin diffusion, measured: each command prints a table and writes a picture.

    python -m diffusers_gm.studies.cld terminal       variance of samples of a known Gaussian, SSCS and Euler-Maruyama
    python -m diffusers_gm.studies.cld damping        distance to equilibrium, under-, critically and over-damped
    python -m diffusers_gm.studies.cld samplers       SSCS and Euler-Maruyama on the digits, exact and trained
    python -m diffusers_gm.studies.cld target         is the velocity's score easier to learn? loss and Jacobian
    python -m diffusers_gm.studies.cld robustness     other masses and initial velocities, trained for a while

Options: `--steps` and `--batch` of the trainings, `--num_samples`, `--model` (samplers: a trained pipeline in place of
a training), `--output` (folder of the pictures).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from .. import CLDPipeline, CLDSSCSScheduler
from .. import training as tr
from ..data import split_digits
from ..evaluation import sliced_wasserstein
from ..exact import ExactDenoiser
from ..losses import cld_loss
from ..processes.cld import CLD, lift, perturb
from .common import Network, draw, machine, plan_for_digits, table, train_on_digits

CALLS = (10, 20, 50, 100, 200)
GRIDS = ("uniform", "quadratic", "log_snr")
SAMPLERS: dict[str, dict[str, Any]] = {
    "sscs": {},
    "sscs, order 2": {"splitting_order": 2},
    "euler_maruyama": {"algorithm_type": "euler_maruyama"},
}


# --- Terminal variance ---


def terminal_variance(scheduler: CLDSSCSScheduler, num_calls: int, data_variance: float = 0.25) -> float:
    """Variance of x after a run with the exact score of `N(0, data_variance)`: no sampling, the matrices of the steps.

    A step is `u' = matrix u + gain s_v + noise`, and the score `s_v` is linear in the state.
    """
    process = scheduler.process
    scheduler.set_timesteps(num_calls)
    clocks = process.clock(scheduler.timesteps.double() / scheduler.config["num_train_timesteps"])
    marginal = process.marginal(clocks)
    m = marginal.transition[..., 0]
    exact = marginal.covariance + data_variance * m[..., :, None] * m[..., None, :]
    rows = -torch.linalg.inv(exact)[:, 1]
    covariance = torch.diag(torch.tensor([1.0, process.mass], dtype=torch.float64))
    for i, row in enumerate(rows):
        update = scheduler._first_updates[i] if i == 0 else scheduler._updates[i]
        matrix = update.matrix + update.gain[:, None] * row
        covariance = matrix @ covariance @ matrix.T
        if i < len(rows) - 1 and scheduler.config["algorithm_type"] != "probability_flow":
            covariance = covariance + update.covariance
    return float(covariance[0, 0])


def terminal(args: argparse.Namespace) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    rows = []
    for name, config in SAMPLERS.items():
        for spacing in GRIDS:
            scheduler = CLDSSCSScheduler(prediction_type="velocity_score", timestep_spacing=spacing, **config)
            values = [terminal_variance(scheduler, n) for n in CALLS]
            rows.append([f"{name}, {spacing}", *(f"{value:.4f}" for value in values)])
            axis.loglog(CALLS, [abs(value - 0.25) for value in values], "-o", label=f"{name}, {spacing}", markersize=3)
    print(table(["Var(x), the data have 0.25", *(f"{n} calls" for n in CALLS)], rows))
    axis.set(xlabel="network calls", ylabel="|Var(x) - 0.25|", title="Gaussian data, exact score")
    axis.legend(fontsize=7)
    save(figure, args.output / "cld_terminal.png")


# --- Damping ---


def distance_to_equilibrium(process: CLD, clocks: Tensor, x0: float = 1.0) -> Tensor:
    """W2 between `(x, v / sqrt(M))` given x0 and the unit normal, at clocks `(n,)`: `(n,)`.

    Gaussians: squared distance of the means, plus `sum (sqrt(lambda_i) - 1)^2` over the eigenvalues of the covariance.
    """
    marginal = process.marginal(clocks)
    unit = torch.tensor([1.0, 1 / process.velocity_scale], dtype=torch.float64)
    mean = x0 * marginal.transition[..., 0] * unit
    values = torch.linalg.eigvalsh(marginal.covariance * unit[:, None] * unit).clamp(min=0)
    return (mean.square().sum(-1) + (values.sqrt() - 1).square().sum(-1)).sqrt()


def damping(args: argparse.Namespace) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    times, rows = torch.linspace(1e-4, 1, 2000, dtype=torch.float64), []
    for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
        process = CLD(damping=ratio)
        distances = distance_to_equilibrium(process, process.clock(times))
        kind = "critical" if ratio == 1 else "under-damped" if ratio < 1 else "over-damped"
        axis.semilogy(
            times, distances, label=f"Gamma = {ratio:g} x 2 sqrt(M), {kind}", linewidth=2.5 if ratio == 1 else 1
        )
        # The last time the distance is above: under-damped diffusions come back.
        reached = [float(times[distances > level].max()) for level in (0.1, 0.01)]
        words = ["not by t = 1" if t > 0.999 else f"{t:.3f}" for t in reached]
        rows.append([f"{ratio:g} ({kind})", *words, float(distances[-1])])
    print(table(["Gamma / (2 sqrt(M))", "t until W2 < 0.1", "t until W2 < 0.01", "W2 at t = 1"], rows))
    axis.set(xlabel="t", ylabel="W2 to equilibrium", title="from x0 = 1, M = 1/4, beta = 4")
    axis.legend(fontsize=8)
    save(figure, args.output / "cld_damping.png")


# --- Samplers on the digits ---


def exact_network(process: CLD, points: Tensor) -> Network:
    """The `velocity_score` of data that are `points`, through the lift of their exact denoiser."""
    denoiser = ExactDenoiser(points)

    def network(model_input: Tensor, timestep: Tensor) -> Tensor:
        x, v = model_input.chunk(2, 1)
        v = v * process.velocity_scale
        at = lift(process.marginal(process.clock(timestep.double() / 1000)))
        return at.velocity_score(x, v, denoiser(at.image(x, v)[0], float(at.sigma)))

    return network


def cld_arguments(args: argparse.Namespace, **options: Any) -> tr.TrainingArguments:
    return tr.TrainingArguments(method="cld", max_train_steps=args.steps, train_batch_size=args.batch, **options)


def train_cld(args: argparse.Namespace, name: str, **options: Any) -> tuple[Any, CLDSSCSScheduler]:
    """A velocity network on the digits, and the scheduler that describes it."""
    arguments = cld_arguments(args, **options)
    plan = plan_for_digits(arguments)
    scheduler = tr.build_scheduler(arguments, plan)
    return train_on_digits(arguments, tr.build_objective(arguments, plan, scheduler), name), scheduler


def as_network(unet: Any) -> Network:
    return lambda model_input, timestep: unet(model_input, timestep).sample


def ratio_to_floor(network: Network, scheduler: CLDSSCSScheduler, num_calls: int, args: argparse.Namespace) -> float:
    """Sliced W2 of samples, clipped as in the pipeline, to the training digits, over that of held-out digits."""
    train, held_out = split_digits()
    samples = draw(network, scheduler, (args.num_samples, 2, 8, 8), num_calls)
    if not args.unclipped:
        samples = samples.clamp(-1, 1)
    return sliced_wasserstein(samples, train) / sliced_wasserstein(held_out[: args.num_samples], train)


def samplers(args: argparse.Namespace) -> None:
    if args.model:
        pipeline = CLDPipeline.from_pretrained(args.model)
        unet, described = pipeline.unet, pipeline.scheduler
    else:
        unet, described = train_cld(args, "CLD")
    exact = CLDSSCSScheduler.from_config(described.config, prediction_type="velocity_score")
    models: dict[str, tuple[Network, CLDSSCSScheduler]] = {
        "exact denoiser": (exact_network(exact.process, split_digits()[0]), exact),
        "trained network": (as_network(unet), described),
    }
    print(
        f"sliced W2 to the training digits over the floor of held-out ones, n = {args.num_samples}"
        + (", samples not clipped" if args.unclipped else "")
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, (model, (network, scheduler)) in zip(axes, models.items(), strict=True):
        rows: list[list[Any]] = []
        best: dict[str, list[float]] = {}
        for name, config in SAMPLERS.items():
            for spacing in args.grids:
                changed = CLDSSCSScheduler.from_config(
                    scheduler.config, timestep_spacing=spacing, **({"algorithm_type": "sscs"} | config)
                )
                ratios = [ratio_to_floor(network, changed, n, args) for n in args.calls]
                rows.append([f"{name}, {spacing}", *ratios])
                print(f"  {model}, {rows[-1][0]}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}", flush=True)
                best[name] = [min(pair) for pair in zip(best.get(name, ratios), ratios, strict=True)]
                axis.loglog(args.calls, ratios, "-o", label=rows[-1][0], markersize=3)
        for name in ("sscs", "sscs, order 2"):
            gain = [em / ours for em, ours in zip(best["euler_maruyama"], best[name], strict=True)]
            rows.append([f"**Euler-Maruyama / {name}**, each at its best grid", *gain])
        print(table([model, *(f"{n} calls" for n in args.calls)], rows))
        axis.set(title=model, xlabel="network calls")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("sliced W2 over the floor")
    save(figure, args.output / "cld_samplers.png")


# --- Is the target easier? ---

TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


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


def jacobian_norm(network: Callable[[Tensor], Tensor], inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Frobenius norm of `d output / d input` over the square root of the number of outputs, one per image, `(B,)`.

    From one probe e per image: `E |J^T e|^2 = |J|^2`; inputs are of unit size, so it is the gain of a small change.
    """
    leaf = inputs.detach().requires_grad_()
    output = network(leaf)
    probe = torch.randn(output.shape, generator=generator)
    (slope,) = torch.autograd.grad(output, leaf, probe)
    return (slope.square().flatten(1).sum(1) / output[0].numel()).sqrt()


def target(args: argparse.Namespace) -> None:
    unet, scheduler = train_cld(args, "CLD")
    process = scheduler.process

    def vp_training(network: Callable[..., Any], images: Tensor) -> Tensor:
        times = tr.FIRST_TIME + (1 - tr.FIRST_TIME) * torch.rand(len(images), dtype=torch.float64)
        return vp_loss(network, images, times, torch.randn_like(images))

    # The same network for one image in place of image and velocity, and the same training.
    arguments = tr.TrainingArguments(max_train_steps=args.steps, train_batch_size=args.batch)
    vp = train_on_digits(arguments, vp_training, "VP")

    images, _ = split_digits()
    generator = torch.Generator().manual_seed(1)
    images = images[: args.num_samples]
    rows = []
    denoiser = ExactDenoiser(split_digits()[0])
    for t in TIMES:
        times = torch.full((len(images),), t, dtype=torch.float64)
        labels = (1000 * times).float()
        noise = torch.randn((len(images), 2, 8, 8), generator=generator)
        x, v = perturb(process, images, times, noise)
        state = torch.cat([x, v / process.velocity_scale], 1)
        at = lift(process.marginal(process.clock(torch.tensor(t))))
        kernel = process.marginal(process.clock(torch.tensor(t)))
        best_score = at.velocity_score(x, v, denoiser(at.image(x, v)[0], float(at.sigma)))
        best_cld = float((best_score * float(kernel.root[1, 1]) + noise[:, 1:]).square().mean())
        vp_images, deviation = vp_state(images, times, noise[:, 1:])
        sigma = float((deviation[0] / (1 - deviation[0] ** 2).sqrt()).squeeze())
        alpha = (1 + sigma**2) ** -0.5
        best_vp = float(
            ((vp_images / alpha - denoiser(vp_images / alpha, sigma)) / sigma - noise[:, 1:]).square().mean()
        )
        with torch.no_grad():
            loss_cld = float(cld_loss(lambda u, s: unet(u, s).sample, images, times, noise, process).mean())
            loss_vp = float(vp_loss(vp, images, times, noise[:, 1:]).mean())
        norms = [
            float(jacobian_norm(lambda u, f=f, s=labels: f(u, s).sample, u, generator).mean())  # type: ignore[misc]
            for f, u in ((unet, state), (vp, vp_images))
        ]
        rows.append([t, float(at.sigma), sigma, loss_cld, best_cld, loss_vp, best_vp, *norms])
    header = [
        "t",
        "noise level CLD",
        "noise level VP",
        "loss CLD",
        "least",
        "loss VP",
        "least",
        "Jacobian CLD",
        "Jacobian VP",
    ]
    print(table(header, rows))
    columns = list(zip(*rows, strict=True))
    mean = [sum(columns[i]) / len(rows) for i in range(3, 9)]
    print(
        f"mean over these times (CLD / VP): loss {mean[0]:.4f} / {mean[2]:.4f}, Jacobian {mean[4]:.3f} / {mean[5]:.3f}"
    )
    print(f"over the least possible loss: {mean[0] - mean[1]:.4f} / {mean[2] - mean[3]:.4f}")
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for column, (label, at_cld, at_vp) in enumerate((("t", 0, 0), ("noise level of the equivalent image", 1, 2))):
        for row, (quantity, of_cld, of_vp) in enumerate((("loss", 3, 5), ("Jacobian norm of the network", 7, 8))):
            axis = axes[row][column]
            axis.plot(columns[at_cld], columns[of_cld], "-o", label="CLD")
            axis.plot(columns[at_vp], columns[of_vp], "--s", label="VP")
            if quantity == "loss":
                axis.plot(columns[at_cld], columns[4], ":", color="C0", label="CLD, least possible")
                axis.plot(columns[at_vp], columns[6], ":", color="C1", label="VP, least possible")
            axis.set(xlabel=label, ylabel=quantity, yscale="log", xscale="log" if column else "linear")
            if quantity == "loss":
                axis.set_ylim(1e-5, 2)  # the least possible loss goes on down: the digits are points
            axis.legend(fontsize=8)
    save(figure, args.output / "cld_target.png")


# --- Robustness ---


def robustness(args: argparse.Namespace) -> None:
    """Other gamma and mass at the same beta.

    Mass and beta act through beta / sqrt(M) alone (the rest is the unit of velocity): a light mass gets further towards
    equilibrium by t = 1, a heavy one less far.
    """
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    settings = [(gamma, mass) for gamma in (0.04, 0.25, 1.0) for mass in (1 / 16, 1 / 4, 1.0)]
    if not args.full:
        settings = [(gamma, mass) for gamma, mass in settings if gamma == 0.04 or mass == 1 / 4]
    rows = []
    for gamma, mass in settings:
        name = f"gamma {gamma:g}, mass {mass:g}"
        unet, scheduler = train_cld(args, name, gamma=gamma, mass=mass)
        ratios = [ratio_to_floor(as_network(unet), scheduler, n, args) for n in args.calls]
        rows.append([f"{gamma:g}", f"{mass:g}", *ratios])
        axis.plot(args.calls, ratios, "-o", label=name)
    print(f"sliced W2 over the floor of held-out digits, n = {args.num_samples}, beta = 4, sscs")
    print(table(["gamma", "mass", *(f"{n} calls" for n in args.calls)], rows))
    axis.set(xlabel="network calls", ylabel="sliced W2 over the floor", xscale="log")
    axis.legend(fontsize=8)
    save(figure, args.output / "cld_robustness.png")


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


STUDIES = {f.__name__: f for f in (terminal, damping, samplers, target, robustness)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0], prog="python -m diffusers_gm.studies.cld"
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each training")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--num_samples", type=int, default=256, help="images per figure, at most 360")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS), help="numbers of network calls")
    parser.add_argument(
        "--grids", nargs="+", default=["quadratic", "log_snr"], choices=GRIDS, help="samplers: the grids"
    )
    parser.add_argument("--model", type=Path, help="samplers: a trained CLD pipeline, in place of a training")
    parser.add_argument("--unclipped", action="store_true", help="compare samples as they are, not clipped to [-1, 1]")
    parser.add_argument("--full", action="store_true", help="robustness: all nine settings in place of five")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"), help="folder of the pictures")
    args = parser.parse_args(arguments)
    print(f"{args.study}: {machine()}")
    STUDIES[args.study](args)


if __name__ == "__main__":
    main()
