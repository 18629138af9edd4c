"""Train a score-based generative model and save it as a diffusers pipeline.

Gaussian-mixture noise on the digits that come with scikit-learn, a few minutes on a CPU:

    accelerate launch --num_cpu_threads_per_process 2 train_gm_sgm.py --output_dir outputs/digits

NCSNv2 on the same, without noise conditioning:

    accelerate launch train_gm_sgm.py --method ncsnv2 --conditioning none --output_dir outputs/digits-ncsnv2

Critically-damped Langevin diffusion:

    accelerate launch train_gm_sgm.py --method cld --output_dir outputs/digits-cld

A folder of images (or of parquet files, or `--dataset_name` of the Hub) on two GPUs:

    accelerate launch --num_processes 2 --mixed_precision bf16 train_gm_sgm.py --train_data_dir photos \
        --resolution 64 --random_flip --train_batch_size 64 --num_train_epochs 200 --output_dir outputs/photos

Several processes on CPUs: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`.
What a training would do, without doing it: add `--dry_run`. After an interruption, add
`--resume_from_checkpoint latest`: it ends with the same weights as if nothing had happened. With
`--max_train_minutes 9` beside it, the same command, again and again, trains in slices of nine minutes. Options can be
kept in a YAML file, and some come with the package: `--config cifar10-cpu --method cld`. All options:
`python train_gm_sgm.py --help`.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_gm import calibrate, files
from diffusers_gm.data import STEP, ImageStream, TrainingImages, examine, open_source, seed_for, subset
from diffusers_gm.evaluation.card import forget_quality
from diffusers_gm.hub import cards, push
from diffusers_gm.launch import check_processes
from diffusers_gm.training.folder import (
    ARGS_FILE,
    UNFINISHED_PIPELINE,
    TrainingState,
    append_log,
    check_output_dir,
    find_checkpoint,
    read_checkpoint,
    read_log,
    save_checkpoint,
    start_output_dir,
)
from diffusers_gm.training.health import DivergedError, Health
from diffusers_gm.training.methods import METHODS
from diffusers_gm.training.network import (
    averaged_weights,
    build_ema,
    build_lr_scheduler,
    build_objective,
    build_optimizer,
    build_scheduler,
    check_precision,
    fit_unet,
    given_unet,
    native_shape,
    new_unet,
)
from diffusers_gm.training.options import TrainingArguments
from diffusers_gm.training.parser import OptionParser
from diffusers_gm.training.plan import command_line, make_plan, training_record, versions
from diffusers_gm.training.samples import hardware, image_grid, log_grid, sample_images
from diffusers_gm.training.training_data import distance_measured_once, training_data


def main() -> None:
    parser = OptionParser(__doc__.split("\n")[0])
    training = train(parser.parse(sys.argv[1:]))
    try:
        next(training, None)
    except (ValueError, ImportError) as error:  # what the options ask for and cannot have
        parser.error(str(error))
    diverged = ""
    try:
        for _ in training:
            pass
    except DivergedError as error:
        diverged = str(error)
    if diverged:  # said when the training and its progress bar are gone
        parser.exit(1, f"{parser.prog}: error: {diverged}\n")


def train(args: TrainingArguments) -> Iterator[None]:  # noqa: PLR0912, PLR0915 - to be read from top to bottom
    """The training, in two parts: before it stops for the first time it raises a ValueError for options that do not
    fit each other, the data or what is on disk. Nothing is written before it goes on."""
    output_dir, method = Path(args.output_dir), METHODS[args.method]
    checkpoint = find_checkpoint(args)
    check_output_dir(args, checkpoint)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(output_dir / args.logging_dir)),
    )
    check_processes(accelerator)
    check_precision(accelerator)
    device, num_processes = accelerator.device, accelerator.num_processes

    # --- The data, and what the options come to for them ---
    torch.manual_seed(args.seed)
    unet = given_unet(args)
    with accelerator.main_process_first():
        source = open_source(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.image_column,
            args.cache_dir,
            args.background,
        )
    if args.max_train_samples is not None:
        source = subset(source, args.max_train_samples, args.seed)
    side, channels = native_shape(unet, args.method)
    examination = examine(source, args.seed, args.resolution or side, channels)
    largest_distance = distance_measured_once(accelerator, checkpoint)
    plan = make_plan(args, examination, source.num_images, source.image_column, num_processes, largest_distance)
    if plan.train_batch_size < args.train_batch_size:
        accelerator.print(
            f"--train_batch_size {args.train_batch_size} is more than the {source.num_images} training images have for "
            f"{num_processes} process(es): it is {plan.train_batch_size}"
        )
    record = training_record(args, plan) | {"mixed_precision": accelerator.mixed_precision}
    images_per_step = plan.train_batch_size * num_processes * args.gradient_accumulation_steps
    data = training_data(args, plan, examination, source.num_images, images_per_step)
    state = read_checkpoint(checkpoint, args, record, data) if checkpoint else TrainingState()

    # --- Network, noise, optimizer ---
    unet = fit_unet(unet or new_unet(args, plan.resolution, examination.channels), args, plan.resolution)
    scheduler = build_scheduler(args, plan)
    objective = build_objective(args, plan, scheduler)
    optimizer = build_optimizer(args, plan, unet)
    lr_scheduler = build_lr_scheduler(args, plan, optimizer)
    ema = build_ema(args, unet, device)
    # The schedule is stepped here once per optimizer step; accelerate would do so once per process.
    accelerator.register_for_checkpointing(lr_scheduler, *([ema] if ema else []))
    num_parameters = unet.num_parameters()
    model, optimizer = accelerator.prepare(unet, optimizer)
    unet = accelerator.unwrap_model(model)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        if ema:
            ema.to(device)

    accelerator.print(
        f"{args.method}: {num_parameters:,} parameters, {source.num_images} images of {examination.channels}x"
        f"{plan.resolution}x{plan.resolution}\n"
        f"noise: {method.noise_in_words(args, plan)}\n"
        f"steps: {state.step} to {plan.max_train_steps} of {images_per_step} images, on {num_processes} x "
        f"{device.type}\n"
        f"learning rate: {plan.learning_rate:g}, {args.lr_scheduler}, {plan.lr_warmup_steps} steps warm-up\n"
        f"samples: {plan.validation_inference_steps} network calls, {scheduler.config['algorithm_type']}\n"
        f"output: {output_dir}" + (f", then {args.hub_model_id}" if args.push_to_hub else "")
    )

    dataset = TrainingImages(
        source, plan.resolution, examination.channels, args.seed, args.center_crop, args.random_flip
    )
    stream = ImageStream(
        source.num_images,
        plan.train_batch_size,
        args.seed,
        state.images_seen,
        num_processes,
        accelerator.process_index,
    )
    batches = iter(
        DataLoader(
            dataset,
            batch_sampler=stream,
            num_workers=args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        )
    )

    def loss_of_next_batch() -> torch.Tensor:
        images = next(batches).to(device, non_blocking=True)
        # All random numbers of a step follow from the images seen before it, also after an interruption.
        position = state.images_seen + accelerator.process_index * plan.train_batch_size
        torch.manual_seed(seed_for(args.seed, STEP, position))
        state.images_seen += plan.train_batch_size * num_processes
        return objective(model, images).mean()

    if args.dry_run:
        loss = loss_of_next_batch()
        accelerator.backward(loss)
        accelerator.print(f"one forward and backward pass: loss {float(loss.detach()):.4f}. Nothing was written.")
        return

    yield

    # --- Training ---
    pipeline = method.pipeline(unet=unet, scheduler=scheduler)
    if accelerator.is_main_process:
        start_output_dir(output_dir, record | {"versions": versions()}, checkpoint, state.step)
        (output_dir / "samples").mkdir(exist_ok=True)
    if args.report_to != "none":
        accelerator.init_trackers("diffusers_gm", {name: str(value) for name, value in record.items()})

    def sample_grid():
        with averaged_weights(unet, ema):
            images = sample_images(
                pipeline,
                args.num_validation_images,
                args.eval_batch_size,
                plan.validation_inference_steps,
                args.seed,
            )
        return image_grid(images)

    def time_is_up() -> bool:
        """Decided by the main process for all: one that ended alone would leave the others waiting for it."""
        decision = [time.monotonic() >= deadline]
        broadcast_object_list(decision)
        return decision[0]

    def write_pipeline(finished: bool = False):
        """The pipeline, its samples and its card; its sampler is calibrated when it is finished, if wanted."""
        if finished and args.calibrate:
            with averaged_weights(unet, ema):
                images = examination.images if args.calibrate == "full" else None
                pipeline.scheduler = calibrate(pipeline, effort=args.calibrate, images=images)
        result = cards.TrainingResult(
            num_images=source.num_images,
            num_parameters=num_parameters,
            steps=state.step,
            images_seen=state.images_seen,
            seconds=state.seconds,
            log=read_log(output_dir),
            hardware=hardware(accelerator),
            command=command_line(args, num_processes),
            versions=versions(),
        )
        grid = sample_grid()
        log_grid(accelerator, grid, state.step)
        temporary = files.fresh_folder(output_dir / UNFINISHED_PIPELINE)
        with averaged_weights(unet, ema):
            pipeline.save_pretrained(temporary)
        grid.save(temporary / "samples.png")
        files.write_json(temporary / ARGS_FILE, record | {"versions": versions()} | result.figures())
        cards.training_card(record, type(pipeline).__name__, result).save(temporary / "README.md")
        forget_quality(output_dir)
        files.publish_contents(temporary, output_dir, last="model_index.json")

    def upload() -> str:
        """Empty, or what went wrong: whatever it is, the model is on disk, and the user needs to know how to go on."""
        repository = args.hub_model_id or "", args.hub_private_repo
        try:
            print(f"uploaded to {push.push_to_hub(output_dir, *repository, args.hub_token)}")
        except Exception as error:
            return push.failure(error, output_dir, *repository)
        return ""

    model.train()
    progress = tqdm(
        initial=state.step,
        total=plan.max_train_steps,
        disable=not accelerator.is_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        unit="step",
    )
    started = time.monotonic() - state.seconds
    deadline = time.monotonic() + 60 * (args.max_train_minutes or math.inf)
    out_of_time = False
    some = examination.images[: min(16, plan.train_batch_size)]  # no more than fit the device
    health = Health(accelerator, unet, ema, objective, some, output_dir, plan.learning_rate)
    losses = torch.zeros((), device=device)
    logged_step, logged_time = state.step, time.monotonic()
    while state.step < plan.max_train_steps and not out_of_time:
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                loss = loss_of_next_batch()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    health.note_gradient(state.step + 1, norm)
                optimizer.step()
                optimizer.zero_grad()
            losses += loss.detach() / args.gradient_accumulation_steps
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema:
            ema.step(unet.parameters())
        state.step += 1
        progress.update()
        last = state.step == plan.max_train_steps
        out_of_time = args.max_train_minutes is not None and not last and time_is_up()
        save = out_of_time or (args.checkpointing_steps > 0 and (last or state.step % args.checkpointing_steps == 0))

        # Always before a checkpoint: one of a network that diverged must not replace the good ones.
        if last or save or state.step % args.logging_steps == 0:
            steps = state.step - logged_step
            mean_loss = float(accelerator.reduce(losses, "mean")) / steps
            health.check_loss(state.step, mean_loss)
            images_per_second = steps * images_per_step / (time.monotonic() - logged_time)
            losses.zero_()
            logged_step, logged_time = state.step, time.monotonic()
            if accelerator.is_main_process:
                entry = {
                    "loss": mean_loss,
                    "lr": learning_rate,
                    "images_per_second": round(images_per_second, 1),
                }
                append_log(output_dir, {"step": state.step, **entry})
                accelerator.log(entry, step=state.step)
                progress.set_postfix(
                    loss=f"{mean_loss:.4f}", images_per_second=f"{images_per_second:.0f}", refresh=False
                )

        paused = time.monotonic()
        state.seconds = paused - started
        if last or save:
            health.check_network(state.step)
        if save:
            save_checkpoint(accelerator, output_dir, state, record, data, args.checkpoints_total_limit)
            if args.push_to_hub and args.hub_strategy == "every_save" and not last:
                if accelerator.is_main_process:
                    write_pipeline()
                    print(upload() or "the training goes on")
                accelerator.wait_for_everyone()
        if args.validation_steps and state.step % args.validation_steps == 0 and not last:
            if accelerator.is_main_process:
                grid = sample_grid()
                with files.replacing(output_dir / "samples" / f"step-{state.step:07d}.png") as path:
                    grid.save(path)
                log_grid(accelerator, grid, state.step)
            accelerator.wait_for_everyone()
        logged_time += time.monotonic() - paused
    progress.close()
    if out_of_time:
        accelerator.end_training()
        option = "" if args.resume_from_checkpoint == "latest" else " with --resume_from_checkpoint latest"
        accelerator.print(
            f"--max_train_minutes {args.max_train_minutes:g} are over after {state.step} of {plan.max_train_steps} "
            f"steps: run the same command again{option} to go on"
        )
        return

    if accelerator.is_main_process:
        write_pipeline(finished=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.print(f"saved to {output_dir}")
    if args.push_to_hub and accelerator.is_main_process:
        failed = upload()
        if failed:
            sys.exit(failed)


if __name__ == "__main__":
    main()
