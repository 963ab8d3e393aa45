"""A small Kubernetes API server for the lab and the tests: nodes, as a node's daemon sees and changes them.

`cluster.py` has the objects and their history, `patch.py` the kinds of patches, and `server.py` speaks HTTP.  What it
answers is what a real one answers (tests/stores/test_kube_api.py runs over both); what it does not know it refuses.
"""
