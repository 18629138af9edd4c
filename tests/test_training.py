"""The training script, from its options to the model card."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from images import corrupt, save_images, save_parquet
from PIL import Image
from training import SECRET, SMALL, TINY, WEIGHTS, arguments, launch, load, plan_for, same_state, small_unet

from diffusers_gm import GMLangevinScheduler, GMSGMPipeline, UnconditionalPipeline, data
from diffusers_gm.pictures import image_grid
from diffusers_gm.training.draws import Draws
from diffusers_gm.training.folder import ARGS_FILE, LOCK, find_checkpoint, list_checkpoints, read_log
from diffusers_gm.training.objective import Objective, build_scheduler
from diffusers_gm.training.samples import sample_images
from diffusers_gm.training.stopping import INTERRUPTED

# --- One training, end to end ---

EIGHT_STEPS = (
    f"{SMALL} --method gm-sgm --objective score --dropout 0.1 --random_flip --max_train_steps 8 --logging_steps 2 "
    "--gradient_accumulation_steps 2 --validation_steps 4 --checkpointing_steps 4"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "digits"
    printed = launch(EIGHT_STEPS, "--report_to tensorboard --hub_token", SECRET, "--output_dir", folder)
    return folder, printed


def test_what_a_training_leaves_behind(trained):
    folder, printed = trained
    names = {path.name for path in folder.iterdir() if path.name != LOCK}
    assert names == {
        *("model_index.json", "pipeline.py", "unet", "scheduler", "samples.png", "README.md", "training_args.json"),
        *("training_log.jsonl", "checkpoint-4", "checkpoint-8", "samples", "logs"),
    }
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-0000004.png"]
    assert Image.open(folder / "samples.png").size == (132, 132), "2 x 2 images, enlarged 8 times, a gap of 4"
    assert list((folder / "logs").rglob("events.*"))

    log = read_log(folder)
    assert [entry["step"] for entry in log] == [2, 4, 6, 8]
    assert all(set(entry) == {"step", "loss", "lr", "images_per_second", "loss_by_level"} for entry in log)
    assert all(0 < entry["loss"] < 10 and entry["images_per_second"] > 0 for entry in log)

    record = json.loads((folder / "training_args.json").read_text())
    largest_distance = torch.cdist(*[data.split_digits()[0].flatten(1)] * 2).max()
    assert record["sigma_max"] == pytest.approx(float(largest_distance), abs=1e-4)
    assert sum(w * c**2 for w, c in zip(record["mixture_weights"], record["mixture_scales"], strict=True)) == (
        pytest.approx(1)
    )
    assert (record["max_train_steps"], record["learning_rate"], record["num_images"]) == (8, 2e-3, 1437)
    assert record["versions"]["torch"] == torch.__version__
    assert "0 to 8 of 32 images" in printed


def test_no_token_and_no_place_on_this_host_is_written(trained):
    folder, _ = trained
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert str(folder.parent).encode() not in content, path


def test_the_saved_pipeline_has_the_averaged_weights_and_draws_the_saved_samples(trained):
    folder, _ = trained
    pipeline = GMSGMPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, GMLangevinScheduler)
    assert pipeline.scheduler.config["prediction_type"] == "scaled_score"
    assert pipeline.scheduler.config["model_noise"] == "mixture"
    assert (
        pipeline.scheduler.config["sigma_max"] == json.loads((folder / "training_args.json").read_text())["sigma_max"]
    )

    average = load(folder / "checkpoint-8" / "custom_checkpoint_1.pkl")
    parameters = dict(pipeline.unet.named_parameters())
    assert all(map(torch.equal, average["shadow_params"], parameters.values()))
    last = load(folder / "checkpoint-8" / "model.safetensors")
    assert not torch.equal(last["conv_in.weight"], parameters["conv_in.weight"])

    grid = image_grid(sample_images(pipeline, 4, batch_size=3, num_inference_steps=4, seed=0))
    assert grid.tobytes() == Image.open(folder / "samples.png").tobytes(), "also in batches of another size"


def test_the_model_card_says_what_was_done(trained):
    folder, _ = trained
    card = ModelCard.load(folder / "README.md")
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "diffusers_gm"
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert metadata["license"] == "apache-2.0"
    assert "datasets" not in metadata, "digits are not on the Hub"
    assert card.text.startswith("\n# GM-SGM: handwritten digits, 8x8\n")
    assert not re.search(r"[$]|\{[{%]|None", card.text), "every place of the templates is filled"
    assert "--objective score --dataset_name digits --random_flip --block_out_channels 8 16" in card.text
    for said in (
        "![samples](samples.png)",
        "2006.09011",
        "1437 images",
        "pip install",
        "author = {Song",
        "Seed 0",
        "torch",
        "8 steps",
    ):
        assert said in card.text
    log = read_log(folder)
    assert f"Final loss {sum(entry['loss'] for entry in log) / len(log):.4g}" in card.text


def test_the_snippets_of_the_model_card_run(trained, tmp_path, monkeypatch):
    """One after another, as they stand."""
    snippets = re.findall(r"```python\n(.*?)```", (trained[0] / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 3, "how to draw, to calibrate, and to change the scheduler"
    shutil.copytree(trained[0], tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    monkeypatch.chdir(tmp_path / "model")
    scope, quick = {}, snippets[1].replace("calls=(5, 10, 20)", "calls=(4,)")
    with torch.random.fork_rng():  # the later ones leave their noise to chance
        exec("\n".join((snippets[0], quick, snippets[2])), scope)
    assert type(scope["pipeline"].scheduler).__name__ == "GMLangevinScheduler"
    assert scope["pipeline"].scheduler.config.algorithm_type == "ancestral"
    assert len(scope["images"]) == 4
    assert Image.open("grid.png").size == (132, 132), "2 x 2 images, enlarged 8 times, a gap of 4"


def test_resumed_equals_uninterrupted(trained, tmp_path):
    """Dropout, flips, noise, order of the data, accumulated gradients: to the bit, in a new process."""
    folder, _ = trained
    launch(EIGHT_STEPS, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", folder / "checkpoint-4")
    saved = [WEIGHTS, *(f"checkpoint-8/{name}" for name in ("model.safetensors", "optimizer.bin"))]
    saved += [f"checkpoint-8/custom_checkpoint_{i}.pkl" for i in range(2)]
    for name in saved:
        assert same_state(load(folder / name), load(tmp_path / "resumed" / name)), name
    assert not same_state(*(load(folder / f"checkpoint-{step}/model.safetensors") for step in (4, 8)))
    losses = [[entry["loss"] for entry in read_log(f)] for f in (folder, tmp_path / "resumed")]
    assert losses[1] == losses[0][2:]


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_accumulated_gradients(tmp_path):
    """Other noise and other images in each process, one step of the schedule for both."""
    options = f"{SMALL} --max_train_steps 6 --logging_steps 1 --checkpointing_steps 3 --validation_steps 0"
    two = ("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29611")
    launch(options, "--output_dir", tmp_path / "two", launcher=two, env={"ACCELERATE_USE_CPU": "true"})
    drawn = [
        sample_images(GMSGMPipeline.from_pretrained(tmp_path / "two"), 4, batch, num_inference_steps=4, seed=0)
        for batch in (4, 2)
    ]
    for images in drawn:
        saved = Image.open(tmp_path / "two" / "samples.png").tobytes()
        assert image_grid(images).tobytes() == saved, "bit by bit what one process draws"
    launch(options, "--gradient_accumulation_steps 2 --output_dir", tmp_path / "one")
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [entry["lr"] for entry in logs[0]] == [entry["lr"] for entry in logs[1]]
    assert [entry["loss"] for entry in logs[0]] == pytest.approx([entry["loss"] for entry in logs[1]], rel=1e-3)

    launch(
        *(options, "--output_dir", tmp_path / "resumed"),
        *("--resume_from_checkpoint", tmp_path / "two" / "checkpoint-3"),
        launcher=two,
        env={"ACCELERATE_USE_CPU": "true"},
    )
    assert same_state(load(tmp_path / "two" / WEIGHTS), load(tmp_path / "resumed" / WEIGHTS))

    for minutes, finished in ((1e-9, False), (60, True)):
        launch(
            *(options, "--output_dir", tmp_path / "sliced"),
            *("--resume_from_checkpoint latest --max_train_minutes", minutes),
            launcher=two,
            env={"ACCELERATE_USE_CPU": "true"},
        )
        assert (tmp_path / "sliced" / WEIGHTS).exists() == finished
    assert same_state(load(tmp_path / "two" / WEIGHTS), load(tmp_path / "sliced" / WEIGHTS))


def test_training_learns(train, tmp_path):
    options = "--block_out_channels 16 32 --train_batch_size 64 --max_train_steps 60 --validation_steps 0"
    train(options, "--output_dir", tmp_path / "out", "--validation_inference_steps 4 --checkpointing_steps 0")
    log = read_log(tmp_path / "out")
    assert log[0]["loss"] > 0.9, "a network that says nothing has loss 1"
    assert log[-1]["loss"] < 0.9


def test_a_network_that_diverges_is_reported(train, tmp_path):
    with pytest.raises(RuntimeError, match=r"gradient is (nan|inf) at step 2: .* --learning_rate below 1e\+30"):
        train(
            *(SMALL, "--max_train_steps 20 --logging_steps 4 --learning_rate 1e30 --lr_scheduler constant"),
            *("--output_dir", tmp_path / "out"),
        )


# --- Interruptions ---


def test_a_training_killed_while_it_saves_keeps_its_last_checkpoint(train, tmp_path, monkeypatch):
    options = f"{SMALL} --max_train_steps 4 --checkpointing_steps 2 --checkpoints_total_limit 1 --validation_steps 0"
    train(options, "--output_dir", tmp_path / "whole")
    assert [path.name for path in list_checkpoints(tmp_path / "whole")] == ["checkpoint-4"]

    save = Accelerator.save_state

    def killed_at_the_second(accelerator, folder):
        save(accelerator, folder)
        if folder.endswith("-4"):
            Path(folder, "optimizer.bin").write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "save_state", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            train(options, "--output_dir", tmp_path / "killed")
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["checkpoint-2"]
    assert not (tmp_path / "killed" / "model_index.json").exists()

    with pytest.raises(ValueError, match="holds a training up to checkpoint-2"):
        train(options, "--output_dir", tmp_path / "killed")
    train(options, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint latest")
    assert same_state(load(tmp_path / "whole" / WEIGHTS), load(tmp_path / "killed" / WEIGHTS))
    assert not list((tmp_path / "killed").glob("tmp-*"))


@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2 --uncertainty_weighting", "cld", "ddpm"])
def test_slices_of_a_training_give_what_one_run_does(train, tmp_path, capsys, method):
    """One command from the first step to the last, here a step at a time, on colour images in parquet files."""
    parquet, _ = save_parquet(tmp_path)
    options = (
        f"{SMALL} --method {method} --train_data_dir {parquet} --dropout 0.1 --random_flip --max_train_steps 4 "
        "--checkpointing_steps 3 --checkpoints_total_limit 1 --validation_steps 0"
    )
    whole, sliced = tmp_path / "whole", tmp_path / "sliced"
    train(options, "--output_dir", whole)
    for step in (1, 2, 3):
        train(options, "--output_dir", sliced, "--max_train_minutes 1e-9 --resume_from_checkpoint latest")
        assert f"are over after {step} of 4 steps: run the same command again to go on" in capsys.readouterr().out
        names = {path.name for path in sliced.iterdir() if path.name != LOCK}
        assert names == {f"checkpoint-{step}", "samples", "training_args.json", "training_log.jsonl"}, "not finished"
    train(options, "--output_dir", sliced, "--max_train_minutes 60 --resume_from_checkpoint latest")
    assert "are over" not in capsys.readouterr().out
    saved = ["model.safetensors", *(["model_1.safetensors"] if "uncertainty" in method else []), "optimizer.bin"]
    saved += [f"custom_checkpoint_{i}.pkl" for i in range(2)]
    for name in [WEIGHTS, *(f"checkpoint-4/{name}" for name in saved)]:
        assert same_state(load(whole / name), load(sliced / name)), name
    assert (whole / "samples.png").read_bytes() == (sliced / "samples.png").read_bytes()


def test_a_first_slice_says_how_to_go_on(train, tmp_path, capsys):
    options = TINY, "--max_train_minutes 1e-9 --output_dir", tmp_path / "out"
    train(*options)
    said = "after 1 of 2 steps: run the same command again with --resume_from_checkpoint latest to go on"
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a training up to checkpoint-1: continue with --resume_from_checkpoint"):
        train(*options)
    train(*options, "--resume_from_checkpoint latest")
    assert (tmp_path / "out" / "model_index.json").exists(), "the last step ends the training, however late it is"


def test_what_may_not_change_on_resume(train, trained, tmp_path):
    checkpoint = trained[0] / "checkpoint-4"
    same = EIGHT_STEPS, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", checkpoint
    for changed, said in {
        "--objective denoiser": "--objective was 'score' and is 'denoiser'",
        "--method ncsnv2": "--method was 'gm-sgm' and is 'ncsnv2'",
        "--sigma_max 5": "--sigma_max was 9.6299 and is 5.0",
        "--max_train_steps 12": "--max_train_steps was 8 and is 12",
        "--seed 1": "--seed was 0 and is 1",
        "--no_use_ema": "--use_ema was True and is False",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            train(*same, changed)
    assert not (tmp_path / "out").exists()


def test_where_there_is_no_checkpoint(tmp_path):
    latest = arguments(output_dir=str(tmp_path / "out"), resume_from_checkpoint="latest")
    assert find_checkpoint(latest) is None, "so that one command starts a training and goes on with it"
    for resume in (str(tmp_path), "checkpoint-7"):
        args = arguments(output_dir=str(tmp_path / "out"), resume_from_checkpoint=resume)
        with pytest.raises(ValueError, match=r"--resume_from_checkpoint .* no complete checkpoint"):
            find_checkpoint(args)


# --- Other data and networks ---


def test_images_of_a_folder_some_of_which_cannot_be_read(train, tmp_path, caplog):
    folder = save_images(tmp_path / "images", 30, size=(12, 10), mode="RGB")
    corrupt(folder / "007.png")
    train(
        TINY.replace("--train_batch_size 16", "--train_batch_size 30"),
        f"--train_data_dir {folder} --resolution 8 --random_flip --num_train_timesteps auto",
        f"--sigma_min 0.1 --output_dir {tmp_path / 'out'}",
    )
    assert "1 of 30 training images examined cannot be read" in caplog.text
    assert GMSGMPipeline.from_pretrained(tmp_path / "out").unet.config["in_channels"] == 3
    assert "the folder `images`, 30 images" in (tmp_path / "out" / "README.md").read_text()


def test_parquet_files_and_a_network_given_by_its_config(train, trained, tmp_path):
    folder, _ = save_parquet(tmp_path)
    config = json.loads((trained[0] / "unet" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "in_channels": 1, "out_channels": 1, "layers_per_block": 2}))
    train(
        TINY.replace("--block_out_channels 8 16", f"--model_config {path}"),
        f"--train_data_dir {folder} --max_train_samples 20 --no_use_ema --output_dir {tmp_path / 'out'}",
    )
    unet = GMSGMPipeline.from_pretrained(tmp_path / "out").unet
    assert (unet.config["in_channels"], unet.config["layers_per_block"]) == (1, 2)
    record = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert (record["image_column"], record["num_images"], record["model_config"]) == (
        "img",
        20,
        "config.json",
    )


def test_fine_tuning_starts_from_the_weights_given(train, trained, tmp_path):
    train(
        TINY.replace("--block_out_channels 8 16", f"--model_name_or_path {trained[0]}"),
        f"--learning_rate 1e-12 --gradient_checkpointing --mixed_precision bf16 --output_dir {tmp_path / 'out'}",
    )
    before, after = (load(folder / WEIGHTS) for folder in (trained[0], tmp_path / "out"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_a_fine_tuning_goes_on_with_the_noise_and_the_conditioning_that_it_began_with(train, tmp_path):
    """Those of the network that it was given, by which its command does not name them."""
    train(f"{TINY} --conditioning none --mixture_weights 0.9 0.1 --mixture_scales 1 6", "--output_dir", tmp_path / "of")
    fine_tuning = f"{TINY} --model_name_or_path {tmp_path / 'of'}".replace("--block_out_channels 8 16", "")
    laws = []
    for more in ("", "--resume_from_checkpoint checkpoint-1"):
        train(fine_tuning, "--checkpointing_steps 1 --output_dir", tmp_path / "tuned", more)
        config = json.loads((tmp_path / "tuned" / "scheduler" / "scheduler_config.json").read_text())
        laws.append((config["mixture_weights"], config["mixture_scales"]))
        assert json.loads((tmp_path / "tuned" / "training_args.json").read_text())["conditioning"] == "none"
    assert laws[0] == laws[1]
    assert laws[0][0] == pytest.approx([0.9, 0.1])


def test_a_finished_pipeline_is_calibrated_where_wanted(train, tmp_path):
    """The saved sampler has the levels of the averaged network."""
    train(TINY, "--calibrate fast --output_dir", tmp_path / "out")
    loaded = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert type(loaded.scheduler).__name__ == "CalibratedMultistepScheduler"
    assert "10" in loaded.scheduler.config.calibration
    assert json.loads((tmp_path / "out" / ARGS_FILE).read_text())["calibrate"] == "fast"
    assert loaded(1, 10, torch.Generator().manual_seed(0), output_type="pt").images.isfinite().all()


def test_a_model_is_not_lost_to_its_calibration(train, tmp_path, capsys):
    """It is saved before, and a training that was ended meanwhile is not done: it calibrates then."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    options = f"{TINY} --calibrate fast --checkpointing_steps 2 --resume_from_checkpoint latest --output_dir"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["diffusers_gm.calibration.calibrate"], "calibrate_in_full", interrupted)
        with pytest.raises(SystemExit, match=str(INTERRUPTED)):
            train(options, tmp_path / "out")
    command = f"python -m diffusers_gm.calibrate {tmp_path / 'out'}"
    assert f"interrupted: the model is saved, and not calibrated, which {command} does" in capsys.readouterr().err
    before = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert type(before.scheduler) is GMLangevinScheduler
    train(options, tmp_path / "out")
    after = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert type(after.scheduler).__name__ == "CalibratedMultistepScheduler"
    assert same_state(after.unet.state_dict(), before.unet.state_dict())


