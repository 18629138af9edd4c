import os
import sys

# One thread per test process: the suite runs in parallel on few cores, and tiny tensors gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_client import OTHER, TOKEN
from hub_server import FakeHub
from networks import tiny_network
from training import no_accelerator_left_behind, train  # noqa: F401

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def global_rng_untouched():
    """No test, and so nothing of ours that it calls with a generator, may draw from the global generator."""
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global random state was used"


@pytest.fixture(autouse=True)
def lines_told_apart(monkeypatch):
    """No figure that a test saves has two named lines in an axis that look alike in grey."""
    if "matplotlib.figure" not in sys.modules:
        return
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    save = Figure.savefig

    def checked(figure, *args, **kwargs):
        for axis in figure.axes:
            handles, labels = axis.get_legend_handles_labels()
            lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
            looks = {
                label: (str(line.get_marker()), str(line._dash_pattern), line.get_linewidth())
                for label, line in zip(labels, lines, strict=True)
                if isinstance(line, Line2D)
            }
            assert len(set(looks.values())) == len(looks), f"alike in grey: {looks}"
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", checked)


@pytest.fixture
def tiny_unet() -> UNet2DModel:
    """An untrained network for 8x8 gray images, always the same."""
    return tiny_network()


@pytest.fixture
def tiny_velocity_unet() -> UNet2DModel:
    """An untrained velocity network for 8x8 gray images, always the same."""
    return tiny_network(2, 1)


@pytest.fixture
def ddpm(tiny_unet, tmp_path):
    """A folder with a DDPMPipeline."""
    folder = tmp_path / "ddpm"
    DDPMPipeline(tiny_unet, DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def empty_server():
    with FakeHub({TOKEN: "me", OTHER: "other"}) as running:
        yield running
