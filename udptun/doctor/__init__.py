"""What goes wrong on a host in the field, looked for from outside: `udptun doctor`."""
