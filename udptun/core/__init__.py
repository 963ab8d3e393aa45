"""Values and rules that everything may use.  Pure, except `atomic_file`, which writes one."""
