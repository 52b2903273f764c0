"""Measures of how good generated images are, from features of real and generated ones.

extractor = load_extractor("efficientnet-lite0")
real = extract(DatasetImages(open_dataset("digits")), extractor)
fake = extract(GeneratedImages(G, 5000), extractor)
measure(real, fake, extractor).values()
"""

from gankern.metrics.extractors import Extractor, MetricsError, load_extractor, module_extractor
from gankern.metrics.features import (
    DatasetImages,
    Features,
    FolderImages,
    GeneratedImages,
    extract,
)
from gankern.metrics.measure import Figure, Measurement, measure, path_figures

__all__ = [
    "DatasetImages",
    "Extractor",
    "Features",
    "Figure",
    "FolderImages",
    "GeneratedImages",
    "Measurement",
    "MetricsError",
    "extract",
    "load_extractor",
    "measure",
    "module_extractor",
    "path_figures",
]
