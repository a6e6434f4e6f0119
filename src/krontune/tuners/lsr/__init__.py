"""LSR-Adapt (arXiv:2502.13568): LoRA whose two factors are each a short sum of Kronecker products."""

from krontune.tuners.lsr.config import LsrConfig as LsrConfig
from krontune.tuners.lsr.config import LsrSpec as LsrSpec
from krontune.tuners.lsr.layer import LsrLayer as LsrLayer
from krontune.tuners.lsr.model import LsrModel as LsrModel
