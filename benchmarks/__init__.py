"""One script a figure of the README; `make bench-NAME` runs one."""
