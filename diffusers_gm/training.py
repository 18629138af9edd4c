"""What `train_gm_sgm.py` is made of: options, what they come to for given data, checkpoints, sample grids."""

import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from .data import Examination
from .losses import PREDICTION_TYPE
from .pipelines import GMSGMPipeline, NCSNv2Pipeline
from .processes.annealed import ladder_length, max_pairwise_distance
from .processes.mixture import GaussianMixtureNoise
from .schedulers import AnnealedLangevinScheduler, GMLangevinScheduler
from .version import __version__

PIPELINES = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline}

CHECKPOINT = "checkpoint-"
STATE_FILE = "training_state.json"
ARGS_FILE = "training_args.json"
LOG_FILE = "training_log.jsonl"


# --- Options ---


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingArguments:
    """The options of `train_gm_sgm.py`, named as in diffusers' training examples wherever these have them."""

    # What is trained
    method: Literal["gm-sgm", "ncsnv2"] = option("gm-sgm", "Gaussian-mixture noise, or NCSNv2's Gaussian noise.")
    objective: Literal["denoiser", "score"] = option(
        "denoiser", "What the network learns under mixture noise; for ncsnv2 the two are the same."
    )
    conditioning: Literal["sigma", "none"] = option(
        "sigma", "Whether the network is told the noise level; 'none' is Technique 3 of NCSNv2."
    )
    scale_input: bool = option(True, "Feed the network y / sqrt(1 + sigma^2) rather than the noisy image y.")

    # Data
    dataset_name: str | None = option(
        None, "'digits' (8x8, comes with scikit-learn; the default) or a data set of the Hub."
    )
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.")
    train_data_dir: str | None = option(None, "Folder of images or of parquet files, in place of --dataset_name.")
    image_column: str | None = option(None, "Column with the images; default 'image' or 'img'.")
    cache_dir: str | None = option(None, "Where downloaded data sets and models are kept.")
    resolution: int | None = option(None, "Side of the training images; default that of the data.")
    center_crop: bool = option(False, "Crop images that are not square at the centre rather than at random.")
    random_flip: bool = option(False, "Flip images horizontally at random.")
    max_train_samples: int | None = option(None, "Train on this many images only, chosen by --seed.")
    dataloader_num_workers: int = option(0, "Processes that load the data; 0 loads them in the main process.")

    # Network
    model_name_or_path: str | None = option(None, "UNet2DModel or pipeline to fine-tune, a folder or on the Hub.")
    model_config: str | None = option(None, "Config of a UNet2DModel to train from scratch, a JSON file or its folder.")
    block_out_channels: list[int] | None = option(  # noqa: RUF009
        None, "Channels of each level; default chosen by --resolution."
    )
    layers_per_block: int | None = option(None, "Residual layers of each level; default 1 up to 16 pixels, else 2.")
    attention_resolutions: list[int] | None = option(  # noqa: RUF009
        None,
        "Image sides at which levels have attention; default 8 to 16, none for images of at most 16 pixels.",
    )
    dropout: float = option(0.0, "Dropout of the residual layers.")
    gradient_checkpointing: bool = option(False, "Save memory by computing activations twice.")

    # Noise
    mixture_weights: list[float] | None = option(None, "gm-sgm: probabilities of the components.")  # noqa: RUF009
    mixture_scales: list[float] | None = option(  # noqa: RUF009
        None, "gm-sgm: their scales, which are normalised to E[c^2] = 1."
    )
    stable_alpha: float | None = option(None, "gm-sgm: use the quantised alpha-stable law of this index instead.")
    power_alpha: float | None = option(None, "gm-sgm: tail index of the power-law mixture, the default kind (1.5).")
    power_base: float | None = option(None, "gm-sgm: ratio of neighbouring scales of the power-law mixture (2).")
    num_components: int | None = option(None, "gm-sgm: components of the stable or power-law mixture (2).")
    mixture_per_element: bool = option(False, "gm-sgm: draw the component per element instead of per image.")
    sigma_min: float = option(0.01, "Smallest noise level, for images in [-1, 1].")
    sigma_max: str = option("auto", "Largest noise level; 'auto' measures the data (Technique 1 of NCSNv2).")
    num_train_timesteps: str = option("1000", "Noise levels of the ladder; 'auto' is Technique 2 of NCSNv2.")

    # Sampler, as saved with the model
    algorithm_type: str | None = option(None, "Sampler of the saved scheduler; default that of its class.")
    num_langevin_steps: int = option(1, "Langevin steps per noise level.")
    step_size: float | None = option(None, "Langevin step size (the paper's eps); default Technique 4 of NCSNv2.")
    step_size_criterion: Literal["fixed_point", "prop3"] = option(
        "fixed_point", "What Technique 4 looks at: the whole chain, or one level as in the paper."
    )

    # Optimisation
    train_batch_size: int = option(128, "Images per step and process.")
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.")
    num_train_epochs: int | None = option(None, "Length of the training in passes over the data (100).")
    max_train_steps: int | None = option(None, "Length in optimizer steps, which goes first; 1500 for digits.")
    learning_rate: float | None = option(None, "Peak learning rate; default 2e-3 up to 16 pixels, else 2e-4.")
    lr_scheduler: Literal[
        "one_cycle",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ] = option("one_cycle", "Learning-rate schedule.")
    lr_warmup_steps: int | None = option(
        None, "Steps until the peak; default 30%% of one_cycle, 10%% but at most 500 of the others."
    )
    adam_beta1: float = option(0.9, "First moment decay of AdamW.")
    adam_beta2: float = option(0.999, "Second moment decay of AdamW.")
    adam_weight_decay: float = option(0.0, "Weight decay of AdamW.")
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Default: as accelerate is configured.")
    use_ema: bool = option(True, "Average the weights; the average makes all samples and is what is saved.")
    ema_decay: float = option(0.999, "Decay of the average, once warmed up.")
    ema_inv_gamma: float = option(1.0, "Warm-up of the average: its decay is 1 - (1 + step / inv_gamma)^-power.")
    ema_power: float = option(0.75, "See --ema_inv_gamma.")
    seed: int = option(0, "Decides everything random: weights, order of the data, noise, samples.")

    # Checkpoints, samples and logs
    output_dir: str = option("outputs/gm-sgm", "Where the pipeline, its card, checkpoints and samples go.")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that holds other files or checkpoints.")
    checkpointing_steps: int = option(500, "Steps between checkpoints; 0 for none.")
    checkpoints_total_limit: int | None = option(None, "Keep only the newest checkpoints.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest' of --output_dir.")
    validation_steps: int = option(500, "Steps between grids of samples; 0 for one at the end only.")
    num_validation_images: int = option(16, "Images in a grid.")
    validation_inference_steps: int | None = option(None, "Network calls per image; default that of the pipeline.")
    eval_batch_size: int = option(16, "Images sampled at once.")
    logging_steps: int = option(10, "Steps between lines of the loss curve, each the mean since the last.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "Experiment tracker.")
    logging_dir: str = option("logs", "Folder of the tracker in --output_dir.")
    dry_run: bool = option(False, "Build everything, take one step, print the plan, write nothing.")

    # Hub
    push_to_hub: bool = option(False, "Upload the finished pipeline.")
    hub_model_id: str | None = option(None, "Repository to upload to, <user>/<name>.")
    hub_private_repo: bool = option(False, "Upload to a private repository.")
    hub_token: str | None = option(None, "Access token, never saved; default the one of `hf auth login`.")

    def __post_init__(self) -> None:
        """Raise a ValueError for whatever is wrong before any data are seen."""
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("give --dataset_name or --train_data_dir, not both")
        if self.model_name_or_path is not None and self.model_config is not None:
            raise ValueError("give --model_name_or_path or --model_config, not both")
        if self.model_name_or_path is not None or self.model_config is not None:
            shape = ("block_out_channels", "layers_per_block", "attention_resolutions", "dropout")
            given = [f"--{name}" for name in shape if getattr(self, name)]
            if given:
                raise ValueError(f"{given} describe a new network: leave them out, the model has its own")
        if self.dataset_name is None and self.train_data_dir is None:
            self.dataset_name = "digits"
        self._check_ranges()
        number_or_auto("sigma_max", self.sigma_max, float)
        number_or_auto("num_train_timesteps", self.num_train_timesteps, int)
        build_mixture(self)
        if self.report_to != "none" and self.report_to not in map(str, get_available_trackers()):
            raise ValueError(
                f"--report_to {self.report_to}: the package is not installed; pip install {self.report_to}, "
                "or leave the option out"
            )
        if self.push_to_hub:
            if self.hub_model_id is None or self.hub_model_id.count("/") != 1:
                raise ValueError(f"--push_to_hub needs --hub_model_id <user>/<name>, got {self.hub_model_id!r}")
            validate_repo_id(self.hub_model_id)

    def _check_ranges(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        for name in ("sigma_min", "learning_rate", "max_grad_norm", "ema_inv_gamma", "ema_power"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name} must be positive, got {value}")
        for name in ("adam_beta1", "adam_beta2", "dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def on_digits(self) -> bool:
        return self.train_data_dir is None and self.dataset_name == "digits"


# The smallest value that makes sense.
LEAST = {
    "resolution": 1,
    "max_train_samples": 2,
    "dataloader_num_workers": 0,
    "layers_per_block": 1,
    "num_components": 1,
    "num_langevin_steps": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "adam_weight_decay": 0,
    "adam_epsilon": 0,
    "seed": 0,
    "checkpointing_steps": 0,
    "checkpoints_total_limit": 1,
    "validation_steps": 0,
    "num_validation_images": 1,
    "validation_inference_steps": 1,
    "eval_batch_size": 1,
    "logging_steps": 1,
}


def number_or_auto(name: str, value: str, number: type) -> Any:
    """`value` as a positive number, or None for 'auto'."""
    if value == "auto":
        return None
    try:
        parsed = number(value)
    except ValueError:
        parsed = math.nan
    if not 0 < parsed < math.inf:
        raise ValueError(f"--{name} must be a positive {number.__name__} or 'auto', got {value!r}")
    return parsed


def build_mixture(args: TrainingArguments) -> GaussianMixtureNoise:
    """The noise law that the options describe, with `E[c^2] = 1`; one component for NCSNv2."""
    explicit = {"mixture_weights": args.mixture_weights, "mixture_scales": args.mixture_scales}
    stable = {"stable_alpha": args.stable_alpha}
    power = {"power_alpha": args.power_alpha, "power_base": args.power_base}
    kinds = [kind for kind in (explicit, stable, power) if any(v is not None for v in kind.values())]
    given = [f"--{name}" for kind in kinds for name, value in kind.items() if value is not None]
    if args.num_components is not None and (explicit in kinds or args.method == "ncsnv2"):
        given.append("--num_components")
    if args.method == "ncsnv2":
        if given or args.mixture_per_element:
            raise ValueError(f"--method ncsnv2 has Gaussian noise: leave out {given or ['--mixture_per_element']}")
        return GaussianMixtureNoise([1.0], [1.0])
    if len(kinds) > 1 or (explicit in kinds and "--num_components" in given):
        raise ValueError(f"{given} do not go together: describe the mixture in one way")
    per_element, num_components = args.mixture_per_element, args.num_components or 2
    try:
        if explicit in kinds:
            if args.mixture_weights is None or args.mixture_scales is None:
                raise ValueError("weights and scales go together")
            return GaussianMixtureNoise(args.mixture_weights, args.mixture_scales, per_element).normalized()
        if args.stable_alpha is not None:
            return GaussianMixtureNoise.from_stable(args.stable_alpha, num_components, per_element)
        alpha = 1.5 if args.power_alpha is None else args.power_alpha
        base = 2.0 if args.power_base is None else args.power_base
        return GaussianMixtureNoise.from_power_law(alpha, num_components, base, per_element)
    except ValueError as error:
        raise ValueError(f"{given or ['--num_components']}: {error}") from error


# --- What the options come to ---


@dataclass(frozen=True)
class Plan:
    """Options that depend on the data, resolved. Fields have the names of the options."""

    resolution: int
    image_column: str | None
    mixture_weights: list[float]
    mixture_scales: list[float]
    sigma_max: float
    num_train_timesteps: int
    validation_inference_steps: int
    max_train_steps: int
    learning_rate: float
    lr_warmup_steps: int


def make_plan(
    args: TrainingArguments,
    examination: Examination,
    num_images: int,
    image_column: str | None,
    num_processes: int,
) -> Plan:
    """Resolve what was left open.

    Raises:
        ValueError: for options that do not fit the data.
    """
    if args.train_batch_size * num_processes > num_images:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} times {num_processes} process(es) is more than the "
            f"{num_images} training images"
        )
    sigma_max = number_or_auto("sigma_max", args.sigma_max, float)
    if sigma_max is None:
        sigma_max = round(max_pairwise_distance(examination.images), 4)
    if not args.sigma_min < sigma_max:
        raise ValueError(
            f"--sigma_min {args.sigma_min} must be smaller than --sigma_max {sigma_max}"
            + (" (measured: are all images the same?)" if args.sigma_max == "auto" else "")
        )
    num_levels = number_or_auto("num_train_timesteps", args.num_train_timesteps, int)
    if num_levels is None:
        num_levels = ladder_length(sigma_max, args.sigma_min, examination.images[0].numel())
    if num_levels < 2:
        raise ValueError(f"--num_train_timesteps must be at least 2, got {num_levels}")

    steps = args.max_train_steps
    if steps is None and args.num_train_epochs is None and args.on_digits:
        steps = 1500
    if steps is None:
        images_per_step = args.train_batch_size * num_processes * args.gradient_accumulation_steps
        steps = math.ceil((args.num_train_epochs or 100) * num_images / images_per_step)
    warmup = args.lr_warmup_steps
    if warmup is None:
        warmup = round(0.3 * steps) if args.lr_scheduler == "one_cycle" else min(500, steps // 10)
    elif warmup >= steps:
        raise ValueError(f"--lr_warmup_steps {warmup} must be smaller than the {steps} steps of the training")
    mixture = build_mixture(args)
    return Plan(
        resolution=examination.resolution,
        image_column=image_column,
        mixture_weights=mixture.weights.tolist(),
        mixture_scales=mixture.scales.tolist(),
        sigma_max=sigma_max,
        num_train_timesteps=num_levels,
        validation_inference_steps=args.validation_inference_steps
        or PIPELINES[args.method].default_num_inference_steps,
        max_train_steps=steps,
        learning_rate=args.learning_rate or (2e-3 if examination.resolution <= 16 else 2e-4),
        lr_warmup_steps=warmup,
    )


def training_record(args: TrainingArguments, plan: Plan) -> dict[str, Any]:
    """All options as resolved, JSON-safe, without tokens and places on this host."""
    record = asdict(args) | asdict(plan)
    for name in PATHS:
        record[name] = portable(record[name])
    return {name: value for name, value in record.items() if name not in PRIVATE}


PATHS = (
    "dataset_name",
    "train_data_dir",
    "model_name_or_path",
    "model_config",
    "output_dir",
    "resume_from_checkpoint",
)
PRIVATE = ("hub_token", "cache_dir", "logging_dir")


def portable(path: str | None) -> str | None:
    """`path` if it says nothing about this host, else its last part."""
    if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
        return Path(path).resolve().name
    return path


def command_line(args: TrainingArguments, num_processes: int) -> str:
    """The command that gives these options, without tokens and places on this host."""
    words = ["accelerate launch"]
    if num_processes > 1:
        words.append(f"--num_processes {num_processes}")
    words.append("train_gm_sgm.py")
    for f in fields(args):
        value = getattr(args, f.name)
        if value == f.default or f.name in PRIVATE:
            continue
        if isinstance(value, bool):
            words.append(f"--{f.name}" if value else f"--no_{f.name}")
        elif isinstance(value, list):
            words.append(f"--{f.name} {' '.join(map(str, value))}")
        else:
            words.append(f"--{f.name} {portable(value) if f.name in PATHS else value}")
    return " ".join(words)


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    names = ("torch", "diffusers", "accelerate", "datasets")
    return {"diffusers_gm": __version__} | {name: importlib.metadata.version(name) for name in names}


# --- Network, scheduler, optimizer ---


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
        in_channels=channels,
        out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(widths),
        layers_per_block=args.layers_per_block or (1 if small else 2),
        norm_num_groups=math.gcd(32, *widths),
        attention_head_dim=head_dim,
        dropout=args.dropout,
    )


def native_shape(unet: UNet2DModel | None) -> tuple[int | None, int | None]:
    """Side and channels of the images that a network is for; None where nothing says so."""
    if unet is None:
        return None, None
    size, channels = unet.config["sample_size"], {unet.config["in_channels"], unet.config["out_channels"]}
    if channels not in ({1}, {3}):
        raise ValueError(f"the network must have 1 or 3 channels in and out, it has {sorted(channels)}")
    return (size if isinstance(size, int) else None), channels.pop()


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
    config: dict[str, Any] = {
        "num_train_timesteps": plan.num_train_timesteps,
        "noise_space": "ve",
        "sigma_min": args.sigma_min,
        "sigma_max": plan.sigma_max,
        "scale_input": args.scale_input,
        "num_langevin_steps": args.num_langevin_steps,
        "step_size": args.step_size,
        "step_size_criterion": args.step_size_criterion,
    }
    if args.algorithm_type is not None:
        config["algorithm_type"] = args.algorithm_type
    scheduler: Any
    if args.method == "ncsnv2":
        scheduler = AnnealedLangevinScheduler(**config, prediction_type="epsilon")
    else:
        scheduler = GMLangevinScheduler(
            **config,
            prediction_type=PREDICTION_TYPE[args.objective],
            mixture_weights=plan.mixture_weights,
            mixture_scales=plan.mixture_scales,
            mixture_per_element=args.mixture_per_element,
            model_noise="mixture",
        )
    scheduler.set_timesteps(plan.validation_inference_steps)
    return scheduler


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


def check_processes(accelerator: Accelerator) -> None:
    """Raise a RuntimeError if processes that were launched together do not know of each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: on CPUs, set "
            "ACCELERATE_USE_CPU=true"
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


# --- The output folder ---


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [path.parent for path in folder.glob(f"{CHECKPOINT}*/{STATE_FILE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def find_checkpoint(args: TrainingArguments) -> Path | None:
    """The checkpoint to resume from, if any.

    Raises:
        ValueError: if there is none where the option says.
    """
    resume = args.resume_from_checkpoint
    if resume is None:
        return None
    available = list_checkpoints(Path(args.output_dir))
    if resume == "latest" and available:
        return available[-1]
    for path in (Path(resume), Path(args.output_dir, resume)):
        if (path / STATE_FILE).is_file():
            return path
    raise ValueError(
        f"--resume_from_checkpoint {resume!r}: there is no complete checkpoint; --output_dir has "
        f"{[path.name for path in available] or 'none'}"
    )


def check_output_dir(args: TrainingArguments, checkpoint: Path | None) -> None:
    """Raise a ValueError if training into `output_dir` would mix with or replace what it must not."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {args.output_dir!r} is a file")
    if not folder.is_dir() or args.overwrite_output_dir or _inside(checkpoint, folder):
        return
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds a training up to {checkpoints[-1].name}: continue "
            "with --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or choose another"
        )
    if any(folder.iterdir()) and not (folder / ARGS_FILE).is_file():
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds files that are not from a training: choose another, or "
            "add to it with --overwrite_output_dir"
        )


