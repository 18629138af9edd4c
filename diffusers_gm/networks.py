"""Networks of diffusers as `(sample, timestep, class labels) -> output`, whatever else they take or answer."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def as_unet_call(network: Callable[..., Any], described_by: Any = None) -> Callable[..., Any]:
    """A network to be called as a `UNet2DModel` is: `(sample, timestep, class_labels=None)`, the output as `.sample`.

    Timesteps may be one for all images or one for each; a network with classes that is given no labels is asked for
    the class that stands for none, and one that takes a text gets none. A `UNet2DModel` is returned as it is.

    Args:
        network: the network, or what runs it.
        described_by: the network itself, where `network` is what runs it (several processes, compiled).
    """
    described = network if described_by is None else described_by
    null = null_class(described)
    parameters = inspect.signature(getattr(described, "forward", described)).parameters
    fixed = {"encoder_hidden_states": None} if "encoder_hidden_states" in parameters else {}
    if null is None and not fixed:
        return network

    def call(sample: Tensor, timestep: Any, class_labels: Tensor | None = None, **others: Any) -> Any:
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if null is not None and class_labels is None:
            class_labels = torch.full((len(sample),), null, device=sample.device)
        if class_labels is not None:
            others["class_labels"] = class_labels
        return network(sample, timesteps, **fixed, **others)

    return call


def null_class(unet: Any) -> int | None:
    """The label that stands for no class, in a `DiTTransformer2DModel`, which always wants one; else None."""
    return unet.config["num_embeds_ada_norm"] if "num_embeds_ada_norm" in getattr(unet, "config", {}) else None


def num_class_embeds(unet: Any) -> int | None:
    """How many labels a network knows, that for no class among them; None of one without classes."""
    null = null_class(unet)
    return unet.config.get("num_class_embeds") if null is None else null + 1


def channels_of(unet: Any) -> tuple[int, int]:
    """Channels that enter a network, and those that leave it."""
    entering = unet.config["in_channels"]
    return entering, unet.config["out_channels"] or entering


def answers_variance(unet: Any) -> bool:
    """Whether the second half of a network's output is a variance."""
    entering, answering = channels_of(unet)
    return answering == 2 * entering


def size_of(unet: Any) -> tuple[int, int] | None:
    """Height and width of what a network is for; None where its config does not say."""
    size = unet.config.get("sample_size")
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def images_at_once(most: int, channels: int, height: int, width: int) -> int:
    """How many images a network is given at once to measure it: `most` small ones, of large ones fewer, at least 4."""
    return min(most, max(4, 2**18 // (channels * height * width)))


def without_variance(output: Tensor, channels: int) -> Tensor:
    """The first half of an output `(B, 2C, ...)` of a network that answers a variance too; of C channels, all."""
    return output[:, :channels] if output.shape[1] == 2 * channels else output
