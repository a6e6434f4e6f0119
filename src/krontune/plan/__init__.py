"""Look before training: what an adapter costs, what a budget buys, and what the weights' spectra say."""

from krontune.amounts import human_count as human_count
from krontune.amounts import parse_amount as parse_amount
from krontune.plan.cost import ModulePlan as ModulePlan
from krontune.plan.planner import METHODS as METHODS
from krontune.plan.planner import Plan as Plan
from krontune.plan.planner import plan as plan
from krontune.plan.planner import soka_ranks as soka_ranks
from krontune.plan.spectra import Spectrum as Spectrum
from krontune.plan.spectra import parse_shapes as parse_shapes
from krontune.plan.spectra import spectrum as spectrum
from krontune.plan.spectra import spectrum_report as spectrum_report
from krontune.plan.targets import Match as Match
from krontune.plan.targets import Target as Target
from krontune.plan.targets import find_targets as find_targets
