"""Hours of mixed load and random faults on three hosts, after each of which everything must be as it was.

schedule    which fault comes when, from a seed                       pure
faults      the table of faults: how each comes and goes, and what may be lost meanwhile
ground      the hosts that they happen to, and their lease store
store       the lease stores, their outages, and what they say
load        flows between the pods, of which every packet and byte is accounted for
state       what a host is like: status, kernel, processes, memory
checks      what of it is wrong                                       pure
report      the figures, as text and JSON                             pure
run         the command
"""
