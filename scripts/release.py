"""Build what is published, in dist/: the wheel, a 128 px avatar model's repository, and its Space.

    python scripts/release.py [--run RUN] [--repo_id OWNER/NAME]

Without RUN a model is trained on avatars: about a quarter of an hour on two idle cores. Everything is pushed to a Hub
on this machine first, loaded from there and called, so that only a login is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from local_hub import running_hub  # noqa: E402

RUN, MODEL, SPACE = "runs/avatars-128", "dist/model", "dist/model-space"
# In a process of its own, as a stranger has it: nothing but the id.
CHECK = """
import sys, dit_hf
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe(num_inference_steps=25).images[0]
assert image.size == pipe.resolution[::-1], image.size
"""


def main() -> None:
    """Train unless there is a run, push to the Hub of this machine, and check what arrived there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the run whose model is published")
    parser.add_argument("--repo_id", default="you/dit-hf-avatars-128", help="the names of model and Space on the Hub")
    options = parser.parse_args()
    os.chdir(ROOT)
    run = options.run or train()

    with running_hub() as hub:
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(ROOT / "dist" / "cache")}
        push = ["push", run, options.repo_id, "--space", "--output_dir", MODEL, "--overwrite"]
        dit_hf(*push, env=environment)
        subprocess.run([sys.executable, "-c", CHECK, options.repo_id], check=True, env=environment)
        shutil.rmtree(ROOT / "dist" / "cache")
    (wheel,) = Path(SPACE).glob("*.whl")
    shutil.copy(wheel, "dist")
    print(f"\ndist/{wheel.name} is the wheel, {MODEL} the repository, {SPACE} the Space. To publish them:")
    print(f"  hf auth login && dit-hf push {run} {options.repo_id} --space")


def train() -> str:
    """Train a model of avatars at 128 px, or resume it, and return its run."""
    latents = f"{RUN}/latents"
    dit_hf("prepare-latents", "avatars", "--vae", "avatar", "--resolution", "128", "--output_dir", latents,
           "--num_images", "8000")  # fmt: skip
    # With patches of 4 a step takes as long as one of 64 px.
    dit_hf("train", "--config", "avatars", "--data.latents", latents, "--train.output_dir", RUN,
           "--model.patch_size", "4", "--train.max_train_steps", "3000", "--train.report_to", "none",
           "--train.resume_from_checkpoint", "latest")  # fmt: skip
    return RUN


def dit_hf(*args: str, env: dict[str, str] | None = None) -> None:
    """Run `dit-hf ARGS`."""
    subprocess.run([sys.executable, "-m", "dit_hf", *args], check=True, env=env)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:  # which has printed the reason
        sys.exit(error.returncode)
