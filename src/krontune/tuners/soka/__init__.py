"""SoKA (arXiv:2506.15251): an update that is a sum of Kronecker products, started from the weight's own KPSVD."""

from krontune.tuners.soka.config import SokaConfig as SokaConfig
from krontune.tuners.soka.config import SokaSpec as SokaSpec
from krontune.tuners.soka.layer import SokaLayer as SokaLayer
from krontune.tuners.soka.model import SokaModel as SokaModel
