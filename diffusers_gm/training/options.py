"""The options of `train_gm_sgm.py`."""

import importlib.util
from collections.abc import Collection
from dataclasses import InitVar, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

from accelerate.tracking import get_available_trackers
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from ..extra import how_to_install
from .methods import METHODS, MethodOptions, options_of_others
from .option import (
    SAMPLER,
    changed_options,
    check_bounds,
    data,
    given,
    hub,
    network,
    optimisation,
    output,
    sampler,
    trained,
)

# Options that mean nothing without one of others.
NEEDS = {
    "class_dropout": ("class_conditional",),
    "shuffle_buffer_size": ("streaming",),
    "revision": ("model_name_or_path", "vae"),
    "variant": ("model_name_or_path", "vae"),
    "keep_noise_levels": ("model_name_or_path",),
    "ema_decay": ("use_ema",),
    "ema_inv_gamma": ("use_ema",),
    "ema_power": ("use_ema",),
    "checkpoints_total_limit": ("checkpointing_steps",),
    "logging_dir": ("report_to",),
    "hub_strategy": ("checkpointing_steps", "max_train_minutes"),
}

# Options of the saved sampler, and the values of --algorithm_type that use them.
OF_ALGORITHMS = {
    "num_langevin_steps": ("langevin", "jump", "exponential"),
    "step_size": ("langevin", "jump", "exponential", "consistent", "explore"),
    "step_size_criterion": ("langevin", "jump"),
}

# Options of one schedule of the learning rate.
OF_SCHEDULES = {"lr_num_cycles": "cosine_with_restarts", "lr_power": "polynomial"}

# What describes a new network.
SHAPE = ("block_out_channels", "layers_per_block", "attention_resolutions", "dropout")
shape = partial(network, in_place_of=("model_name_or_path", "model_config"))


