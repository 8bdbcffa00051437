"""Settings of jobs: sections, checks, and command-line overrides."""
# ruff: noqa: I001  # imports of many names

from rl_lora.config.section import Section as Section
from rl_lora.config.data import (
    HELD_OUT as HELD_OUT,
    DataSection as DataSection,
    SourceSection as SourceSection,
    SourcesSection as SourcesSection,
)
from rl_lora.config.sections import (
    VARIANT_NAMES as VARIANT_NAMES,
    AlgorithmSection as AlgorithmSection,
    EnvironmentSection as EnvironmentSection,
    EvalSection as EvalSection,
    LoraSection as LoraSection,
    ModelSection as ModelSection,
    OptimSection as OptimSection,
    ResourcesSection as ResourcesSection,
    RewardSection as RewardSection,
    RewardTermSection as RewardTermSection,
    RunConfig as RunConfig,
    RunSection as RunSection,
    SamplingSection as SamplingSection,
    WarmStartSection as WarmStartSection,
)
from rl_lora.config.load import (
    SomeSection as SomeSection,
    load_config as load_config,
    parse_as as parse_as,
    parse_config as parse_config,
    read_settings as read_settings,
    with_present_names as with_present_names,
)
