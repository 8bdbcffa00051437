"""The settings of jobs: sections, their checks, and overrides on the command line."""

from rl_lora.config.sections import (
    VARIANT_NAMES as VARIANT_NAMES,
)
from rl_lora.config.sections import (
    AlgorithmSection as AlgorithmSection,
)
from rl_lora.config.sections import (
    DataSection as DataSection,
)
from rl_lora.config.sections import (
    EvalSection as EvalSection,
)
from rl_lora.config.sections import (
    LoraSection as LoraSection,
)
from rl_lora.config.sections import (
    ModelSection as ModelSection,
)
from rl_lora.config.sections import (
    OptimSection as OptimSection,
)
from rl_lora.config.sections import (
    RewardSection as RewardSection,
)
from rl_lora.config.sections import (
    RunConfig as RunConfig,
)
from rl_lora.config.sections import (
    RunSection as RunSection,
)
from rl_lora.config.sections import (
    SamplingSection as SamplingSection,
)
from rl_lora.config.sections import (
    Section as Section,
)
from rl_lora.config.sections import (
    SomeSection as SomeSection,
)
from rl_lora.config.sections import (
    SourceSection as SourceSection,
)
from rl_lora.config.sections import (
    SourcesSection as SourcesSection,
)
from rl_lora.config.sections import (
    WarmStartSection as WarmStartSection,
)
from rl_lora.config.sections import (
    load_config as load_config,
)
from rl_lora.config.sections import (
    parse_as as parse_as,
)
from rl_lora.config.sections import (
    parse_config as parse_config,
)
from rl_lora.config.sections import (
    read_settings as read_settings,
)