@dataclass
class TrainingArguments(MethodOptions):
    """The options of `train_gm_sgm.py`, named as in diffusers' training examples wherever these have them.

    Attributes:
        left_open: the options that the method chose, see `Method.choose`.
    """

    # What is trained
    method: str = trained(
        "gm-sgm",
        "Gaussian-mixture noise, NCSNv2's Gaussian noise, critically-damped Langevin diffusion, or diffusers' DDPM.",
        choices=tuple(METHODS),
    )

    # Data
    dataset_name: str | None = data(
        None,
        "'digits' (8x8, comes with scikit-learn) or a data set of the Hub. [digits]",
        in_place_of=("train_data_dir",),
        path=True,
    )
    dataset_config_name: str | None = data(None, "Configuration of the Hub data set.")
    train_data_dir: str | None = data(
        None,
        "Folder of images or of parquet files, in place of --dataset_name.",
        in_place_of=("dataset_name", "dataset_config_name"),
        path=True,
    )
    image_column: str | None = data(None, "Column with the images. [image or img]")
    background: str | None = data(None, "Colour seen through transparent pixels, a name or #rrggbb. [white]")
    class_conditional: bool = data(
        False,
        "Learn each class of images: 'label' of the data set, the folders of a folder of images, what digits are.",
    )
    label_column: str | None = data(None, "Column with the classes. [label]")
    class_dropout: float = data(
        0.1, "How often the class is dropped, so that samples can be guided; 0 for never.", below_one=True
    )
    cache_dir: str | None = data(None, "Where downloaded data sets and models are kept.", private=True)
    resolution: list[int] | int | None = data(
        None, "Side of the training images, or height and width. [that of the data]"
    )
    center_crop: bool = data(False, "Crop images that are not square at the centre rather than at random.")
    random_flip: bool = data(False, "Flip images horizontally at random.")
    dequantize: int | None = data(
        None,
        "Add uniform noise of the width of a level to images of this many levels: 256 for 8 bits, 17 for digits.",
        at_least=2,
    )
    max_train_samples: int | None = data(None, "Train on this many images only, chosen by --seed.", at_least=2)
    streaming: bool = data(
        False, "Read the images as they come, from the Hub or a folder of parquet or tar files, and keep none."
    )
    num_train_samples: int | None = data(
        None, "With --streaming: how many images an epoch has.", at_least=2, free_on_resume=True
    )
    shuffle_buffer_size: int = data(
        1000, "With --streaming: images that are shuffled at a time; files are shuffled, too.", at_least=1
    )
    vae: str | None = data(
        None,
        "Train on the latents of this autoencoder, a folder, a pipeline or on the Hub; what is drawn is decoded by it.",
        path=True,
    )
    latents_cache_dir: str | None = data(
        None, "Where latents are kept, for other trainings too. ['latents' in --output_dir]", private=True
    )
    dataloader_num_workers: int = data(
        0, "Processes that load the data; 0 loads them in the main process.", at_least=0, free_on_resume=True
    )

    # Network
    model_name_or_path: str | None = network(
        None,
        "Network or pipeline to fine-tune, a folder or on the Hub.",
        in_place_of=("model_config", *SHAPE),
        path=True,
    )
    model_config: str | None = network(
        None,
        "Config of a network to train from scratch, a JSON file or its folder; its _class_name decides which.",
        aliases=("model_config_name_or_path",),
        in_place_of=("model_name_or_path", *SHAPE),
        path=True,
    )
    revision: str | None = network(None, "Branch, tag or commit of --model_name_or_path and --vae.")
    variant: str | None = network(None, "Variant of their weights, such as fp16.")
    keep_noise_levels: bool = network(
        True,
        "(gm-sgm, ncsnv2; cld, of preconditioned denoisers and its own; ddpm, of networks that answer the noise) "
        "Fine-tune a network of a pipeline at the noise levels, labels and prediction type that the pipeline's "
        "scheduler says it has, one of cld on its diffusion; and with its mixture and --conditioning, unless told.",
        free_on_resume=True,  # the levels are not
    )
    block_out_channels: list[int] | None = shape(None, "Channels of each level. [chosen by --resolution]")
    layers_per_block: int | None = shape(None, "Residual layers of each level. [1 up to 16 pixels, else 2]", at_least=1)
    attention_resolutions: list[int] | None = shape(
        None, "Image sides at which levels have attention. [8 to 16, none for images of at most 16 pixels]"
    )
    dropout: float = shape(0.0, "Dropout of the residual layers.", below_one=True)
    gradient_checkpointing: bool = network(False, "Save memory by computing activations twice.", free_on_resume=True)
    channels_last: bool = network(
        False, "Keep images as (H, W, C) in memory, which suits tensor cores.", free_on_resume=True
    )

    # Sampler, as saved with the model
    calibrate: Literal["fast", "full"] | None = sampler(
        None, "At the end, make the sampler for the network, see diffusers_gm.calibrate; by this effort."
    )
    algorithm_type: str | None = sampler(None, "Sampler of the saved scheduler. [that of its class]")
    timestep_spacing: str | None = sampler(
        None, "Grid of its network calls. [even, for --objective score of cld quadratic]"
    )

    # Optimisation
    train_batch_size: int = optimisation(128, "Images per step and process.", at_least=1, free_on_resume=True)
    gradient_accumulation_steps: int = optimisation(1, "Batches per optimizer step.", at_least=1, free_on_resume=True)
    num_train_epochs: int | None = optimisation(
        None,
        "Length of the training in passes over the data. [100]",
        at_least=1,
        aliases=("num_epochs",),
        in_place_of=("max_train_steps",),
        free_on_resume=True,
    )
    max_train_steps: int | None = optimisation(
        None, "Length in optimizer steps, which goes first. [of digits 1500]", at_least=1
    )
    max_train_minutes: float | None = optimisation(
        None,
        "Write a checkpoint and end after so many minutes of training; --resume_from_checkpoint latest goes on.",
        positive=True,
        free_on_resume=True,
        of_a_run=True,
    )
    learning_rate: float | None = optimisation(
        None, "Peak learning rate. [2e-3 up to 16 pixels, else 2e-4]", positive=True
    )
    lr_scheduler: Literal[
        "one_cycle", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = optimisation("one_cycle", "Learning-rate schedule.")
    lr_warmup_steps: int | None = optimisation(
        None, "Steps until the peak. [30%% of one_cycle, 10%% but at most 500 of the others]", at_least=0
    )
    lr_num_cycles: int = optimisation(1, "Times that cosine_with_restarts falls to 0.", at_least=1)
    lr_power: float = optimisation(1.0, "Of polynomial; 1 is linear.", positive=True)
    adam_beta1: float = optimisation(0.9, "First moment decay of AdamW.", below_one=True)
    adam_beta2: float = optimisation(0.999, "Second moment decay of AdamW.", below_one=True)
    adam_weight_decay: float = optimisation(0.0, "Weight decay of AdamW.", at_least=0)
    adam_epsilon: float = optimisation(1e-8, "Epsilon of AdamW.", at_least=0)
    max_grad_norm: float = optimisation(1.0, "Gradients are clipped to this norm.", positive=True)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = optimisation(
        None, "Precision of the network's arithmetic. [as accelerate is configured]", free_on_resume=True
    )
    allow_tf32: bool = optimisation(
        False, "Multiply float32 matrices in TF32 on GPUs that can, faster and less exact.", free_on_resume=True
    )
    use_8bit_adam: bool = optimisation(False, "Keep AdamW's moments in 8 bits, by bitsandbytes.")
    use_ema: bool = optimisation(True, "Average the weights; the average makes all samples and is what is saved.")
    ema_decay: float = optimisation(
        0.999, "Decay of the average, once warmed up.", below_one=True, aliases=("ema_max_decay",)
    )
    ema_inv_gamma: float = optimisation(
        1.0, "Warm-up of the average: its decay is 1 - (1 + step / inv_gamma)^-power.", positive=True
    )
    ema_power: float = optimisation(0.75, "See --ema_inv_gamma.", positive=True)
    seed: int = optimisation(0, "Decides everything random: weights, order of the data, noise, samples.", at_least=0)

    # Checkpoints, samples and logs
    output_dir: str = output("outputs/gm-sgm", "Where the pipeline, its card, checkpoints and samples go.", path=True)
    overwrite_output_dir: bool = output(
        False, "Start anew in a folder that holds other files or checkpoints.", of_a_run=True
    )
    checkpointing_steps: int = output(500, "Steps between checkpoints; 0 for none.", at_least=0)
    checkpoints_total_limit: int | None = output(
        None, "Keep only so many, the newest; superseded-checkpoint-* are no longer counted, and stay.", at_least=1
    )
    resume_from_checkpoint: str | None = output(
        None, "A checkpoint folder, or 'latest' of --output_dir, if there is one.", path=True, of_a_run=True
    )
    validation_steps: int = output(500, "Steps between grids of samples; 0 for one at the end only.", at_least=0)
    num_validation_images: int = output(
        16, "Images in a grid; with --class_conditional a row for each class, as long as that leaves.", at_least=1
    )
    validation_inference_steps: int | None = output(
        None, "Network calls per image. [that of the pipeline]", at_least=1, aliases=("ddpm_num_inference_steps",)
    )
    eval_batch_size: int = output(16, "Images sampled at once.", at_least=1)
    logging_steps: int = output(10, "Steps between lines of the loss curve, each the mean since the last.", at_least=1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = output(
        "none", "Experiment tracker.", aliases=("logger",)
    )
    logging_dir: str = output("logs", "Folder of the tracker in --output_dir.", private=True)
    dry_run: bool = output(False, "Take a few steps, print the plan and what it costs, write nothing.")
    first_batch: str | None = output(
        None, "With --dry_run: a picture to write all the same, of the images of the first batch.", private=True
    )

    # Hub
    push_to_hub: bool = hub(False, "Upload the finished pipeline.")
    hub_model_id: str | None = hub(None, "Repository to upload to, <user>/<name>.")
    hub_private_repo: bool = hub(False, "Upload to a private repository.")
    hub_strategy: Literal["end", "every_save"] = hub(
        "end", "When to upload: once, or also the pipeline as it is at every checkpoint."
    )
    hub_token: str | None = hub(None, "Access token, never saved. [the one of `hf auth login`]", private=True)

    # The options that were named, on a command line or in a recipe, whatever their values.
    named: InitVar[Collection[str]] = ()

    def __post_init__(self, named: Collection[str]) -> None:
        """Raise a ValueError for whatever is wrong before any data are seen."""
        self.left_open: set[str] = set()
        self.named_options = set(named)
        for one, other in (("dataset_name", "train_data_dir"), ("model_name_or_path", "model_config")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"give --{one} or --{other}, not both")
        if (self.model_name_or_path is not None or self.model_config is not None) and (shape := given(self, SHAPE)):
            raise ValueError(f"{shape} describe a new network: leave them out, the model has its own")
        if self.dataset_name is None and self.train_data_dir is None:
            self.dataset_name = "digits"
        self._check_images()
        check_paths(self)
        for f in fields(self):
            check_bounds(f, getattr(self, f.name))
        others = options_of_others(self.method)
        if foreign := [f"--{name}" for name in changed_options(self) if name in others]:
            raise ValueError(f"{foreign} mean nothing for --method {self.method}: leave them out")
        check_needs(self)
        chosen = METHODS[self.method].choose(self)
        self.left_open = {name for name in chosen if getattr(self, name) is None}
        for name in self.left_open:
            setattr(self, name, chosen[name])
        METHODS[self.method].check(self)
        if self.report_to != "none" and self.report_to not in map(str, get_available_trackers()):
            command = how_to_install("trackers") if self.report_to == "tensorboard" else f"pip install {self.report_to}"
            raise ValueError(
                f"--report_to {self.report_to}: the package is not installed; {command}, or leave the option out"
            )
        check_streaming(self)
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("--use_8bit_adam: the package is not installed; pip install bitsandbytes")
        if self.first_batch is not None:
            check_picture(self.first_batch, self.dry_run)
        if self.push_to_hub:
            if self.hub_model_id is None or self.hub_model_id.count("/") != 1:
                raise ValueError(f"--push_to_hub needs --hub_model_id <user>/<name>, got {self.hub_model_id!r}")
            validate_repo_id(self.hub_model_id)

    def _check_images(self) -> None:
        if isinstance(self.resolution, list) and len(self.resolution) == 1:
            (self.resolution,) = self.resolution
        sides = [self.resolution] if isinstance(self.resolution, int) else self.resolution or [1]
        if len(sides) > 2 or min(sides) < 1:
            raise ValueError(f"--resolution must be a side or a height and a width, at least 1, got {self.resolution}")
        if self.vae is None and self.latents_cache_dir is not None:
            raise ValueError("--latents_cache_dir is for --vae: give an autoencoder, or leave it out")
        if self.vae is not None and self.dequantize is not None:
            raise ValueError("--dequantize is for images of few levels: leave it out, latents have none")


def without_meaning(args: TrainingArguments) -> dict[str, str]:
    """The options that mean nothing beside the others, and without what."""
    off = (None, False, 0, "none")
    needs = {
        name: f"--{' or --'.join(others)}"
        for name, others in NEEDS.items()
        if all(getattr(args, other) in off for other in others)
    }
    schedules = {name: f"--lr_scheduler {of}" for name, of in OF_SCHEDULES.items() if args.lr_scheduler != of}
    data = {}
    if args.dataset_name in (None, "digits"):
        data["dataset_config_name"] = "a --dataset_name of the Hub"
    if args.dataset_name == "digits":
        data["background"] = "a --dataset_name of the Hub or --train_data_dir"
        data["image_column"] = "a --dataset_name of the Hub or --train_data_dir"
    return needs | schedules | data


def check_needs(args: TrainingArguments) -> None:
    meaningless = without_meaning(args)
    for name in changed_options(args):
        if name in meaningless:
            said = f"--no_{name}" if getattr(args, name) is False else f"--{name}"
            raise ValueError(f"{said} means nothing without {meaningless[name]}: leave it out")


def without_effect(args: TrainingArguments, algorithm_type: str | None) -> list[str]:
    """What is said of options that change nothing as yet: of the Hub, and of a sampler that is saved with
    `algorithm_type`."""
    said = []
    if not args.push_to_hub and (of_hub := given(args, ("hub_model_id", "hub_private_repo", "hub_strategy"))):
        said.append(f"{', '.join(of_hub)}: nothing is uploaded without --push_to_hub")
    for option in given(args, OF_ALGORITHMS):
        if algorithm_type not in (using := OF_ALGORITHMS[option.removeprefix("--")]):
            said.append(f"{option} is for --algorithm_type {', '.join(using)}: {algorithm_type} has no use for it")
    if args.calibrate and (of_sampler := given(args, ("algorithm_type", "timestep_spacing", *OF_ALGORITHMS))):
        said.append(f"{', '.join(of_sampler)}: for samples during the training, --calibrate saves another sampler")
    return said


def check_streaming(args: TrainingArguments) -> None:
    if args.streaming and (args.num_train_samples is None or args.max_train_samples is not None):
        raise ValueError(
            "--streaming needs --num_train_samples, how many images an epoch has, as a stream cannot be counted; "
            "and goes without --max_train_samples"
        )
    if args.streaming and args.vae is not None:
        raise ValueError("--vae keeps the latents of all images, and --streaming none: leave out one of them")
    if args.streaming and args.class_conditional:
        raise ValueError("--class_conditional counts the images of every class, and a stream cannot be counted")
    if args.num_train_samples is not None and not args.streaming:
        raise ValueError("--num_train_samples is for --streaming; --max_train_samples takes some images of a set")


def check_picture(path: str, dry_run: bool) -> None:
    if not dry_run:
        raise ValueError(f"--first_batch {path!r} goes with --dry_run, which writes nothing else")
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--first_batch {path!r} must be the name of a picture, such as first.png")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--first_batch {path!r}: there is no folder {str(Path(path).parent)!r}")


def check_paths(args: TrainingArguments) -> None:
    """Raise a ValueError for a name of a file that is no text: the card could not name it."""
    for name in names_of("path"):
        try:
            (getattr(args, name) or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--{name} {getattr(args, name)!r} is not UTF-8: rename it") from error


def names_of(kind: Literal["path", "private", "of_a_run"]) -> set[str]:
    """The options that are of a kind."""
    return {f.name for f in fields(TrainingArguments) if f.metadata[kind]}


def free_on_resume(args: TrainingArguments) -> set[str]:
    """The options that may change when a training is resumed, as how the images of a step are split may; the number
    of these may not, see `TrainingData`. So may those without meaning, which earlier versions took."""
    free = {f.name for f in fields(args) if f.metadata["free_on_resume"]} | options_of_others(args.method)
    free |= without_meaning(args).keys()
    if args.lr_scheduler in ("constant", "constant_with_warmup"):
        free.add("max_train_steps")  # other schedules are laid out for a length
    return free


def of_the_model(args: TrainingArguments) -> set[str]:
    """The options that decide a model of so many images and what is saved with it."""
    saved = {f.name for f in fields(args) if f.metadata["group"] == SAMPLER} - options_of_others(args.method)
    return {f.name for f in fields(args)} - free_on_resume(args) | saved
