"""Data sets, the order they are seen in, and images for people."""

from gankern.data.dataset import Dataset, open_dataset
from gankern.data.errors import DataError
from gankern.data.grid import make_grid, save_grid
from gankern.data.sampler import BatchSampler

__all__ = ["BatchSampler", "DataError", "Dataset", "make_grid", "open_dataset", "save_grid"]
