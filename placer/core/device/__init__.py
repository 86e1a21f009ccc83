"""One device whose experts do not all fit: nested bit planes, what is demanded of them, their order, and the plan."""
