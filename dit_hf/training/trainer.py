"""The training loop: one step is one optimizer step on the global batch, whatever the number of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState, init_empty_weights
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from tqdm import tqdm

from ..config import Config, Precision
from ..devices import compiler_problem
from ..hub.background_push import BackgroundPush
from ..latents.cache import content
from ..latents.reader import LatentReader
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import RunFolder, base_model, build_pipeline, migrate_recipe, read_state
from ..storage import disk_errors, locked, write_text
from .checkpoint import TrainingTensors, agreed_checkpoint, check_same_recipe, make_room, save_checkpoint, write_best
from .export import export, save_sample_grid, share
from .health import check_health
from .initialize import build_transformer
from .log import COLUMNS, append_log, start_log
from .objective import NOISE_LEVELS
from .optimizer import learning_rate
from .preemption import Preempted, StopSignal
from .sample_quality import SampleQuality
from .step import TrainingStep
from .throughput import Speed, mfu
from .trackers import choose_tracker, init_options, log_sample_grid
from .validation import choose_validation


def train(config: Config) -> Path:
    """Train as `config` says and export the pipeline; returns the run's folder.

    Raises:
        ValueError: for a recipe that cannot work, or a checkpoint of another one.
        FileExistsError: if the folder holds a run, or checkpoints, and `train.resume_from_checkpoint` was not asked
            for.
        OSError: if the disk is full or cannot be written, or the GPU's memory is too small.
    """
    config.check()
    run = Path(config.train.output_dir)
    if not config.train.resume_from_checkpoint and RunFolder(run).config.exists():
        raise FileExistsError(
            f"train.output_dir {run} holds a run; go on with it by --train.resume_from_checkpoint latest, "
            "or name a new folder"
        )
    if not config.train.resume_from_checkpoint and RunFolder(run).checkpoints():
        raise FileExistsError(f"train.output_dir {run} holds checkpoints of something else; name a new folder")
    try:
        trainer = Trainer(config)
        with disk_errors(f"train.output_dir {run}"), trainer.exclusive(run):
            trainer.fit(run)
    except torch.OutOfMemoryError as error:
        raise OSError(
            "the GPU's memory is full: a larger train.gradient_accumulation_steps, or train.gradient_checkpointing "
            f"true, needs less; checkpoints in {run} are good"
        ) from error
    return run


class Trainer:
    """A run: its step, its log, its checkpoints and what it exports.

    Args:
        config: The recipe.

    Raises:
        ValueError: if the recipe, the cache, the number of ranks and the checkpoint to go on from do not fit together.
    """

    def __init__(self, config: Config):
        self.config = config
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it begins
            torch.use_deterministic_algorithms(True)
            torch._inductor.config.deterministic = True  # or kernels are chosen by their time, anew in each process
        cpu = not torch.accelerator.is_available()
        PartialState(cpu=cpu)  # told, accelerate finds the ranks of torchrun on machines without a GPU too
        data = config.data
        self.reader = LatentReader(data.latents, conditions=data.conditions, posterior=data.sample_posterior)
        if self.reader.conditions and not config.objective.condition_dropout and config.train.guidance_scale != 1:
            raise ValueError(
                "objective.condition_dropout=0 never learns what guidance leads away from; give one above 0, or "
                "train.guidance_scale 1"
            )
        self.accelerator = self._accelerate(cpu)
        self.device = self.accelerator.device
        # What a run began with is in its checkpoints: where that came from need not be there any more.
        run, name = Path(config.train.output_dir), config.train.resume_from_checkpoint
        self.checkpoint = agreed_checkpoint(run, name, print_once) if name else None
        state = read_state(self.checkpoint) if self.checkpoint is not None else None
        self.base_model = base_model(config)
        if state is None:
            transformer, self.normalization = build_transformer(config, self.reader, print_once)
        else:
            transformer, self.normalization = (
                LatentDiTTransformer2DModel(**state["transformer"]),
                state["normalization"],
            )
        self.transformer = transformer.to(self.device)
        if config.train.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.compiled = self._compiles(state)
        if self.compiled:
            transformer.compile_repeated_blocks(fullgraph=True)
        self.step = TrainingStep(config, self.reader, self.accelerator, transformer, self.normalization)
        if config.optim.optimizer == "apex_fused_adam" and "apex" not in self.step.optimizer_name:
            print_once(
                f"optim.optimizer apex_fused_adam needs fp16 on CUDA and NVIDIA's apex: training with "
                f"{self.step.optimizer_name}, which takes the same steps"
            )
        if self.checkpoint is not None and state is not None:
            before = migrate_recipe(state["recipe"])
            self.base_model = before["found"].get("base_model", self.base_model)
            before["train"]["mixed_precision"] = self._computed_in(before["train"]["mixed_precision"])
            check_same_recipe(before, self._recipe(), self.checkpoint)
        self.tensors = TrainingTensors(transformer, self.step.averages, self.step.optimizer)
        train = config.train
        self.hub = (
            BackgroundPush(train.hub_model_id, train.hub_private_repo, train.hub_revision, tqdm.write)
            if train.push_to_hub and train.hub_model_id
            else None
        )
        self.validation = choose_validation(config, list(self.reader.conditions), self.step, print_once)
        self.quality = SampleQuality(config, self.reader, self.accelerator) if config.train.evaluation_steps else None

    def exclusive(self, run: Path) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing the run (see `locked`); to be used by all ranks."""
        main = self.accelerator.is_main_process
        return locked(RunFolder(run).lock, f"train.output_dir {run}") if main else contextlib.nullcontext()

    def fit(self, run: Path) -> None:
        """Go on from the checkpoint, if there is one, until `max_train_steps`, and export.

        Raises:
            Preempted: when told to stop, after the step under way has been finished and saved.
            ValueError: when numbers stop being numbers; what was saved before is good.
            OSError: if a checkpoint cannot be written; those before are good.
        """
        start, total, main = self._resume(), self.config.train.max_train_steps, self.accelerator.is_main_process
        if main:
            run.mkdir(parents=True, exist_ok=True)
            write_text(RunFolder(run).config, self._written_config().to_yaml())
            start_log(run, start, self._columns())
            if start < total:
                RunFolder(run).export.unlink(missing_ok=True)  # what is exported is of another end of the run
        if start < total:
            self._on_main(make_room, run, self.tensors.bytes())
            self._start_trackers(run)
            print_once(f"training {run} on {self.device}, {self.step.optimizer_name}, steps {start} to {total}")
        stop, speed, began = StopSignal(), Speed(), time.monotonic()
        with stop.listening(), tqdm(total=total, initial=start, desc="training", unit="step", disable=not main) as bar:
            for step in range(start, total):
                grad_norm, done = self.step(step), step + 1
                if self.compiled and step == start:
                    print_once(f"compiled the blocks: the first step took {time.monotonic() - began:.1f} s")
                speed.steps += 1
                bar.update()
                saved = self._report_and_save(run, done, grad_norm, speed, bar)
                if stop.is_set() and done < total:
                    if not saved:
                        check_health(self.step, done, run)
                        self._save(run, done, {})
                    print_once(
                        f"\ntold to stop: checkpoint-{done} is saved; --train.resume_from_checkpoint latest goes on"
                    )
                    self.accelerator.end_training()
                    raise Preempted
        self._export(run)
        self.accelerator.end_training()

    def pipeline(self) -> LatentDiTPipeline | None:
        """The pipeline of the averaged weights, on the first rank; to be called on all of them."""
        weights = self.tensors.ema_weights("ema")
        if not self.accelerator.is_main_process:
            return None
        return build_pipeline(self.config, self.reader, self._transformer_of(weights), self.normalization)

    def _report_and_save(self, run: Path, done: int, grad_norm: torch.Tensor, speed: Speed, bar: tqdm) -> bool:
        """Do what is due after `done` steps: log, validate, sample, save; returns whether a checkpoint was saved."""
        train = self.config.train
        due = done % train.checkpointing_steps == 0 or done == train.max_train_steps
        quality = self.quality if train.evaluation_steps and done % train.evaluation_steps == 0 else None
        pushed = self.hub is not None and train.push_to_hub_steps > 0 and done % train.push_to_hub_steps == 0
        drawn = train.sampling_steps > 0 and done % train.sampling_steps == 0
        row: dict[str, Any] = {}
        if due or quality or pushed or done % train.logging_steps == 0:
            row = self._measure(run, done, grad_norm, speed)
            bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{row['images_per_second']:.0f}")
        if not row and not drawn:  # and nothing waits for the device
            return False
        with speed.paused():
            if due:
                row |= self.validation.validate_emas(self.step, self.accelerator) if self.validation else {}
            if quality:
                row |= self._evaluate(quality)
            if row and self.accelerator.is_main_process:
                append_log(run, row)
            if row:
                self.accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=done)
            if drawn:
                self._draw_samples(run, done)
            if due:
                self._save(run, done, row)
            if pushed and done < train.max_train_steps:
                self._push(run, done, self.pipeline())
        return due

    def _compiles(self, state: dict[str, Any] | None) -> bool:
        """Whether to compile the blocks: as the recipe says, else as the run began, else on CUDA where that works."""
        if self.config.train.torch_compile is not None:
            return self.config.train.torch_compile
        if state is not None:
            return state.get("torch_compile", False)
        if self.device.type != "cuda" or self.accelerator.is_fsdp2:
            return False
        problem = compiler_problem(self.device)
        if problem:
            print_once(f"training without torch.compile, which would be faster but fails here: {problem}")
        return problem is None

    def _accelerate(self, cpu: bool) -> Accelerator:
        train = self.config.train
        self.tracker, self.tracker_options = choose_tracker(train.report_to, print_once)
        precision = train.mixed_precision
        if precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ and torch.cuda.is_available():
            precision = "fp16"
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with=self.tracker,
            project_config=ProjectConfiguration(logging_dir=train.output_dir),
            step_scheduler_with_optimizer=False,
            # The model's buffers never change, and gradients need not be copied out of DDP's buckets.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        torch._dynamo.config.optimize_ddp = False  # it would cut every compiled block into pieces
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            print_once("no GPU: training in float32 instead of fp16")
        return accelerator

    def _measure(self, run: Path, done: int, grad_norm: torch.Tensor, speed: Speed) -> dict[str, Any]:
        """One row of the log, without validation; the window begins anew."""
        config, accelerator = self.config, self.accelerator
        total, count = check_health(self.step, done, run)
        self.step.begin_window()
        images_seen = done * config.train.global_batch_size
        images_per_second = speed.read() * config.train.global_batch_size
        on_gpu = self.device.type == "cuda"
        row = {
            "step": done,
            "epoch": round(images_seen / len(self.reader), 4),
            "images_seen": images_seen,
            "loss": (total.sum() / count.sum()).item(),
            "learning_rate": learning_rate(config.optim, done - 1, config.train.max_train_steps),
            "grad_norm": grad_norm.item(),
            "images_per_second": round(images_per_second, 2),
            "mfu": mfu(self.transformer.config, images_per_second, accelerator),
            "loss_scale": accelerator.scaler.get_scale() if accelerator.scaler else None,
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
        }
        by_level = zip(total.tolist(), count.tolist(), strict=True)
        return row | {f"loss_level_{i}": value / n if n else None for i, (value, n) in enumerate(by_level)}

    def _columns(self) -> list[str]:
        """Columns of the log."""
        extra = [f"validation_loss{name.removeprefix('ema')}" for name in self.step.averages if name != "ema"]
        return [*COLUMNS, *extra, *([self.quality.name] if self.quality else [])]

    def _recipe(self) -> dict[str, Any]:
        """What must be the same for this run to be continued: its recipe, and what was `found` with it."""
        recipe = self.config.resume_keys()
        recipe["train"] |= {"mixed_precision": self._computed_in(self.accelerator.mixed_precision)}
        cache = self.reader.info["identity"]
        recipe["found"] = {
            "pictures": len(self.reader),
            "pictures_sha256": content(cache["source"]),
            "crop": cache["crop"],
            "flip": cache["flip"],
            "vae_sha256": self.reader.info["vae_sha256"],
            "latent_shape": list(self.reader.latent_shape),
            "condition_values": self.reader.conditions,
            "optimizer": self.step.optimizer_name,
            "base_model": self.base_model,
        }
        return recipe

    def _computed_in(self, mixed_precision: str) -> Precision:
        """The precision that accelerate computes in where it was told this one: fp16 is float32 on a CPU."""
        return "no" if mixed_precision == "fp16" and self.device.type == "cpu" else cast(Precision, mixed_precision)

    def _written_config(self) -> Config:
        """The recipe with the precision that accelerate's configuration may have chosen; not how this call began."""
        precision = self._computed_in(self.accelerator.mixed_precision)
        train = dataclasses.replace(
            self.config.train, mixed_precision=precision, torch_compile=self.compiled, resume_from_checkpoint=None
        )
        return dataclasses.replace(self.config, train=train)

    def _resume(self) -> int:
        """Put the checkpoint in place; returns steps done."""
        if self.checkpoint is None:
            return 0
        state, accelerator = read_state(self.checkpoint), self.accelerator
        if state["step"] > self.config.train.max_train_steps:
            steps = self.config.train.max_train_steps
            raise ValueError(
                f"{self.checkpoint} is already beyond train.max_train_steps={steps}; give a larger number"
            )
        self.tensors.load(self.checkpoint)
        if accelerator.scaler is not None and state["loss_scale"]:
            accelerator.scaler.load_state_dict(state["loss_scale"])
        windows = torch.tensor(state["windows"], device=self.device)
        if len(windows) == accelerator.num_processes:
            self.step.window = windows[accelerator.process_index]
        elif accelerator.is_main_process:
            self.step.window = windows.sum(0)
        return state["step"]

    def _save(self, run: Path, done: int, row: dict[str, Any]) -> None:
        """Write a checkpoint; `row` is the log's of this step, or empty."""
        train, accelerator = self.config.train, self.accelerator
        levels = [row.get(f"validation_loss_level_{i}") for i in range(NOISE_LEVELS)]
        options = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        state = {
            "step": done,
            "recipe": self._recipe(),
            "transformer": options,
            "normalization": self.normalization,
            "torch_compile": self.compiled,
            "loss_scale": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "windows": accelerator.gather(self.step.window[None]).tolist(),
            "validation_loss": row.get("validation_loss"),
            "validation_loss_by_noise_level": levels,
        }
        contents, limits = self.tensors.gather(), (train.checkpoints_total_limit, train.best_checkpoints_limit)
        self._on_main(save_checkpoint, run, state, contents, *limits)

    def _start_trackers(self, run: Path) -> None:
        flat = {f"{s}.{k}": v for s, values in self._recipe().items() for k, v in values.items()}
        simple = {name: v if isinstance(v, int | float | str | bool) else str(v) for name, v in flat.items()}
        if self.accelerator.is_main_process:
            options = init_options(run, self.tracker, self.tracker_options)
            self.accelerator.init_trackers("dit_hf", config=simple, init_kwargs=options)

    def _transformer_of(self, weights: dict[str, torch.Tensor]) -> LatentDiTTransformer2DModel:
        with init_empty_weights(include_buffers=False):
            transformer = LatentDiTTransformer2DModel.from_config(self.transformer.config)
        transformer.load_state_dict(weights, assign=True)
        return transformer.to(self.device).eval()

    def _draw_samples(self, run: Path, done: int) -> None:
        """An image grid of the averaged weights, for the trackers too."""
        pipeline, path = self.pipeline(), RunFolder(run).sample_grid(done)
        if pipeline is not None:
            save_sample_grid(pipeline, self.reader, self.config.train.num_inference_steps, path)
            log_sample_grid(self.accelerator.trackers, path, done)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, quality: SampleQuality) -> dict[str, float]:
        """The samples' Fréchet distance, of the averaged weights; all ranks draw."""
        with self.step.averages["ema"].swapped_in():
            pipeline = build_pipeline(self.config, self.reader, self.transformer, self.normalization)
            return quality.measure(pipeline)

    def _export(self, run: Path) -> None:
        """Write what a finished run leaves."""
        train, pipeline = self.config.train, self.pipeline()
        averages = [name for name in self.step.averages if name != "ema"]
        extra = {name: self.tensors.ema_weights(name) for name in averages}
        if pipeline is not None:
            write_best(run, train.best_checkpoints_limit)
            transformers = {name: self._transformer_of(weights) for name, weights in extra.items()}
            export(run, self.config, self.reader, pipeline, transformers, self._recipe())
        self.accelerator.wait_for_everyone()
        if self.hub is not None:  # the other ranks are not kept waiting
            self.hub.wait()
            self._push(run, train.max_train_steps, pipeline)
            self.hub.wait()

    def _push(self, run: Path, done: int, pipeline: LatentDiTPipeline | None) -> None:
        """Begin to share the averaged weights, on the first rank."""
        if self.hub is not None and pipeline is not None:
            share(self.hub, run, self.config, self.reader, pipeline, self._recipe(), done)

    def _on_main(self, work: Callable[..., Any], *args: Any) -> None:
        if self.accelerator.is_main_process:
            work(*args)
        self.accelerator.wait_for_everyone()


_printed: set[str] = set()


def print_once(line: str) -> None:
    """Print a line, on the first rank only and never twice."""
    if line not in _printed and PartialState().is_main_process:
        print(line, flush=True)
    _printed.add(line)
