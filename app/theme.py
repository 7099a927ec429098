"""The app's look: own colours, light and dark, the system's own fonts, so that nothing comes from the network."""

from __future__ import annotations

import gradio as gr

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

COLOURS = {"LoRA": "#0e8f8f", "Flat-LoRA": "#e0662d"}


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
    )


CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
footer { display: none !important; }
.fl-title h1 { margin: 0; } .fl-title p { margin: .2rem 0 0; opacity: .75; }
.fl-card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px 16px; margin-bottom: 10px;
  background: var(--block-background-fill); color: var(--body-text-color); overflow-wrap: anywhere; }
.fl-card b { font-weight: 600; }
.fl-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; }
.fl-track { height: 10px; border-radius: 5px; background: var(--border-color-primary); margin: 8px 0 4px;
  overflow: hidden; }
.fl-fill { height: 100%; }
.fl-faint { opacity: .75; font-size: .9em; }
.fl-bad { color: #b42318; } .dark .fl-bad { color: #ff8a7a; }
.fl-card pre { white-space: pre-wrap; max-height: 14em; overflow: auto; font-size: .8em; margin: 8px 0 0; }
#captions, #captions > *, .table-wrap { max-width: 100%; overflow-x: auto; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { overflow-x: clip; max-width: 100vw !important; }
  .gradio-container { padding: 8px !important; }
}
"""
