"""What is there when a training begins: a finished model, another training, a network of another kind."""

import json
import shlex
from functools import wraps
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from images import save_images
from networks import tiny_autoencoder, tiny_network
from PIL import Image
from training import SMALL, TINY, WEIGHTS, arguments, load, same_state

from diffusers_gm import AnnealedLangevinScheduler, GMLangevinScheduler, GMSGMPipeline, NCSNv2Pipeline
from diffusers_gm.data.labels import labels_of_files
from diffusers_gm.training.folder import ARGS_FILE, claim
from diffusers_gm.training.network import given_unet
from diffusers_gm.training.objective import levels_of_network
from diffusers_gm.training.plan import command_line

OPTIONS = f"{SMALL} --max_train_steps 2 --checkpointing_steps 2 --validation_steps 0 --resume_from_checkpoint latest"


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.name[0] != "."}


def test_a_finished_training_is_left_as_it_is(train, tmp_path, capsys):
    """The command of a training in slices is run until it says that there is nothing left; what was made of the model
    since, measurements, a calibration, a better card, stays."""
    folder = tmp_path / "out"
    train(OPTIONS, "--output_dir", folder)
    for name in ("results.json", "README.md", "scheduler/scheduler_config.json"):
        (folder / name).write_text((folder / name).read_text() + "\n" if (folder / name).is_file() else "{}")
    record = json.loads((folder / ARGS_FILE).read_text())
    assert record["step_size_criterion"] is None
    record["step_size_criterion"] = "fixed_point"  # the default of earlier versions, which wrote it down
    (folder / ARGS_FILE).write_text(json.dumps(record))
    before = contents(folder)
    capsys.readouterr()
    train(OPTIONS, "--output_dir", folder)
    assert "has the model of all 2 steps: there is nothing to do" in capsys.readouterr().out
    assert contents(folder) == before
    train(OPTIONS, "--dry_run --output_dir", folder)
    assert "steps: 2 to 2" in capsys.readouterr().out
    # What a sampler of the model is to be may change: then it is written anew.
    train(OPTIONS, "--num_langevin_steps 2", "--output_dir", folder)
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["num_langevin_steps"] == 2
    assert not (folder / "results.json").exists()
    assert (folder / "results-before.json").read_text() == "{}", "what took long to measure is not lost"


def test_a_finished_training_is_the_same_wherever_it_lies_and_however_it_is_watched(train, tmp_path, monkeypatch):
    """Also as a version wrote it that had fewer options."""
    monkeypatch.chdir(tmp_path)
    train(OPTIONS, "--output_dir out")
    record = json.loads(Path("out", ARGS_FILE).read_text())
    Path("out", ARGS_FILE).write_text(json.dumps({name: record[name] for name in record.keys() - {"lr_num_cycles"}}))
    Path("out/results.json").write_text("{}")
    before = contents(tmp_path / "out")
    watched = "--logging_steps 3 --eval_batch_size 2 --num_validation_images 2 --checkpointing_steps 1"
    for more in ("--output_dir out/", f"--output_dir {tmp_path / 'out'}", f"--output_dir out {watched}"):
        train(OPTIONS, more, "--train_batch_size 8 --gradient_accumulation_steps 2")
        assert contents(tmp_path / "out") == before, more
    Path("out").rename("moved")
    before = contents(tmp_path / "moved")
    train(OPTIONS, "--output_dir moved")
    assert contents(tmp_path / "moved") == before
    train(OPTIONS, "--timestep_spacing karras --output_dir moved")
    assert not Path("moved/results.json").exists(), "another sampler is another model"


def test_what_was_measured_of_a_model_is_set_aside_when_another_takes_its_place(train, tmp_path):
    folder, measured = tmp_path / "out", ("results.json", "results.md", "results.png", "calibration.png")
    options = f"{OPTIONS} --lr_scheduler constant --output_dir {folder}"
    train(options)
    for steps in (4, 6):  # longer, twice
        for name in measured:
            (folder / name).write_text(f"measured before {steps}")
        train(options, f"--max_train_steps {steps}")
        assert not {path.name for path in folder.iterdir()} & {*measured}
    for name in map(Path, measured):
        assert (folder / f"{name.stem}-before{name.suffix}").read_text() == "measured before 4"
        assert (folder / f"{name.stem}-before-2{name.suffix}").read_text() == "measured before 6"


