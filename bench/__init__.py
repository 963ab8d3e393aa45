"""Measure what the tunnel costs: in a lab beside other ways to connect pods, and in single steps alone.

    python -m bench                  every path, workload and underlay mode, interleaved; `report`, `compare`
    python -m bench.demo             two hosts with leases, routes and pings on screen, and a short comparison
    python -m bench.micro.lookup     nanoseconds per peer lookup; beside it `checksum` and `turn`

README.md says how to run, read and extend it.
"""
