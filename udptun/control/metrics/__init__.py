"""What `/metrics` says, in the formats of Prometheus: docs/metrics.md."""