def test_few_noise_levels_are_calibrated_for_as_many_calls(train, tmp_path):
    train(TINY, "--method ncsnv2 --objective score --num_train_timesteps 12 --calibrate fast --output_dir", tmp_path)
    calibration = GMSGMPipeline.from_pretrained(tmp_path).scheduler.config.calibration
    assert {name for name in calibration if name.isdigit()} == {"5", "8", "10"}


def test_the_baseline_is_diffusers_own_ddpm(train, tmp_path):
    """Its loss is that of diffusers' example, and diffusers' pipeline samples what was trained."""
    args = arguments(method="ddpm", ddpm_beta_schedule="squaredcos_cap_v2")
    plan, unet = plan_for(args), small_unet(method="ddpm")
    scheduler = build_scheduler(args, plan)
    images = data.split_digits()[0][:8]
    draws = Draws.always_the_same(images)
    with torch.no_grad():
        losses = Objective(args, plan, scheduler)(unet, images, draws)
        noise = Draws.always_the_same(images).noise.normal(images.shape)
        timesteps = (draws.levels * 1000).long()
        sigmas = Objective(args, plan, scheduler).sigma(draws.levels)
        alphas = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod[timesteps].double()
        torch.testing.assert_close(sigmas, (1 / alphas - 1).sqrt(), rtol=1e-5, atol=0)
        theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").add_noise(images, noise, timesteps)
        torch.testing.assert_close(losses.mean(), F.mse_loss(unet(theirs, timesteps).sample, noise))

    train(TINY, "--method ddpm", "--output_dir", tmp_path / "ddpm")
    unet, scheduler = (
        cls.from_pretrained(tmp_path / "ddpm", subfolder=name)
        for cls, name in ((UNet2DModel, "unet"), (DDPMScheduler, "scheduler"))
    )
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    ours = UnconditionalPipeline.from_pretrained(tmp_path / "ddpm")
    ours.set_progress_bar_config(disable=True)
    one, two = (
        p(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipeline, ours)
    )
    np.testing.assert_allclose(one, two, atol=1e-6)
    with pytest.raises(ValueError, match="--algorithm_type ode means nothing for --method ddpm"):
        arguments(method="ddpm", algorithm_type="ode")
