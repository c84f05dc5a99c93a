"""Where faces come from: folders, tars, RecordIO, Parquet and CSV lists, all as one `FaceSource`; a file per form."""

from facetrain.data.sources.faces import FaceSource, SkippedImage
from facetrain.data.sources.opening import open_faces

__all__ = ["FaceSource", "SkippedImage", "open_faces"]
