"""Generation with critically-damped Langevin diffusion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ..processes.random import Generators
from ..schedulers import CLDSSCSScheduler
from .cld_ode import ODE_SOLVERS, network_model, solve, start_and_ends
from .unconditional import CALLBACK_TENSORS, UnconditionalPipeline


@dataclass
class ODEPipelineOutput(ImagePipelineOutput):
    """Images, and what they cost.

    Attributes:
        num_network_calls: calls that the adaptive solver made for the batch, rejected steps and the
            final denoising included.
    """

    num_network_calls: int


class CLDPipeline(UnconditionalPipeline):
    """Generation with critically-damped Langevin diffusion (arXiv 2112.07068).

    Args:
        unet: a velocity network from `cat([x, v / sqrt(M)], 1)`, `(B, 2C, H, W)`, and a timestep to `(B, C, H, W)`
            (native mode: the sample, `latents` included, is `cat([x, v], 1)`, and the image is x); or an ordinary
            network, whose output has the shape of its input (lifted mode).
        scheduler: a `CLDSSCSScheduler` that describes the network. For an ordinary network any other scheduler that
            suits its noise space works too.

    Raises:
        ValueError: from the call, for a network whose channels do not suit the scheduler's `prediction_type`.
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        *,
        ode_solver: str | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        **arguments: Any,
    ) -> ImagePipelineOutput | tuple:
        """Generate images, by the sampler of the scheduler or by an adaptive ODE solver.

        With `ode_solver` the probability flow is solved to a tolerance, and the solver chooses its steps; the
        scheduler then only describes the model, and its `algorithm_type` and grid have no say. One grid of steps
        serves the whole batch, that of its most difficult image: a batch of 4 agrees with two of 2 within the
        tolerance, not to the bit, and costs as many calls as the worse of them. The generator decides the start, and
        classes that are not given.

        Args:
            batch_size, num_inference_steps, generator, latents, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs: as in the other pipelines; `num_inference_steps` and the callback
                not with `ode_solver`, which has no steps to count.
            ode_solver: `dopri5`, `dopri8`, `bosh3` or `adaptive_heun` of torchdiffeq (the extra `ode`);
                None: the scheduler's sampler.
            rtol, atol: tolerances of a step, on x and `v / sqrt(M)`, both of size 1: relative and absolute, root mean
                square over an image; 1e-4 by default.
            arguments: `class_labels`, `guidance_scale`, `guidance_interval`, `height` and `width`, and without
                `ode_solver` `image`, `strength`, `mask_image` and `num_resamples`, as in the other pipelines.

        Returns:
            An `ImagePipelineOutput`, with `ode_solver` an `ODEPipelineOutput`, which has `num_network_calls` too; or
            the same as a tuple.

        Raises:
            ValueError: for any argument out of range, or that does not go with `ode_solver`.
            ImportError: for `ode_solver` without torchdiffeq.
            RuntimeError: if the solver cannot keep the tolerances, or the network's output is not finite.
        """
        if ode_solver is None:
            if rtol is not None or atol is not None:
                raise ValueError(f"rtol={rtol} and atol={atol} are those of an ode_solver: give one of {ODE_SOLVERS}")
            return super().__call__(
                batch_size,
                num_inference_steps,
                generator,
                latents,
                output_type,
                return_dict,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                **arguments,
            )
        rtol, atol = (1e-4 if tolerance is None else tolerance for tolerance in (rtol, atol))
        labels, scale = arguments.pop("class_labels", None), arguments.pop("guidance_scale", 1.0)
        interval, *size = (arguments.pop(name, None) for name in ("guidance_interval", "height", "width"))
        counted = {"num_inference_steps": num_inference_steps, "callback_on_step_end": callback_on_step_end}
        others = [name for name, value in counted.items() if value is not None]
        self._check_ode(ode_solver, rtol, atol, [*others, *arguments])
        batch_size = self._batch_size(batch_size, labels, latents)
        shape = self._checked_shape(batch_size, generator, latents, output_type, *size)
        guidance = self._guidance(batch_size, labels, scale, interval, partial(self.draw_labels, batch_size, generator))

        num_network_calls = 0

        def network(model_input: Tensor, label: Tensor) -> Tensor:
            nonlocal num_network_calls
            num_network_calls += 1
            return guidance.output(self._network, model_input, label)

        model = network_model(self.scheduler, network)
        x, v, clocks = start_and_ends(self.scheduler, shape, latents, generator, self._execution_device)
        _, image = model(*solve(self.scheduler, model, x, v, clocks, ode_solver, rtol, atol), clocks[-1])
        images = self._finished(image.float(), output_type)
        return ODEPipelineOutput(images, num_network_calls) if return_dict else (images, num_network_calls)

    def _check_ode(self, solver: str, rtol: float, atol: float, others: list[str]) -> None:
        if solver not in ODE_SOLVERS:
            raise ValueError(f"unknown ode_solver {solver!r}: use one of {ODE_SOLVERS}")
        if others:
            raise ValueError(
                f"{', '.join(others)} does not go with ode_solver={solver!r}, whose steps are its own: leave it out"
            )
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not isinstance(self.scheduler, CLDSSCSScheduler):
            raise ValueError(
                f"ode_solver needs a CLDSSCSScheduler, which knows the diffusion; this is a "
                f"{type(self.scheduler).__name__}: use CLDSSCSScheduler.from_config(pipe.scheduler.config)"
            )
