"""Routing traces: the type and its store, readers for each source, the recorder, generators, summaries."""
