"""Synthetic identities: drawn faces to train, test and demonstrate with where there are no real ones.

Path of an image: traits (who) and capture (how) -> face (features and covers drawn on a canvas) -> dataset (files).
"""

from facetrain.data.synthetic.dataset import SyntheticSummary, draw_somebody, synthesize

__all__ = ["SyntheticSummary", "draw_somebody", "synthesize"]
