"""The settings of all commands except `train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flatlora_diffusion.config.model import TINY, ModelConfig
from flatlora_diffusion.config.optim import MixedPrecision
from flatlora_diffusion.config.run import SaveDtype
from flatlora_diffusion.config.setting import ConfigError, Section, setting

FileLayout = Literal["kohya", "diffusers"]
LoraLayout = Literal["kohya", "diffusers", "both"]
QUIET_VARIABLE = "FLATLORA_QUIET"  # environment variable: log warnings only

_LORA_FILE = "LoRA file in any format, or a run folder"
_LORA_BASE = "base model of the LoRA: diffusers folder, `tiny` or `tiny_klein`; default: detected by names and shapes"
_WHOLE_BASE = "base model: diffusers folder, hub id, single .safetensors checkpoint (SDXL), `tiny` or `tiny_klein`"
_GUIDANCE = "classifier-free guidance scale (CFG); 1 or less: no guidance; default: 5, FLUX.2 klein 4"
_NEW_DTYPE = "precision of the new file; default: that of the old file"
_OVERWRITE = "overwrite an earlier output of this command; input files are never overwritten"


@dataclass(frozen=True)
class GenerateConfig(Section):
    """The settings of `generate`: prompts x seeds x LoRAs x strengths."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: tuple[str, ...] = setting((), "prompts of the images")
    prompts_file: str | None = setting(None, "text file with more prompts, one per line")
    negative_prompt: str | None = setting(
        None, "negative prompt; default: zero embeddings, for FLUX.2 klein the empty prompt"
    )
    seeds: tuple[int, ...] = setting((0,), "seeds of the initial noise, one image per seed", min=0, max=2**63 - 1)
    lora: tuple[str, ...] = setting(
        (),
        "LoRA files or run folders, each compared with the base; A+B combines two LoRAs, A@0.6+B@0.8 with strengths; "
        "default: only the base",
    )
    strengths: tuple[float, ...] = setting(
        (1.0,), "strengths of each LoRA; the base (0) is always included", min=-100, max=100
    )
    merge: bool = setting(False, "merge the LoRA into the weights before generating; the same images up to rounding")
    num_inference_steps: int | None = setting(
        None, "denoising steps; default: 25, FLUX.2 klein 50, distilled 4", min=1, max=1000
    )
    guidance_scale: float | None = setting(None, _GUIDANCE, min=0, max=100)
    guidance_rescale: float | None = setting(
        None,
        "guidance rescale (arXiv:2305.08891); default: 0.7 for a base with zero terminal SNR, else 0",
        min=0,
        max=1,
    )
    resolution: int | None = setting(None, "image size in pixels; default: that of the base", min=8, max=4096)
    batch_size: int = setting(
        1,
        "images generated in parallel; results are equal up to rounding, bit for bit with 1",
        min=1,
        max=1024,
    )
    mixed_precision: MixedPrecision | None = setting(
        None,
        "compute precision; default: fp16 on GPU, bf16 for FLUX.2 klein, fp32 (no) on CPU; the VAE runs in fp32, with "
        "the fp16 fix in fp16",
    )
    output_dir: str = setting("generated", "output folder; each call creates a new numbered folder in it")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_empty(self, "seeds", "strengths")
        if self.negative_prompt is not None and self.guidance_scale is not None and self.guidance_scale <= 1:
            raise ConfigError(
                f"negative_prompt has no effect at guidance_scale={self.guidance_scale:g}; use more than 1 or remove "
                "it"
            )
        if self.merge and self.model.quantize_base is not None:
            raise ConfigError("--merge cannot change weights of --quantize_base; remove one of them")


