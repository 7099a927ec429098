"""The 3D-Icons protocol of Bi-LoRA (arXiv:2508.19564v2, section 4.4, table 3 and appendices K and R.4).

`--preset bilora_icons --method bi-lora` trains the paper's own LoRA for it, `--method lora` its rival;
`docs/metrics.md` has the published scores, of one prompt form with six instances, 200 runs each, CLIP image-to-text
(I2T) and text-to-text (T2T) similarity in percent. The instances are those of figure A2; they are six, but the text
does not say that they are the six of the table. Not published, and so chosen here: which CLIP (the caller's), where
T2T's second text comes from (a caption of the image, by the caller's captioner), what a run is (one seed, six images)
and what ± is (the standard deviation over runs of the mean over the six). Scores with another CLIP or captioner are
not comparable with those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from PIL import Image

from flatlora_diffusion.evaluation.captioner import Captioner
from flatlora_diffusion.evaluation.encoders import Encoder
from flatlora_diffusion.evaluation.metrics import pair_cosines

INSTANCES = ("fluffy rabbit", "curly cloud", "roaring lion", "dripping water drop", "hopping frog", "smiling sun")
# The paper writes TOK and ToK by turns; SDXL's and CLIP's tokenizers read both in lower case.
PROMPTS = tuple(f"a TOK icon of a {instance}, in the style of TOK" for instance in INSTANCES)
RUNS = 200

Paint = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]  # one image per (prompt, seed)


def icon_scores(
    paint: Paint, encoder: Encoder, captioner: Captioner | None = None, runs: int = RUNS, first_seed: int = 0
) -> dict[str, float]:
    """`i2t` and, with a captioner, `t2t` in percent, each with `_std` over runs (missing for a single run).

    Run k paints the six prompts with seed `first_seed` + k, so that two LoRAs are compared at equal seeds. For SDXL,
    `paint` is `generate_images` with all but prompts and seeds filled in. Raises ConfigError for an encoder without
    text.
    """
    texts = encoder.embed_texts(PROMPTS)
    by_run: dict[str, list[float]] = {"i2t": [], "t2t": []}
    for run in range(runs):
        images = list(paint(PROMPTS, [first_seed + run] * len(PROMPTS)))
        by_run["i2t"].append(100 * float(pair_cosines(encoder.embed_images(images), texts).mean()))
        if captioner is not None:
            captions = encoder.embed_texts(captioner(images))
            by_run["t2t"].append(100 * float(pair_cosines(captions, texts).mean()))
    scores = {}
    for key, values in by_run.items():
        if values:
            scores[key] = fmean(values)
        if len(values) > 1:
            scores[f"{key}_std"] = stdev(values)
    return scores
