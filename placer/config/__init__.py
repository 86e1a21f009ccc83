"""Cluster presets and YAML settings."""

from placer.config.clusters import cluster_names, load_cluster, save_cluster
from placer.config.settings import Settings, load_settings

__all__ = ["Settings", "cluster_names", "load_cluster", "load_settings", "save_cluster"]
