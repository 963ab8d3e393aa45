"""The CNI plugin: a pod's ADD, DEL and CHECK become those of a delegate such as bridge (docs/cni.md)."""
