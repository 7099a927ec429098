"""The app's look: own colours, light and dark, the system's own fonts, so that nothing comes from the network."""

from __future__ import annotations

import gradio as gr

from flatlora_diffusion.charts.palette import BASE, METHODS, THIRD, TONES
from flatlora_diffusion.config import METHOD_NAMES

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

# A colour for each method, then its lighter and darker kin for more runs of the same method in one chart. They are
# variables of the page, which are others on dark paper.
SHADES = {
    title: tuple(f"var(--{name})" for name in METHODS.get(method, THIRD).tones)
    for method, title in METHOD_NAMES.items()
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

# Gradio moves rules of a media query below `.contain`, so what is outside of that is written without one.
CSS = """
.gradio-container { width: 100%; max-width: min(1760px, 100%) !important; min-width: 0; margin: 0 auto !important; }
.gradio-container > *, .gradio-container main { min-width: 0; max-width: 100%; }
.gradio-container > .main { padding: 12px clamp(6px, 2.5vw, 32px) !important; }
.tabs, .tabitem, .row, .column, .form { min-width: 0; max-width: 100%; }
footer { display: none !important; }
.gradio-container { LIGHT --fl-danger: #b42318; --fl-on-danger: white; --fl-edge: #8f8a85; --fl-focus: #2f6fde; }
.dark .gradio-container, .gradio-container.dark { DARK --fl-danger: #ff8a7a; --fl-on-danger: #171412;
  --fl-edge: #8f8a85; --fl-focus: #8db4ff; --color-accent: #f0915c; }
button.stop:hover { color: var(--fl-on-danger) !important; border-color: var(--fl-danger) !important; }
button:focus-visible, a:focus-visible, summary:focus-visible, [role=tab]:focus-visible, textarea:focus-visible,
input:focus-visible, select:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--fl-focus) !important; outline-offset: 2px; }
label:has(> input[type=radio]:focus-visible), label:has(> input[type=checkbox]:focus-visible) {
  outline: 3px solid var(--fl-focus); outline-offset: 2px; }
.fl-title h1 { margin: 0; } .fl-title p { margin: .2rem 0 0; color: var(--body-text-color-subdued); }
.html-container { padding: 0 !important; }
.block:has(> .html-container > .gradio-style:empty) { display: none; }
.fl-card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px 16px;
  background: var(--block-background-fill); color: var(--body-text-color); overflow-wrap: anywhere; }
.fl-card + .fl-card { margin-top: 10px; }
.fl-card b { font-weight: 600; }
.fl-card ul { margin: 6px 0 0; padding-left: 1.2em; list-style: disc; }
.fl-answer { border-left: 5px solid #b84a16; padding: 4px 0 4px 16px; margin: 4px 0 12px;
  color: var(--body-text-color); }
.fl-answer p { margin: 0; max-width: 75ch; } .fl-answer b { font-size: 1.2rem; line-height: 1.35; font-weight: 600; }
.fl-answer p + p { margin-top: 4px; }
.fl-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; }
.fl-track { height: 10px; border-radius: 5px; background: var(--border-color-primary); margin: 8px 0 4px;
  overflow: hidden; }
.fl-fill { height: 100%; }
.fl-faint { color: var(--body-text-color-subdued); font-size: .9em; }
.fl-bad { color: #b42318; } .dark .fl-bad { color: #ff8a7a; }
.fl-card pre { white-space: pre-wrap; max-height: 14em; overflow: auto; font-size: .8em; margin: 8px 0 0; }
.table-wrap { max-width: 100%; overflow-x: auto; }
.table-wrap th, .table-wrap td { border-color: var(--border-color-primary) !important; }
#more-methods { background: var(--block-background-fill); border: 0; padding: 0 12px 10px; text-align: left;
  justify-content: flex-start; color: var(--body-text-color); text-decoration: underline; }
#method label:nth-of-type(n+4) { width: 100%; }
#method:not(.fl-all) label:nth-of-type(n+4):not(:has(input:checked)) { display: none; }
#log textarea { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .8rem; line-height: 1.45; }
@media (max-width: 640px) {
  .tab-container button { padding: 0 5px; font-size: 13px; }
}
""".replace("LIGHT", _LIGHT).replace("DARK", _DARK)

# In the head, where a media query holds for all of the page.
HEAD = """<style>
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after { animation-duration: .01ms !important; animation-iteration-count: 1 !important;
    transition-duration: .01ms !important; scroll-behavior: auto !important; }
}
</style>"""
