"""Which tokens run together, so that a batch touches few experts: Read-ME's batcher and ExpertFlow's re-batching."""
