"""Every setting, once: the command lines, config.json and the app's form are all made from here.

Knows neither torch nor any model. Start with `section.py` (what a setting is), then `training.py`, which names the
files of its sections.
"""

from flatlora_diffusion.config.adapter import (
    AdapterConfig as AdapterConfig,
)
from flatlora_diffusion.config.adapter import (
    AdapterKind as AdapterKind,
)
from flatlora_diffusion.config.adapter import (
    TokenConfig as TokenConfig,
)
from flatlora_diffusion.config.combinations import (
    LINEAR_ONLY as LINEAR_ONLY,
)
from flatlora_diffusion.config.data import (
    DataConfig as DataConfig,
)
from flatlora_diffusion.config.data import (
    Interpolation as Interpolation,
)
from flatlora_diffusion.config.data import (
    Precision as Precision,
)
from flatlora_diffusion.config.methods import (
    DEFAULT_SIGMA as DEFAULT_SIGMA,
)
from flatlora_diffusion.config.methods import (
    METHOD_NAMES as METHOD_NAMES,
)
from flatlora_diffusion.config.methods import (
    METHODS_WITH as METHODS_WITH,
)
from flatlora_diffusion.config.methods import (
    OF_METHODS as OF_METHODS,
)
from flatlora_diffusion.config.methods import (
    DrawKind as DrawKind,
)
from flatlora_diffusion.config.methods import (
    Method as Method,
)
from flatlora_diffusion.config.methods import (
    NoiseKind as NoiseKind,
)
from flatlora_diffusion.config.methods import (
    PerturbConfig as PerturbConfig,
)
from flatlora_diffusion.config.methods import (
    PerturbPer as PerturbPer,
)
from flatlora_diffusion.config.methods import (
    SigmaSchedule as SigmaSchedule,
)
from flatlora_diffusion.config.methods import (
    unused_by as unused_by,
)
from flatlora_diffusion.config.model import (
    ModelConfig as ModelConfig,
)
from flatlora_diffusion.config.model import (
    PredictionType as PredictionType,
)
from flatlora_diffusion.config.model import (
    Quantization as Quantization,
)
from flatlora_diffusion.config.optim import (
    LossType as LossType,
)
from flatlora_diffusion.config.optim import (
    LrScheduler as LrScheduler,
)
from flatlora_diffusion.config.optim import (
    MixedPrecision as MixedPrecision,
)
from flatlora_diffusion.config.optim import (
    ObjectiveConfig as ObjectiveConfig,
)
from flatlora_diffusion.config.optim import (
    OptimConfig as OptimConfig,
)
from flatlora_diffusion.config.optim import (
    Optimizer as Optimizer,
)
from flatlora_diffusion.config.programs import (
    CAPTION_WRITERS as CAPTION_WRITERS,
)
from flatlora_diffusion.config.programs import (
    QUIET_VARIABLE as QUIET_VARIABLE,
)
from flatlora_diffusion.config.programs import (
    CaptionConfig as CaptionConfig,
)
from flatlora_diffusion.config.programs import (
    CompareConfig as CompareConfig,
)
from flatlora_diffusion.config.programs import (
    DoctorConfig as DoctorConfig,
)
from flatlora_diffusion.config.programs import (
    ExportConfig as ExportConfig,
)
from flatlora_diffusion.config.programs import (
    ExtractConfig as ExtractConfig,
)
from flatlora_diffusion.config.programs import (
    FileLayout as FileLayout,
)
from flatlora_diffusion.config.programs import (
    FlatnessConfig as FlatnessConfig,
)
from flatlora_diffusion.config.programs import (
    GenerateConfig as GenerateConfig,
)
from flatlora_diffusion.config.programs import (
    ImportConfig as ImportConfig,
)
from flatlora_diffusion.config.programs import (
    InspectConfig as InspectConfig,
)
from flatlora_diffusion.config.programs import (
    LandscapeConfig as LandscapeConfig,
)
from flatlora_diffusion.config.programs import (
    LoraLayout as LoraLayout,
)
from flatlora_diffusion.config.programs import (
    MergeConfig as MergeConfig,
)
from flatlora_diffusion.config.programs import (
    ResizeConfig as ResizeConfig,
)
from flatlora_diffusion.config.run import (
    RunConfig as RunConfig,
)
from flatlora_diffusion.config.run import (
    SaveDtype as SaveDtype,
)
from flatlora_diffusion.config.section import (
    SAMPLES as SAMPLES,
)
from flatlora_diffusion.config.section import (
    ConfigError as ConfigError,
)
from flatlora_diffusion.config.section import (
    RunError as RunError,
)
from flatlora_diffusion.config.section import (
    Section as Section,
)
from flatlora_diffusion.config.section import (
    StoppedError as StoppedError,
)
from flatlora_diffusion.config.section import (
    choices_of as choices_of,
)
from flatlora_diffusion.config.section import (
    setting as setting,
)
from flatlora_diffusion.config.section import (
    shipped as shipped,
)
from flatlora_diffusion.config.training import (
    TrainConfig as TrainConfig,
)
from flatlora_diffusion.config.training import (
    completed as completed,
)
from flatlora_diffusion.config.training import (
    preset_file as preset_file,
)
from flatlora_diffusion.config.training import (
    read_setting as read_setting,
)
from flatlora_diffusion.config.training import (
    setting_hints as setting_hints,
)
from flatlora_diffusion.config.training import (
    settings_that as settings_that,
)
