"""Few ranks touched: search on exact expert sets under a load cap, with and without replicas."""
