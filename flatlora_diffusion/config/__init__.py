"""The settings of all commands; command lines, config.json and the form of the app are generated from them.

Knows neither torch nor any model. Start with `setting.py` (the definition of a setting), then `train.py`, which names
the files of its sections.
"""

from flatlora_diffusion.config.adapter import (
    ADAPTERS as ADAPTERS,
    AdapterConfig as AdapterConfig,
    TokenConfig as TokenConfig,
)
from flatlora_diffusion.config.commands import (
    CAPTION_WRITERS as CAPTION_WRITERS,
    QUIET_VARIABLE as QUIET_VARIABLE,
    AverageConfig as AverageConfig,
    CaptionConfig as CaptionConfig,
    CompareConfig as CompareConfig,
    DemoConfig as DemoConfig,
    DoctorConfig as DoctorConfig,
    EvidenceConfig as EvidenceConfig,
    ExportConfig as ExportConfig,
    ExtractConfig as ExtractConfig,
    FileLayout as FileLayout,
    FlatnessConfig as FlatnessConfig,
    GenerateConfig as GenerateConfig,
    ImportConfig as ImportConfig,
    InspectConfig as InspectConfig,
    LandscapeConfig as LandscapeConfig,
    MergeConfig as MergeConfig,
    ResizeConfig as ResizeConfig,
    WorkersConfig as WorkersConfig,
)
from flatlora_diffusion.config.data import (
    DataConfig as DataConfig,
    Interpolation as Interpolation,
)
from flatlora_diffusion.config.methods import (
    DEFAULT_SIGMA as DEFAULT_SIGMA,
    METHODS as METHODS,
    for_method as for_method,
    method_settings as method_settings,
    methods_with as methods_with,
    settings_not_of as settings_not_of,
)
from flatlora_diffusion.config.model import (
    DENOISERS as DENOISERS,
    INCLUDED_BASES as INCLUDED_BASES,
    KLEIN as KLEIN,
    SDXL as SDXL,
    TEXT_PARTS as TEXT_PARTS,
    TINY as TINY,
    TINY_KLEIN as TINY_KLEIN,
    ModelConfig as ModelConfig,
    PredictionType as PredictionType,
    Quantization as Quantization,
)
from flatlora_diffusion.config.optim import (
    LossType as LossType,
    MixedPrecision as MixedPrecision,
    ObjectiveConfig as ObjectiveConfig,
    OptimConfig as OptimConfig,
    WeightingScheme as WeightingScheme,
)
from flatlora_diffusion.config.perturb import (
    DrawKind as DrawKind,
    NoiseKind as NoiseKind,
    PerturbConfig as PerturbConfig,
    PerturbPer as PerturbPer,
    SigmaSchedule as SigmaSchedule,
    check_unused_flags as check_unused_flags,
    cleared_by as cleared_by,
)
from flatlora_diffusion.config.removed import (
    removed_settings as removed_settings,
    why_removed as why_removed,
)
from flatlora_diffusion.config.run import (
    MembersConfig as MembersConfig,
    RunConfig as RunConfig,
    SaveDtype as SaveDtype,
)
from flatlora_diffusion.config.setting import (
    KIND_NAMES as KIND_NAMES,
    SAMPLES as SAMPLES,
    ConfigError as ConfigError,
    RunError as RunError,
    Section as Section,
    SettingError as SettingError,
    StoppedError as StoppedError,
    check_setting as check_setting,
    choices_of as choices_of,
    function_at as function_at,
    help_of as help_of,
    is_optional as is_optional,
    kind_of as kind_of,
    read_value as read_value,
    setting as setting,
    shipped as shipped,
)
from flatlora_diffusion.config.train import (
    TrainConfig as TrainConfig,
    preset_file as preset_file,
    preset_names as preset_names,
    read_setting as read_setting,
    setting_hints as setting_hints,
    settings_with as settings_with,
    with_legacy_defaults as with_legacy_defaults,
)
