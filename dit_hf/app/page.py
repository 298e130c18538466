"""The app's page: tabs and settings on the left, results on the right; on a narrow screen one below the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from PIL import Image

from .panel import Data, Panel, build_panel
from .results import Results, build_results, readable, selected_image
from .server import Page
from .studio import Studio
from .tabs import TABS, Tab

# Fonts of the system only, so that the page needs no network.
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "monospace"]
# The order of the document is that of a narrow screen: tabs, results, settings.
CSS = """
.gradio-container > main { max-width: 1280px; width: 100%; margin: 0 auto; }
@media (min-width: 860px) {
    #layout { display: grid; grid-template-columns: 5fr 6fr; grid-template-rows: auto 1fr; align-items: start; }
    #right { grid-column: 2; grid-row: 1 / span 2; }
}
#about h1, #about p, #status p { margin: 0; }
button[role="tab"].selected { color: var(--body-text-color); }
#results .grid-wrap { min-height: 200px; max-height: none; }
#results:has(.preview) .grid-wrap { min-height: 560px; }
#results .grid-container { grid-template-columns: repeat(auto-fit, minmax(min(20%, 140px), 1fr)); }
#results .grid-container { grid-auto-rows: auto; }
#results .grid-container .thumbnail-item { aspect-ratio: 1; height: auto; }
.form:has(> fieldset.choice) { border: none; }
fieldset.choice { display: flex; align-items: center; padding: 2px 0 !important; border: none !important; }
fieldset.choice > span { flex: 1; margin: 0; font-size: 0.9rem; }
fieldset.choice > .wrap { flex: none; flex-wrap: nowrap; gap: 0; border-radius: 6px; overflow: hidden; }
fieldset.choice label { padding: 2px 11px; border-radius: 0; box-shadow: none; font-size: 0.85rem; }
fieldset.choice label { background: var(--border-color-primary); color: var(--body-text-color); }
fieldset.choice label.selected { background: var(--neutral-600); color: white; }
fieldset.choice label.selected:not(:first-child) { background: var(--primary-600); }
fieldset.choice label:has(:focus-visible) { outline: 2px solid var(--primary-500); outline-offset: -2px; }
fieldset.choice input { position: absolute; opacity: 0; width: 0; }
fieldset.choice label > span { margin: 0; }
"""
# gradio (6.31) gives a group of radio buttons no name for screen readers, and no common one for the arrow keys.
NAME_GROUPS = """() => {
    const name = () => document.querySelectorAll("fieldset.choice:not([aria-label])").forEach(group => {
        group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]").textContent)
        group.querySelectorAll("input").forEach(input => { input.name = group.ariaLabel })
    })
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true})
    name()
}"""


def build_page(studio: Studio, model: str, title: str, header: str) -> gr.Blocks:
    """Build the page.

    Args:
        studio: The model.
        model: What the Python code on the page loads.
        title: The title of the browser's window.
        header: Markdown at the top, see `about`.
    """
    with Page(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(header, elem_id="about")
        with gr.Row(elem_id="layout"):
            with gr.Column(min_width=320), gr.Tabs(selected="generate", overflow_behavior="wrap") as tabs:
                built = []
                for mode, (name, build) in TABS.items():
                    with gr.Tab(name, id=mode):
                        built.append(build(studio))
            with gr.Column(min_width=320, elem_id="right"):
                results = build_results(studio, model)
            with gr.Column(min_width=320):
                panel = build_panel(studio)
        for tab in built:
            _connect_run(tab, results, panel)
            if tab.image is not None:
                _connect_selection(tab, tab.image, results, tabs)
        # Not in the queue, where visitors would wait for the calls of others.
        page.load(_examples(studio), None, results.gallery, queue=False)
    return page


def look() -> dict[str, Any]:
    """Return theme, styles and script as options of `gr.Blocks.launch`."""
    theme = gr.themes.Soft(primary_hue="rose", neutral_hue="slate", font=FONT, font_mono=MONO).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_border_width="1px",
        block_shadow="none",
        **{
            f"block_{part}_{what}": value
            for part in ("label", "title")
            for what, value in (
                ("background_fill", "none"),
                ("background_fill_dark", "none"),
                ("text_color", "*body_text_color"),
                ("text_color_dark", "*body_text_color"),
                ("text_weight", "500"),
            )
        },
        block_title_padding="0",
    )
    return {"theme": theme, "css": CSS, "js": NAME_GROUPS, "footer_links": []}


def _connect_run(tab: Tab, results: Results, panel: Panel) -> None:
    """Connect the buttons of a tab that run and stop its call."""

    def run(data: Data) -> Iterator[dict[Any, Any]]:
        with readable():
            call, before = tab.call(data, panel)
            yield from results.run(call, panel, before)

    # One call at a time over all buttons and users.
    event = tab.button.click(
        run,
        {*panel.inputs, *tab.inputs},
        [results.status, results.gallery, results.selected, results.code, panel.seed],
        api_name=tab.mode,
        concurrency_limit=1,
        concurrency_id="model",
        show_progress_on=[results.gallery],
    )
    tab.stop.click(None, cancels=[event], queue=False)


def _connect_selection(tab: Tab, image: gr.Image | gr.ImageEditor, results: Results, tabs: gr.Tabs) -> None:
    """Connect the button below the results that hands the selected image to a tab."""

    def hand_over(gallery: list[tuple[str, str]] | None, number: int | None) -> tuple[gr.Tabs, Image.Image]:
        with readable():
            return gr.Tabs(selected=tab.mode), tab.prepare(selected_image(gallery, number))

    results.buttons[tab.mode].click(
        hand_over, [results.gallery, results.selected], [tabs, image], show_progress="hidden"
    )


def _examples(studio: Studio) -> Callable[[], list[Image.Image]]:
    """Return the function that shows the first images."""

    def load() -> list[Image.Image]:
        with readable():
            return studio.examples()

    return load
