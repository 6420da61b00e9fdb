"""Language models with LM-Infinite attention, in NumPy and double precision.

Written from the formulas (Han et al., arXiv 2308.16137; docs/semantics.md) and sharing no code with the engine: the
tests compare the two. It keeps every key, un-rotated, and asks for each query which keys it sees and at which distance;
nothing is ever evicted, placed or rebased.

`semantics` says what a query sees, `retrieval` what it looks up, `architecture` describes kinds of models, `rotation`
and `transformer` hold their formulas, `stream` runs a sequence of tokens.
"""

from reference.architecture import Architecture, AttentionTemperature, Layer, Rope
from reference.arrays import BoolArray, ComplexArray, FloatArray, IntArray
from reference.retrieval import Retrieval
from reference.semantics import FULL_ATTENTION, Attention, Chunks, SlidingWindow
from reference.stream import TokenStream
from reference.transformer import Transformer

__all__ = [
    "FULL_ATTENTION",
    "Architecture",
    "Attention",
    "AttentionTemperature",
    "BoolArray",
    "Chunks",
    "ComplexArray",
    "FloatArray",
    "IntArray",
    "Layer",
    "Retrieval",
    "Rope",
    "SlidingWindow",
    "TokenStream",
    "Transformer",
]
