"""Helpers for tests of repositories: pushes, processes without dit_hf, snippets of cards, private data."""

import os
import re
import subprocess
import sys

from dit_hf_cli import main

# Code that makes `import dit_hf` fail in a process, even if it is installed.
HIDE_DIT_HF = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dit_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""


def run_without_dit_hf(code, *args, **environment):
    """Run code in a process that cannot import dit_hf, offline, and return its stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", HIDE_DIT_HF + code, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_snippets(card):
    """Return the Python snippets of a model card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def assert_no_leaks(folder):
    """Check that no file contains a path of this machine or a token."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".npy":
            content = path.read_bytes()
            for secret in (str(folder), os.getcwd(), "hf_test", os.path.expanduser("~") + "/"):
                assert secret.encode() not in content, f"{path} has {secret}"


def push(capsys, *args):
    """Run `dit-hf push` and return its exit code and the last line of its output."""
    code = main(["push", *map(str, args)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, (captured.err if code else captured.out).splitlines()[-1]
