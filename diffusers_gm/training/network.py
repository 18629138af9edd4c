"""Network, scheduler, optimizer: everything that is built from the options."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ..data import dequantized
from ..readings import Reading
from ..schedulers import AnnealedLangevinScheduler
from ..schedulers.base import SamplerScheduler
from .classes import told
from .draws import Draws
from .methods import METHODS
from .options import TrainingArguments
from .plan import Plan


def given_unet(args: TrainingArguments) -> UNet2DModel | None:
    """The network that the options name: pretrained (also in a pipeline) or from a config; None if none.

    Raises:
        ValueError: if there is none, or it needs more than a noisy image and a timestep.
    """
    for option, folders in (("model_config", [None]), ("model_name_or_path", ["unet", None])):
        name = getattr(args, option)
        if name is None:
            continue
        for folder in folders:
            kwargs = {"cache_dir": args.cache_dir, "subfolder": folder}
            try:
                config = UNet2DModel.load_config(name, **kwargs)
            except OSError:
                continue
            check_usable(f"--{option} {name}", config, args.class_conditional)
            if option == "model_config":
                return UNet2DModel.from_config(config)
            return UNet2DModel.from_pretrained(name, **kwargs)
        raise ValueError(f"--{option} {name}: there is no UNet2DModel, neither in such a folder nor on the Hub")
    return None


def check_usable(option: str, config: dict[str, Any], conditional: bool = False) -> None:
    """Raise a ValueError if the network that `config` describes needs more than a noisy image, a timestep and, if
    `conditional`, a class, which it must then know."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"{option} is a {kind}: what is trained here is a UNet2DModel, of images without a prompt")
    classes = [f"{name} = {config[name]!r}" for name in ("num_class_embeds", "class_embed_type") if config.get(name)]
    if conditional and (not config.get("num_class_embeds") or config.get("class_embed_type")):
        raise ValueError(
            f"{option} is a network without num_class_embeds, and does not know the classes of --class_conditional: "
            "leave that out, or train a new network"
        )
    if classes and not conditional:
        raise ValueError(
            f"{option} needs a class for every image ({', '.join(classes)}), and images have none here: "
            "add --class_conditional, or take a network without"
        )
    embedding = config.get("time_embedding_type", "positional")
    if embedding != "positional":
        raise ValueError(
            f"{option} has time_embedding_type = {embedding!r}, which does not take all timesteps between 0 and "
            "num_train_timesteps: take a network with 'positional'"
        )


