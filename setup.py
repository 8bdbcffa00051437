"""The packages of the wheel; everything else is in pyproject.toml.

Configs are kept at the top of the checkout and shipped inside rl_lora, which pyproject.toml
cannot say without listing every package by hand.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rl_lora*", "rewards*"]), "rl_lora.configs"],
    package_dir={"rl_lora.configs": "configs"},
)
