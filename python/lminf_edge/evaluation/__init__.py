"""Measurements of what a model makes of a text. The command line only shows what is measured here."""
