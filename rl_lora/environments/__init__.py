"""Several turns: what answers the policy between them, and the sampler that takes the turns."""
