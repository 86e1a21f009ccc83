"""The serving loop: requests arrive over time, EP ranks batch and iterate, plans are rebalanced while they serve."""

from sim.serving.arrivals import Arrivals, Lengths, make_workload
from sim.serving.engine import Served, serve
from sim.serving.handoff import HandoffSpec
from sim.serving.jsonl import read_workload
from sim.serving.limits import Limits
from sim.serving.placement import Policy, by_affinity, least_loaded, round_robin
from sim.serving.pool import PoolSpec
from sim.serving.pricer import Batch, PlanPricer, Price, Pricer
from sim.serving.rebalance import Rebalancing, Window, migration
from sim.serving.report import Slo, report
from sim.serving.requests import Request, Workload
from sim.serving.streams import Streams

__all__ = [
    "Arrivals",
    "Batch",
    "HandoffSpec",
    "Lengths",
    "Limits",
    "PlanPricer",
    "Policy",
    "PoolSpec",
    "Price",
    "Pricer",
    "Rebalancing",
    "Request",
    "Served",
    "Slo",
    "Streams",
    "Window",
    "Workload",
    "by_affinity",
    "least_loaded",
    "make_workload",
    "migration",
    "read_workload",
    "report",
    "round_robin",
    "serve",
]
