"""Reinforcement-learning post-training whose policy is a LoRA adapter on a base model."""

__version__ = "0.1.0"
