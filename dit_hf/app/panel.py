"""The settings that all tabs share: the requested attributes, and the settings of sampling."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..pipelines.attributes import AttributeValue
from .studio import Control, Settings, Studio

MAX_IMAGES = 16
MAX_SEED = 2**53 - 1  # beyond it, the numbers of JSON and of browsers are not exact

Data = dict[Any, Any]  # the values of an event's components


@dataclass
class Panel:
    """The controls that all tabs share."""

    studio: Studio
    attributes: dict[str, gr.Radio | gr.Dropdown]
    num_images: gr.Slider
    seed: gr.Number
    new_seed: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider

    @property
    def inputs(self) -> set[Any]:
        """The components of the panel that an event needs to generate images."""
        return {*self.attributes.values(), self.num_images, self.seed, self.new_seed, self.steps, self.guidance}

    def requested(self, data: Data) -> dict[str, AttributeValue]:
        """Return the requested attributes, those that are not left open."""
        choices = [(control, data[self.attributes[control.name]]) for control in self.studio.controls]
        return {control.name: control.values[number][1] for control, number in choices if number}

    def settings(self, data: Data) -> Settings:
        """Return the settings of sampling, with a random seed if "Randomize seed" is on or there is none."""
        seed = data[self.seed]
        if seed is None or data[self.new_seed]:
            seed = random.randrange(2**31)
        return Settings(int(data[self.num_images]), int(seed), int(data[self.steps]), float(data[self.guidance]))


def build_panel(studio: Studio) -> Panel:
    """Build the controls."""
    # 1. Settings of sampling. An unconditional model has no guidance.
    with gr.Accordion("Sampling"):
        defaults = Settings()
        highest = max(8.0, 2 * studio.guidance_scale)
        with gr.Row():
            num_images = gr.Slider(1, MAX_IMAGES, defaults.num_images, step=1, label="Images", min_width=140)
            steps = gr.Slider(
                *(1, min(100, studio.num_levels), studio.num_inference_steps), step=1, label="Steps", min_width=140
            )
        with gr.Row():
            guidance = gr.Slider(
                *(1.0, highest, studio.guidance_scale),
                step=0.1,
                label="Guidance",
                min_width=140,
                visible=bool(studio.controls),
            )
            with gr.Column(min_width=140):
                seed = gr.Number(defaults.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                new_seed = gr.Checkbox(True, label="Randomize seed", container=False)

    # 2. Attributes, one accordion a group; only the first group is open, or the page would be very long.
    attributes: dict[str, gr.Radio | gr.Dropdown] = {}
    groups = list(dict.fromkeys(control.group for control in studio.controls))
    if groups:
        with gr.Row():
            summary = gr.Markdown(_summary([]))
            clear = gr.Button("Clear", size="sm", min_width=60, scale=0)
    for group in groups:
        with gr.Accordion(group if len(groups) > 1 else "Attributes", open=group == groups[0]):
            for control in studio.controls:
                if control.group == group:
                    attributes[control.name] = _choice(control)
    panel = Panel(studio, attributes, num_images, seed, new_seed, steps, guidance)

    # 3. The summary of the requested attributes, and the button that clears them.
    if attributes:

        def summarize(data: Data) -> str:
            requested = panel.requested(data)
            controls = [control for control in studio.controls if control.name in requested]
            return _summary([_describe(control, requested[control.name]) for control in controls])

        choices = list(attributes.values())
        gr.on(
            [choice.change for choice in choices], summarize, {*choices}, summary, queue=False, show_progress="hidden"
        )
        clear.click(lambda: [0] * len(choices), None, choices, queue=False, show_progress="hidden")
    return panel


def _choice(control: Control) -> gr.Radio | gr.Dropdown:
    """Return the component of a control, with the index of the choice as its value; many choices are a list."""
    choices = [(label, number) for number, (label, _) in enumerate(control.values)]
    kind = gr.Radio if len(choices) <= 3 else gr.Dropdown
    return kind(choices, value=0, label=control.label, elem_classes="choice")


def _describe(control: Control, value: AttributeValue) -> str:
    """Describe a requested attribute for the summary, e.g. `not Smiling`."""
    if isinstance(value, bool):
        return control.label if value else f"not {control.label}"
    return f"{control.label}: {next(label for label, choice in control.values if choice == value)}"


def _summary(attributes: list[str]) -> str:
    """Return the line above the attributes."""
    return f"**Requested:** {', '.join(attributes) or 'any'}"
