"""What runs where: each combination of type, SoC, cores, release, context and LoRA, with the evidence for it."""
