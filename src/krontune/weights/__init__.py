"""A base model as it lies on disk: where it is, what it is built like, and its weights read one tensor at a time."""

from krontune.weights.reader import Weights as Weights
from krontune.weights.reader import has_weights as has_weights
from krontune.weights.reader import open_weights as open_weights
from krontune.weights.source import PACKAGED as PACKAGED
from krontune.weights.source import Source as Source
from krontune.weights.source import find_model as find_model
from krontune.weights.source import load_config as load_config
from krontune.weights.source import local_folder as local_folder
from krontune.weights.source import meta_model as meta_model
