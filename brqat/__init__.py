"""brqat: sweeps of low-bit quantization-aware training with LSQ and Bin Regularization."""

__version__ = "0.1.0"
