"""The training loop: one step is one optimizer step on the global batch, for any number of ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights

from ..config import Config
from ..devices import memory_errors, on_first_rank
from ..hub.background_push import BackgroundPush
from ..hub_ids import check_branch, check_repo_id
from ..latents.reader import LatentReader
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..progress import ProgressBar
from ..runs import Normalization, RunFolder, build_pipeline, read_state
from ..storage import disk_errors, locked, write_text
from .accelerator import build_accelerator, should_compile, start_ranks, use_deterministic_kernels
from .announce import announce, summary
from .background_save import BackgroundSave
from .checkpoint import (
    TrainingTensors,
    agreed_checkpoint,
    check_disk_space,
    is_best,
    remove_partial_checkpoints,
    remove_superseded,
)
from .export import export, save_sample_grid, share
from .folder import check_run_folder
from .health import check_health
from .initialize import build_for_sharding, build_transformer
from .log import (
    COLUMNS,
    append_log,
    finish_branch,
    live_folder,
    measure,
    print_again,
    print_once,
    start_log,
)
from .objective import NOISE_LEVELS
from .preemption import Preempted, StopSignal
from .recipe import resolved_config, resolved_recipe, resumed_recipe
from .sample_quality import SampleQuality
from .step import TrainingStep
from .throughput import Speed
from .trackers import choose_tracker, end_trackers, is_online, log_row, log_sample_grid, start_tracker
from .validation import choose_validation

# Optimizer steps after which the time of the run is estimated.
ESTIMATED_AFTER = 20


def train(config: Config, dry_run: bool = False) -> Path:
    """Train a model by a recipe, and export its pipeline.

    Args:
        config: The recipe.
        dry_run: Only print what would be trained, and how much memory and disk that takes.

    Returns:
        The run's folder.

    Raises:
        ValueError: if the recipe cannot work, or the checkpoint belongs to another one.
        FileExistsError: if the folder holds a run, and `train.resume_from_checkpoint` is not set, or files that no run
            has written where this one will write.
        OSError: if the disk is full or not writable, or the GPU's memory is too small.
    """
    config.check()
    run = Path(config.train.output_dir)
    place = f"train.output_dir {run}"
    if config.train.push_to_hub and config.train.hub_model_id:
        check_repo_id(config.train.hub_model_id, "train.hub_model_id")
        check_branch(config.train.hub_revision)
    # Refuse to overwrite before anything is loaded.
    check_run_folder(run, resumed=bool(config.train.resume_from_checkpoint))

    advice = (
        "a larger train.gradient_accumulation_steps, or train.gradient_checkpointing true, needs less; "
        f"checkpoints in {run}, if there are any, are intact"
    )
    with memory_errors(advice):
        trainer = Trainer(config)
        trainer.announce(run)
        if dry_run:
            return run
        with disk_errors(place), trainer.exclusive(run):
            trainer.fit(run)
    return run


class Trainer:
    """A run: its step, log, checkpoints and export.

    Args:
        config: The recipe.

    Raises:
        ValueError: if the recipe, the cache, the number of ranks and the checkpoint do not fit together.
    """

    def __init__(self, config: Config):
        self.config = config
        train = config.train
        print_again()

        # Process-wide settings come first: cuBLAS reads its own at its first call.
        if train.deterministic:
            use_deterministic_kernels()

        # On a machine without a GPU accelerate 1.15 finds torchrun's ranks only with `cpu=True`. The first state that
        # is created decides for the whole process.
        cpu = not torch.accelerator.is_available()
        start_ranks(cpu)

        # Data: read before the accelerator and the model are built, so that a wrong option fails within a second.
        self.reader = _open_reader(config)

        # Machine: trackers are chosen first, since accelerate takes their names when it is built.
        self.tracker_notes: list[str] = []  # printed once nothing is refused any more, so that an error is one line
        self.tracker, self.tracker_options = choose_tracker(train.report_to, self.tracker_notes.append)
        self.accelerator = build_accelerator(train, self.tracker, cpu, print_once)
        self.device = self.accelerator.device

        # Checkpoint: all ranks resume from the one that the first rank chose.
        name = train.resume_from_checkpoint
        self.checkpoint = agreed_checkpoint(Path(train.output_dir), name, print_once) if name else None
        state = read_state(self.checkpoint) if self.checkpoint is not None else None

        # Recipe: compared only when the step is built, because it holds the name of the optimizer.
        self._build_step(state)
        if self.checkpoint is not None and state is not None:
            self.recipe = resumed_recipe(self.step, self.checkpoint, state)
        else:
            self.recipe = resolved_recipe(self.step)

        # Everything that works between steps.
        self.tensors = TrainingTensors(self.transformer, self.step.emas, self.step.optimizer)
        self.hub = (
            BackgroundPush(train.hub_model_id, train.hub_private_repo, train.hub_revision, self._print)
            if train.push_to_hub and train.hub_model_id
            else None
        )
        limits = train.checkpoints_total_limit, train.best_checkpoints_limit
        self.saving = BackgroundSave(self.tensors, self.device, limits, self._print)
        self.validation = choose_validation(config, self.reader, self.step, print_once)
        self.live = RunFolder(Path(train.output_dir))  # where log and sample grids are written, see `live_folder`
        self.quality = SampleQuality(config, self.reader, self.accelerator) if train.evaluation_steps else None

    @contextlib.contextmanager
    def exclusive(self, run: Path) -> Iterator[None]:
        """Keep other processes from writing the run (see `locked`); call it on all ranks."""
        # The ranks of one run share its folder, so only the first holds the lock.
        with contextlib.ExitStack() as held:
            on_first_rank(lambda: held.enter_context(locked(RunFolder(run).lock, f"train.output_dir {run}")))
            yield

    def fit(self, run: Path) -> None:
        """Train until `max_train_steps`, from the checkpoint if there is one, and export.

        Raises:
            Preempted: after SIGTERM or SIGINT, once the step under way is finished and saved.
            ValueError: if a loss, gradient or weight is not finite; earlier checkpoints are good.
            OSError: if a checkpoint cannot be written; earlier ones are good.
        """
        total = self.config.train.max_train_steps
        # Resuming comes first: it refuses a checkpoint beyond `total` before any file of the run is touched.
        start = self._resume()
        on_first_rank(lambda: self._prepare_folder(run, start))
        if start < total:
            if self.tracker is not None:
                start_tracker(
                    self.accelerator, run, self.tracker, self.tracker_options, self.recipe, start, print_once
                )
            self._print(f"training   steps {start + 1:,} to {total:,} on {self.device}")

        stop, speed = StopSignal(), Speed()
        began = time.monotonic()
        shown = self.accelerator.is_main_process
        bar = ProgressBar(total, "training", "steps", initial=start, shown=shown)
        with stop.listening(), bar, self.saving:
            for step in range(start, total):
                # One optimizer step. Its result stays on the device, which is not waited for.
                grad_norm = self.step(step)
                done = step + 1
                if self.compiled and step == start:
                    bar.write(f"compiled the blocks: the first step took {time.monotonic() - began:.1f} s")
                speed.steps += 1
                bar.update()
                if done == start + ESTIMATED_AFTER < total and (left := bar.remaining()) is not None:
                    whole = timedelta(seconds=round(time.monotonic() - began + left))
                    bar.write(f"the {total - start:,} steps will take about {whole}")

                # Log, validate, sample and save where it is due.
                saved = self._report_and_save(run, done, grad_norm, speed, bar)

                # Graceful shutdown. After the last step the run is finished normally instead.
                if stop.is_set() and done < total:
                    self._stop_early(run, done, saved)
            on_first_rank(self.saving.wait)

        self._print("exporting the pipeline")
        self._export(run)
        end_trackers(self.accelerator, print_once)
        self._print(*summary(run))

    def announce(self, run: Path) -> None:
        """Print what will be trained, what it takes and where it goes.

        Raises:
            OSError: if it cannot fit into the memory.
        """
        for note in self.tracker_notes:
            print_once(note)
        online = is_online(self.tracker, self.tracker_options)
        self._print(*announce(self.step, run, self.tensors.bytes(), self.tracker, self.compiled, online))

    def _print(self, *lines: str) -> None:
        """Print lines on the first rank."""
        self.accelerator.print(*lines, sep="\n", flush=True)

    def pipeline(self) -> LatentDiTPipeline | None:
        """Build the pipeline of the EMA weights, on the first rank (None on others); call it on all ranks."""
        # Gathering sharded weights is a collective operation, which other ranks must not skip.
        weights = self.tensors.ema_weights("ema")

        def build() -> LatentDiTPipeline:
            return build_pipeline(self.config, self.reader, self._transformer_with(weights), self.normalization)

        return on_first_rank(build)

    def _build_step(self, state: dict[str, Any] | None) -> None:
        """Build the transformer on the device, compile it where that is wanted, and build its optimizer step."""
        config = self.config

        def build() -> tuple[LatentDiTTransformer2DModel, Normalization]:
            if state is None:
                return build_transformer(config, self.reader, print_once)
            # The checkpoint holds all that a resumed run needs: `model.init_from` may have been moved since.
            return LatentDiTTransformer2DModel(**state["transformer"]), state["normalization"]

        # FSDP2 moves shards of it to the device, where the whole may not fit.
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        if plugin is not None and plugin.cpu_ram_efficient_loading:
            transformer, self.normalization = build_for_sharding(build)
        else:
            transformer, self.normalization = build()
            transformer.to(self.device)
        self.transformer = transformer

        # Compile after checkpointing is enabled, so that the compiled blocks contain it.
        if config.train.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        warmup, steps = config.optim.lr_warmup_steps, config.train.max_train_steps
        if warmup > steps:
            print_once(
                f"optim.lr_warmup_steps={warmup} is longer than the run: after its {steps} steps the learning rate "
                f"has reached {steps / warmup:.1%} of optim.learning_rate"
            )
        self.compiled = should_compile(config.train, state, self.accelerator, print_once)
        if self.compiled:
            transformer.compile_repeated_blocks(fullgraph=True)

        self.step = TrainingStep(config, self.reader, self.accelerator, self.transformer, self.normalization)
        if config.optim.optimizer == "apex_fused_adam" and "apex" not in self.step.optimizer_name:
            print_once(
                f"optim.optimizer apex_fused_adam needs fp16 on CUDA and NVIDIA's apex: training with "
                f"{self.step.optimizer_name}, which takes the same steps"
            )

    def _prepare_folder(self, run: Path, start: int) -> None:
        """Write the recipe, restore the log of step `start`, and make sure that a checkpoint fits on the disk."""
        run.mkdir(parents=True, exist_ok=True)
        # Leftovers may be what fills the disk.
        remove_partial_checkpoints(run)
        start_log(run, start, self._columns(), self.checkpoint)
        self.live = live_folder(run, start)
        write_text(RunFolder(run).config, resolved_config(self.config, self.accelerator, self.compiled).to_yaml())
        if start < self.config.train.max_train_steps:
            check_disk_space(run, self.tensors.bytes())

    def _report_and_save(self, run: Path, done: int, grad_norm: torch.Tensor, speed: Speed, bar: ProgressBar) -> bool:
        """Log, validate, sample and save what is due after `done` steps; return whether a checkpoint was saved."""
        train = self.config.train

        def due(every: int) -> bool:
            return every > 0 and done % every == 0

        checkpoint_due = due(train.checkpointing_steps) or done == train.max_train_steps
        samples_due = due(train.sampling_steps)
        quality = self.quality if due(train.evaluation_steps) else None
        # The last push is that of the finished run, see `_export`.
        push_due = self.hub is not None and due(train.push_to_hub_steps) and done < train.max_train_steps

        # A checkpoint, an evaluation and a push always come with a row, which also checks that the numbers are finite.
        row: dict[str, Any] = {}
        if checkpoint_due or quality or push_due or due(train.logging_steps):
            row = measure(self.step, run, done, grad_norm, speed)
            speed_now = row["images_per_second"]
            digits = 0 if speed_now >= 10 else 2
            bar.report(f"loss {row['loss']:.4f}, {speed_now:,.{digits}f} images/s")
        if not row and not samples_due:
            return False  # the usual case, in which nothing has waited for the device

        # What follows is not training and is left out of the measured speed.
        with speed.paused():
            if checkpoint_due and self.validation:
                with bar.doing("validating"):
                    row |= self.validation.validate_emas(self.step, self.accelerator)
            if quality:
                with bar.doing("generating samples"):
                    row |= self._evaluate(quality)

            # The row is complete now. It is written before the checkpoint: a run killed in between resumes from an
            # earlier checkpoint and cuts the row off again, whereas a missing row would never be written.
            if row:

                def append() -> None:
                    self.saving.check()  # a checkpoint that cannot be written is reported by the next row
                    append_log(self.live.log, row, self._columns())

                on_first_rank(append)
                log_row(self.accelerator, row, print_once)

            if samples_due:
                with bar.doing("generating a sample grid"):
                    self._save_samples(done)
            if checkpoint_due:
                with bar.doing("saving a checkpoint"):
                    self._save(run, done, row, bar.write)
            if push_due:
                self._push(run, done, self.pipeline())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # `peak_memory_gib` is of training, not of what came between
        return checkpoint_due

    def _stop_early(self, run: Path, done: int, saved: bool) -> NoReturn:
        """Save the run after `done` steps, unless it was just `saved`, and end it.

        Raises:
            Preempted: always, when all is written.
        """
        if not saved:
            # Never save weights that are not finite: `latest` must stay usable.
            check_health(self.step, done, run)
            self._save(run, done, {}, self._print)
        on_first_rank(self.saving.wait)
        self._print(f"\npreempted: checkpoint-{done} is saved; resume with --train.resume_from_checkpoint latest")
        end_trackers(self.accelerator, print_once)
        raise Preempted

    def _columns(self) -> list[str]:
        """Columns of the log."""
        extra = [f"validation_loss{name.removeprefix('ema')}" for name in self.step.emas if name != "ema"]
        return [*COLUMNS, *extra, *([self.quality.name] if self.quality else [])]

    def _resume(self) -> int:
        """Load the checkpoint, if there is one, and return the number of steps done.

        Raises:
            ValueError: if it is beyond `max_train_steps`.
        """
        if self.checkpoint is None:
            return 0
        state, accelerator = read_state(self.checkpoint), self.accelerator
        if state["step"] > self.config.train.max_train_steps:
            steps = self.config.train.max_train_steps
            raise ValueError(
                f"{self.checkpoint} is already beyond train.max_train_steps={steps}; give a larger number"
            )

        # Weights, EMAs, optimizer and loss scale.
        self.tensors.load(self.checkpoint)
        if accelerator.scaler is not None and state["loss_scale"]:
            accelerator.scaler.load_state_dict(state["loss_scale"])

        # The sums since the last row of the log, one window a rank. On another number of ranks the first takes them
        # all: only their total is logged.
        windows = torch.tensor(state["windows"], device=self.device)  # [ranks, 2, NOISE_LEVELS]
        if len(windows) == accelerator.num_processes:
            self.step.window = windows[accelerator.process_index]
        elif accelerator.is_main_process:
            self.step.window = windows.sum(0)
        return state["step"]

    def _save(self, run: Path, done: int, row: dict[str, Any], log: Callable[[str], None]) -> None:
        """Begin to write a checkpoint, which the training does not wait for; call it on all ranks.

        Args:
            run: The run's folder.
            done: Steps done.
            row: The log's row of this step, or empty.
            log: Receives the line about its validation loss, once it is written.
        """
        accelerator = self.accelerator
        levels = [row.get(f"validation_loss_level_{i}") for i in range(NOISE_LEVELS)]
        # Keys with a leading underscore are diffusers' own (0.42.1: `_class_name`, `_use_default_values`, ...) and no
        # arguments of the model.
        options = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        state = {
            "step": done,
            "recipe": self.recipe,
            "transformer": options,
            "normalization": self.normalization,
            "torch_compile": self.compiled,
            "loss_scale": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "windows": accelerator.gather(self.step.window[None]).tolist(),
            "validation_loss": row.get("validation_loss"),
            "validation_images": self.validation.count if self.validation else None,
            "validation_loss_by_noise_level": levels,
        }
        going_back = self.live != RunFolder(run)

        def then() -> None:
            # An export, and what a run that went back had left, are out of date only now.
            RunFolder(run).export.unlink(missing_ok=True)
            if going_back:
                finish_branch(run, done)
                self.live = RunFolder(run)
            if (loss := row.get("validation_loss")) is not None:
                best = ", the best so far" if is_best(run, done) else ""
                log(f"step {done:,}: validation loss {loss:.4f}{best}")

        # A run that went back writes its next rows into another log once this checkpoint stands.
        self.saving.save(run, state, self.live.log, then, at_once=going_back)

    def _transformer_with(self, weights: dict[str, torch.Tensor]) -> LatentDiTTransformer2DModel:
        """Build a transformer like the one in training, with other weights, on the device."""
        # Built without memory for its parameters, which are assigned; buffers are not in `weights` and are computed.
        with init_empty_weights(include_buffers=False):
            transformer = LatentDiTTransformer2DModel.from_config(self.transformer.config)
        transformer.load_state_dict(weights, assign=True)
        return transformer.to(self.device).eval()

    def _save_samples(self, done: int) -> None:
        """Save a sample grid of the EMA weights and send it to the trackers."""
        pipeline = self.pipeline()

        def save() -> None:
            assert pipeline is not None  # on the first rank
            path = self.live.sample_grid(done)
            save_sample_grid(pipeline, self.reader, self.config.train.num_inference_steps, path)
            log_sample_grid(self.accelerator, path, done, print_once)

        on_first_rank(save)

    def _evaluate(self, quality: SampleQuality) -> dict[str, float]:
        """Measure the Fréchet distance of the EMA weights' samples; all ranks generate."""
        with self.step.emas["ema"].swapped_in():
            pipeline = build_pipeline(self.config, self.reader, self.transformer, self.normalization)
            return quality.measure(pipeline)

    def _export(self, run: Path) -> None:
        """Write what a finished run leaves, and push it."""
        train = self.config.train
        # Collective operations first, on all ranks.
        pipeline = self.pipeline()
        extra = {name: self.tensors.ema_weights(name) for name in self.step.emas if name != "ema"}

        def write() -> None:
            assert pipeline is not None  # on the first rank
            # Again, because the process that saved the last checkpoint may have been killed before it had done so.
            last = RunFolder(run).checkpoints()[-1]
            remove_superseded(run, last, train.checkpoints_total_limit, train.best_checkpoints_limit)
            transformers = {name: self._transformer_with(weights) for name, weights in extra.items()}
            export(run, self.config, self.reader, pipeline, transformers, self.recipe)

        on_first_rank(write)

        # No barrier after the push, which may take longer than the ranks' timeout. The push before it must have ended,
        # since `begin` skips a push while another is on its way.
        if self.hub is not None:
            self.hub.wait()
            self._push(run, train.max_train_steps, pipeline)
            self.hub.wait()

    def _push(self, run: Path, done: int, pipeline: LatentDiTPipeline | None) -> None:
        """Start to push the EMA weights, on the first rank; call it on all ranks."""
        hub = self.hub
        if hub is None:
            return

        def begin() -> None:
            assert pipeline is not None  # on the first rank
            share(hub, run, self.config, self.reader, pipeline, self.recipe, done)

        on_first_rank(begin)


def _open_reader(config: Config) -> LatentReader:
    """Open the training images, and refuse guidance of a conditional model that never learns to be unconditional."""
    reader = LatentReader(
        config.data.latents, conditions=config.data.conditions, posterior=config.data.sample_posterior
    )
    if reader.conditions and not config.objective.condition_dropout and config.train.guidance_scale != 1:
        raise ValueError(
            "objective.condition_dropout=0 never learns what guidance leads away from; give one above 0, or "
            "train.guidance_scale 1"
        )
    return reader
