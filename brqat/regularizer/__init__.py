"""Regularizers that pull weights and activations onto their levels: one file per paper."""
