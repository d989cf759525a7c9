"""Plans: a sampler as a table of numbers, how it is built, checked, printed and saved."""

from pydiff.plans.base import PlanError as PlanError
from pydiff.plans.plan import Plan as Plan
from pydiff.plans.plan import concatenate as concatenate
