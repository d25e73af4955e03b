"""Run folders in, tables and figures out. Reads files only: imports neither brqat nor torch."""
