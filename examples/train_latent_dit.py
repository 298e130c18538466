"""A training loop of your own on a latent cache, with plain PyTorch, diffusers and accelerate.

    dit-hf prepare-latents my_images --resolution 64 --vae avatar-robust --output_dir latents
    accelerate launch examples/train_latent_dit.py --latents latents --output_dir my-model

`dit-hf train` does more: it resumes with the same bits, validates, logs and samples. Start from here to change what it
does not let you change.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from dit_hf import CosineLatentScheduler, LatentDiTPipeline, LatentDiTTransformer2DModel
from dit_hf.latents.cache import open_latents
from dit_hf.latents.vae import load_vae


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latents", required=True, help="A cache made by dit-hf prepare-latents.")
    parser.add_argument("--output_dir", required=True, help="Where the pipeline is saved.")
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--condition_dropout", type=float, default=0.1)
    args = parser.parse_args()
    accelerator = Accelerator()

    # The cache is a plain dataset: latents as flat lists, and one column of whole numbers a condition.
    images, info = open_latents(args.latents)  # `datasets.load_from_disk`, and the content of latents.json
    conditions, shape = info["conditions"], info["latent_shape"]  # {"Smiling": 2, ...}, [channels, height, width]
    images = images.filter(lambda split: split == "train", input_columns="split").with_format("torch")
    loader = DataLoader(images, args.train_batch_size, shuffle=True, drop_last=True)

    # Each channel is normalized by statistics that the cache brings; the pipeline gets them, too.
    mean, std = info["statistics"]["mean"], info["statistics"]["std"]
    scheduler = CosineLatentScheduler(prediction_type="v_prediction")
    transformer = LatentDiTTransformer2DModel(
        sample_size=shape[1:],
        in_channels=shape[0],
        num_layers=6,
        num_attention_heads=3,
        attention_head_dim=64,
        conditions=conditions,
    )
    optimizer = torch.optim.AdamW(transformer.parameters(), args.learning_rate)
    ema = EMAModel(transformer.parameters(), decay=0.995)
    ema.to(accelerator.device)
    model, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)
    center, scale = (torch.tensor(x, device=accelerator.device).view(1, -1, 1, 1) for x in (mean, std))
    nulls = torch.tensor(
        [*conditions.values()], device=accelerator.device
    )  # the highest id of a condition is its null

    step = 0
    while step < args.max_train_steps:
        for batch in loader:
            latents = batch["latent_mean"].float().view(-1, *shape)
            if "latent_std" in batch:  # the VAE has a posterior: sample it
                latents = latents + batch["latent_std"].float().view(-1, *shape) * torch.randn_like(latents)
            latents = (latents - center) / scale
            noise = torch.randn_like(latents)
            timesteps = torch.randint(len(scheduler), (len(latents),), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, timesteps)

            # Without its conditions an image teaches the unconditional model, which guidance needs.
            ids = None
            if conditions:
                # A value that is missing is read as NaN, and trained as null.
                ids = torch.stack([batch[name].nan_to_num(null) for name, null in conditions.items()], 1).long()
                dropped = torch.rand(len(ids), 1, device=ids.device) < args.condition_dropout
                ids = torch.where(dropped, nulls, ids)

            prediction = model(noisy, timesteps, ids, return_dict=False)[0]
            target = scheduler.get_velocity(latents, noise, timesteps)
            # Min-SNR weights for v-prediction, with gamma 5 (https://arxiv.org/abs/2303.09556).
            alpha, sigma = scheduler.levels(timesteps)
            snr = (alpha / sigma) ** 2
            weights = (snr.clamp(max=5) / (snr + 1)).view(-1, 1, 1, 1)
            loss = (weights * F.mse_loss(prediction.float(), target, reduction="none")).mean()

            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(transformer.parameters())
            step += 1
            if step % 100 == 0 or step == args.max_train_steps:
                accelerator.print(f"step {step}: loss {loss.item():.4f}")
            if step == args.max_train_steps:
                break

    if accelerator.is_main_process:
        ema.copy_to(transformer.parameters())
        pipeline = LatentDiTPipeline(
            transformer=accelerator.unwrap_model(model),
            scheduler=scheduler,
            vae=load_vae(f"{args.latents}/vae"),
            latents_mean=mean,
            latents_std=std,
            condition_labels=info["condition_labels"],
        )
        pipeline.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
