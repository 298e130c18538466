"""The help of the `dit-hf` command, from the signatures and docstrings of its functions and the fields of a recipe.

`python -m dit_hf.command_help` writes it to `dit_hf/help`, from where it is printed without importing anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any, Literal

import docstring_parser

from .cli import VERBS
from .config import Config
from .recipe_file import members, recipe_names

FOLDER = Path(__file__).parent / "help"
WIDTH, INDENT = 80, 24

# In the order of work, one line each.
SUMMARIES = {
    "demo": "train a small model of drawn faces, offline, in minutes",
    "prepare-latents": "encode your images once, into a latent cache",
    "merge-latents": "join parts of a cache that were built apart",
    "train-autoencoder": "optional: train a VAE of your own for that step",
    "train": "train a model on a latent cache",
    "sample": "generate, edit, inpaint and interpolate images",
    "app": "generate, edit and inpaint in the browser",
    "reference": "compute statistics of real images once, for evaluate",
    "evaluate": "measure how far samples are from real images (FID)",
    "push": "share a model on the Hub, with its card",
    "convert": "convert a DiT of another project",
}
EXAMPLES = {
    "demo": ["dit-hf demo"],
    "prepare-latents": [
        "dit-hf prepare-latents my_images --dry_run --output_dir latents",
        "dit-hf prepare-latents my_images --resolution 128 --flip --output_dir latents",
        "dit-hf prepare-latents my_images --resolution 128 --flip --add_to latents --output_dir more",
    ],
    "merge-latents": ["dit-hf merge-latents part-1 part-2 part-3 part-4 --output_dir latents"],
    "train-autoencoder": ["dit-hf train-autoencoder my_images --output_dir vae"],
    "train": [
        "dit-hf train celeba --data.latents latents --train.output_dir runs/mine",
        "dit-hf train celeba --print_config > mine.yaml",
        "accelerate launch scripts/train.py mine.yaml --train.resume_from_checkpoint latest",
    ],
    "sample": [
        "dit-hf sample runs/mine --output_dir samples --num_images 16",
        """dit-hf sample runs/mine --output_dir smiles --attributes '{"Smiling": true}'""",
        """dit-hf sample runs/mine --output_dir edited --mode edit --image me.png --edit '{"Smiling": true}'""",
    ],
    "app": ["dit-hf app runs/mine"],
    "reference": ["dit-hf reference my_images --resolution 128 --output_dir reference"],
    "evaluate": ["dit-hf evaluate runs/mine --reference my_images --num_samples 2000"],
    "push": ["dit-hf push runs/mine me/my-faces"],
    "convert": ["dit-hf convert facebook/DiT-XL-2-256 --output_dir converted"],
}
SOURCE = (
    "dataset_config_name image_column conditions exclude split split_from missing num_images max_left_out "
    "allow_partial"
)
SPEED = "num_proc batch_size dtype verify"
# The options of a verb by purpose. Those that no group names come first, without a title.
GROUPS = {
    "prepare-latents": {
        "What is read of the source": SOURCE,
        "How images become latents": "vae resolution crop faces min_face_size drop_near_duplicates flip seed",
        "Caches that grow, and several machines": "add_to drop_gone part",
        "Speed and memory": SPEED,
        "Sharing": "push_to_hub private anonymous_ids",
    },
    "train-autoencoder": {
        "What is read of the source": SOURCE + " resolution crop faces min_face_size",
        "Training": "max_train_steps train_batch_size learning_rate mixed_precision seed",
        "What is learned": "init_from decoder_only kl_weight latent_noise",
    },
    "sample": {
        "What is generated": "num_images attributes seed",
        "From given images": "image mask_image strength edit edit_strength num_frames",
        "How it is generated": "num_inference_steps guidance_scale guidance_model eta scheduler options",
        "Speed and memory": SPEED,
    },
    "reference": {
        "What is read of the source": SOURCE + " resolution crop faces min_face_size seed",
        "What is measured": "features feature_weights",
        "Speed and memory": SPEED,
    },
    "evaluate": {
        "What is measured": "num_samples features feature_weights save_images",
        "How samples are generated": "guidance_scale num_inference_steps seed",
        "What is read of a reference that is a source": SOURCE + " crop faces min_face_size",
        "Speed and memory": SPEED,
    },
    "push": {
        "The repository": "space private revision max_shard_size overwrite",
        "The card and the model": "license datasets attributes builtin",
    },
}
# Placeholders of values, by type and by name.
VALUES = {int: "N", float: "X", str: "NAME", list: "LIST", dict: "JSON"}
NAMES = {
    "output_dir": "DIR",
    "latents": "DIR",
    "add_to": "DIR",
    "part": "K/N",
    "vae": "VAE",
    "resolution": "N",
    "conditions": "NAMES",
    "exclude": "PATTERNS",
    "attributes": "JSON",
    "edit": "JSON",
    "image": "PATH",
    "mask_image": "PATH",
    "feature_weights": "FILE",
    "guidance_model": "MODEL",
    "init_from": "MODEL",
    "reference": "SOURCE",
    "guidance_scale": "X",
    "push_to_hub": "REPO",
    "hub_model_id": "REPO",
    "max_shard_size": "SIZE",
    "host": "ADDRESS",
    "resume_from_checkpoint": "CHECKPOINT",
    "revision": "BRANCH",
    "hub_revision": "BRANCH",
}


def main() -> None:
    """Write all help texts to `dit_hf/help`."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in help_texts().items():
        (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")


def help_texts() -> dict[str, str]:
    """Return the help by verb, and that of the whole command as `dit-hf`."""
    return {"dit-hf": command_help(), **{verb: verb_help(verb) for verb in VERBS}}


def command_help() -> str:
    """Return the help of the whole command."""
    verbs = [f"  {verb:18} {SUMMARIES[verb]}" for verb in VERBS]
    return "\n".join(
        [
            "dit-hf: train, sample, edit and share latent Diffusion Transformers.",
            "",
            "Usage: dit-hf VERB ...          (dit-hf VERB --help shows its options)",
            "",
            "Verbs, in the order of work:",
            *verbs,
            "",
            "Examples:",
            "  dit-hf demo                   a small model of drawn faces, in minutes",
            "  dit-hf train celeba --data.latents latents --train.output_dir runs/mine",
            "",
            "README.md and docs/ describe the whole way from a folder of images to a model.",
            "",
        ]
    )


def verb_help(verb: str) -> str:
    """Return the help of one verb: usage, what it does, examples, options by purpose."""
    positions = VERBS[verb][2:]
    options = recipe_options() if verb == "train" else function_options(verb)
    required = [o for group in options.values() for o in group if o.required and o.name not in positions]
    usage = ["dit-hf", verb]
    usage += ["[RECIPE]"] if verb == "train" else [_position(verb, name) for name in positions]
    usage += [f"--{option.name} {option.value}" for option in required]
    lines = [f"Usage: {' '.join(usage)} [options]", "", *textwrap.wrap(_summary(verb_function(verb)), WIDTH), ""]
    lines += ["Examples:" if len(EXAMPLES[verb]) > 1 else "Example:"]
    lines += [f"  {example}" for example in EXAMPLES[verb]]
    for title, group in options.items():
        lines += ["", *textwrap.wrap(f"{title}:", WIDTH), *(option.describe(positions) for option in group)]
    return "\n".join([*lines, ""])


@dataclasses.dataclass
class Option:
    """An option as the help shows it."""

    name: str
    type: Any
    default: Any
    text: str
    required: bool = False

    @property
    def value(self) -> str:
        """The placeholder of its value."""
        types_ = [part for part in members(self.type) if part is not type(None)]
        if choices := [str(c) for part in types_ if typing.get_origin(part) is Literal for c in typing.get_args(part)]:
            return "{" + ",".join(choices) + "}"
        if bool in types_:
            return "" if self.default is False else "{true,false}"
        return NAMES.get(self.name.rpartition(".")[2]) or VALUES[typing.get_origin(types_[0]) or types_[0]]

    def describe(self, positions: tuple[str, ...]) -> str:
        """Return the lines of the help."""
        name = self.name.upper() if self.name in positions else f"--{self.name} {self.value}".rstrip()
        text = self.text if self.text.endswith("...") else self.text.rstrip(".")
        text = text[0].upper() + text[1:]
        if not self.required and self.default not in (None, []) and self.default is not False:
            text += f" (default: {'true' if self.default is True else self.default})"
        return _entry(name.replace("CONFIG", "RECIPE"), text, INDENT)


def function_options(verb: str) -> dict[str, list[Option]]:
    """Return the options of a verb's function by purpose."""
    function = verb_function(verb)
    hints = typing.get_type_hints(function)
    texts = documented(function)
    options = {
        name: Option(name, hints[name], parameter.default, texts[name], parameter.default is parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    groups = {title: [n for n in names.split() if n in options] for title, names in GROUPS.get(verb, {}).items()}
    grouped = {name for names in groups.values() for name in names}
    groups = {"Options": [name for name in options if name not in grouped], **groups}
    return {title: [options[name] for name in names] for title, names in groups.items() if names}


def recipe_options() -> dict[str, list[Option]]:
    """Return the options of `train`: those of the command, then the keys of a recipe by section."""
    own = [
        Option("config", str, None, "A recipe: a file, or the name of one that comes with dit_hf "
               f"({', '.join(recipe_names())}). --config RECIPE is the same. The options below change "
               "single keys of it"),
        Option("print_config", bool, False, "Print the whole recipe and stop"),
        Option("dry_run", bool, False, documented(verb_function("train"))["dry_run"]),
    ]  # fmt: skip
    groups = {"Options": own}
    for section in dataclasses.fields(Config):
        cls = typing.get_type_hints(Config)[section.name]
        hints, texts = typing.get_type_hints(cls), documented(cls)
        defaults = cls()
        title = f"{section.name}: {_summary(cls).split('.')[0]}"
        groups[title] = [
            Option(f"{section.name}.{f.name}", hints[f.name], getattr(defaults, f.name), texts[f.name])
            for f in dataclasses.fields(cls)
        ]
    return groups


def documented(described: Any) -> dict[str, str]:
    """Return the descriptions of a function's arguments, or of a dataclass's fields."""
    parsed = docstring_parser.parse_from_object(described)
    return {param.arg_name: param.description or "" for param in parsed.params}


def completion_parser() -> argparse.ArgumentParser:
    """Build a plain parser of all verbs and options, for `shtab dit_hf.command_help.completion_parser`."""
    parser = argparse.ArgumentParser(prog="dit-hf")
    verbs = parser.add_subparsers()
    for verb in VERBS:
        own = verbs.add_parser(verb, help=_summary(verb_function(verb)))
        for group in (recipe_options() if verb == "train" else function_options(verb)).values():
            for option in group:
                choices = option.value[1:-1].split(",") if option.value.startswith("{") else None
                own.add_argument(f"--{option.name}", choices=choices, help=option.text.replace("%", "%%"))
    return parser


def verb_function(verb: str) -> Any:
    """Import and return the function of a verb."""
    module, name, *_ = VERBS[verb]
    return getattr(importlib.import_module(module), name)


def _position(verb: str, name: str) -> str:
    parameter = inspect.signature(verb_function(verb)).parameters[name]
    several = typing.get_type_hints(verb_function(verb))[name] == list[str]
    shown = name.upper() + ("..." if several else "")
    return shown if parameter.default is inspect.Parameter.empty else f"[{shown}]"


def _summary(described: Any) -> str:
    return " ".join((inspect.getdoc(described) or "").split("\n\n")[0].split())


def _entry(name: str, text: str, indent: int) -> str:
    """Return `  name   text`, the text wrapped and indented; a long name has a line of its own."""
    lines = textwrap.wrap(" ".join(text.split()), WIDTH - indent)
    if len(name) > indent - 4:
        return "\n".join([f"  {name}", *(" " * indent + line for line in lines)])
    return "\n".join([f"  {name:{indent - 2}}{lines[0]}", *(" " * indent + line for line in lines[1:])])


if __name__ == "__main__":
    main()
