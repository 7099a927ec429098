"""The app's look: own colours, light and dark, the system's own fonts, so that nothing comes from the network."""

from __future__ import annotations

import gradio as gr

from flatlora_diffusion.charts.palette import BASE, OWN_LOOKS, THIRD, TONES
from flatlora_diffusion.config import METHODS

from .html import read_static

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

# A colour for each method, then its lighter and darker kin for more runs of the same method in one chart. They are
# variables of the page, which are others on dark paper.
SHADES = {
    row.title: tuple(f"var(--{name})" for name in OWN_LOOKS.get(method, THIRD).tones)
    for method, row in METHODS.items()
}
COLOURS = {method: shades[0] for method, shades in SHADES.items()}
NO_METHOD = f"var(--{BASE.name})"  # the base's, and that of a LoRA from elsewhere


def make_theme() -> gr.themes.Base:
    """Warm neutrals with one strong colour."""
    return gr.themes.Base(
        primary_hue="orange", secondary_hue="teal", neutral_hue="stone", radius_size="lg", font=_SANS, font_mono=_MONO
    ).set(
        body_background_fill="#faf8f5",
        body_background_fill_dark="#171412",
        block_background_fill="white",
        block_background_fill_dark="#221e1b",
        button_primary_background_fill="#b84a16",
        button_primary_background_fill_hover="#9c3d10",
        button_primary_background_fill_dark="#b84a16",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_cancel_background_fill="transparent",
        button_cancel_background_fill_dark="transparent",
        button_cancel_background_fill_hover="#b42318",
        button_cancel_background_fill_hover_dark="#ff8a7a",
        button_cancel_text_color="#b42318",
        button_cancel_text_color_dark="#ff8a7a",
        button_cancel_border_color="#b42318",
        button_cancel_border_color_dark="#ff8a7a",
        button_border_width="1px",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="#b84a16",
    )


_LIGHT, _DARK = (
    " ".join(f"--{name}: {tone};" for name, tone in zip(TONES, tones, strict=True))
    for tones in zip(*TONES.values(), strict=True)
)

CSS = read_static("theme.css", LIGHT=_LIGHT, DARK=_DARK)

# In the head, where a media query holds for all of the page.
HEAD = f"<style>{read_static('reduced_motion.css')}</style>"
