"""Samplers of Gaussian-mixture score-based models: large jumps and small roaming."""

from typing import Literal

# A pipeline of diffusers that is saved with this scheduler names this module, and looks the base class up in it.
from diffusers import SchedulerMixin  # noqa: F401

from ..processes.mixture import GAUSSIAN
from ..samplers import Ancestral, Langevin, Sampler, TwoStep
from .base import SamplerScheduler
from .network import network_noise
from .options import with_common_options
from .scheduling_annealed_langevin import check_langevin, following


class GMLangevinScheduler(SamplerScheduler):
    """Sampling with Gaussian-mixture noise, for models trained on it and for ordinary models.

    `algorithm_type`:

    | | increments | order |
    |---|---|---|
    | `langevin` | annealed Langevin dynamics with Gaussian increments | as in `AnnealedLangevinScheduler` |
    | `jump` | Langevin steps whose noise is the mixture, `c_k` drawn anew for every step; same target | weak 1 |
    | `exponential` | as `jump`, integrated exactly for a frozen denoiser: stable for any jump | weak 1 |
    | `ancestral` | reverse mixture diffusion; the jump size is drawn from its posterior given the image | see below |
    | `ode` | probability flow, deterministic, two-step | 2 |

    The first three spend `num_langevin_steps` calls a level, the last two one. All end with the denoiser.
    With one component they are NCSNv2 (`langevin`, `jump`), the ancestral sampler and the ODE of ordinary models.

    Under mixture noise an image in component k is at the local noise level `c_k sigma`, and the first three measure
    their steps in it, as NCSNv2 measures its own in sigma: the network's `w = E[c^-2 | y]` makes it `sigma / sqrt(w)`.
    Langevin dynamics with a diffusion proportional to `1 / w(y)` and no correction for its gradient target `w p`
    instead of p: exactly the noisy data again, with the components' weights divided by `c_k^2`. A network that
    learned the score is itself misled about the component while a run lags behind the ladder: at small budgets,
    prefer one that learned the denoiser, or `ancestral` and `ode`.

    Args:
        mixture_weights, mixture_scales: the mixture, K numbers each; None: one component of scale 1. With
            `model_noise="mixture"` exactly the noise that the network was trained with.
        mixture_per_element: whether components are drawn per element rather than per image.
        model_noise: what the network was trained with. `gaussian`: any ordinary network; the mixture then only
            shapes the increments of `jump` and `exponential`, and leaves the target unchanged. `mixture`: the
            denoiser and the score are no longer the same function, and each sampler gets the one it needs.
        prediction_type: as in `AnnealedLangevinScheduler`. With mixture noise, `epsilon`, `sample` and `v_prediction`
            describe a denoiser, `score` and `scaled_score` a score; the other one is derived from it.
        step_order: of `ancestral`, and of Langevin samplers where the network is told where the chain is. 1: D is held
            over a step; `ancestral` is then, for ordinary networks, DDPM's sampler. 2: it is extrapolated from two
            calls to the middle of the step; `ancestral` is then SDE-DPM-Solver++(2M). What version 0.1.0 saved, which
            says nothing of it, is of 1.
        step_size: `eps` as in `AnnealedLangevinScheduler` for `langevin` and `jump` (Technique 4 generalised to jumps
            if None), and for `exponential`, where any positive value is stable.

    All other arguments: see `AnnealedLangevinScheduler`.

    Raises:
        ValueError: for a mixture that is not one; from `set_timesteps` for an unstable step (`a * c_max^2 >= 1` for
            jumps, `a >= 1` without), for a budget at which no stable step follows the ladder or, where the network is
            told where the chain is, the chain ends too far above it, and for too few calls.
    """

    reads_mixtures = True
    algorithms = ("ancestral", "langevin", "jump", "exponential", "ode")

    @with_common_options
    def __init__(
        self,
        mixture_weights: list[float] | None = None,
        mixture_scales: list[float] | None = None,
        mixture_per_element: bool = False,
        model_noise: Literal["gaussian", "mixture"] = "gaussian",
        num_langevin_steps: int = 1,
        step_size: float | None = None,
        step_size_criterion: Literal["prop3", "fixed_point"] | None = None,
        algorithm_type: Literal["langevin", "jump", "exponential", "ancestral", "ode"] = "ancestral",
        denoise: bool = True,
        network_level: Literal["ladder", "chain"] | None = None,
        step_order: int = 2,
    ):
        check_langevin(network_level, step_size_criterion, step_order)
        self.mixture, self.model_mixture = network_noise(self.config)
        if algorithm_type == "ode":
            self._setup(TwoStep(denoise))
        elif algorithm_type == "ancestral":
            self._setup(Ancestral(self.model_mixture, denoise, order=step_order))
        else:
            self._setup(
                Langevin(
                    num_langevin_steps,
                    step_size,
                    step_size_criterion,
                    denoise,
                    follow_chain=network_level == "chain",
                    jumps=GAUSSIAN if algorithm_type == "langevin" else self.mixture,
                    exact=algorithm_type == "exponential",
                    noise=self.model_mixture,
                    order=step_order,
                )
            )

    def _made_for(self, num_calls: int, own_levels: bool) -> Sampler:
        return following(self, own_levels)
