"""The commands of `flowalign`. Each is a function whose keyword arguments are its key=value arguments."""
