"""Train a score-based generative model and save it as a diffusers pipeline.

`diffusers-gm-train` is this script, installed. Gaussian-mixture noise on the digits that come with scikit-learn, a few
minutes on a CPU:

    diffusers-gm-train --output_dir outputs/digits

NCSNv2 on the same, without noise conditioning:

    diffusers-gm-train --method ncsnv2 --conditioning none --output_dir outputs/digits-ncsnv2

Critically-damped Langevin diffusion:

    diffusers-gm-train --method cld --output_dir outputs/digits-cld

A folder of images (or of parquet files, or `--dataset_name` of the Hub) on two GPUs:

    accelerate launch --num_processes 2 --mixed_precision bf16 train_gm_sgm.py --train_data_dir photos \
        --resolution 64 --random_flip --train_batch_size 64 --num_train_epochs 200 --output_dir outputs/photos

Several processes on CPUs: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`.
What a training would do, without doing it: add `--dry_run`. After an interruption, add
`--resume_from_checkpoint latest`: it ends with the same weights as if nothing had happened. With
`--max_train_minutes 9` beside it, the same command, again and again, trains in slices of nine minutes. Options can be
kept in a YAML file, and some come with the package: `--config cifar10-cpu --method cld`. All options: `--help`.
"""

import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from accelerate.utils.constants import SCALER_NAME
from filelock import FileLock
from tqdm.auto import tqdm

from diffusers_gm import calibrate, files
from diffusers_gm.data import STEP, ImageStream, TrainingImages, examine, seed_for, sides
from diffusers_gm.hub import cards, push
from diffusers_gm.launch import PATIENCE, check_parallelism, check_processes, from_main, largest
from diffusers_gm.pictures import image_grid
from diffusers_gm.pipelines.measurements import hash_of_card, set_aside_measurements
from diffusers_gm.training.batches import Batches
from diffusers_gm.training.classes import classes_of
from diffusers_gm.training.draws import StepDraws
from diffusers_gm.training.folder import (
    ARGS_FILE,
    CARD,
    SAMPLES,
    TRAINING_ID,
    UNFINISHED_PIPELINE,
    TrainingState,
    append_log,
    as_recorded,
    check_output_dir,
    claim,
    find_checkpoint,
    is_published,
    read_checkpoint,
    read_log,
    save_checkpoint,
    set_aside_card,
    start_output_dir,
)
from diffusers_gm.training.health import DivergedError, Health
from diffusers_gm.training.latents import given_vae, latents_of
from diffusers_gm.training.level_losses import LevelLosses
from diffusers_gm.training.memory import keep_freed_memory
from diffusers_gm.training.methods import METHODS
from diffusers_gm.training.network import fit_unet, given_unet, native_shape, new_unet
from diffusers_gm.training.objective import Objective, build_scheduler, levels_of_network
from diffusers_gm.training.optimizer import (
    averaged_weights,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    check_precision,
)
from diffusers_gm.training.options import TrainingArguments, without_effect
from diffusers_gm.training.parser import OptionParser
from diffusers_gm.training.plan import command_line, make_plan, training_record, versions
from diffusers_gm.training.rehearsal import rehearse
from diffusers_gm.training.samples import hardware, log_grid, sample_images, start_tracker
from diffusers_gm.training.stopping import INTERRUPTED, NOTHING, SIGNAL, TIME, Signals
from diffusers_gm.training.training_data import distance_measured_once, open_training_data, training_data
from diffusers_gm.training.uncertainty import Uncertainty


def main() -> None:
    parser = OptionParser(__doc__.split("\n")[0])
    signals = Signals()
    training = train(parser.parse(sys.argv[1:]), signals)
    try:
        next(training, None)
    except (ValueError, ImportError) as error:  # what the options ask for and cannot have
        parser.error(str(error))
    diverged = ""
    try:
        with signals:
            for _ in training:
                pass
    except DivergedError as error:
        diverged = str(error)
    if diverged:  # said when the training and its progress bar are gone
        parser.exit(1, f"{parser.prog}: error: {diverged}\n")


