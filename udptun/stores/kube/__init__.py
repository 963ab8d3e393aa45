"""The `kube` store: leases as annotations of Kubernetes' nodes."""
