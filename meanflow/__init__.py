"""MeanFlow: one-step image generation, trained with Hugging Face Accelerate."""

__version__ = "0.1.0"
