"""Routing predicted from a trace: fitted on some requests, judged on others, and given to a device's work."""
