"""Certificates: data that proves a lower bound, verified without a solver and without the code that found it."""

from placer.core.certificates.certificate import Certificate, verify

__all__ = ["Certificate", "verify"]
