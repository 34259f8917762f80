"""kd: knowledge distillation and model compression, every run found and reproduced by the hash of its config."""

__version__ = "0.1.0"