def _inside(checkpoint: Path | None, folder: Path) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def start_output_dir(folder: Path, record: dict[str, Any], checkpoint: Path | None, step: int) -> None:
    """Prepare the folder for a training that starts, or resumes from a checkpoint at `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _inside(checkpoint, folder):
        for old in list_checkpoints(folder):
            shutil.rmtree(old)
    write_json(folder / ARGS_FILE, record)
    log = read_log(folder)
    (folder / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in log if entry["step"] <= step))


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of the loss curve; one that was cut short by a kill is left out."""
    path = folder / LOG_FILE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_log(folder: Path, entry: dict[str, float]) -> None:
    with (folder / LOG_FILE).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def fresh_folder(path: Path) -> Path:
    """An empty folder; what a killed training left there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def publish(source: Path, folder: Path) -> None:
    """Move everything in `source` to `folder`, replacing what has the same name. Same file system.

    `model_index.json` goes first and comes last, so that a pipeline which loads is whole.
    """
    index = "model_index.json"
    (folder / index).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == index):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    source.rmdir()


# --- Checkpoints ---

# Options that may change when a training is resumed: they do not change what is learned.
FREE_ON_RESUME = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "mixed_precision",
    "num_train_epochs",
    "algorithm_type",
    "num_langevin_steps",
    "step_size",
    "step_size_criterion",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "num_validation_images",
    "validation_inference_steps",
    "eval_batch_size",
    "logging_steps",
    "report_to",
    "dry_run",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


@dataclass
class TrainingState:
    """How far a training is. The data seen decide the order of the data and the noise that come next."""

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: TrainingState, record: dict[str, Any], limit: int | None
) -> None:
    """Save everything a training continues from to `folder/checkpoint-<step>`; call it on all processes.

    The name appears when the checkpoint is complete, and only then do older ones beyond `limit` go.
    """
    target = folder / f"{CHECKPOINT}{state.step}"
    temporary = folder / f"tmp-{target.name}"
    if accelerator.is_main_process:
        fresh_folder(temporary)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE_FILE, {"state": asdict(state), "arguments": record})
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        if limit is not None:
            for old in list_checkpoints(folder)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def read_checkpoint(checkpoint: Path, args: TrainingArguments, record: dict[str, Any]) -> TrainingState:
    """How far the training of a checkpoint was.

    Raises:
        ValueError: if it was started with other options than `record`.
    """
    content = json.loads((checkpoint / STATE_FILE).read_text())
    free = set(FREE_ON_RESUME)
    if args.lr_scheduler in ("constant", "constant_with_warmup"):
        free.add("max_train_steps")  # other schedules are laid out for a length
    before, now = content["arguments"], json.loads(json.dumps(record))
    changes = [
        f"--{name} was {before.get(name)!r} and is {now[name]!r}"
        for name in now
        if name not in free and before.get(name) != now[name]
    ]
    if changes:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint.name} continues a training with other options: {'; '.join(changes)}"
        )
    state = TrainingState(**content["state"])
    if state.step > record["max_train_steps"]:
        raise ValueError(f"--max_train_steps {record['max_train_steps']} is over: {checkpoint.name} is later")
    return state


# --- Samples ---


def sample_images(pipeline: Any, num_images: int, batch_size: int, num_inference_steps: int, seed: int) -> list:
    """PIL images, the same for the same seed whatever the batch size."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, num_images, batch_size):
        seeds = range(seed + start, seed + min(start + batch_size, num_images))
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        images += pipeline(len(generators), num_inference_steps, generators).images
    return images


def image_grid(images: list, min_side: int = 64) -> Image.Image:
    """Images in the squarest full grid, small ones enlarged without smoothing."""
    rows = next(r for r in range(math.isqrt(len(images)), 0, -1) if len(images) % r == 0)
    factor = math.ceil(min_side / min(images[0].size))
    size = (images[0].width * factor, images[0].height * factor)
    return make_image_grid([i.resize(size, Image.Resampling.NEAREST) for i in images], rows, len(images) // rows)


def log_grid(accelerator: Accelerator, grid: Image.Image, step: int) -> None:
    """Show a grid of samples to the trackers that take images."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step, **layout)


def hardware(accelerator: Accelerator) -> str:
    """What the training ran on, in words."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
    else:
        name = f"{accelerator.device.type.upper()} ({torch.get_num_threads()} threads)"
    return f"{accelerator.num_processes} x {name}"