def test_samples_of_a_training_are_gone_when_another_takes_its_place(train, tmp_path):
    """Not when it goes on itself, and not what is not its own."""
    options = f"{OPTIONS} --validation_steps 1 --lr_scheduler constant --output_dir {tmp_path / 'out'}"
    samples = tmp_path / "out" / "samples"
    train(options, "--max_train_steps 4")
    (samples / "step-by-step.png").write_text("mine")
    train(options, "--max_train_steps 5")
    steps = {f"step-000000{step}.png" for step in (1, 2, 3)}
    assert {path.name for path in samples.iterdir()} == {*steps, "step-by-step.png"}
    train(options.replace("--resume_from_checkpoint latest", "--overwrite_output_dir"))
    assert {path.name for path in samples.iterdir()} == {"step-0000001.png", "step-by-step.png"}


def test_a_model_of_an_earlier_training_is_not_taken_for_that_of_the_last(train, tmp_path, monkeypatch):
    """One that ended after its last checkpoint, before it had a pipeline."""
    folder = save_images(tmp_path / "images", 20, size=(8, 8))
    options = f"{OPTIONS} --train_data_dir {folder} --output_dir {tmp_path / 'out'}"
    anew = options.replace("--resume_from_checkpoint latest", "--overwrite_output_dir")
    train(options)
    first = load(tmp_path / "out" / WEIGHTS)
    for path in folder.iterdir():
        Image.open(path).point(lambda value: 255 - value).save(path)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GMSGMPipeline, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            train(anew, "--cache_dir", tmp_path / "other")
    assert same_state(load(tmp_path / "out" / WEIGHTS), first)
    train(options)
    second = load(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert not same_state(load(tmp_path / "out" / WEIGHTS), first)
    assert second.keys() == first.keys()
    before = contents(tmp_path / "out")
    train(options)
    assert contents(tmp_path / "out") == before, "and is then the last's"


def test_a_model_without_checkpoints_is_not_replaced(train, tmp_path):
    folder = tmp_path / "out"
    train(TINY, "--output_dir", folder)
    before = contents(folder)
    for more in ("", "--resume_from_checkpoint latest"):
        with pytest.raises(ValueError, match="holds a model, and no checkpoint to go on from.*--overwrite_output_dir"):
            train(TINY, more, "--method ncsnv2 --output_dir", folder)
    assert contents(folder) == before
    train(TINY, "--method ncsnv2 --overwrite_output_dir --output_dir", folder)
    assert json.loads((folder / ARGS_FILE).read_text())["method"] == "ncsnv2"


def test_options_beside_a_model_are_those_it_was_trained_with(train, tmp_path, monkeypatch):
    """Until a training that is to replace it has a model of its own."""
    folder = tmp_path / "out"
    train(TINY, "--output_dir", folder)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.Tensor.backward", killed)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, "--method ncsnv2 --overwrite_output_dir --output_dir", folder)
    assert json.loads((folder / ARGS_FILE).read_text())["method"] == "gm-sgm"


def test_a_folder_is_that_of_one_training_at_a_time(train, tmp_path):
    held = claim(tmp_path / "out")
    with pytest.raises(ValueError, match="--output_dir .*out' is in use by another training"):
        train(TINY, "--output_dir", tmp_path / "out")
    held.release()
    train(TINY, "--output_dir", tmp_path / "out")


def test_the_environment_does_not_say_otherwise(train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="--gradient_accumulation_steps is 1, and .* says 4: unset it"):
        train(TINY, "--output_dir", tmp_path / "out")


def test_the_command_of_a_card_can_be_pasted():
    args = arguments(train_data_dir="my images", background="#808080", seed=3)
    words = shlex.split(command_line(args, 1), comments=True)
    assert words[words.index("--train_data_dir") + 1] == "my images"
    assert words[words.index("--background") + 1] == "#808080"
    assert words[words.index("--seed") + 1] == "3"


def test_the_command_of_a_card_begins_anew_and_uploads_nothing():
    """Whoever repeats the training has neither its checkpoints nor its repository."""
    args = arguments(
        seed=3, resume_from_checkpoint="checkpoint-500", overwrite_output_dir=True, max_train_minutes=9.0,
        push_to_hub=True, hub_model_id="me/model", hub_private_repo=True, hub_strategy="every_save",
    )  # fmt: skip
    assert command_line(args, 1) == "diffusers-gm-train --dataset_name digits --seed 3"


@pytest.mark.parametrize(("option", "of_accelerate"), [("", "bf16"), ("--mixed_precision no", "bf16"), ("", "no")])
def test_the_command_of_a_card_has_the_precision_that_accelerate_was_told(
    train, tmp_path, monkeypatch, option, of_accelerate
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", of_accelerate)
    train(TINY, option, "--output_dir", tmp_path / "out")
    words = json.loads((tmp_path / "out" / ARGS_FILE).read_text())["command"].split()
    said = words[words.index("--mixed_precision") + 1] if "--mixed_precision" in words else None
    assert said == (option.split()[-1] if option else {"bf16": "bf16", "no": None}[of_accelerate])


def test_the_warm_up_of_a_training_that_is_lengthened_stays(train, tmp_path):
    options = f"{SMALL} --lr_scheduler constant_with_warmup --checkpointing_steps 20 --validation_steps 0 --output_dir"
    train("--max_train_steps 20", options, tmp_path / "out")
    train("--max_train_steps 40 --resume_from_checkpoint latest", options, tmp_path / "out")
    record = json.loads((tmp_path / "out" / ARGS_FILE).read_text())
    assert (record["max_train_steps"], record["lr_warmup_steps"]) == (40, 2)


def test_the_time_before_an_interruption_counts(train, tmp_path):
    """As that of the training; a slice of it has minutes of its own."""
    options = TINY.replace("--max_train_steps 2 --checkpointing_steps 0", "--max_train_steps 3 --checkpointing_steps 1")
    options += f" --output_dir {tmp_path / 'out'}"
    train(options)
    state = tmp_path / "out" / "checkpoint-1" / "training_state.json"
    content = json.loads(state.read_text())
    content["state"]["seconds"] = 3600
    state.write_text(json.dumps({name: content[name] for name in ("state", "arguments")}))  # without a seal: 0.1.0
    train(options, "--resume_from_checkpoint checkpoint-1 --max_train_minutes 30")
    assert 3600 <= json.loads((tmp_path / "out" / ARGS_FILE).read_text())["training_seconds"] < 3700
    assert "60 min" in (tmp_path / "out" / "README.md").read_text()


# --- Networks that are fine-tuned ---


def test_a_network_that_is_fine_tuned_is_trained_and_its_command_is_as_it_was_given(train, tmp_path, monkeypatch):
    """It comes in evaluation mode, where nothing is dropped; and its pipeline says the levels, not the command."""
    train(TINY, "--method ncsnv2 --sigma_max 5 --output_dir", tmp_path / "first")
    modes, forward = [], UNet2DModel.forward

    @wraps(forward)  # whose arguments are looked at
    def noted(unet, *rest, **named):
        modes.append(unet.training)
        return forward(unet, *rest, **named)

    monkeypatch.setattr(UNet2DModel, "forward", noted)
    options = TINY.replace("--block_out_channels 8 16", f"--model_name_or_path {tmp_path / 'first'}")
    train(options, "--method ncsnv2 --output_dir", tmp_path / "second")
    assert modes[0]
    record = json.loads((tmp_path / "second" / ARGS_FILE).read_text())
    assert record["sigma_max"] == 5
    assert "--model_name_or_path first" in record["command"]
    assert "--sigma" not in record["command"]
    assert "--method ncsnv2" in record["command"]


def test_a_calibration_is_of_the_averaged_weights_and_of_the_images(request, tmp_path, monkeypatch):
    seen = {}

    def noted(pipeline, effort, images):
        seen[effort] = pipeline.unet.conv_in.weight.detach().clone(), images
        return pipeline.scheduler

    monkeypatch.setattr("diffusers_gm.calibrate", noted)
    train = request.getfixturevalue("train")  # which reads the script
    for effort in ("fast", "full"):
        train(TINY, f"--calibrate {effort} --output_dir", tmp_path / effort)
        assert torch.equal(seen[effort][0], load(tmp_path / effort / WEIGHTS)["conv_in.weight"])
    assert seen["fast"][1] is None
    assert seen["full"][1].shape == (1437, 1, 8, 8)


def test_a_network_of_latents_needs_its_autoencoder(tmp_path):
    """Latents of three channels look like images."""
    pipe = NCSNv2Pipeline(
        tiny_network(4, 4),
        AnnealedLangevinScheduler(),
        vae=tiny_autoencoder(),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe.save_pretrained(tmp_path / "latent")
    with pytest.raises(ValueError, match="makes latents, which its vae decodes: give it as --vae"):
        given_unet(arguments(model_name_or_path=str(tmp_path / "latent")))
    GMSGMPipeline(tiny_network(), GMLangevinScheduler()).save_pretrained(tmp_path / "pixels")
    assert given_unet(arguments(model_name_or_path=str(tmp_path / "pixels"))) is not None


@pytest.mark.parametrize("method", ["ddpm", "cld"])
def test_what_is_not_kept_of_a_network_is_said(method, tmp_path, caplog):
    options = {"objective": "score"} if method == "cld" else {}
    for kind, config in {
        "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        "plain": {},
    }.items():
        DDPMPipeline(tiny_network(), DDPMScheduler(**config)).save_pretrained(tmp_path / kind)
        caplog.clear()
        levels_of_network(
            arguments(method=method, model_name_or_path=str(tmp_path / kind), **options), tiny_network(), resumed=False
        )
        said = f"is not kept by --method {method}" in caplog.text
        assert said == (kind == "cosine" or method == "cld")


# --- Classes ---


def test_names_of_classes_can_be_written_down():
    with pytest.raises(ValueError, match=r"the folder 'caf\\udce9' has no readable name"):
        labels_of_files(["caf\udce9/1.png", "dog/2.png"])
    assert labels_of_files(["café/1.png", "犬/2.png", "two words/3.png"]).names == ["café", "two words", "犬"]


def test_classes_without_images_are_said(train, tmp_path, caplog):
    options = f"{TINY} --class_conditional --output_dir"
    with pytest.raises(ValueError, match="all images are of one class"):
        train(options, tmp_path / "one", "--max_train_samples 2 --seed 27")
    train(options, tmp_path / "some", "--max_train_samples 6")
    assert "classes there are no images" in caplog.text


def test_a_calibration_of_a_measured_model_sets_the_measurements_aside(tmp_path):
    from diffusers_gm.calibrate import __main__ as command

    pipe = NCSNv2Pipeline(tiny_network(), AnnealedLangevinScheduler())
    pipe.save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n<!-- quality -->\nOld.\n<!-- end of quality -->\n")
    command.main([str(tmp_path), "--calls", "3", "--effort", "fast", "--batch_size", "2"])
    assert not (tmp_path / "results.json").exists()
    assert (tmp_path / "results-before.json").read_text() == "{}", "what took long to measure is not lost"
    assert "Old." not in (tmp_path / "README.md").read_text()
    assert "Not measured." in (tmp_path / "README.md").read_text()
    (tmp_path / "results.json").write_text("[]")
    command.main([str(tmp_path), "--calls", "4", "--effort", "fast", "--batch_size", "2"])
    assert (tmp_path / "results-before.json").read_text() == "{}"
    assert (tmp_path / "results-before-2.json").read_text() == "[]"
    assert not (tmp_path / "calibration-before.png").exists(), "drawn by the same command, in seconds"
    # Anyone loads it as before.
    pipe = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "CalibratedMultistepScheduler"