def new_unet(
    args: TrainingArguments, resolution: int, channels: int, num_class_embeds: int | None = None
) -> UNet2DModel:
    """A network of the described shape, or of one that suits the resolution."""
    small = resolution <= 16
    widths = args.block_out_channels
    if widths is None:
        widths = [32, 64] if small else [64, 128, 256] if resolution <= 64 else [128, 128, 256, 256, 512, 512]
    sides = [resolution // 2**level for level in range(len(widths))]
    attention = args.attention_resolutions
    if attention is None:
        attention = [] if small else [side for side in sides if 8 <= side <= 16]
    unknown = sorted(set(attention) - set(sides))
    if unknown:
        raise ValueError(f"--attention_resolutions {unknown} are no levels of the network: use any of {sides}")
    down = tuple("AttnDownBlock2D" if side in attention else "DownBlock2D" for side in sides)
    up = tuple("AttnUpBlock2D" if side in attention else "UpBlock2D" for side in reversed(sides))
    head_dim = math.gcd(8, *widths)
    return UNet2DModel(
        sample_size=resolution,
        in_channels=METHODS[args.method].input_factor * channels,
        out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(widths),
        layers_per_block=args.layers_per_block or (1 if small else 2),
        norm_num_groups=math.gcd(32, *widths),
        attention_head_dim=head_dim,
        dropout=args.dropout,
        num_class_embeds=num_class_embeds,
    )


def native_shape(unet: UNet2DModel | None, method: str) -> tuple[int | None, int | None]:
    """Side and channels of the images that a network is for; None where nothing says so.

    Raises:
        ValueError: for a network whose channels do not suit the method.
    """
    if unet is None:
        return None, None
    size, entering, channels = (unet.config[name] for name in ("sample_size", "in_channels", "out_channels"))
    times = METHODS[method].input_factor
    if channels not in (1, 3) or entering != times * channels:
        raise ValueError(
            f"--method {method} needs a network from {times} or {3 * times} channels to 1 or 3, "
            f"this one goes from {entering} to {channels}"
        )
    return (size if isinstance(size, int) else None), channels


def fit_unet(unet: UNet2DModel, args: TrainingArguments, resolution: int) -> UNet2DModel:
    """Make the network fit for training, in place: its image size, Technique 3, gradient checkpointing."""
    factor = 2 ** (len(unet.config["block_out_channels"]) - 1)
    if resolution % factor:
        raise ValueError(
            f"--resolution {resolution} must be a multiple of {factor}, as the network has "
            f"{len(unet.config['block_out_channels'])} levels: set --resolution or --block_out_channels"
        )
    unet.register_to_config(sample_size=resolution)
    if args.conditioning == "none":
        make_unconditional(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    return unet


def make_unconditional(unet: UNet2DModel) -> None:
    """Technique 3 of NCSNv2: from now on the network ignores the timestep, here and wherever it is loaded.

    The last weight of the time embedding becomes zero and stays so; its bias remains to be learned.
    """
    weight = unet.time_embedding.linear_2.weight
    nn.init.zeros_(weight)
    weight.requires_grad_(False)


def build_scheduler(args: TrainingArguments, plan: Plan) -> Any:
    """The scheduler that describes the network and its noise, with the sampler's options.

    Raises:
        ValueError: if the sampler cannot run with `plan.validation_inference_steps` network calls.
    """
    sampler = {name: getattr(args, name) for name in ("algorithm_type", "timestep_spacing")}
    sampler = {name: value for name, value in sampler.items() if value is not None}
    scheduler = METHODS[args.method].scheduler(args, plan, sampler)
    scheduler.set_timesteps(plan.validation_inference_steps)
    return scheduler


@dataclass(frozen=True)
class Objective:
    """What is minimised: `objective(network, images)` of `(B, C, H, W)` is one loss per image, `(B,)`.

    Levels and noise, that of `--dequantize` included, come from the third argument, by default from the global
    generators; the classes of a conditional network from the fourth, by default `null_class`.
    """

    args: TrainingArguments
    plan: Plan
    scheduler: Any
    null_class: int | None = None

    def __call__(
        self,
        network: Callable[..., Any],
        images: Tensor,
        draws: Draws | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        draws = draws or Draws.of(images)
        if classes is None and self.null_class is not None:
            classes = torch.full((len(images),), self.null_class, device=images.device)
        network = told(network, classes)
        if self.args.dequantize is not None:
            images = dequantized(images, self.args.dequantize, draws.noise.generator)
        loss = METHODS[self.args.method].loss
        return loss(self.args, self.plan, self.scheduler, network, images, self.labels(draws.levels), draws.noise)

    def labels(self, uniform: Tensor) -> Tensor:
        """Labels of noise levels, see `Method`."""
        return METHODS[self.args.method].labels(self.args, self.plan, uniform)

    def sigma(self, uniform: Tensor) -> Tensor:
        """The noise levels themselves, same shape, on the CPU; for cld those of the image in `(x, v)`."""
        return self._reading.sigma(self.labels(uniform))

    @cached_property
    def _reading(self) -> Reading:
        ours = isinstance(self.scheduler, SamplerScheduler)
        return (self.scheduler if ours else AnnealedLangevinScheduler.from_config(self.scheduler.config)).reading


def build_optimizer(args: TrainingArguments, plan: Plan, unet: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": plan.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    parameters = [p for p in unet.parameters() if p.requires_grad]
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def build_lr_scheduler(args: TrainingArguments, plan: Plan, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The schedule, to be stepped once per optimizer step, whatever the number of processes."""
    if args.lr_scheduler != "one_cycle":
        return get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=plan.lr_warmup_steps,
            num_training_steps=plan.max_train_steps,
        )
    # PyTorch divides by the length of either half less one.
    total_steps = max(plan.max_train_steps, 4)
    return OneCycleLR(
        optimizer,
        max_lr=plan.learning_rate,
        total_steps=total_steps,
        pct_start=max(plan.lr_warmup_steps, 2) / total_steps,
        cycle_momentum=False,  # --adam_beta1 is what it says
    )


def build_ema(args: TrainingArguments, unet: nn.Module, device: torch.device) -> EMAModel | None:
    """The moving average of the weights (Technique 5 of NCSNv2), if wanted."""
    if not args.use_ema:
        return None
    ema = EMAModel(
        unet.parameters(),
        decay=args.ema_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
    ema.to(device)
    return ema


def check_precision(accelerator: Accelerator) -> None:
    """Raise a ValueError for fp16 on a CPU, where accelerate, by an option or its own settings, would take fp32."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "--mixed_precision fp16 needs a GPU: on a CPU use bf16 or no (it may also come from accelerate's settings)"
        )


@contextmanager
def averaged_weights(unet: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Inside, `unet` is in evaluation mode and has the averaged weights."""
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    unet.eval()
    try:
        yield
    finally:
        unet.train()
        if ema is not None:
            ema.restore(unet.parameters())