@dataclass(frozen=True)
class ImportConfig(Section):
    """The settings of `import`: convert a LoRA file of any format to diffusers' format."""

    file: str = setting("", _LORA_FILE)
    output: str | None = setting(None, "output file or folder; default: NAME_diffusers.safetensors in the same folder")
    dtype: SaveDtype | None = setting(None, _NEW_DTYPE)
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class ExportConfig(Section):
    """The settings of `export`: convert a LoRA file to the formats of other tools."""

    file: str = setting("", _LORA_FILE)
    layout: LoraLayout = setting("kohya", "file format: kohya (web UIs), diffusers (load_lora_weights) or both")
    dtype: SaveDtype | None = setting(None, _NEW_DTYPE)
    output: str | None = setting(
        None,
        "output file or folder; default: NAME_kohya.safetensors, NAME_diffusers.safetensors in the same folder",
    )
    name: str | None = setting(None, "name of the LoRA in prompts of web UIs; default: its old name, or the file name")
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class MergeConfig(Section):
    """The settings of `merge`: merge LoRAs into a base model."""

    base: str = setting("", _WHOLE_BASE)
    lora: tuple[str, ...] = setting((), "LoRA files with optional strength: FILE or FILE@0.8")
    output: str = setting("", "output folder, or .safetensors file with --single_file")
    single_file: bool = setting(False, "save a single checkpoint file for ComfyUI and other web UIs")
    single_file_config: str | None = setting(
        None, "diffusers folder with configs and tokenizers for a single-file base, to work offline"
    )
    dtype: SaveDtype | None = setting(None, "precision of the result; default: that of the base, fp16 for a hub id")
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class ResizeConfig(Section):
    """The settings of `resize`: reduce the rank of a LoRA by SVD."""

    file: str = setting("", _LORA_FILE)
    rank: int = setting(4, "maximum rank of a layer", min=1, max=1024)
    output: str | None = setting(None, "output file or folder; default: NAME_rank4.safetensors in the same folder")
    dtype: SaveDtype | None = setting(None, _NEW_DTYPE)
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class AverageConfig(Section):
    """The settings of `average`: average several LoRAs of the same base."""

    loras: tuple[str, ...] = setting((), "two or more LoRA files or run folders of the same base")
    output: str = setting("average.safetensors", "output file")
    weights: tuple[float, ...] = setting(
        (), "weight of each LoRA in order, normalized to a sum of 1; default: equal weights", min=0, may_repeat=True
    )
    rank: int | None = setting(
        None, "reduce each layer to this rank by SVD; default: the sum of the ranks, which is exact", min=1, max=1024
    )
    strength: float = setting(1.0, "strength: factor of the average", min=1e-3, max=100)
    layout: FileLayout = setting("kohya", "file format: kohya (web UIs) or diffusers (load_lora_weights)")
    dtype: SaveDtype | None = setting(None, "precision of the output file; default: that of the first LoRA")
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class ExtractConfig(Section):
    """The settings of `extract`: a LoRA from the difference of two models."""

    base: str = setting("", _WHOLE_BASE)
    tuned: str = setting("", "fine-tuned model of that base, in the same formats")
    rank: int = setting(32, "maximum rank of a layer", min=1, max=1024)
    output: str = setting("extracted.safetensors", "output file")
    layout: FileLayout = setting("kohya", "file format: kohya (web UIs) or diffusers (load_lora_weights)")
    dtype: SaveDtype = setting("fp16", "precision of the output file")
    single_file_config: str | None = setting(
        None, "diffusers folder with configs and tokenizers for single-file models, to work offline"
    )
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class InspectConfig(Section):
    """The settings of `inspect`: the contents of a LoRA file and the tools that support it."""

    file: str = setting("", _LORA_FILE)
    json: bool = setting(False, "print JSON")
    base: str | None = setting(None, _LORA_BASE)


CAPTION_WRITERS = {"blip": "BlipForConditionalGeneration", "florence2": "Florence2ForConditionalGeneration"}
"""Class in transformers of each captioning model, by the `model_type` of its config.json."""


@dataclass(frozen=True)
class CaptionConfig(Section):
    """The settings of `caption`: caption the images of a folder."""

    folder: str = setting("", "folder of images; captions of images without one are saved as NAME.txt")
    captioner: str = setting(
        "",
        "captioning model, folder or hub id: BLIP or Florence-2 (transformers) for sentences, a WD14 tagger "
        "(model.onnx and selected_tags.csv) for tags",
    )
    trigger: str = setting("", "trigger word, added before tags or after a sentence as `, in the style of TOK`")
    tag_threshold: float = setting(0.35, "minimum probability of a tag", min=0, max=1)
    character_threshold: float = setting(0.85, "minimum probability of a character tag", min=0, max=1)


@dataclass(frozen=True)
class DoctorConfig(Section):
    """The settings of `doctor`: what to check the installation for."""

    config: str | None = setting(None, "config file of a planned run; default: a run on the tiny base")
    encoders: tuple[str, ...] = setting(("judge",), "encoders of a planned `compare`, as its --encoders")
    gpu: bool = setting(
        False,
        "also train and check three steps on the GPU with a random SDXL-sized model; about 2 minutes",
    )
    port: int = setting(7860, "port of the app", min=1, max=65535)


@dataclass(frozen=True)
class WorkersConfig(Section):
    """Parallel training."""

    workers: int | None = setting(
        None,
        "number of parallel training processes: at most one per CUDA device (default: 1); with --cluster default: its "
        "number of GPUs or else CPU cores",
        min=1,
        max=10_000,
    )
    cluster: str | None = setting(
        None,
        "address of a Ray cluster with access to the same folders, such as auto, ray://HOST:10001, or local for this "
        "machine; needs the extra `cluster`",
    )

    @property
    def trains_at_once(self) -> bool:
        """Whether several training processes run in parallel."""
        return self.cluster is not None or (self.workers or 1) > 1


