"""Run `dit-hf` as `python -m dit_hf`."""

import sys

from .cli import main

sys.exit(main())
