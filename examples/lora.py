"""Train a LoRA, a small adapter, for a model on a few hundred images, with peft, diffusers and accelerate.

    dit-hf prepare-latents my_images --resolution 64 --vae avatar-robust --output_dir latents
    accelerate launch examples/lora.py --model runs/demo/pipeline --latents latents --output_dir my-lora

The images must have the model's resolution and VAE. To generate with the adapter:

    pipe = DiffusionPipeline.from_pretrained("runs/demo/pipeline")
    pipe.transformer.load_lora_adapter("my-lora", prefix=None, weight_name="pytorch_lora_weights.safetensors")
"""

from __future__ import annotations

import argparse
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_linear_schedule_with_warmup
from peft import LoraConfig
from torch.utils.data import DataLoader

from dit_hf.latents.cache import open_latents  # dit_hf registers its classes with diffusers
from dit_hf.training.objective import loss_weights, losses, training_target


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="A pipeline: a folder or a model on the Hub.")
    parser.add_argument("--latents", required=True, help="A cache made by dit-hf prepare-latents with the same VAE.")
    parser.add_argument("--output_dir", required=True, help="Where the adapter is saved.")
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    accelerator = Accelerator()
    set_seed(args.seed, device_specific=True)

    # The model stays as it is; only the adapter, beside the matrices of attention and feed-forward layers, is trained.
    pipe = DiffusionPipeline.from_pretrained(args.model)
    transformer, scheduler = pipe.transformer.requires_grad_(False), pipe.scheduler
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.learning_rate)
    lr_scheduler = get_linear_schedule_with_warmup(optimizer, 0, args.max_train_steps)

    # Conditions of the model that these images lack are null for them: not specified.
    images, info = open_latents(args.latents)
    shape, conditions = info["latent_shape"], transformer.config.conditions or {}
    expected = [transformer.config.in_channels, *transformer.latent_size]
    if shape != expected:
        raise SystemExit(f"{args.latents} has latents {shape}, {args.model} {expected}: use its VAE and resolution")
    images = images.filter(lambda split: split == "train", input_columns="split").with_format("torch")
    loader = DataLoader(images, args.train_batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)

    # Latents are normalized by the statistics of the images that the model was trained on, not by those of these.
    mean, std = (
        torch.tensor(values, device=accelerator.device).view(1, -1, 1, 1)
        for values in (pipe.config.latents_mean, pipe.config.latents_std)
    )
    batches = (batch for _ in itertools.count() for batch in loader)
    for step, batch in zip(range(1, args.max_train_steps + 1), batches, strict=False):
        latents = (batch["latent_mean"].float().view(-1, *shape) - mean) / std
        noise = torch.randn_like(latents)
        timesteps = torch.randint(len(scheduler), (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        ids = None
        if conditions:
            columns = [
                batch[name].nan_to_num(null) if name in batch else torch.full_like(timesteps, null)
                for name, null in conditions.items()
            ]
            nulls = torch.tensor([*conditions.values()], device=latents.device)
            dropped = torch.rand(len(latents), 1, device=latents.device) < 0.1  # for guidance
            ids = torch.where(dropped, nulls, torch.stack(columns, 1).long())
        prediction = model(noisy, timesteps, ids, return_dict=False)[0]
        target = training_target(scheduler, latents, noise, timesteps)
        loss = losses(prediction, target, loss_weights(scheduler, timesteps, snr_gamma=5.0), "l2").mean()

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.max_train_steps:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_lora_adapter(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
