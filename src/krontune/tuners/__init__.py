"""The two methods as PEFT tuners. Importing this registers them."""

from krontune.tuners._peft import register_method
from krontune.tuners.gradient import preprocess_gradient as preprocess_gradient
from krontune.tuners.lsr import LsrConfig as LsrConfig
from krontune.tuners.lsr import LsrModel as LsrModel
from krontune.tuners.ranks import spread_over_ranks as spread_over_ranks
from krontune.tuners.soka import SokaConfig as SokaConfig
from krontune.tuners.soka import SokaModel as SokaModel

register_method("LSR", LsrConfig, LsrModel)
register_method("SOKA", SokaConfig, SokaModel)
