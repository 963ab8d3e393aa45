"""Text into values: flags, environment, net-conf.json, subnet.env.  Pure but for the file that subnet.env is."""
