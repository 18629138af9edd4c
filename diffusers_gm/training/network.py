"""Network, scheduler, optimizer: everything that is built from the options."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ..likelihood import dequantized
from ..losses import cld_loss, denoising_loss
from ..processes.cld import CLD
from ..schedulers import AnnealedLangevinScheduler, CLDSSCSScheduler, GMLangevinScheduler
from .options import TrainingArguments, build_mixture
from .plan import Plan

# CLD is trained on times from here to 1 (arXiv 2112.07068).
FIRST_TIME = 1e-5


def given_unet(args: TrainingArguments) -> UNet2DModel | None:
    """The network that the options name: pretrained (also in a pipeline) or from a config; None if none."""
    kwargs = {"cache_dir": args.cache_dir}
    if args.model_config is not None:
        return UNet2DModel.from_config(UNet2DModel.load_config(args.model_config, **kwargs))
    if args.model_name_or_path is None:
        return None
    try:
        return UNet2DModel.from_pretrained(args.model_name_or_path, subfolder="unet", **kwargs)
    except OSError:
        return UNet2DModel.from_pretrained(args.model_name_or_path, **kwargs)


def new_unet(args: TrainingArguments, resolution: int, channels: int) -> UNet2DModel:
    """A network of the described shape, or of one that suits the resolution; for CLD from images and velocities."""
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
        in_channels=2 * channels if args.method == "cld" else channels,
        out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(widths),
        layers_per_block=args.layers_per_block or (1 if small else 2),
        norm_num_groups=math.gcd(32, *widths),
        attention_head_dim=head_dim,
        dropout=args.dropout,
    )


def native_shape(unet: UNet2DModel | None, method: str) -> tuple[int | None, int | None]:
    """Side and channels of the images that a network is for; None where nothing says so.

    Raises:
        ValueError: for a network whose channels do not suit the method.
    """
    if unet is None:
        return None, None
    size, entering, channels = (unet.config[name] for name in ("sample_size", "in_channels", "out_channels"))
    times = 2 if method == "cld" else 1
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
    config: dict[str, Any] = {"num_train_timesteps": plan.num_train_timesteps}
    for name in ("algorithm_type", "timestep_spacing"):
        if getattr(args, name) is not None:
            config[name] = getattr(args, name)
    scheduler: Any
    if args.method == "cld":
        # A trained digits network at 10 and 15 calls: 1.43 and 1.23 times the floor, with log_snr 1.68 and 1.30.
        scheduler = CLDSSCSScheduler(
            **{"timestep_spacing": "quadratic"} | config,
            prediction_type="cld_mixed" if args.cld_mixed_score else "scaled_velocity_score",
            beta_0=args.beta_0,
            beta_1=args.beta_1,
            mass=args.mass,
            gamma=args.gamma,
            splitting_order=args.splitting_order,
        )
        scheduler.set_timesteps(plan.validation_inference_steps)
        return scheduler
    config |= {
        "noise_space": "ve",
        "sigma_min": args.sigma_min,
        "sigma_max": plan.sigma_max,
        "scale_input": args.scale_input,
        "num_langevin_steps": args.num_langevin_steps,
        "step_size": args.step_size,
        "step_size_criterion": args.step_size_criterion,
    }
    if args.method == "ncsnv2":
        scheduler = AnnealedLangevinScheduler(**config, prediction_type=args.prediction_type)
    else:
        scheduler = GMLangevinScheduler(
            **config,
            prediction_type="scaled_score" if args.objective == "score" else args.prediction_type,
            mixture_weights=plan.mixture_weights,
            mixture_scales=plan.mixture_scales,
            mixture_per_element=args.mixture_per_element,
            model_noise="mixture",
        )
    scheduler.set_timesteps(plan.validation_inference_steps)
    return scheduler


TrainingLoss = Callable[[Callable[..., Any], Tensor], Tensor]


def build_objective(args: TrainingArguments, plan: Plan, scheduler: Any) -> TrainingLoss:
    """What is minimised: `objective(network, images)` of `(B, C, H, W)` is one loss per image, `(B,)`.

    It draws times and noise, that of `--dequantize` included, from the global generator of the images' device.
    """

    def mixture_objective(network: Callable[..., Any], images: Tensor) -> Tensor:
        timesteps = torch.randint(0, plan.num_train_timesteps, (len(images),), device=images.device)
        noise = mixture.sample(images.shape, device=images.device)
        space, kind = scheduler.noise_space, scheduler.config["prediction_type"]
        return denoising_loss(lambda x, t: network(x, t).sample, images, timesteps, noise, space, mixture, kind)

    def cld_objective(network: Callable[..., Any], images: Tensor) -> Tensor:
        process: CLD = scheduler.process
        uniform = torch.rand(len(images), dtype=torch.float64, device=images.device)
        x, v = torch.randn((2, *images.shape), device=images.device)
        initial = torch.randn_like(images) * (process.gamma * process.mass) ** 0.5 if args.cld_loss == "dsm" else None
        return cld_loss(
            lambda u, t: network(u, t).sample,
            images,
            FIRST_TIME + (1 - FIRST_TIME) * uniform,
            torch.cat([x, v], 1),
            process,
            scheduler.config["prediction_type"],
            initial,
            cast(Any, args.cld_weighting),
            plan.num_train_timesteps,
        )

    def dequantized_objective(network: Callable[..., Any], images: Tensor) -> Tensor:
        return objective(network, dequantized(images, cast(int, args.dequantize)))

    mixture = build_mixture(args)
    objective = cld_objective if args.method == "cld" else mixture_objective
    return objective if args.dequantize is None else dequantized_objective


def build_optimizer(args: TrainingArguments, plan: Plan, unet: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in unet.parameters() if p.requires_grad],
        lr=plan.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )


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
