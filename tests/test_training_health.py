"""A training whose network diverges ends at that step, and what was good before stays."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from training import ROOT, SMALL, TINY, arguments, launch, load, plan_for, small_unet

from diffusers_gm import data
from diffusers_gm.training.folder import read_log
from diffusers_gm.training.health import Health
from diffusers_gm.training.objective import Objective, build_scheduler

DIVERGING = f"{SMALL} --max_train_steps 9 --checkpointing_steps 1 --checkpoints_total_limit 1 --validation_steps 0"


@pytest.fixture
def network_without_gradient(tmp_path):
    """A network with a finite loss and a gradient of nan: its activations are too large for the square of one."""
    unet = small_unet()
    with torch.no_grad():
        unet.conv_in.weight.mul_(1e25)
    unet.save_pretrained(tmp_path / "network")
    return tmp_path / "network"


def test_a_gradient_of_nan_in_the_last_step_is_not_saved(train, tmp_path, network_without_gradient):
    options = TINY.replace("--block_out_channels 8 16", f"--model_name_or_path {network_without_gradient}")
    options = options.replace("--max_train_steps 2", "--max_train_steps 1 --checkpointing_steps 1")
    with pytest.raises(RuntimeError, match=r"the norm of the gradient is nan at step 1: .* no checkpoint of before"):
        train(options, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert not list((tmp_path / "out").glob("*checkpoint-*"))


def test_it_is_noticed_at_its_step_and_not_when_losses_are_logged(train, tmp_path, network_without_gradient):
    options = TINY.replace("--block_out_channels 8 16", f"--model_name_or_path {network_without_gradient}")
    with pytest.raises(RuntimeError, match="is nan at step 1:"):
        train(
            options.replace("--max_train_steps 2", "--max_train_steps 99 --logging_steps 50"),
            "--output_dir",
            tmp_path / "out",
        )
    assert read_log(tmp_path / "out") == []


def test_what_is_said_is_one_line(tmp_path, network_without_gradient):
    options = TINY.replace("--block_out_channels 8 16", f"--model_name_or_path {network_without_gradient}")
    command = [sys.executable, ROOT / "train_gm_sgm.py", *options.split(), "--output_dir", tmp_path / "out"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("train_gm_sgm.py: error: the norm of the gradient is nan at step 1")


def test_the_look_at_a_network_takes_no_larger_a_batch_than_the_training(train, tmp_path, monkeypatch):
    sizes, forward = [], UNet2DModel.forward
    monkeypatch.setattr(UNet2DModel, "forward", lambda unet, x, *rest: sizes.append(len(x)) or forward(unet, x, *rest))
    options = TINY.replace("--train_batch_size 16", "--train_batch_size 3").replace("--num_validation_images 4", "")
    train(options, "--num_validation_images 1 --eval_batch_size 1 --output_dir", tmp_path / "out")
    assert set(sizes) == {1, 3}


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (1e30, r"the weights have (norm inf|loss (nan|inf))"),
        (1e4, r"the weights have loss (nan|inf)"),
        (10, r"the weights have loss \d.*, a network that answers 0 "),
    ],
)
def test_weights_that_blew_up_do_not_replace_the_last_good_checkpoint(train, tmp_path, rate, said):
    """The rate of the first step is 0. The loss of the second, that of the weights before it, is a good one."""
    options = f"{DIVERGING} --lr_scheduler constant_with_warmup --lr_warmup_steps 1 --learning_rate {rate}"
    with pytest.raises(RuntimeError, match=rf"{said}.* at step 2: .*; checkpoint-1 is the last good one"):
        train(options, "--output_dir", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-1"]
    weights = load(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert max(float(weight.abs().max()) for weight in weights.values()) < 2


def test_weights_that_blew_up_in_the_last_step_are_no_model(train, tmp_path):
    """Also where there is no checkpoint before which one would look."""
    options = f"{TINY} --lr_scheduler constant_with_warmup --lr_warmup_steps 1 --learning_rate 10"
    with pytest.raises(RuntimeError, match=r"the weights have loss .* at step 2: .* there is no checkpoint of before"):
        train(options, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_a_rate_from_which_a_network_comes_back_is_no_alarm(train, tmp_path):
    train(f"{DIVERGING} --lr_scheduler constant --learning_rate 0.3", "--output_dir", tmp_path / "out")
    assert max(entry["loss"] for entry in read_log(tmp_path / "out")) > 1.2, "worse than to answer 0"
    assert (tmp_path / "out" / "model_index.json").exists()


# --- In this process ---


def stand_in(**options):
    """What is asked of an accelerator."""
    return SimpleNamespace(
        **{"device": torch.device("cpu"), "scaler": None, "mixed_precision": "no", "reduce": lambda x, how: x} | options
    )


@pytest.fixture(params=["gm-sgm", "ncsnv2", "cld", "ddpm"])
def healthy(request, tmp_path):
    args = arguments(method=request.param)
    plan, unet = plan_for(args), small_unet(method=request.param)
    objective = Objective(args, plan, build_scheduler(args, plan))
    ema = EMAModel(unet.parameters(), foreach=True)
    return Health(stand_in(), unet, ema, objective, data.split_digits()[0][:4], tmp_path, 0.1)


def test_a_healthy_network_passes_and_is_left_as_it_was(healthy):
    before = {name: weight.clone() for name, weight in healthy.unet.state_dict().items()}
    random_state = torch.get_rng_state()
    healthy.unet.train()
    healthy.check_network(1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], weight) for name, weight in healthy.unet.state_dict().items())
    assert healthy.unet.training


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_weight_of_the_network_or_of_the_average_is_enough(healthy, bad):
    with torch.no_grad():
        healthy.ema.shadow_params[-1][0] = bad
    with pytest.raises(RuntimeError, match=r"the averaged weights have norm (nan|inf) at step 3: .* below 0.1"):
        healthy.check_network(3)
    with torch.no_grad():
        healthy.unet.conv_out.bias[0] = bad
    with pytest.raises(RuntimeError, match=r"the weights have norm (nan|inf) at step 3"):
        healthy.check_network(3)


def test_the_first_bad_gradient_is_named_and_so_is_the_loss(tmp_path):
    health = Health(stand_in(), small_unet(), None, lambda network, images: images, torch.zeros(1), tmp_path, 0.1)
    health.note_gradient(1, torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="the norm of the gradient is inf at step 2"):
        health.note_gradient(2, torch.tensor(math.inf))
    with pytest.raises(RuntimeError, match="the loss is nan at step 5"):
        health.check_loss(5, math.nan)
    health.note_gradient(6, None)
    health.check_loss(6, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_next_step_looks(tmp_path):
    device = torch.device("cuda")
    unet = small_unet().to(device)
    health = Health(stand_in(device=device), unet, None, lambda n, images: images, torch.zeros(1), tmp_path, 0.1)
    health.note_gradient(1, torch.tensor(math.nan, device=device))
    with pytest.raises(RuntimeError, match="the norm of the gradient is nan at step 1"):
        health.note_gradient(2, torch.tensor(1.0, device=device))
    health.note_gradient(3, torch.tensor(math.nan, device=device))
    with pytest.raises(RuntimeError, match="the norm of the gradient is nan at step 3"):
        health.check_loss(3, 1.0)


def test_steps_that_fp16_skips_are_no_fault_but_skipping_all_is(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-18)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1)
    accelerator = stand_in(scaler=scaler, mixed_precision="fp16")
    health = Health(accelerator, small_unet(), None, lambda n, images: images, torch.zeros(1), tmp_path, 0.1)

    def one(step):
        scaler.scale(weight.sum() * math.inf).backward()
        scaler.unscale_(optimizer)
        health.note_gradient(step, torch.nn.utils.clip_grad_norm_([weight], 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        health.check_loss(step, 1.0)

    one(1)  # 2^-19
    one(2)  # 2^-20
    with pytest.raises(RuntimeError, match=r"not finite even for losses scaled by 4\.\S+e-07 at step 3: .* fp16"):
        one(3)
    assert float(weight.detach()) == 1


# --- Precision ---


def test_fp16_on_a_cpu_is_refused_whoever_asks_for_it(train, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU"):
        train(TINY, "--mixed_precision fp16 --output_dir", tmp_path / "out")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="accelerate's settings"):
        train(TINY, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_record_says_which_precision_accelerate_chose(train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(TINY, "--output_dir", tmp_path / "out")
    assert "| `mixed_precision` | bf16 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_end_together(tmp_path, network_without_gradient):
    """None waits for the other: that would last until the group's timeout of ten minutes."""
    options = TINY.replace("--block_out_channels 8 16", f"--model_name_or_path {network_without_gradient}")
    two = ("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29613")
    with pytest.raises(AssertionError, match="the norm of the gradient is nan at step 1"):
        launch(options, "--output_dir", tmp_path / "two", launcher=two, env={"ACCELERATE_USE_CPU": "true"})
