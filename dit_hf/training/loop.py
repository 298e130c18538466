"""The training loop: one step is one optimizer step on the global batch, whatever the number of ranks."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration
from tqdm import tqdm

from ..data.reader import BatchPrefetcher, LatentReader
from ..data.vae import load_vae
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from ..sheets import draw_sheet, save_sheet
from ..storage import new_folder, write_text
from . import checkpoint, report
from .config import Config
from .objective import Draws, draw, draw_flips, loss_weights, losses, training_target
from .optimizer import EMA, build_optimizer, learning_rate

SHEET_SIZE = 16


def train(config: Config) -> Path:
    """Train as `config` says and export the pipeline; returns the run's folder.

    Raises:
        ValueError: for a recipe that cannot work, or a checkpoint of another one.
        FileExistsError: if the folder holds a run and `train.resume_from_checkpoint` was not asked for.
    """
    config.check()
    run = Path(config.train.output_dir)
    if config.train.resume_from_checkpoint is None and (run / "config.yaml").exists():
        raise FileExistsError(
            f"train.output_dir {run} holds a run; go on with it by --train.resume_from_checkpoint latest, "
            "or name a new folder"
        )
    trainer = Trainer(config)
    trainer.fit(run)
    return run


class Trainer:
    """Everything a run holds in memory.

    Args:
        config: The recipe.

    Raises:
        ValueError: if the recipe, the cache and the number of ranks do not fit together.
    """

    def __init__(self, config: Config):
        self.config = config
        cpu = not torch.accelerator.is_available()
        PartialState(cpu=cpu)  # told, accelerate finds the ranks of torchrun on machines without a GPU too
        self.reader = LatentReader(config.data.latents, conditions=config.data.conditions)
        tracker, self.tracker_options = report.choose_tracker(config.train.report_to, _say_once)
        precision = config.train.mixed_precision
        if precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ and torch.cuda.is_available():
            precision = "fp16"
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with=tracker,
            project_config=ProjectConfiguration(logging_dir=config.train.output_dir),
            step_scheduler_with_optimizer=False,
        )
        self.device = self.accelerator.device
        if self.accelerator.mixed_precision == "fp16" and self.device.type == "cpu":
            _say_once("no GPU: training in float32 instead of fp16")
        parts = self.accelerator.num_processes * config.train.gradient_accumulation_steps
        if config.train.global_batch_size % parts:
            raise ValueError(
                f"train.global_batch_size={config.train.global_batch_size} is not divisible by "
                f"{self.accelerator.num_processes} ranks x {config.train.gradient_accumulation_steps} accumulations"
            )
        self.micro_batch_size = config.train.global_batch_size // parts

        self.scheduler = CosineLatentScheduler(
            num_train_timesteps=config.objective.num_train_timesteps, prediction_type=config.objective.prediction_type
        )
        channels, height, width = self.reader.latent_shape
        torch.manual_seed(config.train.seed)
        self.transformer = LatentDiTTransformer2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            conditions=self.reader.conditions,
            **config.model.sizes(),
        ).to(self.device)
        if config.train.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.ema = EMA(self.transformer, config.optim.ema_decay)
        self.optimizer, self.optimizer_name = build_optimizer(self.transformer.parameters(), config.optim, self.device)
        self.model, self.prepared_optimizer = self.accelerator.prepare(self.transformer, self.optimizer)
        self.batches = BatchPrefetcher(self._read, self.device)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in self._normalization())

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Optimizer step `step` (from 0); returns this rank's mean loss and the gradient's norm, on the device."""
        config, batch_size = self.config, self.config.train.global_batch_size
        shape = (batch_size, *self.reader.latent_shape)
        draws = draw(config.objective, config.train.seed, step, shape, len(self.reader.conditions), self.device)
        accumulation = config.train.gradient_accumulation_steps
        total = torch.zeros((), device=self.device)
        for part in range(accumulation):
            following = (step, part + 1) if part + 1 < accumulation else (step + 1, 0)
            batch, rows = self.batches.get((step, part), following), self._positions(part)
            if part < accumulation - 1:
                with self.accelerator.no_sync(self.model):
                    loss = self._backward(batch, draws[rows])
            else:
                loss = self._backward(batch, draws[rows])
            total += loss / accumulation
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm or math.inf)
        # Read before the step: afterwards the scaler has forgotten whether this step overflowed.
        found_inf = self._found_inf()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.train.max_train_steps)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        self.ema.update(self.transformer, step, found_inf)
        return total, grad_norm

    def fit(self, run: Path) -> None:
        """Go on from the run's checkpoint, if asked to, until `max_train_steps`, and export."""
        config, accelerator = self.config, self.accelerator
        start, self.loss_sum, self.loss_count = self._resume(run)
        total = config.train.max_train_steps
        if accelerator.is_main_process:
            run.mkdir(parents=True, exist_ok=True)
            write_text(run / "config.yaml", config.to_yaml())
            report.start_log(run, start)
        if start < total:
            self._start_trackers(run)
            _say_once(f"training {run} on {self.device}, {self.optimizer_name}, steps {start} to {total}")
        progress = tqdm(
            total=total, initial=start, desc="training", unit="step", disable=not accelerator.is_main_process
        )
        clock, stepped = time.monotonic(), start
        for step in range(start, total):
            loss, grad_norm = self.step(step)
            self.loss_sum, self.loss_count, done = self.loss_sum + loss, self.loss_count + 1, step + 1
            progress.update()
            if done % config.train.logging_steps == 0 or done == total:
                loss_text, speed_text = self._log(run, done, grad_norm, done - stepped, clock)
                progress.set_postfix(loss=loss_text, images_per_s=speed_text)
                clock, stepped = time.monotonic(), done
            paused = time.monotonic()
            if config.train.sampling_steps and done % config.train.sampling_steps == 0:
                self._on_main(self.draw_samples, run / "samples" / f"step-{done}.png")
            if done % config.train.checkpointing_steps == 0 or done == total:
                self._save(run, done)
            clock += time.monotonic() - paused
        progress.close()
        self._on_main(self._export, run)
        accelerator.end_training()

    def pipeline(self) -> LatentDiTPipeline:
        """The pipeline of the averaged weights, as it is sampled and exported."""
        mean, std = self._normalization()
        pipeline = LatentDiTPipeline(
            transformer=self.ema.model,
            scheduler=self.scheduler,
            vae=load_vae(str(Path(self.config.data.latents) / "vae"), self.device),
            latents_mean=mean,
            latents_std=std,
            guidance_scale=self.config.train.guidance_scale,
            condition_labels=self.reader.info["condition_labels"],
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw_samples(self, path: Path) -> None:
        """Draw a sheet of the averaged weights: the same noise and the data's first attribute rows every time."""
        count, steps = SHEET_SIZE, self.config.train.num_inference_steps
        noise = torch.randn((count, *self.reader.latent_shape), generator=torch.Generator().manual_seed(0))
        rows = self.reader.attributes(count)
        pipeline = self.pipeline()
        (images,) = pipeline(rows, count, latents=noise, num_inference_steps=steps, return_dict=False)
        save_sheet(draw_sheet(images, columns=8, title=path.stem, min_side=96), path)

    def _positions(self, part: int) -> slice:
        """Where in the global batch this rank's micro-batch number `part` is."""
        first = self.accelerator.process_index * self.config.train.gradient_accumulation_steps + part
        return slice(first * self.micro_batch_size, (first + 1) * self.micro_batch_size)

    def _read(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """The micro-batch `key` (step, part) of this rank."""
        (step, part), seed, batch_size = key, self.config.train.seed, self.config.train.global_batch_size
        rows = self._positions(part)
        flips = draw_flips(seed, step, batch_size)[rows] if self.config.data.flip else None
        return self.reader.batch(seed, step * batch_size + rows.start, self.micro_batch_size, flips)

    def _backward(self, tensors: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its mean loss, detached."""
        config = self.config
        latents = tensors["latent_mean"].float()
        if config.data.sample_posterior and "latent_std" in tensors:
            latents = latents + tensors["latent_std"].float() * draws.posterior_noise
        clean = (latents - self.mean) / self.std
        nulls = self.transformer.null_condition_ids
        condition_ids = torch.where(draws.keep, tensors["condition_ids"], nulls)
        noisy = self.scheduler.add_noise(clean, draws.noise, draws.timesteps)
        prediction = self.model(noisy, draws.timesteps, condition_ids, return_dict=False)[0]
        target = training_target(self.scheduler, clean, draws.noise, draws.timesteps)
        weights = loss_weights(self.scheduler, draws.timesteps, config.objective.snr_gamma)
        loss = losses(prediction, target, weights, config.objective.loss).mean()
        self.accelerator.backward(loss / config.train.gradient_accumulation_steps)
        return loss.detach()

    def _found_inf(self) -> torch.Tensor | None:
        """1, on the device, where fp16's gradients overflowed and the step will be skipped; None without fp16."""
        if self.accelerator.scaler is None:
            return None
        return sum(self.accelerator.scaler._found_inf_per_device(self.optimizer).values())

    def _normalization(self) -> tuple[list[float], list[float]]:
        info, channels = self.reader.info, self.reader.latent_shape[0]
        if self.config.data.normalization == "channel":
            return info["statistics"]["mean"], info["statistics"]["std"]
        return [info["shift_factor"]] * channels, [1 / info["scaling_factor"]] * channels

    def _recipe(self) -> dict[str, Any]:
        recipe = self.config.decisive()
        recipe["data"] |= {"pictures": len(self.reader), "vae_sha256": self.reader.info["vae_sha256"]}
        recipe["optim"] |= {"optimizer": self.optimizer_name}
        recipe["train"] |= {"mixed_precision": self.accelerator.mixed_precision}
        return recipe

    def _resume(self, run: Path) -> tuple[int, torch.Tensor, int]:
        """Load the checkpoint asked for; returns steps done, and sum and count of the losses not yet logged."""
        name = self.config.train.resume_from_checkpoint
        folder = checkpoint.find_checkpoint(run, name) if name else None
        if folder is None:
            return 0, torch.zeros((), device=self.device), 0
        state = checkpoint.read_state(folder)
        checkpoint.check_same_recipe(state["recipe"], self._recipe(), folder)
        if state["step"] > self.config.train.max_train_steps:
            steps = self.config.train.max_train_steps
            raise ValueError(f"{folder} is already beyond train.max_train_steps={steps}; give a larger number")
        checkpoint.load_checkpoint(folder, self.transformer, self.ema.model, self.optimizer)
        if self.accelerator.scaler is not None and state["loss_scale"]:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        return state["step"], torch.tensor(state["loss_sum"], device=self.device), state["loss_count"]

    def _save(self, run: Path, done: int) -> None:
        loss_sum = self.accelerator.reduce(self.loss_sum, "mean").item()
        state = {
            "step": done,
            "recipe": self._recipe(),
            "loss_scale": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "loss_sum": loss_sum,
            "loss_count": self.loss_count,
        }
        limit = self.config.train.checkpoints_total_limit
        parts = (self.transformer, self.ema.model, self.optimizer)
        self._on_main(checkpoint.save_checkpoint, run, state, *parts, limit)

    def _log(self, run: Path, done: int, grad_norm: torch.Tensor, steps: int, clock: float) -> tuple[str, str]:
        """Write one row of the log; returns loss and speed as text."""
        config, accelerator = self.config, self.accelerator
        loss = accelerator.reduce(self.loss_sum / self.loss_count, "mean").item()
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        if not math.isfinite(loss):
            last = checkpoint.list_checkpoints(run)
            raise ValueError(
                f"the loss is {loss} at step {done}; the last checkpoint is {last[-1] if last else 'none'}"
            )
        seconds = time.monotonic() - clock
        images_seen = done * config.train.global_batch_size
        row = {
            "step": done,
            "epoch": round(images_seen / len(self.reader), 4),
            "images_seen": images_seen,
            "loss": loss,
            "learning_rate": learning_rate(config.optim, done - 1, config.train.max_train_steps),
            "grad_norm": grad_norm.item(),
            "images_per_second": round(steps * config.train.global_batch_size / seconds, 2),
            "loss_scale": accelerator.scaler.get_scale() if accelerator.scaler else None,
            "peak_memory_gib": (
                round(torch.cuda.max_memory_allocated() / 2**30, 3) if self.device.type == "cuda" else None
            ),
        }
        if accelerator.is_main_process:
            report.append_log(run, row)
        accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=done)
        return f"{loss:.4f}", f"{row['images_per_second']:.0f}"

    def _start_trackers(self, run: Path) -> None:
        options = {"wandb": {"dir": str(run), "name": run.name, **self.tracker_options}}
        flat = {f"{s}.{k}": v for s, values in self._recipe().items() for k, v in values.items()}
        simple = {name: v if isinstance(v, int | float | str | bool) else str(v) for name, v in flat.items()}
        self.accelerator.init_trackers("dit_hf", config=simple, init_kwargs=options)

    def _export(self, run: Path) -> None:
        """Write what a finished run leaves; what was written of this very step before is left as it is."""
        steps = self.config.train.max_train_steps
        sheet, mark = f"samples/step-{steps}.png", run / "export.json"
        only_missing = mark.is_file() and json.loads(mark.read_text())["step"] == steps
        exports: dict[str, Callable[[], None]] = {
            sheet: lambda: self.draw_samples(run / sheet),
            "loss_curve.png": lambda: report.draw_loss_curve(run),
            "pipeline": lambda: self._save_pipeline(run / "pipeline"),
            "README.md": lambda: report.write_card(run, self._facts(run, sheet)),
        }
        for name, write in exports.items():
            if not (only_missing and (run / name).exists()):
                write()
        write_text(mark, json.dumps({"step": steps}) + "\n")

    def _save_pipeline(self, folder: Path) -> None:
        pipeline = self.pipeline()
        with new_folder(folder) as partial:
            pipeline.save_pretrained(partial)

    def _facts(self, run: Path, sheet: str) -> dict[str, Any]:
        """What the model card says of this run; no path of this machine is among it."""
        info, steps = self.reader.info, self.config.train.max_train_steps
        return {
            "name": run.name,
            "recipe": yaml.safe_dump(self._recipe(), sort_keys=False),
            "pictures": info["counts"]["train"],
            "source": info["settings"]["source"],
            "steps": steps,
            "images_seen": steps * self.config.train.global_batch_size,
            "parameters": sum(p.numel() for p in self.transformer.parameters()),
            "last_loss": float(report.read_log(run)[-1]["loss"]),
            "conditions": list(self.reader.conditions),
            "sheet": sheet,
        }

    def _on_main(self, work: Callable[..., Any], *args: Any) -> None:
        if self.accelerator.is_main_process:
            work(*args)
        self.accelerator.wait_for_everyone()


_said: set[str] = set()


def _say_once(line: str) -> None:
    """Print a line, on the first rank only and never twice."""
    if line not in _said and PartialState().is_main_process:
        print(line, flush=True)
    _said.add(line)
