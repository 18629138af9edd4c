"""The network that is trained: given or new, and made fit for it."""

import inspect
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from ..autoencoders import downsampling, latent_channels
from ..data import Resolution, resolution_of, sides
from ..networks import as_unet_call, channels_of, num_class_embeds, size_of
from .classes import with_labels
from .methods import METHODS
from .options import TrainingArguments


def given_unet(args: TrainingArguments) -> Any | None:
    """The network that the options name: pretrained (also in a pipeline) or from a config; None if none.

    For cld, an ordinary network is made to see velocities too.

    Raises:
        ValueError: if there is none, or it needs more than a noisy image and a timestep.
    """
    pretrained = args.model_name_or_path is not None
    name = args.model_name_or_path if pretrained else args.model_config
    if name is None:
        return None
    option = f"--model_name_or_path {name}" if pretrained else f"--model_config {name}"
    for folder in ("unet", "transformer", None) if pretrained else (None,):
        kwargs = {"cache_dir": args.cache_dir, "subfolder": folder, "revision": args.revision}
        try:
            config = UNet2DModel.load_config(name, **kwargs)
        except OSError:
            continue
        cls = network_class(option, config, args.class_conditional)
        if not pretrained:
            return cls.from_config(config)
        if folder is not None and args.vae is None:
            refuse_latents(option, args)
        try:
            unet = cls.from_pretrained(name, variant=args.variant, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(f"{option} cannot be loaded: {error}") from error
        return with_velocities(unet) if METHODS[args.method].input_factor(args) == 2 else unet
    raise ValueError(f"{option}: there is no network, neither in such a folder nor on the Hub")


def refuse_latents(option: str, args: TrainingArguments) -> None:
    """Raise a ValueError if the network of a pipeline learned latents: pixels may have as many channels."""
    if has := decoder_in(pipeline_index(args)):
        raise ValueError(f"{option} makes latents, which its {has} decodes: give it as --vae, with its subfolder")


def pipeline_index(args: TrainingArguments) -> dict[str, Any]:
    """What the pipeline that the network is from says of itself; nothing of a network in a folder of its own."""
    return config_of(DiffusionPipeline, args) or {}


def config_of(cls: Any, args: TrainingArguments, **where: Any) -> dict[str, Any] | None:
    """The config of a class beside the pretrained network; None where there is none.

    Raises:
        ValueError: if it cannot be fetched, which does not say that there is none.
    """
    name = args.model_name_or_path
    try:
        return cls.load_config(name, cache_dir=args.cache_dir, revision=args.revision, **where)
    except OSError as error:
        missing = isinstance(error.__context__, EntryNotFoundError) or Path(name or "").is_dir()
        if isinstance(error.__context__, LocalEntryNotFoundError) and not HF_HUB_OFFLINE:
            missing = False  # the Hub did not answer
        if missing:
            return None
        raise ValueError(f"--model_name_or_path {name}: its {cls.config_name} cannot be read: {error}") from error


def decoder_in(index: dict[str, Any]) -> str | None:
    """The component of a pipeline that decodes latents, if it has one."""
    return next((name for name in ("vae", "vqvae", "movq") if index.get(name, (None, None))[0] is not None), None)


def network_class(option: str, config: dict[str, Any], conditional: bool) -> Any:
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
    if (embedding := config.get("time_embedding_type", "positional")) != "positional":
        raise ValueError(
            f"{option} has time_embedding_type = {embedding!r}, which does not take all timesteps between 0 and "
            "num_train_timesteps: take a network with 'positional'"
        )
    return cls


def with_velocities(unet: Any) -> Any:
    """An ordinary network, whose output is like its input, as one of `cat([x, v], 1)` that ignores v as yet; others
    as they are."""
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
    if unknown := sorted(set(attention) - set(shorter)):
        raise ValueError(f"--attention_resolutions {unknown} are no levels of the network: use any of {shorter}")
    down = tuple("AttnDownBlock2D" if side in attention else "DownBlock2D" for side in shorter)
    up = tuple("AttnUpBlock2D" if side in attention else "UpBlock2D" for side in reversed(shorter))
    return UNet2DModel(
        sample_size=resolution_of(height, width),
        in_channels=METHODS[args.method].input_factor(args) * channels,
        out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(widths),
        layers_per_block=args.layers_per_block or (1 if small else 2),
        norm_num_groups=math.gcd(32, *widths),
        attention_head_dim=math.gcd(8, *widths),
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
    """Make the network fit for training, in place: its image size, Technique 3, gradient checkpointing, no labels
    dropped but by `--class_dropout`.

    Raises:
        ValueError: for a size that the network cannot have, or a network that does not do what is asked.
    """
    size = sides(resolution)
    if levels := len(unet.config.get("block_out_channels") or []):
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
    for module in unet.modules():
        if isinstance(module, LabelEmbedding):  # of transformers: each block drops labels of its own, by the global RNG
            module.dropout_prob = 0.0
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
            answer = with_labels(as_unet_call(unet), classes)(sample, torch.tensor([0.0, 1.5])).sample
    except Exception as error:  # whatever it misses
        raise ValueError(f"a {name} of this config does not run on a noisy image and a timestep: {error}") from error
    finally:
        unet.train(training)
    if answer.shape != (2, answering, *size):
        raise ValueError(f"a {name} of this config answers {tuple(answer.shape)} to {tuple(sample.shape)}")


def is_unconditional(unet: Any) -> bool:
    """Whether a network ignores the timestep, as `make_unconditional` leaves it."""
    last = getattr(getattr(unet, "time_embedding", None), "linear_2", None)
    return last is not None and not last.weight.any()


def make_unconditional(unet: Any) -> None:
    """Technique 3 of NCSNv2: from now on the network ignores the timestep, here and wherever it is loaded. The last
    weight of the time embedding becomes zero and stays so; its bias remains to be learned.

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
