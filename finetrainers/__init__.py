"""Fine-tune video diffusion models on the GPU you own, or on a cluster."""

__version__ = "0.1.0"
