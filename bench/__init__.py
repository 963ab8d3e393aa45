"""What the tunnel costs, measured: throughput in a lab beside other ways to connect pods, and single steps alone.

    python -m bench                 pod to pod over the tunnel, plain routing and kernel vxlan, interleaved
    python -m bench.demo            the same in short, with leases, routes and pings on screen
    python -m bench.micro.lookup    nanoseconds per peer lookup
"""
