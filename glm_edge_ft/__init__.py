"""Fine-tuning of the GLM-Edge chat models and the GLM-Edge-V vision models."""
