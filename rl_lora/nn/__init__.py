"""What runs inside the model: LoRA layers, experts, attention of packed rows, log-probs."""
