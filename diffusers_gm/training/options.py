"""The options of `train_gm_sgm.py`, and the noise law that they describe."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from accelerate.tracking import get_available_trackers
from huggingface_hub.utils import validate_repo_id

from ..processes.cld import CLD
from ..processes.mixture import GaussianMixtureNoise


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingArguments:
    """The options of `train_gm_sgm.py`, named as in diffusers' training examples wherever these have them."""

    # What is trained
    method: Literal["gm-sgm", "ncsnv2", "cld"] = option(
        "gm-sgm", "Gaussian-mixture noise, NCSNv2's Gaussian noise, or critically-damped Langevin diffusion."
    )
    objective: Literal["denoiser", "score"] = option(
        "denoiser", "What the network learns under mixture noise; for ncsnv2 the two are the same."
    )
    prediction_type: Literal["epsilon", "v_prediction"] = option(
        "epsilon", "What the denoiser answers: the noise, or the velocity, whose errors no noise level magnifies."
    )
    conditioning: Literal["sigma", "none"] = option(
        "sigma", "Whether the network is told the noise level; 'none' is Technique 3 of NCSNv2."
    )
    scale_input: bool = option(True, "Feed the network y / sqrt(1 + sigma^2) rather than the noisy image y.")
    cld_loss: Literal["hsm", "dsm"] = option(
        "hsm", "cld: hybrid score matching, or denoising score matching with the initial velocity drawn."
    )
    cld_mixed_score: bool = option(True, "cld: the network corrects the score of a velocity that knows no image.")
    cld_weighting: Literal["ell", "likelihood"] = option("ell", "cld: weights of the times, for quality or likelihood.")

    # Data
    dataset_name: str | None = option(
        None, "'digits' (8x8, comes with scikit-learn; the default) or a data set of the Hub."
    )
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.")
    train_data_dir: str | None = option(None, "Folder of images or of parquet files, in place of --dataset_name.")
    image_column: str | None = option(None, "Column with the images; default 'image' or 'img'.")
    background: str | None = option(None, "Colour seen through transparent pixels, a name or #rrggbb; default white.")
    cache_dir: str | None = option(None, "Where downloaded data sets and models are kept.")
    resolution: int | None = option(None, "Side of the training images; default that of the data.")
    center_crop: bool = option(False, "Crop images that are not square at the centre rather than at random.")
    random_flip: bool = option(False, "Flip images horizontally at random.")
    dequantize: int | None = option(
        None, "Add uniform noise of the width of a level to images of this many levels: 256 for 8 bits, 17 for digits."
    )
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

    # Critically-damped Langevin diffusion
    beta_0: float = option(4.0, "cld: beta(t) = beta_0 + beta_1 t on [0, 1].")
    beta_1: float = option(0.0, "cld: see --beta_0.")
    mass: float = option(0.25, "cld: mass M; the damping is critical, Gamma = 2 sqrt(M).")
    gamma: float = option(0.04, "cld: variance of the initial velocity in units of M.")

    # Sampler, as saved with the model
    algorithm_type: str | None = option(None, "Sampler of the saved scheduler; default that of its class.")
    timestep_spacing: str | None = option(
        None, "Grid of its network calls; default that of its class, for cld 'quadratic'."
    )
    splitting_order: int = option(1, "cld: 2 for the second-order splitting.")
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
    max_train_minutes: float | None = option(
        None, "Write a checkpoint and end after so many minutes of training; --resume_from_checkpoint latest goes on."
    )
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
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, or 'latest' of --output_dir, if there is one."
    )
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
    hub_strategy: Literal["end", "every_save"] = option(
        "end", "When to upload: once, or also the pipeline as it is at every checkpoint."
    )
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
        self._check_method()
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

    def _check_method(self) -> None:
        given = [
            f"--{f.name}" for f in fields(self) if f.name in NOT_FOR[self.method] and f.default != getattr(self, f.name)
        ]
        if given:
            raise ValueError(f"{given} mean nothing for --method {self.method}: leave them out")
        if self.objective == "score" and self.prediction_type != "epsilon":
            raise ValueError(f"--objective score answers a score: leave out --prediction_type {self.prediction_type}")
        if self.method == "cld":
            if self.num_train_timesteps == "auto":
                raise ValueError("--num_train_timesteps auto is for ladders of noise levels: cld needs a number")
            CLD(self.beta_0, self.beta_1, self.mass, self.gamma)

    def _check_ranges(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name} must be positive, got {value}")
        for name in ("adam_beta1", "adam_beta2", "dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def on_digits(self) -> bool:
        return self.train_data_dir is None and self.dataset_name == "digits"


_CLD = {"cld_loss", "cld_mixed_score", "cld_weighting", "beta_0", "beta_1", "mass", "gamma", "splitting_order"}
_MIXTURE = {
    *("mixture_weights", "mixture_scales", "stable_alpha", "power_alpha", "power_base", "num_components"),
    "mixture_per_element",
}
_LADDER = {
    *("objective", "prediction_type", "conditioning", "scale_input", "sigma_min", "sigma_max"),
    *("num_langevin_steps", "step_size", "step_size_criterion"),
}

# Options, and fields of a `Plan`, that say nothing about a method. NCSNv2 is a mixture of one component.
NOT_FOR = {"gm-sgm": _CLD, "ncsnv2": _CLD, "cld": _MIXTURE | _LADDER}

POSITIVE = ("sigma_min", "max_train_minutes", "learning_rate", "max_grad_norm", "ema_inv_gamma", "ema_power")

# The smallest value that makes sense.
LEAST = {
    "resolution": 1,
    "dequantize": 2,
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
    """The noise law that the options describe, with `E[c^2] = 1`; one component where the method has no mixture."""
    explicit = {"mixture_weights": args.mixture_weights, "mixture_scales": args.mixture_scales}
    stable = {"stable_alpha": args.stable_alpha}
    power = {"power_alpha": args.power_alpha, "power_base": args.power_base}
    kinds = [kind for kind in (explicit, stable, power) if any(v is not None for v in kind.values())]
    given = [f"--{name}" for kind in kinds for name, value in kind.items() if value is not None]
    if args.method == "cld":
        return GaussianMixtureNoise([1.0], [1.0])
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
