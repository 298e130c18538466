"""What the package needs of the operating system, nothing that Windows does not have, and of optional packages."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The modules of dit_hf, and no others, get the standard library as it is on Windows.
AS_ON_WINDOWS = """
import builtins, mmap, os, signal, sys, types

MISSING = {"fcntl", "grp", "pwd", "resource", "termios"}
NAMES = {
    mmap: "MADV_RANDOM PROT_READ madvise",
    os: "O_DIRECTORY O_NOFOLLOW O_NONBLOCK fchmod fork getuid killpg sched_getaffinity statvfs",
    signal: "SIGHUP SIGKILL SIGUSR1 SIGUSR2 pthread_sigmask setitimer",
    sys: "",
}

class Windows(types.ModuleType):
    platform, name = "win32", "nt"
    @staticmethod
    def open(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(path)
        return os.open(path, *args, **kwargs)
    def __init__(self, module, names):
        super().__init__(module.__name__)
        self.module, self.names = module, names.split()
    def __getattr__(self, name):
        if name in self.names:
            raise AttributeError(name)
        return getattr(self.module, name)

windows = {module.__name__: Windows(module, names) for module, names in NAMES.items()}
original_import = builtins.__import__

def import_as_on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").startswith("dit_hf"):
        if name in MISSING:
            raise ModuleNotFoundError(name)
        if name in windows:
            return windows[name]
    return original_import(name, globals, locals, fromlist, level)

builtins.__import__ = import_as_on_windows
"""


def test_commands_run_without_what_windows_does_not_have(tmp_path, vae_folder):
    """And without packages that only the KID needs, or that others compute features with."""
    code = f"""{AS_ON_WINDOWS}
import importlib, pkgutil
sys.modules.update(dict.fromkeys(["torchvision", "timm", "torch_fidelity", "torchmetrics"]))
import dit_hf
assert not hasattr(dit_hf.storage.os, "fork") and dit_hf.devices.sys.platform == "win32"
from dit_hf_cli import main
for module in pkgutil.walk_packages(dit_hf.__path__, "dit_hf."):
    if module.name != "dit_hf.__main__":
        importlib.import_module(module.name)
assert main(["prepare-latents", "avatars", "--num_images", "40", "--resolution", "16", "--vae", sys.argv[1],
             "--output_dir", "latents"]) == 0
assert main(["train", "--config", "recipes/avatars.yaml", "--data.latents", "latents", "--train.output_dir", "run",
             "--model.num_layers", "1",
             "--train.max_train_steps", "2", "--train.global_batch_size", "4", "--train.report_to", "none"]) == 0
assert main(["sample", "run", "--num_images", "2", "--num_inference_steps", "2", "--output_dir", "samples"]) == 0
assert dit_hf.evaluation.features.load_features("efficientnet-lite0").dim == 320
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DIT_HF_TRACEBACK": "1"}
    command = [sys.executable, "-c", code, vae_folder]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    assert (tmp_path / "samples" / "00001.png").is_file()
