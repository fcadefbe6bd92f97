"""Feature networks of published metrics: their architectures only; weights are files that the user supplies."""
