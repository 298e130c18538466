"""PSNR of a VAE's reconstructions of unseen avatars: python benchmarks/autoencoder.py [VAE]"""

import sys

from dit_hf import open_images
from dit_hf.latents.train_autoencoder import psnr
from dit_hf.latents.vae import load_vae

SEED, NUM_IMAGES = 4711, 500

if __name__ == "__main__":
    vae = load_vae(sys.argv[1] if len(sys.argv) > 1 else "avatar")
    for resolution in (64, 128):
        images = open_images("avatars", resolution=resolution, num_images=NUM_IMAGES, seed=SEED)
        print(f"{resolution} px: {psnr(vae, images):.2f} dB (mean of {NUM_IMAGES} avatars of seed {SEED})")
