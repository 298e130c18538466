"""Run `dit-hf sample` on every rank: `accelerate launch scripts/sample.py MODEL --output_dir DIR ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
