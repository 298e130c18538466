"""Run `dit-hf train` on every rank: `accelerate launch scripts/train.py --config recipes/avatars.yaml ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
