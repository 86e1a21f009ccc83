"""Lower bounds with certificates: data that placer.core.certificate verifies without a solver."""
