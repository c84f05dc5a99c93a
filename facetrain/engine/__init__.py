"""Engine: what trains a network. Sole importer of deepspeed.

The state it saves is whole (one tensor per parameter), so that it doesn't depend on the number of ranks or the ZeRO
stage.
"""

from facetrain.engine.engine import Engine
from facetrain.engine.learning_rate import learning_rate_at

__all__ = ["Engine", "learning_rate_at"]
