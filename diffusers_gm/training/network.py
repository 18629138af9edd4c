"""Network, scheduler, optimizer: everything that is built from the options."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ..autoencoders import downsampling, latent_channels
from ..data import Resolution, dequantized, resolution_of, sides
from ..networks import answers_variance, asked, channels_of, num_class_embeds, size_of, without_variance
from ..readings import Reading
from ..schedulers import AnnealedLangevinScheduler, GMLangevinScheduler
from ..schedulers.base import SamplerScheduler
from .classes import told
from .draws import Draws
from .methods import METHODS
from .methods.method import Batch
from .options import TrainingArguments, changed_options
from .plan import Plan


def given_unet(args: TrainingArguments) -> Any | None:
    """The network that the options name: pretrained (also in a pipeline) or from a config; None if none.

    For cld, an ordinary network is made to see velocities too.

    Raises:
        ValueError: if there is none, or it needs more than a noisy image and a timestep.
    """
    for option, folders in (("model_config", [None]), ("model_name_or_path", ["unet", "transformer", None])):
        name = getattr(args, option)
        if name is None:
            continue
        for folder in folders:
            kwargs = {"cache_dir": args.cache_dir, "subfolder": folder, "revision": args.revision}
            try:
                config = UNet2DModel.load_config(name, **kwargs)
            except OSError:
                continue
            cls = network_class(f"--{option} {name}", config, args.class_conditional)
            if option == "model_config":
                return cls.from_config(config)
            try:
                unet = cls.from_pretrained(name, variant=args.variant, **kwargs)
            except (OSError, ValueError) as error:
                raise ValueError(f"--{option} {name} cannot be loaded: {error}") from error
            return with_velocities(unet) if METHODS[args.method].input_factor(args) == 2 else unet
        raise ValueError(f"--{option} {name}: there is no network, neither in such a folder nor on the Hub")
    return None


def network_class(option: str, config: dict[str, Any], conditional: bool = False) -> Any:
    """The class that `config` names; a ValueError if its networks need more than a noisy image, a timestep and, if
    `conditional`, a class, which they must then know."""
    kind = config.get("_class_name", "UNet2DModel")
    cls: Any = getattr(diffusers, kind, None)
    is_network = inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)
    if not is_network:
        raise ValueError(f"{option} is a {kind}, which is no network of diffusers")
    _, _, *others = parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    needed = {p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if [p.name for p in parameters][1:2] != ["timestep"] or needed - {"encoder_hidden_states"}:
        raise ValueError(
            f"{option} is a {kind}: what is trained here is called with a noisy image and a timestep alone"
        )
    classes = [f"{name} = {config[name]!r}" for name in ("num_class_embeds", "class_embed_type") if config.get(name)]
    known = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if conditional and (not known or config.get("class_embed_type")):
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
    return cls


def with_velocities(unet: Any) -> Any:
    """An ordinary network, whose output is like its input, as one of `cat([x, v], 1)` that ignores v as yet.

    Others are returned as they are.
    """
    entering, answering = channels_of(unet)
    old = getattr(unet, "conv_in", None)
    if entering != answering or not isinstance(old, nn.Conv2d):
        return unet
    shape = old.out_channels, old.kernel_size, old.stride, old.padding
    new = nn.utils.skip_init(nn.Conv2d, 2 * entering, *shape)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :entering] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=2 * entering, out_channels=answering)
    return unet


def new_unet(
    args: TrainingArguments, resolution: Resolution, channels: int, num_class_embeds: int | None = None
) -> UNet2DModel:
    """A network of the described shape, or of one that suits the resolution."""
    height, width = sides(resolution)
    largest, small = max(height, width), max(height, width) <= 16
    widths = args.block_out_channels
    if widths is None:
        widths = [32, 64] if small else [64, 128, 256] if largest <= 64 else [128, 128, 256, 256, 512, 512]
    shorter = [min(height, width) // 2**level for level in range(len(widths))]
    attention = args.attention_resolutions
    if attention is None:
        attention = [] if small else [side for side in shorter if 8 <= side <= 16]
    unknown = sorted(set(attention) - set(shorter))
    if unknown:
        raise ValueError(f"--attention_resolutions {unknown} are no levels of the network: use any of {shorter}")
    down = tuple("AttnDownBlock2D" if side in attention else "DownBlock2D" for side in shorter)
    up = tuple("AttnUpBlock2D" if side in attention else "UpBlock2D" for side in reversed(shorter))
    head_dim = math.gcd(8, *widths)
    return UNet2DModel(
        sample_size=resolution_of(height, width),
        in_channels=METHODS[args.method].input_factor(args) * channels,
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


def native_shape(unet: Any, args: TrainingArguments, vae: Any = None) -> tuple[Resolution | None, int | None]:
    """Resolution and channels of the images that a network, or an autoencoder, is for; None where nothing says so.

    Raises:
        ValueError: for a network whose channels do not suit the method, or the autoencoder.
    """
    size = None
    if unet is not None:
        entering, answering = channels_of(unet)
        times, size = METHODS[args.method].input_factor(args), size_of(unet)
        known = (1, 3) if vae is None else (latent_channels(vae),)
        channels = entering // times
        # One that also answers a variance has twice as many.
        if entering != times * channels or answering not in {channels, channels * 2 // times} or channels not in known:
            needed = " or ".join(f"{times * c} channels to {c}" for c in known)
            unknown = "" if channels in known or vae else ": for latents, give their autoencoder with --vae"
            raise ValueError(
                f"--method {args.method} needs a network from {needed}, this one goes from {entering} to {answering}"
                + unknown
            )
    if vae is None:
        return size and resolution_of(*size), None if unet is None else channels
    factor = downsampling(vae)
    return size and resolution_of(factor * size[0], factor * size[1]), vae.config["in_channels"]


def fit_unet(unet: Any, args: TrainingArguments, resolution: Resolution) -> Any:
    """Make the network fit for training, in place: its image size, Technique 3, gradient checkpointing.

    Raises:
        ValueError: for a size that the network cannot have, or a network that does not do what is asked.
    """
    size = sides(resolution)
    levels = len(unet.config.get("block_out_channels") or [])
    if levels:
        factor = 2 ** (levels - 1)
        if any(side % factor for side in size):
            words = size[0] if size[0] == size[1] else f"{size[0]} {size[1]}"
            raise ValueError(
                f"--resolution {words} must be a multiple of {factor}, as the network has {levels} "
                "levels: set --resolution or --block_out_channels"
            )
        unet.register_to_config(sample_size=size[0] if size[0] == size[1] else list(size))
    elif size != size_of(unet):
        raise ValueError(
            f"a {type(unet).__name__} has the size that its config says, sample_size = {unet.config['sample_size']}, "
            f"and is to learn {size[0]}x{size[1]}: change one or the other"
        )
    if args.conditioning == "none":
        make_unconditional(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if not isinstance(unet, UNet2DModel):
        check_answer(unet, size)
    return unet


def check_answer(unet: Any, size: tuple[int, int]) -> None:
    """Raise a ValueError unless the network answers noisy images and timesteps by what is like an image."""
    entering, answering = channels_of(unet)
    name, training = type(unet).__name__, unet.training
    unet.eval()
    try:
        with torch.no_grad():
            sample = torch.zeros(2, entering, *size, device=unet.device)
            classes = None if num_class_embeds(unet) is None else torch.zeros(2, dtype=torch.int64, device=unet.device)
            answer = told(asked(unet), classes)(sample, torch.tensor([0.0, 1.5])).sample
    except Exception as error:  # whatever it misses
        raise ValueError(f"a {name} of this config does not run on a noisy image and a timestep: {error}") from error
    finally:
        unet.train(training)
    if answer.shape != (2, answering, *size):
        raise ValueError(f"a {name} of this config answers {tuple(answer.shape)} to {tuple(sample.shape)}")


def make_unconditional(unet: Any) -> None:
    """Technique 3 of NCSNv2: from now on the network ignores the timestep, here and wherever it is loaded.

    The last weight of the time embedding becomes zero and stays so; its bias remains to be learned.

    Raises:
        ValueError: for a network whose timestep enters elsewhere.
    """
    embedding = getattr(unet, "time_embedding", None)
    if embedding is None:
        raise ValueError(
            f"--conditioning none: a {type(unet).__name__} has no time embedding that could be switched off"
        )
    weight = embedding.linear_2.weight
    nn.init.zeros_(weight)
    weight.requires_grad_(False)


# What a schedule of betas is described by.
BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale")


def levels_of_network(args: TrainingArguments, unet: Any) -> tuple[TrainingArguments, dict[str, Any]]:
    """The options with the noise levels that a pretrained network knows, and what the scheduler's config needs of them.

    A network that was trained at the levels and labels of a beta schedule (DDPM) or of a ladder goes on with them: the
    input and the answer at a noise level are then what it has learned, and only the law of the noise may be new.

    Raises:
        ValueError: if options say other levels.
    """
    answers = {"variance_type": "learned_range"} if unet is not None and answers_variance(unet) else {}
    ours = (
        "sigma_min",
        "sigma_max",
        "sigma_data",
        "num_train_timesteps",
        "prediction_type",
        "objective",
        "scale_input",
    )
    method = METHODS[args.method]
    if args.model_name_or_path is None or not args.keep_noise_levels or "prediction_type" not in method.option_names:
        return args, answers
    try:
        config = GMLangevinScheduler.load_config(
            args.model_name_or_path, subfolder="scheduler", cache_dir=args.cache_dir, revision=args.revision
        )
        source = GMLangevinScheduler.from_config(config)
    except (OSError, ValueError):  # a network alone, or a scheduler that says nothing of noise levels
        return args, answers
    space, kind = source.noise_space, source.reading.prediction_type
    if space is None or not (kind == "edm" or (space.kind in ("vp", "ve") and kind != "score")):
        return args, answers
    given = [f"--{f.name}" for f in changed_options(args) if f.name in ours]
    if given:
        raise ValueError(
            f"{given}: the network of {args.model_name_or_path} has the noise levels, labels and prediction type of "
            "its scheduler; leave these out, or give --no_keep_noise_levels to learn others"
        )
    low, high = space.sigma(torch.tensor(space.timestep_range)).tolist()
    changes: dict[str, Any] = {"num_train_timesteps": str(space.num_train_timesteps), "scale_input": space.scale_input}
    changes |= {"sigma_min": float(f"{low:.6g}"), "sigma_max": f"{high:.6g}"}
    learned_score = (
        kind == "scaled_score" and "mixture_weights" in METHODS[args.method].option_names
    )  # of Gaussian noise, the two are the same
    changes |= {"objective": "score" if learned_score else "denoiser"}
    changes |= {"prediction_type": "epsilon" if kind == "scaled_score" else kind}
    changes |= {"sigma_data": space.sigma_data} if kind == "edm" else {}
    # How often each level is seen is chosen anew for what the network answers.
    changes |= dict.fromkeys(args.left_open & {"timestep_sampling", "p_mean", "p_std"})
    betas = {name: config[name] for name in BETAS if config.get(name) is not None} | {"noise_space": "vp"}
    return replace(args, **changes), answers | (betas if space.kind == "vp" else {})


def build_scheduler(args: TrainingArguments, plan: Plan, network: dict[str, Any] | None = None) -> Any:
    """The scheduler that describes the network and its noise, with the sampler's options.

    `network`: entries of its config that a pretrained network asks for.

    Raises:
        ValueError: if the sampler cannot run with `plan.validation_inference_steps` network calls.
    """
    sampler = {name: getattr(args, name) for name in ("algorithm_type", "timestep_spacing")}
    sampler = {name: value for name, value in sampler.items() if value is not None}
    scheduler = METHODS[args.method].scheduler(args, plan, sampler)
    if network:
        scheduler = type(scheduler).from_config(scheduler.config, **network)
    scheduler.set_timesteps(plan.validation_inference_steps)
    return scheduler


@dataclass(frozen=True)
class Objective:
    """What is minimised: `objective(network, images)` of `(B, C, H, W)` is one loss per image, `(B,)`.

    Levels and noise, that of `--dequantize` included, come from the third argument, by default from the global
    generators; the classes of a conditional network from the fourth, by default `null_class`. `unet` is the network
    itself, for those that are not called as a `UNet2DModel` is.
    """

    args: TrainingArguments
    plan: Plan
    scheduler: Any
    unet: Any = None
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
        if self.args.dequantize is not None:
            images = dequantized(images, self.args.dequantize, draws.noise.generator)
        network = told(self._as_denoiser(network, images.shape[1]), classes)
        batch = Batch(network, images, self.labels(draws.levels), draws.noise)
        return METHODS[self.args.method].loss(self.args, self.plan, self.scheduler, batch)

    def _as_denoiser(self, network: Callable[..., Any], channels: int) -> Callable[..., Any]:
        """The network as the losses call it, and without a variance that it answers besides."""
        if self.unet is None or (isinstance(self.unet, UNet2DModel) and not answers_variance(self.unet)):
            return network
        call = asked(network, self.unet)

        def answer(*inputs: Any, **named: Any) -> SimpleNamespace:
            return SimpleNamespace(sample=without_variance(call(*inputs, **named).sample, channels))

        return answer

    def labels(self, uniform: Tensor) -> Tensor:
        """Labels of noise levels, see `Method`."""
        return METHODS[self.args.method].labels(self.args, self.plan, uniform)

    def sigma(self, uniform: Tensor) -> Tensor:
        """The noise levels themselves, same shape, on the CPU; for cld those of the image in `(x, v)`."""
        return self.reading.sigma(self.labels(uniform))

    @cached_property
    def reading(self) -> Reading:
        """How the network sees noise."""
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
