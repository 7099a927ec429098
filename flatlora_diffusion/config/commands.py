"""Every setting of the programs beside `train`, once: default, bounds, help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flatlora_diffusion.config.model import ModelConfig
from flatlora_diffusion.config.optim import MixedPrecision
from flatlora_diffusion.config.run import SaveDtype
from flatlora_diffusion.config.setting import ConfigError, Section, setting

FileLayout = Literal["kohya", "diffusers"]
LoraLayout = Literal["kohya", "diffusers", "both"]
QUIET_VARIABLE = "FLATLORA_QUIET"  # in the environment of a program: it logs warnings alone

_LORA_FILE = "LoRA file in any layout, or the folder of a run"
_LORA_BASE = "diffusers folder of the base it is for, or `tiny`; default: SDXL, found by shapes"
_WHOLE_BASE = "SDXL base: a diffusers folder, a hub id, a single .safetensors checkpoint, or `tiny`"
_GUIDANCE = "classifier-free guidance; 1 or less is none"
_NEW_DTYPE = "precision of what is written; default: the old one's"
_OVERWRITE = "replace an earlier file or model that this verb has written; what it reads always stays"


@dataclass(frozen=True)
class GenerateConfig(Section):
    """All settings of `generate`: prompts x seeds x LoRAs x strengths."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: tuple[str, ...] = setting((), "what to draw; one or more")
    prompts_file: str | None = setting(None, "text file with one more prompt per line")
    negative_prompt: str | None = setting(None, "what to keep away from; default: SDXL's zero embeddings")
    seeds: tuple[int, ...] = setting((0,), "seeds of the first noise; one image each", min=0, max=2**63 - 1)
    lora: tuple[str, ...] = setting(
        (),
        "LoRA files or run folders, each compared with the base on its own; A+B uses two together, A@0.6+B@0.8 "
        "weighs them. Default: only the base",
    )
    strengths: tuple[float, ...] = setting(
        (1.0,), "strengths of each LoRA; the base (0) is always shown first", min=-100, max=100
    )
    merge: bool = setting(
        False, "add the LoRA to the weights instead of running it beside them; the same images up to rounding"
    )
    num_inference_steps: int = setting(25, "denoising steps", min=1, max=1000)
    guidance_scale: float = setting(5.0, _GUIDANCE, min=0, max=100)
    guidance_rescale: float | None = setting(
        None,
        "how far guidance is brought back to the prediction's std (arXiv:2305.08891); default: 0.7 for a base with "
        "zero terminal SNR, else 0",
        min=0,
        max=1,
    )
    resolution: int | None = setting(None, "image size in pixels; default: the base's own", min=8, max=4096)
    batch_size: int = setting(
        1,
        "images drawn at once; an image is the same in any batch up to rounding, bit for bit with 1",
        min=1,
        max=1024,
    )
    mixed_precision: MixedPrecision | None = setting(
        None, "compute precision; default: fp16 on a GPU, fp32 (no) on a CPU; the VAE is fp32, a mended one fp16"
    )
    output_dir: str = setting("generated", "each call makes a new numbered folder in here")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_filled(self, "seeds", "strengths")
        if self.negative_prompt is not None and self.guidance_scale <= 1:
            raise ConfigError(
                f"negative_prompt has no effect at guidance_scale={self.guidance_scale:g}; "
                "use more than 1 or leave it out"
            )
        if self.merge and self.model.quantize_base is not None:
            raise ConfigError("--merge needs full weights; leave --quantize_base or --merge out")