@dataclass(frozen=True)
class CompareConfig(WorkersConfig):
    """The settings of `compare` in addition to those of `train`."""

    arms: tuple[str, ...] = setting(
        ("lora", "flat-lora"),
        "arms to compare: METHOD or METHOD:SETTING=VALUE,... such as flat-lora:perturb_noise=iid or "
        "lora:use_ema=true; the first is the baseline",
    )
    num_seeds: int = setting(1, "runs per arm, with consecutive seeds from --seed (default: 0)", min=1, max=1000)
    num_checkpoints: int = setting(4, "number of checkpoints to measure per run", min=1, max=100)
    heldout_dir: str | None = setting(
        None, "folder of held-out captioned images of the style; default: that of the sample icons"
    )
    forgetting_dir: str | None = setting(
        None, "folder of captioned images known to the base, to measure forgetting; default: that of the sample icons"
    )
    prompts_file: str | None = setting(
        None, "file with prompts in the style, one per line; default: prompts.txt or captions of --heldout_dir"
    )
    unrelated_prompts_file: str | None = setting(
        None, "file with prompts that the LoRA should not affect, one per line; default: eight included prompts"
    )
    num_prompts: int = setting(8, "number of prompts of each kind", min=1, max=1000)
    pictures_per_prompt: int = setting(2, "images per prompt; diversity needs at least two", min=1, max=1000)
    guidance_scale: float | None = setting(None, _GUIDANCE, min=0, max=100)
    encoders: tuple[str, ...] = setting(
        ("judge",),
        "encoders for similarity and drift: judge (icons only), or folders or hub ids of CLIP and DINOv2 models",
    )
    controls: bool = setting(
        True, "also train controls, which differ from an arm by chance only: sigma 0, other seeds of the noise"
    )
    lpips: bool = setting(False, "measure LPIPS diversity; needs the package lpips and the weights of AlexNet")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("arms", "encoders"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one value")


@dataclass(frozen=True)
class DemoConfig(CompareConfig):
    """The settings of `demo` in addition to those of `compare`."""

    base: Literal["tiny", "tiny_klein"] = setting(TINY, "included base: tiny, an SDXL, or tiny_klein, a FLUX.2 klein")


@dataclass(frozen=True)
class EvidenceConfig(CompareConfig):
    """The settings of `evidence` in addition to those of `compare`."""

    gpu: Literal["t4"] | None = setting(
        None, "t4: compute in fp16 and move unused models off the GPU; default: t4 on a GPU without bf16"
    )
    hours: float | None = setting(
        None, "start no further part that would not end within this many hours; default: all parts", min=0.1, max=1000
    )
    rehearse: bool = setting(
        False, "print the estimated GPU memory, CPU memory and disk space of each phase, and exit; needs no GPU"
    )
    check: str | None = setting(
        None, "check an evidence.json, print its row for the table of reports, and exit; needs no GPU"
    )


@dataclass(frozen=True)
class LandscapeConfig(Section):
    """The settings of the loss landscape around merged weights W': noise, slices and surface."""

    seed: int = setting(0, "seed of samples, noise and directions, equal for all runs", min=0)
    sigmas: tuple[float, ...] = setting(
        (0.05, 0.1, 0.2, 0.4), "noise strengths, relative to the row norms", min=0, max=10
    )
    rise_draws: int = setting(4, "noise samples per strength, each with both signs", min=2, max=1000)
    extent: float = setting(1.0, "range of slices and surface, relative to the row norms", min=1e-3)
    surface_points: int = setting(11, "points per axis of the surface, an odd number", min=3, max=201)
    slice_directions: int = setting(6, "number of random directions of the slices", min=2, max=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.surface_points % 2 == 0:
            raise ConfigError(
                f"surface_points={self.surface_points} must be odd, so that W' is in the middle; use "
                f"{self.surface_points + 1}"
            )
        _check_not_empty(self, "sigmas")


@dataclass(frozen=True)
class FlatnessConfig(LandscapeConfig):
    """The settings of `flatness`: the flatness of the loss around the merged weights of finished runs."""

    runs: tuple[str, ...] = setting((), "folders of finished runs with the same base and images")
    pretrained_model_name_or_path: str | None = setting(None, "base model, if it was moved since the runs")
    instance_data_dir: str | None = setting(None, "training images, if they were moved since the runs")
    heldout_dir: str | None = setting(
        None, "folder of held-out captioned images, for the effect of strength, precision and rank on the loss"
    )
    second_lora: str | None = setting(None, "LoRA file to combine with that of each run, at strength 1")
    other_base: str | None = setting(None, "another base of the same architecture, to measure the LoRAs on")
    output_dir: str = setting(
        "flatness", "output folder of flatness.json, tables and figures; an earlier result is replaced"
    )
    probe_draws: int = setting(1, "(noise, timestep) samples per image", min=1, max=64)
    probe_batch_size: int = setting(16, "batch size; 1 saves memory", min=1, max=4096)
    radii: tuple[float, ...] = setting(
        (0.001, 0.003, 0.01), "relative radii of the steps along the gradient", min=0, max=10
    )
    curvature: bool = setting(True, "compute eigenvalues and trace of the Hessian; needs several times the memory")
    eigenvalues: int = setting(3, "number of largest eigenvalues", min=1, max=100)
    lanczos_steps: int = setting(10, "Lanczos steps (Hessian-vector products) for the eigenvalues", min=1, max=1000)
    trace_probes: int = setting(4, "random probes (Hessian-vector products) for the trace", min=2, max=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_empty(self, "radii")


def _check_not_empty(section: Section, *names: str) -> None:
    for name in names:
        if not getattr(section, name):
            raise ConfigError(f"{name} is empty; give at least one value or remove it")
