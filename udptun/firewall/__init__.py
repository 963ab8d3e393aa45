"""The firewall: flannel's rules as data, the tools that set them, the loop that keeps them."""
