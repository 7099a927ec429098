"""The page of a comparison: what it holds and leaves out, that it needs no network, and how a browser shows it."""

from __future__ import annotations

import base64
import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_comparison import PROMPTS, made_up_comparison, with_one_seed, with_pictures
from patience import PATIENCE
from PIL import Image

from flatlora_diffusion.charts.palette import TONES
from flatlora_diffusion.compare.page.page import compare_page, write_compare_page

SECTIONS = {
    "numbers",
    "differences",
    "trajectories",
    "strengths",
    "concepts",
    "images",
    "advice",
    "controls",
    "proof",
    "settings",
    "versions",
}
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The elements of a page, with whatever is not closed, and the text of each section ("" before the first one)."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, str] = {"": ""}
        self.open: list[str] = []
        self._section = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = found["id"]
            self.text[self._section] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text[self._section] += f"{data} "

    def all_of(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [found for name, found in self.elements if name == tag and kind in found.get("class", "")]


def written(result: dict[str, Any], folder: Path) -> Page:
    page = Page(write_compare_page(result, folder).read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up comparison with its pictures and its page; not to be changed."""
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return with_pictures(made_up_comparison(), folder)


@pytest.fixture(scope="module")
def page(result: dict[str, Any], folder: Path) -> Page:
    return written(result, folder)


@pytest.fixture(scope="module")
def markup(page: Page, folder: Path) -> str:
    return (folder / "compare.html").read_text(encoding="utf-8")


def test_a_framed_page_has_no_script_and_its_links_stay_in_the_frame(
    result: dict[str, Any], folder: Path, page: Page
) -> None:
    framed = Page(compare_page(result, folder, is_framed=True))
    assert framed.open == []
    assert not framed.all_of("script")
    assert not framed.all_of("dialog")
    links = [link["href"] for link in framed.all_of("a")]
    assert links
    assert all(link.startswith("about:srcdoc#") for link in links)
    assert [link["href"].replace("#", "about:srcdoc#", 1) for link in page.all_of("a")] == links
    assert len(framed.all_of("img")) == len(page.all_of("img")) > 0


def lean(result: dict[str, Any]) -> dict[str, Any]:
    """`result` with every section, but of two metrics alone: most of a page's time goes into its charts."""
    kept = ("heldout_loss", "diversity")
    metrics = [metric for metric in result["metrics"] if metric["key"] in kept]
    return {**result, "metrics": metrics, "paired": [pair for pair in result["paired"] if pair["metric"] in kept]}


def empty(result: dict[str, Any]) -> dict[str, Any]:
    return {key: type(value)() if isinstance(value, list | dict) else value for key, value in result.items()}


def test_first_screen_has_verdict_interval_and_pictures(page: Page) -> None:
    top = page.text[""]
    assert made_up_comparison()["verdict"] in " ".join(top.split())
    assert "\N{MINUS SIGN}0.00313 [\N{MINUS SIGN}0.00380, \N{MINUS SIGN}0.00246]" in top
    assert "3 of 3 checks of equal conditions hold" in top
    assert all(prompt in top for prompt in PROMPTS)
    assert [found["data-arm"] for found in page.all_of("img")] == ["Base", "LoRA", "Flat-LoRA"] * len(PROMPTS)
    assert [found["href"] for found in page.all_of("a")[-len(SECTIONS) :]] == [
        f"#{found['id']}" for found in page.all_of("section")
    ]


def test_pictures_are_embedded_byte_for_byte(page: Page, result: dict[str, Any], folder: Path) -> None:
    by_prompt = [name for names in zip(*result["pictures"]["files"], strict=True) for name in names]
    for found, name in zip(page.all_of("img"), by_prompt, strict=True):
        kind, data = found["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / name).read_bytes()


def test_a_large_picture_is_embedded_smaller(tmp_path: Path) -> None:
    result = with_pictures(lean(made_up_comparison()), tmp_path)
    large = tmp_path / result["pictures"]["files"][0][0]
    Image.effect_noise((1024, 1024), 64).convert("RGB").save(large)
    kind, data = written(result, tmp_path).all_of("img")[0]["src"].split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1024, 1024)
    assert len(data) < large.stat().st_size


def test_further_prompts_are_folded_and_all_there(tmp_path: Path) -> None:
    result = with_pictures(lean(made_up_comparison()), tmp_path)
    shown = result["pictures"]
    shown |= {"prompts": PROMPTS * 2, "files": [names * 2 for names in shown["files"]]}
    page = written(result, tmp_path)
    assert "4 more prompts" in page.text[""]
    assert len(page.all_of("div", "prompt")) == 12


def test_a_picture_that_is_not_in_the_folder_leaves_a_gap(tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    folder.mkdir()
    result = with_pictures(lean(made_up_comparison()), folder)
    (tmp_path / "secret.png").write_bytes(b"not of this comparison")
    result["pictures"]["files"][0][:3] = ["gone.png", "../secret.png", None]
    page = written(result, folder)
    assert len(page.all_of("span", "gone")) == 3
    assert len(page.all_of("img")) == 3 * len(PROMPTS) - 3


def test_every_section_shows_its_values(page: Page) -> None:
    minus = "\N{MINUS SIGN}"
    expected = {
        "numbers": ["0.18344", "0.15022", "± 0.00076", f"{minus}0.00313", f"[{minus}0.00380, {minus}0.00246]"],
        "differences": [
            "equal unperturbed loss",
            "equal training time",
            "no difference found",
            "exactly equal",
            "3 seeds; detectable: 0.00088",
            "Of 10 such intervals about 0.5",
        ],
        "trajectories": ["held-out loss, lower is better", "drift", "seconds of training", "no difference"],
        "strengths": ["strength of the LoRA", "diversity, higher is better"],
        "concepts": ["animals", "0.18400", f"{minus}0.00313"],
        "images": ["a 3D icon of a taxi", "0.0649", f"{minus}10 %", "learned least", "looks like fox", "+31 %"],
        "advice": ["step 400", "over-fitted", "not over-fitted", "0.80", "Held-out loss was lowest at step 600."],
        "controls": ["0.0412", "Must be equal to LoRA bit for bit; it is."],
        "proof": ["✓ holds", "9f2c41d07a55", "LoRA, seed 42 · LoRA, seed 43", "One base for all runs."],
        "settings": ["sigma 0", "max_train_steps", "600", "center_crop", "no", "42, 43, 44"],
        "versions": ["NVIDIA H100", "torch", "2.13.0"],
    }
    assert expected.keys() == SECTIONS
    for section, texts in expected.items():
        for text in texts:
            assert text in page.text[section], (section, text)
    assert "9f2c41d07a55e6b3" * 4 in [found.get("title") for found in page.all_of("code")]


def test_every_seed_is_a_line_and_the_mean_another(markup: str) -> None:
    run = markup[markup.index('id="trajectories"') : markup.index('id="strengths"')]
    first = run[run.index("<svg class=") :].split('<svg class="chart"')[1]
    assert first.count('class="seed"') == 6
    assert first.count('class="mean"') == 3  # the base and the means of two arms


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    page = written(with_one_seed(made_up_comparison()), tmp_path)
    assert "of one seed, so without an interval" in page.text[""]
    assert "one seed: no interval" in page.text["differences"]
    assert "±" not in page.text["numbers"]
    assert "[" not in page.text["numbers"] + page.text["differences"]


def test_seeds_that_differ_by_as_much_have_no_interval(tmp_path: Path) -> None:
    result = lean(made_up_comparison())
    for pair in result["paired"]:
        first, n = pair["differences"][0], pair["n"]
        pair |= {"differences": [first] * n, "mean": first, "low": None, "high": None, "detectable": None}
    page = written(result, tmp_path)
    assert "with each seed, so without an interval" in page.text[""]
    assert "all seeds equal: no interval" in page.text["differences"]
    assert "detectable:" not in page.text["differences"]


def test_images_are_listed_least_learned_first_with_thumbnails_from_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    folder.mkdir()
    result = lean(made_up_comparison())
    Image.new("RGB", (8, 8), "red").save(folder / "fox.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "owl.png")
    result["by_image"]["images"][1]["file"] = "../owl.png"
    page = written(result, folder)
    text = page.text["images"]
    assert text.index("a 3D icon of a taxi") < text.index("a 3D icon of a fox") < text.index("looks like fox")
    said = " ".join(text.split())
    assert ("Learned least: owl" in said, "Check the caption: owl" in said) == (True, True)
    (thumbnail,) = page.all_of("img")
    assert base64.b64decode(thumbnail["src"].split(",")[1]) == (folder / "fox.png").read_bytes()
    assert text.count("check the caption") == 1
    assert len(page.all_of("svg", "spark")) == 5, "LoRA has not measured fox-2"


def test_a_comparison_of_an_earlier_version_has_no_images(tmp_path: Path) -> None:
    result = lean(made_up_comparison())
    del result["by_image"]
    assert SECTIONS - written(result, tmp_path).text.keys() == {"images"}


@pytest.mark.parametrize(
    ("keys", "gone"),
    [
        ("paired strengths groups nulls versions", {"differences", "strengths", "concepts", "controls", "versions"}),
        ("trajectories by_image advice proof", {"trajectories", "images", "advice", "proof"}),
        ("metrics", {"numbers", "differences", "strengths"}),
        ("base pictures", set()),
        ("values", set()),
    ],
)
def test_empty_sections_are_not_shown(keys: str, gone: set[str], tmp_path: Path) -> None:
    result = lean(made_up_comparison())
    for key in keys.split():
        result[key] = type(result[key])()
    page = written(result, tmp_path)
    assert SECTIONS - page.text.keys() == gone
    assert {found["href"] for found in page.all_of("a")} >= {f"#{anchor}" for anchor in SECTIONS - gone}


def test_nothing_but_a_verdict_is_a_page(tmp_path: Path) -> None:
    page = written(empty(made_up_comparison()), tmp_path)
    assert page.all_of("section") == []
    assert made_up_comparison()["verdict"] in " ".join(page.text[""].split())


def test_one_arm_alone_has_no_differences(tmp_path: Path) -> None:
    result = made_up_comparison()
    result |= {"arms": result["arms"][:1], "paired": []}
    for part in ("values", "trajectories", "strengths"):
        result[part] = {"lora": result[part]["lora"]}
    page = written(result, tmp_path)
    assert SECTIONS - page.text.keys() == {"differences"}
    assert page.all_of("figure", "headline") == []
    assert "0.15022" in page.text["numbers"]


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    result = made_up_comparison()
    for figures in result["values"]["lora"].values():
        figures["diversity"] = None
        del figures["memorization"]
    result["values"]["flat-lora"]["42"]["diversity"] = float("nan")
    result["groups"]["food"] |= {"base": None, "values": {"lora": {}, "flat-lora": {"42": None}}}
    result["trajectories"]["lora"]["42"] = [{"step": 100}, {"step": 200, "heldout_loss": None}]
    result["advice"][0] |= {"checkpoint": None, "strength": None}
    page = written(result, tmp_path)
    assert "nan" not in page.text["numbers"].split()
    assert "\N{EN DASH}" in page.text["numbers"]
    assert "food" not in page.text["concepts"]
    assert "None" not in "".join(page.text.values())


def test_a_failed_proof_is_a_warning_on_the_first_screen(page: Page, tmp_path: Path) -> None:
    assert page.all_of("p", "warning") == []
    result = lean(made_up_comparison())
    result["proof"][2] |= {"holds": False, "note": "LoRA, seed 43 saw other images at step 17"}
    result["proof"][2]["hashes"]["LoRA, seed 43"] = "0" * 64
    failed = written(result, tmp_path)
    assert [found["role"] for found in failed.all_of("p", "warning")] == ["alert"]
    assert "These runs are not a fair comparison." in failed.text[""]
    assert "draws of every step, seed 42: LoRA, seed 43 saw other images at step 17" in failed.text[""]
    assert "hold" not in failed.text[""].replace("held-out", "")
    assert failed.text["proof"].count("✗ fails") == 1
    assert "000000000000" in failed.text["proof"]


ATTACK = "\"'><script>alert(1)</script><img src=http://evil.example onerror=alert(1)>&amp;"


def hostile(value: Any) -> Any:
    """`value` with a script, an attribute and a tag added to every text and name, but for what the page reads."""
    if isinstance(value, str):
        return value + ATTACK
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        kept = ("key", "arm", "against", "metric", "matched", "role", "better", "files")
        return {key: copy.deepcopy(item) if key in kept else hostile(item) for key, item in value.items()}
    return value


def test_all_text_is_escaped(tmp_path: Path) -> None:
    result = with_pictures(made_up_comparison(), tmp_path)
    result |= {
        part: {f"{key}<script>": value for key, value in result[part].items()} for part in ("settings", "groups")
    }
    result["values"]["lora"]["<script>"] = result["values"]["lora"].pop("42")
    result["arms"][2]["key"] = "<script>"
    result["proof"][0]["hashes"] = {"<script>": "<script>"}
    result["paired"][0]["matched"] = "<script>"
    page = written(hostile(result), tmp_path)
    assert len(page.all_of("script")) == 1
    assert len(page.all_of("img")) == 3 * len(PROMPTS)
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    for said in (made_up_comparison()["verdict"].split(": ")[-1], result["device"], *PROMPTS, "LoRA", "Flat-LoRA"):
        assert said + ATTACK in page.text[""]
    assert f"LoRA{ATTACK}: {PROMPTS[0]}{ATTACK}" in [found["alt"] for found in page.all_of("img")]
    assert f"Flat-LoRA{ATTACK}: 0.1454 at 600" in page.text["trajectories"], "the words of a mark in a chart"
    labels = [found["aria-label"] for found in page.all_of("svg", "chart")]
    assert f"held-out loss{ATTACK}, Flat-LoRA{ATTACK} \N{MINUS SIGN} LoRA{ATTACK} against step" in labels


def test_nothing_is_fetched(page: Page, markup: str, folder: Path) -> None:
    links = [found[name] for _, found in page.elements for name in ("src", "href") if name in found]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    policy = next(found["content"] for found in page.all_of("meta") if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not any(word in markup for word in ("http:", "https:", "url(", "@import", str(folder)))


def test_charts_have_tooltips_and_labels_and_share_no_id(page: Page) -> None:
    minus = "\N{MINUS SIGN}"
    assert f"seed 43: {minus}0.00287" in page.text["differences"]
    assert "Flat-LoRA: 0.1454 at 600" in page.text["trajectories"]
    labels = [found["aria-label"] for found in page.all_of("svg", "chart")]
    assert labels[0] == "held-out loss, lower is better against step"
    assert len(set(labels)) == len(labels)
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(set(ids)) == len(ids)


def test_charts_have_the_colours_of_the_page_in_light_and_dark(markup: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", markup, re.DOTALL))
    assert re.findall("#[0-9a-f]{6}", charts) == []
    used = set(re.findall(r"var\(--([a-z]+)\)", charts))
    assert {"base", "lora", "flat", "ink", "faint", "rule", "paper"} <= used
    for name in used:
        assert f"--{name}: {TONES[name].light};" in markup
        assert f"--{name}: {TONES[name].dark};" in markup


@pytest.mark.usefixtures("page")
def test_a_browser_shows_it(chromium: Any, folder: Path) -> None:
    path = folder / "compare.html"
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(PATIENCE)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    for seen in (".verdict", ".headline svg.row", ".prompt img >> nth=0", ".prompt img >> nth=-1"):
        box = page.locator(seen).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 800, seen
    page.locator(".prompt img").nth(4).click()
    dialog = page.locator("dialog[open]")
    assert dialog.locator("figcaption").all_text_contents() == ["Base", "LoRA", "Flat-LoRA"]
    assert dialog.locator("p").text_content() == PROMPTS[1]
    page.keyboard.press("ArrowRight")
    assert dialog.locator("p").text_content() == PROMPTS[2]
    page.keyboard.press("Escape")
    assert dialog.count() == 0
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    for width in (390, 761, 961, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        wide, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide <= room, width
    assert complaints == []
    page.close()
