"""From one form to another: plain LoRAs for serving, merged models, smaller adapters, other Kronecker formats."""

from krontune.convert.adapter import Adapter as Adapter
from krontune.convert.adapter import open_adapter as open_adapter
from krontune.convert.compression import Compression as Compression
from krontune.convert.compression import compress as compress
from krontune.convert.exporting import FORMATS as FORMATS
from krontune.convert.exporting import export as export
from krontune.convert.exporting import open_any as open_any
from krontune.convert.inspection import info as info
from krontune.convert.merging import Merge as Merge
from krontune.convert.merging import merge as merge
from krontune.convert.results import Export as Export
from krontune.convert.to_lora import VLLM_RANKS as VLLM_RANKS
