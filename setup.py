"""The packages of the wheel; everything else is in pyproject.toml.

Configs are kept at the top of the checkout and shipped inside rl_lora, which pyproject.toml alone cannot say
next to automatic discovery.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rl_lora*", "rewards*"]), "rl_lora.configs"],
    package_dir={"rl_lora.configs": "configs"},
)
