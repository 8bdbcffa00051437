"""`python -m rl_lora`, for launchers that start a module."""

import sys

from rl_lora.cli import main

sys.exit(main())
