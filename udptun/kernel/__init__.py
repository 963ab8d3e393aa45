"""The only place that speaks to the kernel about links, addresses, routes and devices."""
