"""Is the network still one? A training that diverged must end, and never take the place of what was good before."""

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .draws import Draws
from .folder import list_checkpoints
from .objective import Objective
from .optimizer import averaged_weights

# A network whose loss is this many times that of one that answers zero, on the same images under the same noise, is
# not coming back; what is far below it still may.
WORSE_THAN_SILENCE = 1000.0

# GradScaler starts at 2^16 and halves at each gradient that is not finite.
SMALLEST_SCALE = 2.0**-20


class DivergedError(RuntimeError):
    """The network is none any more: what to change is in the message."""


@dataclass
class Health:
    """Ends a training at the step at which its network diverges. All processes come to the same decision.

    Attributes:
        images: some of the training images, `(B, C, H, W)` on the device, the same in all processes.
        folder: where the training's checkpoints are.
        learning_rate: its peak.
        norms: of gradients that are not looked at yet, with their steps.
    """

    accelerator: Accelerator
    unet: nn.Module
    ema: EMAModel | None
    objective: Objective
    images: Tensor
    folder: Path
    learning_rate: float
    norms: deque[tuple[int, Tensor, torch.cuda.Event | None]] = field(default_factory=deque)

    def note_gradient(self, step: int, norm: Tensor | None) -> None:
        """Take the norm of a step's gradient, over all processes; on a GPU it is looked at during the next step, as
        reading it at once would wait. Where nothing can be read without waiting, it is read with the losses.

        Under fp16 a norm that is not finite is no fault: the step is skipped, and the loss scaled down.
        """
        if norm is None or self.accelerator.scaler is not None:
            return
        lag, event = {"cpu": 0, "cuda": 1}.get(norm.device.type, math.inf), None
        if norm.device.type == "cuda":
            norm, event = norm.detach().to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.norms.append((step, norm.detach(), event))
        self._look_at_gradients(but=lag)

    def check_loss(self, step: int, loss: float) -> None:
        """Raise a DivergedError if a gradient up to `step`, or the loss since the last look, is not finite."""
        self._look_at_gradients()
        if not math.isfinite(loss):
            raise self._diverged(step, f"the loss is {loss}")
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
            raise self._diverged(step, f"the gradient is not finite even for losses scaled by {scaler.get_scale():g}")

    def check_network(self, step: int) -> None:
        """Raise a DivergedError if the network, or the average, should not be saved.

        Their weights must be finite, and so must their losses, up to `WORSE_THAN_SILENCE` times that of a network
        that answers zero. Costs two forward passes, and no random numbers.
        """
        averages = {"weights": None, "averaged weights": self.ema} if self.ema else {"weights": None}
        # As one tensor: a single wait for the device, and one decision for all processes.
        measured = torch.stack([self._measure(ema) for ema in averages.values()])
        figures = self.accelerator.reduce(measured, "mean").tolist()
        for name, (norm, loss, silence) in zip(averages, figures, strict=True):
            if not math.isfinite(norm):
                raise self._diverged(step, f"the {name} have norm {norm}")
            if not loss <= WORSE_THAN_SILENCE * max(silence, 1):
                raise self._diverged(step, f"the {name} have loss {loss:.3g}, a network that answers 0 {silence:.3g}")

    @torch.no_grad()
    def _measure(self, ema: EMAModel | None) -> Tensor:
        """Norm of the weights, loss of the network and of silence, `(3,)`."""

        def silence(*_: Tensor, **__: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.zeros_like(self.images))

        with averaged_weights(self.unet, ema):
            losses = [
                self.objective(network, self.images, Draws.always_the_same(self.images)).mean().float()
                for network in (self.unet, silence)
            ]
            norm = torch.nn.utils.get_total_norm(list(self.unet.parameters())).float()
        return torch.stack([norm, *losses])

    def _look_at_gradients(self, but: float = 0) -> None:
        while len(self.norms) > but:
            step, norm, event = self.norms.popleft()
            if event is not None:
                event.synchronize()
            if not math.isfinite(norm):
                raise self._diverged(step, f"the norm of the gradient is {float(norm)}")

    def _diverged(self, step: int, what: str) -> DivergedError:
        checkpoints = list_checkpoints(self.folder)
        good = f"{checkpoints[-1].name} is the last good one" if checkpoints else "there is no checkpoint of before"
        precision = self.accelerator.mixed_precision
        other = "" if precision == "no" else f", or resume with --mixed_precision no in place of {precision}"
        return DivergedError(
            f"{what} at step {step}: the network has diverged, and was not saved; {good}. Start anew with a "
            f"--learning_rate below {self.learning_rate:g} or a smaller --max_grad_norm{other}"
        )
