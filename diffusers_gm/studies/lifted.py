"""An ordinary network under dynamics it was never trained for: `python -m diffusers_gm.studies.lifted`.

A DDPM of the digits, trained with diffusers' own objective, is sampled in diffusers' `DDPMPipeline` by our schedulers
(a critically-damped Langevin diffusion, annealed Langevin dynamics, jumps) and by diffusers' own.
"""

import argparse
from typing import Any, cast

import matplotlib.pyplot as plt
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

from ..cli import at_least
from ..evaluation.report import curve_table, plot_curves
from ..schedulers import AnnealedLangevinScheduler, CLDSSCSScheduler, GMLangevinScheduler
from .command import parse, study_parser
from .curves import measured
from .digits import images_of, kept_results, tie, trained
from .pictures import save_picture, show_rows
from .report import Report

MIXTURE = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.75, 1.62]}
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLD, sscs": (CLDSSCSScheduler, {"timestep_spacing": "log_snr"}),
    "CLD, probability flow": (CLDSSCSScheduler, {"timestep_spacing": "log_snr", "algorithm_type": "probability_flow"}),
    "annealed Langevin": (AnnealedLangevinScheduler, {"timestep_spacing": "log_snr"}),
    "annealed, consistent": (
        AnnealedLangevinScheduler,
        {"timestep_spacing": "log_snr", "algorithm_type": "consistent"},
    ),
    "GM, jump": (GMLangevinScheduler, {"timestep_spacing": "log_snr", "algorithm_type": "jump", **MIXTURE}),
    "GM, ode": (GMLangevinScheduler, {"timestep_spacing": "log_snr", "algorithm_type": "ode"}),
}
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDPM": (DDPMScheduler, {"timestep_spacing": "trailing"}),
    "DDIM": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "DPM-Solver++(2M)": (DPMSolverMultistepScheduler, {"use_exponential_sigmas": True}),
    "SDE-DPM-Solver++(2M)": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": True},
    ),
}


def lifted(args: argparse.Namespace) -> Report:
    schedulers, least = OURS | PEERS, tie(args.seeds)
    settings = {name: [kind.__name__, config] for name, (kind, config) in schedulers.items()}
    results = kept_results("lifted", args.num_samples, args.output, steps=args.steps, schedulers=settings)

    def pipeline(name: str, seed: int) -> DDPMPipeline:
        unet, source = trained(args.output, method="ddpm", max_train_steps=args.steps, seed=seed)
        kind, config = schedulers[name]
        return DDPMPipeline(unet, kind.from_config(source.config, clip_sample=False, **config))

    found = measured(results, schedulers, args.calls, args.seeds, pipeline)

    def best(names: dict, calls: int) -> tuple[float, str]:
        return min((value.mean, name) for name in names if (value := found[name][calls]))

    answers = []
    for calls in args.calls:
        (ours, our_name), (peer, peer_name) = best(OURS, calls), best(PEERS, calls)
        answers.append(
            f"{calls} calls: CLD {found['CLD, sscs'][calls]:.2f}, best of ours {ours:.2f} ({our_name}), "
            f"best of diffusers {peer:.2f} ({peer_name})"
        )
    last = max(args.calls)
    works = best({"CLD, sscs": OURS["CLD, sscs"]}, last)[0] < 1.5
    ahead = [c for c in args.calls if best(OURS, c)[0] < (1 - least) * best(PEERS, c)[0]]
    behind = [c for c in args.calls if best(OURS, c)[0] > (1 + least) * best(PEERS, c)[0]]

    figure = plt.figure(figsize=(11, 8), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1, 1.1)))
    axis = top.subplots()
    plot_curves(axis, found, 1, {name: {"linestyle": "--"} for name in PEERS})
    axis.set_ylabel("sliced W2 over the floor")
    axis.set_title("one DDPM network of the digits")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    shown_calls = 50 if 50 in args.calls else last
    shown = {name: images_of(pipeline(name, 0), shown_calls, 24)[0] for name in schedulers if found[name][shown_calls]}
    show_rows(bottom.subplots(), shown)
    bottom.suptitle(f"{shown_calls} network calls")
    picture = save_picture(figure, args.output / "lifted.png")
    return Report(
        "lifted",
        "An ordinary DDPM network as a critically-damped and as a Langevin model",
        "Does a network that diffusers' own recipe trained sample well under dynamics that it was never trained for, "
        "with no training and no change, in diffusers' own pipeline?",
        f"{'Yes' if works else 'Not well'}: " + "; ".join(answers) + f". Ours are more than {least:.0%} (the spread of "
        f"sampling) ahead at {', '.join(map(str, ahead)) or 'no number of'} calls, and more than that behind at "
        f"{', '.join(map(str, behind)) or 'none'}; the best of each are picked on the same samples.",
        [curve_table("Sliced W2 over the floor of held-out digits, in `DDPMPipeline`; ours in bold; `-` where there is "
                     "no stable step.", "scheduler", found, list(OURS))],
        [picture],
        f"Digits network of `make demo`'s size: DDPMScheduler, squared error of the noise, {args.steps} steps, average "
        f"of the weights; {args.seeds} seed(s) of training and sampling, n = {args.num_samples}; ± is the "
        "standard deviation. Grids: equal ratios of the noise level where a scheduler offers them, else trailing.",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("lifted", __doc__, ["lifted"])
    add = parser.add_argument
    add("--calls", type=at_least(2), nargs="+", default=[10, 20, 50, 200], help="numbers of network calls")
    args = parse(parser, argv, over_floor=["lifted"])
    lifted(args).write(args.output)


if __name__ == "__main__":
    main()
