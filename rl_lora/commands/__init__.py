"""The subcommands of `rl-lora`, one file each."""
