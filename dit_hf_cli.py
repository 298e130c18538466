"""Entry of the `dit-hf` command: answers what needs no import, and hands everything else to `dit_hf.cli`.

It stands beside the package because importing that takes seconds: it registers its classes with diffusers, which needs
torch. The texts in `dit_hf/help` are written by `dit_hf.command_help`.
"""

from __future__ import annotations

import difflib
import gc
import importlib.metadata
import io
import os
import sys
from pathlib import Path

HELP = Path(__file__).parent / "dit_hf" / "help"


def main(args: list[str] | None = None) -> int:
    """Answer a question about the command, or run a verb; return the exit code.

    Args:
        args: The command line without the program's name; None is `sys.argv[1:]`.

    Returns:
        2 for an unknown verb, 1 if a package is missing or too old, and as `dit_hf.cli.run`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that the terminal does not have ends no command
    args = sys.argv[1:] if args is None else args
    verb = args[0] if args else "--help"
    verbs = sorted(path.stem for path in HELP.glob("*.txt") if path.stem != "dit-hf")
    if verb == "--version":
        print(f"dit_hf {importlib.metadata.version('dit_hf')}")
    elif verb in ("-h", "--help"):
        print(help_text("dit-hf"), end="")
    elif verb not in verbs:
        nearest = difflib.get_close_matches(verb.lower(), [*verbs, "--help", "--version"], 1)
        if verb == "help":
            nearest = [f"{args[1]} --help" if args[1:] and args[1] in verbs else "--help"]
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the verbs are {', '.join(verbs)}"
        print(f"dit-hf: error: unknown verb {verb!r}; {hint}", file=sys.stderr)
        return 2
    elif "-h" in args or "--help" in args:
        print(help_text(verb), end="")
    else:
        try:
            gc.disable()  # until `run` has imported the verb, which makes a million objects that stay
            from dit_hf.cli import run

            return run(verb, args[1:])
        except ImportError as error:  # a package that is missing or too old
            if os.environ.get("DIT_HF_TRACEBACK"):
                raise
            print(f"dit-hf {verb}: error: {error}", file=sys.stderr)
            return 1
        finally:
            gc.enable()
    return 0


def help_text(name: str) -> str:
    """Return the help of a verb, or of the whole command, `dit-hf`."""
    return (HELP / f"{name}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
