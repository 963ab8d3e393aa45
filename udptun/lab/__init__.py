"""Hosts, pods and daemons in namespaces on one machine: behind `udptun lab`, tests/ and bench/ alike.

`topology` has the lab itself, `comparison` other ways for packets to travel in it, `cli` the command.
"""
