"""Run `dit-hf train-autoencoder`: `python scripts/train_autoencoder.py ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["train-autoencoder", *sys.argv[1:]]))