def train(args: TrainingArguments, signals: Signals) -> Iterator[None]:  # noqa: PLR0912, PLR0915 - to be read from top to bottom
    """The training, in two parts: before it stops for the first time it raises a ValueError for options that do not
    fit each other, the data or what is on disk. Nothing is written before it goes on, but for latents."""
    output_dir, method = Path(args.output_dir), METHODS[args.method]
    checkpoint = find_checkpoint(args)
    args = as_recorded(args, checkpoint)
    check_output_dir(args, checkpoint)
    check_parallelism()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(output_dir / args.logging_dir)),
        kwargs_handlers=[PATIENCE],
    )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, and the environment variable "
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS says {accelerator.gradient_accumulation_steps}: unset it"
        )
    check_processes(accelerator)
    check_precision(accelerator)
    device, num_processes = accelerator.device, accelerator.num_processes

    # --- The data, and what the options come to for them ---
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    keep_freed_memory()
    torch.manual_seed(args.seed)
    unet, vae, given = given_unet(args), given_vae(args), args
    args, of_network = levels_of_network(args, unet, resumed=checkpoint is not None)
    with accelerator.main_process_first():
        source = open_training_data(args)
    classes = classes_of(args, source, unet)
    num_images = args.num_train_samples or source.num_images
    side, channels = native_shape(unet, args, vae)
    examination = examine(source, args.seed, args.resolution or side, channels)
    claimed: list[FileLock] = []

    def claim_output_dir() -> None:
        if accelerator.is_main_process and not claimed:
            claimed.append(claim(output_dir))

    latents = space = None
    if vae is not None:
        latents, examination, space = latents_of(
            args, vae, source, examination, accelerator, unet, of_network, checkpoint, claim_output_dir
        )
    largest_distance = distance_measured_once(checkpoint)
    plan = make_plan(args, examination, num_images, num_processes, largest_distance)
    if plan.train_batch_size < args.train_batch_size:
        accelerator.print(
            f"--train_batch_size {args.train_batch_size} is more than the {num_images} training images have for "
            f"{num_processes} process(es): it is {plan.train_batch_size}"
        )
    record = training_record(args, plan)
    record |= {"mixed_precision": accelerator.mixed_precision, "image_column": source.image_column}
    images_per_step = plan.train_batch_size * num_processes * args.gradient_accumulation_steps
    data = training_data(args, plan, examination, num_images, images_per_step, classes.labels, space)
    state = read_checkpoint(checkpoint, args, record, data) if checkpoint else TrainingState.of_a_new_training()

    # --- Network, noise, optimizer ---
    unet = unet or new_unet(args, examination.size, examination.channels, classes.num_embeds)
    unet = fit_unet(unet, args, examination.size)
    scheduler = build_scheduler(args, plan, of_network)
    for words in without_effect(args, scheduler.config.get("algorithm_type")):
        accelerator.print(words)
    objective = Objective(args, plan, scheduler, unet, classes.null)
    uncertainty = Uncertainty() if args.uncertainty_weighting else None
    optimizer = build_optimizer(args, plan, unet, uncertainty)
    lr_scheduler = build_lr_scheduler(args, plan, optimizer)
    ema = build_ema(args, unet, device)
    # The schedule is stepped here once per optimizer step; accelerate would do so once per process.
    accelerator.register_for_checkpointing(lr_scheduler, *([ema] if ema else []))
    num_parameters = unet.num_parameters()
    model, optimizer = accelerator.prepare(unet, optimizer)
    models = [model]
    if uncertainty is not None:
        uncertainty = accelerator.prepare(uncertainty)
        models.append(uncertainty)
    unet = accelerator.unwrap_model(model, keep_torch_compile=False)
    if checkpoint:
        scaler = accelerator.scaler
        if not (checkpoint / SCALER_NAME).is_file():  # of another precision: the scaler begins anew
            accelerator.scaler = None
        accelerator.load_state(str(checkpoint))
        accelerator.scaler = scaler
        accelerator.step = 0  # batches of a step, which may be split in another way than before
        if ema:
            ema.to(device)

    size = "x".join(map(str, (channels or examination.channels, *sides(plan.resolution))))
    learned = f", as latents of {'x'.join(map(str, examination.images.shape[1:]))}" if space else ""
    learned += f" in {len(classes.names)} classes" if classes.names else ""
    accelerator.print(
        f"{args.method}: {num_parameters:,} parameters, {num_images} images of {size}{learned}\n"
        f"noise: {method.noise_in_words(args, plan)}\n"
        f"steps: {state.step} to {plan.max_train_steps} of {images_per_step} images, on {num_processes} x "
        f"{device.type}\n"
        f"learning rate: {plan.learning_rate:g}, {args.lr_scheduler}, {plan.lr_warmup_steps} steps warm-up\n"
        f"samples: {plan.validation_inference_steps} network calls, {type(scheduler).__name__}\n"
        f"output: {output_dir}" + (f", then {args.hub_model_id}" if args.push_to_hub else "")
    )

    images = TrainingImages(
        source, plan.resolution, examination.channels, args.seed, args.center_crop, args.random_flip
    )
    dataset = classes.of(images if latents is None else latents, args.seed)
    stream = ImageStream(
        num_images, plan.train_batch_size, args.seed, state.images_seen, num_processes, accelerator.process_index
    )
    batches = Batches(args, dataset, stream, accelerator, state.places)

    some = examination.images[: min(16, plan.train_batch_size)].to(device)  # no more than fit there
    health = Health(accelerator, unet, ema, objective, some, output_dir, plan.learning_rate)
    level_losses = LevelLosses(objective, accelerator)
    step_draws = StepDraws(args.seed, images_per_step, device)

    def take_step() -> None:
        start = state.images_seen
        for first in range(accelerator.process_index * plan.train_batch_size, images_per_step, stream.stride):
            images, labels = classes.on(device, next(batches))
            # All random numbers of a step follow from the images seen before it, also after an interruption; noise
            # from an image's own place among these, however a step is split.
            torch.manual_seed(seed_for(args.seed, STEP, start + first))
            draws = step_draws.of_batch(start, first, len(images))
            with accelerator.accumulate(*models):
                losses = objective(model, images, draws, labels)
                weighted = losses if uncertainty is None else uncertainty(losses, objective.sigma(draws.levels))
                accelerator.backward(weighted.mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    health.note_gradient(state.step + 1, norm)
                optimizer.step()
                optimizer.zero_grad()
            level_losses.note(losses, draws.levels)
        lr_scheduler.step()
        if ema:
            ema.step(unet.parameters())
        state.images_seen += images_per_step
        state.step += 1

    if args.dry_run:
        if args.first_batch and accelerator.is_main_process:
            first, _ = classes.on(device, batches.first())
            image_grid((space.decode(first) if space else first)[:64]).save(args.first_batch)
        model.train()
        if steps_left := plan.max_train_steps - state.step:
            accelerator.print(rehearse(take_step, steps_left, device))
            accelerator.print(f"loss: {level_losses.means()[0]:.4f}")
        else:
            accelerator.print("no step is left")
        written = f" but {args.first_batch}" if args.first_batch else ""
        accelerator.print(f"Nothing was written{written}.")
        return

    claim_output_dir()
    yield

    def upload() -> str:
        """Empty, or what went wrong: whatever it is, the model is on disk, and the user needs to know how to go on."""
        repository = args.hub_model_id or "", args.hub_private_repo
        try:
            print(f"uploaded to {push.push_to_hub(output_dir, *repository, args.hub_token)}")
        except Exception as error:
            return push.failure(error, output_dir, *repository)
        return ""

    if state.step >= plan.max_train_steps and is_published(args, record, state):
        accelerator.print(f"{output_dir} has the model of all {state.step} steps: there is nothing to do")
        if args.push_to_hub and accelerator.is_main_process and (failed := upload()):
            sys.exit(failed)
        return

    # --- Training ---
    components = classes.for_pipeline()
    if space is not None:
        components |= {"vae": vae, "latents_mean": space.mean.tolist(), "latents_std": space.std.tolist()}
    pipeline = method.pipeline(unet=unet, scheduler=scheduler, **components)
    if accelerator.is_main_process:
        start_output_dir(output_dir, record | {"versions": versions()}, checkpoint, state.step)
        (output_dir / SAMPLES).mkdir(exist_ok=True)
    if args.report_to != "none":
        start_tracker(accelerator, record, state.step)

    def sample_grid():
        """All processes draw the samples, of the averaged weights; the main one shows them to the tracker, too."""
        num_images, columns = classes.grid(args.num_validation_images)
        with averaged_weights(unet, ema):
            images = sample_images(
                pipeline, num_images, args.eval_batch_size, plan.validation_inference_steps, args.seed
            )
        grid = image_grid(images, columns)
        if accelerator.is_main_process:
            log_grid(accelerator, grid, state.step)
        return grid

    def write_pipeline(record: dict[str, Any]):
        """The pipeline, its samples and its card, which the main process writes; all call it."""
        grid = sample_grid()
        if not accelerator.is_main_process:
            return
        result = cards.TrainingResult(
            num_images=num_images,
            num_parameters=num_parameters,
            class_names=classes.names or None,
            steps=state.step,
            images_seen=state.images_seen,
            seconds=state.seconds,
            log=read_log(output_dir),
            levels=level_losses.names(),
            hardware=hardware(accelerator),
            command=command_line(given, num_processes, accelerator.mixed_precision, device.type),
            versions=versions(),
        )
        temporary = files.fresh_folder(output_dir / UNFINISHED_PIPELINE)
        with averaged_weights(unet, ema):
            pipeline.save_pretrained(temporary)
        grid.save(temporary / "samples.png")
        card = cards.training_card(record, type(pipeline).__name__, result)
        card.save(temporary / "README.md")
        made_by = {"versions": versions(), TRAINING_ID: state.training_id, CARD: hash_of_card(str(card))}
        files.write_json(temporary / ARGS_FILE, record | made_by | result.figures())
        set_aside_card(output_dir)
        set_aside_measurements(output_dir)
        files.publish_contents(temporary, output_dir, last="model_index.json")

    model.train()
    progress = tqdm(
        initial=state.step,
        total=plan.max_train_steps,
        disable=not accelerator.is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        unit="step",
    )
    started = time.monotonic() - state.seconds
    deadline, why = time.monotonic() + 60 * (args.max_train_minutes or math.inf), NOTHING
    logged_step, logged_time = state.step, time.monotonic()
    while state.step < plan.max_train_steps and not why:
        learning_rate = lr_scheduler.get_last_lr()[0]
        take_step()
        progress.update()
        last = state.step == plan.max_train_steps
        out_of_time = time.monotonic() >= deadline and not last
        why = largest(SIGNAL if signals.look() else TIME if out_of_time else NOTHING)  # one process speaks for all
        save = why != NOTHING or (args.checkpointing_steps > 0 and (last or state.step % args.checkpointing_steps == 0))

        # Always before a checkpoint: one of a network that diverged must not replace the good ones.
        if last or save or state.step % args.logging_steps == 0:
            steps = state.step - logged_step
            mean_loss, by_level = level_losses.means()
            health.check_loss(state.step, mean_loss)
            images_per_second = steps * images_per_step / (time.monotonic() - logged_time)
            logged_step, logged_time = state.step, time.monotonic()
            if accelerator.is_main_process:
                entry = {"loss": mean_loss, "lr": learning_rate, "images_per_second": round(images_per_second, 1)}
                append_log(output_dir, {"step": state.step, **entry, "loss_by_level": by_level})
                named = zip(level_losses.names(), by_level, strict=True)
                levels = {f"loss_by_level/{name}": loss for name, loss in named if loss is not None}
                accelerator.log(entry | levels, step=state.step)
                progress.set_postfix(
                    loss=f"{mean_loss:.4f}", images_per_second=f"{images_per_second:.0f}", refresh=False
                )

        paused = time.monotonic()
        state.seconds = paused - started
        if last or save:
            health.check_network(state.step)
        if save:
            state.places = gather_object([batches.places()]) if args.streaming else None
            save_checkpoint(accelerator, args, state, record, data)
            if why == SIGNAL:  # there may be no time for anything else
                break
            if args.push_to_hub and args.hub_strategy == "every_save" and not last:
                write_pipeline(record | {"calibrate": None})
                if accelerator.is_main_process:
                    print(upload() or "the training goes on")
                accelerator.wait_for_everyone()
        if args.validation_steps and state.step % args.validation_steps == 0 and not last:
            grid = sample_grid()
            if accelerator.is_main_process:
                with files.replacing(output_dir / SAMPLES / f"step-{state.step:07d}.png") as path:
                    grid.save(path)
            accelerator.wait_for_everyone()
        logged_time += time.monotonic() - paused
    progress.close()
    if why:
        accelerator.end_training()
        ended = f"ended by {signals.received or 'a signal to another process'}"
        if why == TIME:
            ended = f"--max_train_minutes {args.max_train_minutes:g} are over"
        option = "" if args.resume_from_checkpoint == "latest" else " with --resume_from_checkpoint latest"
        accelerator.print(
            f"{ended} after {state.step} of {plan.max_train_steps} steps: run the same command again{option} to go on"
        )
        if why == SIGNAL and accelerator.is_main_process:  # one that fails is enough: launchers end the others then
            sys.exit(INTERRUPTED)
        return

    if effort := args.calibrate:  # which takes its time: the model is whole before, and not done
        write_pipeline(record | {"calibrate": None})
        real = examination.images if effort == "full" else None
        try:
            with signals.interrupting(), averaged_weights(unet, ema):
                pipeline.scheduler = from_main(lambda: calibrate(pipeline, effort=effort, images=real))
        except KeyboardInterrupt:
            command = f"python -m diffusers_gm.calibrate {shlex.quote(str(output_dir))}"
            print(f"interrupted: the model is saved, and not calibrated, which {command} does", file=sys.stderr)
            sys.exit(INTERRUPTED)
    write_pipeline(record)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.print(f"saved to {output_dir}")
    if args.push_to_hub and accelerator.is_main_process and (failed := upload()):
        sys.exit(failed)


if __name__ == "__main__":
    main()
