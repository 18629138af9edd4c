"""The options of `train_gm_sgm.py`."""

from dataclasses import Field, dataclass, fields
from typing import Literal

from accelerate.tracking import get_available_trackers
from huggingface_hub.utils import validate_repo_id

from .methods import METHODS, MethodOptions, options_of_others
from .option import check_bounds, data, hub, network, optimisation, output, sampler, trained

# What describes a new network.
SHAPE = ("block_out_channels", "layers_per_block", "attention_resolutions", "dropout")


@dataclass
class TrainingArguments(MethodOptions):
    """The options of `train_gm_sgm.py`, named as in diffusers' training examples wherever these have them."""

    # What is trained
    method: str = trained(
        "gm-sgm",
        "Gaussian-mixture noise, NCSNv2's Gaussian noise, or critically-damped Langevin diffusion.",
        choices=tuple(METHODS),
    )

    # Data
    dataset_name: str | None = data(
        None,
        "'digits' (8x8, comes with scikit-learn; the default) or a data set of the Hub.",
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
    image_column: str | None = data(None, "Column with the images; default 'image' or 'img'.")
    background: str | None = data(None, "Colour seen through transparent pixels, a name or #rrggbb; default white.")
    cache_dir: str | None = data(None, "Where downloaded data sets and models are kept.", private=True)
    resolution: int | None = data(None, "Side of the training images; default that of the data.", at_least=1)
    center_crop: bool = data(False, "Crop images that are not square at the centre rather than at random.")
    random_flip: bool = data(False, "Flip images horizontally at random.")
    dequantize: int | None = data(
        None,
        "Add uniform noise of the width of a level to images of this many levels: 256 for 8 bits, 17 for digits.",
        at_least=2,
    )
    max_train_samples: int | None = data(None, "Train on this many images only, chosen by --seed.", at_least=2)
    dataloader_num_workers: int = data(
        0, "Processes that load the data; 0 loads them in the main process.", at_least=0, free_on_resume=True
    )

    # Network
    model_name_or_path: str | None = network(
        None,
        "UNet2DModel or pipeline to fine-tune, a folder or on the Hub.",
        in_place_of=("model_config", *SHAPE),
        path=True,
    )
    model_config: str | None = network(
        None,
        "Config of a UNet2DModel to train from scratch, a JSON file or its folder.",
        aliases=("model_config_name_or_path",),
        in_place_of=("model_name_or_path", *SHAPE),
        path=True,
    )
    block_out_channels: list[int] | None = network(
        None,
        "Channels of each level; default chosen by --resolution.",
        in_place_of=("model_name_or_path", "model_config"),
    )
    layers_per_block: int | None = network(
        None,
        "Residual layers of each level; default 1 up to 16 pixels, else 2.",
        at_least=1,
        in_place_of=("model_name_or_path", "model_config"),
    )
    attention_resolutions: list[int] | None = network(
        None,
        "Image sides at which levels have attention; default 8 to 16, none for images of at most 16 pixels.",
        in_place_of=("model_name_or_path", "model_config"),
    )
    dropout: float = network(
        0.0, "Dropout of the residual layers.", below_one=True, in_place_of=("model_name_or_path", "model_config")
    )
    gradient_checkpointing: bool = network(False, "Save memory by computing activations twice.", free_on_resume=True)

    # Sampler, as saved with the model
    calibrate: Literal["fast", "full"] | None = sampler(
        None,
        "At the end, make the sampler for the network, see diffusers_gm.calibrate; by this effort.",
        free_on_resume=True,
    )
    algorithm_type: str | None = sampler(
        None, "Sampler of the saved scheduler; default that of its class.", free_on_resume=True
    )
    timestep_spacing: str | None = sampler(
        None, "Grid of its network calls; default that of its class, for cld 'quadratic'.", free_on_resume=True
    )

    # Optimisation
    train_batch_size: int = optimisation(128, "Images per step and process.", at_least=1, free_on_resume=True)
    gradient_accumulation_steps: int = optimisation(1, "Batches per optimizer step.", at_least=1, free_on_resume=True)
    num_train_epochs: int | None = optimisation(
        None,
        "Length of the training in passes over the data (100).",
        at_least=1,
        aliases=("num_epochs",),
        in_place_of=("max_train_steps",),
        free_on_resume=True,
    )
    max_train_steps: int | None = optimisation(
        None, "Length in optimizer steps, which goes first; 1500 for digits.", at_least=1
    )
    max_train_minutes: float | None = optimisation(
        None,
        "Write a checkpoint and end after so many minutes of training; --resume_from_checkpoint latest goes on.",
        positive=True,
        free_on_resume=True,
    )
    learning_rate: float | None = optimisation(
        None, "Peak learning rate; default 2e-3 up to 16 pixels, else 2e-4.", positive=True
    )
    lr_scheduler: Literal[
        "one_cycle",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ] = optimisation("one_cycle", "Learning-rate schedule.")
    lr_warmup_steps: int | None = optimisation(
        None, "Steps until the peak; default 30%% of one_cycle, 10%% but at most 500 of the others.", at_least=0
    )
    adam_beta1: float = optimisation(0.9, "First moment decay of AdamW.", below_one=True)
    adam_beta2: float = optimisation(0.999, "Second moment decay of AdamW.", below_one=True)
    adam_weight_decay: float = optimisation(0.0, "Weight decay of AdamW.", at_least=0)
    adam_epsilon: float = optimisation(1e-8, "Epsilon of AdamW.", at_least=0)
    max_grad_norm: float = optimisation(1.0, "Gradients are clipped to this norm.", positive=True)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = optimisation(
        None, "Default: as accelerate is configured.", free_on_resume=True
    )
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
    output_dir: str = output(
        "outputs/gm-sgm", "Where the pipeline, its card, checkpoints and samples go.", free_on_resume=True, path=True
    )
    overwrite_output_dir: bool = output(
        False, "Start anew in a folder that holds other files or checkpoints.", free_on_resume=True
    )
    checkpointing_steps: int = output(500, "Steps between checkpoints; 0 for none.", at_least=0, free_on_resume=True)
    checkpoints_total_limit: int | None = output(
        None,
        "Keep only so many, the newest; superseded-checkpoint-* are no longer counted, and stay.",
        at_least=1,
        free_on_resume=True,
    )
    resume_from_checkpoint: str | None = output(
        None, "A checkpoint folder, or 'latest' of --output_dir, if there is one.", free_on_resume=True, path=True
    )
    validation_steps: int = output(
        500, "Steps between grids of samples; 0 for one at the end only.", at_least=0, free_on_resume=True
    )
    num_validation_images: int = output(16, "Images in a grid.", at_least=1, free_on_resume=True)
    validation_inference_steps: int | None = output(
        None,
        "Network calls per image; default that of the pipeline.",
        at_least=1,
        aliases=("ddpm_num_inference_steps",),
        free_on_resume=True,
    )
    eval_batch_size: int = output(16, "Images sampled at once.", at_least=1, free_on_resume=True)
    logging_steps: int = output(
        10, "Steps between lines of the loss curve, each the mean since the last.", at_least=1, free_on_resume=True
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = output(
        "none", "Experiment tracker.", aliases=("logger",), free_on_resume=True
    )
    logging_dir: str = output("logs", "Folder of the tracker in --output_dir.", private=True)
    dry_run: bool = output(
        False, "Build everything, take one step, print the plan, write nothing.", free_on_resume=True
    )

    # Hub
    push_to_hub: bool = hub(False, "Upload the finished pipeline.", free_on_resume=True)
    hub_model_id: str | None = hub(None, "Repository to upload to, <user>/<name>.", free_on_resume=True)
    hub_private_repo: bool = hub(False, "Upload to a private repository.", free_on_resume=True)
    hub_strategy: Literal["end", "every_save"] = hub(
        "end", "When to upload: once, or also the pipeline as it is at every checkpoint.", free_on_resume=True
    )
    hub_token: str | None = hub(None, "Access token, never saved; default the one of `hf auth login`.", private=True)

    def __post_init__(self) -> None:
        """Raise a ValueError for whatever is wrong before any data are seen."""
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("give --dataset_name or --train_data_dir, not both")
        if self.model_name_or_path is not None and self.model_config is not None:
            raise ValueError("give --model_name_or_path or --model_config, not both")
        if self.model_name_or_path is not None or self.model_config is not None:
            given = [f"--{name}" for name in SHAPE if getattr(self, name)]
            if given:
                raise ValueError(f"{given} describe a new network: leave them out, the model has its own")
        if self.dataset_name is None and self.train_data_dir is None:
            self.dataset_name = "digits"
        for f in fields(self):
            check_bounds(f, getattr(self, f.name))
        foreign = options_of_others(self.method)
        given = [f"--{f.name}" for f in changed_options(self) if f.name in foreign]
        if given:
            raise ValueError(f"{given} mean nothing for --method {self.method}: leave them out")
        METHODS[self.method].check(self)
        if self.report_to != "none" and self.report_to not in map(str, get_available_trackers()):
            package = "diffusers-gm[trackers]" if self.report_to == "tensorboard" else self.report_to
            raise ValueError(
                f"--report_to {self.report_to}: the package is not installed; pip install {package}, "
                "or leave the option out"
            )
        if self.push_to_hub:
            if self.hub_model_id is None or self.hub_model_id.count("/") != 1:
                raise ValueError(f"--push_to_hub needs --hub_model_id <user>/<name>, got {self.hub_model_id!r}")
            validate_repo_id(self.hub_model_id)

    @property
    def on_digits(self) -> bool:
        return self.train_data_dir is None and self.dataset_name == "digits"


def changed_options(args: TrainingArguments) -> list[Field]:
    """The options that have another value than their default, `method` first."""
    changed = [f for f in fields(args) if getattr(args, f.name) != f.default]
    return sorted(changed, key=lambda f: f.name != "method")


def names_of(kind: Literal["path", "private"]) -> set[str]:
    """The options that are of a kind."""
    return {f.name for f in fields(TrainingArguments) if f.metadata[kind]}


def free_on_resume(args: TrainingArguments) -> set[str]:
    """The options that may change when a training is resumed: they do not change what is learned.

    How the images of a step are split is free; their number is not, see `TrainingData`.
    """
    free = {f.name for f in fields(args) if f.metadata["free_on_resume"]} | options_of_others(args.method)
    if args.lr_scheduler in ("constant", "constant_with_warmup"):
        free.add("max_train_steps")  # other schedules are laid out for a length
    return free