@dataclass(frozen=True)
class ImportConfig(Section):
    """All settings of `import`: a LoRA file of any layout to one for diffusers."""

    file: str = setting("", _LORA_FILE)
    output: str | None = setting(None, "file to write, or a folder; default: NAME_diffusers.safetensors beside it")
    dtype: SaveDtype | None = setting(None, _NEW_DTYPE)
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class ExportConfig(Section):
    """All settings of `export`: a LoRA file of any layout to the layouts that other programs read."""

    file: str = setting("", _LORA_FILE)
    layout: LoraLayout = setting("kohya", "kohya: for all web UIs; diffusers: for load_lora_weights; or both")
    dtype: SaveDtype | None = setting(None, _NEW_DTYPE)
    output: str | None = setting(
        None,
        "file to write, or a folder; default: NAME_kohya.safetensors, NAME_diffusers.safetensors beside the old one",
    )
    name: str | None = setting(None, "name of the LoRA in web UIs' prompts; default: as it was, or the file's")
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class MergeConfig(Section):
    """All settings of `merge`: a base with LoRAs added to its weights."""

    base: str = setting("", _WHOLE_BASE)
    lora: tuple[str, ...] = setting((), "LoRA files, each with its strength if not 1: FILE or FILE@0.8")
    output: str = setting("", "folder to write; with --single_file a .safetensors file")
    single_file: bool = setting(False, "write one checkpoint with the original names, for ComfyUI and other web UIs")
    single_file_config: str | None = setting(
        None, "for a single-file base: a diffusers folder whose configs and tokenizers are used, to work offline"
    )
    dtype: SaveDtype | None = setting(None, "precision of the result; default: the base's, for a hub id fp16")
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class ResizeConfig(Section):
    """All settings of `resize`: the best LoRA of a lower rank."""

    file: str = setting("", _LORA_FILE)
    rank: int = setting(4, "highest rank of a layer", min=1, max=1024)
    output: str | None = setting(None, "file to write, or a folder; default: NAME_rank4.safetensors beside it")
    dtype: SaveDtype | None = setting(None, _NEW_DTYPE)
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class AverageConfig(Section):
    """All settings of `average`: several LoRAs of one base as one."""

    loras: tuple[str, ...] = setting((), "LoRA files in any layout, or folders of runs; two or more of one base")
    output: str = setting("average.safetensors", "file to write")
    weights: tuple[float, ...] = setting(
        (), "weight of each LoRA, in their order; divided by their sum. Default: all alike", min=0, repeats=True
    )
    rank: int | None = setting(
        None, "cut each layer to this rank by SVD; default: the sum of the ranks, which is exact", min=1, max=1024
    )
    strength: float = setting(1.0, "multiply the average by this", min=1e-3, max=100)
    layout: FileLayout = setting("kohya", "kohya: for all web UIs; diffusers: for load_lora_weights")
    dtype: SaveDtype | None = setting(None, "precision of the file; default: that of the first LoRA")
    base: str | None = setting(None, _LORA_BASE)
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class ExtractConfig(Section):
    """All settings of `extract`: the difference of two models as a LoRA."""

    base: str = setting("", _WHOLE_BASE)
    tuned: str = setting("", "the model made from it, in one of these forms")
    rank: int = setting(32, "highest rank of a layer", min=1, max=1024)
    output: str = setting("extracted.safetensors", "file to write")
    layout: FileLayout = setting("kohya", "kohya: for all web UIs; diffusers: for load_lora_weights")
    dtype: SaveDtype = setting("fp16", "precision of the file")
    single_file_config: str | None = setting(
        None, "for single files: a diffusers folder whose configs and tokenizers are used, to work offline"
    )
    overwrite: bool = setting(False, _OVERWRITE)


@dataclass(frozen=True)
class InspectConfig(Section):
    """All settings of `inspect`: what is in a LoRA file, and which tools read it."""

    file: str = setting("", _LORA_FILE)
    json: bool = setting(False, "print JSON")
    base: str | None = setting(None, _LORA_BASE)


CAPTION_WRITERS = {"blip": "BlipForConditionalGeneration", "florence2": "Florence2ForConditionalGeneration"}
"""Models that write captions: transformers' class, by the kind that their config.json names."""


@dataclass(frozen=True)
class CaptionConfig(Section):
    """All settings of `caption`: captions for the images of a folder that have none."""

    folder: str = setting("", "folder of images; those without a caption get one, in NAME.txt beside them")
    captioner: str = setting(
        "",
        "folder or hub id of the model: a BLIP or a Florence-2 in transformers' format writes a sentence, a WD14 "
        "tagger (model.onnx with selected_tags.csv) tags",
    )
    trigger: str = setting("", "trigger word, put in front of tags and behind a sentence, `, in the style of TOK`")
    tag_threshold: float = setting(0.35, "how likely a tag has to be", min=0, max=1)
    character_threshold: float = setting(0.85, "how likely the tag of a character has to be", min=0, max=1)


@dataclass(frozen=True)
class DoctorConfig(Section):
    """All settings of `doctor`: for what this computer is looked at."""

    config: str | None = setting(None, "settings of a run, such as its config.json; default: those of the tiny base")
    encoders: tuple[str, ...] = setting(("judge",), "what `compare` is to measure with, as its own --encoders")
    gpu: bool = setting(
        False,
        "also train three steps on the GPU with random weights of SDXL's shapes, and check them; about 2 minutes",
    )
    port: int = setting(7860, "port that the app is to listen on", min=1, max=65535)


@dataclass(frozen=True)
class WorkersConfig(Section):
    """Where several trainings run at once."""

    workers: int | None = setting(
        None,
        "trainings at once, each in a process of its own: on this machine at most one for each CUDA device (default: "
        "1), or with --cluster as many as it has GPUs or, without any, cores",
        min=1,
        max=10_000,
    )
    cluster: str | None = setting(
        None,
        "train on a Ray cluster that shares these folders: its address, such as auto or ray://HOST:10001, or local "
        "for one on this machine; needs the extra `cluster`",
    )

    @property
    def trains_at_once(self) -> bool:
        return self.cluster is not None or (self.workers or 1) > 1


