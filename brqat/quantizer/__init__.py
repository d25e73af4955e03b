"""Fake-quantizers: one file per paper, each a site's grid, its alpha and its rounding."""
