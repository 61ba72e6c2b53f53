"""The commands of `flowalign`: each a function whose keyword arguments are its key=value words."""