@dataclass(frozen=True)
class CompareConfig(WorkersConfig):
    """What `compare` has beside the settings of `train`, which all its arms share."""

    arms: tuple[str, ...] = setting(
        ("lora", "flat-lora"),
        "METHOD or METHOD:SETTING=VALUE,... such as flat-lora:perturb_noise=iid or lora:use_ema=true; the others are "
        "compared with the first",
    )
    num_seeds: int = setting(
        1, "runs of each arm, with --seed (0 if it is not given) and the numbers after it", min=1, max=1000
    )
    num_checkpoints: int = setting(4, "points along each run that are measured", min=1, max=100)
    heldout_dir: str | None = setting(
        None, "captioned images of the style that are not trained on; the sample icons have their own"
    )
    forgetting_dir: str | None = setting(
        None, "captioned images of what the base knew already; the sample icons have their own"
    )
    prompts_file: str | None = setting(
        None, "prompts in the style, one per line; default: prompts.txt or the captions of --heldout_dir"
    )
    unrelated_prompts_file: str | None = setting(
        None, "prompts that the LoRA should leave alone, one per line; default: eight that ship with this program"
    )
    num_prompts: int = setting(8, "prompts of each kind that are drawn", min=1, max=1000)
    pictures_per_prompt: int = setting(2, "seeds of each picture; diversity needs two", min=1, max=1000)
    guidance_scale: float = setting(5.0, _GUIDANCE, min=0, max=100)
    encoders: tuple[str, ...] = setting(
        ("judge",), "judge (icons only), or CLIP and DINOv2 models: folders or hub ids, for similarity and drift"
    )
    controls: bool = setting(
        True, "also train and measure controls, which differ from an arm by chance alone: sigma 0, other draws"
    )
    lpips: bool = setting(False, "LPIPS diversity too; needs the package lpips and AlexNet's weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("arms", "encoders"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one")


@dataclass(frozen=True)
class LandscapeConfig(Section):
    """What is measured around merged weights W', of any model: noise, slices and surface."""

    seed: int = setting(0, "seed of probe, noise and directions, which all runs share", min=0)
    sigmas: tuple[float, ...] = setting((0.05, 0.1, 0.2, 0.4), "relative radii of the noise", min=0, max=10)
    rise_draws: int = setting(4, "draws of the noise, each with both signs", min=2, max=1000)
    extent: float = setting(1.0, "slices and surface reach this far: 1 moves each row by its own length", min=1e-3)
    surface_points: int = setting(11, "points along each side, an odd number", min=3, max=201)
    slice_directions: int = setting(6, "random directions of the slices", min=2, max=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.surface_points % 2 == 0:
            raise ConfigError(
                f"surface_points={self.surface_points} must be odd, so that W' itself is in the middle; "
                f"{self.surface_points + 1} is"
            )
        _check_filled(self, "sigmas")


@dataclass(frozen=True)
class FlatnessConfig(LandscapeConfig):
    """All settings of `flatness`: how flat the loss is around the merged weights of finished runs."""

    runs: tuple[str, ...] = setting((), "folders of finished runs of one base and one set of images")
    pretrained_model_name_or_path: str | None = setting(None, "the base, if it is not where the runs found it")
    instance_data_dir: str | None = setting(None, "the training images, if they are not where the runs found them")
    heldout_dir: str | None = setting(
        None, "captioned images of the style that were not trained on: for what strength, bits and rank do to the loss"
    )
    second_lora: str | None = setting(None, "a LoRA file that is added to each run's, at strength 1")
    other_base: str | None = setting(None, "another checkpoint of the same architecture to put each run's LoRA on")
    output_dir: str = setting(
        "flatness", "folder for flatness.json, tables and pictures; an earlier result is replaced"
    )
    probe_draws: int = setting(1, "(noise, timestep) pairs for each image", min=1, max=64)
    probe_batch_size: int = setting(16, "samples of the probe at once; 1 saves memory", min=1, max=4096)
    radii: tuple[float, ...] = setting((0.001, 0.003, 0.01), "relative radii of the steepest steps", min=0, max=10)
    curvature: bool = setting(True, "eigenvalues and trace of the Hessian; needs several times the memory")
    eigenvalues: int = setting(3, "largest eigenvalues to report", min=1, max=100)
    lanczos_steps: int = setting(10, "Hessian-vector products for them", min=1, max=1000)
    trace_probes: int = setting(4, "Hessian-vector products for the trace", min=2, max=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_filled(self, "radii")


def _check_filled(section: Section, *names: str) -> None:
    for name in names:
        if not getattr(section, name):
            raise ConfigError(f"{name} is empty; give at least one value or leave it out")
