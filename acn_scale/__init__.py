"""Pretrain Auto-Compressing Networks and their residual twins with DeepSpeed."""

__version__ = "0.1.0"
