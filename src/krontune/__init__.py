"""Kronecker-structured fine-tuning for PyTorch and Hugging Face PEFT.

Importing krontune registers two methods with PEFT, LSR-Adapt (`LsrConfig`) and SoKA (`SokaConfig`), which go wherever a
LoraConfig goes.
"""

from krontune.errors import CheckpointError as CheckpointError
from krontune.errors import ConfigError as ConfigError
from krontune.errors import KrontuneError as KrontuneError
from krontune.errors import ShapeError as ShapeError
from krontune.tuners import LsrConfig as LsrConfig
from krontune.tuners import LsrModel as LsrModel
from krontune.tuners import SokaConfig as SokaConfig
from krontune.tuners import SokaModel as SokaModel
from krontune.tuners import preprocess_gradient as preprocess_gradient
from krontune.tuners import spread_over_ranks as spread_over_ranks

__version__ = "0.1.0"
